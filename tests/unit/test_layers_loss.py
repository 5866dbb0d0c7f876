"""Losses against their definitions written out here or in other libraries."""

from __future__ import annotations

from math import inf, prod

import numpy as np
import pytest
from ops import Bound, alone, run
from scipy.special import expit, huber, log_softmax, softmax
from sklearn.metrics import f1_score, log_loss

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import MAE, MSE, BCEWithLogits, Dice, Huber, Layer, Loss, SoftmaxCrossEntropy
from hpctrain.layers.loss import COUNT, LOSS, SCORE, WEIGHT
from hpctrain.partition import Partition, Shape
from hpctrain.planner.layout import layout

# --- softmax cross-entropy ----------------------------------------------------------------------------------------


def mean(rows: np.ndarray) -> float:
    """The mean loss that rows stand for."""
    return float(rows[:, LOSS].sum() / rows[:, WEIGHT].sum())


def test_cross_entropy_equals_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for classes in (2, 5, 11):
        logits, labels = 3 * rng.normal(size=(9, classes)), rng.integers(0, classes, 9)
        rows = run(SoftmaxCrossEntropy(), logits, labels)
        probability = np.exp(log_softmax(logits, axis=1))
        np.testing.assert_allclose(
            rows[:, LOSS].mean(), log_loss(labels, probability, labels=range(classes)), rtol=1e-12
        )
        np.testing.assert_allclose(rows[:, LOSS], -log_softmax(logits, axis=1)[range(9), labels], rtol=1e-12)
        np.testing.assert_array_equal(rows[:, WEIGHT], 1)
        np.testing.assert_array_equal(rows[:, SCORE], probability.argmax(axis=1) == labels)


def test_cross_entropy_of_huge_logits_stays_finite() -> None:
    logits = np.array([[1e5, 0, -1e5], [-1e300, 1e300, 0], [7, 7, 7]])
    rows = run(SoftmaxCrossEntropy(), logits, np.array([0, 1, 2]))
    np.testing.assert_allclose(rows[:, LOSS], [0, 0, np.log(3)], rtol=1e-15)


@pytest.mark.parametrize("positions", [(), (5,), (3, 5), (2, 3, 5)])
def test_cross_entropy_of_positions_with_weights_smoothing_and_ignored_labels(positions: Shape, seed: int) -> None:
    """One position at a time; divided by the weights of the labels, as PyTorch does."""
    rng, smoothing, ignore = np.random.default_rng(seed), 0.2, 255
    weights = (0.5, 2.0, 0.0, 1.5)
    logits, labels = 3 * rng.normal(size=(7, *positions, 4)), rng.integers(0, 4, (7, *positions))
    labels[rng.random(labels.shape) < 0.3] = ignore
    rows = run(SoftmaxCrossEntropy(smoothing, weights, ignore), logits, labels)
    expected = np.zeros((7, 4))
    for at in np.ndindex(labels.shape):
        if (label := labels[at]) == ignore:
            continue
        minus = -log_softmax(logits[at])
        smooth = sum(w * m for w, m in zip(weights, minus, strict=True)) / 4
        correct = logits[at].argmax() == label
        expected[at[0]] += [
            (1 - smoothing) * weights[label] * minus[label] + smoothing * smooth, weights[label], correct, 1
        ]  # fmt: skip
    np.testing.assert_allclose(rows, expected, rtol=1e-12, atol=1e-12)
    assert 0 < rows[:, COUNT].sum() < labels.size


def test_cross_entropy_where_all_is_ignored_is_nothing(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(3, 5, 4)), np.full((3, 5), -100)
    bound = Bound(alone(SoftmaxCrossEntropy(smoothing=0.1, ignore=-100), logits.shape, labels.shape), 0, {})
    np.testing.assert_array_equal(bound.forward([logits, labels]), 0)
    dxs, _ = bound.backward(np.ones((3, 4)))
    np.testing.assert_array_equal(dxs[0], 0)


