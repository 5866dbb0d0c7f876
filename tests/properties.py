"""Random layers with the input shapes they take: a strategy for each kind, for every sort of geometry, mostly small.

Starts no MPI: the serial comparison with PyTorch draws from here too.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from geometry import Draw, Drawn, conv, number, pool, some_of, tensor, transposed, whole
from hypothesis import assume
from hypothesis import strategies as st

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
    InstanceNorm,
    Layer,
    LayerNorm,
    LeakyReLU,
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

# --- positions ----------------------------------------------------------------------------------------------------


@st.composite
def with_positions(draw: Draw, layer: Callable[[], Layer]) -> Drawn:
    """A layer without numbers."""
    return layer(), (tensor(draw, 1),)


@st.composite
def adaptive(draw: Draw) -> Drawn:
    """More windows than elements too."""
    shape = tensor(draw, 1)
    return AdaptiveAvgPool(number(tuple(whole(draw, 1, 7) for _ in shape[1:-1]))), (shape,)


@st.composite
def upsample(draw: Draw, mode: str = "nearest") -> Drawn:
    """Scales of 1 to 3, each dim its own."""
    shape = tensor(draw, 1, channels=3)
    scale = number(tuple(whole(draw, 1, 3) for _ in shape[1:-1]))
    return Upsample(scale, mode, mode == "linear" and draw(st.booleans())), (shape,)


# --- any tensor ---------------------------------------------------------------------------------------------------


@st.composite
def pointwise(draw: Draw, layer: Callable[[], Layer]) -> Drawn:
    """A function of each element, or of each position's channels."""
    return layer(), (tensor(draw),)


@st.composite
def leaky(draw: Draw) -> Drawn:
    """Slopes that are not the default."""
    return LeakyReLU(some_of(draw, 0.01, 0.3)), (tensor(draw),)


@st.composite
def dropout(draw: Draw, whole_channels: bool = False) -> Drawn:
    """All rates but those that leave nothing."""
    return Dropout(some_of(draw, 0.5, 0.0, 0.3, 0.9), whole_channels), (tensor(draw, int(whole_channels)),)


@st.composite
def dense(draw: Draw) -> Drawn:
    """Vectors to vectors."""
    return Dense(whole(draw, 1, 9), draw(st.booleans())), ((whole(draw, 1, 7), whole(draw, 1, 9)),)


@st.composite
def joined(draw: Draw, layer: Callable[[], Layer]) -> Drawn:
    """Two to four tensors of one shape."""
    return layer(), (tensor(draw),) * whole(draw, 2, 4)


@st.composite
def concat(draw: Draw) -> Drawn:
    """Two to four tensors along any dim but the batch, which may be counted from the end."""
    shape = tensor(draw)
    dim = whole(draw, 1, len(shape) - 1)
    extents = [whole(draw, 1, 5) for _ in range(whole(draw, 2, 4))]
    shapes = tuple((*shape[:dim], n, *shape[dim + 1 :]) for n in extents)
    return Concat(some_of(draw, dim, dim - len(shape))), shapes


@st.composite
def sliced(draw: Draw) -> Drawn:
    """Steps in both directions; bounds from both ends, or none."""
    shape = tensor(draw)
    dim = whole(draw, 1, len(shape) - 1)
    n = shape[dim]
    step = some_of(draw, 1, 2, 3, -1, -2)
    start, stop = (draw(st.none() | st.integers(-n, n)) for _ in range(2))
    assume(range(n)[start:stop:step])
    return Slice(some_of(draw, dim, dim - len(shape)), start, stop, step), (shape,)


@st.composite
def reshaped(draw: Draw) -> Drawn:
    """The prime factors of a sample's extent, in order or not, dealt to one to four new dims."""
    shape = tensor(draw)
    dims = [1] * whole(draw, 1, 4)
    for n in shape[1:]:
        for prime in factors(n):
            dims[whole(draw, 0, len(dims) - 1)] *= prime
    left_out = some_of(draw, None, *range(len(dims)))
    return Reshape(tuple(-1 if i == left_out else n for i, n in enumerate(dims))), (shape,)


def factors(n: int) -> list[int]:
    """The prime factors of `n`, ascending."""
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


# --- norms --------------------------------------------------------------------------------------------------------

EPS = (1e-5, 1e-3, 0.1)


@st.composite
def batch_norm(draw: Draw, grouped: bool = False) -> Drawn:
    """Groups that are no blocks of any plan."""
    shape = tensor(draw)
    groups = whole(draw, 1, shape[0]) if grouped else 1
    return BatchNorm(some_of(draw, *EPS), some_of(draw, 0.1, 0.3), groups), (shape,)


@st.composite
def group_norm(draw: Draw) -> Drawn:
    """Groups of one channel, of some, of all."""
    shape, groups = tensor(draw), whole(draw, 1, 4)
    return GroupNorm(groups, some_of(draw, *EPS)), ((*shape[:-1], groups * whole(draw, 1, 3)),)


