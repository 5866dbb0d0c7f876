"""After the first step no op allocates arrays that grow with tensors or weights, on the compiled backend."""

from __future__ import annotations

import os

import numpy as np
import pytest
from allocations import bound, largest_bytes, peak

from hpctrain import backends, layers
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
from hpctrain.partition import Shape

pytestmark = pytest.mark.skipif(
    os.environ.get("HPCTRAIN_NATIVE") == "0", reason="HPCTRAIN_NATIVE=0: installed without compiled kernels"
)

IMAGES, VOLUMES, VOXELS = (3, 95, 97, 32), (2, 31, 29, 33, 16), (2, 61, 59, 63, 4)
TWICE, LABELLED = (VOLUMES, VOLUMES), (VOXELS, VOXELS[:-1])

CASES: list[tuple[Layer, tuple[Shape, ...]]] = [
    (Conv(16, kernel=3, padding=1), (IMAGES,)),
    (Conv(8, kernel=3, stride=2, padding=1, groups=4), (VOLUMES,)),
    (ConvTranspose(16, kernel=2, stride=2), ((2, 15, 17, 15, 32),)),
    (ConvTranspose(12, kernel=3, stride=2, padding=1, groups=4), ((3, 47, 49, 32),)),
    (Dense(500), ((64, 3001),)),
    (MaxPool(2), (VOLUMES,)),
    (MaxPool(3, stride=2, padding=1), (IMAGES,)),
    (AvgPool(2), (VOLUMES,)),
    (AvgPool(3, stride=2, count_padding=False), (IMAGES,)),
    (GlobalAvgPool(), (VOLUMES,)),
    (AdaptiveAvgPool(7), (IMAGES,)),
    (Upsample(2), ((2, 16, 17, 15, 32),)),
    (Upsample(2, mode="linear"), ((2, 16, 17, 15, 32),)),
    (Add(), (*TWICE, VOLUMES)),
    (Multiply(), (*TWICE, VOLUMES)),
    (Concat(), TWICE),
    (Concat(1), TWICE),
    (Flatten(), (VOLUMES,)),
    (Reshape((31 * 29, 33, 16)), (VOLUMES,)),
    (Slice(1, 1, None, 2), (VOLUMES,)),
    (ReLU(), (VOLUMES,)),
    (LeakyReLU(), (VOLUMES,)),
    (GELU(), (VOLUMES,)),
    (SiLU(), (VOLUMES,)),
    (Sigmoid(), (VOLUMES,)),
    (Tanh(), (VOLUMES,)),
    (Softplus(), (VOLUMES,)),
    (Softmax(), (VOLUMES,)),
    (Dropout(), ((2, 63, 65, 64, 16),)),
    (Dropout(whole_channels=True), (VOLUMES,)),
    (BatchNorm(), (VOLUMES,)),
    (BatchNorm(groups=2), (VOLUMES,)),
    (GroupNorm(4), (VOLUMES,)),
    (InstanceNorm(), (VOLUMES,)),
    (InstanceNorm(affine=False), (IMAGES,)),
    (LayerNorm(), (VOLUMES,)),
    (LayerNorm(dims=2), (IMAGES,)),
    (LayerNorm(dims=4), (VOLUMES,)),
    (SoftmaxCrossEntropy(), LABELLED),
    (SoftmaxCrossEntropy(), ((640, 1001), (640,))),
    (SoftmaxCrossEntropy(smoothing=0.1, class_weights=(1.0, 2.0, 0.5, 1.0), ignore=3), LABELLED),
    (Dice(), LABELLED),
    (Dice(ignore=0, background=False), LABELLED),
    (Dice(), TWICE),
    (MSE(), TWICE),
    (MAE(), TWICE),
    (Huber(), TWICE),
    (BCEWithLogits(), TWICE),
]
"""Tensors of 2 to 33 MB, beside which statistics per sample and channel are small."""

SHARE, FIXED = 0.05, 2**18
"""Room for what does not grow, or hardly: a share of the largest tensor for statistics and slabs of random words, and
bytes for NumPy's casting buffers (8192 elements each) and Python's objects."""


def test_every_layer_is_there() -> None:
    kinds = {vars(layers)[name] for name in layers.__all__}
    concrete = {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Layer)}
    assert concrete - {Layer, layers.Loss, layers.Input} == {type(layer) for layer, _ in CASES}


@pytest.mark.parametrize(("layer", "shapes"), CASES, ids=[f"{layer}-{shapes[0]}" for layer, shapes in CASES])
def test_nothing_large_is_allocated_after_the_first_step(layer: Layer, shapes: tuple[Shape, ...]) -> None:
    _, forward, backward = bound(layer, shapes, backends.get("native"), np.dtype("float32"))
    for _ in range(2):
        forward(), backward()
    found, room = (
        {"forward": peak(forward), "backward": peak(backward)},
        SHARE * largest_bytes(layer, shapes, 4) + FIXED,
    )
    assert max(found.values()) < room, f"{found} bytes; at most {room:.0f}"


def test_what_an_allocation_looks_like() -> None:
    """Without a compiled kernel the same measurement finds temporaries: it does not look past them."""
    _, forward, _ = bound(Softmax(), (VOLUMES,), backends.get("reference"), np.dtype("float32"))
    forward()
    assert peak(forward) > 0.9 * largest_bytes(Softmax(), (VOLUMES,), 4)
