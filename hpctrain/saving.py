"""When and what a run saves, and how it finds its way back: between the training loop and the checkpoint format."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from hpctrain import checkpoint, runfolder
from hpctrain.checkpoint.tensors import blocks, fill, owned, rank_blocks, restore, restore_rank
from hpctrain.checkpoint.writer import Block
from hpctrain.comm.replicas import Replicas
from hpctrain.comm.watched import watched
from hpctrain.comm.world import World, all_ranks
from hpctrain.config import Config
from hpctrain.config_file import config_hash
from hpctrain.console import Console
from hpctrain.errors import CheckpointError, NumericsError
from hpctrain.executor import Executor
from hpctrain.metrics import Totals
from hpctrain.optim import Optimizer
from hpctrain.optim.base import state_like
from hpctrain.parameters import Tensor
from hpctrain.sync import average
from hpctrain.together import Together


@dataclass
class Progress:
    """How far a run is: epochs done, steps done of this epoch and in all, and the sums over this epoch so far."""

    epoch: int = 0
    position: int = 0
    step: int = 0
    totals: Totals = field(default_factory=Totals)


def common(replicas: Replicas, mine: Progress) -> Progress:
    """How far a run is, of which each replica has come as far as `mine`: as the furthest one; sums over all of them.

    Collective over all replicas.
    """
    if replicas.count == 1:
        return mine
    every, totals = replicas.across.allgather(mine), Totals()
    for progress in every:
        totals.add(progress.totals)
    return replace(max(every, key=lambda progress: progress.step), totals=totals)


class Saver:
    """Saves and restores one run: parameters, statistics, optimizer state, progress. All methods are collective.

    Of a run of several replicas tensors hold the exact mean; what each of them has is stored beside, under names of its
    own, and what they share, for a run that goes on with as many of them and by the same strategy.
    """

    def __init__(
        self,
        world: World,
        config: Config,
        executor: Executor,
        optimizer: Optimizer,
        together: Together,
        data_uuid: str,
        console: Console,
    ) -> None:
        self.world, self.config, self.executor, self.console = world, config, executor, console
        self.replicas, self.strategy, self._apart = together.replicas, together.strategy, together.apart
        self.comm = watched(world.comm, "checkpoint")
        self.optimizer, self.folder = optimizer, Path(config.run.folder)
        flat = executor.parameters
        kept = [tensor for name, array in optimizer.state.items() for tensor in flat.like(array, name)]
        self.tensors: list[Tensor] = [*executor.tensors(), *kept]
        codecs = executor.gradients.codecs.values()
        self._unsent = {f"codec{i}/{name}": a for i, codec in enumerate(codecs) for name, a in codec.state.items()}
        """What codecs keep of this rank's gradients."""
        self.own = owned(self.tensors, f"replica{self.replicas.index}") if self._apart else []
        self.identity = {"config": config_hash(config), "data": data_uuid}
        self.saved: int | None = None
        """The step of the last checkpoint in the run folder."""

    def save(self, mine: Progress) -> None:
        """Write a checkpoint of this step, unless there is one; broken weights are a NumericsError instead."""
        at = common(self.replicas, mine)
        if self.saved == at.step:
            return
        with all_ranks(self.comm):
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
            "sync": self._sync(),
            "codec": self._codec(),
            "replicas": self.replicas.across.allgather({**asdict(mine), "updates": self.optimizer.updates}),
        }
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, at.step, self._blocks(), state, self.comm)
        self.saved = at.step
        checkpoint.retain(folder, self.config.checkpoint.keep, self.comm)

    def _blocks(self) -> list[Block]:
        """What this rank writes: its share of the means, in replica 0, and of what its replica has."""
        rank, unsent = self.replicas.inside.rank, rank_blocks(self._unsent, self.world.rank)
        if not self._apart:
            return blocks(self.tensors, rank) + unsent
        means = [replace(t, array=average(self.replicas, t.array)) for t in self.tensors]
        for name, vector in self.strategy.state().items():
            means += self.executor.parameters.like(vector, f"sync/{name}")
        return blocks([*self.own, *(means if self.replicas.index == 0 else ())], rank) + unsent

    def _shared(self, found: checkpoint.Checkpoint) -> dict[str, np.ndarray]:
        """What the strategy had."""
        flat, vectors = self.executor.parameters, {}
        for name in {name.split("/")[1] for name in found.tensors if name.startswith("sync/")}:
            vectors[name] = state_like(flat.blocks(), flat.shards())
            fill(found, flat.like(vectors[name], f"sync/{name}"))
        return vectors

    def restore(self, resume: Path | None) -> Progress:
        """Go on from the newest whole checkpoint of run folder `resume`, or start anew: None, or none saved yet."""
        elsewhere = resume is None or resume.resolve() != self.folder.resolve()
        with all_ranks(self.comm):
            if elsewhere:
                runfolder.refuse_used(self.folder)
        if resume is None:
            return Progress()
        folder = resume / "checkpoints"
        found, refused = checkpoint.newest(folder, self.comm)
        if self.world.rank == 0:
            for line in refused:
                self.console.warn(line)
        if found is None:
            if refused:
                raise CheckpointError(f"{folder}: no usable checkpoint; move it away and train without --resume")
            self.console.note(f"{folder}: no checkpoint yet, starting anew")  # a job script always says --resume
            return Progress()
        with all_ranks(self.comm):
            self._require_same_run(found, resume)
            restore(found, self.tensors)
            same = self._apart and found.state.get("sync") == self._sync()
            if same:
                fill(found, self.own)
            shared = self._shared(found) if same else {}
            kept = self._same_codecs(found) and restore_rank(found, self._unsent, self.world.rank)
        self.strategy.load(shared)
        self.saved = None if elsewhere else found.step
        self._say_resumed(found)
        self._say_codec(found, kept)
        state = found.state["replicas"][self.replicas.index] if same else found.state
        self.optimizer.updates = state.get("updates", found.step)  # earlier checkpoints are of optimizers without
        totals = Totals(**state["totals"]) if same or self.replicas.index == 0 else Totals()
        return Progress(state["epoch"], state["position"], state["step"], totals)

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
        by = found.state.get("sync", {"strategy": "allreduce", "replicas": 1})
        if by != self._sync():
            self.console.note(
                f"saved by {_replicas(by)}, now {_replicas(self._sync())}: "
                f"{'all start' if self.replicas.count > 1 else 'going on'} from the mean"
            )
        before, now = found.state["optim"], self._optim()
        for key in sorted(key for key in now if now[key] != before.get(key)):
            self.console.note(f"changed since then: {key} = {before.get(key)} -> {now[key]}")

    def _same_codecs(self, found: checkpoint.Checkpoint) -> bool:
        """Whether every rank compressed the same gradients in the same way."""
        mine = {"codec": self._codec(), "plan": self._partitions(), "sync": self._sync(), "ranks": self.world.size}
        return all(found.state.get(key) == value for key, value in mine.items())

    def _say_codec(self, found: checkpoint.Checkpoint, kept: bool) -> None:
        before, now = found.state.get("codec"), self._codec()
        if not kept and (before is not None or now is not None):
            names = [codec["name"] if codec else "none" for codec in (before, now)]
            self.console.note(
                f"what compress.codec had yet to send is lost, and starts from zero: saved by {names[0]!r} on "
                f"{found.state['ranks']} ranks, now {names[1]!r} on {self.world.size}"
            )

    def _codec(self) -> dict[str, Any] | None:
        """What decides what codecs keep; None without."""
        compress = self.config.compress
        return None if compress.codec == "none" else {"name": compress.codec, "rank": compress.rank}

    def _optim(self) -> dict[str, Any]:
        """What decides how weights are updated from here on, by key of the config."""
        table = msgspec.json.decode(msgspec.json.encode(self.config.optim))  # as it comes back from a manifest
        schedule = {f"optim.schedule.{key}": value for key, value in table.pop("schedule").items()}
        return (
            {f"optim.{key}": value for key, value in table.items()}
            | schedule
            | {"train.epochs": self.config.train.epochs}
        )

    def _sync(self) -> dict[str, Any]:
        return {"strategy": self.config.sync.strategy, "replicas": self.replicas.count}

    def _partitions(self) -> dict[str, dict[str, int]]:
        return {name: partition.parts() for name, partition in self.executor.plan.partitions.items()}


def _replicas(sync: dict[str, Any]) -> str:
    return f"{sync['replicas']} replica{'s' * (sync['replicas'] > 1)} ({sync['strategy']})"
