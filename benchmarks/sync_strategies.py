"""What replicas gain by not waiting for each other, and what that costs: simulated workers, then ranks, one delayed.

python benchmarks/sync_strategies.py [--quick] [--json] [--plot FILE.png]

The findings are those of Jin et al. 2016 (arXiv 1611.04581); it is printed which of them hold here. The plot needs
matplotlib (pip install 'hpctrain[report]').
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from common import print_json, set_threads, warn_of_load
from sync_simulation import STRATEGIES, Digits, Point, Setting, Simulation, doublings, final_loss, time_per_step

from hpctrain import launch
from hpctrain.data.make.digits import make_digits
from hpctrain.data.make.volumes import make_volumes

OUT_OF_STEP = ("elastic", "gossip-pull", "gossip-push")
RATES = {"small": 0.01, "large": 0.1}
DELAY = 4.0
"""Steps' time that the delayed worker of a simulation takes longer."""
SLEEP = 0.2
"""Seconds that the delayed rank sleeps in each step."""


LEARNING = {"mlp": 0.02, "cosmoflow": 0.001}
"""Rates of the real runs."""


def main() -> None:
    """Simulate, measure, judge, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few workers and ranks: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--plot", type=Path, help="write the curves as an image")
    asked = parser.parse_args()
    set_threads(1)
    warn_of_load()
    data, records = Digits.load(), []
    workers = [4, 32] if asked.quick else doublings(128)
    samples, seeds = (12_000, 1) if asked.quick else (80_000, 3)
    losses = simulate(data, workers, samples, seeds)
    records += [
        {"kind": "simulated", "strategy": s, "workers": p, "rate": RATES[r], "loss": loss}
        for (s, p, r), loss in losses.items()
    ]
    delayed = {s: Simulation(Setting(s, 8, RATES["large"], samples, DELAY), data).run() for s in STRATEGIES}
    even = {s: Simulation(Setting(s, 8, RATES["large"], samples), data).run() for s in STRATEGIES}
    show_losses(losses, workers)
    findings = judge(losses, workers) | judge_delay(even, delayed, samples)
    measured = measure(asked.quick)
    records += measured
    findings |= judge_ranks(measured)
    for finding, holds in findings.items():
        print(f"{'holds' if holds else 'DOES NOT HOLD'}: {finding}")
        records.append({"kind": "finding", "finding": finding, "holds": holds})
    if asked.plot:
        plot(asked.plot, losses, workers, even, delayed, measured)
    if asked.json:
        print_json("benchmarks/sync_strategies.py", records)


# --- simulated workers ----------------------------------------------------------------------------------------------

Losses = dict[tuple[str, int, str], float]


def simulate(data: Digits, workers: Sequence[int], samples: int, seeds: int) -> Losses:
    """Final loss, the mean over seeds, by (strategy, workers, rate)."""
    found = {}
    for rate, lr in RATES.items():
        for p in workers:
            for strategy in STRATEGIES:
                setting = Setting(strategy, p, lr, samples)
                curves = [Simulation(replace(setting, seed=seed), data).run() for seed in range(seeds)]
                found[strategy, p, rate] = mean(final_loss(curve) for curve in curves)
    return found


def show_losses(losses: Losses, workers: Sequence[int]) -> None:
    """A table for each rate."""
    for rate, lr in RATES.items():
        print(f"loss after as many samples, simulated, {rate} step size ({lr})")
        print(f"{'workers':<14}" + "".join(f"{p:>10}" for p in workers))
        for strategy in STRATEGIES:
            print(f"{strategy:<14}" + "".join(f"{losses[strategy, p, rate]:>10.4f}" for p in workers))


def judge(losses: Losses, workers: Sequence[int]) -> dict[str, bool]:
    """Findings on convergence by samples."""
    found = {}
    few, many = [p for p in workers if p <= 32], [p for p in workers if p >= 100]
    for rate in RATES:
        for strategy in OUT_OF_STEP:
            held = all(losses[strategy, p, rate] <= 1.02 * losses["allreduce", p, rate] for p in few)
            found[f"{strategy} is no worse than allreduce up to 32 workers, {rate} step size"] = held
        for p in many:
            best = all(losses["allreduce", p, rate] <= losses[s, p, rate] for s in OUT_OF_STEP)
            found[f"allreduce is better than elastic and gossip at {p} workers, {rate} step size"] = best
    gossip = [losses[s, p, "small"] for s in OUT_OF_STEP[1:] for p in workers]
    elastic = [losses["elastic", p, "small"] for p in workers]
    found["gossip is faster than elastic at small step sizes"] = mean(gossip) < mean(elastic)
    return found


def judge_delay(even: dict[str, list[Point]], delayed: dict[str, list[Point]], samples: int) -> dict[str, bool]:
    """What one delayed worker of 8 does to the time of all others' steps. Raises SystemExit: this is arithmetic."""
    setting = Setting("", 8, 0.0, samples)
    print(f"time per step of 8 simulated workers; with one {DELAY:g} steps late")
    times = {}
    for strategy in STRATEGIES:
        a, b = (time_per_step(curves[strategy], setting) for curves in (even, delayed))
        times[strategy] = b - a
        print(f"{strategy:<14}{a:>8.2f}{b:>8.2f}")
    found = {
        "simulated: a delayed worker slows allreduce by its delay": abs(times["allreduce"] - DELAY) < 0.2,
        "simulated: and the others not in elastic and gossip": all(times[s] < 0.1 * DELAY for s in OUT_OF_STEP),
        "simulated: nor with a spare replica": times["backup"] < 0.1 * DELAY,
    }
    if not all(found.values()):
        raise SystemExit(f"the clock of the simulation is wrong: {times}")
    return found


