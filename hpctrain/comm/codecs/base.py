"""What all codecs have in common: the parts of a gradient, the two ways onto the wire, and the state they keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from hpctrain.comm.allreduce import Algorithm, ring, run
from hpctrain.config import Compress

if TYPE_CHECKING:
    from hpctrain.comm.link import Link

BLOCK = 2**16
"""Elements worked on at a time, so that intermediate results stay in the cache; a multiple of 8, as bits are packed."""


class Part(NamedTuple):
    """This rank's block of one parameter in the flat gradient of a replica group."""

    name: str
    where: slice
    """Its stretch of what `Codec.sum` is given."""
    shape: tuple[int, ...]
    """The block's extents, of which the last counts outputs."""
    decay: bool
    """Whether weight decay applies; no codec asks."""

    @property
    def size(self) -> int:
        """Elements."""
        return int(self.where.stop - self.where.start)

    def blocks(self, length: int = BLOCK) -> Iterator[tuple[int, slice]]:
        """Stretches of at most `length` elements, each with where in the part it starts."""
        for start in range(self.where.start, self.where.stop, length):
            yield start - self.where.start, slice(start, min(start + length, self.where.stop))


class Message(NamedTuple):
    """What a codec puts on the wire in one sum: a buffer that is summed, or bytes that all ranks get of all."""

    gathered: bool
    elements: int
    itemsize: int


class Wire(Protocol):
    """Ranks as a codec sees them."""

    rank: int
    size: int

    def total(self, buffer: np.ndarray) -> None:
        """The 1D buffer becomes the sum over ranks, the same bits on all."""

    def gather(self, payload: np.ndarray) -> np.ndarray:
        """Every rank's payload, uint8 (n,), in the order of ranks: uint8 (ranks, n). All are equally long."""


class LinkWire:
    """The wire made of a link and an allreduce algorithm; payloads go round a ring, as that sends the fewest bytes."""

    def __init__(self, link: Link, allreduce: Algorithm) -> None:
        self.link, self.allreduce = link, allreduce
        self.rank, self.size = link.rank, link.size

    def total(self, buffer: np.ndarray) -> None:
        """As in Wire."""
        self.allreduce.sum(self.link, buffer)

    def gather(self, payload: np.ndarray) -> np.ndarray:
        """As in Wire."""
        everyone = np.empty((self.size, payload.size), np.uint8)
        everyone[self.rank] = payload
        run(ring.allgather(self.link, everyone.reshape(-1)))
        return everyone


class Codec:
    """A codec for one flat gradient (size,) of type `dtype`, made of `parts` that cover it in order.

    `momentum` is the optimizer's, for the codec that takes it over; random numbers are functions of `seed`, step, rank
    and parameter. All ranks of a sum must be given the same, but for `rank`, which must be different on each.
    """

    takes_momentum = False
    """Whether the momentum is applied here; the optimizer then runs without."""

    def __init__(
        self,
        parts: Sequence[Part],
        size: int,
        settings: Compress,
        momentum: float,
        seed: int,
        rank: int,
        dtype: np.dtype | type = np.float32,
    ) -> None:
        self.parts, self.size, self.settings = [part for part in parts if part.size], size, settings
        self.momentum, self.seed, self.rank, self.dtype = momentum, seed, rank, np.dtype(dtype)
        self.state: dict[str, np.ndarray] = {}
        """What a checkpoint must keep of this rank besides the step: 1D arrays, by name."""
        self.sent_bytes = 0
        """What this rank sent in the last sum."""

    def sum(self, link: Link, allreduce: Algorithm, gradient: np.ndarray, step: int, epoch: float) -> None:
        """`gradient` (size,) becomes the sum over `link` of what each rank sends. Collective over it.

        Where the sum is not finite, neither is `gradient` on any rank, and `state` stays as it was before.
        On a link of one rank there is nothing to send, so that nothing is lost either.
        """
        before = link.nbytes
        self.sum_over(LinkWire(link, allreduce), gradient, step, epoch)
        self.sent_bytes = link.nbytes - before

    def sum_over(self, wire: Wire, gradient: np.ndarray, step: int, epoch: float) -> None:
        """`sum` on any wire."""
        if self.size:
            with np.errstate(over="ignore", invalid="ignore"):  # the sum shows what is not finite
                (self.exchange if wire.size > 1 else self.alone)(wire, gradient, step, epoch)

    def alone(self, wire: Wire, gradient: np.ndarray, step: int, epoch: float) -> None:
        """`sum_over` on a wire of one rank."""

    def exchange(self, wire: Wire, gradient: np.ndarray, step: int, epoch: float) -> None:
        """`sum_over` on a wire of several ranks, for a gradient that is not empty."""
        raise NotImplementedError

    def messages(self, epoch: float) -> list[Message]:
        """What `exchange` hands to the wire in that epoch, in order."""
        raise NotImplementedError


class Gathering(Codec):
    """A codec whose bytes cannot be added: every rank gets those of all and adds what they stand for by rank."""

    def exchange(self, wire: Wire, gradient: np.ndarray, step: int, epoch: float) -> None:
        """As in Codec."""
        payloads = wire.gather(self.encode(gradient, step, epoch, wire.size))
        total = np.zeros_like(gradient)
        for payload in payloads:
            self.add(payload, total, epoch)
        if np.isfinite(total).all():
            self.keep(gradient, payloads[wire.rank], epoch)
        gradient[...] = total

    def messages(self, epoch: float) -> list[Message]:
        """As in Codec."""
        return [Message(True, self.payload_bytes(epoch), 1)]

    def payload_bytes(self, epoch: float) -> int:
        """Length of what `encode` returns; the same on all ranks."""
        raise NotImplementedError

    def encode(self, gradient: np.ndarray, step: int, epoch: float, ranks: int) -> np.ndarray:
        """What this rank sends, uint8; may overwrite `gradient`, and leaves `state` as it is."""
        raise NotImplementedError

    def add(self, payload: np.ndarray, into: np.ndarray, epoch: float) -> None:
        """Add what `payload` stands for."""
        raise NotImplementedError

    def keep(self, gradient: np.ndarray, payload: np.ndarray, epoch: float) -> None:
        """Update the state by the gradient as `encode` left it and what was sent of it."""


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """The bytes of arrays, one after the other: uint8 (n,)."""
    return np.concatenate([np.ascontiguousarray(piece).view(np.uint8).reshape(-1) for piece in pieces])


class Reader:
    """Takes arrays off the front of a payload."""

    def __init__(self, payload: np.ndarray) -> None:
        self.payload, self.at = payload, 0

    def take(self, count: int, dtype: np.dtype | type) -> np.ndarray:
        """The next `count` elements, (count,)."""
        begin, self.at = self.at, self.at + count * np.dtype(dtype).itemsize
        return self.payload[begin : self.at].view(dtype)
