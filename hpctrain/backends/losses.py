"""Losses of labels, in NumPy: the formulas of the backend `reference`."""

from __future__ import annotations

import numpy as np

from hpctrain.backends.base import Array, Floats, Ints


def cross_entropy(
    logits: Floats, labels: Ints, weight: Floats, smoothing: float, loss: Floats, probability: Floats
) -> None:
    """See `Backend.cross_entropy`."""
    if logits.size == 0:
        loss.fill(0)
        return
    shifted = logits - logits.max(axis=-1, keepdims=True)
    np.exp(shifted, out=probability)
    total = probability.sum(axis=-1, keepdims=True, dtype=np.float64)
    np.divide(probability, total, out=probability)
    # -log probability is base - shifted
    counts, label = _classes(labels, logits.shape[-1])
    base, at_label = np.log(total[..., 0]), np.take_along_axis(shifted, label[..., None], -1)[..., 0]
    terms = (1 - smoothing) * weight[label] * (base - at_label)
    if smoothing:  # 0 times the infinity of a class that a logit of -inf excludes would be NaN
        terms += smoothing / logits.shape[-1] * (base * weight.sum() - shifted @ weight)
    loss[...] = per_sample(np.where(counts, terms, 0))


def cross_entropy_dx(
    probability: Floats, labels: Ints, weight: Floats, smoothing: float, scale: Floats, out: Floats
) -> None:
    """See `Backend.cross_entropy_dx`."""
    if out.size == 0:
        return
    counts, label = _classes(labels, out.shape[-1])
    hit, rest = (1 - smoothing) * weight[label], smoothing / out.shape[-1] * weight
    np.multiply(probability, (hit + rest.sum())[..., None], out=out)
    out -= rest
    at_label = np.take_along_axis(out, label[..., None], -1)
    np.put_along_axis(out, label[..., None], at_label - hit[..., None], -1)
    out *= rows(scale, out)
    out[~counts] = 0


def label_scores(logits: Floats, labels: Ints, weight: Floats, total: Floats, correct: Floats, count: Floats) -> None:
    """See `Backend.label_scores`."""
    if logits.size == 0:
        for out in (total, correct, count):
            out.fill(0)
        return
    counts, label = _classes(labels, logits.shape[-1])
    total[...] = per_sample(np.where(counts, weight[label].astype(np.float64), 0))
    correct[...] = per_sample(counts & (logits.argmax(axis=-1) == labels))
    count[...] = per_sample(counts)


def per_sample(values: Array) -> Array:
    """The sum over all dims but the first, in float64."""
    return values.sum(axis=tuple(range(1, values.ndim)), dtype=np.float64)


def rows(scale: Array, like: Array) -> Array:
    """A factor per sample, shaped to multiply an array (N, ...)."""
    return scale.reshape(-1, *(1,) * (like.ndim - 1))


def _classes(labels: Ints, classes: int) -> tuple[Array, Ints]:
    """Whether each label is one of the classes, and labels that are an index everywhere."""
    counts = (labels >= 0) & (labels < classes)
    return counts, np.where(counts, labels, 0)
