"""Random networks of 5 to 12 layers, with branches, joins, inputs and losses, on random plans, against one rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
from driving import Case, cases, drive
from geometry import Draw, some_of, whole
from hypothesis import assume
from hypothesis import strategies as st

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import (
    GELU,
    MAE,
    MSE,
    AdaptiveAvgPool,
    Add,
    AvgPool,
    BatchNorm,
    BCEWithLogits,
    Concat,
    Conv,
    ConvTranspose,
    Dense,
    Dice,
    Dropout,
    Flatten,
    GlobalAvgPool,
    GroupNorm,
    Huber,
    Input,
    InstanceNorm,
    Layer,
    LayerNorm,
    LeakyReLU,
    Loss,
    MaxPool,
    Multiply,
    ReLU,
    Reshape,
    Sigmoid,
    SiLU,
    Slice,
    Softmax,
    SoftmaxCrossEntropy,
    Softplus,
    Tanh,
    Upsample,
)
from hpctrain.partition import Shape

NETWORKS = 16
"""For every number of ranks."""
EPS = 0.01
"""Of norms: they may stand in a row, and a small one multiplies rounding by 1 / sqrt(eps) where a variance is 0."""
LARGE = 60
"""Positions from which on a tensor is no longer enlarged."""

LOSSES = ("mse", "labels", "dice", "bce", "pooled labels", "dense huber", "pooled mae")


class Network:
    """A graph in the making, and which of its tensors are (N, [[D,] H,] W, C) to be read on."""

    def __init__(self) -> None:
        self.net = Graph()
        self.pool: list[str] = []
        self.alike: set[str] = set()
        """Tensors that may hold an element twice, as far as rounding allows: no maximum is taken of them."""

    def add(self, layer: Layer, *inputs: str) -> str:
        """Append `layer`."""
        name = self.net.add(f"{type(layer).__name__.lower()}{len(self.net.nodes)}", layer, *inputs)
        repeats = isinstance(layer, Upsample | AdaptiveAvgPool) or getattr(layer, "border", "zero") != "zero"
        if repeats or any(x in self.alike for x in inputs):
            self.alike.add(name)
        return name

    def shape(self, name: str) -> Shape:
        return self.net[name].shape

    @property
    def layers(self) -> list[Layer]:
        """What computes, losses apart."""
        return [n.layer for n in self.net if not isinstance(n.layer, Input | Loss)]


@st.composite
def networks(draw: Draw) -> Graph:
    """One or two inputs, steps on any tensor so far; what nobody reads then is joined, gets a loss, or is left."""
    made = Network()
    dims, batch = some_of(draw, 1, 2, 2, 3), whole(draw, 1, 4)
    for i in range(some_of(draw, 1, 1, 2)):
        extents = (whole(draw, 2, 4 if dims == 3 else 9) for _ in range(dims))
        x = made.net.input(f"x{i}", (batch, *extents, whole(draw, 1, 3)))
        made.pool += [x] * some_of(draw, 0, 0, 1)
        made.pool.append(made.add(Conv(whole(draw, 2, 4), 3, padding=1), x))
    steps = whole(draw, 5, 8)
    while len(made.layers) < steps:
        made.pool.append(step(draw, made))
    ends = [name for name in made.pool if not made.net.consumers(name)]
    joined = ends[-1]
    for other in ends[:-1]:
        end = some_of(draw, "join", "loss", "leave")
        if end == "join":
            joined = made.add(Concat(), joined, resized(made, other, made.shape(joined)))
        elif end == "loss":
            head(draw, made, other)
    head(draw, made, joined)
    assume(len(made.layers) <= 12)
    return made.net


def step(draw: Draw, made: Network) -> str:
    """One more layer, on the last tensor or any; or two tensors joined, with what it takes to make them alike."""
    x = some_of(draw, made.pool[-1], made.pool[-1], *made.pool)
    kind = some_of(draw, *UNARY, "add", "add", "concat", "concat", "gate")
    if kind in UNARY:
        layer = UNARY[kind](draw, made.shape(x))
        alike = isinstance(layer, MaxPool) and x in made.alike
        return made.add(ReLU() if alike or not takes(layer, made.shape(x)) else layer, x)
    other = resized(made, some_of(draw, *made.pool), made.shape(x))
    if kind == "concat":
        same = made.shape(other) == made.shape(x)
        return made.add(Concat(whole(draw, 1, len(made.shape(x)) - 1) if same else -1), x, other)
    if made.shape(other) != made.shape(x):
        other = made.add(Conv(made.shape(x)[-1], 1), other)
    return made.add(Add(), x, other) if kind == "add" else made.add(Multiply(), x, made.add(Sigmoid(), other))


def takes(layer: Layer, shape: Shape) -> bool:
    """Whether `layer` can be on a tensor of `shape`, and leaves it small enough."""
    try:
        return prod(layer.output_shape(shape)[1:-1]) <= max(LARGE, prod(shape[1:-1]))
    except PlanError:
        return False


def resized(made: Network, x: str, like: Shape) -> str:
    """`x` with the positions of `like`, from branches of other strides: repeated where that does it, else averaged."""
    mine, wanted = made.shape(x)[1:-1], like[1:-1]
    if mine == wanted:
        return x
    if all(b % a == 0 for a, b in zip(mine, wanted, strict=True)):
        return made.add(Upsample(tuple(b // a for a, b in zip(mine, wanted, strict=True))), x)
    return made.add(AdaptiveAvgPool(wanted), x)


def each(draw: Draw, shape: Shape, *values: int) -> tuple[int, ...]:
    """One of `values` per position dim."""
    return tuple(some_of(draw, *values) for _ in shape[1:-1])


def conv(draw: Draw, shape: Shape) -> Layer:
    groups = some_of(draw, *[g for g in (1, 2, 3, 4) if shape[-1] % g == 0])
    kernel, dilation = each(draw, shape, 3, 1, 2), each(draw, shape, 1, 1, 2)
    room = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    padding = tuple((r // 2, r - r // 2) for r in room)
    border = some_of(draw, "zero", "zero", "periodic", "reflect")
    filters = groups * whole(draw, 1, 3)
    return Conv(filters, kernel, each(draw, shape, 1, 1, 2), padding, dilation, groups, draw(st.booleans()), border)


def transposed(draw: Draw, shape: Shape) -> Layer:
    kernel = each(draw, shape, 2, 3, 1)
    return ConvTranspose(whole(draw, 1, 3), kernel, each(draw, shape, 2, 1, 3), tuple((k // 2, 0) for k in kernel))


def max_pool(draw: Draw, shape: Shape) -> Layer:
    return MaxPool(each(draw, shape, 2, 3), each(draw, shape, 2, 1), padding=1, ceil=draw(st.booleans()))


def avg_pool(draw: Draw, shape: Shape) -> Layer:
    return AvgPool(each(draw, shape, 2, 3), each(draw, shape, 2, 1), 1, draw(st.booleans()), draw(st.booleans()))


def norm(draw: Draw, shape: Shape) -> Layer:
    groups = some_of(draw, *[g for g in (1, 2, 3, 4) if shape[-1] % g == 0])
    return some_of(
        draw,
        BatchNorm(EPS),
        BatchNorm(EPS, groups=whole(draw, 1, shape[0])),
        GroupNorm(groups, EPS),
        InstanceNorm(EPS),
        LayerNorm(whole(draw, 1, len(shape) - 1), EPS),
    )


def activation(draw: Draw, shape: Shape) -> Layer:
    return some_of(draw, ReLU(), LeakyReLU(0.1), GELU(), SiLU(), Tanh(), Softplus(), Softmax())


def upsample(draw: Draw, shape: Shape) -> Layer:
    return Upsample(each(draw, shape, 2, 1), some_of(draw, "nearest", "linear"))


def dropout(draw: Draw, shape: Shape) -> Layer:
    return Dropout(0.3, draw(st.booleans()))


def sliced(draw: Draw, shape: Shape) -> Layer:
    return Slice(whole(draw, 1, len(shape) - 1), whole(draw, 0, 1), None, some_of(draw, 1, 2, -1))


def reshaped(draw: Draw, shape: Shape) -> Layer:
    return Reshape(tuple(draw(st.permutations(shape[1:]))))


UNARY: dict[str, Callable[[Draw, Shape], Layer]] = {
    "conv": conv,
    "strided conv": conv,
    "transposed": transposed,
    "max pool": max_pool,
    "avg pool": avg_pool,
    "norm": norm,
    "activation": activation,
    "upsample": upsample,
    "dropout": dropout,
    "slice": sliced,
    "reshape": reshaped,
}


def head(draw: Draw, made: Network, x: str) -> None:
    """A loss at each position, or on a vector per sample."""
    kind, net, k = some_of(draw, *LOSSES), made.net, whole(draw, 2, 4)
    if kind in ("labels", "dice", "bce"):
        x = made.add(Conv(k, 1), x)
    elif kind.startswith("pooled"):
        x = made.add(Dense(k), made.add(GlobalAvgPool(), x))
    elif kind == "dense huber":
        x = made.add(Dense(k), made.add(Flatten(), x))
    shape, number = made.shape(x), len(net.nodes)
    integer = kind in ("labels", "dice", "pooled labels")
    target = net.input(f"y{number}", shape[:-1] if integer else shape, integer)
    loss: Loss = {
        "mse": MSE(),
        "labels": SoftmaxCrossEntropy(smoothing=0.1, ignore=0),
        "dice": Dice(background=draw(st.booleans()), ignore=some_of(draw, None, 1, 255)),
        "bce": BCEWithLogits(),
        "pooled labels": SoftmaxCrossEntropy(class_weights=(0.5, 2.0, 1.0, 3.0)[:k]),
        "dense huber": Huber(),
        "pooled mae": MAE(),
    }[kind]
    net.add(f"loss{number}", loss, x, target)


@pytest.mark.parallel([2, 3, 4, 6])
def test_random_networks_on_random_plans_equal_one_rank(
    comm: Any, seed: int, record_property: Callable[[str, object], None]
) -> None:
    kinds: Counter[str] = Counter()
    sizes: list[int] = []

    def note(case: Case) -> None:
        kinds.update(type(n.layer).__name__ for n in case.net)
        sizes.append(sum(not isinstance(n.layer, Input | Loss) for n in case.net))

    count = drive(comm, cases(networks(), comm.size), NETWORKS, seed, note)
    if comm.rank == 0:
        print(f"{count} networks of {min(sizes)} to {max(sizes)} layers on {comm.size} ranks: {dict(kinds)}")
        record_property("cases", ("random networks on random plans equal one rank", "networks", count))
        assert count >= 10
        assert min(sizes) >= 5
        assert max(sizes) <= 12
