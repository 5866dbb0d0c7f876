"""What a step of training takes by a plan, layer by layer and in all, as `cost.price` finds it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from hpctrain.partition import Partition


@dataclass(frozen=True)
class LayerCost:
    """Seconds of one layer in a step, exchanges of its inputs and partial sums included, and bytes.

    Of layers that run as one, the first has the time that all of them compute.
    """

    name: str
    kind: str
    partition: Partition
    compute_forward: float = 0.0
    compute_backward: float = 0.0
    halo_forward: float = 0.0
    halo_backward: float = 0.0
    redistribution_forward: float = 0.0
    redistribution_backward: float = 0.0
    statistics: float = 0.0
    allreduce: float = 0.0
    """Its share, by bytes, of the sums of the groups that its weights belong to."""
    memory: int = 0
    """Bytes of rank 0: of its output and, twice, its weights."""
    sent_bytes: int = 0
    """By all ranks in exchanges, forward and backward."""

    @property
    def compute(self) -> float:
        """Forward and backward."""
        return self.compute_forward + self.compute_backward

    @property
    def halo(self) -> float:
        """Exchanges between equal partitions, forward and backward."""
        return self.halo_forward + self.halo_backward

    @property
    def redistribution(self) -> float:
        """Exchanges between different ones, and partial sums, forward and backward."""
        return self.redistribution_forward + self.redistribution_backward

    @property
    def exchange(self) -> float:
        """All that a rank waits for others in the middle of a pass."""
        return self.halo + self.redistribution + self.statistics


@dataclass(frozen=True)
class PlanCost:
    """Seconds of a step on the slowest rank."""

    layers: tuple[LayerCost, ...]
    ranks: int
    parts: int = 1
    """How often layers run in a step, for one part of the batch each."""
    allreduce: float = 0.0
    hidden: float = 0.0
    """How much of `allreduce` passes while backward computes."""
    update: float = 0.0
    input: float = 0.0
    step: float = 0.0
    checkpoint: float = 0.0
    """A step's share of what writing them takes."""

    @cached_property
    def compute(self) -> float:
        """Of all layers and parts."""
        return self.parts * sum(layer.compute for layer in self.layers)

    @cached_property
    def halo(self) -> float:
        """Likewise."""
        return self.parts * sum(layer.halo for layer in self.layers)

    @cached_property
    def redistribution(self) -> float:
        """Likewise, with the gathering of statistics."""
        return self.parts * sum(layer.redistribution + layer.statistics for layer in self.layers)

    @property
    def sent_bytes(self) -> int:
        """By all ranks in exchanges of a step."""
        return self.parts * sum(layer.sent_bytes for layer in self.layers)

    def phases(self) -> dict[str, float]:
        """Seconds by phase; they add up to `seconds`."""
        return {
            "compute": self.compute,
            "halo": self.halo,
            "redistribution": self.redistribution,
            "allreduce": self.allreduce - self.hidden,
            "update": self.update,
            "input": self.input,
            "step": self.step,
            "checkpoint": self.checkpoint,
        }

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.phases().values())
