"""The MPI library's own allreduce: its choice of algorithm, priced as the latency- and bandwidth-optimal one.

What it sends is its own affair and is not counted; MPICH for one does not repeat the order of its sums from run to run.
Floats of 16 bits are summed in float32, rounded once at the end.
"""

from __future__ import annotations

import numpy as np

from hpctrain.comm.allreduce.cost import Network
from hpctrain.comm.link import MOST_ELEMENTS, Link, Steps, flat


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place."""
    from mpi4py import MPI

    wide = widened(link, buffer)
    for start in range(0, wide.size, MOST_ELEMENTS):
        yield [link.comm.Iallreduce(MPI.IN_PLACE, wide[start : start + MOST_ELEMENTS], MPI.SUM)]
    narrow(wide, buffer)


@flat
def blocking(link: Link, buffer: np.ndarray) -> None:
    """`steps` at once: Open MPI's Allreduce takes half the time of its Iallreduce."""
    from mpi4py import MPI

    wide = widened(link, buffer)
    for start in range(0, wide.size, MOST_ELEMENTS):
        link.comm.Allreduce(MPI.IN_PLACE, wide[start : start + MOST_ELEMENTS], MPI.SUM)
    narrow(wide, buffer)


def widened(link: Link, buffer: np.ndarray) -> np.ndarray:
    """`buffer`, or a copy in float32 of what MPI has no type for."""
    if buffer.itemsize != 2:
        return buffer
    wide = link.scratch(buffer.size, np.dtype(np.float32))
    np.copyto(wide, buffer)
    return wide


def narrow(wide: np.ndarray, buffer: np.ndarray) -> None:
    """Round the sum of what `widened` gave into `buffer`."""
    if wide is not buffer:
        with np.errstate(over="ignore"):
            np.copyto(buffer, wide, casting="unsafe")


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds of Rabenseifner's algorithm, which libraries use for long messages (Thakur et al. 2005, section 4.5).

    Where ranks are no power of two, the surplus first hands its vector to a neighbour and gets the result from it.
    """
    steps, share = ranks.bit_length() - 1, (ranks - 1) / ranks * nbytes
    seconds = 2 * steps * net.alpha + share * (2 * net.beta + net.gamma)
    if ranks & (ranks - 1):
        seconds += 2 * net.alpha + nbytes * (2 * net.beta + net.gamma)
    return seconds