@st.composite
def instance_norm(draw: Draw) -> Drawn:
    """At least two positions."""
    shape = tensor(draw, 1)
    assume(prod(shape[1:-1]) > 1)
    return InstanceNorm(some_of(draw, *EPS), draw(st.booleans())), (shape,)


@st.composite
def layer_norm(draw: Draw) -> Drawn:
    """Over the channels, some of the positions, all but the batch."""
    shape = tensor(draw)
    return LayerNorm(whole(draw, 1, len(shape) - 1), some_of(draw, *EPS)), (shape,)


# --- losses -------------------------------------------------------------------------------------------------------


@st.composite
def cross_entropy(draw: Draw, least: int = 0) -> Drawn:
    """One label per sample, or with `least` per position; ignored labels are classes or none."""
    shape = (*tensor(draw, least)[:-1], whole(draw, 1, 6)) if least else (whole(draw, 1, 9), whole(draw, 1, 6))
    weights = draw(st.none() | st.tuples(*(st.sampled_from([1.0, 0.25, 2.0, 0.0]) for _ in range(shape[-1]))))
    ignore = some_of(draw, None, 0, 255, -100)
    return SoftmaxCrossEntropy(some_of(draw, 0.0, 0.1, 1.0), weights, ignore), (shape, shape[:-1])


@st.composite
def elementwise_loss(draw: Draw, layer: Callable[..., Layer]) -> Drawn:
    """Predictions and targets of one shape."""
    return layer(), (tensor(draw),) * 2


@st.composite
def huber(draw: Draw) -> Drawn:
    """Distances on both sides of delta."""
    return Huber(some_of(draw, 1.0, 0.3)), (tensor(draw),) * 2


@st.composite
def dice(draw: Draw, labels: bool = True) -> Drawn:
    """Labels, some ignored, or targets of each class."""
    background = draw(st.booleans())
    shape = tensor(draw)
    shape = (*shape[:-1], max(shape[-1], 1 if background else 2))
    ignore = some_of(draw, None, 0, 255, -100) if labels else None
    return Dice(some_of(draw, 1.0, 1e-2), background, ignore), (shape, shape[:-1] if labels else shape)


# --- all of them --------------------------------------------------------------------------------------------------

GEOMETRIES: dict[str, tuple[type[Layer], st.SearchStrategy[Drawn]]] = {
    "conv": (Conv, conv()),
    "conv, periodic": (Conv, conv("periodic")),
    "conv, reflect": (Conv, conv("reflect")),
    "conv, groups": (Conv, conv(grouped="groups")),
    "conv, depthwise": (Conv, conv(grouped="depthwise")),
    "conv, periodic, groups": (Conv, conv("periodic", "groups")),
    "transposed conv": (ConvTranspose, transposed()),
    "transposed conv, groups": (ConvTranspose, transposed("groups")),
    "max pool": (MaxPool, pool()),
    "avg pool": (AvgPool, pool(average=True)),
    "global avg pool": (GlobalAvgPool, with_positions(GlobalAvgPool)),
    "adaptive avg pool": (AdaptiveAvgPool, adaptive()),
    "upsample, nearest": (Upsample, upsample()),
    "upsample, linear": (Upsample, upsample("linear")),
    "dense": (Dense, dense()),
    "flatten": (Flatten, pointwise(Flatten)),
    "reshape": (Reshape, reshaped()),
    "slice": (Slice, sliced()),
    "add": (Add, joined(Add)),
    "multiply": (Multiply, joined(Multiply)),
    "concat": (Concat, concat()),
    "relu": (ReLU, pointwise(ReLU)),
    "leaky relu": (LeakyReLU, leaky()),
    "gelu": (GELU, pointwise(GELU)),
    "silu": (SiLU, pointwise(SiLU)),
    "sigmoid": (Sigmoid, pointwise(Sigmoid)),
    "tanh": (Tanh, pointwise(Tanh)),
    "softplus": (Softplus, pointwise(Softplus)),
    "softmax": (Softmax, pointwise(Softmax)),
    "dropout": (Dropout, dropout()),
    "dropout of channels": (Dropout, dropout(whole_channels=True)),
    "batch norm": (BatchNorm, batch_norm()),
    "batch norm, groups": (BatchNorm, batch_norm(grouped=True)),
    "group norm": (GroupNorm, group_norm()),
    "instance norm": (InstanceNorm, instance_norm()),
    "layer norm": (LayerNorm, layer_norm()),
    "softmax cross-entropy": (SoftmaxCrossEntropy, cross_entropy()),
    "softmax cross-entropy, positions": (SoftmaxCrossEntropy, cross_entropy(least=1)),
    "mse": (MSE, elementwise_loss(MSE)),
    "mae": (MAE, elementwise_loss(MAE)),
    "huber": (Huber, huber()),
    "bce with logits": (BCEWithLogits, elementwise_loss(BCEWithLogits)),
    "dice of labels": (Dice, dice()),
    "dice of targets": (Dice, dice(labels=False)),
}
"""Kind -> the layer it is about, and how to draw it."""