# --- ranks ----------------------------------------------------------------------------------------------------------


def measure(quick: bool) -> list[dict[str, Any]]:
    """Real runs, each with a rank that sleeps and without."""
    found = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_digits(folder / "digits", size=8)
        for ranks in [2] if quick else [2, 4, 8]:
            found += compare(folder, "digits", "mlp", ranks, epochs=1 if quick else 4, batch=96)
        if not quick:
            make_volumes(folder / "volumes", size=16, train=192, test=48)
            for ranks in (2, 4):
                found += compare(folder, "volumes", "cosmoflow", ranks, epochs=2, batch=24)
    return found


def compare(folder: Path, data: str, network: str, ranks: int, epochs: int, batch: int) -> list[dict[str, Any]]:
    """All strategies on one data set and number of ranks."""
    print(f"{network} on {data}, {ranks} ranks: ms of a step of rank 0; with the last rank {1000 * SLEEP:g} ms late")
    found = []
    for strategy in STRATEGIES:
        words = [f"sync.strategy={strategy}", f"train.epochs={epochs}", f"train.batch={batch}"]
        words += [f"plan.grid={{batch={ranks}}}"] if strategy == "allreduce" else []
        words += ["sync.spare=1"] if strategy == "backup" else []
        words += [f"sync.period={4}"] if strategy == "local" else []
        late = [f"debug.delay_rank={ranks - 1}", f"debug.delay_seconds={SLEEP}"]
        record: dict[str, Any] = {"kind": "ranks", "strategy": strategy, "network": network, "ranks": ranks}
        for name, more in (("seconds", []), ("delayed_seconds", [*late, "train.steps=12"])):
            epoch = run(folder, data, network, ranks, [*words, *more])
            record[name] = (epoch["seconds"] - epoch.get("waited_seconds", 0.0)) / epoch["steps"]
            record |= {key: epoch[key] for key in ("test_loss", "test_accuracy") if key in epoch and not more}
        result = record.get("test_accuracy", record.get("test_loss"))
        print(f"{strategy:<14}{1000 * record['seconds']:>9.1f}{1000 * record['delayed_seconds']:>9.1f}{result:>10.4f}")
        found.append(record)
    return found


