"""A rank's memory between layers, as one arena: which arrays there are, and where each lies at which time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import numpy as np

from hpctrain.partition import Box, Shape
from hpctrain.planner.layout import Kind
from hpctrain.planner.schedule import Key

ALIGNMENT = 64
"""Bytes: a cache line, and the longest vector."""

Span = tuple[int, int]
"""First and last time, both included, at which what an array holds is needed."""


@dataclass
class Buffer:
    """An array that is not part of another one."""

    shape: Shape
    kind: Kind
    spans: list[Span]

    def until(self, time: int) -> None:
        """What it holds last is needed until `time`."""
        first, last = self.spans[-1]
        self.spans[-1] = first, max(last, time)


class View(NamedTuple):
    """A box of a buffer; None is all of it."""

    buffer: int
    box: Box | None = None


class EdgeViews(NamedTuple):
    """The four arrays of an edge, and whether the producer's two are views of the consumer's."""

    src: View
    dst: View
    inplace: bool
    gradient: View | None
    """What the consumer writes in backward, from which `back` follows."""
    back: View | None
    inplace_back: bool


@dataclass
class Buffers:
    """What a rank needs between layers, and where it is found."""

    found: list[Buffer] = field(default_factory=list)
    results: dict[str, View] = field(default_factory=dict)
    """The output of each unit and input, by layer."""
    edges: dict[Key, EdgeViews] = field(default_factory=dict)
    masked: dict[str, View] = field(default_factory=dict)
    """By unit, a copy of its output's gradient, for those that change it where all gradients have to stay."""
    passed: set[Key] = field(default_factory=set)
    """Inputs whose gradient is that of the output, in the same place: nothing is copied."""

    def add(self, shape: Shape, spans: Sequence[Span], kind: Kind = Kind.NUMBERS) -> View:
        """A new buffer."""
        self.found.append(Buffer(shape, kind, list(spans)))
        return View(len(self.found) - 1)

    def interior(self, outer: View, box: Box) -> View:
        """A box of what `outer` shows."""
        if outer.box is None:
            return View(outer.buffer, box)
        return View(
            outer.buffer, tuple(slice(o.start + s.start, o.start + s.stop) for o, s in zip(outer.box, box, strict=True))
        )

    def place(self, dtype: np.dtype) -> tuple[list[int], int]:
        """The offset of each buffer in the arena, and the arena's bytes.

        Greedy by size (Pisarchyk & Lee 2020): the largest first, each in the lowest gap of what is needed meanwhile.
        """
        sizes = [_aligned(prod(b.shape) * b.kind.dtype(dtype).itemsize) for b in self.found]
        offsets, placed, total = [0] * len(sizes), list[int](), 0
        for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
            meanwhile = sorted(
                (offsets[j], sizes[j]) for j in placed if _overlap(self.found[i].spans, self.found[j].spans)
            )
            at = 0
            for offset, size in meanwhile:
                if offset - at >= sizes[i]:
                    break
                at = max(at, offset + size)
            offsets[i], total = at, max(total, at + sizes[i])
            if sizes[i]:
                placed.append(i)
        return offsets, total


def arena_bytes(found: Buffers, dtype: np.dtype) -> int:
    """Bytes that the arena of `found` takes, its alignment included."""
    return found.place(dtype)[1] + ALIGNMENT


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _overlap(a: Iterable[Span], b: Sequence[Span]) -> bool:
    return any(first <= other_last and other_first <= last for first, last in a for other_first, other_last in b)
