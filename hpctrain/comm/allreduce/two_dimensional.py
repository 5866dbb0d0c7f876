"""Two-dimensional: reduce-scatter along rows of a near-square grid, allreduce along its columns, allgather along rows.

As few bytes as the ring in 2 (rows + columns - 2) messages. Prime numbers of ranks are one row: the ring.
"""

from __future__ import annotations

import numpy as np

from hpctrain.comm.allreduce import ring
from hpctrain.comm.allreduce.cost import Network, Sent
from hpctrain.comm.link import Link, Steps, flat
from hpctrain.partition import near_square, split


@flat
def steps(link: Link, buffer: np.ndarray) -> Steps:
    """Sum the contiguous 1D `buffer` over the ranks of `link`, in place. Splits the link at the first call."""
    row, column = link.grid()
    yield from ring.reduce_scatter(row, buffer)
    yield from ring.steps(column, ring.shares(buffer, row.size)[row.rank])
    yield from ring.allgather(row, buffer)


def cost(ranks: int, nbytes: float, net: Network) -> float:
    """Seconds of the ring along rows, and of the ring on a share along columns."""
    rows, columns = near_square(ranks)
    return ring.cost(columns, nbytes, net) + ring.cost(rows, nbytes / columns, net)


def sent(ranks: int, rank: int, elements: int, itemsize: int) -> Sent:
    """What the ring sends along the row, and on a share along the column."""
    rows, columns = near_square(ranks)
    row, column = divmod(rank, columns)
    start, stop = split(elements, columns, column)
    along_row = ring.sent(columns, column, elements, itemsize)
    along_column = ring.sent(rows, row, stop - start, itemsize)
    return Sent(along_row.messages + along_column.messages, along_row.nbytes + along_column.nbytes)
