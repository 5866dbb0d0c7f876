"""What a rank updates of each parameter, and how state of it is named, for any storage; memory shared without MPI."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from networks import NETWORKS, single

from hpctrain.comm import shared
from hpctrain.comm.shared import PythonMeeting, PythonSharedSum
from hpctrain.optim.base import runs
from hpctrain.parameters import Allocate, Group, Parameters, Storage
from hpctrain.partition import split, volume
from hpctrain.planner.layout import layouts


def sharded(ranks: int, rank: int, cuts: int, counted: bool = True) -> Allocate:
    """Storage of one of several ranks, which updates its share of each of so many stretches."""

    def allocate(group: Group, size: int, dtype: np.dtype) -> Storage:
        weights, gradients = np.zeros((2, size), dtype)
        reduced = []
        for cut in range(cuts):
            start, stop = split(size, cuts, cut)
            first, last = split(stop - start, ranks, rank)
            reduced.append(slice(start + first, start + last))
        return Storage(weights, gradients, gradients, tuple(reduced), counted, sharded=True)

    return allocate


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("ranks", "cuts"), [(1, 1), (2, 1), (3, 4), (7, 2), (50, 3), (5, 40)])
def test_shares_tile_every_parameter_in_order(name: str, ranks: int, cuts: int) -> None:
    net = NETWORKS[name]()
    places = layouts(net, single(net)).values()
    seen: dict[str, np.ndarray] = {}
    for rank in range(ranks):
        flat = Parameters(places, 0, np.dtype("f8"), 5, sharded(ranks, rank, cuts))
        shards, blocks = flat.shards(), flat.blocks()
        order = list(flat.by_name)
        for memory in flat.groups.values():
            memory.weights[...] = np.arange(memory.weights.size)
        assert {shard.parameter for shard in shards} == set(range(len(order))), "at least one of each"
        state = np.concatenate([blocks[shard.block].weights[shard.where] for shard in shards])
        assert state.size == sum(part.stop - part.start for m in flat.groups.values() for part in m.reduced)
        tensors = flat.like(state, "state")
        assert {t.name for t in tensors} == {f"state/{parameter}" for parameter in order}
        for t in tensors:
            p = flat.by_name[t.name.removeprefix("state/")]
            assert t.shape == p.shape
            assert t.array.size == volume(t.box) == prod(t.array.shape)
            np.testing.assert_array_equal(t.array, p.array[t.box], err_msg=t.name)
            if t.array.size:
                assert np.shares_memory(t.array, state), "what is restored reaches the optimizer"
                assert t.saved_by(0)
                seen.setdefault(p.name, np.zeros(p.shape, int))[t.box] += 1
        for run in runs(shards):
            assert run.at.stop - run.at.start == run.where.stop - run.where.start
            np.testing.assert_array_equal(state[run.at], blocks[run.block].weights[run.where])
            inside = [p.decay for p in flat.by_name.values() if p.where.start < run.where.stop > run.where.start]
            assert run.decay in inside
    assert set(seen) == set(order)
    assert all((counts == 1).all() for counts in seen.values())


def test_a_copy_on_another_host_is_not_saved() -> None:
    net = NETWORKS["lenet"]()
    flat = Parameters(layouts(net, single(net)).values(), 0, np.dtype("f4"), 5, sharded(3, 1, 1, counted=False))
    state = np.zeros(sum(shard.size for shard in flat.shards()), np.float32)
    assert not any(shard.counted for shard in flat.shards())
    assert not any(t.saved_by(1) for t in flat.like(state, "x") if t.array.size)


# --- meetings and sums of one process -----------------------------------------------------------------------------


def both_kinds() -> list[str]:
    """Of the classes: Python's, and the compiled ones where they are."""
    return ["python", *(["compiled"] if shared._native is not None else [])]


@pytest.mark.parametrize("kind", both_kinds())
def test_nobody_passes_a_meeting_before_all_have_come(kind: str) -> None:
    flags = [np.zeros(1, np.int64) for _ in range(3)]
    make = PythonMeeting if kind == "python" else shared._native.Meeting
    ranks = [make(flags, rank) for rank in range(3)]
    for _ in range(4):
        ranks[2].come()
        assert not ranks[2].complete(10.0)
        ranks[0].come()
        assert not ranks[0].complete(0.0)
        assert ranks[0].missing() == [1]
        ranks[1].come()
        assert ranks[1].complete(0.0)
        ranks[1].come()  # the next round; the others have yet to see that this one is over
        assert ranks[0].complete(0.0)
        assert ranks[2].complete(0.0)
        ranks[0].come()
        ranks[2].come()
        assert all(rank.complete(0.0) for rank in ranks)


@pytest.mark.parametrize("kind", both_kinds())
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("size", [0, 1, 5, 1025])
def test_sum_begins_when_all_have_written_and_ends_when_all_have_added(
    kind: str, dtype: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares of three ranks into the memory of the first, in order of ranks, again and again."""
    if kind == "python":
        monkeypatch.setattr(shared, "_native", None)
    make = PythonMeeting if kind == "python" else shared._native.Meeting
    flags = np.zeros((2, 3, 1), np.int64)
    vectors = np.zeros((3, size), dtype)
    sums = []
    for rank in range(3):
        share = slice(*split(size, 3, rank))
        written, summed = make(list(flags[0]), rank), make(list(flags[1]), rank)
        sums.append(shared.shared_sum([v[share] for v in vectors], vectors[0][share], written, summed))
    assert isinstance(sums[0], PythonSharedSum) == (kind == "python" or dtype == "float16")
    rng = np.random.default_rng(size)
    for _ in range(3):
        vectors[...] = rng.normal(size=(3, size))
        wide = np.float32 if dtype == "float16" else vectors.dtype
        expected = (vectors[0].astype(wide) + vectors[1] + vectors[2]).astype(dtype)
        before = vectors[0].copy()
        assert not sums[0].add(0.0)
        assert not sums[1].add(0.0)
        np.testing.assert_array_equal(vectors[0], before)
        assert sums[2].add(0.0)
        assert not sums[2].run(0.0)
        assert not sums[1].run(0.0)
        assert sums[0].run(0.0)
        assert sums[1].run(0.0)
        assert sums[2].run(0.0)
        np.testing.assert_array_equal(vectors[0], expected)
