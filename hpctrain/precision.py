"""The number types that a run may compute in, by the names of the config."""

from __future__ import annotations

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
"""float32 without its last 16 bits."""

TYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "bf16": BF16}
"""What flows between layers, by `train.precision`."""


def exact(dtype: np.dtype) -> np.dtype:
    """The type of what needs more digits: weights as they are trained, their gradients, vectors, losses and targets."""
    return np.dtype(np.float32) if dtype == BF16 else dtype
