"""Norms of global tensors, however these are cut and replicated over ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.backends.base import Backend, Floats
from hpctrain.optim.base import Shard

if TYPE_CHECKING:
    from mpi4py import MPI


class Norms:
    """Of two tensors of the shape of each parameter that decays. Collective over `comm`, if there is one."""

    def __init__(self, shards: Sequence[Shard], backend: Backend, comm: MPI.Intracomm | None = None) -> None:
        self.shards, self.backend, self.comm = shards, backend, comm
        self.parameters = sorted({shard.parameter for shard in shards if shard.decay})
        self._row = {parameter: row for row, parameter in enumerate(self.parameters)}
        self._mine = np.zeros((len(self.parameters), 2))
        self._every = np.zeros((1 if comm is None else comm.size, len(self.parameters), 2))

    def of(self, pairs: Iterable[tuple[Floats, Floats]]) -> dict[int, tuple[float, float]]:
        """By parameter, the norms of both; `pairs` has 1D arrays for each shard, what this rank has of the two.

        Each element is counted once. All ranks get the same bits: they add the same sums in rank order.
        """
        self._mine.fill(0)
        for shard, pair in zip(self.shards, pairs, strict=True):
            if shard.decay and shard.counted:
                row = self._mine[self._row[shard.parameter]]
                row += [self.backend.sum_squares(array) for array in pair]
        if self.comm is None:
            self._every[0] = self._mine
        else:
            self.comm.Allgather(self._mine, self._every)
        norms = np.sqrt(self._every.sum(axis=0)).tolist()
        return {parameter: (a, b) for parameter, (a, b) in zip(self.parameters, norms, strict=True)}
