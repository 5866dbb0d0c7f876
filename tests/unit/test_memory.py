"""What a plan needs of memory, counted by hand; what a process may use; and what is said when that is not enough."""

from __future__ import annotations

import resource
import subprocess
import sys
from math import ceil, prod
from typing import Any

import numpy as np
import pytest
from allocations import bound, peak
from msgspec import structs

from hpctrain import memory as process
from hpctrain import usage
from hpctrain.backends.base import Backend
from hpctrain.config import Config, Data, Model, Optim, Run, Train
from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import (
    MSE,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dice,
    Dropout,
    Flatten,
    GroupNorm,
    Huber,
    Layer,
    LayerNorm,
    MaxPool,
    ReLU,
    Sigmoid,
    Softmax,
    SoftmaxCrossEntropy,
    Upsample,
)
from hpctrain.partition import Partition, Shape
from hpctrain.planner import memory
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.schedule import Economy


def small() -> Graph:
    """x -> conv -> pool -> flatten -> loss."""
    net = Graph()
    x = net.add("conv", Conv(3, kernel=3, padding=1), net.input("x", (2, 6, 5, 4)))
    x = net.add("flat", Flatten(), net.add("pool", MaxPool(2, ceil=True), x))
    net.add("loss", MSE(), x, net.input("y", (2, 27)))
    return net


def test_one_rank_by_hand() -> None:
    net = small()
    need = memory.predict(net, uniform(net, Partition()), precision="float64", optimizer_arrays=2)[0]
    weights = 3 * 3 * 4 * 3 + 3
    assert need.parameters == 8 * 2 * weights
    assert need.optimizer == 8 * 2 * weights
    # x padded; conv's output where the pool reads it, padded below to 6 x 6; the pool's; the flat one; y; rows of loss
    forward = [2 * 8 * 7 * 4, 2 * 6 * 6 * 3, 2 * 27, 2 * 27, 2 * 27, 2 * 4]
    gradients = [2 * 6 * 6 * 3, 2 * 27, 2 * 27]
    # each begins with a cache line, and so does the whole
    assert need.tensors == sum(ceil(8 * n / 64) * 64 for n in (*forward, *gradients)) + 64
    assert need.messages == need.statistics == 0
    assert need.kept == 4 * 2 * 27
    assert need.total == sum((need.parameters, need.optimizer, need.tensors, need.kept, need.workspace))


def test_sums_over_the_parts_of_a_batch_are_as_large_as_the_gradients() -> None:
    net = small()
    plain, parts = (memory.predict(net, uniform(net, Partition()), [0], accumulate=a)[0] for a in (False, True))
    assert parts.parameters - plain.parameters == 4 * (3 * 3 * 4 * 3 + 3)
    assert parts.total - plain.total == parts.parameters - plain.parameters


def test_halos_of_two_ranks_by_hand() -> None:
    net = small()
    one = Partition()
    cuts = {"x": Partition(height=2), "conv": Partition(height=2), "pool": one, "flat": one, "loss": one, "y": one}
    first, second = memory.predict(net, Plan(cuts)).values()
    # a row of x (2 samples) goes to the other rank: 2 x 1 x 5 x 4 out, the same in, both with gaps between samples;
    # conv's rows of rank 1 go to rank 0, and their gradient back: 2 x 3 x 5 x 3, at rank 0 within a larger array
    row, rows = 2 * 5 * 4, 2 * 3 * 5 * 3
    assert first.messages == 4 * (row + row + rows + rows)
    # rank 1 has its rows alone: sent as they lie there; their gradient is added to nothing, but goes through a buffer
    assert second.messages == 4 * (row + row + rows)
    assert second.kept == 0
    assert first.parameters == second.parameters  # height cuts no weight


def test_adding_a_grid_axis_divides_the_tensors() -> None:
    net = Graph()
    x = net.add("conv", Conv(8, kernel=3, padding=1), net.input("x", (2, 16, 16, 16, 8)))
    net.add("loss", MSE(), net.add("relu", ReLU(), x), net.input("y", (2, 16, 16, 16, 8)))
    totals = [memory.largest(memory.predict(net, uniform(net, Partition(depth=n))))[1].tensors for n in (1, 2, 4, 8)]
    assert totals == sorted(totals, reverse=True)
    assert totals[3] < 0.25 * totals[0]


