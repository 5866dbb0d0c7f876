"""What a run says its steps took, and how far off the prediction was."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpctrain import reckoning
from hpctrain.errors import ConfigError
from hpctrain.machine import Machine, Storage
from hpctrain.metrics import MetricsFile
from hpctrain.reckoning import PHASES, WARMING, Clock, Forecast, Steps, error, record, slowest, summary, table, write


class Bench:
    """A clock on a run whose phases take what a test says; time passes only there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, apart: bool = False) -> None:
        self.time = 100.0
        monkeypatch.setattr(reckoning, "perf_counter", lambda: self.time)
        self.seconds = {"compute": 7.0, "exchange": 7.0, "allreduce": 7.0}  # of an evaluation before, say
        self.executor: Any = SimpleNamespace(seconds=self.seconds, bytes_sent=lambda: 12)
        self.feed: Any = SimpleNamespace(seconds=3.0)
        together: Any = SimpleNamespace(apart=apart, seconds=0.5, waited=0.25)
        self.clock = Clock(self.executor, self.feed, together, batch=10)

    def step(self, *seconds: float) -> None:
        """A step that takes so long in each of PHASES."""
        self.clock.begin_step()
        for phase, spent in zip(PHASES, seconds, strict=True):
            self.time += spent
            if phase in self.seconds:
                self.seconds[phase] += spent
            elif phase == "input":
                self.feed.seconds += spent
        self.clock.end_step()


def test_mean_of_steps_leaves_out_those_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}, 1 case")
    draw, bench = random.Random(seed), Bench(monkeypatch)
    every = [[draw.uniform(0.01, 1) for _ in PHASES] for _ in range(WARMING + 17)]
    for i, taken in enumerate(every):
        bench.step(*taken)
        bench.time += 50  # a checkpoint, an evaluation
        bench.seconds["compute"] += 40 * (i % 3)
    found = bench.clock.steps(4)
    assert (found.rank, found.count) == (4, 17)
    for i, spent in enumerate(found.seconds):
        assert spent == pytest.approx(sum(taken[i] for taken in every[WARMING:]) / 17)
    assert found.step == pytest.approx(sum(map(sum, every[WARMING:])) / 17)


@pytest.mark.parametrize(("made", "counted"), [(1, 1), (2, 1), (3, 2), (4, 1)])
def test_short_runs_count_what_they_have(monkeypatch: pytest.MonkeyPatch, made: int, counted: int) -> None:
    """But for the very first step, where there is another."""
    bench = Bench(monkeypatch)
    for i in range(made):
        bench.step(100.0 if i == 0 else 2.0, 0, 0, 0, 1)
    found = bench.clock.steps(0)
    assert found.count == counted
    assert found.step == pytest.approx(101 if made == 1 else 3)


def test_no_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    none = Bench(monkeypatch).clock.steps(0)
    assert none.count == 0
    assert slowest([none, none]) is None
    assert slowest([none, Steps(1, 2, (1.0,) * 5)]) == Steps(1, 2, (1.0,) * 5)


def test_epoch_counts_from_where_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(monkeypatch, apart=True)
    bench.clock.begin_epoch(5)
    bench.clock.count(5)
    assert bench.clock.rate is None
    for step in (6, 7):
        bench.step(1, 0.5, 0.25, 0.125, 0.125)
        bench.clock.count(step)
    expected = {"compute_seconds": 2, "exchange_seconds": 1, "allreduce_seconds": 0.5, "input_seconds": 0.25}
    idle = {"sync_seconds": 0, "waited_seconds": 0, "bytes_sent": 0}
    assert bench.clock.epoch() == {"seconds": 4, "samples_per_second": 5, **expected, **idle}
    bench.clock.begin_epoch(7)
    assert bench.clock.epoch()["seconds"] == 0


def test_the_slowest_rank_is_the_one_that_computes_longest() -> None:
    """Not the one that waits longest for it."""
    waiting, computing = Steps(0, 9, (1.0, 5.0, 0.0, 0.0, 0.0)), Steps(1, 9, (4.0, 1.5, 0.0, 0.0, 0.0))
    assert slowest([waiting, computing]) is computing
    assert slowest([waiting, Steps(1, 9, waiting.seconds)]) is waiting


