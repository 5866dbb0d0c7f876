"""When and what a run saves, and how it finds its way back: between the training loop and the checkpoint format."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hpctrain import checkpoint, runfolder
from hpctrain.checkpoint.tensors import blocks, restore
from hpctrain.comm.world import World, all_ranks
from hpctrain.config import Config
from hpctrain.config_file import config_hash
from hpctrain.console import Console
from hpctrain.errors import CheckpointError, NumericsError
from hpctrain.executor import Executor
from hpctrain.metrics import Totals
from hpctrain.optim import Optimizer
from hpctrain.parameters import Tensor


@dataclass
class Progress:
    """How far a run is: epochs done, steps done of this epoch and in all, and the sums over this epoch so far."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    totals: Totals = field(default_factory=Totals)


class Saver:
    """Saves and restores one run: parameters, statistics, optimizer state, progress. All methods are collective."""

    def __init__(
        self, world: World, config: Config, executor: Executor, optimizer: Optimizer, data_uuid: str, console: Console
    ) -> None:
        self.world, self.config, self.executor, self.console = world, config, executor, console
        self.optimizer, self.folder = optimizer, Path(config.run.folder)
        flat = executor.parameters
        kept = [tensor for name, array in optimizer.state.items() for tensor in flat.like(array, name)]
        self.tensors: list[Tensor] = [*executor.tensors(), *kept]
        self.identity = {"config": config_hash(config), "data": data_uuid}
        self.saved: int | None = None
        """The step of the last checkpoint in the run folder."""

    def save(self, at: Progress) -> None:
        """Write a checkpoint of this step, unless there is one; broken weights are a NumericsError instead."""
        if self.saved == at.step:
            return
        with all_ranks(self.world.comm):
            if not all(np.isfinite(memory.weights).all() for memory in self.executor.parameters.groups.values()):
                raise NumericsError(
                    f"step {at.step}: weights are not finite, so nothing was saved; resume from the last checkpoint "
                    f"with a lower optim.lr"
                )
        state: dict[str, Any] = {
            **self.identity,
            **asdict(at),
            "plan": self._partitions(),
            "ranks": self.world.size,
            "updates": self.optimizer.updates,
            "optim": self._optim(),
        }
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, at.step, blocks(self.tensors, self.world.rank), state, self.world.comm)
        self.saved = at.step
        checkpoint.retain(folder, self.config.checkpoint.keep, self.world.comm)

    def restore(self, resume: Path | None) -> Progress:
        """Go on from the newest whole checkpoint of run folder `resume`, or start anew: None, or none saved yet."""
        elsewhere = resume is None or resume.resolve() != self.folder.resolve()
        with all_ranks(self.world.comm):
            if elsewhere:
                runfolder.refuse_used(self.folder)
        if resume is None:
            return Progress()
        folder = resume / "checkpoints"
        found, refused = checkpoint.newest(folder, self.world.comm)
        if self.world.rank == 0:
            for line in refused:
                self.console.warn(line)
        if found is None:
            if refused:
                raise CheckpointError(f"{folder}: no usable checkpoint; move it away and train without --resume")
            self.console.note(f"{folder}: no checkpoint yet, starting anew")  # a job script always says --resume
            return Progress()
        with all_ranks(self.world.comm):
            self._require_same_run(found, resume)
            restore(found, self.tensors)
        self.saved = None if elsewhere else found.step
        self._say_resumed(found)
        state = found.state
        self.optimizer.updates = state.get("updates", found.step)  # earlier checkpoints are of optimizers without
        return Progress(state["epoch"], state["position"], state["step"], Totals(**state["totals"]))

    def _require_same_run(self, found: checkpoint.Checkpoint, resume: Path) -> None:
        for what, mine in self.identity.items():
            if found.state.get(what) != mine:
                raise CheckpointError(
                    f"{found.path}: was made with another {what} ({found.state.get(what)}, now {mine}); "
                    f"resume with {resume / 'config.toml'}, or give run.folder another name and start anew"
                )
        made_by, mine = found.state["optim"]["optim.name"], self.config.optim.name
        if made_by != mine:  # their states have nothing in common
            raise CheckpointError(
                f"{found.path}: was made with optim.name = {made_by!r}, now {mine!r}; go on with {made_by!r}, or give "
                "run.folder another name and start anew"
            )

    def _say_resumed(self, found: checkpoint.Checkpoint) -> None:
        changed = found.state["plan"] != self._partitions()
        how = f": from a plan on {found.state['ranks']} ranks to another on {self.world.size}" if changed else ""
        self.console.note(f"resumed {found.path} at step {found.step}{how}")
        before, now = found.state["optim"], self._optim()
        for key in sorted(key for key in now if now[key] != before.get(key)):
            self.console.note(f"changed since then: {key} = {before.get(key)} -> {now[key]}")

    def _optim(self) -> dict[str, Any]:
        """What decides how weights are updated from here on, by key of the config."""
        table = msgspec.json.decode(msgspec.json.encode(self.config.optim))  # as it comes back from a manifest
        schedule = {f"optim.schedule.{key}": value for key, value in table.pop("schedule").items()}
        return (
            {f"optim.{key}": value for key, value in table.items()}
            | schedule
            | {"train.epochs": self.config.train.epochs}
        )

    def _partitions(self) -> dict[str, dict[str, int]]:
        return {name: partition.parts() for name, partition in self.executor.plan.partitions.items()}