@pytest.mark.parametrize(
    ("layer", "output", "inputs", "kept"),
    [
        (MaxPool(2), (2, 3, 3, 5), [(2, 6, 6, 5)], 4 * 90),
        (Dropout(), (2, 3, 5), [(2, 3, 5)], 30),
        (Dropout(whole_channels=True), (2, 3, 3, 5), [(2, 3, 3, 5)], 10),
        (SoftmaxCrossEntropy(), (2, 4), [(2, 7), (2,)], 8 * 14),
        (SoftmaxCrossEntropy(ignore=3), (2, 4), [(2, 7), (2,)], 8 * 14 + 9 * 2),
        (Dice(), (2, 4), [(2, 3, 3, 5), (2, 3, 3)], 3 * 8 * 90 + 2 * 90 + 8 * 18),
        (Dice(ignore=0), (2, 4), [(2, 3, 3, 5), (2, 3, 3)], 3 * 8 * 90 + 2 * 90 + 9 * 18),
        (Dice(), (2, 4), [(2, 3, 3, 5), (2, 3, 3, 5)], 3 * 8 * 90 + 2 * 90),
        (LayerNorm(dims=2), (2, 3, 4, 5), [(2, 3, 4, 5)], 8 * 120 + 8 * 6 * 6 + 8 * 3 * 20),
        (ConvTranspose(6, kernel=(3, 2), stride=2, groups=2), (2, 7, 6, 6), [(2, 3, 3, 4)], 8 * (2 * 42 * 6 + 72)),
        (Softmax(), (2, 7), [(2, 7)], 0),
        (Softmax(), (2, 3), [(2, 7)], 2 * 8 * 14),
        (Upsample(2), (1, 6, 6, 5), [(1, 3, 3, 5)], 8 * 6 * 3 * 5),
        (ReLU(), (2, 3), [(2, 3)], 0),
    ],
)
def test_what_layers_keep(layer: Layer, output: Shape, inputs: list[Shape], kept: int) -> None:
    assert layer.kept_bytes(8, output, *inputs) == kept


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (SoftmaxCrossEntropy(ignore=3), ((2, 31, 7), (2, 31))),
        (Dice(), ((2, 13, 3, 5), (2, 13, 3))),
        (Dice(ignore=0), ((2, 13, 3, 5), (2, 13, 3))),
        (Dice(), ((2, 13, 3, 5), (2, 13, 3, 5))),
        (LayerNorm(), ((2, 13, 4, 5),)),
        (LayerNorm(dims=3), ((2, 13, 4, 5),)),
        (ConvTranspose(6, kernel=(3, 2), stride=2, padding=1, groups=2), ((2, 13, 8, 4),)),
        (MaxPool(2), ((2, 13, 8, 5),)),
        (Upsample(3, mode="linear"), ((2, 13, 8, 5),)),
    ],
    ids=str,
)
def test_what_layers_keep_is_what_their_ops_hold(layer: Layer, shapes: tuple[Shape, ...], backend: Backend) -> None:
    held = vars(bound(layer, shapes, backend, np.dtype("float64")).op).values()
    listed = [a for value in held for a in (value if isinstance(value, list) else [value])]
    arrays = {id(a): a.nbytes for a in listed if isinstance(a, np.ndarray)}
    kept, few = sum(arrays.values()), 200  # class weights and such
    assert 0 <= kept - layer.kept_bytes(8, layer.output_shape(*shapes), *shapes) < few


# --- temporary arrays ---------------------------------------------------------------------------------------------


def measured(layer: Layer, shapes: tuple[Shape, ...], backend: Backend, dtype: np.dtype) -> int:
    """The most bytes that forward and backward of a layer allocate besides what they are given and what they keep."""
    steps = bound(layer, shapes, backend, dtype)
    # the first time makes what is kept
    return max(peak(step) for _ in range(2) for step in (steps.forward, steps.backward))


VOLUME = (2, 13, 12, 17, 8)


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        (GroupNorm(4), (VOLUME,)),
        (LayerNorm(), (VOLUME,)),
        (BatchNorm(), (VOLUME,)),
        (SoftmaxCrossEntropy(), ((2, 13, 12, 17, 2), (2, 13, 12, 17))),
        (SoftmaxCrossEntropy(), ((2, 13, 12, 17, 4), (2, 13, 12, 17))),
        (SoftmaxCrossEntropy(smoothing=0.1), ((2, 13, 12, 17, 16), (2, 13, 12, 17))),
        (Dice(), ((2, 13, 12, 17, 4), (2, 13, 12, 17))),
        (MSE(), (VOLUME, VOLUME)),
        (Huber(), (VOLUME, VOLUME)),
        (Softmax(), (VOLUME,)),
        (Upsample(2), (VOLUME,)),
        (Upsample(2, mode="linear"), (VOLUME,)),
        (Dropout(), (VOLUME,)),
        (Sigmoid(), (VOLUME,)),
        (ReLU(), (VOLUME,)),
    ],
    ids=str,
)
def test_workspace_is_what_is_allocated(
    layer: Layer, shapes: tuple[Shape, ...], backend: Backend, dtype: np.dtype
) -> None:
    net = Graph()
    names = [
        net.input(f"x{i}", shape, integer=label)
        for i, (shape, label) in enumerate(zip(shapes, layer.labels(*shapes), strict=True))
    ]
    net.add("layer", layer, *names)
    need = memory.predict(net, uniform(net, Partition()), precision=dtype.name, backend=backend.name)[0]
    found = measured(layer, shapes, backend, dtype)
    few = 0.5 * prod(shapes[0])  # sums per sample and channel, and Python's own objects
    assert abs(need.workspace - found) < 0.3 * found + few, f"{need.workspace} predicted, {found} allocated"


