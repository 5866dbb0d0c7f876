"""Shapes, sizes and costs of layers against published ones, and errors for what does not fit."""

from __future__ import annotations

from math import prod

import pytest
from networks import node

from hpctrain.errors import PlanError
from hpctrain.layers import (
    MSE,
    Add,
    BatchNorm,
    Conv,
    ConvTranspose,
    Dense,
    Flatten,
    GlobalAvgPool,
    Layer,
    MaxPool,
    ReLU,
    SoftmaxCrossEntropy,
)
from hpctrain.partition import Shape


def test_output_shapes_of_published_networks() -> None:
    image = (1, 224, 224, 3)
    assert Conv(64, kernel=7, stride=2, padding=3).output_shape(image) == (1, 112, 112, 64)  # ResNet, first layer
    assert MaxPool(3, stride=2, padding=1).output_shape((1, 112, 112, 64)) == (1, 56, 56, 64)  # and second
    assert Conv(96, kernel=11, stride=4).output_shape((1, 227, 227, 3)) == (1, 55, 55, 96)  # AlexNet
    assert MaxPool(3, stride=2).output_shape((1, 55, 55, 96)) == (1, 27, 27, 96)
    assert Conv(64, kernel=3, padding=1).output_shape(image) == (1, 224, 224, 64)  # VGG
    assert Conv(32, kernel=3, dilation=4, padding=4).output_shape((2, 33, 31, 8)) == (2, 33, 31, 32)
    assert GlobalAvgPool().output_shape((2, 7, 7, 2048)) == (2, 2048)
    assert Flatten().output_shape((2, 5, 5, 16)) == (2, 400)


def test_parameters_of_published_layers() -> None:
    def count(layer: Layer, shape: Shape) -> int:
        return sum(prod(weight.shape) for weight in layer.weights(shape).values())

    assert count(Conv(6, kernel=5, padding=2), (1, 28, 28, 1)) == 156  # LeNet-5, C1
    assert count(Conv(16, kernel=5), (1, 14, 14, 6)) == 2416  # C3, fully connected
    assert count(Dense(120), (1, 400)) == 48_120
    assert count(Conv(96, kernel=11, stride=4), (1, 227, 227, 3)) == 34_944  # AlexNet
    assert count(Conv(64, kernel=7, bias=False), (1, 224, 224, 3)) == 9408  # ResNet
    assert count(BatchNorm(), (1, 112, 112, 64)) == 128
    assert count(MaxPool(2), (1, 4, 4, 3)) == count(ReLU(), (1, 4)) == count(Flatten(), (1, 4, 4, 3)) == 0


def test_weights_keep_the_variance_through_relu_and_decay_alone() -> None:
    """He et al. 2015: variance 2 / fan-in. Biases and norms start neutral and do not decay."""
    conv, dense = Conv(5, kernel=(3, 2)).weights((1, 9, 9, 7)), Dense(5).weights((1, 11))
    assert conv["weight"].init == ("normal", pytest.approx((2 / 42) ** 0.5, rel=1e-15))
    assert dense["weight"].init == ("normal", pytest.approx((2 / 11) ** 0.5, rel=1e-15))
    norm = BatchNorm()
    assert [w.init for w in norm.weights((1, 3)).values()] == [("constant", 1.0), ("constant", 0.0)]
    assert [w.init for w in norm.state((1, 3)).values()] == [("constant", 0.0), ("constant", 1.0)]
    assert conv["weight"].decay
    assert dense["weight"].decay
    assert not any(w.decay for w in (conv["bias"], dense["bias"], *norm.weights((1, 3)).values()))


def test_flops_count_every_multiplication_and_addition() -> None:
    assert Conv(6, kernel=5, padding=2).flops((1, 28, 28, 1)) == 2 * 28 * 28 * 6 * 25  # LeNet-5, C1
    assert Conv(4, kernel=3).flops((2, 5, 5, 3)) == 2 * (2 * 3 * 3 * 4) * (9 * 3)
    assert Dense(5).flops((3, 7)) == 2 * 3 * 7 * 5
    assert MaxPool(2).flops((3, 4, 6, 5)) == 3 * 2 * 3 * 5 * 4


@pytest.mark.parametrize(
    ("layer", "shapes", "message"),
    [
        (Conv(3, kernel=7), [(2, 5, 9, 1)], r"height: a window of 7 does not fit an input of 5 with padding 0.*2 more"),
        (Conv(3, kernel=3, dilation=4), [(2, 9, 8, 1)], r"width: a window of 9 does not fit an input of 8"),
        (Conv(3, kernel=(3, 3)), [(2, 5, 5, 5, 1)], r"kernel = \(3, 3\) has 2 numbers, but the input has 3"),
        (Conv(3, kernel=3, stride=0), [(2, 5, 5, 1)], r"stride=0.*at least 1"),
        (Conv(3, kernel=3, padding=-1), [(2, 5, 5, 1)], r"before=-1.*at least 0"),
        (Conv(3, kernel=3, padding=(1, 1, 1)), [(2, 5, 5, 1)], r"padding = \(1, 1, 1\) has 3 entries, but .* 2 pos"),
        (Conv(3, kernel=3, border="mirror"), [(2, 5, 5, 1)], r"border = 'mirror'; give one of zero, periodic, reflect"),
        (Conv(3, kernel=9, padding=4, border="reflect"), [(2, 4, 9, 1)], r"padding 4 and 4 of an input of 4, which"),
        (Conv(4, kernel=3, groups=2), [(2, 5, 5, 3)], r"groups = 2 must divide both the 3 channels and the 4 filters"),
        (Conv(4, kernel=3, groups=0), [(2, 5, 5, 3)], r"groups = 0; give 1 or more"),
        (ConvTranspose(4, kernel=3, stride=2, output_padding=2), [(2, 5, 5, 3)], r"output_padding = 2; .* less than"),
        (ConvTranspose(4, kernel=3, padding=2), [(2, 2, 5, 3)], r"padding 2 and 2 leaves nothing of an output of 4"),
        (ConvTranspose(4, kernel=3), [(2, 3)], r"a transposed convolution needs positions, but \(2, 3\) has none"),
        (MaxPool(2, padding=2), [(2, 5, 5, 1)], r"padding 2 and 2; give at most half of the window, 1"),
        (Dense(3), [(2, 5, 5, 1)], r"\(2, 5, 5, 1\) has 4 dims, not \(N, C\); put a Flatten before it"),
        (Add(), [(2, 3), (2, 4)], r"\(2, 3\), \(2, 4\); give two or more of the same shape"),
        (Add(), [(2, 3)], r"1 inputs; give 2 or more"),
        (MSE(), [(2, 3), (2, 4)], r"predictions \(2, 3\) and targets \(2, 4\)"),
        (SoftmaxCrossEntropy(), [(2, 3), (3,)], r"logits \(2, 3\) and labels \(3,\); it takes"),
        (Conv(0, kernel=3), [(2, 5, 5, 1)], r"filters"),
        (Dense(0), [(2, 5)], r"units"),
        (Conv(3, kernel=3), [(2, 5)], r"\(2, 5\)"),
        (MaxPool(2), [(2, 5)], r"\(2, 5\)"),
        (Conv(3, kernel=3), [(2, 5, 5, 1), (2, 5, 5, 1)], r""),
    ],
    ids=lambda value: str(value) if isinstance(value, Layer) else "",
)
def test_what_does_not_fit_names_layer_numbers_and_remedy(layer: Layer, shapes: list[Shape], message: str) -> None:
    with pytest.raises(PlanError, match=rf"layer layer \(input .*\): .*{message}"):
        node(layer, *shapes)
