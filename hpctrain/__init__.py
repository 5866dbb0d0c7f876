"""Training of convolutional networks on large images and volumes, partitioned over MPI ranks.

The names below are the public API; each is imported when first used, so that importing hpctrain starts nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpctrain import layers
    from hpctrain.comm.exchange import Exchange
    from hpctrain.comm.grid import ProcessGrid
    from hpctrain.executor import Executor
    from hpctrain.graph import Graph
    from hpctrain.partition import Partition
    from hpctrain.planner.plan import Plan
    from hpctrain.regions import Distribution

_HOME = {
    "Distribution": "hpctrain.regions",
    "Exchange": "hpctrain.comm.exchange",
    "Executor": "hpctrain.executor",
    "Graph": "hpctrain.graph",
    "Partition": "hpctrain.partition",
    "Plan": "hpctrain.planner.plan",
    "ProcessGrid": "hpctrain.comm.grid",
    "layers": "hpctrain",
}

__all__ = ["Distribution", "Exchange", "Executor", "Graph", "Partition", "Plan", "ProcessGrid", "layers"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hpctrain' has no attribute {name!r}; it has {', '.join(__all__)}")
    if name == "layers":
        return import_module("hpctrain.layers")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
