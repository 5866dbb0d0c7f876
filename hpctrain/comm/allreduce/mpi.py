"""The MPI library's own allreduce: its choice of algorithm, priced as the latency- and bandwidth-optimal one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hpctrain.comm.allreduce.cost import Network

if TYPE_CHECKING:
    from mpi4py import MPI


def allreduce(comm: MPI.Intracomm, buffer: np.ndarray) -> None:
    """Sum the contiguous `buffer` over `comm` in place."""
    from mpi4py import MPI

    comm.Allreduce(MPI.IN_PLACE, buffer, MPI.SUM)


def cost(ranks: int, nbytes: int, net: Network) -> float:
    """Seconds of Rabenseifner's algorithm, which libraries use for long messages (Thakur et al. 2005, section 4.5).

    Where ranks are no power of two, the surplus first hands its vector to a neighbour and gets the result from it.
    """
    steps, share = ranks.bit_length() - 1, (ranks - 1) / ranks * nbytes
    seconds = 2 * steps * net.alpha + share * (2 * net.beta + net.gamma)
    if ranks & (ranks - 1):
        seconds += 2 * net.alpha + nbytes * (2 * net.beta + net.gamma)
    return seconds
