"""`hpctrain plan`: how to cut each layer, over how many ranks, and what that will take. Starts no MPI."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpctrain import launch, planning
from hpctrain.comm.launchers import launched
from hpctrain.console import Console, print_json, wrapped
from hpctrain.data.files import write_atomic
from hpctrain.errors import ConfigError, LaunchError, PlanError
from hpctrain.memory import mib
from hpctrain.plan_arguments import Options
from hpctrain.planner import paper, scaling, trace
from hpctrain.planner.baselines import baselines, by_hand, grids
from hpctrain.planner.cost import price
from hpctrain.planner.scaling import Scaling, Step
from hpctrain.planner.search import Found
from hpctrain.planner.seconds import PlanCost
from hpctrain.planner.simulate import simulate
from hpctrain.planning import Task
from hpctrain.report import layers, plot, totals
from hpctrain.report import scaling as scalings
from hpctrain.request import RunRequest

COMPARED = ("data", "domain")
"""The baselines that a sweep shows."""

PATIENCE = 3
"""After how many numbers of ranks in a row that are slower than the fastest no larger one is tried, without --sweep."""

Records = list[dict[str, Any]]


def run(request: RunRequest, options: Options) -> int:
    """Print what the options ask for; the last line before the JSON says how to run the plan."""
    if (by := launched(os.environ)) is not None and by.size > 1:
        line = shlex.join([*launch.program(), *sys.argv[1:]])
        raise LaunchError(f"{by.name} started {by.size} processes, but a plan is made by one, without MPI:\n{line}")
    if options.batch is not None:
        request.overrides.append(f"train.batch={options.batch}")
    if options.plot is not None:
        plot.require(options.plot)
    config = request.load()
    task = planning.task(config, options.machine, options.memory, str(request.path))
    print(wrapped(f"{_what(task)}; {task.chosen}"))
    records = list_grids(task, options) if options.grids else Planning(task, options, request).run()
    if options.json:
        about = {"network": config.model.name, "batch": task.batch, "plan_for": task.chosen.name, "per": options.per}
        print_json("plan", [about | record for record in records])
    return 0


def _what(task: Task) -> str:
    train = task.config.train
    shape = " x ".join(map(str, task.data.x_shape))
    parts = f" in {train.accumulate} parts" if train.accumulate > 1 else ""
    return f"{Path(task.config.model.name).name}, batches of {task.batch}{parts} of {shape}, {train.precision}"


def _say(text: str) -> None:
    print(wrapped(text))


def _show(lines: Iterable[str]) -> None:
    print("\n".join(lines))


# --- grids -----------------------------------------------------------------------------------------------------------


def list_grids(task: Task, options: Options) -> Records:
    """Every Pr x Pc of so many ranks that is the same for all layers, by either accounting."""
    ranks, epoch = options.ranks or 1, options.per == "epoch"
    if options.accounting == "paper":
        steps = task.data.samples / task.batch if epoch else 1.0
        by, overlap = paper.conv_by(task.setting.only), task.setting.overlap is True
        found = paper.grids(task.graph, task.machine, ranks, by, overlap)
        records = [totals.paper_record(record.times(steps)) for record in found]
    else:
        whole = task.steps if epoch else 1
        records = [totals.grid_record(grid, cost, whole) for grid, _, cost in grids(task.graph, task.setting, ranks)]
    if not records:
        raise PlanError(f"no grid of {ranks} ranks for batches of {task.batch}; give a larger --batch, or fewer ranks")
    _say(f"all grids of {ranks} rank{'s' * (ranks > 1)}, by the {options.accounting}'s accounting")
    print()
    _show(totals.grid_table(records, options.per))
    return [{"ranks": ranks, "accounting": options.accounting} | record for record in records]


# --- plan ------------------------------------------------------------------------------------------------------------


class Planning:
    """The search on one number of ranks or several, and what is said of it."""

    def __init__(self, task: Task, options: Options, request: RunRequest) -> None:
        self.task, self.options, self.request = task, options, request
        self.found: dict[int, Found] = {}
        """By number of ranks."""
        self.times = task.steps if options.per == "epoch" else 1
        """Steps that records are of."""

    def run(self) -> Records:
        """Print all of it; returns the records."""
        options = self.options
        if options.ranks is not None and options.sweep is None:
            return self._plan(options.ranks, "as asked")
        scaled = self._scale()
        others = self._others(scaled)
        if options.sweep is not None:
            print()
            _show(scalings.table(scaled, others, self.task.machine))
            print()
        if options.plot is not None:
            title = f"{_what(self.task)}; {self.task.chosen.name}"
            plot.scaling(options.plot, scaled, others, title)
            _say(f"scaling drawn in {options.plot}")
        records = scalings.records(scaled, others, self.task.machine, self.times)
        if options.ranks is not None:
            return records + self._plan(options.ranks, "as asked")
        return records + self._plan(scaled.chosen.ranks, scaled.why)

    def _search(self, ranks: int) -> Found:
        if ranks not in self.found:
            self.found[ranks] = self.task.search(ranks)
        return self.found[ranks]

    def _scale(self) -> Scaling:
        """The best number of ranks: of the sweep's, or of those that the machine has."""
        task, objective = self.task, self.options.objective or self.task.config.plan.objective
        scaling.require(objective, task.machine)
        first, last = self.options.sweep or (1, self._most())
        task.machine.layout(last)  # refuses what the machine does not have
        tried = scaling.counts(first, last, None if self.options.sweep else task.machine.per_host)
        with Console(0).progress(len(tried), "planning") as bar:

            def step(ranks: int) -> Step:
                try:
                    return _step(self._search(ranks).cost)
                finally:
                    bar.advance(text=f"{ranks} ranks")

            patience = None if self.options.sweep else PATIENCE
            return scaling.how_many(step, tried, task.batch, objective, task.machine, patience=patience)

    def _most(self) -> int:
        most = self.task.chosen.most_ranks
        if most is None:
            raise ConfigError(
                f"{self.task.chosen.name}: its file does not say how many ranks it has; give --ranks N or "
                "--sweep 1..N, or add hosts and per_host to it"
            )
        return most

    def _others(self, scaled: Scaling) -> dict[str, dict[int, float]]:
        """{baseline: {ranks: seconds of a step}}, where the options show it."""
        if self.options.sweep is None and self.options.plot is None:
            return {}
        task, found = self.task, dict[str, dict[int, float]]()
        for name in COMPARED:
            found[name] = {}
            for ranks in (point.ranks for point in scaled.points):
                plan = by_hand(task.graph, task.setting, ranks)[name]
                if not isinstance(plan, str):
                    found[name][ranks] = price(task.graph, plan, task.setting, ranks).seconds
        return found

    def _plan(self, ranks: int, why: str) -> Records:
        """The plan on so many ranks: its layers, what it takes and why no other is better, and the line to paste."""
        task, options = self.task, self.options
        found = self._search(ranks)
        plan, cost = found.plan, found.cost
        sources, need = task.sources(plan, ranks), task.memory(plan, ranks)
        others = baselines(task.graph, task.setting, ranks)
        _say(f"{ranks} rank{'s' * (ranks > 1)}: {why}")
        print()
        _show(layers.table(cost, options.every))
        print()
        _show(totals.beside(cost, others))
        print()
        _say(f"{totals.phases(cost)}; {totals.rates(cost, task.batch, task.data.samples)}")
        for line in _spent(task, ranks, cost):
            _say(line)
        _say(totals.shares(cost, sources))
        limit = task.limit(ranks)
        _say(f"memory of a rank: {need}{f', of {mib(int(limit))}' if limit else ''}")
        _say(_proof(found))
        if plan.ranks < ranks:
            _say(f"the plan uses {plan.ranks} of the {ranks} ranks; the others idle")
        if task.chosen.here and (most := task.chosen.most_ranks) is not None and ranks > most:
            _say(f"{ranks} ranks would share the {most} cores of this machine: times are those of a core for each")
        for note in (*found.notes, *plan.notes):
            _say(note)
        if options.trace is not None:
            timeline = simulate(task.graph, plan, task.setting, ranks=ranks)
            trace.write(timeline, options.trace)
            taken = layers.seconds(timeline.seconds)
            _say(f"a step simulated, of {taken}, in {options.trace}: open it at https://ui.perfetto.dev")
        if options.out is not None:
            write_atomic(options.out, plan.to_json().encode())
            _say(f"plan written to {options.out}")
        print(self._line_to_paste(ranks))
        about = {"ranks": ranks, "memory_bytes": need.total, "bound_seconds": self.times * found.bound}
        about |= {"gap": found.gap, "search_seconds": found.seconds, "candidates": found.candidates}
        by_layer = layers.records(cost, self.times, sources)
        return [
            *({"ranks": ranks} | record for record in by_layer),
            *(about | record for record in totals.records(cost, others, self.times)),
        ]

    def _line_to_paste(self, ranks: int) -> str:
        """Runs the plan: by mpirun or srun here, by srun on another machine."""
        options = self.options
        words = ["train", *(word for word in self.request.words[1:] if not word.startswith("plan.grid="))]
        if options.batch is not None:
            words.append(f"train.batch={options.batch}")
        words.append(f"plan.grid={options.out or 'auto'}")
        if options.out is None and options.machine is not None:
            words.append(f"plan.machine={options.machine}")
        if self.task.chosen.here:
            return launch.command_line(ranks, words)
        return shlex.join(["srun", "-n", str(ranks), "hpctrain", *words])


def _step(cost: PlanCost) -> Step:
    return Step(cost.seconds, cost.compute + cost.update)


def _spent(task: Task, ranks: int, cost: PlanCost) -> Iterable[str]:
    """Energy and price, where the machine's file knows them."""
    machine = task.machine
    if machine.power is not None:
        joules = scaling.joules(ranks, _step(cost), machine.power)
        yield f"energy: {layers.number(joules)} J a step, {layers.number(joules / task.batch)} J a sample"
    if machine.price:
        yield f"price: {ranks * machine.price * cost.seconds / scaling.HOUR:.3g} a step"


def _proof(found: Found) -> str:
    return (
        f"no plan by {found.candidates:,} partitions of layers takes less than {layers.seconds(found.bound)} before "
        f"overlap; this one is {100 * found.gap:.2g} % above that (found in {layers.seconds(found.seconds)})"
    )
