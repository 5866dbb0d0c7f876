"""All sums of gradients of a run: chooses how, starts each when backward has made its part, and sees them through."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from hpctrain.comm import allreduce, codecs
from hpctrain.comm.allreduce import Running
from hpctrain.comm.link import Link, Topology
from hpctrain.comm.watch import Wait
from hpctrain.comm.watched import waiting
from hpctrain.config import Compress
from hpctrain.errors import PlanError
from hpctrain.gradients.buckets import buckets, completed_by
from hpctrain.gradients.ways import ByMessages, Compressed, InWindow, Sharded, Way, shares
from hpctrain.layers import Weight
from hpctrain.parameters import Group, Storage, group_of, own_memory
from hpctrain.partition import extent
from hpctrain.planner.plan import Plan
from hpctrain.regions import Distribution

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpctrain.backends.base import Backend
    from hpctrain.comm.allreduce.choose import Choice

IN_WINDOW = ("shared", "hierarchical")
"""Algorithms for which gradients lie in memory that the ranks of a host share."""


@dataclass(frozen=True)
class Summing:
    """How gradients are summed, besides by what algorithm the plan says."""

    bucket_bytes: int = 16 * 2**20
    overlap: bool | None = None
    """Whether backward goes on while buckets are summed; None: where ranks are on several hosts."""
    shard: bool = False
    """Whether the ranks of a group update a share of its weights each."""
    share_weights: bool = False
    """Whether those of one host do, and have the weights in common."""
    choose: Callable[[int, Sequence[int]], Choice] | None = None
    """(bytes, ranks of the run's communicator) -> what to use where the plan names nothing; None: the ring."""
    compress: Compress = field(default_factory=Compress)
    momentum: float = 0.0
    """The optimizer's, for a codec that takes it over."""
    steps_per_epoch: int = 1


class Gradients:
    """The gradient sums of one executor. Made before its parameters, for which it has the storage.

    Raises PlanError, on all ranks alike, where the plan names an algorithm that there is not or that these ranks cannot
    use, and SharedMemoryError where a host has too little.
    """

    def __init__(
        self,
        comm: MPI.Intracomm,
        plan: Plan,
        declared: Iterable[tuple[str, Weight, Distribution]],
        units: Sequence[Sequence[str]],
        dtype: np.dtype,
        settings: Summing,
        sub: Callable[[Group], MPI.Intracomm | None],
        seed: int = 0,
    ) -> None:
        """Collective over `comm`. `sub` gives the communicator of a group, None on a rank that has nothing of it."""
        self.comm, self.plan, self.settings, self.seed = comm, plan, settings, seed
        for name in plan.named():
            allreduce.get(name)  # PlanError where there is none of that name
        self._declared, self._sub = list(declared), sub
        self.hosts = Topology(comm).hosts
        self.overlap = len(set(self.hosts)) > 1 if settings.overlap is None else settings.overlap
        if settings.compress.codec != "none":
            self.overlap = False  # a codec works on all gradients of a group at once
        elements = max(1, settings.bucket_bytes // dtype.itemsize) if self.overlap else None
        self._buckets = buckets(self._declared, units, comm.rank, elements)
        self._completed = completed_by(self._buckets)
        self.choices: dict[Group, str] = {}
        """The algorithm of each group of several ranks."""
        self.why: dict[Group, str] = {}
        """Why, where it was chosen here."""
        self._storage: dict[Group, Storage] = {}
        self._ways: dict[Group, Way] = {}
        self._waits: dict[Group, Wait] = {}
        self._running: list[tuple[Group, Running]] = []
        self._held: dict[Group, np.ndarray] = {}
        self._unpublished = True  # initial weights: no rank may load others while a neighbour still writes these

    # --- storage ---------------------------------------------------------------------------------------------------

    def allocate(self, group: Group, size: int, dtype: np.dtype) -> Storage:
        """Storage for the parameters of a group, of which this rank has `size` elements. Collective over all ranks."""
        comm = self._sub(group) if group[1] else None
        if group[1]:
            self._choose(group, self.comm.bcast(size) * dtype.itemsize)  # rank 0 has the longest blocks
        if comm is None or comm.size == 1:
            self._storage[group] = own_memory(self.comm.rank)(group, size, dtype)
            return self._storage[group]
        way = self._ways[group] = self._way(group, Link(comm), size, dtype)
        first, *more = dict.fromkeys(part.name.rpartition(".")[0] for part in self._parts(group))
        layers = f"{first} and {len(more)} more" if more else first
        self._waits[group] = waiting(comm, layers, "gradient allreduce", size * dtype.itemsize)
        self._storage[group] = way.storage
        return way.storage

    def _way(self, group: Group, link: Link, size: int, dtype: np.dtype) -> Way:
        settings, found, name = self.settings, self._buckets[group], self.choices[group]
        own = own_memory(self.comm.rank)(group, size, dtype)
        algorithm = allreduce.get(name)
        if settings.compress.codec != "none":
            parts = self._parts(group)
            codec = codecs.TABLE[settings.compress.codec](
                parts, size, settings.compress, settings.momentum, self.seed, link.rank, dtype
            )
            return Compressed(link, algorithm, own, codec, settings.steps_per_epoch)
        if settings.share_weights or (name in IN_WINDOW and not settings.shard):
            return InWindow(link, size, dtype, found, settings.share_weights)
        if settings.shard:
            mine = tuple(shares(found, link.size, link.rank))
            return Sharded(link, algorithm, replace(own, reduced=mine, counted=True, sharded=True), found)
        if name in ("hierarchical", "two_dimensional") and self.overlap:
            link.nodes(), link.grid()  # splitting waits for all ranks: now, not while something else is under way
        return ByMessages(link, algorithm, own, found)

    def _choose(self, group: Group, nbytes: int) -> None:
        """The algorithm of a group: the plan's, or the best for those of its ranks that are on the most hosts."""
        partition, axes = group
        offsets = partition.offsets(axes)
        firsts = [rank for rank in range(partition.size) if partition.index(axes, rank) == 0]
        sets = [[rank + offset for offset in offsets] for rank in firsts]
        ranks = max(sets, key=lambda ranks: len({self.hosts[rank] for rank in ranks}))
        hosts = len({self.hosts[rank] for rank in ranks})
        name = self.plan.algorithm(group)
        if self.plan.resumed and name == "shared" and hosts > 1:
            name = None  # an earlier part of the run had these ranks on one host
        if name is None and self.settings.choose is not None:
            choice = self.settings.choose(nbytes, ranks)
            name, self.why[group] = choice.name, choice.why
        if name == "shared" and hosts > 1:
            raise PlanError(
                f"allreduce 'shared' for {len(ranks)} ranks on {hosts} hosts, which share no memory; "
                f"choose hierarchical, ring or another"
            )
        self.choices[group] = name or "ring"

    def _parts(self, group: Group) -> list[codecs.Part]:
        """The parameters of a group, as they lie in its storage on this rank."""
        found, at = [], 0
        for name, weight, dist in self._declared:
            if group_of(dist) == group:
                shape = extent(dist.box(self.comm.rank))
                found.append(codecs.Part(name, slice(at, at + prod(shape)), shape, weight.decay))
                at += prod(shape)
        return found

    # --- a step ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Before backward: wait until the memory that it writes to is free. Collective."""
        for group, way in self._ways.items():
            with self._waits[group]:
                way.begin()

    def completed(self, unit: int, step: int, first: bool = True, last: bool = True) -> None:
        """Backward of a unit of the schedule has ended: sum what is complete, or start to.

        A batch may come in several parts; only with the `last` one are gradients summed, those of the parts before
        added.
        """
        for group, i in self._completed.get(unit, ()):
            if group not in self._storage:
                continue
            partials = self._storage[group].partials[self._buckets[group][i].where]
            if not (first and last):
                if group not in self._held:
                    self._held[group] = np.empty_like(self._storage[group].partials)
                held = self._held[group][self._buckets[group][i].where]
                if not last:
                    np.copyto(held, partials) if first else np.add(held, partials, out=held)
                    continue
                np.add(partials, held, out=partials)
            if group in self._ways:
                self._start(group, i, step)
        for _, running in self._running:
            running.poll()

    def _start(self, group: Group, bucket: int, step: int) -> None:
        way = self._ways[group]
        if isinstance(way, Compressed):
            way.step = step
        if self.overlap:
            self._running.append((group, Running(way.steps(bucket))))
        else:
            with self._waits[group]:
                way.sum(bucket)

    def finish(self) -> None:
        """After backward: wait for the sums."""
        for group, running in self._running:
            with self._waits[group]:
                running.wait()
        self._running.clear()
        self._unpublished = True

    def scale(self, factor: float) -> None:
        """Multiply all sums, before the update. Collective."""
        for group, storage in self._storage.items():
            if group in self._ways:
                with self._waits[group]:
                    self._ways[group].scale(factor)
            else:
                np.multiply(storage.sums, factor, out=storage.sums)

    def square_sum(self, backend: Backend) -> float:
        """The square of the norm of the whole gradient, the same bits on all ranks. Collective."""
        mine = 0.0
        for storage in self._storage.values():
            if storage.counted:
                mine += sum(backend.sum_squares(storage.sums[part]) for part in storage.reduced)
        return sum(self.comm.allgather(mine))

    def changed(self) -> None:
        """Weights of this rank have been changed by more than an update: `publish` has them to see to. Collective."""
        self._unpublished = True

    def publish(self) -> None:
        """After weights were made or updated, and before others are written or these read: every rank gets all of them.

        Collective.
        """
        if self._unpublished:
            for group, way in self._ways.items():
                with self._waits[group]:
                    way.publish()
        self._unpublished = False

    def link(self, group: Group) -> Link:
        """Of the ranks that sum a group. KeyError where this rank sums nothing of it."""
        return self._ways[group].link

    def how(self) -> str:
        """What else is to be said of the sums, for the head of a run."""
        settings = self.settings
        said = [
            ", compressed by " + settings.compress.codec if settings.compress.codec != "none" else "",
            ", while backward goes on" if self.overlap else "",
        ]
        return "".join(said)

    @property
    def codecs(self) -> dict[Group, codecs.Codec]:
        """Those of the groups whose gradients are compressed."""
        return {group: way.codec for group, way in self._ways.items() if isinstance(way, Compressed)}

    def free(self) -> None:
        """Release what is MPI's; no storage may be used any more. Collective."""
        for way in self._ways.values():
            way.free()
        self._ways.clear()
