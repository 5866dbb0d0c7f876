"""The memory of every rank of a run: what the plan says that it needs, and what it has used in the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hpctrain import memory
from hpctrain.comm.world import World
from hpctrain.memory import mib
from hpctrain.planner.memory import Memory

FEW = 8
"""Ranks up to which each is named."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank."""

    rank: int
    peak_memory_bytes: int
    """The most it has had resident."""
    predicted_memory_bytes: int
    """What the plan needs."""
    start_memory_bytes: int
    """What it had before: Python, MPI and libraries."""


class Usage:
    """Watches a run from the moment before it allocates. Collective over `world`."""

    def __init__(self, world: World, need: Memory, keeping: int | None = None) -> None:
        """`need` is this rank's, and `keeping` what it would need in all if it did not recompute, where it does."""
        self.world, self.start, self.keeping = world, memory.peak(), keeping
        self.needs: list[int] = world.comm.allgather(need.total)
        self.here: int = world.node.allreduce(need.total)

    def heading(self) -> str:
        """What the plan needs, for the head of a run."""
        rank = self.needs.index(max(self.needs))
        least = f", {mib(min(self.needs))} at least" if min(self.needs) < max(self.needs) else ""
        saved = f"; {mib(self.keeping)} on this rank without memory.recompute" if self.keeping else ""
        return f"memory by the plan: {mib(self.needs[rank])} on rank {rank}, the most{least}{saved}"

    def warning(self) -> str | None:
        """What is wrong where this host has less memory than its ranks need, else None."""
        room = memory.host_room()
        if room is None or self.here <= room.nbytes or self.world.node.rank > 0:
            return None
        return (
            f"the ranks on {self.world.hostname} need {mib(self.here)} by the plan, but it has {mib(room.nbytes)} "
            f"({room.limit}): some may be killed; use more hosts, a larger train.accumulate, or a smaller train.batch"
        )

    def ranks(self) -> list[RankMemory]:
        """All ranks so far. Collective."""
        every = self.world.comm.allgather((memory.peak(), self.start))
        return [RankMemory(rank, peak, self.needs[rank], start) for rank, (peak, start) in enumerate(every)]


def describe(ranks: Sequence[RankMemory]) -> str:
    """The peak of every rank, or of many the largest, beside the plan's figure."""
    shown = ranks if len(ranks) <= FEW else [max(ranks, key=lambda r: r.peak_memory_bytes)]
    lines = ["peak memory:" if len(ranks) <= FEW else f"peak memory, the largest of {len(ranks)} ranks:"]
    for r in shown:
        lines.append(
            f"  rank {r.rank}: {mib(r.peak_memory_bytes)}; {mib(r.start_memory_bytes)} at the start, "
            f"{mib(r.predicted_memory_bytes)} by the plan"
        )
    return "\n".join(lines)


def largest(ranks: Sequence[RankMemory]) -> dict[str, int]:
    """The largest figures of any rank, for the last record of a run."""
    found = [asdict(r) for r in ranks]
    return {key: max(r[key] for r in found) for key in ("peak_memory_bytes", "predicted_memory_bytes")}
