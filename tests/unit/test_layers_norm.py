"""Normalization against its definitions written out here; cut over ranks it is tested in tests/mpi/test_executor.py."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from ops import Bound, alone, random_weights

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import BatchNorm, GroupNorm, InstanceNorm, Layer, LayerNorm, Phase
from hpctrain.layers.statistics import merge_moments
from hpctrain.partition import Shape

# --- batch normalization ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 3), (3, 5, 4, 3), (2, 3, 1, 5, 2)])
def test_batch_norm_and_its_running_statistics(shape: Shape, seed: int) -> None:
    """Training divides by the batch's biased variance, evaluation by the running one, which gathers unbiased ones."""
    rng, layer, every = np.random.default_rng(seed), BatchNorm(eps=1e-3, momentum=0.2), tuple(range(len(shape) - 1))
    weights = {"gamma": rng.normal(size=shape[-1]), "beta": rng.normal(size=shape[-1])}
    running = {"running_mean": np.zeros(shape[-1]), "running_var": np.ones(shape[-1])}
    bound = Bound(alone(layer, shape), 0, weights | running)
    mean, var = running["running_mean"], running["running_var"]
    for _ in range(5):
        x = 3 * rng.normal(size=shape) + 7
        expected = (x - x.mean(every)) / np.sqrt(x.var(every) + 1e-3) * weights["gamma"] + weights["beta"]
        np.testing.assert_allclose(bound.forward([x]), expected, rtol=1e-11, atol=1e-12)
        mean, var = 0.8 * mean + 0.2 * x.mean(every), 0.8 * var + 0.2 * x.var(every, ddof=1)
        np.testing.assert_allclose(bound.w["running_mean"], mean, rtol=1e-12)
        np.testing.assert_allclose(bound.w["running_var"], var, rtol=1e-12)
    expected = (x - mean) / np.sqrt(var + 1e-3) * weights["gamma"] + weights["beta"]
    np.testing.assert_allclose(bound.forward([x], Phase(training=False)), expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(bound.w["running_mean"], mean, rtol=1e-12, err_msg="evaluation moves nothing")


def test_batch_norm_of_data_far_from_zero_keeps_its_variance(seed: int) -> None:
    """The textbook E[x^2] - E[x]^2 would lose all digits here; merging by Chan's formula keeps them."""
    rng = np.random.default_rng(seed)
    x = 1e8 + rng.normal(size=(1001, 1))
    parts = [moments(p) for p in (x[:7], x[7:600], x[600:])]
    nothing = np.array([[0.0], [99.0], [0.0]])
    count, mean, m2 = merge_moments(np.array([nothing, *parts, nothing]))
    centred = x - 1e8  # exact: 1e8 has 27 bits, x's last place is 2**-26
    assert count == 1001
    np.testing.assert_allclose(mean, x.mean(axis=0), rtol=1e-15)
    # the means of the parts err by 2**-53 * 1e8 = 1e-8, relative to differences of order 0.1
    np.testing.assert_allclose(m2, centred.var(axis=0) * 1001, rtol=1e-7)


def moments(x: np.ndarray) -> np.ndarray:
    """(3, channels): count, mean and m2 of rows."""
    return np.array([np.full(x.shape[-1], len(x)), x.mean(axis=0), ((x - x.mean(axis=0)) ** 2).sum(axis=0)])


def test_moments_of_parts_are_those_of_the_whole(seed: int) -> None:
    """Cut anywhere, empty parts too, whose mean may be anything."""
    rng = np.random.default_rng(seed)
    for _ in range(100):
        n, parts = int(rng.integers(1, 30)), int(rng.integers(1, 8))
        x = rng.normal(size=(n, 3)) * rng.uniform(0.1, 10) + rng.normal()
        edges = [0, *sorted(rng.integers(0, n + 1, parts - 1).tolist()), n]
        pieces = [x[a:b] for a, b in pairwise(edges)]
        found = [moments(p) if len(p) else np.array([[0.0] * 3, [np.nan] * 3, [0.0] * 3]) for p in pieces]
        np.testing.assert_allclose(merge_moments(np.array(found)), moments(x), rtol=1e-10, atol=1e-10)
    print("100 cuts")


def test_batch_norm_of_a_constant_channel_is_its_beta() -> None:
    bound = Bound(alone(BatchNorm(), (3, 2)), 0, {
        "gamma": np.ones(2), "beta": np.array([5.0, -1.0]), "running_mean": np.zeros(2), "running_var": np.ones(2),
    })  # fmt: skip
    y = bound.forward([np.array([[7.0, 1.0], [7.0, 2.0], [7.0, 3.0]])])
    np.testing.assert_array_equal(y[:, 0], 5)
    dxs, _ = bound.backward(np.ones((3, 2)))
    np.testing.assert_allclose(dxs[0], 0, atol=1e-12)


@pytest.mark.parametrize("groups", [2, 3, 7])
def test_batch_norm_in_groups_is_batch_norm_of_each(groups: int, seed: int) -> None:
    """The first groups are a sample longer; running statistics gather the whole batch."""
    rng = np.random.default_rng(seed)
    x, dy = rng.normal(size=(2, 7, 3, 5, 2)) + 3
    place = alone(BatchNorm(groups=groups), x.shape)
    weights = random_weights(place, rng)
    bound = Bound(place, 0, weights)
    y = bound.forward([x])
    (dx,), dw = bound.backward(dy)
    gradients = {"gamma": np.zeros(2), "beta": np.zeros(2)}
    assert [len(part) for part in np.array_split(x, groups)] == sorted(map(len, np.array_split(x, groups)))[::-1]
    for rows in np.array_split(np.arange(7), groups):
        one = Bound(alone(BatchNorm(), x[rows].shape), 0, weights)
        np.testing.assert_allclose(y[rows], one.forward([x[rows]]), rtol=1e-12, atol=1e-12)
        (expected,), grown = one.backward(dy[rows])
        np.testing.assert_allclose(dx[rows], expected, rtol=1e-10, atol=1e-12)
        gradients = {name: gradient + grown[name] for name, gradient in gradients.items()}
    for name, gradient in gradients.items():
        np.testing.assert_allclose(dw[name], gradient, rtol=1e-12)
    every = (0, 1, 2)
    np.testing.assert_allclose(bound.w["running_mean"], 0.9 * weights["running_mean"] + 0.1 * x.mean(every), rtol=1e-12)
    variance = 0.9 * weights["running_var"] + 0.1 * x.var(every, ddof=1)
    np.testing.assert_allclose(bound.w["running_var"], variance, rtol=1e-12)


# --- per sample ---------------------------------------------------------------------------------------------------

SHAPES: list[Shape] = [(3, 6), (3, 5, 4, 6), (2, 3, 1, 5, 6)]


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("shape", SHAPES)
def test_group_norm_is_that_of_each_sample_and_run_of_channels(shape: Shape, groups: int, seed: int) -> None:
    rng, size = np.random.default_rng(seed), 6 // groups
    x, w = 2 * rng.normal(size=shape) + 3, dict(zip(("gamma", "beta"), rng.normal(size=(2, 6)), strict=True))
    y = Bound(alone(GroupNorm(groups, eps=1e-3), shape), 0, w).forward([x])
    for n in range(shape[0]):
        for run in (slice(i * size, (i + 1) * size) for i in range(groups)):
            part = x[n, ..., run]
            expected = (part - part.mean()) / np.sqrt(part.var() + 1e-3) * w["gamma"][run] + w["beta"][run]
            np.testing.assert_allclose(y[n, ..., run], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[1:])
def test_instance_norm_is_that_of_each_sample_and_channel(shape: Shape, seed: int) -> None:
    rng, positions = np.random.default_rng(seed), tuple(range(1, len(shape) - 1))
    x, gamma, beta = 2 * rng.normal(size=shape) + 3, *rng.normal(size=(2, 6))
    plain = (x - x.mean(positions, keepdims=True)) / np.sqrt(x.var(positions, keepdims=True) + 1e-5)
    with_weights = Bound(alone(InstanceNorm(), shape), 0, {"gamma": gamma, "beta": beta})
    np.testing.assert_allclose(with_weights.forward([x]), plain * gamma + beta, rtol=1e-12, atol=1e-12)
    without = Bound(alone(InstanceNorm(affine=False), shape), 0, {})
    np.testing.assert_allclose(without.forward([x]), plain, rtol=1e-12, atol=1e-12)
    assert without.w == {}


@pytest.mark.parametrize(("shape", "dims"), [(shape, dims) for shape in SHAPES for dims in range(1, len(shape))])
def test_layer_norm_is_over_the_last_dims(shape: Shape, dims: int, seed: int) -> None:
    rng, last = np.random.default_rng(seed), tuple(range(-dims, 0))
    x, (gamma, beta) = 2 * rng.normal(size=shape) + 3, rng.normal(size=(2, *shape[-dims:]))
    y = Bound(alone(LayerNorm(dims, eps=1e-3), shape), 0, {"gamma": gamma, "beta": beta}).forward([x])
    expected = (x - x.mean(last, keepdims=True)) / np.sqrt(x.var(last, keepdims=True) + 1e-3) * gamma + beta
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


# --- who talks to whom, and refusals --------------------------------------------------------------------------------


def test_statistics_travel_no_further_than_they_reach() -> None:
    shape = (2, 3, 5, 4, 6)
    spatial = ("depth", "height", "width")
    for layer, axes in [
        (BatchNorm(), ("batch", *spatial)),
        (GroupNorm(2), (*spatial, "channel")),
        (GroupNorm(6), spatial),  # a group for each channel
        (InstanceNorm(), spatial),
        (LayerNorm(), ("channel",)),
        (LayerNorm(dims=2), ("width", "channel")),
        (LayerNorm(dims=4), (*spatial, "channel")),
    ]:
        assert layer.reduce_axes(shape) == axes, layer


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (BatchNorm(groups=4), (3, 5), "groups = 4 of 3 samples; give 1 to 3"),
        (BatchNorm(groups=0), (3, 5), "groups = 0 of 3 samples"),
        (GroupNorm(4), (3, 5, 5, 6), "groups = 4 of 6 channels; give a divisor"),
        (GroupNorm(0), (3, 5, 5, 6), "groups = 0 of 6 channels"),
        (InstanceNorm(), (3, 1, 1, 6), "has one position, whose variance is 0; give 2 or more"),
        (LayerNorm(dims=4), (3, 5, 5, 6), r"dims = 4 of \(3, 5, 5, 6\); give 1 to 3"),
        (LayerNorm(dims=0), (3, 6), "dims = 0"),
    ],
)
def test_refusals_name_the_layer_and_the_remedy(layer: Layer, shape: Shape, message: str) -> None:
    net = Graph()
    with pytest.raises(PlanError, match=rf"layer norm .*{message}"):
        net.add("norm", layer, net.input("x", shape))
