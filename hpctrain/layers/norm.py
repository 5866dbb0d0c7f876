"""Batch normalization whose statistics are of the whole batch, however batch and positions are cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np

from hpctrain.backends.base import Array
from hpctrain.layers.base import SPATIAL, Layer, Place, Weight
from hpctrain.partition import Shape


@dataclass(frozen=True)
class BatchNorm(Layer):
    """y = (x - mean) / sqrt(var + eps) * gamma + beta per channel (Ioffe & Szegedy 2015).

    Training uses the mean and variance over all samples and positions of the global batch, and moves the running ones
    towards them by `momentum` (the running variance is the unbiased one); evaluation uses the running ones.
    """

    eps: float = 1e-5
    momentum: float = 0.1
    reduce_axes: ClassVar[tuple[str, ...]] = ("batch", *SPATIAL)

    def output_shape(self, *x: Shape) -> Shape:
        return x[0]

    def weights(self, *x: Shape) -> dict[str, Weight]:
        channels = (x[0][-1],)
        return {
            "gamma": Weight(channels, ("channel",), ("constant", 1.0)),
            "beta": Weight(channels, ("channel",), ("constant", 0.0)),
        }

    def state(self, *x: Shape) -> dict[str, Weight]:
        channels = (x[0][-1],)
        return {
            "running_mean": Weight(channels, ("channel",), ("constant", 0.0)),
            "running_var": Weight(channels, ("channel",), ("constant", 1.0)),
        }

    def flops(self, *x: Shape) -> int:
        return 8 * prod(x[0])

    def bind(self, place: Place) -> BatchNormOp:
        return BatchNormOp(self, place)


class BatchNormOp:
    """Two small allgathers a step, merged in rank order: all ranks hold the same bits. Empty blocks take part too."""

    def __init__(self, layer: BatchNorm, place: Place) -> None:
        self.layer, self.backend, self.comm = layer, place.backend, place.comm
        self.mean, self.rstd = np.zeros((2, place.output[-1].stop - place.output[-1].start))

    def forward(self, x: Sequence[Array], w: Mapping[str, Array], y: Array, training: bool) -> None:
        self.x = x[0]
        if training:
            self.mean, var = self._statistics(self.x, w)
        else:
            self.mean, var = w["running_mean"].astype(np.float64), w["running_var"].astype(np.float64)
        self.rstd = 1.0 / np.sqrt(var + self.layer.eps)
        self.backend.normalize(self.x, self.mean, self.rstd, w["gamma"], w["beta"], y)

    def _statistics(self, x: Array, w: Mapping[str, Array]) -> tuple[Array, Array]:
        mean, m2 = np.zeros((2, x.shape[-1]))
        self.backend.moments(x, mean, m2)
        self.count, mean, m2 = merge_moments(self._gather(np.concatenate([[prod(x.shape[:-1])], mean, m2])))
        keep, unbiased = 1.0 - self.layer.momentum, max(1.0, self.count - 1.0)
        w["running_mean"][...] = keep * w["running_mean"] + self.layer.momentum * mean
        w["running_var"][...] = keep * w["running_var"] + self.layer.momentum * m2 / unbiased
        return mean, m2 / self.count

    def backward(self, dy: Array, w: Mapping[str, Array], dx: Sequence[Array | None], dw: Mapping[str, Array]) -> None:
        sums = np.zeros((2, dy.shape[-1]))
        self.backend.normalize_grad(dy, self.x, self.mean, self.rstd, sums[0], sums[1])
        # this rank's own sums: the executor adds gradients over ranks
        dw["beta"][...], dw["gamma"][...] = sums
        if dx[0] is not None:
            mean_dy, mean_dy_xhat = self._gather(sums).sum(axis=0) / self.count
            self.backend.normalize_dx(dy, self.x, self.mean, self.rstd, w["gamma"], mean_dy, mean_dy_xhat, dx[0])

    def _gather(self, mine: Array) -> Array:
        """`mine` of every rank that shares these channels, by rank."""
        if self.comm is None:
            return mine[None]
        every = np.empty((self.comm.size, *mine.shape))
        self.comm.Allgather(mine, every)
        return every


def merge_moments(parts: Array) -> tuple[float, Array, Array]:
    """(count, mean, m2) of a union from rows [count, *mean, *m2] of its parts, by the formula of Chan et al. 1983."""
    channels = (parts.shape[1] - 1) // 2
    count, mean, m2 = 0.0, np.zeros(channels), np.zeros(channels)
    for n, part_mean, part_m2 in ((row[0], row[1 : channels + 1], row[channels + 1 :]) for row in parts):
        if n == 0:
            continue
        total, delta = count + n, part_mean - mean
        mean = mean + delta * (n / total)
        m2 = m2 + part_m2 + np.square(delta) * (count * n / total)
        count = total
    return count, mean, m2
