"""Every network of the zoo: a training step with another partition for every layer equals the step of one rank."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from executing import assert_equal, serial, train
from networks import draw, random_plan

from hpctrain import models
from hpctrain.models import ZOO, Sample

SMALL: dict[str, tuple[int, Sample, dict[str, Any]]] = {
    "alexnet": (2, Sample((67, 71, 3), classes=5), {"hidden": 13, "width": 0.05}),
    "alexnet, two groups": (2, Sample((67, 75, 3), classes=5), {"hidden": 13, "width": 0.05, "two_groups": True}),
    "cosmoflow": (3, Sample((16, 17, 9, 1), values=2), {"filters": 3, "hidden": 7}),
    "cosmoflow, oyama2020": (2, Sample((19, 17, 21, 2), values=3), {"variant": "oyama2020", "filters": 2, "hidden": 9}),
    "cosmoflow, mlperf": (2, Sample((33, 35, 32, 2), values=3), {"variant": "mlperf", "filters": 2, "hidden": 9}),
    "inception3": (4, Sample((107, 109, 3), classes=5), {"width": 0.05}),
    "lenet": (3, Sample((13, 15, 1), classes=5), {}),
    "mlp": (5, Sample((5, 3), classes=4), {"hidden": [9, 7]}),
    "resnet18": (3, Sample((33, 37, 3), classes=5), {"width": 0.1}),
    "resnet34": (2, Sample((17, 15, 3), classes=5), {"width": 0.1, "stem": "cifar"}),
    "resnet50": (2, Sample((35, 33, 3), classes=5), {"width": 0.1}),
    "unet3d": (2, Sample((9, 7, 11, 2), classes=3, positions=(9, 7, 11)), {"filters": 2, "levels": 3}),
    "vgg11": (2, Sample((33, 35, 3), classes=5), {"width": 0.05, "hidden": 13, "norm": True}),
    "vgg16": (2, Sample((35, 33, 3), classes=5), {"width": 0.05, "hidden": 13}),
}
"""Batch, sample and options, as small as each network allows."""


@pytest.mark.parallel(4)
@pytest.mark.parametrize("case", SMALL)
def test_training_step_on_a_mixed_plan_equals_one_rank(comm: Any, case: str, seed: int) -> None:
    batch, sample, options = SMALL[case]
    net = models.build(case.split(",")[0], batch, sample, options)
    data = draw(net, seed, steps=1)
    plan = random_plan(np.random.default_rng(seed), net, comm.size)
    print(f"{len(plan.partitions)} layers, {len(set(plan.partitions.values()))} partitions")
    expected = comm.bcast(serial(net, data) if comm.rank == 0 else None)
    assert_equal(train(net, plan, comm, data), expected, plan)


@pytest.mark.parallel(4)
def test_every_network_is_here(comm: Any) -> None:
    del comm
    assert {ZOO[case.split(",")[0]][0] for case in SMALL} == {file for file, _ in ZOO.values()}
