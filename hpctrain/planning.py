"""From a config to a plan that is searched for: on which machine, with what setting, within which memory. No MPI."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from hpctrain import launch, machine, prepare
from hpctrain.config import Config
from hpctrain.data.dataset import Dataset
from hpctrain.errors import ConfigError
from hpctrain.graph import Graph
from hpctrain.machine import Machine
from hpctrain.memory import host_room
from hpctrain.partition import Partition, extent
from hpctrain.planner import limits, memory
from hpctrain.planner.compute import Pricer
from hpctrain.planner.cost import at_once
from hpctrain.planner.layout import layouts
from hpctrain.planner.memory import Memory
from hpctrain.planner.plan import Plan
from hpctrain.planner.schedule import schedule
from hpctrain.planner.search import Found, search
from hpctrain.planner.setting import Setting
from hpctrain.prepare import Described

SECONDS = 30.0
"""How long a search may take, besides what is needed for any plan at all."""


# --- which machine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """A machine to plan for."""

    machine: Machine
    name: str
    """As a person calls it: a name, a file, or "this machine"."""
    here: bool
    """Whether it is the one that this process runs on."""

    def __str__(self) -> str:
        found = self.machine
        kernels = f"{len(found.kernels)} layers measured" if found.kernels else "layers by formula"
        what = "measured" if found.library else "figures of"
        return f"{self.name}{f', {what} {found.date}' if found.date else ''}, {kernels}"

    @property
    def most_ranks(self) -> int | None:
        """How many ranks it has, as far as anyone knows: by its file, or here the cores of this host."""
        found = self.machine
        if found.hosts is not None and found.per_host is not None:
            return found.hosts * found.per_host
        return found.per_host or launch.cores() if self.here and found.hosts in (None, 1) else None


def choose_machine(config: Config, named: str | None = None, path_of_config: str = "CONFIG.toml") -> Chosen:
    """The machine that `named` or plan.machine names, else this one as it was calibrated.

    Raises ConfigError, with the line that measures this one, where there is none, or where its file does not say how
    fast a rank computes.
    """
    asked = named or config.plan.machine
    if asked is not None:
        found = machine.named(asked)
        _require_figures(found, f"machine {asked}", measure(path_of_config, asked if asked.endswith(".json") else None))
        return Chosen(found, found.name or asked, asked not in machine.shipped() and _same(asked))
    path = machine.default_path()
    here = machine.load(path)
    if here is None:
        raise ConfigError(
            f"no machine to plan for: this one was not measured yet (no {path}). Name another, with --machine or "
            f"plan.machine: {', '.join(machine.shipped())}; or measure this one:\n{measure(path_of_config)}"
        )
    _require_figures(here, str(path), measure(path_of_config))
    return Chosen(here, here.name or "this machine", True)


def measure(path_of_config: str, out: str | None = None) -> str:
    """The line to paste that measures this machine, and the layers of a config."""
    words = ["calibrate", path_of_config, *(["--out", out] if out else [])]
    return launch.command_line(min(2, launch.cores()), words)


def _same(path: str) -> bool:
    """Whether a file is that of this machine."""
    own = machine.default_path()
    return own.is_file() and Path(path).is_file() and own.samefile(path)


def _require_figures(found: Machine, what: str, line: str) -> None:
    if found.compute is None and not found.kernels:
        raise ConfigError(
            f"{what}: it does not say how fast a rank computes (compute, kernels), so that nothing can be planned for "
            f"it; name another machine, {', '.join(machine.shipped())}, or measure the layers of a config:\n{line}"
        )


# --- what is planned -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What a plan is wanted for: a network, on a machine, within a rank's memory."""

    config: Config
    data: Dataset | Described
    graph: Graph
    chosen: Chosen
    memory_limit: float | None
    """Bytes of a rank; None: as many as there are."""

    @cached_property
    def setting(self) -> Setting:
        """As a run by the config goes about it."""
        whole = Plan({node.name: Partition() for node in self.graph})
        economy = memory.economy(self.config, self.graph, whole)
        setting = Setting.of(self.config, self.chosen.machine)
        return replace(setting, economy=economy, save_every=self._save_every)

    @property
    def _save_every(self) -> int:
        """Steps between checkpoints, 0 for none but the last."""
        saved = self.config.checkpoint
        steps = [saved.every_steps, saved.every_epochs * (self.data.samples // self.batch)]
        return min(filter(None, steps), default=0)

    @property
    def machine(self) -> Machine:
        """What is known of it."""
        return self.chosen.machine

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.config.train.batch

    @property
    def steps(self) -> int:
        """Steps of an epoch, as the trainer makes them. Raises ConfigError where the data do not fill one."""
        found = self.data.samples // self.batch
        if found == 0:
            raise ConfigError(
                f"train.batch = {self.batch}, but {self.data.folder} has only {self.data.samples} samples: no step in "
                "an epoch; give a smaller batch"
            )
        return found

    def search(self, ranks: int) -> Found:
        """The best plan on so many ranks. Raises PlanError where none fits, ConfigError where there are too few."""
        return search(self.graph, self.setting, ranks, self.limit(ranks), SECONDS)

    def limit(self, ranks: int) -> float | None:
        """Bytes that each of so many ranks may need: where nobody says, of this host what is free; else no limit."""
        room = host_room() if self.memory_limit is None and self.chosen.here else None
        return self.memory_limit if room is None else room.nbytes / at_once(self.setting, ranks)

    def sources(self, plan: Plan, ranks: int) -> dict[str, str]:
        """{layer: "measured", "interpolated" or "formula"} of the layers that take time to compute by a plan."""
        places = layouts(self.graph, plan)
        pricer = Pricer(self.setting, self.graph, at_once(self.setting, ranks))
        units = schedule(self.graph, places, self.setting.economy).units
        return {unit.head: pricer.source(unit, extent(places[unit.head].work.box(0))) for unit in units}

    def memory(self, plan: Plan, ranks: int) -> Memory:
        """What the rank that needs most needs, as far as a few of the first ones show."""
        economy = memory.economy(self.config, self.graph, plan)
        return limits.needed(self.graph, plan, replace(self.setting, economy=economy), ranks)[1]


def task(
    config: Config, named: str | None = None, memory_gib: float | None = None, path_of_config: str = "CONFIG.toml"
) -> Task:
    """What `config` asks to be planned, on the machine `named` or else as `choose_machine` finds it.

    A rank's memory is that of the machine's file where `memory_gib` does not say. Raises what these raise, DataError
    where nothing says what a sample looks like.
    """
    if config.sync.strategy != "allreduce":
        raise ConfigError(
            f"sync.strategy = {config.sync.strategy!r}: plans are found for one copy of the network; plan a replica's, "
            "with sync.strategy=allreduce, its ranks and its share of train.batch, and give the file as plan.grid"
        )
    chosen = choose_machine(config, named, path_of_config)
    data = prepare.known_data(config)
    limit = chosen.machine.memory if memory_gib is None else memory_gib * 2**30
    return Task(config, data, prepare.build_graph(config, data), chosen, limit)
