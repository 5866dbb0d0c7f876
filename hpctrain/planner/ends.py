"""Both ends of an edge before anything is cut: which axes cut each dim, and how what is wanted follows from work."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from hpctrain.graph import Node
from hpctrain.layers.base import Dims
from hpctrain.partition import AXES, AxisNames, Shape, names
from hpctrain.regions import Along


class Ends(NamedTuple):
    """A tensor of `shape` whose dims its owners cut by `axes`, and how what is wanted of it follows from a work.

    `masked` says whether ranks without work want nothing.
    """

    shape: Shape
    axes: tuple[AxisNames, ...]
    needs: Dims
    work: Shape
    work_axes: tuple[AxisNames, ...]
    masked: bool = True

    @classmethod
    def between(cls, producer: Node, consumer: Node, slot: int) -> Ends:
        """Those of the output of `producer` that is input `slot` of `consumer`."""
        layer, shapes = consumer.layer, consumer.input_shapes
        axes = producer.layer.output_axes(*producer.input_shapes)
        needs = layer.needs(*shapes)[slot]
        return cls(producer.shape, axes, needs, layer.work_shape(*shapes), layer.work_axes(*shapes))

    @classmethod
    def partial(cls, node: Node) -> Ends:
        """Those of the sums that every rank makes a part of."""
        layer, shapes = node.layer, node.input_shapes
        axes, produced = layer.output_axes(*shapes), layer.produces(*shapes)
        return cls(node.shape, axes, produced, layer.work_shape(*shapes), layer.work_axes(*shapes), masked=False)


class Part(NamedTuple):
    """Dims of an edge that share axes with no others: what ranks have in common is a product over these parts.

    `have_axes` and `want_axes` are those of the grid, in an order of their own; in `ends` they have the names of AXES
    in that order, so that parts that differ in names alone are equal.
    """

    have_axes: tuple[str, ...]
    want_axes: tuple[str, ...]
    ends: Ends


def parts(ends: Ends) -> list[Part]:
    """All dims of the tensor by the first of them, then those of the work that none of them follows."""
    found: list[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = []
    followed = {w for along in ends.needs if along is not None for w in along.dims}
    for d, along in enumerate(ends.needs):
        work = () if along is None else along.dims
        found.append((tuple(axis for w in work for axis in names(ends.work_axes[w])), (d,), work))
    found += [(names(axes), (), (w,)) for w, axes in enumerate(ends.work_axes) if w not in followed]
    joined: list[tuple[tuple[str, ...], tuple[int, ...], tuple[int, ...]]] = []
    for axes, dims, work in found:
        for other in [known for known in joined if set(known[0]) & set(axes)]:
            joined.remove(other)
            axes = (*other[0], *(axis for axis in axes if axis not in other[0]))
            dims, work = tuple(sorted((*other[1], *dims))), (*other[2], *work)
        joined.append((axes, dims, tuple(dict.fromkeys(work))))
    joined.sort(key=lambda one: min(one[1], default=len(ends.shape)))
    return [_part(ends, *one) for one in joined]


def _part(ends: Ends, want_axes: tuple[str, ...], dims: tuple[int, ...], work: tuple[int, ...]) -> Part:
    have_axes = tuple(axis for d in dims for axis in names(ends.axes[d]))
    place = {w: i for i, w in enumerate(work)}

    def moved(along: Along | None) -> Along | None:
        if along is None:
            return None
        at = tuple(place[w] for w in along.dims)
        return replace(along, dim=at[0] if len(at) == 1 else at)

    alone = Ends(
        tuple(ends.shape[d] for d in dims),
        tuple(_renamed(ends.axes[d], have_axes) for d in dims),
        tuple(moved(ends.needs[d]) for d in dims),
        tuple(ends.work[w] for w in work),
        tuple(_renamed(ends.work_axes[w], want_axes) for w in work),
        ends.masked,
    )
    return Part(have_axes, want_axes, alone)


def _renamed(axes: AxisNames, order: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(AXES[order.index(axis)] for axis in names(axes))
