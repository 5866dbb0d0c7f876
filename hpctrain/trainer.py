"""The training loop: read a batch, forward, agree, backward, update; evaluate, save, and stop or resume anywhere."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import isfinite, sqrt
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from hpctrain import backends, launch, memory, optim, prepare, runfolder, summation, usage
from hpctrain.comm.watched import begin, watched
from hpctrain.comm.world import STOPPED, World, all_ranks
from hpctrain.config import Config
from hpctrain.console import Console, print_json, wrapped
from hpctrain.data.dataset import Dataset
from hpctrain.data.order import Batches
from hpctrain.errors import NumericsError
from hpctrain.executor import Executor
from hpctrain.feed import Feed
from hpctrain.layers import Loss, Phase
from hpctrain.layers.loss import LOSS
from hpctrain.metrics import MetricsFile, Totals
from hpctrain.optim import schedule
from hpctrain.optim.clip import clip_factor
from hpctrain.planner import memory as planned
from hpctrain.saving import Progress, Saver
from hpctrain.verdict import LOWER, Verdict, blame, judge


def run(world: World, config: Config, resume: Path | None = None, json_output: bool = False) -> int:
    """Train as `config` says; the exit status. `resume` is a run folder to continue. Collective."""
    console = Console(world.rank, config.run.log_every)
    begin(world.comm, config.run.stall_seconds, config.run.abort_seconds, config.debug.collectives)
    try:
        with memory.explained(lambda: prepare.needed(config)):
            return Trainer(world, config, console, resume).train(json_output)
    finally:
        console.close()


class Trainer:
    """One run. Collective over `world`; errors in config, data and plan are raised on all ranks alike."""

    def __init__(self, world: World, config: Config, console: Console, resume: Path | None = None) -> None:
        self.world, self.config, self.console = world, config, console
        self.comm, self.folder = watched(world.comm, "agreement of all ranks"), Path(config.run.folder)
        around = summation.surroundings(self.comm, world.library)
        with all_ranks(self.comm):
            self.data, self.test = prepare.open_datasets(config)
            self.graph = prepare.build_graph(config, self.data)
            self.losses = {node.name: node.layer for node in self.graph.losses if isinstance(node.layer, Loss)}
            self.plan = prepare.make_plan(config, self.graph, resume)
            self.batches = Batches(self.data.samples, config.train.batch, config.train.seed)
            need = planned.of_run(config, self.graph, self.plan, [world.rank], around.hosts)[world.rank]
            backend = backends.get(config.train.backend, config.train.exact)
        if config.data.verify:
            with all_ranks(watched(self.comm, "verification of the data", patient=True)):
                self._verify_data()
        keeping = prepare.without_recomputing(config, self.graph, self.plan, world.rank, around.hosts)
        self.usage = usage.Usage(world, need, keeping)
        backend.use_threads(world.threads)
        self._describe(backend.describe())
        precision, seed = config.train.precision, config.train.seed
        economy = planned.economy(config, self.graph, self.plan)
        how = summation.summing(config, around, self.batches.steps)
        self.executor = Executor(self.graph, self.plan, self.comm, backend, precision, seed, economy, how)
        summation.require_worthwhile(config, self.executor, around)
        for line in summation.notes(self.executor):
            console.note(wrapped(line))
        flat, rules = self.executor.parameters, summation.optimizer_config(config)
        comm = watched(self.comm, "optimizer")
        self.optimizer = optim.TABLE[rules.name](flat.blocks(), flat.shards(), backend, rules, comm)
        with all_ranks(self.comm):
            self.feed = Feed(self.data, replace(self.batches, batch=config.train.part), self.executor)
            self.tests = None if self.test is None else self._test_feed(self.test)
        self.saver = Saver(world, config, self.executor, self.optimizer, self.data.uuid, console)
        self.at: Progress = self.saver.restore(resume)
        self.seconds: float = 0.0
        self.rate: float | None = None
        with all_ranks(self.comm):
            if world.rank == 0:
                runfolder.write(self.folder, config, summation.recorded(self.plan, self.executor), world)
                self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.at.step)

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self, json_output: bool = False) -> int:
        """Train to the end, or until asked to stop; the exit status. The last checkpoint is of the last step."""
        records: list[dict[str, Any]] = []
        while self.at.position == self.batches.steps or (
            self.at.epoch < self.config.train.epochs and not self._enough()
        ):
            if self._train_epoch():
                self._save()
                self._say_stopped()
                return STOPPED
            records.append(self._finish_epoch() if self.at.position == self.batches.steps else self._report("end"))
        self._save()
        if records:
            records[-1] |= self._report_memory()
        self.console.note(f"run folder {self.folder}")
        if json_output and self.world.rank == 0:
            print_json("train", records)
        return 0

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch; whether it ended early because a rank was asked to stop."""
        steps, batch = self.batches.steps, self.config.train.batch
        begin, first, self.phases = perf_counter(), self.at.step, self._phases()
        self.seconds, self.rate = 0.0, None
        with self.console.progress(steps, f"epoch {self.at.epoch + 1}/{self.config.train.epochs}") as bar:
            bar.advance(self.at.position)
            while self.at.position < steps and not self._enough():
                stop = self.step()
                self.seconds = perf_counter() - begin
                self.rate = (self.at.step - first) * batch / self.seconds
                bar.advance(1, f"loss {self.at.totals.means(self.losses)['loss']:.4f}  {self.rate:.0f} samples/s")
                if stop:
                    return True
                if self.at.position < steps and self._due(self.config.checkpoint.every_steps, self.at.step):
                    self._save()
        return False

    def step(self) -> bool:
        """One step, forward to update; whether any rank was asked to stop. Raises what any rank met, on all."""
        epoch, position, steps, train = self.at.epoch, self.at.position, self.batches.steps, self.config.train
        lr = schedule.learning_rate(self.config.optim, train.batch, self.at.step, steps, train.epochs * steps)
        verdict = self._gradients()
        if verdict.finite:
            self.optimizer.step(lr)
            self.executor.updated()
            self.at.totals.add(verdict.totals)
        self.at.step += 1
        self.at.position += 1
        if self.world.rank == 0:
            fields = verdict.totals.means(self.losses) | {"lr": lr}
            if verdict.gradient_norm is not None:
                fields["gradient_norm"] = verdict.gradient_norm
            digest = runfolder.digest(self.batches.ids(epoch, position)[0])
            self.metrics.write("step", step=self.at.step, epoch=epoch, **fields, samples=digest)
        return verdict.stop

    def _gradients(self) -> Verdict:
        """The step as far as gradients, ready for the update: the sum of those of equal parts of the batch."""
        skipping = self.config.train.nonfinite == "skip"
        running = [tensor.array.copy() for tensor in self.executor.state] if skipping else []
        totals, stop = Totals(), False
        for part in range(self.config.train.accumulate):
            verdict = self._part(part)
            totals.add(verdict.totals)
            stop = stop or verdict.stop
            if not verdict.finite:
                break
        norm = self._scale_gradients() if verdict.finite else None
        finite = verdict.finite and (norm is None or isfinite(norm))
        if not finite:
            for tensor, before in zip(self.executor.state, running, strict=True):
                tensor.array[...] = before
        return Verdict(totals, finite, stop, norm)

    def _part(self, part: int) -> Verdict:
        """Forward and, where all is finite, backward of one part of the batch."""
        epoch, parts = self.at.epoch, self.config.train.accumulate
        number = self.at.position * parts + part
        error = self.feed.fill(epoch, number)
        rows = self.executor.forward(Phase(training=True, step=self.at.step * parts + part))
        weights = self.feed.weights(epoch, number)
        suspects = self.feed.suspects(epoch, number, rows) if error is None else ([], [])
        verdict = judge(self.comm, self.feed.sums(rows, weights), error, suspects, self._asked_to_stop())
        if not verdict.finite:
            self._not_finite(self._where(), *blame(self.comm, self.feed, suspects))
            return verdict
        shares = verdict.totals.shares(self.losses)
        gradients = {name: np.zeros_like(mine) for name, mine in rows.items()}
        for name, gradient in gradients.items():
            gradient[:, LOSS] = weights[name] * (shares[name] * self.config.train.loss_scale / parts)
        self.executor.backward(gradients, first=part == 0, last=part == parts - 1)
        return verdict

    def _scale_gradients(self) -> float | None:
        """Undo train.loss_scale, and clip; the norm before the latter, where it is asked for. Collective."""
        scale, limit, norm = self.config.train.loss_scale, self.config.optim.clip_norm, None
        factor = 1 / scale
        if limit:
            square_sum = self.executor.gradients.square_sum(self.executor.backend) * factor**2
            factor, norm = factor * clip_factor(square_sum, limit), sqrt(square_sum)
            if not isfinite(norm):
                remedy = LOWER if scale == 1 else f"lower train.loss_scale, which is {scale:g}"
                self._not_finite(self._where(), "the loss is, but not its gradient", remedy)
        if factor != 1:
            self.executor.gradients.scale(factor)
        return norm

    def _where(self) -> str:
        return f"step {self.at.step + 1} (epoch {self.at.epoch + 1})"

    def _asked_to_stop(self) -> bool:
        return self.world.stop.received is not None

    def evaluate(self, feed: Feed) -> Totals:
        """Sums over a whole data set, of which the last batch is padded with samples of weight 0."""
        totals, error = Totals(), None
        suspects: tuple[list[int], list[int]] = ([], [])
        for step in range(feed.batches.steps):
            error = error or feed.fill(0, step)
            rows = self.executor.forward(Phase(training=False))
            totals.add(feed.sums(rows, feed.weights(0, step)))
            if error is None:
                for found, more in zip(suspects, feed.suspects(0, step, rows), strict=True):
                    found += more
        verdict = judge(self.comm, totals, error, suspects, self._asked_to_stop())
        if not verdict.finite:
            self._not_finite(f"evaluation after step {self.at.step}", *blame(self.comm, feed, suspects))
        return verdict.totals

    def _finish_epoch(self) -> dict[str, Any]:
        """Report and save; the epoch's record."""
        if self.at.totals.samples == 0:
            raise NumericsError(
                f"epoch {self.at.epoch + 1}: every step was skipped, as no loss was finite; start anew with a lower "
                f"optim.lr, or resume an earlier checkpoint with one"
            )
        self.at.epoch, self.at.position = self.at.epoch + 1, 0
        record = self._report("epoch")
        self.at.totals = Totals()
        due, steps = self._due(self.config.checkpoint.every_epochs, self.at.epoch), self.config.checkpoint.every_steps
        if due or self._due(steps, self.at.step):
            self._save()
        return record

    def _report(self, event: str) -> dict[str, Any]:
        """Evaluate where that is due, and record how training goes; the record."""
        spent = {phase: value - self.phases[phase] for phase, value in self._phases().items()}
        record: dict[str, Any] = {"epoch": self.at.epoch, "step": self.at.step} | self.at.totals.means(self.losses)
        last = event == "end" or self.at.epoch == self.config.train.epochs
        if self.tests is not None and (last or self._due(self.config.train.eval_every, self.at.epoch)):
            record |= self.evaluate(self.tests).means(self.losses, "test_")
        record |= {"seconds": self.seconds, "samples_per_second": self.rate, **spent}
        if self.world.rank == 0:
            self.metrics.write(event, **record)
            self.metrics.flush()
        self.console.epoch(record)
        return record

    def _report_memory(self) -> dict[str, int]:
        """Record and say what each rank has used; the largest figures. Collective."""
        used = self.usage.ranks()
        if self.world.rank == 0:
            for rank in used:
                self.metrics.write("memory", step=self.at.step, **asdict(rank))
            self.metrics.flush()
        self.console.note(usage.describe(used))
        return usage.largest(used)

    def _not_finite(self, where: str, why: str, remedy: str) -> None:
        """Stop or go on as the config says."""
        if self.config.train.nonfinite == "stop":
            raise NumericsError(f"{where}: not finite: {why}; {remedy}, or with train.nonfinite=skip")
        self._warn(f"{where}: not finite: {why}; skipped")

    # --- small things ----------------------------------------------------------------------------------------------

    def _phases(self) -> dict[str, float]:
        """What this rank has spent so far: seconds by phase, and bytes sent in exchanges."""
        spent = {f"{phase}_seconds": seconds for phase, seconds in self.executor.seconds.items()}
        return spent | {"input_seconds": self.feed.seconds, "bytes_sent": self.executor.bytes_sent()}

    def _save(self) -> None:
        self.saver.save(self.at)
        if self.world.rank == 0:
            self.metrics.flush()

    def _test_feed(self, test: Dataset) -> Feed:
        batches = Batches(test.samples, self.config.train.part, 0, shuffle=False, drop_last=False)
        return Feed(test, batches, self.executor)

    @staticmethod
    def _due(every: int, count: int) -> bool:
        return every > 0 and count % every == 0

    def _enough(self) -> bool:
        limit = self.config.train.steps
        return limit is not None and self.at.step >= limit

    def _say_stopped(self) -> None:
        if self.world.rank == 0:
            line = launch.command_line(self.world.size, ["train", "--resume", str(self.folder)])
            self.console.note(
                f"stopped on request after step {self.at.step} with status {STOPPED}; a complaint of the launcher "
                f"about that is expected. To go on:\n{line}"
            )

    def _warn(self, text: str) -> None:
        """A warning that all ranks share, said once."""
        if self.world.rank == 0:
            self.console.warn(text)

    def _verify_data(self) -> None:
        """Compare the hashes of all data, each rank those of some shards. Raises DataError."""
        for data in filter(None, (self.data, self.test)):
            data.verify(range(self.world.rank, len(data.shards), self.world.size))

    def _describe(self, backend: str) -> None:
        grid = self.config.plan.grid
        what = f"plan {grid}" if isinstance(grid, str) else f"grid {grid.partition}"
        ranks = f"{self.world.size} ranks of {self.world.threads} thread{'s' * (self.world.threads != 1)}"
        named = self.plan.allreduce
        summed = f", {named} allreduce" if isinstance(named, str) else ""
        self.console.note(wrapped(f"{ranks}, {what}{summed}; {backend}"))
        if rate := schedule.describe(self.config.optim, self.config.train.batch):
            self.console.note(wrapped(rate))
        self.console.note(self.usage.heading())
        if short := self.usage.warning():
            self.console.warn(short)
        if self.plan.ranks < self.world.size:
            self._warn(f"the plan uses {self.plan.ranks} of {self.world.size} ranks; the others idle")
        for line in self.plan.notes:
            self.console.note(wrapped(line))