def test_ignored_label_may_be_a_class(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(9, 3)), rng.integers(0, 3, 9)
    some = labels != 0
    expected = log_loss(labels[some], softmax(logits[some], axis=1), labels=range(3))
    np.testing.assert_allclose(mean(run(SoftmaxCrossEntropy(ignore=0), logits, labels)), expected, rtol=1e-12)


def test_smoothing_is_towards_all_classes_alike(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(9, 5)), rng.integers(0, 5, 9)
    targets = 0.7 * np.eye(5)[labels] + 0.3 / 5
    expected = -(targets * log_softmax(logits, axis=1)).sum(axis=1)
    np.testing.assert_allclose(run(SoftmaxCrossEntropy(smoothing=0.3), logits, labels)[:, LOSS], expected, rtol=1e-12)


# --- elementwise --------------------------------------------------------------------------------------------------

DEFINITIONS = {
    "mse": (MSE(), lambda x, t: (x - t) ** 2),
    "mae": (MAE(), lambda x, t: abs(x - t)),
    "huber": (Huber(delta=0.7), lambda x, t: huber(0.7, x - t)),
    "bce": (BCEWithLogits(), lambda x, t: -t * np.log(expit(x)) - (1 - t) * np.log(1 - expit(x))),
}


@pytest.mark.parametrize("shape", [(5, 3), (3, 5, 4, 3), (2, 3, 1, 5, 3)])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_elementwise_losses_count_elements(name: str, shape: Shape, seed: int) -> None:
    rng, (layer, f) = np.random.default_rng(seed), DEFINITIONS[name]
    x, t = 2 * rng.normal(size=shape), rng.uniform(size=shape)
    rows, every = run(layer, x, t), tuple(range(1, len(shape)))
    np.testing.assert_allclose(rows[:, LOSS], f(x, t).sum(every), rtol=1e-12)
    np.testing.assert_array_equal(rows[:, [WEIGHT, COUNT]], prod(shape[1:]))
    expected = ((expit(x) > 0.5) == (t > 0.5)) if name == "bce" else abs(x - t)
    np.testing.assert_allclose(rows[:, SCORE], expected.sum(every), rtol=1e-12)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_elementwise_gradients_by_predictions_and_targets(name: str, seed: int) -> None:
    """Targets that a network computes (of a teacher, of another view) have a gradient too."""
    rng, (layer, f) = np.random.default_rng(seed), DEFINITIONS[name]
    x, t, scale, h = rng.normal(size=(3, 5)), rng.uniform(size=(3, 5)), rng.normal(size=3), 1e-6
    bound = Bound(alone(layer, x.shape, t.shape), 0, {})
    bound.forward([x, t])
    dxs, _ = bound.backward(np.stack([scale, *np.zeros((3, 3))], axis=1))
    # differences err by h**2 and by 1e-16 / h
    by_x = (f(x + h, t) - f(x - h, t)) / (2 * h) * scale[:, None]
    by_t = (f(x, t + h) - f(x, t - h)) / (2 * h) * scale[:, None]
    np.testing.assert_allclose(dxs[0], by_x, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(dxs[1], by_t, rtol=1e-7, atol=1e-8)


def test_binary_cross_entropy_of_huge_logits_stays_finite() -> None:
    x, t = np.array([[1e4, -1e4, 1e300]]), np.array([[1.0, 1.0, 0.5]])
    np.testing.assert_allclose(run(BCEWithLogits(), x, t)[0, LOSS], 0 + 1e4 + 0.5e300, rtol=1e-15)


# --- dice ---------------------------------------------------------------------------------------------------------


def dice(p: np.ndarray, t: np.ndarray, smooth: float) -> float:
    """The coefficient of one class of one sample."""
    return float((2 * (p * t).sum() + smooth) / (p.sum() + t.sum() + smooth))


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("positions", [(7,), (5, 4), (3, 1, 5)])
def test_dice_of_labels_is_the_mean_over_classes(positions: Shape, background: bool, seed: int) -> None:
    rng, first = np.random.default_rng(seed), 0 if background else 1
    logits, labels = rng.normal(size=(3, *positions, 4)), rng.integers(0, 4, (3, *positions))
    rows = run(Dice(smooth=0.3, background=background), logits, labels)
    np.testing.assert_array_equal(rows[:, [WEIGHT, COUNT]], 1)
    for n, row in enumerate(rows):
        p, classes = softmax(logits[n], axis=-1), range(first, 4)
        expected = [1 - dice(p[..., k], (labels[n] == k).astype(float), 0.3) for k in classes]
        np.testing.assert_allclose(row[LOSS], np.mean(expected), rtol=1e-12)
        # of hard predictions the coefficient is the F1 score
        true, guessed = labels[n].ravel(), logits[n].argmax(axis=-1).ravel()
        f1 = f1_score(true, guessed, labels=[*classes], average="macro", zero_division=1.0)
        np.testing.assert_allclose(row[SCORE], f1, rtol=1e-12)


@pytest.mark.parametrize("ignore", [255, -1, 0, 2])
def test_dice_is_of_the_positions_whose_label_is_not_ignored(ignore: int, seed: int) -> None:
    """Loss, score and gradient are those of the other positions alone, as if they were all there is."""
    rng, h = np.random.default_rng(seed), 1e-5
    logits, labels = rng.normal(size=(3, 5, 7, 4)), rng.integers(0, 4, (3, 5, 7))
    labels[rng.random(labels.shape) < 0.4] = ignore
    logits[labels == ignore] *= 50  # which would show
    bound = Bound(alone(Dice(smooth=0.3, ignore=ignore), logits.shape, labels.shape), 0, {})
    rows = bound.forward([logits, labels])
    np.testing.assert_array_equal(rows[:, [WEIGHT, COUNT]], 1)
    dxs, _ = bound.backward(np.ones((3, 4)))
    np.testing.assert_array_equal(dxs[0][labels == ignore], 0)
    for n, row in enumerate(rows):
        kept = labels[n] != ignore
        x, true = logits[n][kept], labels[n][kept]

        def loss(x: np.ndarray, true: np.ndarray = true) -> float:
            p = softmax(x, axis=-1)
            return float(np.mean([1 - dice(p[:, k], (true == k).astype(float), 0.3) for k in range(4)]))

        np.testing.assert_allclose(row[LOSS], loss(x), rtol=1e-12)
        f1 = f1_score(true, x.argmax(axis=-1), labels=range(4), average="macro", zero_division=1.0)
        np.testing.assert_allclose(row[SCORE], f1, rtol=1e-12)
        steps = h * np.eye(x.size).reshape(-1, *x.shape)
        slopes = [(loss(x + step) - loss(x - step)) / (2 * h) for step in steps]
        np.testing.assert_allclose(dxs[0][n][kept], np.reshape(slopes, x.shape), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_of_a_sample_that_is_all_ignored_counts_for_nothing(smooth: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(3, 5, 4)), rng.integers(0, 4, (3, 5))
    labels[1] = 255
    bound = Bound(alone(Dice(smooth=smooth, ignore=255), logits.shape, labels.shape), 0, {})
    rows = bound.forward([logits, labels])
    np.testing.assert_array_equal(rows[1], 0)
    np.testing.assert_array_equal(rows[:, [WEIGHT, COUNT]], [[1, 1], [0, 0], [1, 1]])
    dxs, _ = bound.backward(np.ones((3, 4)))
    assert dxs[0].any(axis=(1, 2)).tolist() == [True, False, True]


def test_dice_of_masks_takes_each_channel_by_itself(seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits, masks = rng.normal(size=(3, 5, 4, 2)), (rng.random((3, 5, 4, 2)) < 0.4).astype(float)
    rows = run(Dice(smooth=0.3), logits, masks)
    for n, row in enumerate(rows):
        expected = [1 - dice(expit(logits[n, ..., k]), masks[n, ..., k], 0.3) for k in range(2)]
        np.testing.assert_allclose(row[LOSS], np.mean(expected), rtol=1e-12)
        hard = [dice(logits[n, ..., k] > 0, masks[n, ..., k], 0.0) for k in range(2)]
        np.testing.assert_allclose(row[SCORE], np.mean(hard), rtol=1e-12)


def test_gradients_of_dice_of_masks_equal_differences(seed: int) -> None:
    rng, h = np.random.default_rng(seed), 1e-5
    xs = [rng.normal(size=(2, 3, 5, 2)), rng.uniform(size=(2, 3, 5, 2))]
    bound = Bound(alone(Dice(smooth=0.3, background=False), *(x.shape for x in xs)), 0, {})
    scale = rng.normal(size=2)
    bound.forward(xs)
    dxs, _ = bound.backward(np.stack([scale, *np.zeros((3, 2))], axis=1))
    for x, dx in zip(xs, dxs, strict=True):
        found = np.empty_like(x)
        for at in np.ndindex(x.shape):
            before = x[at]
            x[at] = before + h
            above = bound.forward(xs)[:, LOSS] @ scale
            x[at] = before - h
            found[at] = (above - bound.forward(xs)[:, LOSS] @ scale) / (2 * h)
            x[at] = before
        np.testing.assert_allclose(dx, found, rtol=1e-6, atol=1e-9)  # h**2 and 1e-16 / h


def test_dice_of_a_class_that_is_nowhere() -> None:
    """It counts as right where it is not predicted either; without smoothing its loss has no gradient of 0 / 0."""
    logits = np.zeros((1, 3, 3))
    logits[0, :, 0] = 900  # exp(-900) is 0: not a trace of class 1 and 2
    bound = Bound(alone(Dice(smooth=0.0), logits.shape, (1, 3)), 0, {})
    rows = bound.forward([logits, np.zeros((1, 3), np.int64)])
    np.testing.assert_array_equal(rows, [[0, 1, 1, 1]])
    dxs, _ = bound.backward(np.ones((1, 4)))
    np.testing.assert_array_equal(dxs[0], 0)


# --- cut ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer", [SoftmaxCrossEntropy(), MSE(), BCEWithLogits()], ids=lambda layer: type(layer).__name__
)
def test_a_rank_without_positions_adds_nothing(layer: Loss, seed: int) -> None:
    """Three rows over five ranks: two of them have none, but they do have the samples' rows of the sum."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, 3, 4, 3))
    target = rng.integers(0, 3, (2, 3, 4)) if isinstance(layer, SoftmaxCrossEntropy) else rng.uniform(size=logits.shape)
    place = layout(alone(layer, logits.shape, target.shape).node, Partition(height=5))
    total = np.zeros((2, 4))
    for rank in range(5):
        bound = Bound(place, rank, {})
        part = bound.forward([logits, target])
        assert (rank < 3) == part.any()
        dxs, _ = bound.backward(np.ones((2, 4)))
        assert (rank < 3) == bool(dxs[0].size)
        total += part
    np.testing.assert_allclose(total, run(layer, logits, target), rtol=1e-12)


@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        (SoftmaxCrossEntropy(), (3, 5, 7, 4), ("batch", "height", "width")),
        (MSE(), (3, 5, 7, 4), ("batch", "height", "width", "channel")),
        (Dice(), (3, 2, 5, 7, 4), ("batch", "depth", "height", "width")),
    ],
)
def test_rows_are_dealt_out_among_all_that_share_a_sample(layer: Loss, shape: Shape, axes: tuple[str, ...]) -> None:
    target = shape if isinstance(layer, MSE) else shape[:-1]
    place = layout(alone(layer, shape, target).node, Partition.of(dict.fromkeys(axes, 2)))
    counts = np.zeros(shape[0], int)
    for box in place.output.boxes:
        counts[box[0]] += 1
    np.testing.assert_array_equal(counts, 1)
    assert [box[0].stop - box[0].start for box in place.output.boxes].count(
        1
    ) == 3  # nobody holds more than one of three


# --- targets, and refusals ------------------------------------------------------------------------------------------


def test_targets_that_a_loss_cannot_use() -> None:
    labels = np.array([[0, 2], [3, 1], [-1, 0]])
    assert SoftmaxCrossEntropy().invalid(labels, 3).tolist() == [[False, False], [True, False], [True, False]]
    assert SoftmaxCrossEntropy(ignore=-1).invalid(labels, 3).tolist() == [[False, False], [True, False], [False] * 2]
    assert Dice().invalid(labels, 3).any(axis=1).tolist() == [False, True, True]
    assert Dice(ignore=3).invalid(labels, 3).tolist() == [[False] * 2, [False] * 2, [True, False]]
    # what is not finite is not invalid: it ends in the loss, which names the sample or skips it
    values = np.array([[0, 1], [np.nan, 1], [1, inf]])
    assert not MSE().invalid(values, 2).any()
    assert not Dice().invalid(values, 2).any()


def test_labels_out_of_range_do_not_fault(seed: int) -> None:
    """They end the run after the step; until then they count for nothing."""
    logits = np.random.default_rng(seed).normal(size=(3, 4))
    for wrong in (4, -1, 2**40):
        rows = run(SoftmaxCrossEntropy(), logits, np.array([1, wrong, 2]))
        np.testing.assert_array_equal(rows[:, [WEIGHT, COUNT]], [[1, 1], [0, 0], [1, 1]])


@pytest.mark.parametrize(
    ("layer", "x", "target", "message"),
    [
        (SoftmaxCrossEntropy(), (3, 5, 4), (3,), r"logits \(3, 5, 4\) and labels \(3,\)"),
        (SoftmaxCrossEntropy(smoothing=1.5), (3, 4), (3,), "smoothing = 1.5; give 0 to 1"),
        (SoftmaxCrossEntropy(class_weights=(1.0, 2.0)), (3, 4), (3,), "give 4 numbers of 0 or more"),
        (SoftmaxCrossEntropy(class_weights=(1.0, -2.0)), (3, 2), (3,), "give 2 numbers of 0 or more"),
        (MSE(), (3, 4), (3, 5), r"predictions \(3, 4\) and targets \(3, 5\)"),
        (Huber(delta=0.0), (3, 4), (3, 4), "delta = 0.0; give more than 0"),
        (Dice(), (3, 5, 4), (3, 5, 2), r"logits \(3, 5, 4\) and target \(3, 5, 2\)"),
        (
            Dice(ignore=255),
            (3, 5, 4),
            (3, 5, 4),
            r"ignore = 255 with a target \(3, 5, 4\).*labels \(3, 5\): give these",
        ),
        (Dice(smooth=-1.0), (3, 5, 4), (3, 5), "smooth = -1.0; give 0 or more"),
        (Dice(background=False), (3, 5, 1), (3, 5, 1), "is the only one; give logits of more, or background=True"),
    ],
)
def test_refusals_name_the_layer_and_the_remedy(layer: Layer, x: Shape, target: Shape, message: str) -> None:
    net = Graph()
    with pytest.raises(PlanError, match=f"layer loss .*{message}"):
        net.add("loss", layer, net.input("x", x), net.input("y", target))


def test_labels_are_cut_along_their_positions() -> None:
    net, grid = Graph(), Partition(batch=2, depth=2, height=3, width=2)
    for shape, axes in (((5,), 2), ((5, 7, 3), 12), ((5, 3, 7, 3), 24)):
        name = net.input(f"y{len(shape)}", shape, integer=True)
        owned = layout(net[name], grid).output
        assert len({str(box) for box in owned.boxes}) == axes
    with pytest.raises(PlanError, match=r"layer wide .*5 dims; give at most labels \(N, D, H, W\)"):
        net.input("wide", (2, 3, 3, 3, 3), integer=True)
    with pytest.raises(PlanError, match=r"layer wide .*6 dims; give at most \(N, D, H, W, C\)"):
        net.input("wide", (2, 3, 3, 3, 3, 3))
