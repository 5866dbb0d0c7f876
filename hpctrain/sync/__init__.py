"""How replicas of a network keep together, one file per strategy; `TABLE` lists them. A replica is a whole plan."""

from __future__ import annotations

from collections.abc import Callable

from hpctrain.comm.replicas import Replicas
from hpctrain.config import Sync
from hpctrain.sync.allreduce import Allreduce
from hpctrain.sync.backup import Backup
from hpctrain.sync.base import Held, Strategy, average, averaged, held
from hpctrain.sync.elastic import Elastic
from hpctrain.sync.gossip_pull import GossipPull
from hpctrain.sync.gossip_push import GossipPush
from hpctrain.sync.local import Local
from hpctrain.sync.meeting import Meeting

TABLE: dict[str, Callable[[Replicas, Held, Sync, int], Strategy]] = {
    "local": Local,
    "elastic": Elastic,
    "gossip-pull": GossipPull,
    "gossip-push": GossipPush,
    "backup": Backup,
}
"""Strategies of several replicas: made of these, of what this rank holds, of the config and the run's seed."""


def make(replicas: Replicas, held: Held, config: Sync, seed: int) -> Strategy:
    """The strategy that `config` names. Collective over all replicas."""
    if config.strategy == "allreduce":
        return Allreduce()
    return TABLE[config.strategy](replicas, held, config, seed)


__all__ = ["TABLE", "Held", "Meeting", "Strategy", "average", "averaged", "held", "make"]
