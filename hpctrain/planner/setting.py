"""What the price of a plan depends on besides the network: the machine, and how a run goes about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from hpctrain import optim
from hpctrain.config import Config
from hpctrain.machine import Machine
from hpctrain.planner.schedule import LEAN, Economy
from hpctrain.precision import TYPES

Fewer = Literal["none", "head", "all"]


@dataclass(frozen=True)
class Setting:
    """A machine, and what of a run's config matters to the price of a plan. The network is that of a batch's part."""

    machine: Machine
    precision: str = "float32"
    backend: str = "native"
    optimizer_arrays: int = 1
    """Numbers that the optimizer keeps per weight."""
    economy: Economy = LEAN
    parts: int = 1
    """Into how many parts a batch is divided, one after the other."""
    shard: bool = False
    share_weights: bool = False
    bucket_bytes: int = 16 * 2**20
    overlap: bool | None = None
    """Whether gradients are summed while backward goes on; None: where ranks are on several hosts."""
    allreduce: str | None = None
    """The algorithm; None: as `comm.allreduce.choose` chooses it."""
    save_every: int = 0
    """Steps from one checkpoint to the next, whose writing counts; 0: never."""
    fewer: Fewer = "head"
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """{kind of layer: axes that it may be cut along}; all where a kind is absent."""

    @classmethod
    def of(cls, config: Config, machine: Machine) -> Setting:
        """That of a run as `config` describes it, on `machine`."""
        plan, train = config.plan, config.train
        return cls(
            machine,
            train.precision,
            train.backend,
            optim.TABLE[config.optim.name].arrays,
            LEAN,
            train.accumulate,
            config.optim.shard,
            config.memory.share_weights,
            int(plan.bucket_mib * 2**20),
            plan.overlap,
            plan.allreduce,
            fewer=plan.fewer,
            only=dict(plan.only),
        )

    @property
    def dtype(self) -> np.dtype:
        """Of what flows between layers."""
        return TYPES[self.precision]
