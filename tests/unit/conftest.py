"""Fixtures that run a test on every backend and in every float type."""

from __future__ import annotations

import os

import numpy as np
import pytest

from hpctrain import backends
from hpctrain.backends.base import Backend

NAMES = [name for name in backends.NAMES if name != "native" or os.environ.get("HPCTRAIN_NATIVE") != "0"]
"""HPCTRAIN_NATIVE=0, which leaves the compiled kernels out of an installation, leaves them out of its tests."""


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> Backend:
    return backends.get(request.param)


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> np.dtype:
    return np.dtype(request.param)
