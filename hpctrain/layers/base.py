"""What every layer says (Layer, frozen, no arrays) and what every bound layer does (Op, purely local).

The work of a layer is a tensor of its own: its output's dims, then any dims that it sums over (input channels of a
convolution). A rank does one box of the work. From that box follow, dim by dim, the boxes of input it `needs` and the
box of output it `produces`; where summed dims are cut, that is a partial sum of a box that others also produce.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, ClassVar, Protocol

import numpy as np

from hpctrain.backends.base import Array, Backend
from hpctrain.errors import PlanError
from hpctrain.partition import AxisNames, Box, Partition, Shape
from hpctrain.regions import Along, Distribution

if TYPE_CHECKING:
    from mpi4py import MPI

SPATIAL = ("depth", "height", "width")
Dims = tuple[Along | None, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter or running statistic: its global shape, the axes that cut it, and how it starts.

    `init` is ("normal", std), ("uniform", bound) or ("constant", value); `decay` says whether weight decay applies.
    """

    shape: Shape
    axes: tuple[AxisNames, ...]
    init: tuple[str, float]
    decay: bool = False


@dataclass(frozen=True)
class Tail:
    """What follows a layer within its op: another tensor is added (`adds`), then values below 0 are times `slope`."""

    adds: bool = False
    slope: float = 1.0


class Layer:
    """What a layer computes: shapes, data needs, cost. Subclasses are frozen dataclasses; the planner's view."""

    inputs: ClassVar[range] = range(1, 2)
    """How many inputs it takes."""
    fill: ClassVar[float] = 0.0
    """What stands where a needed box leaves the input."""
    keeps_inputs: ClassVar[bool] = True
    """Whether the op's backward reads the inputs of its forward."""
    keeps_output: ClassVar[bool] = True
    """Whether the op's backward reads the output of its forward."""
    takes_tail: ClassVar[bool] = False
    """Whether the op can go on with an activation (Place.tail). Its backward then reads its output, and changes dy."""
    takes_addend: ClassVar[bool] = False
    """Whether it can add a tensor before that: the op's last input, whose gradient is what it leaves in dy."""

    def output_shape(self, *x: Shape) -> Shape:
        """Global output shape for these global input shapes. Raises PlanError where they do not fit."""
        raise NotImplementedError

    def work_shape(self, *x: Shape) -> Shape:
        """Global shape of the work: the output's dims first, summed dims after them."""
        return self.output_shape(*x)

    def work_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        """The axes that cut each dim of the work."""
        return tensor_axes(len(self.work_shape(*x)))

    def output_axes(self, *x: Shape) -> tuple[AxisNames, ...]:
        """The axes that cut each dim of the output among its owners."""
        return self.work_axes(*x)

    def labels(self, *x: Shape) -> tuple[bool, ...]:
        """Per input, whether it is of whole numbers: labels, which have no gradient."""
        return tuple(False for _ in x)

    def needs(self, *x: Shape) -> tuple[Dims, ...]:
        """Per input, how each of its dims follows from a dim of the work; None needs the whole dim."""
        return tuple(tuple(Along(d) for d in range(len(shape))) for shape in x)

    def produces(self, *x: Shape) -> Dims:
        """How each dim of the output follows from a dim of the work."""
        return tuple(Along(d) for d in range(len(self.output_shape(*x))))

    def weights(self, *x: Shape) -> dict[str, Weight]:
        """Trained parameters by name."""
        return {}

    def state(self, *x: Shape) -> dict[str, Weight]:
        """Running statistics by name: saved, not trained."""
        return {}

    def reduce_axes(self, *x: Shape) -> tuple[str, ...]:
        """Axes over which the op itself communicates small vectors (statistics)."""
        return ()

    def flops(self, *x: Shape) -> int:
        """Floating-point operations of one forward pass over the whole work; a backward pass costs about twice that."""
        return prod(self.work_shape(*x))

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        """Bytes of the arrays that an op keeps for its gradient besides its inputs and output, which are blocks of
        extents `x` and `output` (masks, indices); `itemsize` is that of its floats.
        """
        return 0

    def bind(self, place: Place) -> Op:
        """The op that does this rank's share."""
        raise NotImplementedError

    # --- derived -------------------------------------------------------------------------------------------------

    def work(self, partition: Partition, *x: Shape) -> Distribution:
        """The boxes of work of every rank."""
        return Distribution(self.work_shape(*x), self.work_axes(*x), partition)

    def output(self, partition: Partition, *x: Shape) -> Distribution:
        """The boxes of output that every rank owns."""
        return Distribution(self.output_shape(*x), self.output_axes(*x), partition)


@dataclass(frozen=True)
class Phase:
    """What a pass is for: whether it trains (batch statistics, dropout), the number of the step, from 0, and whether it
    runs `again` what this step has run already, because its output was not kept.
    """

    training: bool = True
    step: int = 0
    again: bool = False


@dataclass(frozen=True)
class Place:
    """Where an op runs: its layer's name, this rank's global boxes, the backend, the run's seed, and the communicator
    of the layer's `reduce_axes` (None where these are not cut).
    """

    name: str
    seed: int
    backend: Backend
    dtype: np.dtype
    shapes: tuple[Shape, ...]
    inputs: tuple[Box, ...]
    work: Box
    output: Box
    weights: Mapping[str, Box]
    comm: MPI.Intracomm | None
    tail: Tail = Tail()


class Op(Protocol):
    """A layer bound to a rank. Arrays are this rank's blocks; the executor has fetched what `needs` asks for."""

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        """Fill `y` with this rank's share of the output (a partial sum where summed dims are cut)."""

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        """Fill the gradients of inputs (None: not wanted) and of weights from `dy`; sums, never means."""


def tensor_axes(ndim: int) -> tuple[AxisNames, ...]:
    """The axes that cut a channels-last tensor (N, [[D,] H,] W, C); a vector (N,) is cut along the batch."""
    return ("batch",) if ndim == 1 else ("batch", *spatial_axes(ndim), "channel")


def spatial_axes(ndim: int) -> tuple[str, ...]:
    """The axes of the position dims of a channels-last tensor of `ndim` dims."""
    if ndim > 5:
        raise PlanError(f"a tensor of {ndim} dims has no axes; at most (N, D, H, W, C)")
    return SPATIAL[5 - ndim :] if ndim > 2 else ()


def each(value: int | tuple[int, ...], dims: int, what: str) -> tuple[int, ...]:
    """One number per position dim: an int stands for all. Raises PlanError on a tuple of another length."""
    if isinstance(value, int):
        return (value,) * dims
    if len(value) != dims:
        raise PlanError(f"{what} = {value} has {len(value)} numbers, but the input has {dims} position dims")
    return tuple(value)
