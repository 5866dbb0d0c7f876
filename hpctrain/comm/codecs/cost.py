"""Whether compression pays on this machine: seconds of a sum with and without it, and refusal where it does not."""

from __future__ import annotations

from collections.abc import Iterable
from math import inf, isqrt
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpctrain.comm.allreduce import Algorithm, Network
from hpctrain.comm.codecs.base import Codec, Message, Part
from hpctrain.comm.link import add
from hpctrain.config import Compress
from hpctrain.errors import ConfigError
from hpctrain.partition import whole
from hpctrain.randomness import normal

if TYPE_CHECKING:
    from mpi4py import MPI

SAMPLE = 2**18
"""Elements at most that `throughput` is measured with."""


class Estimate(NamedTuple):
    """Seconds of a sum of `elements` over `ranks`."""

    ranks: int
    elements: int
    work: float
    """Encoding this rank's gradient and decoding those of all."""
    sending: float
    """What is left of it to send."""
    plain: float
    """The allreduce of the gradient as it is."""


class Loopback:
    """A wire on which every rank sends what this one does. It takes no time, so that what is left is the codec's."""

    def __init__(self, size: int) -> None:
        self.rank, self.size = 0, size

    def total(self, buffer: np.ndarray) -> None:
        """As if the others had sent zeros. Floats of 16 bits are added, as that takes much longer than gamma says."""
        if buffer.itemsize == 2:
            add(buffer, np.zeros_like(buffer))

    def gather(self, payload: np.ndarray) -> np.ndarray:
        """uint8 (ranks, n)."""
        return np.broadcast_to(payload, (self.size, payload.size))


def throughput(codec: Codec, ranks: int, trials: int = 3) -> float:
    """Elements per second that this rank encodes and decodes in sums over `ranks`, as measured on a small sample.

    The sample is a gradient like the codec's, or a square matrix where that has more than `SAMPLE` elements. The first
    trial also allocates, and the fastest counts. Infinite where the gradient is empty.
    """
    if not codec.size:
        return inf
    parts, size, side = codec.parts, codec.size, isqrt(SAMPLE)
    if size > SAMPLE:
        parts, size = [Part("sample", slice(0, side**2), (side, side), True)], side**2
    twin = type(codec)(parts, size, codec.settings, codec.momentum, codec.seed, codec.rank, codec.dtype)
    gradient = normal(codec.seed, "sample", (size,), whole((size,))).astype(codec.dtype)
    fastest = inf
    for trial in range(trials):
        mine = gradient.copy()
        begin = perf_counter()
        twin.sum_over(Loopback(ranks), mine, trial, inf)
        fastest = min(fastest, perf_counter() - begin)
    return size / fastest


def estimate(codec: Codec, allreduce: Algorithm, net: Network, ranks: int, elements_per_second: float) -> Estimate:
    """The seconds of one sum, once any warm-up is over."""
    if ranks == 1 or not codec.size:
        return Estimate(ranks, codec.size, 0.0, 0.0, 0.0)
    sending = sum(seconds(message, allreduce, net, ranks) for message in codec.messages(inf))
    plain = allreduce.cost(ranks, codec.size * codec.dtype.itemsize, net)
    return Estimate(ranks, codec.size, codec.size / elements_per_second, sending, plain)


def seconds(message: Message, allreduce: Algorithm, net: Network, ranks: int) -> float:
    """The cost of what a codec hands to the wire; a ring takes p - 1 messages to gather."""
    nbytes = message.elements * message.itemsize
    if message.gathered:
        return (ranks - 1) * (net.alpha + nbytes * net.beta)
    return allreduce.cost(ranks, nbytes, net)


def sent_bytes(codec: Codec, allreduce: Algorithm, ranks: int, rank: int, epoch: float) -> int | None:
    """Bytes that `rank` sends in a sum, exactly; None where the algorithm is a library's, which does not tell."""
    if ranks == 1:
        return 0
    total = 0
    for gathered, elements, itemsize in codec.messages(epoch):
        if gathered:
            total += (ranks - 1) * elements * itemsize
        elif allreduce.sent is None:
            return None
        else:
            total += allreduce.sent(ranks, rank, elements, itemsize).nbytes
    return total


def require_gain(comm: MPI.Intracomm, estimates: Iterable[Estimate], settings: Compress) -> None:
    """Raise ConfigError on all ranks where sums take longer with compression than without, unless it is forced.

    `estimates` are those of all gradients that this rank sums in a step; what counts is the slowest rank. Collective.
    """
    from mpi4py import MPI

    mine = [(e.work, e.sending, e.plain, e.elements) for e in estimates]
    slowest = np.array(mine, np.float64).reshape(-1, 4).sum(axis=0)
    comm.Allreduce(MPI.IN_PLACE, slowest, MPI.MAX)
    work, sending, plain, elements = slowest.tolist()
    if work + sending > plain and not settings.force:
        longest = "computing" if work > sending else "sending"
        raise ConfigError(
            f"compress.codec = {settings.codec!r} is slower on this machine than no compression: a step's sums of "
            f"{elements:,.0f} numbers would take {1000 * (work + sending):.3g} ms ({1000 * work:.3g} ms of computing, "
            f"{1000 * sending:.3g} ms of sending; {longest} takes longest) against {1000 * plain:.3g} ms; leave "
            f'compress.codec = "none", or set compress.force = true to compress all the same'
        )
