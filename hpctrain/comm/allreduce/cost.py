"""The network as the cost formulas see it."""

from __future__ import annotations

from typing import NamedTuple


class Network(NamedTuple):
    """alpha-beta-gamma model of a link (Hockney): seconds per message, per byte sent, per byte reduced."""

    alpha: float
    beta: float
    gamma: float = 0.0
