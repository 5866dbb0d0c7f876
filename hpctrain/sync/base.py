"""What a strategy of synchronisation is, and what strategies share: vectors made of a rank's arrays, exact means."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hpctrain.comm.replicas import Replicas
from hpctrain.comm.watched import waiting
from hpctrain.optim.base import runs
from hpctrain.parameters import Parameters
from hpctrain.partition import split
from hpctrain.sync import rules

if TYPE_CHECKING:
    from mpi4py import MPI

Arrays = Sequence[np.ndarray]


@dataclass(frozen=True)
class Held:
    """What this rank updates of its replica, of one float type; ranks across have arrays of the same shapes."""

    weights: Arrays
    gradients: Arrays
    optimizer: Arrays
    """The optimizer's state."""


def held(parameters: Parameters, optimizer: Arrays) -> Held:
    """What this rank updates of `parameters`, and of the optimizer that does."""
    blocks, found = parameters.blocks(), runs(parameters.shards())
    weights = [blocks[run.block].weights[run.where] for run in found]
    return Held(weights, [blocks[run.block].gradients[run.where] for run in found], optimizer)


class Strategy(Protocol):
    """How replicas keep together. Made once weights are what they start from, on all ranks."""

    lockstep: bool
    """Whether a replica may wait in `update` for others to make the same step."""

    def update(self, step: int, move: Callable[[], None]) -> int:
        """The update of step `step`, and what replicas exchange before and after it.

        The gradients are there; `move` is the optimizer's part. Returns how many steps this replica has then done:
        more than step + 1 where it took from others what they had got to meanwhile. Collective over the replica.
        """

    def state(self) -> Mapping[str, np.ndarray]:
        """What all replicas share, for a checkpoint: vectors like the weights. Collective over all replicas."""

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from the weights as they now are, and from what `state` gave, or nothing. Collective over all."""

    def free(self) -> None:
        """Release windows. Collective over all replicas."""


class Stateless:
    """A strategy that neither keeps anything for a checkpoint nor holds a window."""

    def state(self) -> Mapping[str, np.ndarray]:
        """Nothing."""
        return {}

    def load(self, state: Mapping[str, np.ndarray]) -> None:
        """Nothing to do."""

    def free(self) -> None:
        """Nothing to do."""


def size_of(arrays: Arrays) -> int:
    """Elements in all of them."""
    return sum(array.size for array in arrays)


def pack(arrays: Arrays, out: np.ndarray | None = None) -> np.ndarray:
    """`arrays` one after the other as one vector."""
    out = np.empty(size_of(arrays), arrays[0].dtype if arrays else np.float32) if out is None else out
    at = 0
    for array in arrays:
        out[at : at + array.size].reshape(array.shape)[...] = array
        at += array.size
    return out


def unpack(vector: np.ndarray, arrays: Arrays) -> None:
    """Fill `arrays` from such a vector."""
    at = 0
    for array in arrays:
        array[...] = vector[at : at + array.size].reshape(array.shape)
        at += array.size


def views(vector: np.ndarray, arrays: Arrays) -> list[np.ndarray]:
    """`vector` cut into arrays of the shapes of `arrays`."""
    ends = np.cumsum([array.size for array in arrays])
    return [vector[end - array.size : end].reshape(array.shape) for end, array in zip(ends, arrays, strict=True)]


def average(replicas: Replicas, array: np.ndarray) -> np.ndarray:
    """The exact mean over replicas of `array`, rounded once: the same bits wherever an element stands. Collective."""
    comm, vector = replicas.across, np.ascontiguousarray(array)
    shares = [split(vector.size, comm.size, r) for r in range(comm.size)]
    counts, starts = [stop - start for start, stop in shares], [start for start, _ in shares]
    mine = counts[comm.rank]
    every = np.empty((comm.size, mine), vector.dtype)
    found = np.empty_like(vector)
    with waiting(comm, "", "the mean over replicas", vector.nbytes):
        comm.Alltoallv([vector, (counts, starts)], [every, ([mine] * comm.size, [mine * r for r in range(comm.size)])])
        comm.Allgatherv(rules.mean(list(every)), [found, (counts, starts)])
    return found


@contextmanager
def averaged(replicas: Replicas, arrays: Arrays) -> Iterator[None]:
    """Within this, `arrays` hold their exact mean over replicas; afterwards what they held. Collective over all."""
    if replicas.count == 1:
        yield
        return
    own = pack(arrays)
    found = average(replicas, own)
    with _settled(replicas.inside):
        unpack(found, arrays)
    try:
        yield
    finally:
        with _settled(replicas.inside):
            unpack(own, arrays)


@contextmanager
def _settled(comm: MPI.Intracomm) -> Iterator[None]:
    """Around writing to memory that ranks of `comm` may share: before it all have read, after it all have written."""
    comm.Barrier()
    yield
    comm.Barrier()