def test_text_names_the_large_parts() -> None:
    need = memory.Memory(2 * 2**20, 2**20, 0, 300 * 2**20, 0, 0, 2**20)
    assert str(need) == "304 MiB (tensors 300 MiB)"
    assert memory.largest({0: need, 1: memory.Memory(2**40, 0, 0, 0, 0, 0, 0), 2: need})[0] == 1


# --- the process --------------------------------------------------------------------------------------------------


def test_peak_grows_with_what_is_used() -> None:
    code = (
        "from hpctrain import memory; import numpy as np\n"
        "before = memory.peak(); a = np.ones(50 * 2**20, np.uint8); print(memory.peak() - before)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 49 * 2**20 < int(said.stdout) < 60 * 2**20


@pytest.mark.parametrize(("limit", "name"), [("RLIMIT_DATA", "ulimit -d 2097152"), ("RLIMIT_AS", "ulimit -v 2097152")])
def test_limits_of_the_process(limit: str, name: str) -> None:
    code = (
        "import resource; from hpctrain import memory\n"
        "print(memory.process_room())\n"
        f"resource.setrlimit(resource.{limit}, (2**31, -1)); room = memory.process_room()\n"
        "print(2**30 < room.nbytes < 2**31, room.limit)"
    )
    unlimited = resource.getrlimit(getattr(resource, limit))[0] == resource.RLIM_INFINITY
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[1] == f"True {name}"
    assert (said[0] == "None") == unlimited


def test_room_of_the_host_is_not_more_than_it_has() -> None:
    room = process.host_room()
    assert room is not None
    with open("/proc/meminfo") as lines:
        total = int(next(line for line in lines if line.startswith("MemTotal")).split()[1]) * 1024
    assert 0 < room.nbytes <= total


def test_memory_error_is_explained() -> None:
    with (
        pytest.raises(
            PlanError, match=r"out of memory, within .*by the plan rank 1 needs 12 MiB,.*larger plan.grid"
        ) as error,
        process.explained(lambda: "rank 1 needs 12 MiB"),
    ):
        raise MemoryError("Unable to allocate")
    assert isinstance(error.value.__cause__, MemoryError)


def test_peaks_are_shown_beside_the_plan() -> None:
    ranks = [usage.RankMemory(r, (200 + r) * 2**20, 100 * 2**20, 70 * 2**20) for r in range(9)]
    assert usage.describe(ranks[:2]).splitlines() == [
        "peak memory:",
        "  rank 0: 200 MiB; 70 MiB at the start, 100 MiB by the plan",
        "  rank 1: 201 MiB; 70 MiB at the start, 100 MiB by the plan",
    ]
    assert usage.describe(ranks).splitlines()[1:] == ["  rank 8: 208 MiB; 70 MiB at the start, 100 MiB by the plan"]
    assert usage.largest(ranks) == {"peak_memory_bytes": 208 * 2**20, "predicted_memory_bytes": 100 * 2**20}


@pytest.mark.parametrize(("optimizer", "arrays"), [("sgd", 1), ("adam", 2), ("lars", 1), ("lamb", 3)])
def test_of_a_run_takes_precision_and_optimizer_from_the_config(optimizer: Any, arrays: int) -> None:
    net = small()
    plan = uniform(net, Partition())
    config = Config(
        model=Model(name="lenet"),
        data=Data(train="nowhere"),
        optim=Optim(name=optimizer, lr=0.1),
        train=Train(epochs=1, batch=2, precision="float64"),
        run=Run(folder="nowhere"),
    )
    lean = Economy(fuse=True, reuse=True)
    expected = memory.predict(net, plan, precision="float64", optimizer_arrays=arrays, economy=lean)
    assert memory.of_run(config, net, plan) == expected
    in_parts = structs.replace(config, train=structs.replace(config.train, accumulate=2))
    found, whole = memory.of_run(in_parts, net, plan)[0], expected[0]
    assert found.parameters == 1.5 * whole.parameters
