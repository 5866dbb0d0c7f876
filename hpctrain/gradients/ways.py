"""The ways in which a group of replicas sums its gradients: by messages, through shared memory, or compressed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from hpctrain.comm.allreduce import Algorithm, ring, run
from hpctrain.comm.allreduce.shared import FLAGS, InPlace
from hpctrain.comm.codecs import Codec
from hpctrain.comm.link import Link, Steps
from hpctrain.comm.shared import Wait, Window
from hpctrain.gradients.buckets import Bucket
from hpctrain.parameters import Storage
from hpctrain.partition import split

ALIGNMENT = 64


class Way(Protocol):
    """One group's on this rank. What is collective is so over the group; buckets come in the same order on all."""

    link: Link
    storage: Storage

    def begin(self) -> None:
        """Wait until `storage.partials` may be written: nobody reads the last sums any more. Collective."""

    def steps(self, bucket: int) -> Steps:
        """Sum a bucket: then what this rank reduces of it is in `storage.sums`, and all of it unless sharded."""

    def sum(self, bucket: int) -> None:
        """All steps, and wait for them."""

    def scale(self, factor: float) -> None:
        """Multiply all sums. Collective."""

    def publish(self) -> None:
        """After the update: let all have all weights. Collective."""

    def free(self) -> None:
        """Release what is MPI's. Collective."""


class ByMessages:
    """Gradients of this rank's own, summed in place by an algorithm that sends messages."""

    def __init__(self, link: Link, algorithm: Algorithm, storage: Storage, found: Sequence[Bucket]) -> None:
        self.link, self.algorithm, self.storage = link, algorithm, storage
        self._found = found
        self._buckets = [storage.partials[bucket.where] for bucket in found]
        self._lanes = [link if i == 0 else link.lane(i) for i in range(len(found))]

    def begin(self) -> None:
        """As in Way."""

    def steps(self, bucket: int) -> Steps:
        """As in Way."""
        return self.algorithm.steps(self._lanes[bucket], self._buckets[bucket])

    def sum(self, bucket: int) -> None:
        """As in Way."""
        self.algorithm.sum(self._lanes[bucket], self._buckets[bucket])

    def scale(self, factor: float) -> None:
        """As in Way."""
        np.multiply(self.storage.sums, factor, out=self.storage.sums)

    def publish(self) -> None:
        """As in Way."""

    def free(self) -> None:
        """As in Way."""
        for lane in self._lanes:
            lane.free()


class Sharded(ByMessages):
    """Every rank gets the sums of a share of each bucket, updates that, and sends it to the others (ZeRO stage 1)."""

    def steps(self, bucket: int) -> Steps:
        """As in Way."""
        return ring.reduce_scatter(self._lanes[bucket], self._buckets[bucket])

    def sum(self, bucket: int) -> None:
        """As in Way."""
        run(self.steps(bucket))

    def scale(self, factor: float) -> None:
        """As in Way."""
        for part in self.storage.reduced:
            np.multiply(self.storage.sums[part], factor, out=self.storage.sums[part])

    def publish(self) -> None:
        """As in Way."""
        for lane, bucket in zip(self._lanes, self._found, strict=True):
            run(ring.allgather(lane, self.storage.weights[bucket.where]))


class Compressed(ByMessages):
    """What a codec makes of each rank's gradients, summed."""

    def __init__(self, link: Link, algorithm: Algorithm, storage: Storage, codec: Codec, steps_per_epoch: int) -> None:
        whole = Bucket(slice(0, storage.partials.size), 0)
        super().__init__(link, algorithm, storage, [whole])
        self.codec, self._per_epoch = codec, steps_per_epoch
        self.step = 0
        """Of the run; set before each sum."""

    def steps(self, bucket: int) -> Steps:
        """As in Way; all of it at once."""
        self.sum(bucket)
        return iter(())

    def sum(self, bucket: int) -> None:
        """As in Way."""
        self.codec.sum(self.link, self.algorithm, self.storage.partials, self.step, self.step / self._per_epoch)


class InWindow:
    """Gradients in memory that the ranks of a host share: written there by backward, each rank adds up a share of them.

    With several hosts the shares are then summed between them, by ranks of one place. Where hosts have different
    numbers of ranks, only as many of each as the smallest has add up shares, so that shares are the same on all. Where
    it is `sharded`, weights lie in the window too, once for each host, and a rank updates its share of them.
    """

    def __init__(self, link: Link, size: int, dtype: np.dtype, found: Sequence[Bucket], sharded: bool) -> None:
        node, across = link.nodes()
        self.link, self.node = link, node
        nbytes = -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT
        kept = 2 if sharded and node.rank == 0 else 1  # gradients; and the weights of the host
        purpose = f"the sum of {size * dtype.itemsize / 2**20:.1f} MiB of gradients by {node.size} ranks"
        self._window = Window(node.comm, kept * nbytes, FLAGS * len(found) + 1, purpose)
        self._meeting = self._window.meeting(FLAGS * len(found))
        self._met = Wait(self._meeting.complete, self._window.progress)
        adding = link.topology.fewest
        alone = across.size == 1 or node.rank >= adding
        self._across = [None if alone else across.lane(i) for i in range(len(found))]
        self._sums = []
        for i, bucket in enumerate(found):
            meetings = self._window.meeting(FLAGS * i), self._window.meeting(FLAGS * i + 1)
            offset, length = bucket.where.start * dtype.itemsize, bucket.where.stop - bucket.where.start
            self._sums.append(InPlace(self._window, offset, length, dtype, *meetings, adding))
        reduced = tuple(
            slice(bucket.where.start + part.share.start, bucket.where.start + part.share.stop)
            for bucket, part in zip(found, self._sums, strict=True)
        )
        self.storage = Storage(
            self._window.array(0, nbytes, size, dtype) if sharded else np.zeros(size, dtype),
            self._window.array(node.rank, 0, size, dtype),
            self._window.array(0, 0, size, dtype),
            reduced,
            counted=across.rank == 0,
            sharded=sharded,
        )
        self.storage.partials.fill(0)
        self.begin()

    def begin(self) -> None:
        """As in Way."""
        self._meeting.come()
        self._met.wait()

    def steps(self, bucket: int) -> Steps:
        """As in Way."""
        return self._sums[bucket].steps(self._across[bucket])

    def sum(self, bucket: int) -> None:
        """As in Way."""
        run(self.steps(bucket))

    def scale(self, factor: float) -> None:
        """As in Way."""
        for part in self.storage.reduced:
            np.multiply(self.storage.sums[part], factor, out=self.storage.sums[part])
        self.begin()

    def publish(self) -> None:
        """As in Way."""
        if self.storage.sharded:
            self.begin()

    def free(self) -> None:
        """As in Way."""
        self._sums.clear()
        self._window.free()
        self.link.free()


def shares(found: Sequence[Bucket], ranks: int, rank: int) -> Iterator[slice]:
    """This rank's share of each bucket."""
    for where, _ in found:
        start, stop = split(where.stop - where.start, ranks, rank)
        yield slice(where.start + start, where.start + stop)
