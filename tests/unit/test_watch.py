"""What the watchdog says and when, and how the guard names who diverged. No MPI."""

from __future__ import annotations

import math
import time

import pytest

from hpctrain.comm.board import Board
from hpctrain.comm.divergence import LENGTH, Doing, describe
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
    found._rank, found._host = 4, "a-node-with-quite-a-long-name.cluster.example.org"
    return found


@pytest.mark.parametrize("waited", [60, 600, 86400])
@pytest.mark.parametrize("layer", ["", "encoder.block3.conv2", "a" * 100])
@pytest.mark.parametrize("peers", [[0], list(range(0, 1000, 2)), list(range(511))])
@pytest.mark.parametrize(("who", "they"), [([4], "rank 4"), (range(4, 68), "ranks 4-67")])
def test_messages_fit_80_columns(waited: int, layer: str, peers: list[int], who: list[int], they: str) -> None:
    dog, wait = watch(60, 600), Wait(layer, "statistics (Allgather)", peers)
    text = dog.message(wait, waited, who, wait.awaited)
    lines = text.splitlines()
    assert max(len(line) for line in lines) < 80
    assert all(line.startswith("  ") for line in lines[1:])
    whole = " ".join(line.strip() for line in lines)
    assert f"{they} on a-node-with-quite-a-long-name.cluster.example.org ha" in whole
    assert f" waited {waited} s for {ranks(peers)} in statistics" in whole
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
    assert "the job ends" not in watch(1, abort).message(Wait("", "x", [1], patient=patient), 100, [0], [1])


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


# --- ranks that diverge --------------------------------------------------------------------------


def test_divergence_is_told_from_the_fewest_to_the_most() -> None:
    said = {rank: Doing("statistics (Allgather) of bn2", 96) for rank in (0, 1, 3, 5)}
    said |= {2: Doing("gradient allreduce of conv1", 4096), 4: Doing("forward exchange of fc", 0)}
    assert describe(said, 8).splitlines()[:-1] == [
        "the ranks do not do the same:",
        "  rank 2 calls gradient allreduce of conv1, 4096 B",
        "  rank 4 calls forward exchange of fc",
        "  ranks 0, 1, 3, 5 call statistics (Allgather) of bn2, 96 B",
        "  ranks 6, 7 do not answer",
    ]


def test_divergence_of_many_ranks_fits_80_columns() -> None:
    said = {rank: Doing(f"backward exchange of {'encoder.' * (9 + rank % 2)}conv", 2**40) for rank in range(200)}
    lines = describe(said, 999).splitlines()
    assert max(map(len, lines)) < 80
    assert " ".join(line.strip() for line in lines).count(", ".join(map(str, range(1, 200, 2)))) == 1


@pytest.mark.parametrize("text", ["statistics of bn", "Verlustfläche der Größe", "x" * 239 + "ß", ""])
def test_what_a_rank_says_arrives(text: str) -> None:
    message = Doing(text, 2**40 + 1).pack()
    assert len(message) == LENGTH
    found = Doing.unpack(message)
    assert found.nbytes == 2**40 + 1
    assert found.text[:239] == text[:239]
    assert found.pack()[:200] == message[:200]


# --- several ranks of one host --------------------------------------------------------------------------------


def host(count: int, stall: float = 10, abort: float = 100) -> list[Watch]:
    """The watches of ranks 10, 11, ... of one host, with a board."""
    page, dogs = bytearray(4096), []
    for place in range(count):
        dogs.append(watch(stall, abort))
        dogs[-1]._rank, dogs[-1]._host = 10 + place, "node"
        dogs[-1].board = Board(page, range(10, 10 + count), place)
    return dogs


def said(dogs: list[Watch], now: float) -> list[str]:
    """The messages at time `now`, up to what they wait in; the ranks have looked before."""
    for dog in dogs:
        dog.look(-math.inf)
    found = [dog.look(now) for dog in dogs]
    return [" ".join(text[0].split()).removeprefix("hpctrain: ").split(";")[0] for text in found if text is not None]


def wait_in(dog: Watch, wait: Wait, since: float = 0.0) -> None:
    dog.now, wait.since = wait, since


def test_ranks_in_one_collective_say_so_once_and_name_the_missing() -> None:
    dogs, everyone = host(5), range(10, 15)
    for i in (0, 1, 3, 4):
        wait_in(dogs[i], Wait("bn", "statistics", [r for r in everyone if r != 10 + i], everyone), since=i % 3)
    assert said(dogs, 11.5) == ["ranks 10, 11, 13, 14 on node have waited 12 s for rank 12 in statistics of bn"]
    assert said(dogs, 12.5) == []
    (ending,) = said(dogs, 100.0)
    assert ending.startswith("error: ranks 10, 11, 13, 14 on node have waited 100 s for rank 12 in")


def test_ranks_of_other_hosts_stay_among_the_missing() -> None:
    dogs, everyone = host(2), range(8, 14)
    for i in (0, 1):
        wait_in(dogs[i], Wait("bn", "statistics", [r for r in everyone if r != 10 + i], everyone))
    assert said(dogs, 10) == ["ranks 10, 11 on node have waited 10 s for ranks 8, 9, 12, 13 in statistics of bn"]


def test_collective_that_all_are_in_names_all() -> None:
    dogs = host(2)
    for i in (0, 1):
        wait_in(dogs[i], Wait("bn", "statistics", [11 - i], [10, 11]))
    assert said(dogs, 10) == ["ranks 10, 11 on node have waited 10 s for rank 11 in statistics of bn"]


def test_ranks_in_different_collectives_are_told_apart() -> None:
    dogs = host(4)
    for i, pair in ((0, [10, 11]), (2, [12, 13]), (3, [12, 13])):
        wait_in(dogs[i], Wait("bn", "statistics", [r for r in pair if r != 10 + i], pair))
    wait_in(dogs[1], Wait("conv", "gradient allreduce", [10], [10, 11]))
    texts = said(dogs, 10)
    assert "rank 10 on node has waited 10 s for rank 11 in statistics of bn" in texts
    assert "rank 11 on node has waited 10 s for rank 10 in gradient allreduce of conv" in texts
    assert len(texts) == 3


def test_in_a_chain_of_exchanges_only_the_neighbour_of_the_idle_rank_speaks() -> None:
    dogs, everyone = host(5), range(10, 15)
    for i in range(4):  # rank 14 computes; the others wait for their neighbours
        wait_in(dogs[i], Wait("conv", "forward exchange", [r for r in (9 + i, 11 + i) if r in everyone], everyone))
    assert said(dogs, 10) == ["rank 13 on node has waited 10 s for rank 14 in forward exchange of conv"]
    wait_in(dogs[4], Wait("conv9", "backward exchange", [13], everyone))
    assert len(said(dogs, 25)) == 5  # all wait: each says for whom


def test_job_ends_although_the_rank_that_was_to_say_so_does_not() -> None:
    dogs = host(3)
    for i in (0, 1):
        wait_in(dogs[i], Wait("bn", "statistics", [r for r in (10, 11, 12) if r != 10 + i], (10, 11, 12)), since=-i)
        dogs[i].look(-math.inf)
    assert dogs[0].look(100.5) is None  # rank 11 waits for longer
    found = dogs[0].look(104)
    assert found is not None
    assert found[1]


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
