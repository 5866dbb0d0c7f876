"""Small networks around one layer each, and plans to run them on: what the tests of the core share. Starts no MPI."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from math import prod

import numpy as np

from hpctrain.graph import Graph, Node
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
from hpctrain.models import Sample, cosmoflow, lenet, mlp
from hpctrain.partition import AXES, Partition, Shape
from hpctrain.planner.plan import Plan, extents

ONE = Partition()

ALLREDUCES = (
    *("ring", "segmented_ring", "recursive_doubling", "halving_doubling"),
    *("binary_blocks", "tree", "hierarchical", "two_dimensional", "mpi"),
)
"""Those that every machine with MPI can run."""


# --- networks -----------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[Shape, Layer]] = {
    "conv2d": ((3, 7, 5, 4), Conv(5, kernel=3, padding=1)),
    "conv2d strided, dilated": ((3, 9, 7, 3), Conv(4, kernel=(3, 2), stride=(2, 3), padding=(2, 1), dilation=(1, 2))),
    "conv2d kernel < stride": ((2, 9, 8, 3), Conv(3, kernel=(2, 1), stride=(3, 2), bias=False)),
    "conv2d padding > kernel": ((2, 3, 5, 2), Conv(3, kernel=2, padding=(4, 1))),
    "conv2d even kernel, asymmetric": ((2, 7, 5, 3), Conv(4, kernel=(2, 4), padding=((1, 0), (2, 1)))),
    "conv2d periodic": ((2, 5, 7, 3), Conv(3, kernel=(3, 4), stride=(1, 2), padding=((1, 2), 2), border="periodic")),
    "conv2d periodic, past the domain": ((2, 3, 1, 2), Conv(3, kernel=3, padding=((4, 5), 2), border="periodic")),
    "conv2d reflect": ((2, 5, 7, 3), Conv(3, kernel=(5, 3), stride=(2, 1), padding=(2, (6, 1)), border="reflect")),
    "conv2d groups": ((2, 5, 3, 6), Conv(9, kernel=(3, 2), padding=1, groups=3)),
    "conv2d depthwise": ((2, 5, 3, 5), Conv(10, kernel=3, padding=1, groups=5)),
    "conv3d": ((2, 5, 4, 3, 3), Conv(4, kernel=3, padding=1)),
    "conv3d reflect, groups": (
        (2, 4, 3, 5, 4),
        Conv(6, kernel=(3, 1, 3), padding=(1, 0, 2), groups=2, border="reflect"),
    ),
    "conv3d strided": ((2, 7, 5, 4, 2), Conv(3, kernel=(3, 2, 1), stride=(2, 2, 1), padding=(1, 1, 0))),
    "transposed 2d": ((2, 4, 3, 3), ConvTranspose(5, kernel=2, stride=2)),
    "transposed 2d overlapping": (
        (2, 5, 3, 4),
        ConvTranspose(3, kernel=(5, 4), stride=(2, 3), padding=((1, 2), (0, 1)), output_padding=(1, 2)),
    ),
    "transposed 2d kernel < stride": ((2, 3, 4, 4), ConvTranspose(6, kernel=(1, 2), stride=(3, 4), groups=2)),
    "transposed 2d dilated": ((2, 4, 3, 3), ConvTranspose(2, kernel=(3, 2), stride=2, dilation=(1, 3), padding=1)),
    "transposed 3d": ((2, 3, 2, 3, 2), ConvTranspose(3, kernel=(3, 2, 1), stride=(2, 1, 2), bias=False)),
    "max pool ceil, dilated": ((2, 7, 6, 3), MaxPool((3, 2), stride=(2, 3), padding=1, dilation=(2, 1), ceil=True)),
    "avg pool ceil": ((2, 7, 6, 3), AvgPool(3, stride=2, padding=1, ceil=True)),
    "avg pool ceil, padding not counted": (
        (2, 8, 6, 2),
        AvgPool((3, 4), stride=(2, 3), padding=((1, 0), 2), ceil=True, count_padding=False),
    ),
    "max pool 2d": ((3, 7, 6, 3), MaxPool(3, stride=2, padding=1)),
    "max pool 3d": ((2, 5, 7, 4, 3), MaxPool(2)),
    "avg pool 2d": ((3, 7, 5, 3), AvgPool(3, stride=2, padding=1, count_padding=False)),
    "avg pool 3d": ((2, 5, 4, 5, 3), AvgPool((2, 3, 2), stride=1, padding=(1, 1, 0))),
    "global pool 2d": ((3, 5, 7, 4), GlobalAvgPool()),
    "global pool 3d": ((2, 5, 3, 4, 3), GlobalAvgPool()),
    "dense": ((5, 7), Dense(5)),
    "dense without bias": ((3, 5), Dense(9, bias=False)),
    "relu": ((3, 5, 4, 3), ReLU()),
    "batch norm": ((3, 5, 4, 3), BatchNorm()),
    "batch norm 3d": ((2, 3, 5, 3, 4), BatchNorm()),
    "batch norm of vectors": ((7, 5), BatchNorm(eps=1e-3, momentum=0.3)),
    "batch norm in groups": ((5, 3, 5, 3), BatchNorm(groups=3)),
    "group norm": ((3, 5, 4, 6), GroupNorm(3)),
    "group norm 3d": ((2, 3, 4, 3, 6), GroupNorm(2, eps=1e-3)),
    "group norm of vectors": ((5, 6), GroupNorm(2)),
    "instance norm": ((3, 5, 4, 3), InstanceNorm()),
    "instance norm without weights": ((2, 3, 4, 5, 3), InstanceNorm(affine=False)),
    "layer norm": ((3, 5, 4, 3), LayerNorm()),
    "layer norm of rows": ((3, 5, 4, 3), LayerNorm(dims=2)),
    "layer norm of volumes": ((2, 3, 4, 3, 5), LayerNorm(dims=4, eps=1e-3)),
    "flatten": ((3, 5, 3, 3), Flatten()),
    "flatten 3d": ((2, 3, 5, 2, 3), Flatten()),
    "reshape that joins": ((3, 5, 3, 4), Reshape((15, 4))),
    "reshape that splits": ((2, 15, 4), Reshape((-1, 3, 4))),
    "reshape of vectors": ((3, 30), Reshape((5, 3, 2))),
    "reshape across": ((2, 6, 4, 3), Reshape((8, 3, 3))),
    "slice of rows": ((3, 7, 5, 3), Slice(1, 1, None, 2)),
    "slice of channels": ((3, 5, 7), Slice(-1, -5, -1)),
    "slice backwards": ((2, 5, 4, 3, 3), Slice(3, None, 0, -1)),
    "leaky relu": ((3, 5, 4, 3), LeakyReLU(0.1)),
    "gelu": ((5, 7), GELU()),
    "silu": ((3, 5, 3), SiLU()),
    "sigmoid": ((5, 7), Sigmoid()),
    "tanh": ((5, 7), Tanh()),
    "softplus": ((5, 7), Softplus()),
    "softmax": ((3, 5, 3, 4), Softmax()),
    "dropout": ((3, 5, 4, 3), Dropout(0.4)),
    "dropout of channels": ((3, 5, 4, 7), Dropout(whole_channels=True)),
    "adaptive pool 2d": ((2, 7, 5, 3), AdaptiveAvgPool((3, 4))),
    "adaptive pool 3d": ((2, 5, 3, 4, 2), AdaptiveAvgPool((2, 5, 4))),
    "upsample nearest": ((2, 5, 3, 3), Upsample((2, 3))),
    "upsample linear": ((2, 3, 5, 2), Upsample((3, 2), "linear")),
    "upsample linear 3d, corners": ((2, 3, 1, 3, 2), Upsample((2, 3, 1), "linear", align_corners=True)),
    "softmax cross-entropy": ((5, 7), SoftmaxCrossEntropy()),
    "softmax cross-entropy 3d": (
        (2, 3, 5, 3, 4),
        SoftmaxCrossEntropy(smoothing=0.2, class_weights=(0.5, 2.0, 1.0, 0.3), ignore=2),
    ),
    "mse": ((7, 3), MSE()),
    "mse 2d": ((3, 5, 4, 3), MSE()),
    "mae": ((7, 3), MAE()),
    "huber 2d": ((3, 5, 3, 2), Huber(delta=0.4)),
    "bce 3d": ((2, 5, 3, 4, 3), BCEWithLogits()),
    "dice 2d": ((3, 5, 4, 3), Dice()),
    "dice 2d, one label ignored": ((3, 5, 4, 3), Dice(ignore=1)),
    "dice 3d without background": ((2, 3, 5, 4, 3), Dice(smooth=0.1, background=False)),
}
"""Input shape and layer; odd sizes, so that no axis cuts into equal blocks by luck."""

MERGES: dict[str, tuple[tuple[Shape, ...], Layer]] = {
    "multiply": (((3, 5, 4, 3),) * 3, Multiply()),
    "concat": (((3, 5, 4, 2), (3, 5, 4, 1), (3, 5, 4, 4)), Concat()),
    "concat of rows": (((2, 3, 5, 2), (2, 4, 5, 2)), Concat(1)),
}
"""Input shapes and layer."""

CASES = (*LAYERS, *MERGES, "add")


def network(case: str) -> Graph:
    """x -> a trained layer "pre" -> "layer", the one under test -> flattened -> loss."""
    if case in MERGES:
        return merged(*MERGES[case])
    return sandwich(*LAYERS[case]) if case in LAYERS else added()


def sandwich(shape: Shape, layer: Layer) -> Graph:
    """The layer before makes the input gradient of `layer` visible, the loss gives each of its outputs its own."""
    net = Graph()
    x = net.add("pre", mixing(shape), net.input("x", shape))
    if isinstance(layer, Loss):
        labels = takes_labels(layer)
        net.add("layer", layer, x, net.input("y", shape[:-1] if labels else shape, integer=labels))
        return net
    return with_loss(net, net.add("layer", layer, x))


def takes_labels(layer: Layer) -> bool:
    """Whether a loss is given integer labels here; Dice takes either."""
    return isinstance(layer, SoftmaxCrossEntropy | Dice)


def merged(shapes: tuple[Shape, ...], layer: Layer) -> Graph:
    """A layer with several inputs, a trained layer before each: the first is "pre"."""
    net = Graph()
    branches = [
        net.add("pre" if i == 0 else f"pre{i}", mixing(shape), net.input(f"x{i}", shape))
        for i, shape in enumerate(shapes)
    ]
    return with_loss(net, net.add("layer", layer, *branches))


def added() -> Graph:
    """Two branches and one of them once more."""
    shape, net = (3, 5, 4, 3), Graph()
    x = net.input("x", shape)
    a, b = net.add("pre", mixing(shape), x), net.add("other", mixing(shape), x)
    return with_loss(net, net.add("layer", Add(), a, b, a))


def mixing(shape: Shape) -> Layer:
    """A trained layer that keeps `shape`."""
    return Dense(shape[-1]) if len(shape) == 2 else Conv(shape[-1], kernel=1)


def with_loss(net: Graph, x: str) -> Graph:
    """Add a mean squared error over all that `x` holds."""
    if len(net[x].shape) > 2:
        x = net.add("flat", Flatten(), x)
    net.add("loss", MSE(), x, net.input("y", net[x].shape))
    return net


def residual() -> Graph:
    """A tensor that three layers read, and one that a layer reads twice."""
    net = Graph()
    x = net.add("stem", Conv(3, kernel=3, stride=2, padding=1), net.input("x", (3, 9, 7, 2)))
    deep = net.add("norm", BatchNorm(), net.add("conv", Conv(3, kernel=3, padding=1, bias=False), x))
    both = net.add("add", Add(), deep, net.add("side", Conv(3, kernel=1), x), x)
    pooled = net.add("pool", GlobalAvgPool(), net.add("relu", ReLU(), net.add("twice", Add(), both, both)))
    net.add("loss", MSE(), net.add("fc", Dense(5), pooled), net.input("y", (3, 5)))
    return net


def several_losses() -> Graph:
    """Two inputs of numbers and one of labels; losses of positions, of segmentations, and of one branch by another."""
    net = Graph()
    x = net.add("stem", Conv(6, kernel=3, padding=1), net.input("x", (3, 7, 5, 2)))
    x = net.add("relu", ReLU(), net.add("norm", GroupNorm(2), x))
    logits, labels = net.add("logits", Conv(4, kernel=1), x), net.input("y", (3, 7, 5), integer=True)
    net.add("entropy", SoftmaxCrossEntropy(ignore=1), logits, labels)
    net.add("dice", Dice(background=False), logits, labels)
    pooled = net.add("fc", Dense(5), net.add("pool", GlobalAvgPool(), x))
    net.add("huber", Huber(), pooled, net.add("teacher", Dense(5), net.input("z", (3, 4))))
    return net


NETWORKS = {
    "residual": residual,
    "several losses": several_losses,
    "lenet": lambda: lenet.build(5, Sample((13, 15, 1), classes=7)),
    "cosmoflow": lambda: cosmoflow.build(3, Sample((9, 7, 11, 2), values=3), filters=3, hidden=7),
    "cosmoflow, two levels": lambda: cosmoflow.build(2, Sample((16, 17, 9, 1), values=2), filters=2, norm=False),
    "mlp": lambda: mlp.build(7, Sample((5, 3), classes=4), hidden=(9, 5)),
}


def node(layer: Layer, *shapes: Shape) -> Node:
    """`layer` as the node "layer" of a graph whose inputs have these shapes."""
    net = Graph()
    kinds = layer.labels(*shapes) if len(shapes) in layer.inputs else ()
    inputs = [net.input(f"in{i}", shape, integer=any(kinds[i : i + 1])) for i, shape in enumerate(shapes)]
    return net[net.add("layer", layer, *inputs)]


# --- plans --------------------------------------------------------------------------------------------------------


def partitions(limits: Mapping[str, int], sizes: Iterable[int], most_axes: int = 2) -> Iterator[Partition]:
    """Every partition with a size among `sizes` that cuts at most `most_axes` of the axes in `limits`, in one order.

    Blocks of batch and positions may be empty; more blocks of channels than channels have tests of their own.
    """
    sizes = set(sizes)
    axes = [axis for axis in AXES if axis in limits]
    for chosen in (found for count in range(most_axes + 1) for found in combinations(axes, count)):
        for parts in product(range(2, max(sizes) + 1), repeat=len(chosen)):
            fits = all(n <= limits[axis] or axis in AXES[:4] for axis, n in zip(chosen, parts, strict=True))
            if fits and prod(parts) in sizes:
                yield Partition.of(dict(zip(chosen, parts, strict=True)))


def single(net: Graph) -> Plan:
    """Everything on rank 0."""
    return Plan({n.name: ONE for n in net})


def with_partitions(
    net: Graph, given: Mapping[str, Partition], other: Partition = ONE, empty_blocks: bool = True
) -> Plan:
    """`given`, and for all layers not named what they can use of `other`."""
    found = dict(given)
    for n in net:
        usable = {axis: parts for axis, parts in other.parts().items() if axis in extents(n)}
        found.setdefault(n.name, Partition.of(usable))
    return Plan(found, empty_blocks=empty_blocks)


def random_plan(rng: np.random.Generator, net: Graph, ranks: int) -> Plan:
    """A partition of its own for every layer, cutting up to three axes; most use all ranks, some leave ranks idle."""
    found = {}
    for n in net:
        sizes = [ranks] if rng.random() < 0.7 else range(1, ranks + 1)
        able = list(partitions(extents(n), sizes, most_axes=3)) or [ONE]
        found[n.name] = able[rng.integers(len(able))]
    return Plan(found, allreduce=str(rng.choice(ALLREDUCES)), empty_blocks=True)


def random_partition(rng: np.random.Generator, ranks: int) -> Partition:
    """Any partition of at most `ranks` blocks, over up to three axes."""
    found, left = {}, ranks
    for axis in rng.permutation(AXES)[:3].tolist():
        found[axis] = int(rng.integers(1, left + 1))
        left //= found[axis]
    return Partition.of(found)


# --- data ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """All that goes into a few training steps: global arrays, the same on every rank."""

    inputs: dict[str, np.ndarray]
    """(steps, *shape) by input."""
    weights: dict[str, np.ndarray]
    """Initial values by parameter; no bias is 0 and no gamma 1."""
    counts: np.ndarray
    """(batch,): how much each sample counts."""


def draw(net: Graph, seed: int, steps: int = 2) -> Data:
    """Data of order 1 for `net`; labels are classes of the predictions that they are compared with."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for n in net:
        if isinstance(n.layer, Input):
            shape = (steps, *n.shape)
            classes = min((net[user.inputs[0]].shape[-1] for user, _ in net.consumers(n.name)), default=0)
            inputs[n.name] = rng.integers(0, classes, shape) if n.layer.integer else rng.normal(size=shape)
    batch = net.losses[0].shape[0]
    weights = {}
    for n, name, weight in net.weights():
        kind, scale = weight.init
        values = rng.normal(size=weight.shape)
        weights[f"{n.name}.{name}"] = scale * values if kind == "normal" else scale + 0.3 * values
    return Data(inputs, weights, rng.uniform(0.2, 1.5, batch) / batch)
