"""bfloat16 for operations that are written for other float types: computed in float32, then rounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.precision import BF16

Class = TypeVar("Class", bound=type)


def in_float32(*but: str, alike: Sequence[str] = ()) -> Callable[[Class], Class]:
    """Decorates a backend: its operations take arrays of bfloat16; those named already do, `alike` if all floats are.

    Each such array is handed over as a copy in float32; where the operation wrote, the copy is rounded into the array.
    """

    def decorate(backend: Class) -> Class:
        for name, what in list(vars(backend).items()):
            if callable(what) and not name.startswith("_") and name not in but:
                setattr(backend, name, _rounded(what, name in alike))
        return backend

    return decorate


def to_bfloat16(x: Array) -> Array:
    """x, rounded to nearest, ties to even."""
    with np.errstate(invalid="ignore"):  # NumPy warns of NaN
        return x.astype(BF16)


def _rounded(operation: Callable[..., Any], alike: bool) -> Callable[..., Any]:
    @wraps(operation)
    def rounded(*arguments: Any, **named: Any) -> Any:
        given = (*arguments, *named.values())
        others = any(isinstance(a, np.ndarray) and a.dtype in (np.float32, np.float64) for a in given)
        if not any(map(_is_bfloat16, given)) or (alike and not others):
            return operation(*arguments, **named)
        copies: dict[Any, tuple[Array, Array]] = {}  # one for each array, which may be input and output

        def copy_of(a: Any) -> Any:
            if not _is_bfloat16(a):
                return a
            place = (a.ctypes.data, a.shape, a.strides)
            if place not in copies:
                copies[place] = a, a.astype(np.float32)
            return copies[place][1]

        found = operation(*map(copy_of, arguments), **{name: copy_of(a) for name, a in named.items()})
        for array, copy in copies.values():
            if not np.array_equal(copy.view(np.uint32), array.astype(np.float32).view(np.uint32)):
                array[...] = to_bfloat16(copy)
        return found

    return rounded


def _is_bfloat16(a: Any) -> bool:
    return isinstance(a, np.ndarray) and a.dtype == BF16
