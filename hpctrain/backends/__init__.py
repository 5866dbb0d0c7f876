"""Backends: the array operations on one device. `get` is the table of names."""

from __future__ import annotations

from hpctrain.backends.base import Backend
from hpctrain.errors import BackendUnavailable

NAMES = ("reference", "native")


def get(name: str, exact: bool = False) -> Backend:
    """The backend called `name`; `exact`: without Winograd's convolution.

    Raises BackendUnavailable where it cannot run here, with the remedy.
    """
    if name == "reference":
        from hpctrain.backends.reference import Reference

        return Reference()
    if name == "native":
        from hpctrain.backends.native import Native

        return Native(exact)
    raise BackendUnavailable(f"backend {name!r} does not exist; choose one of {', '.join(NAMES)}")
