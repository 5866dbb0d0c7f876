"""Binds a graph and a plan to a rank: parameters, every array between layers, exchanges, and each layer's op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.backends.base import Array, Backend
from hpctrain.comm.exchange import Arrays, Exchange, Way
from hpctrain.comm.grid import ProcessGrid
from hpctrain.comm.neighbours import neighbours
from hpctrain.comm.watch import Wait
from hpctrain.comm.watched import watched, world_ranks
from hpctrain.graph import Graph
from hpctrain.layers import Loss, Op, Place
from hpctrain.layers.base import Tail
from hpctrain.parameters import Tensor, initial
from hpctrain.partition import AXES, Partition, extent, volume
from hpctrain.planner.arena import ALIGNMENT, Buffers, View
from hpctrain.planner.layout import Edge, Layout
from hpctrain.planner.schedule import Key, Unit
from hpctrain.precision import exact
from hpctrain.regions import Region

if TYPE_CHECKING:
    from mpi4py import MPI


@dataclass
class Step:
    """One unit of the schedule on this rank."""

    name: str
    """The layer whose output it makes."""
    op: Op
    active: bool
    """Whether this rank produces anything, or must take part in the op's own communication all the same."""
    inputs: list[Exchange]
    passed: list[bool]
    """Of each input, whether its gradient is that of the output, so that the op has nothing to write."""
    sum_partials: Way | None
    """From what every rank produced to sums at their owners, where the layer sums over a cut dim."""
    spread_gradient: Way | None
    """The reverse: from the owners' gradient to everyone who produced a share."""
    outputs: list[Exchange]
    """The consumers' edges, whose `fwd.src` is what this step makes and whose `bwd.dst` holds its gradient."""
    weights: dict[str, Array]
    gradients: dict[str, Array]
    result: Array
    """This rank's block of the output."""
    masked: Array | None
    """Where the output's gradient is copied to, for an op that changes it, if all gradients have to stay."""


_EDGE, _PARTIAL = ("forward exchange", "backward exchange"), ("gradient of partial sums", "sum of partial sums")


class Arena:
    """The memory of all arrays between layers, one allocation, and the arrays in it.

    Collective: it is shared with ranks of this host that want something of it, where the host has room for that.
    """

    def __init__(
        self,
        found: Buffers,
        backend: Backend,
        dtype: np.dtype,
        comm: MPI.Intracomm,
        moved: list[Edge],
        hosts: Sequence[int],
    ) -> None:
        offsets, self.nbytes = found.place(dtype)
        nbytes = self.nbytes + ALIGNMENT
        wanted = {rank for edge in moved for rank in edge.want.meeting(edge.have.box(comm.rank))}
        self.near, self.exchange_by = neighbours(comm, hosts, wanted, nbytes, 2 * len(moved))
        self.memory = backend.empty((nbytes,), np.dtype(np.uint8)) if self.near is None else self.near.memory
        first = -self.memory.ctypes.data % ALIGNMENT
        self._arrays = []
        for buffer, offset in zip(found.found, offsets, strict=True):
            kind = buffer.kind.dtype(dtype)
            at = first + offset
            flat = self.memory[at : at + prod(buffer.shape) * kind.itemsize]
            self._arrays.append(flat.view(kind).reshape(buffer.shape))

    def array(self, view: View) -> Array:
        """What `view` shows."""
        found = self._arrays[view.buffer]
        return found if view.box is None else found[view.box]

    def of_edge(self, found: Buffers, key: Key) -> Arrays:
        """The arrays of an edge."""
        edge = found.edges[key]
        return Arrays(
            self.array(edge.src),
            self.array(edge.dst),
            edge.inplace,
            None if edge.gradient is None else self.array(edge.gradient),
            None if edge.back is None else self.array(edge.back),
            edge.inplace_back,
        )

    def free(self) -> None:
        """Let go of what is shared with other ranks. Collective."""
        if self.near is not None:
            self.near.free()


def exchanges(
    comm: MPI.Intracomm, graph: Graph, moved: list[Edge], found: Buffers, arena: Arena
) -> dict[Key, Exchange]:
    """The exchange of every edge that is not within a unit. Collective."""
    made, every = {}, world_ranks(comm)
    for i, edge in enumerate(moved):
        key = edge.consumer, edge.slot
        if key in found.edges:
            fill = 0.0 if edge.slot is None else graph[edge.consumer].layer.fill
            made[key] = Exchange(comm, edge.have, edge.want, arena.of_edge(found, key), fill, 2 * i, arena.near)
            # Ranks without messages compare too: one that met nobody would wait where no news of others reaches it.
            for way, operation in zip(made[key].ways, _PARTIAL if edge.slot is None else _EDGE, strict=False):
                way.wait = Wait(edge.consumer, operation, [every[r] for r in way.peers], every)
    return made


def statistics(place: Layout, rank: int, dtype: np.dtype, seed: int) -> list[Tensor]:
    """This rank's blocks of the running statistics of a layer, as they start."""
    declared = place.node.layer.state(*place.node.input_shapes)
    found = []
    for name, dist in place.state.items():
        box = dist.box(rank)
        array = np.empty(extent(box), dtype)
        array[...] = initial(declared[name], name, box, seed)
        found.append(Tensor(f"{place.node.name}.{name}", dist, box, array))
    return found


def bind_op(
    unit: Unit,
    place: Layout,
    rank: int,
    seed: int,
    backend: Backend,
    dtype: np.dtype,
    weights: Mapping[str, object],
    grid: Callable[[Partition], ProcessGrid],
) -> tuple[Op, bool]:
    """The op of a unit, and whether it is active on this rank. Collective where the layer communicates."""
    node = place.node
    reduced = node.layer.reduce_axes(*node.input_shapes)
    axes = tuple(axis for axis in AXES if axis in reduced and place.partition[axis] > 1)
    comm = grid(place.partition).sub(axes) if axes else None
    comm = None if comm is None else watched(comm, "statistics", node.name)
    produced: Region = place.output if place.partial is None else place.partial
    op = node.layer.bind(
        Place(
            node.name,
            seed,
            backend,
            exact(dtype) if isinstance(node.layer, Loss) else dtype,
            node.input_shapes,
            tuple(want.box(rank) for want in place.inputs),
            place.work.box(rank),
            produced.box(rank),
            {name: place.weights[name].box(rank) for name in weights},
            comm,
            unit.tail or Tail(),
        )
    )
    return op, volume(produced.box(rank)) > 0 or comm is not None
