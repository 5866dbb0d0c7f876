"""Random windows: convolutions of both directions and pools, with all their numbers, on inputs that they fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from hpctrain.layers import AvgPool, Conv, ConvTranspose, Layer, MaxPool
from hpctrain.partition import Shape

Drawn = tuple[Layer, tuple[Shape, ...]]
"""A layer and the shapes of its inputs."""
Draw = Callable[[st.SearchStrategy[Any]], Any]
Numbers = tuple[Any, ...]


def whole(draw: Draw, least: int, most: int) -> int:
    """A whole number from `least` to `most`, both possible."""
    return int(draw(st.integers(least, most)))


def some_of(draw: Draw, *values: Any) -> Any:
    """One of `values`; the first is the simplest."""
    return draw(st.sampled_from(values))


def number(values: Numbers) -> Any:
    """One number where all position dims have the same, so that both spellings are drawn."""
    return values[0] if len(set(values)) == 1 and not isinstance(values[0], tuple) else values


def positions(draw: Draw, least: int = 1) -> Shape:
    """Extents of `least` to 3 position dims; one in five is a single element."""
    dims = some_of(draw, *[n for n in (1, 2, 2, 2, 3, 0) if n >= least])
    return tuple(some_of(draw, 1, *range(2, 6 if dims == 3 else 10)) for _ in range(dims))


def tensor(draw: Draw, least: int = 0, channels: int = 5) -> Shape:
    """The shape of a tensor (N, [[[D,] H,] W,] C)."""
    return (whole(draw, 1, 4), *positions(draw, least), whole(draw, 1, channels))


# --- windows ------------------------------------------------------------------------------------------------------


@st.composite
def conv(draw: Draw, border: str = "zero", grouped: str = "") -> Drawn:
    """Any kernel, stride, dilation and padding; inputs from the smallest on that the window fits."""
    dims = some_of(draw, 1, 2, 2, 2, 3)
    kernel = tuple(whole(draw, 1, (5, 5, 3)[dims - 1]) for _ in range(dims))
    stride = tuple(some_of(draw, 1, 1, 2, 3, 4) for _ in range(dims))
    dilation = tuple(some_of(draw, 1, 1, 1, 2, 3) for _ in range(dims))
    padding = tuple((whole(draw, 0, 3), whole(draw, 0, 3)) for _ in range(dims))
    extents = []
    for k, d, (before, after) in zip(kernel, dilation, padding, strict=True):
        least = max(1, d * (k - 1) + 1 - before - after)
        if border == "reflect":
            least = max(least, before + 1, after + 1)
        extents.append(whole(draw, least, max(least, 9 if dims < 3 else 5)))
    channels, filters, groups = groups_of(draw, grouped)
    layer = Conv(
        filters,
        number(kernel),
        number(stride),
        padding,
        number(dilation),
        groups,
        bias=draw(st.booleans()),
        border=border,
    )
    return layer, ((whole(draw, 1, 4), *extents, channels),)


def groups_of(draw: Draw, grouped: str) -> tuple[int, int, int]:
    """(channels, filters, groups)."""
    if not grouped:
        return whole(draw, 1, 5), whole(draw, 1, 5), 1
    groups = whole(draw, 2, 4)
    channels = 1 if grouped == "depthwise" else whole(draw, 1, 3)
    return groups * channels, groups * whole(draw, 1, 3), groups


@st.composite
def transposed(draw: Draw, grouped: str = "") -> Drawn:
    """Kernels below and above the stride, outputs of at least one element."""
    dims = some_of(draw, 1, 2, 2, 2, 3)
    kernel, stride, dilation, extra, padding, extents = ([] for _ in range(6))
    for _ in range(dims):
        k, s, d = whole(draw, 1, 5 if dims < 3 else 3), some_of(draw, 1, 2, 3, 4), some_of(draw, 1, 1, 2, 3)
        n, e = whole(draw, 1, 6 if dims < 3 else 3), whole(draw, 0, max(s, d) - 1)
        spare = (n - 1) * s + d * (k - 1) + e  # what may be cut off at both ends together
        before = whole(draw, 0, min(3, spare))
        after = whole(draw, 0, min(3, spare - before))
        for values, value in zip(
            (kernel, stride, dilation, extra, padding, extents), (k, s, d, e, (before, after), n), strict=True
        ):
            values.append(value)
    channels, filters, groups = groups_of(draw, grouped)
    layer = ConvTranspose(
        filters,
        number(tuple(kernel)),
        number(tuple(stride)),
        tuple(padding),
        number(tuple(extra)),
        number(tuple(dilation)),
        groups,
        bias=draw(st.booleans()),
    )
    return layer, ((whole(draw, 1, 4), *extents, channels),)


@st.composite
def pool(draw: Draw, average: bool = False) -> Drawn:
    """Every window has something of the input under it: the maximum over padding alone is minus infinity."""
    dims = some_of(draw, 1, 2, 2, 2, 3)
    ceil = draw(st.booleans())
    kernel, stride, dilation, padding, extents = ([] for _ in range(5))
    for _ in range(dims):
        k = whole(draw, 1, 5 if dims < 3 else 3)
        d = 1 if average else some_of(draw, 1, 1, 2, 3)
        s, reach = whole(draw, 1, 4), d * (k - 1) + 1
        before, after = whole(draw, 0, reach // 2), whole(draw, 0, reach // 2)
        least = max(1, reach - before - after)
        n = whole(draw, least, max(least, 9 if dims < 3 else 5))
        for values, value in zip(
            (kernel, stride, dilation, padding, extents), (k, s, d, (before, after), n), strict=True
        ):
            values.append(value)
    step = None if draw(st.booleans()) else number(tuple(stride))
    shape = (whole(draw, 1, 4), *extents, whole(draw, 1, 5))
    layer: AvgPool | MaxPool
    if average:
        layer = AvgPool(number(tuple(kernel)), step, tuple(padding), ceil, count_padding=draw(st.booleans()))
    else:
        layer = MaxPool(number(tuple(kernel)), step, tuple(padding), number(tuple(dilation)), ceil)
    if max(dilation) > 1:  # else a window that begins within the input has some of it
        used = kernel if step is None else stride
        counts = layer.output_shape(shape)[1:-1]
        for k, s, d, (before, _), n, count in zip(kernel, used, dilation, padding, extents, counts, strict=True):
            assume(all(any(0 <= o * s - before + t * d < n for t in range(k)) for o in range(count)))
    return layer, (shape,)
