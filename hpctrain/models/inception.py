"""Inception-v3 (Szegedy et al. 2016) without its auxiliary head, with the filters that are in common use."""

from __future__ import annotations

from dataclasses import replace

from hpctrain.graph import Graph
from hpctrain.layers import AvgPool, BatchNorm, Concat, Conv, Dense, Dropout, GlobalAvgPool, Layer, MaxPool, ReLU
from hpctrain.models import Sample, finish, scaled, start

Branch = tuple[Layer | tuple[Conv, Conv], ...]
"""Layers one after another; a pair at the end reads the same tensor, and both results are results of the branch."""


def build(batch: int, sample: Sample, dropout: float = 0.5, width: float = 1.0) -> Graph:
    """For images of at least 75 x 75; 23,834,568 parameters for 3 channels and 1000 classes (published size: 299).

    `width` scales all filters.
    """
    net, x = start(batch, sample)
    for name, layer in STEM.items():
        x = _add(net, name, layer, x, width)
    for block, branches in BLOCKS.items():
        ends: list[str] = []
        for branch, steps in branches.items():
            ends += _branch(net, f"{block}.{branch}", steps, x, width)
        x = net.add(f"{block}.concat", Concat(), *ends)
    x = net.add("average", GlobalAvgPool(), x)
    x = net.add("dropout", Dropout(dropout), x)
    x = net.add("fc", Dense(sample.outputs), x)
    return finish(net, x, sample)


def _branch(net: Graph, name: str, steps: Branch, x: str, width: float) -> list[str]:
    """Add a branch; returns its results."""
    for i, step in enumerate(steps, start=1):
        if isinstance(step, tuple):
            return [_add(net, f"{name}.{i}{letter}", conv, x, width) for letter, conv in zip("ab", step, strict=True)]
        x = _add(net, f"{name}.{i}", step, x, width)
    return [x]


def _add(net: Graph, name: str, layer: Layer, x: str, width: float) -> str:
    """Add a pooling, or a convolution with batch norm and ReLU."""
    if not isinstance(layer, Conv):
        return net.add(name, layer, x)
    x = net.add(f"{name}.conv", replace(layer, filters=scaled(layer.filters, width)), x)
    x = net.add(f"{name}.norm", BatchNorm(eps=0.001), x)
    return net.add(f"{name}.relu", ReLU(), x)


# --- the blocks -----------------------------------------------------------------------------------------------------


def _conv(filters: int, *kernel: int, stride: int = 1, same: bool = True) -> Conv:
    """A convolution with a kernel of odd sides, one number for a square; `same` keeps positions."""
    sides = kernel if len(kernel) > 1 else kernel * 2
    return Conv(filters, sides, stride, tuple(n // 2 for n in sides) if same else 0, bias=False)


def _halving(filters: int) -> Conv:
    return _conv(filters, 3, stride=2, same=False)


def _thin(pooled: int) -> dict[str, Branch]:
    """Figure 5 of the paper: 5x5 beside two 3x3."""
    return {
        "1x1": (_conv(64, 1),),
        "5x5": (_conv(48, 1), _conv(64, 5)),
        "3x3": (_conv(64, 1), _conv(96, 3), _conv(96, 3)),
        "pool": (AvgPool(3, stride=1, padding=1), _conv(pooled, 1)),
    }


def _factorized(inner: int) -> dict[str, Branch]:
    """Figure 6: 7x7 as 1x7 and 7x1."""
    return {
        "1x1": (_conv(192, 1),),
        "7x7": (_conv(inner, 1), _conv(inner, 1, 7), _conv(192, 7, 1)),
        "7x7twice": (
            _conv(inner, 1),
            _conv(inner, 7, 1),
            _conv(inner, 1, 7),
            _conv(inner, 7, 1),
            _conv(192, 1, 7),
        ),
        "pool": (AvgPool(3, stride=1, padding=1), _conv(192, 1)),
    }


def _wide() -> dict[str, Branch]:
    """Figure 7: 3x3 as 1x3 beside 3x1."""
    pair = (_conv(384, 1, 3), _conv(384, 3, 1))
    return {
        "1x1": (_conv(320, 1),),
        "3x3": (_conv(384, 1), pair),
        "3x3twice": (_conv(448, 1), _conv(384, 3), pair),
        "pool": (AvgPool(3, stride=1, padding=1), _conv(192, 1)),
    }


STEM: dict[str, Layer] = {
    "conv1a": _halving(32),
    "conv2a": _conv(32, 3, same=False),
    "conv2b": _conv(64, 3),
    "pool1": MaxPool(3, stride=2),
    "conv3b": _conv(80, 1),
    "conv4a": _conv(192, 3, same=False),
    "pool2": MaxPool(3, stride=2),
}

BLOCKS: dict[str, dict[str, Branch]] = {
    "mixed5b": _thin(32),
    "mixed5c": _thin(64),
    "mixed5d": _thin(64),
    "mixed6a": {
        "3x3": (_halving(384),),
        "3x3twice": (_conv(64, 1), _conv(96, 3), _halving(96)),
        "pool": (MaxPool(3, stride=2),),
    },
    "mixed6b": _factorized(128),
    "mixed6c": _factorized(160),
    "mixed6d": _factorized(160),
    "mixed6e": _factorized(192),
    "mixed7a": {
        "3x3": (_conv(192, 1), _halving(320)),
        "7x7": (_conv(192, 1), _conv(192, 1, 7), _conv(192, 7, 1), _halving(192)),
        "pool": (MaxPool(3, stride=2),),
    },
    "mixed7b": _wide(),
    "mixed7c": _wide(),
}
