"""What all ranks of a step know of it: sums over them, what any of them met, and what is not finite."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hpctrain.comm.world import agree
from hpctrain.errors import HpctrainError
from hpctrain.feed import Feed
from hpctrain.layers.loss import COLUMNS, LOSS
from hpctrain.metrics import Totals

if TYPE_CHECKING:
    from mpi4py import MPI

Suspects = tuple[list[int], list[int]]
"""Samples that are not finite: by what a rank reads of them, and by its rows of the losses."""

LOWER = "resume the last checkpoint, or start anew, with a lower optim.lr"
"""The remedy where numbers have grown too large."""


class Verdict(NamedTuple):
    """The same on all ranks."""

    totals: Totals
    finite: bool
    stop: bool
    """Whether any rank was asked to stop."""
    gradient_norm: float | None = None
    """Where gradients are clipped."""


def judge(comm: MPI.Intracomm, mine: Totals, error: HpctrainError | None, suspects: Suspects, stop: bool) -> Verdict:
    """The small allreduce of every step: sums of all ranks, whether to stop; raises any rank's error on all.

    Gathered and added in rank order: some MPI libraries add in the order of arrival, other bits on every run.
    """
    said = [value for sums in mine.sums.values() for value in sums]
    said += [mine.samples, float(error is not None), float(any(suspects)), float(stop)]
    every = np.empty((comm.size, len(said)))
    comm.Allgather(np.array(said), every)
    *sums, samples, failed, suspected, stopping = every.sum(axis=0).tolist()
    if failed:
        agree(comm, error)
    totals = Totals({name: sums[i * COLUMNS :][:COLUMNS] for i, name in enumerate(mine.sums)}, samples)
    finite = not suspected and all(np.isfinite(found[LOSS]) for found in totals.sums.values())
    return Verdict(totals, finite, bool(stopping))


def blame(comm: MPI.Intracomm, feed: Feed, suspects: Suspects) -> tuple[str, str]:
    """The samples behind what is not finite, in words, and the remedy. Collective."""
    said = comm.allgather(suspects)
    from_data = [sample for read, _ in said for sample in read]
    from_loss = [sample for _, rows in said for sample in rows]
    if from_data:
        return f"{feed.data.folder}: NaN or infinity in {feed.name(from_data)}", "mend the data and start anew"
    which = f"the loss of {feed.name(from_loss)}" if from_loss else "the sum of losses"
    return f"inputs are, but not {which}", LOWER
