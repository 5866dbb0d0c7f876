"""`hpctrain plan`: how to cut each layer, over how many ranks, and what that will take. Starts no MPI."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain import launch, planning
from hpctrain.console import Console, print_json, wrapped
from hpctrain.data.files import write_atomic
from hpctrain.errors import ConfigError, PlanError
from hpctrain.memory import mib
from hpctrain.plan_arguments import AUTO
from hpctrain.planner import paper, scaling, simulate, trace
from hpctrain.planner.baselines import baselines, grids
from hpctrain.planner.scaling import Scaling, Step
from hpctrain.planner.search import Found
from hpctrain.planning import Task
from hpctrain.report import layers, plot, totals
from hpctrain.report import scaling as scalings
from hpctrain.request import RunRequest

COMPARED = ("data", "best uniform grid")
"""The baselines that a sweep shows."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for besides the config; None leaves it to the config or the machine."""

    machine: str | None = None
    ranks: int | None = None
    """None: the best number."""
    batch: int | None = None
    sweep: tuple[int, int] | None = None
    objective: str | None = None
    memory: float | None = None
    """GiB."""
    grids: bool = False
    per: str = "step"
    accounting: str = "model"
    trace: Path | None = None
    plot: Path | None = None
    all: bool = False
    out: Path | None = None
    json: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Those of a command line. Raises ConfigError where two do not go together."""
        found = cls(
            args.machine,
            None if args.ranks in (None, AUTO) else args.ranks,
            args.batch,
            args.sweep,
            args.objective,
            args.memory,
            args.grids is not None,
            args.per,
            args.accounting,
            args.trace,
            args.plot,
            args.all,
            args.out,
            args.json,
        )
        found.check()
        return found

    def check(self) -> None:
        """Raises ConfigError where two options do not go together, or a file cannot be written."""
        if self.grids:
            for given, name in (
                (self.sweep, "--sweep"),
                (self.trace, "--trace"),
                (self.plot, "--plot"),
                (self.out, "-o"),
            ):
                if given:
                    raise ConfigError(f"{name} has no effect with --grids, which lists grids; leave one of them out")
            if self.ranks is None:
                raise ConfigError("--grids all: of how many ranks? give --ranks N")
        elif self.accounting == "paper":
            raise ConfigError("--accounting paper prices grids: give --grids all with it")
        if self.plot is not None:
            if self.ranks is not None and self.sweep is None:
                raise ConfigError("--plot draws scaling: give --sweep 1..N with it, or leave out --ranks")
            plot.require(self.plot)
        for path, name in ((self.trace, "--trace"), (self.out, "-o")):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"{name} {path}: there is no folder {path.absolute().parent}; make it first")


def run(request: RunRequest, options: Options) -> int:
    """Print the plan, or what was asked for instead; the last line before the JSON says how to run it."""
    if options.batch is not None:
        request.overrides.append(f"train.batch={options.batch}")
    config = request.load()
    task = planning.task(config, options.machine, options.memory)
    records = list_grids(task, options) if options.grids else Report(task, options, request).run()
    if options.json:
        about = {"network": config.model.name, "batch": task.batch, "machine": task.chosen.name, "per": options.per}
        print_json("plan", [about | record for record in records])
    return 0


# --- grids -----------------------------------------------------------------------------------------------------------


def list_grids(task: Task, options: Options) -> list[dict[str, Any]]:
    """Every grid of so many ranks that is the same for all layers."""
    ranks = options.ranks or 1
    epoch = options.per == "epoch"
    if options.accounting == "paper":
        by = paper.conv_by(task.setting.only)
        times = task.data.samples / task.batch if epoch else 1.0
        found = [record.times(times) for record in paper.grids(task.graph, task.machine, ranks, by)]
        records = [
            {
                name: getattr(r, name)
                for name in ("pr", "pc", "compute_seconds", "model_seconds", "batch_seconds", "seconds")
            }
            for r in found
        ]
    else:
        times = task.steps if epoch else 1
        records = [
            totals.grid_records(plan.partition.pr, plan.partition.pc, cost, times)
            for plan, cost in grids(task.graph, task.setting, ranks)
        ]
    if not records:
        raise PlanError(f"no grid of {ranks} ranks: train.batch = {task.batch}; give a larger batch, or fewer ranks")
    print(wrapped(f"{_what(task)}, on {ranks} ranks of {task.chosen}; {options.accounting}'s accounting"))
    _print(totals.grid_table(records, options.per))
    return [{"ranks": ranks, "accounting": options.accounting} | record for record in records]


def _what(task: Task) -> str:
    config = task.config
    shape = " x ".join(map(str, task.data.x_shape))
    parts = f" in {config.train.accumulate} parts" if config.train.accumulate > 1 else ""
    return f"{config.model.name}, batches of {task.batch}{parts} of {shape}, {config.train.precision}"


def _print(lines: Iterable[str]) -> None:
    print("\n".join(lines))


# --- plan ------------------------------------------------------------------------------------------------------------


@dataclass
class Report:
    """One run of the command: what was found on each number of ranks, and what is said of it."""

    task: Task
    options: Options
    request: RunRequest
    console: Console = field(default_factory=lambda: Console(0))
    found: dict[int, Found] = field(default_factory=dict)
    """By number of ranks."""

    def run(self) -> list[dict[str, Any]]:
        """Print all that is asked for; returns the records."""
        options, task = self.options, self.task
        times = task.steps if options.per == "epoch" else 1
        print(wrapped(f"{_what(task)}; {task.chosen}"))
        records: list[dict[str, Any]] = []
        if options.sweep is not None or options.ranks is None:
            scaled = self._scaled()
            others = self._others(scaled)
            if options.sweep is not None:
                _print(scalings.table(scaled, others, task.machine))
                print()
            records += scalings.records(scaled, others, task.machine, times)
            if options.plot is not None:
                self._plot(scaled, others)
            ranks = options.ranks or scaled.chosen.ranks
            why = f": {scaled.why}" if options.ranks is None else ", as asked"
        else:
            ranks, why = options.ranks, ", as asked"
        print(wrapped(f"{ranks} rank{'s' * (ranks > 1)}{why}"))
        return records + self._plan(ranks, times)

    def _search(self, ranks: int) -> Found:
        if ranks not in self.found:
            self.found[ranks] = self.task.search(ranks)
        return self.found[ranks]

    def _scaled(self) -> Scaling:
        """The best number of ranks, of the sweep's, or of as many as the machine has."""
        task, objective = self.task, self.options.objective or self.task.config.plan.objective
        scaling.require(objective, task.machine)
        first, last = self.options.sweep or (1, self._most())
        task.machine.layout(last)  # refuses what the machine does not have
        tried = scaling.counts(first, last, None if self.options.sweep else task.machine.per_host)
        with self.console.progress(len(tried), "planning") as bar:

            def step(ranks: int) -> Step:
                try:
                    cost = self._search(ranks).cost
                finally:
                    bar.advance(text=f"{ranks} ranks")
                return Step(cost.seconds, cost.compute + cost.update)

            return scaling.how_many(step, tried, task.batch, objective, task.machine)

    def _most(self) -> int:
        most = self.task.chosen.most_ranks
        if most is None:
            raise ConfigError(
                f"{self.task.chosen.name}: its file does not say how many ranks it has; give --ranks N or "
                "--sweep 1..N, or add hosts and per_host to it"
            )
        return most

    def _others(self, scaled: Scaling) -> dict[str, dict[int, float]]:
        """{baseline: {ranks: seconds of a step}} for what is shown of a sweep."""
        found: dict[str, dict[int, float]] = {name: {} for name in COMPARED}
        if self.options.sweep is None and self.options.plot is None:
            return {}
        for point in scaled.points:
            priced = baselines(self.task.graph, self.task.setting, point.ranks)
            for name, taken in found.items():
                if not isinstance(other := priced[name], str):
                    taken[point.ranks] = other[1].seconds
        return found

    def _plot(self, scaled: Scaling, others: Mapping[str, Mapping[int, float]]) -> None:
        path = self.options.plot
        if path is not None:
            title = f"{Path(self.task.config.model.name).name}: predicted scaling"
            plot.scaling(path, scaled, others, title, f"{_what(self.task)}; {self.task.chosen.name}")
            print(f"scaling drawn in {path}")

    def _plan(self, ranks: int, times: int) -> list[dict[str, Any]]:
        task, options = self.task, self.options
        found = self._search(ranks)
        plan, cost = found.plan, found.cost
        sources = task.sources(plan, ranks)
        others = baselines(task.graph, task.setting, ranks)
        need = task.memory(plan, ranks)
        print()
        _print(layers.table(cost, options.all))
        print()
        print(
            wrapped(
                f"{totals.phases(cost)}; {layers.number(task.batch / cost.seconds)} samples/s{self._epoch(cost.seconds)}"
            )
        )
        for line in self._besides(ranks, cost):
            print(wrapped(line))
        print(wrapped(totals.shares(cost, sources)))
        limit = f", of {mib(int(task.memory_limit))}" if task.memory_limit else ""
        print(wrapped(f"memory of a rank: {need}{limit}"))
        print(wrapped(_proof(found)))
        for note in (*found.notes, *plan.notes):
            print(wrapped(note))
        print()
        _print(totals.beside(cost, others))
        print()
        records = [{"ranks": ranks} | record for record in layers.records(cost, times, sources)]
        about = {"ranks": ranks, "memory_bytes": need.total, "bound_seconds": times * found.bound, "gap": found.gap}
        about |= {"search_seconds": found.seconds, "candidates": found.candidates}
        records += [about | record for record in totals.records(cost, others, times)]
        self._trace(found, ranks)
        self._out(found, ranks)
        return records

    def _epoch(self, seconds: float) -> str:
        steps = self.task.data.samples // self.task.batch
        return f"; an epoch of {steps:,} steps takes {layers.seconds(steps * seconds)}" if steps else ""

    def _besides(self, ranks: int, cost: Any) -> Iterable[str]:
        """Energy and price, where the machine's file knows them."""
        machine, step = self.task.machine, Step(cost.seconds, cost.compute + cost.update)
        if machine.power is not None:
            yield f"energy: {layers.number(scaling.joules(ranks, step, machine.power))} J a step"
        if machine.price:
            yield f"price: {ranks * machine.price * cost.seconds / scaling.HOUR:.3g} a step"

    def _trace(self, found: Found, ranks: int) -> None:
        if self.options.trace is not None:
            timeline = simulate.simulate(self.task.graph, found.plan, self.task.setting)
            trace.write(timeline, self.options.trace)
            print(f"one step, simulated, in {self.options.trace}: open it at https://ui.perfetto.dev")

    def _out(self, found: Found, ranks: int) -> None:
        """Write the plan where that is asked for; the line that runs it."""
        out = self.options.out
        if out is not None:
            write_atomic(out, found.plan.to_json().encode())
            print(f"plan written to {out}")
        given = [word for word in self.request.words[1:] if not word.startswith("plan.grid=")]
        if self.options.batch is not None:
            given.append(f"train.batch={self.options.batch}")
        words = ["train", *given, f"plan.grid={out or 'auto'}"]
        if out is None and self.options.machine is not None:
            words.append(f"plan.machine={self.options.machine}")
        print(command(self.task, ranks, words))


def _proof(found: Found) -> str:
    rounds = f"{found.rounds} round{'s' * (found.rounds != 1)}"
    return (
        f"no plan of those considered takes less than {layers.seconds(found.bound)}: at most {100 * found.gap:.2g} % "
        f"better than this one; found in {layers.seconds(found.seconds)}, {found.candidates:,} partitions of layers, {rounds}"
    )


def command(task: Task, ranks: int, words: list[str]) -> str:
    """The line to paste that runs it: here, or on a machine that has srun."""
    if task.chosen.here:
        return launch.command_line(ranks, words)
    return shlex.join(["srun", "-n", str(ranks), "hpctrain", *words])
