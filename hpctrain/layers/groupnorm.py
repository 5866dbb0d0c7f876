"""Group and instance normalization: statistics per sample and group of channels, over a domain that may be cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.errors import PlanError
from hpctrain.layers.base import Layer, Phase, Place, Weight, spatial_axes
from hpctrain.layers.norm import scale_and_offset
from hpctrain.layers.statistics import COUNT, M2, MEAN, gather, merge_moments
from hpctrain.partition import Shape, extent
from hpctrain.precision import exact


@dataclass(frozen=True)
class GroupNorm(Layer):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta per channel, with statistics of each sample over all positions
    and the channels of a group (Wu & He 2018): `groups` equal runs of channels. Channels may be cut anywhere.
    """

    keeps_output: ClassVar[bool] = False
    groups: int
    eps: float = 1e-5

    def output_shape(self, *x: Shape) -> Shape:
        if self.groups < 1 or x[0][-1] % self.groups:
            raise PlanError(f"group norm: groups = {self.groups} of {x[0][-1]} channels; give a divisor of them")
        return x[0]

    def weights(self, *x: Shape) -> dict[str, Weight]:
        return scale_and_offset(x[0][-1:], ("channel",))

    def reduce_axes(self, *x: Shape) -> tuple[str, ...]:
        positions = spatial_axes(len(x[0]))
        return positions if self.groups == x[0][-1] else (*positions, "channel")

    def flops(self, *x: Shape) -> int:
        return 8 * prod(x[0])

    def bind(self, place: Place) -> GroupNormOp:
        return GroupNormOp(self.groups, self.eps, place)


@dataclass(frozen=True)
class InstanceNorm(Layer):
    """Group norm with a group for each channel (Ulyanov et al. 2016); gamma and beta only if `affine`."""

    keeps_output: ClassVar[bool] = False
    eps: float = 1e-5
    affine: bool = True

    def output_shape(self, *x: Shape) -> Shape:
        if prod(x[0][1:-1]) < 2:
            raise PlanError(f"instance norm: {x[0]} has one position, whose variance is 0; give 2 or more")
        return x[0]

    def weights(self, *x: Shape) -> dict[str, Weight]:
        return scale_and_offset(x[0][-1:], ("channel",)) if self.affine else {}

    def reduce_axes(self, *x: Shape) -> tuple[str, ...]:
        return spatial_axes(len(x[0]))

    def flops(self, *x: Shape) -> int:
        return 8 * prod(x[0])

    def bind(self, place: Place) -> GroupNormOp:
        return GroupNormOp(place.shapes[0][-1], self.eps, place)


class GroupNormOp:
    """Takes moments per sample and channel, unites those of a group, and merges them with other ranks' in rank order.

    A rank sends all groups, as ranks that cut the channels hold different ones: a group that it has nothing of counts
    0. Where each channel is a group, nobody needs those of other channels.
    """

    def __init__(self, groups: int, eps: float, place: Place) -> None:
        self.eps, self.backend, self.comm = eps, place.backend, place.comm
        self.block, channels, mine = extent(place.output), place.shapes[0][-1], place.output[-1]
        first = mine.start if groups == channels else 0
        self.cells = self.block[-1] if groups == channels else groups
        self.group = np.arange(mine.start, mine.stop) // (channels // groups) - first
        """The group of each of this rank's channels."""
        self.starts = np.flatnonzero(np.diff(self.group, prepend=-1))
        self.shape = (self.block[0], *(1,) * (len(self.block) - 2), self.block[-1])
        self.affine = "gamma" in place.weights
        self.zero, self.one = (np.full(self.block[-1], value, exact(place.dtype)) for value in (0, 1))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, phase: Phase) -> None:
        self.x, mine = x[0], np.zeros((3, self.block[0], self.cells))
        if y.size:
            per_channel = np.zeros((3, *self.shape))
            per_channel[COUNT] = prod(self.block[1:-1])
            self.backend.moments(self.x, per_channel[MEAN], per_channel[M2])
            mine[..., self.group[self.starts]] = self._united(per_channel.reshape(3, *self._rows))
        self.count, mean, m2 = merge_moments(gather(self.comm, mine))
        if y.size:
            self.mean, self.rstd = self._spread(mean), self._spread(1.0 / np.sqrt(m2 / self.count + self.eps))
            gamma, beta = (w["gamma"], w["beta"]) if self.affine else (self.one, self.zero)
            self.backend.normalize(self.x, self.mean, self.rstd, gamma, beta, y)

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        sums = np.zeros((2, *self.shape))
        if dy.size:
            self.backend.normalize_grad(dy, self.x, self.mean, self.rstd, *sums)
        sums = sums.reshape(2, *self._rows)
        if self.affine:
            dw["beta"][...], dw["gamma"][...] = sums.sum(axis=1)
        if (into := dx[0]) is None:
            return
        gamma, mine = w["gamma"] if self.affine else self.one, np.zeros((2, self.block[0], self.cells))
        if dy.size:
            mine[..., self.group[self.starts]] = self._summed(gamma * sums)
        means = gather(self.comm, mine).sum(axis=0) / self.count
        if dy.size:
            mean_g, mean_g_xhat = map(self._spread, means)
            self.backend.normalize_dx(dy, self.x, self.mean, self.rstd, gamma, mean_g, mean_g_xhat, into)

    @property
    def _rows(self) -> Shape:
        return self.block[0], self.block[-1]

    def _united(self, parts: Array) -> Array:
        """Moments (3, N, groups held) from those (3, N, C) of channels."""
        count, mean, m2 = parts
        total = self._summed(count)
        united = self._summed(count * mean) / total
        sizes = np.diff(self.starts, append=self.block[-1])
        between = count * np.square(mean - np.repeat(united, sizes, axis=-1))
        return np.stack([total, united, self._summed(m2 + between)])

    def _summed(self, values: Array) -> Array:
        """Sums over the channels of each group held, along the last dim."""
        return np.add.reduceat(values, self.starts, axis=-1)

    def _spread(self, values: Array) -> Array:
        """Values (N, groups) as (N, 1, .., C), each channel its group's."""
        return np.take(values, self.group, axis=1).reshape(self.shape)
