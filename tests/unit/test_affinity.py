"""Threads of a rank: its share of the cores that it is bound to."""

from __future__ import annotations

import os
from typing import Any

import pytest

from hpctrain.comm import affinity
from hpctrain.comm.affinity import fair_threads


@pytest.mark.parametrize(
    ("masks", "expected"),
    [
        ([{0}], [1]),
        ([{0, 1, 2, 3}], [4]),
        ([{0}, {1}], [1, 1]),  # bound one by one, Open MPI's default
        ([{0, 1}, {2, 3}], [2, 2]),
        ([{0, 1, 2, 3}] * 2, [2, 2]),  # not bound
        ([{0, 1, 2, 3}] * 3, [1, 1, 1]),
        ([{0, 1}] * 5, [1] * 5),  # more ranks than cores
        ([{0, 1, 2, 3}, {0}], [3, 1]),
        ([set(range(7))] * 3, [2, 2, 2]),
        ([set(range(6))] * 3, [2, 2, 2]),
    ],
)
def test_cores_are_shared_by_the_ranks_that_may_use_them(masks: list[set[int]], expected: list[int]) -> None:
    frozen = [frozenset(mask) for mask in masks]
    assert [fair_threads(frozen, rank) for rank in range(len(masks))] == expected


class Alone:
    """A node of this one rank."""

    rank = 0

    def allgather(self, mine: Any) -> list[Any]:
        return [mine]


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("5,2", 5), ("", None), ("many", None), ("0", None)])
def test_the_environment_goes_first(value: str, expected: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    own = len(os.sched_getaffinity(0))
    assert affinity.threads(Alone()) == (own if expected is None else expected)  # type: ignore[arg-type]
