"""How a run sums its gradients: by its config and what is known of the machine, and whether compression pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from hpctrain.comm import allreduce
from hpctrain.comm.allreduce.choose import Surroundings
from hpctrain.comm.codecs import TABLE as CODECS
from hpctrain.comm.codecs.cost import estimate, require_gain, throughput
from hpctrain.comm.link import Topology
from hpctrain.comm.neighbours import MESSAGES
from hpctrain.config import Config, Optim
from hpctrain.executor import Executor
from hpctrain.gradients import Summing
from hpctrain.planner.plan import Plan

if TYPE_CHECKING:
    from mpi4py import MPI


def surroundings(comm: MPI.Intracomm, library: str) -> Surroundings:
    """What the choice of an allreduce algorithm depends on, of the ranks of `comm`. Collective."""
    return Surroundings.of(comm, Topology(comm).hosts, library)


def summing(config: Config, around: Surroundings, steps_per_epoch: int) -> Summing:
    """How the executor of a run as `config` describes it sums gradients."""
    return Summing(
        bucket_bytes=int(config.plan.bucket_mib * 2**20),
        overlap=config.plan.overlap,
        shard=config.optim.shard,
        share_weights=config.memory.share_weights,
        choose=around.choose,
        compress=config.compress,
        momentum=config.optim.momentum,
        steps_per_epoch=steps_per_epoch * config.train.accumulate,
    )


def optimizer_config(config: Config) -> Optim:
    """What the optimizer is to do, less what the codec of its gradients does already."""
    codec = CODECS.get(config.compress.codec)
    return replace(config.optim, momentum=0.0) if codec and codec.takes_momentum else config.optim


def recorded(plan: Plan, executor: Executor) -> Plan:
    """`plan` with the algorithms that were chosen, for a run that goes on to use the same."""
    return plan.with_choices(executor.gradients.choices) if executor.gradients.why else plan


def require_worthwhile(config: Config, executor: Executor, around: Surroundings) -> None:
    """Raises ConfigError on all ranks where compression is slower than none, unless it is forced. Collective."""
    if config.compress.codec == "none" or config.compress.force:
        return
    gradients = executor.gradients
    found = []
    for group, codec in gradients.codecs.items():
        link = gradients.link(group)
        net = around.network(link.topology.hosts)
        algorithm = allreduce.get(gradients.choices[group])
        found.append(estimate(codec, algorithm, net, link.size, throughput(codec, link.size)))
    require_gain(executor.comm, found, config.compress)


def notes(executor: Executor) -> list[str]:
    """What the head of a run says of its exchanges, unless there is nothing to say, and its gradient sums."""
    gradients, by = executor.gradients, executor.exchange_by
    lines = [] if by == MESSAGES else [f"exchange on a host by {by}"]
    if gradients.choices and gradients.settings.share_weights:
        return [*lines, "gradients: summed in the memory of each host, where weights lie once; ranks update shares"]
    if gradients.choices and gradients.settings.shard:
        how = gradients.how()
        return [*lines, f"gradients: reduced and scattered by a ring, ranks update shares and gather the weights{how}"]
    for name in dict.fromkeys(gradients.choices.values()):
        groups = [group for group, chosen in gradients.choices.items() if chosen == name]
        why = next((gradients.why[group] for group in groups if group in gradients.why), "as the plan says")
        lines.append(f"gradients: {name} allreduce ({why}){gradients.how()}")
    return lines
