"""What ranks agree on in a step: sums of losses, whether all is finite, whether to stop; and what they say if not."""

from __future__ import annotations

from collections.abc import Iterable
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
"""Samples that are not finite: by what was read of them, and by the rows of losses."""


class Verdict(NamedTuple):
    """What all ranks know after a step's small allreduce."""

    totals: Totals
    finite: bool
    stop: bool


class Finding(NamedTuple):
    """What one rank found in a step, or in an evaluation."""

    totals: Totals
    error: HpctrainError | None
    suspects: Suspects


def judge(comm: MPI.Intracomm, losses: Iterable[str], mine: Finding, stop: bool) -> Verdict:
    """The small allreduce of every step: sums of all ranks, whether any wants to stop; raises any rank's error on all.

    Gathered and added in rank order: some MPI libraries add in the order of arrival, other bits on every run.
    """
    names, nothing = list(losses), [0.0] * COLUMNS
    said = [value for name in names for value in mine.totals.sums.get(name, nothing)]
    said += [mine.totals.samples, float(mine.error is not None), float(any(mine.suspects)), float(stop)]
    every = np.empty((comm.size, len(said)))
    comm.Allgather(np.array(said), every)
    *sums, samples, failed, suspected, stopping = every.sum(axis=0).tolist()
    if failed:
        agree(comm, mine.error)
    totals = Totals({name: sums[i * COLUMNS :][:COLUMNS] for i, name in enumerate(names)}, samples)
    finite = not suspected and all(np.isfinite(found[LOSS]) for found in totals.sums.values())
    return Verdict(totals, finite, bool(stopping))


def explain(comm: MPI.Intracomm, feed: Feed, suspects: Suspects) -> tuple[str, str]:
    """(why, remedy) where something is not finite: names the samples behind it. Collective."""
    said = comm.allgather(suspects)
    from_data = [sample for read, _ in said for sample in read]
    from_loss = [sample for _, rows in said for sample in rows]
    if from_data:
        return f"{feed.data.folder}: NaN or infinity in {feed.name(from_data)}", "mend the data and start anew"
    which = f"the loss of {feed.name(from_loss)}" if from_loss else "the sum of losses"
    return f"inputs are, but not {which}", "resume the last checkpoint, or start anew, with a lower optim.lr"
