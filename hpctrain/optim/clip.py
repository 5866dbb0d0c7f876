"""Gradient clipping by the norm of the whole gradient (Pascanu, Mikolov & Bengio 2013, algorithm 1)."""

from __future__ import annotations

from math import inf, sqrt


def clip_factor(square_sum: float, limit: float) -> float:
    """What a gradient, whose elements' squares add up to `square_sum`, is to be multiplied by: at most `limit` long.

    Exactly 1.0 where it is no longer than that, and where the sum is not finite: what is wrong then stays to be seen.
    """
    norm = sqrt(square_sum) if 0 <= square_sum < inf else 0.0
    return limit / norm if norm > limit else 1.0
