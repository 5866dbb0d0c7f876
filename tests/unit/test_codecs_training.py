"""Every codec trains: a small network on handwritten digits, over four simulated ranks, as well as without it."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from codec_cases import Together, make, parts_of, together
from sklearn.datasets import load_digits

from hpctrain.comm.codecs import TABLE

RANKS, EPOCHS, BATCH, LR, MOMENTUM = 4, 40, 128, 0.1, 0.9
SHAPES = {"hidden.weight": (64, 40), "hidden.bias": (40,), "out.weight": (40, 10), "out.bias": (10,)}
PARTS, SIZE = parts_of(SHAPES)
TRAIN = 1200
"""Samples; the other 597 are tested on."""


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 64) and labels, in random order."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return (found.data[order] / 16 - 0.3).astype(np.float32), found.target[order]


def forward(weights: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hidden layer and scores."""
    w1, b1, w2, b2 = (weights[part.where].reshape(part.shape) for part in PARTS)
    hidden = np.maximum(x @ w1 + b1, 0)
    return hidden, hidden @ w2 + b2


def backward(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Sum over the samples of the gradient of softmax and cross entropy, flat."""
    hidden, scores = forward(weights, x)
    slope = np.exp(scores - scores.max(axis=1, keepdims=True))
    slope /= slope.sum(axis=1, keepdims=True)
    slope[np.arange(len(y)), y] -= 1
    inner = slope @ weights[PARTS[2].where].reshape(40, 10).T * (hidden > 0)
    blocks = (x.T @ inner, inner.sum(axis=0), hidden.T @ slope, slope.sum(axis=0))
    return np.concatenate([block.reshape(-1) for block in blocks])


def start() -> np.ndarray:
    """Weights at first: uniform, as wide as inputs ask for."""
    rng = np.random.default_rng(1)
    weights = np.zeros(SIZE, np.float32)
    for part in PARTS[::2]:
        weights[part.where] = rng.uniform(-1, 1, part.size) * np.sqrt(3 / part.shape[0])
    return weights


@cache
def accuracy(name: str | None) -> float:
    """On the test samples, after training by SGD with momentum over four ranks, each with a quarter of each batch."""
    x, y = digits()

    def task(wire: Together) -> np.ndarray:
        codec = make(name, wire.rank, SHAPES, momentum=MOMENTUM, sparsity=0.99, warmup_epochs=4.0) if name else None
        momentum = 0.0 if codec is not None and codec.takes_momentum else MOMENTUM
        weights, velocity, step = start(), np.zeros(SIZE, np.float32), 0
        for epoch in range(EPOCHS):
            order = np.random.default_rng([2, epoch]).permutation(TRAIN)
            for batch in np.split(order[: TRAIN // BATCH * BATCH], TRAIN // BATCH):
                mine = batch[wire.rank :: RANKS]
                gradient = backward(weights, x[mine], y[mine]) / np.float32(BATCH)
                if codec is None:
                    wire.total(gradient)
                else:
                    codec.sum_over(wire, gradient, step, epoch)
                velocity = momentum * velocity + gradient
                weights = weights - LR * velocity
                step += 1
        return weights

    weights = together(RANKS, task)
    for other in weights[1:]:
        np.testing.assert_array_equal(other, weights[0])
    return float(np.mean(forward(weights[0], x[TRAIN:])[1].argmax(axis=1) == y[TRAIN:]))


def test_uncompressed_training_learns() -> None:
    assert accuracy(None) > 0.95


@pytest.mark.parametrize("name", TABLE)
def test_accuracy_is_within_a_hundredth_of_uncompressed(name: str) -> None:
    print(f"{name}: {accuracy(name):.4f}, uncompressed: {accuracy(None):.4f}")
    assert accuracy(name) > accuracy(None) - 0.01
