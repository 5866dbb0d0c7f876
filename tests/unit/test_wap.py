"""How many devices, as Shin et al. 2019 choose (arXiv 1811.01532): t(d) is computing, and then sums of gradients."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import pytest

from hpctrain import config_file, models
from hpctrain.graph import Graph
from hpctrain.machine import Machine, named
from hpctrain.models import Sample
from hpctrain.planner import paper
from hpctrain.planner.scaling import Scaling, Step, how_many
from hpctrain.planner.search import search
from hpctrain.planner.setting import Setting
from hpctrain.planner.sums import allreduce_seconds

EXAMPLE = Path(__file__).parents[2] / "examples" / "papers" / "alexnet-wap.toml"
WEIGHTS = 61_100_840


def argmin(compute: Callable[[int], float], sums: Callable[[int], float], devices: int = 8) -> int:
    """What is chosen where these are the seconds on d devices."""

    def step(d: int) -> Step:
        return Step(compute(d) + sums(d), compute(d))

    return how_many(step, range(1, devices + 1), 64, "time", Machine(), 0.0).chosen.ranks


def test_argmin_of_synthetic_times() -> None:
    assert argmin(lambda d: 1 / d, lambda d: 0.0) == 8
    assert argmin(lambda d: 1 / d, lambda d: 2.0 * (d - 1)) == 1
    # 1 / d + (d - 1) / 10 is least at the root of 10, 3.16
    assert argmin(lambda d: 1 / d, lambda d: (d - 1) / 10) == 3


def network(batch: int) -> tuple[Graph, Setting]:
    """AlexNet of the example for a batch, and the example's setting."""
    config = config_file.load(EXAMPLE, [f"train.batch={batch}"])
    described = config.data.sample
    assert described is not None
    assert config.plan.machine is not None
    graph = models.build(config.model.name, batch, Sample(described.shape, classes=described.classes), {})
    return graph, Setting.of(config, named(config.plan.machine))


def chosen(batch: int, objective: str = "time") -> Scaling:
    """The number of GPUs for AlexNet by data parallelism on up to 4 TITAN Xp."""
    graph, setting = network(batch)
    nbytes = 4 * sum(prod(weight.shape) for _, _, weight in graph.weights())
    assert nbytes == 4 * WEIGHTS

    def step(gpus: int) -> Step:
        compute = paper.compute_seconds(graph, setting.machine, gpus)
        return Step(compute + allreduce_seconds(nbytes, [0] * gpus, setting), compute)

    return how_many(step, range(1, 5), batch, objective, setting.machine)


def test_alexnet_takes_one_gpu_of_four_for_small_batches() -> None:
    """Table 2: at batch 128 it uses 1 of 4 GPUs, with 2560 images/s where 4 had 1473; 1491 were estimated for 4."""
    found = chosen(128)
    assert found.chosen.ranks == 1
    assert found.chosen.throughput == pytest.approx(2560, rel=1e-3)
    four = found.points[-1]
    assert (four.ranks, four.throughput < 2560) == (4, True)
    # nobody measured computing on 32 images: taken to be as efficient as on 128, so the estimate is above theirs
    assert 1491 < four.throughput < 2000


def test_alexnet_takes_all_gpus_for_large_batches() -> None:
    """Table 1, from which the time of the ring is: 7904 images/s on 4 GPUs at batch 2048."""
    found = chosen(2048)
    assert found.chosen.ranks == 4
    assert found.chosen.throughput == pytest.approx(7904, rel=1e-3)


def test_one_gpu_takes_the_least_energy_too() -> None:
    """Table 2: 149.44 W with one of 4 GPUs at work, 402.81 W with all, from which the figures of a GPU are."""
    power = named("titanxp-node").power
    assert power is not None
    assert (power.busy + 3 * power.idle, 4 * power.busy) == pytest.approx((149.44, 402.81), abs=0.05)
    assert chosen(128, "energy").chosen.ranks == 1


@pytest.mark.parametrize(("batch", "gpus"), [(128, 1), (2048, 4)])
def test_the_search_chooses_so_too(batch: int, gpus: int) -> None:
    """With the planner's own costs, where the example allows cuts by samples only."""
    graph, setting = network(batch)

    def step(ranks: int) -> Step:
        found = search(graph, setting, ranks)
        assert {partition.size for partition in found.plan.partitions.values()} == {ranks}
        return Step(found.cost.seconds, found.cost.compute)

    assert how_many(step, range(1, 5), batch, "time", setting.machine).chosen.ranks == gpus