MEASURED = Steps(1, 97, (0.08, 0.002, 0.0001, 0.004, 0.0139))
FORECAST = Forecast((0.084, 0.001, 0.0002, 0.0, 0.0148), "by measurements of machine.json")


def test_error_is_a_share_of_what_was_measured() -> None:
    assert error(0.11, 0.1) == pytest.approx(0.1)
    assert error(0.05, 0.1) == pytest.approx(-0.5)
    assert summary(MEASURED, FORECAST) == {
        "step_seconds": pytest.approx(0.1),
        "predicted_seconds": pytest.approx(0.1),
        "error": pytest.approx(0),
    }
    assert summary(MEASURED, None) == {"step_seconds": pytest.approx(0.1), "predicted_seconds": None, "error": None}


def test_table_has_both_and_no_error_of_what_does_not_matter() -> None:
    assert table(MEASURED, 2, FORECAST) == [
        "a step in milliseconds, mean of 97, of rank 1, which computes longest:",
        "              measured  predicted    error",
        "  compute         80.0       84.0     +5 %",
        "  exchange        2.00       1.00    -50 %",
        "  allreduce       0.10       0.20        -",
        "  input           4.00       0.00   -100 %",
        "  other           13.9       14.8     +6 %",
        "  step             100        100     +0 %",
        "predicted by measurements of machine.json",
    ]


def test_table_without_prediction() -> None:
    lines = table(Steps(0, 1, (0.08, 0.0, 0.0, 0.004, 0.0139)), 1, None)
    assert lines[0] == "a step in milliseconds, the only one:"
    assert [line.split() for line in lines[1:]] == [
        ["compute", "80.0"],
        ["exchange", "0.00"],
        ["allreduce", "0.00"],
        ["input", "4.00"],
        ["other", "13.9"],
        ["step", "97.9"],
    ]


@pytest.mark.parametrize("forecast", [FORECAST, None])
def test_run_folder_has_all_figures(tmp_path: Path, forecast: Forecast | None) -> None:
    write(tmp_path, MEASURED, forecast)
    found = json.loads((tmp_path / "prediction.json").read_text())
    assert found["measured"] == pytest.approx(dict(zip(PHASES, MEASURED.seconds, strict=True)) | {"step": 0.1})
    assert (found["rank"], found["steps"]) == (1, 97)
    if forecast is None:
        assert (found["predicted"], found["source"], found["error"]) == (None, None, None)
    else:
        assert found["predicted"]["exchange"] == 0.001
        assert found["source"] == FORECAST.source
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write("prediction", step=3, **record(MEASURED, forecast))
    file.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["input_seconds"] == 0.004
    assert line["predicted_compute_seconds"] == (0.084 if forecast else None)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent/prediction\.json: cannot be written: .*; free space"):
        write(tmp_path / "absent", MEASURED, FORECAST)


def test_forecast_has_the_phases_of_the_executor() -> None:
    """Which times what norms gather as part of what they compute."""
    waiting = {"halo": 1.0, "redistribution": 2.5, "allreduce": 3.0, "input": 0.125}
    phases = {"compute": 8.0, **waiting, "update": 0.25, "step": 0.5}
    layers = [SimpleNamespace(statistics=0.25), SimpleNamespace(statistics=0.0)]
    cost: Any = SimpleNamespace(phases=lambda: phases, parts=2, layers=layers)
    found = Forecast.of(cost, Machine(storage=Storage(read=1e9, write=1e9)), "by guess")
    assert found.seconds == (8.5, 3.0, 3.0, 0.125, 0.75)
    assert found.step == sum(phases.values())


def test_what_the_machine_does_not_know_is_not_predicted() -> None:
    """A file without storage says nothing of how long reading takes, not that it takes no time."""
    phases = dict.fromkeys(("compute", "halo", "redistribution", "allreduce", "input", "update", "step"), 0.01)
    cost: Any = SimpleNamespace(phases=lambda: phases, parts=1, layers=[])
    found = Forecast.of(cost, Machine(), "by guess")
    assert found.seconds == (0.01, 0.02, 0.01, None, 0.02)
    assert found.step == pytest.approx(0.06)
    assert table(MEASURED, 2, found)[5] == "  input           4.00          -        -"
    assert record(MEASURED, found)["predicted_input_seconds"] is None
