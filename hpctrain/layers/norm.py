"""Batch and layer normalization: the statistics are those of the whole tensor, however it is cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Layer, Phase, Place, Weight, spatial_axes, tensor_axes
from hpctrain.layers.statistics import COUNT, M2, MEAN, gather, merge_moments
from hpctrain.partition import Box, Shape, extent, names, split, volume
from hpctrain.precision import exact


@dataclass(frozen=True)
class BatchNorm(Layer):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta per channel (Ioffe & Szegedy 2015).

    Training uses the mean and variance over all samples and positions of the global batch; with `groups`, those of the
    sample's group: that many balanced ranges of the global batch, the first ones a sample longer. Training also moves
    the running statistics, of all groups together, towards the batch's by `momentum` (the running variance is the
    unbiased one); evaluation uses the running ones.
    """

    keeps_output: ClassVar[bool] = False
    takes_tail: ClassVar[bool] = True
    takes_addend: ClassVar[bool] = True
    eps: float = 1e-5
    momentum: float = 0.1
    groups: int = 1

    def output_shape(self, *x: Shape) -> Shape:
        if not 1 <= self.groups <= x[0][0]:
            raise PlanError(f"groups = {self.groups} of {x[0][0]} samples; give 1 to {x[0][0]}")
        return x[0]

    def weights(self, *x: Shape) -> dict[str, Weight]:
        return scale_and_offset(x[0][-1:], ("channel",))

    def state(self, *x: Shape) -> dict[str, Weight]:
        channels = x[0][-1:]
        return {
            "running_mean": Weight(channels, ("channel",), ("constant", 0.0)),
            "running_var": Weight(channels, ("channel",), ("constant", 1.0)),
        }

    def reduce_axes(self, *x: Shape) -> tuple[str, ...]:
        return ("batch", *spatial_axes(len(x[0])))

    def flops(self, *x: Shape) -> int:
        return 8 * prod(x[0])

    def bind(self, place: Place) -> BatchNormOp:
        return BatchNormOp(self, place)


class BatchNormOp:
    """Two small allgathers a step, merged in rank order: all ranks hold the same bits. Empty blocks take part too.

    With a tail it then adds its second input, and rectifies; dy first becomes the gradient before that.
    """

    def __init__(self, layer: BatchNorm, place: Place) -> None:
        self.layer, self.backend, self.comm, self.tail = layer, place.backend, place.comm, place.tail
        self.parts = _groups(layer.groups, place.shapes[0][0], place.output)
        self.shape = (layer.groups, *extent(place.output[-1:]))
        self.mean, self.rstd = np.zeros((2, *self.shape))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x, self.y = x[0], y
        if not phase.again:  # else they are what they were
            self._normalize_by(phase, w)
        for group, rows in self.parts:
            mean, rstd = self.mean[group], self.rstd[group]
            add = x[1][rows] if self.tail.adds else None
            self.backend.normalize(
                self.x[rows], mean, rstd, w["gamma"], w["beta"], y[rows], add=add, slope=self.tail.slope
            )

    def _normalize_by(self, phase: Phase, w: Mapping[str, Array]) -> None:
        if phase.training:
            self.mean, var = self._statistics(w)
        else:
            self.mean, var = (
                np.broadcast_to(w[name].astype(np.float64), self.shape) for name in ("running_mean", "running_var")
            )
        self.rstd = 1.0 / np.sqrt(var + self.layer.eps)

    def _statistics(self, w: Mapping[str, Array]) -> tuple[Array, Array]:
        mine = np.zeros((3, *self.shape))
        for group, rows in self.parts:
            mine[COUNT, group] = prod(self.x[rows].shape[:-1])
            self.backend.moments(self.x[rows], mine[MEAN, group], mine[M2, group])
        merged = merge_moments(gather(self.comm, mine))
        self.count, mean, m2 = merged
        count, batch_mean, batch_m2 = merge_moments(merged.swapaxes(0, 1))
        step = self.layer.momentum
        w["running_mean"][...] = (1.0 - step) * w["running_mean"] + step * batch_mean
        w["running_var"][...] = (1.0 - step) * w["running_var"] + step * batch_m2 / np.maximum(1.0, count - 1.0)
        return mean, m2 / self.count

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        sums = np.zeros((2, *self.shape))
        for group, rows in self.parts:
            mean, rstd, slope = self.mean[group], self.rstd[group], self.tail.slope
            y = None if slope == 1 else self.y[rows]
            self.backend.normalize_grad(
                dy[rows], self.x[rows], mean, rstd, sums[0, group], sums[1, group], y=y, slope=slope
            )
        # this rank's own sums: the executor adds gradients over ranks
        dw["beta"][...], dw["gamma"][...] = sums.sum(axis=1)
        if self.tail.adds and (added := dx[1]) is not None:
            np.copyto(added, dy)
        if (into := dx[0]) is None:
            return
        means = w["gamma"] * gather(self.comm, sums).sum(axis=0) / self.count
        for group, rows in self.parts:
            self.backend.normalize_dx(
                dy[rows],
                self.x[rows],
                self.mean[group],
                self.rstd[group],
                w["gamma"],
                means[0, group],
                means[1, group],
                into[rows],
            )


