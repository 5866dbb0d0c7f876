"""Activations and losses of one element in NumPy, with their derivatives: no overflow, and right limits at infinity."""

from __future__ import annotations

from math import erfc, pi, sqrt

import numpy as np

from hpctrain.backends.base import ACTIVATIONS, POINTWISE_LOSSES, Floats

_erfc = np.frompyfunc(erfc, 1, 1)  # NumPy has none

FAR = 800.0
"""exp(-FAR) is 0 in every float type up to float64: from here on, functions that decay are replaced by their limit."""


def activation(kind: str, x: Floats, slope: float) -> Floats:
    """f(x) for f named by `kind`, one of ACTIVATIONS. Raises ValueError on another."""
    match kind:
        case "leaky_relu":
            return np.where(x > 0, x, x * x.dtype.type(slope))
        case "gelu":
            return np.maximum(x, -FAR) * _normal_distribution(x)
        case "silu":
            return np.maximum(x, -FAR) * _sigmoid(x)
        case "sigmoid":
            return _sigmoid(x)
        case "tanh":
            return np.tanh(x)
        case "softplus":
            return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    raise ValueError(f"activation {kind!r} does not exist; choose one of {', '.join(ACTIVATIONS)}")


def activation_slope(kind: str, x: Floats, slope: float) -> Floats:
    """f'(x) for f named by `kind`, one of ACTIVATIONS. Raises ValueError on another."""
    near = np.clip(x, -FAR, FAR)
    match kind:
        case "leaky_relu":
            return np.where(x > 0, x.dtype.type(1), x.dtype.type(slope))
        case "gelu":
            density = np.exp(-0.5 * np.square(near)) / x.dtype.type(sqrt(2 * pi))
            return _normal_distribution(x) + near * density
        case "silu":
            return _sigmoid(x) + near * _sigmoid_slope(x)
        case "sigmoid":
            return _sigmoid_slope(x)
        case "tanh":
            return 4 * _sigmoid_slope(2 * near)
        case "softplus":
            return _sigmoid(x)
    raise ValueError(f"activation {kind!r} does not exist; choose one of {', '.join(ACTIVATIONS)}")


def loss(kind: str, x: Floats, target: Floats, delta: float) -> Floats:
    """f(x, target) for f named by `kind`, one of POINTWISE_LOSSES. Raises ValueError on another."""
    match kind:
        case "squared":
            return np.square(x - target)
        case "absolute":
            return np.abs(x - target)
        case "huber":
            distance = np.abs(x - target)
            square = np.minimum(distance, x.dtype.type(delta))  # the part that is not in the linear range
            return square * (distance - square / 2)
        case "logistic":
            # small terms last: those of a right and certain prediction would be lost beside x
            return (np.maximum(x, 0) - target * x) + np.log1p(np.exp(-np.abs(x)))
    raise ValueError(f"loss {kind!r} does not exist; choose one of {', '.join(POINTWISE_LOSSES)}")


def loss_slope(kind: str, x: Floats, target: Floats, delta: float) -> Floats:
    """The derivative by x of `loss`. Raises ValueError on another kind."""
    match kind:
        case "squared":
            return 2 * (x - target)
        case "absolute":
            return np.sign(x - target)
        case "huber":
            return np.clip(x - target, -x.dtype.type(delta), x.dtype.type(delta))
        case "logistic":
            return _sigmoid(x) - target
    raise ValueError(f"loss {kind!r} does not exist; choose one of {', '.join(POINTWISE_LOSSES)}")


def _normal_distribution(x: Floats) -> Floats:
    # of the complement, which keeps its relative accuracy far below 0
    return np.asarray(0.5 * _erfc(x.astype(np.float64) * -sqrt(0.5)), x.dtype)


def _sigmoid(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))
    return np.where(x > 0, 1, small) / (1 + small)


def _sigmoid_slope(x: Floats) -> Floats:
    small = np.exp(-np.abs(x))
    return small / np.square(1 + small)
