"""The network as the cost formulas see it, and what they have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Network(NamedTuple):
    """alpha-beta-gamma model of a link (Hockney): seconds per message, per byte sent, per byte reduced.

    Where hosts hold `per_host` ranks each, `near` is the network within a host.
    """

    alpha: float
    beta: float
    gamma: float = 0.0
    near: Network | None = None
    per_host: int = 1


class Sent(NamedTuple):
    """What a rank sends."""

    messages: int
    nbytes: int


def sent_of(sizes: Iterable[int], itemsize: int) -> Sent:
    """Messages of `sizes` elements each; those without any are not sent."""
    sent = [size for size in sizes if size]
    return Sent(len(sent), sum(sent) * itemsize)