def run(folder: Path, data: str, network: str, ranks: int, words: Sequence[str]) -> dict[str, Any]:
    """The last epoch's record of a run, and how many steps it had. Raises RuntimeError where it fails."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        config = Path(place, "run.toml")
        config.write_text(
            f'[model]\nname = "{network}"\n[data]\ntrain = "{folder}/{data}/train"\ntest = "{folder}/{data}/test"\n'
            f"[optim]\nlr = {LEARNING[network]}\nmomentum = 0.9\nnesterov = true\n[train]\nepochs = 1\nbatch = 1\n"
            f'[run]\nfolder = "{place}/run"\n'
        )
        mpirun, kind = launch.find_mpirun()
        program = [*launch.module(), "train", str(config), *words]
        command, env = launch.compose(ranks, program, mpirun, kind, os.environ, launch.cores())
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
        lines = Path(place, "run", "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    epochs = [record for record in records if record["event"] in ("epoch", "end")]
    before = epochs[-2]["step"] if len(epochs) > 1 else 0
    return epochs[-1] | {"steps": epochs[-1]["step"] - before}


def judge_ranks(measured: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """What a rank that sleeps does to rank 0."""
    slower = {(m["strategy"], m["network"], m["ranks"]): m["delayed_seconds"] - m["seconds"] for m in measured}
    return {
        "ranks: a delayed one slows allreduce by its delay": all(
            seconds > 0.8 * SLEEP for (strategy, *_), seconds in slower.items() if strategy == "allreduce"
        ),
        "ranks: and the others not in elastic and gossip": all(
            seconds < 0.3 * SLEEP for (strategy, *_), seconds in slower.items() if strategy in OUT_OF_STEP
        ),
        "ranks: nor with a spare replica": all(
            seconds < 0.3 * SLEEP for (strategy, *_), seconds in slower.items() if strategy == "backup"
        ),
    }


# --- the plot -------------------------------------------------------------------------------------------------------


def plot(
    path: Path,
    losses: Losses,
    workers: Sequence[int],
    even: dict[str, list[Point]],
    delayed: dict[str, list[Point]],
    measured: Sequence[dict[str, Any]],
) -> None:
    """Loss by samples, by time with one delayed worker, by workers; and seconds of a step of ranks."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for i, strategy in enumerate(STRATEGIES):
        curve, late, colour = even[strategy], delayed[strategy], f"C{i}"
        axes[0, 0].plot([p.samples for p in curve], [p.loss for p in curve], colour, label=strategy)
        axes[0, 1].plot([p.time for p in late], [p.loss for p in late], colour, label=strategy)
        for rate, style in (("large", "-"), ("small", "--")):
            values = [losses[strategy, p, rate] for p in workers]
            axes[1, 0].plot(workers, values, colour + style, marker="o", label=strategy if rate == "large" else None)
    axes[0, 0].set(title="8 simulated workers", xlabel="samples", ylabel="loss of the mean", yscale="log")
    axes[0, 1].set(title=f"one worker {DELAY:g} steps late", xlabel="time (steps)", yscale="log")
    fast = max(point.time for point in even["allreduce"])
    axes[0, 1].set_xlim(0, 2 * fast)
    title = f"loss after all samples, step size {RATES['large']}; dashed {RATES['small']}"
    axes[1, 0].set(title=title, xlabel="simulated workers", yscale="log")
    axes[1, 0].set_xscale("log", base=2)
    cases = list(dict.fromkeys((m["network"], m["ranks"]) for m in measured))
    width = 0.8 / len(STRATEGIES)
    for i, strategy in enumerate(STRATEGIES):
        mine = [m for m in measured if m["strategy"] == strategy]
        at = np.arange(len(cases)) + (i - len(STRATEGIES) / 2 + 0.5) * width
        axes[1, 1].bar(at, [1000 * m["delayed_seconds"] for m in mine], width, color=f"C{i}", alpha=0.4)
        axes[1, 1].bar(at, [1000 * m["seconds"] for m in mine], width, color=f"C{i}", label=strategy)
    axes[1, 1].set_xticks(range(len(cases)), [f"{network}\n{ranks} ranks" for network, ranks in cases])
    title = f"step of rank 0 (ms), real runs; pale: last rank {1000 * SLEEP:g} ms late"
    axes[1, 1].set(title=title)
    for axis in axes.flat:
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    print(f"plot written to {path}")


if __name__ == "__main__":
    sys.exit(main())
