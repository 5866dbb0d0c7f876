"""Prices of edges, each kind of edge once: networks repeat their blocks, and plans that are compared share edges."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hpctrain.planner.layout import Edge, Kind
from hpctrain.planner.transfers import Transfer, is_halo, transfer
from hpctrain.planner.wire import Wire
from hpctrain.regions import Region


def priced(edge: Edge, dtype: np.dtype, wire: Wire) -> tuple[Transfer, bool]:
    """(`transfer`, `is_halo`) of an edge."""
    return _priced(edge.have, edge.want, edge.slot is None, edge.kind, edge.gradient, dtype, wire)


@lru_cache(maxsize=2048)
def _priced(
    have: Region, want: Region, partial: bool, kind: Kind, gradient: bool, dtype: np.dtype, wire: Wire
) -> tuple[Transfer, bool]:
    edge = Edge("", None if partial else 0, have, want, kind, gradient)
    return transfer(edge, dtype, wire), is_halo(edge)