def _groups(groups: int, samples: int, box: Box) -> list[tuple[int, slice]]:
    """The groups of samples that `box` holds something of, and which of its rows are theirs."""
    found = []
    for group in range(groups) if volume(box) else ():
        start, stop = split(samples, groups, group)
        rows = slice(max(start, box[0].start) - box[0].start, min(stop, box[0].stop) - box[0].start)
        if rows.start < rows.stop:
            found.append((group, rows))
    return found


@dataclass(frozen=True)
class LayerNorm(Layer):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta with statistics over the last `dims` dims (Ba et al. 2016).

    gamma and beta have the shape of these dims, and are cut as they are.
    """

    keeps_output: ClassVar[bool] = False
    dims: int = 1
    eps: float = 1e-5

    def output_shape(self, *x: Shape) -> Shape:
        if not 1 <= self.dims < len(x[0]):
            raise PlanError(f"layer norm: dims = {self.dims} of {x[0]}; give 1 to {len(x[0]) - 1}")
        return x[0]

    def weights(self, *x: Shape) -> dict[str, Weight]:
        return scale_and_offset(x[0][-self.dims :], tensor_axes(len(x[0]))[-self.dims :])

    def reduce_axes(self, *x: Shape) -> tuple[str, ...]:
        return tuple(axis for axes in tensor_axes(len(x[0]))[-self.dims :] for axis in names(axes))

    def flops(self, *x: Shape) -> int:
        return 8 * prod(x[0])

    def kept_bytes(self, itemsize: int, output: Shape, *x: Shape) -> int:
        statistics, weights = prod(output[: -self.dims]), prod(output[-self.dims :])
        return itemsize * prod(output) + 8 * 6 * statistics + (8 * 2 + itemsize) * weights

    def bind(self, place: Place) -> LayerNormOp:
        return LayerNormOp(self, place)


class LayerNormOp:
    """A statistic for each entry of the dims before the last ones; ranks that cut the last ones merge theirs.

    What is as large as the statistics or the weights is made here, as both may be as large as a sample.
    """

    def __init__(self, layer: LayerNorm, place: Place) -> None:
        self.layer, self.backend, self.comm = layer, place.backend, place.comm
        block, last = extent(place.output), extent(place.output[-layer.dims :])
        shape = (*block[: -layer.dims], *(1,) * layer.dims)
        self.moments, self.sums, self.own = np.zeros((3, *shape)), np.zeros((2, *shape)), np.zeros((2, *last))
        self.moments[COUNT] = prod(last)
        self.rstd = np.ones(shape)
        self.no_offset = np.zeros(last, exact(place.dtype))
        self.g = place.backend.empty(block, place.dtype)

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x = x[0]
        if y.size:
            self.backend.moments(self.x, self.moments[MEAN], self.moments[M2])
        alone = self.comm is None
        self.count, self.mean, m2 = self.moments if alone else merge_moments(gather(self.comm, self.moments))
        if y.size:
            np.divide(m2, self.count, out=self.rstd)
            self.rstd += self.layer.eps
            np.sqrt(self.rstd, out=self.rstd)
            np.divide(1.0, self.rstd, out=self.rstd)
            self.backend.normalize(self.x, self.mean, self.rstd, w["gamma"], w["beta"], y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        gamma = w["gamma"]
        if dy.size:
            self.backend.normalize_grad(dy, self.x, self.mean, self.rstd, *self.own)
        dw["beta"][...], dw["gamma"][...] = self.own
        if (into := dx[0]) is None:
            return
        if dy.size:
            self.backend.normalize(dy, np.zeros(1), np.ones(1), gamma, self.no_offset, self.g)  # gamma * dy
            self.backend.normalize_grad(self.g, self.x, self.mean, self.rstd, *self.sums)
        sums = self.sums if self.comm is None else gather(self.comm, self.sums).sum(axis=0)
        if dy.size:
            np.divide(sums, self.count, out=sums)
            self.backend.normalize_dx(dy, self.x, self.mean, self.rstd, gamma, sums[0], sums[1], into)


def scale_and_offset(shape: Shape, axes: tuple[str | tuple[str, ...] | None, ...]) -> dict[str, Weight]:
    """The scale and the offset of a norm."""
    return {
        "gamma": Weight(shape, axes, ("constant", 1.0)),
        "beta": Weight(shape, axes, ("constant", 0.0)),
    }
