"""What ops of several ranks know of each other: arrays by rank, and moments of a union from those of its parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpctrain.backends.base import Array

if TYPE_CHECKING:
    from mpi4py import MPI

COUNT, MEAN, M2 = range(3)
"""What the first dim of moments (3, ...), float64, holds; m2 is the sum of squared differences from the mean."""


def gather(comm: MPI.Intracomm | None, mine: Array) -> Array:
    """(ranks, *shape): `mine` of every rank of `comm`, of one shape and dtype on all, by rank. Collective."""
    if comm is None:
        return mine[None]
    every = np.empty((comm.size, *mine.shape), mine.dtype)
    comm.Allgather(np.ascontiguousarray(mine), every)
    return every


def merge_moments(parts: Array) -> Array:
    """Moments (3, ...) of unions, from those (parts, 3, ...) of disjoint parts, in order, by Chan et al. 1983."""
    count, mean, m2 = np.zeros((3, *parts.shape[2:]))
    for n, part_mean, part_m2 in parts:
        total = count + n
        share = np.divide(n, total, out=np.zeros_like(total), where=total > 0)
        delta = np.where(n > 0, part_mean - mean, 0.0)  # the mean of nothing may be any number
        mean = mean + delta * share
        m2 = m2 + part_m2 + np.square(delta) * count * share
        count = total
    return np.stack([count, mean, m2])
