"""Predicted seconds of sums with compression, at points computed by hand."""

from __future__ import annotations

from time import sleep

import numpy as np
import pytest
from codec_cases import SIZE, make

from hpctrain.comm import allreduce
from hpctrain.comm.allreduce import Network
from hpctrain.comm.codecs import TABLE
from hpctrain.comm.codecs.base import Wire
from hpctrain.comm.codecs.cost import SAMPLE, Estimate, Loopback, estimate, sent_bytes, throughput

NET = Network(10.0, 3.0)
RING = allreduce.get("ring")


def test_estimates_at_points_computed_by_hand() -> None:
    """1000 numbers over 5 ranks at 8 a second. Ring: 8 messages, 8/5 of the buffer; gathering: 4 messages of all."""
    plain = 8 * 10 + 8 / 5 * 4000 * 3
    halves = 8 * 10 + 8 / 5 * 2000 * 3
    ternary = 4 * (10 + (4 + 250) * 3)
    for name, sending in (("fp16", halves), ("bf16", halves), ("terngrad", ternary)):
        found = estimate(make(name, shapes={"w": (1000,)}), RING, NET, 5, 8.0)
        assert found == pytest.approx(Estimate(5, 1000, 125.0, sending, plain))


def test_topk_is_priced_after_its_warm_up() -> None:
    """One of a thousand, at 4 bytes and an index of 2."""
    codec = make("topk", shapes={"w": (10, 100)}, warmup_epochs=4.0)
    assert estimate(codec, RING, NET, 2, 1.0).sending == 10 + 6 * 3


def test_powersgd_sends_two_sums() -> None:
    codec = make("powersgd", shapes={"w": (100, 50), "b": (50,)}, rank=3)
    two = RING.cost(4, (300 + 50) * 4, NET) + RING.cost(4, 150 * 4, NET)
    assert estimate(codec, RING, NET, 4, 1.0).sending == pytest.approx(two)


@pytest.mark.parametrize("name", TABLE)
def test_one_rank_and_no_gradient_cost_nothing(name: str) -> None:
    assert estimate(make(name), RING, NET, 1, 1.0) == Estimate(1, SIZE, 0, 0, 0)
    empty = make(name, shapes={"w": (0,)})
    assert estimate(empty, RING, NET, 4, throughput(empty, 4)) == Estimate(4, 0, 0, 0, 0)


def test_bytes_that_a_library_sends_are_not_known() -> None:
    assert sent_bytes(make("fp16"), allreduce.get("mpi"), 4, 0, 0.0) is None
    assert sent_bytes(make("terngrad", shapes={"w": (1000,)}), allreduce.get("mpi"), 4, 0, 0.0) == 3 * 254
    assert sent_bytes(make("fp16", shapes={"w": (1000,)}), RING, 4, 0, 0.0) == 2 * 3 * 250 * 2
    assert sent_bytes(make("fp16"), RING, 1, 0, 0.0) == 0


@pytest.mark.parametrize("name", TABLE)
def test_throughput_is_measured_without_touching_the_codec(name: str) -> None:
    codec = make(name)
    before = {key: array.copy() for key, array in codec.state.items()}
    assert 1e4 < throughput(codec, 4, trials=1) < 1e12
    for key, array in before.items():
        np.testing.assert_array_equal(codec.state[key], array)


@pytest.mark.parametrize(("shape", "elements"), [((600, 1000), SAMPLE), ((10, 7), 70)])
def test_throughput_counts_the_elements_of_its_sample(
    shape: tuple[int, ...], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A codec that takes 20 ms for whatever it is given."""
    given = []

    def exchange(self: object, wire: Wire, gradient: np.ndarray, step: int, epoch: float) -> None:
        given.append((wire.size, gradient.size))
        sleep(0.02)

    codec = make("onebit", shapes={"w": shape})
    monkeypatch.setattr(type(codec), "exchange", exchange)
    assert elements / 0.1 < throughput(codec, 3) <= elements / 0.02
    assert given == [(3, elements)] * 3


def test_loopback_gathers_the_same_of_every_rank() -> None:
    payload = np.arange(5, dtype=np.uint8)
    assert Loopback(3).gather(payload).tolist() == [[0, 1, 2, 3, 4]] * 3


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_loopback_leaves_what_is_summed(dtype: str) -> None:
    buffer = np.array([1.5, -0.0, 6e-8, np.inf], dtype)
    Loopback(3).total(buffer)
    np.testing.assert_array_equal(buffer, np.array([1.5, 0, 6e-8, np.inf], dtype))
