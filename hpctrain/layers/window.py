"""Sliding windows: which inputs an interval of outputs reads, for convolution and pooling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from hpctrain.errors import PlanError
from hpctrain.layers.base import each, spatial_axes
from hpctrain.partition import Interval, Shape

Number = int | tuple[int, ...]
Padding = int | tuple[int | tuple[int, int], ...]
"""For all position dims, or one entry per position dim: a number, or (before, after)."""


@dataclass(frozen=True)
class Window:
    """The input interval under a sliding window for an interval of its output.

    `before` and `after` are the paddings at both ends. With `ceil`, a last window may reach past the padding, but not
    begin past the input (PyTorch's rule).
    """

    kernel: int
    stride: int
    before: int
    after: int
    dilation: int = 1
    ceil: bool = False

    def __call__(self, start: int, stop: int) -> Interval:
        return start * self.stride - self.before, (stop - 1) * self.stride - self.before + self.reach

    @property
    def reach(self) -> int:
        """Extent of the input under one window."""
        return self.dilation * (self.kernel - 1) + 1

    def output(self, n: int) -> int:
        """Output extent for an input extent of `n`."""
        room = n + self.before + self.after - self.reach
        if not self.ceil:
            return room // self.stride + 1
        count = -(-room // self.stride) + 1
        return count - 1 if (count - 1) * self.stride >= n + self.before else count


def paddings(padding: Padding, dims: int) -> tuple[tuple[int, int], ...]:
    """(before, after) per position dim. Raises PlanError on a tuple of another length."""
    if isinstance(padding, int):
        return ((padding, padding),) * dims
    if len(padding) != dims:
        raise PlanError(
            f"padding = {padding} has {len(padding)} entries, but the input has {dims} position dims; "
            "give a number, or a number or (before, after) for each"
        )
    return tuple((p, p) if isinstance(p, int) else (p[0], p[1]) for p in padding)


@lru_cache(maxsize=4096)  # planning asks for the same ones again and again
def windows(
    shape: Shape, kernel: Number, stride: Number, padding: Padding, dilation: Number = 1, ceil: bool = False
) -> tuple[Window, ...]:
    """One Window per position dim of a channels-last `shape`. Raises PlanError where the window does not fit."""
    dims = len(shape) - 2
    if dims < 1:
        raise PlanError(f"a sliding window needs positions, but {shape} has none; give (N, W, C), (N, H, W, C) or more")
    sizes = zip(
        each(kernel, dims, "kernel"),
        each(stride, dims, "stride"),
        paddings(padding, dims),
        each(dilation, dims, "dilation"),
        strict=True,
    )
    found = tuple(Window(k, s, before, after, d, ceil) for k, s, (before, after), d in sizes)
    for axis, n, window in zip(spatial_axes(len(shape)), shape[1:-1], found, strict=True):
        if min(window.kernel, window.stride, window.dilation) < 1 or min(window.before, window.after) < 0:
            raise PlanError(f"{window}: kernel, stride and dilation are at least 1, padding at least 0")
        room = n + window.before + window.after - window.reach
        if room < 0:
            raise PlanError(
                f"{axis}: a window of {window.reach} does not fit an input of {n} with padding {window.before} and "
                f"{window.after}; pad by at least {-room} more in all, or use a larger input"
            )
    return found
