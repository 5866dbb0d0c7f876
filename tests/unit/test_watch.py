"""What the watchdog says and when, and how the guard names who diverged. No MPI."""

from __future__ import annotations

import math
import time

import pytest

from hpctrain.comm.watch import WATCH, Wait, Watch, ranks


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0, 1"),
        ([2, 0, 1, 5], "ranks 0-2, 5"),
        ([7, 9, 10, 12, 13, 14], "ranks 7, 9, 10, 12-14"),
        (range(1, 100_000), "ranks 1-99999"),
        ([0], "rank 0"),
    ],
)
def test_ranks_are_named_in_runs(numbers: list[int], text: str) -> None:
    assert ranks(numbers) == text


def watch(stall: float = 1.0, abort: float = 10.0) -> Watch:
    """A watch that no thread looks at."""
    found = Watch()
    found.stall_seconds, found.abort_seconds = stall, abort
    found._who = "rank 4 on a-node-with-quite-a-long-name.cluster.example.org"
    return found


@pytest.mark.parametrize("waited", [60, 600, 86400])
@pytest.mark.parametrize("layer", ["", "encoder.block3.conv2", "a" * 100])
@pytest.mark.parametrize("peers", [[0], list(range(0, 1000, 2)), list(range(511))])
def test_messages_fit_80_columns(waited: int, layer: str, peers: list[int]) -> None:
    dog = watch(60, 600)
    text = dog.message(Wait(layer, "statistics (Allgather)", peers), waited)
    lines = text.splitlines()
    assert max(len(line) for line in lines) < 80
    assert all(line.startswith("  ") for line in lines[1:])
    whole = " ".join(line.strip() for line in lines)
    assert f"rank 4 on a-node-with-quite-a-long-name.cluster.example.org has waited {waited} s for rank" in whole
    assert layer.replace("a" * 100, "aaa") in whole
    assert whole.startswith("hpctrain: error: ") == (waited >= 600)
    assert "run.abort_seconds" in whole


def moments_of(dog: Watch, wait: Wait, until: int) -> list[tuple[float, bool]]:
    """(seconds, whether it ends) of everything said of a wait that began at 0, looked at 4 times a second."""
    wait.since, dog.now = 0.0, wait
    said = ((t / 4, dog.look(t / 4)) for t in range(4 * until))
    return [(t, found[1]) for t, found in said if found is not None]


def test_stall_is_told_at_doubling_intervals_and_then_ends() -> None:
    said = moments_of(watch(stall=1, abort=10), Wait("conv", "forward exchange", [1]), until=11)
    assert said == [
        (1, False),
        (2, False),
        (4, False),
        (8, False),
        (10, True),
        (10.25, True),
        (10.5, True),
        (10.75, True),
    ]


@pytest.mark.parametrize(("abort", "patient"), [(math.inf, False), (10, True)])
def test_some_waits_never_end_the_job(abort: float, patient: bool) -> None:
    said = moments_of(watch(1, abort), Wait("", "verification of the data", [1], patient=patient), until=40)
    assert said == [(t, False) for t in (1, 2, 4, 8, 16, 32)]
    assert "the job ends" not in watch(1, abort).message(Wait("", "x", [1], patient=patient), 100)


def test_each_wait_is_counted_from_its_own_beginning() -> None:
    dog, wait = watch(stall=1, abort=3), Wait("bn", "statistics", [1, 2])
    for begin in range(20):  # never longer than 0.9 s
        wait.since, dog.now = float(begin), wait
        assert dog.look(begin + 0.9) is None
    dog.now = None
    assert dog.look(1000) is None


def test_wait_for_nobody_is_not_told() -> None:
    assert moments_of(watch(), Wait("conv", "forward exchange", []), until=100) == []


def test_late_look_tells_once() -> None:
    assert moments_of(watch(1, math.inf), Wait("conv", "forward exchange", [1]), until=0) == []
    dog = watch(1, math.inf)
    dog.now = wait = Wait("conv", "forward exchange", [1])
    wait.since = 0.0
    assert dog.look(100) is not None  # the thread had no chance earlier
    assert dog.look(101) is None
    assert dog.look(129) is not None


def test_waits_nest_and_leave_nothing_behind() -> None:
    outer, inner = WATCH.waiting("", "checkpoint", [1]), WATCH.waiting("bn", "statistics", [1])
    with outer:
        assert WATCH.now is outer
        with inner:
            assert WATCH.now is inner
        assert WATCH.now is outer
        with pytest.raises(ValueError, match="of a layer"), inner:
            raise ValueError("of a layer")
        assert WATCH.now is outer
    assert WATCH.now is None


def test_refused_wait_is_not_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(wait: Wait) -> None:
        wait.awaited = (2,)
        raise ValueError("diverged")

    wait = Wait("bn", "statistics", [1, 2], [0, 1, 2])
    monkeypatch.setattr(WATCH, "guard", refuse)
    with pytest.raises(ValueError, match="diverged"), wait:
        pass
    assert WATCH.now is None
    assert wait.awaited == (1, 2)


def test_wait_costs_about_a_microsecond_at_most() -> None:
    wait, count = WATCH.waiting("conv", "forward exchange", [1, 2, 3]), 20_000
    best = math.inf
    for _ in range(10):
        begin = time.perf_counter()
        for _ in range(count):
            with wait:
                pass
        best = min(best, time.perf_counter() - begin)
    print(f"entering and leaving a wait takes {best / count * 1e6:.2f} us")
    assert best / count < 2e-6  # 0.2 us on an idle machine
