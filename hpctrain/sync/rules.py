"""The rules by which replicas keep together, on plain arrays: what a run does on windows, a simulation does in a loop.

After Jin et al. 2016 (arXiv 1611.04581) and, for spare replicas, Chen et al. 2016 (arXiv 1604.00981).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hpctrain.randomness import random_words


def due(step: int, period: int) -> bool:
    """Whether replicas exchange in step `step` (from 0): in every `period`-th."""
    return (step + 1) % period == 0


def elastic_rate(replicas: int) -> float:
    """How far a replica and the centre move towards each other at an exchange, where nothing else is asked for."""
    return 0.8 / replicas


def elastic_pull(x: np.ndarray, centre: np.ndarray, rate: float) -> np.ndarray:
    """What an exchange takes off `x` and adds to `centre`: both by their values before it, so their sum stays."""
    return (x - centre) * x.dtype.type(rate)


def partner(seed: int, step: int, replica: int, replicas: int) -> int:
    """Whom `replica` asks or tells in step `step`: any of `replicas`, itself too, each as likely."""
    word = random_words("gossip", seed, step, 1, start=replica)[0]
    return int(word % np.uint64(replicas))


def pull(x: np.ndarray, other: np.ndarray) -> None:
    """Move `x` halfway to `other`, in place."""
    x += other
    x *= x.dtype.type(0.5)


def push_weights(received: int, to_itself: bool) -> tuple[float, float]:
    """(weight of a replica's own x, weight of each of those `received`); itself counts twice if it drew itself."""
    own = 2 if to_itself else 1
    return own / (own + received), 1 / (own + received)


def push(x: np.ndarray, total: np.ndarray, received: int, to_itself: bool) -> None:
    """Average `x`, in place, with the `received` vectors that add up to `total`."""
    own, each = push_weights(received, to_itself)
    x *= x.dtype.type(own)
    x += total * x.dtype.type(each)


def mean(vectors: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of equally long vectors, added in this order in double precision and rounded once."""
    total = vectors[0].astype(np.float64)
    for vector in vectors[1:]:
        total += vector
    total /= len(vectors)
    return total.astype(vectors[0].dtype)
