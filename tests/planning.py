"""Machines to plan for, and networks to plan."""

from __future__ import annotations

from msgspec.structs import replace

from hpctrain.graph import Graph
from hpctrain.machine import Compute, Copies, Level, Machine, Storage
from hpctrain.models import Sample, alexnet, lenet

FAST = Level(0.0, 1e-9, 0.0)
"""Without latency, so that sums of gradients add up: that of all is that of each."""

HOST = Machine(
    node=FAST,
    copies=Copies(alpha=2e-6, beta=2e-10, run=1e-8),
    compute=Compute(flops=5e9, bandwidth=8e9, call=1e-6),
    update=1e-10,
    storage=Storage(read=1e9, write=1e9),
    step=1e-5,
)
"""One host of any number of ranks."""

HOSTS = replace(HOST, network=Level(2e-6, 3e-9, 0.0), node=Level(1e-6, 4e-10, 0.0), per_host=2, copies=None)
"""Hosts of two ranks, which exchange messages."""


def digits(batch: int = 8) -> Graph:
    """LeNet on small images."""
    return lenet.build(batch, Sample((14, 12, 1), classes=5))


def towers(batch: int = 4) -> Graph:
    """AlexNet, thin."""
    return alexnet.build(batch, Sample((67, 67, 3), classes=5), hidden=32, width=0.25)
