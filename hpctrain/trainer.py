"""The training loop: read a batch, forward, agree, backward, update; evaluate, save, and stop or resume anywhere."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from hpctrain import backends, launch, memory, optim, prepare, runfolder, usage
from hpctrain.comm.world import STOPPED, World, agree, all_ranks
from hpctrain.config import Config
from hpctrain.console import Console, print_json, wrapped
from hpctrain.data.dataset import Dataset
from hpctrain.data.order import Batches
from hpctrain.errors import HpctrainError, NumericsError
from hpctrain.executor import Executor
from hpctrain.feed import Feed
from hpctrain.layers import Loss, Phase
from hpctrain.layers.loss import COLUMNS, LOSS
from hpctrain.metrics import MetricsFile, Totals
from hpctrain.optim.schedule import learning_rate
from hpctrain.planner import memory as planned
from hpctrain.saving import Progress, Saver


def run(world: World, config: Config, resume: Path | None = None, json_output: bool = False) -> int:
    """Train as `config` says; the exit status. `resume` is a run folder to continue. Collective."""
    console = Console(world.rank, config.run.log_every)
    try:
        with memory.explained(lambda: prepare.needed(config)):
            return Trainer(world, config, console, resume).train(json_output)
    finally:
        console.close()


class Verdict(NamedTuple):
    """What all ranks know after a step's small allreduce."""

    totals: Totals
    finite: bool
    stop: bool


class Trainer:
    """One run. Collective over `world`; errors in config, data and plan are raised on all ranks alike."""

    def __init__(self, world: World, config: Config, console: Console, resume: Path | None = None) -> None:
        self.world, self.config, self.console = world, config, console
        self.comm, self.folder = world.comm, Path(config.run.folder)
        with all_ranks(self.comm):
            self.data, self.test = prepare.open_datasets(config)
            self.graph = prepare.build_graph(config, self.data)
            self.losses = {node.name: node.layer for node in self.graph.losses if isinstance(node.layer, Loss)}
            self.plan = prepare.make_plan(config, self.graph)
            batches = Batches(self.data.samples, config.train.batch, config.train.seed)
            need = planned.of_run(config, self.graph, self.plan, [world.rank])[world.rank]
            backend = backends.get(config.train.backend, config.train.exact)
            if config.data.verify:
                self._verify_data()
        keeping = prepare.without_recomputing(config, self.graph, self.plan, world.rank)
        self.usage = usage.Usage(world, need, keeping)
        backend.use_threads(world.threads)
        self._describe(backend.describe())
        precision, seed = config.train.precision, config.train.seed
        economy = planned.economy(config, self.graph, self.plan)
        self.executor = Executor(self.graph, self.plan, self.comm, backend, precision, seed, economy)
        flat = self.executor.parameters
        self.optimizer = optim.TABLE[config.optim.name](flat.blocks(), flat.shards(), backend, config.optim, self.comm)
        with all_ranks(self.comm):
            self.feed = Feed(self.data, batches, self.executor)
            self.tests = None if self.test is None else self._test_feed(self.test)
        self.saver = Saver(world, config, self.executor, self.optimizer, self.data.uuid, console)
        self.at: Progress = self.saver.restore(resume)
        self.seconds: float = 0.0
        self.rate: float | None = None
        with all_ranks(self.comm):
            if world.rank == 0:
                runfolder.write(self.folder, config, self.plan, world)
                self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.at.step)

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self, json_output: bool = False) -> int:
        """Train to the end, or until asked to stop; the exit status. The last checkpoint is of the last step."""
        records: list[dict[str, Any]] = []
        while self.at.position == self.feed.batches.steps or (
            self.at.epoch < self.config.train.epochs and not self._enough()
        ):
            if self._train_epoch():
                self._save()
                self._say_stopped()
                return STOPPED
            records.append(self._finish_epoch() if self.at.position == self.feed.batches.steps else self._report("end"))
        self._save()
        if records:
            records[-1] |= self._report_memory()
        self.console.note(f"run folder {self.folder}")
        if json_output and self.world.rank == 0:
            print_json("train", records)
        return 0

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch; whether it ended early because a rank was asked to stop."""
        steps, batch = self.feed.batches.steps, self.config.train.batch
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
        epoch, position, steps = self.at.epoch, self.at.position, self.feed.batches.steps
        lr = learning_rate(self.config.optim, self.at.step, steps, self.config.train.epochs * steps)
        skipping = self.config.train.nonfinite == "skip"
        running = [tensor.array.copy() for tensor in self.executor.state] if skipping else []
        error = self.feed.fill(epoch, position)
        rows = self.executor.forward(Phase(training=True, step=self.at.step))
        weights = self.feed.weights(epoch, position)
        suspects = self.feed.suspects(epoch, position, rows) if error is None else ([], [])
        verdict = self._agree(self.feed.sums(rows, weights), error, suspects)
        if verdict.finite:
            shares = verdict.totals.shares(self.losses)
            gradients = {name: np.zeros_like(mine) for name, mine in rows.items()}
            for name, gradient in gradients.items():
                gradient[:, LOSS] = weights[name] * shares[name] * self.config.train.loss_scale
            self.executor.backward(gradients)
            if self.config.train.loss_scale != 1:
                for memory in self.executor.parameters.groups.values():
                    memory.sums[...] /= self.config.train.loss_scale
            self.optimizer.step(lr)
            self.at.totals.add(verdict.totals)
        else:
            self._not_finite(f"step {self.at.step + 1} (epoch {epoch + 1})", self.feed, suspects)
            for tensor, before in zip(self.executor.state, running, strict=True):
                tensor.array[...] = before
        self.at.step += 1
        self.at.position += 1
        if self.world.rank == 0:
            fields = verdict.totals.means(self.losses) | {"lr": lr}
            digest = runfolder.digest(self.feed.batches.ids(epoch, position)[0])
            self.metrics.write("step", step=self.at.step, epoch=epoch, **fields, samples=digest)
        return verdict.stop

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
        verdict = self._agree(totals, error, suspects)
        if not verdict.finite:
            self._not_finite(f"evaluation after step {self.at.step}", feed, suspects)
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

    # --- agreement -------------------------------------------------------------------------------------------------

    def _agree(self, mine: Totals, error: HpctrainError | None, suspects: tuple[list[int], list[int]]) -> Verdict:
        """The small allreduce of every step: sums of all ranks, whether to stop; raises any rank's error on all.

        Gathered and added in rank order: some MPI libraries add in the order of arrival, other bits on every run.
        """
        said = [value for name in self.losses for value in mine.sums.get(name, [0.0] * COLUMNS)]
        said += [
            mine.samples,
            float(error is not None),
            float(any(suspects)),
            float(self.world.stop.received is not None),
        ]
        every = np.empty((self.world.size, len(said)))
        self.comm.Allgather(np.array(said), every)
        *sums, samples, failed, suspected, stop = every.sum(axis=0).tolist()
        if failed:
            agree(self.comm, error)
        totals = Totals({name: sums[i * COLUMNS :][:COLUMNS] for i, name in enumerate(self.losses)}, samples)
        finite = not suspected and all(np.isfinite(found[LOSS]) for found in totals.sums.values())
        return Verdict(totals, finite, bool(stop))

    def _not_finite(self, where: str, feed: Feed, suspects: tuple[list[int], list[int]]) -> None:
        """Name the samples behind what is not finite, and stop or go on as the config says. Collective."""
        said = self.comm.allgather(suspects)
        from_data = [sample for read, _ in said for sample in read]
        from_loss = [sample for _, rows in said for sample in rows]
        if from_data:
            why = f"{feed.data.folder}: NaN or infinity in {feed.name(from_data)}"
            remedy = "mend the data and start anew"
        else:
            which = f"the loss of {feed.name(from_loss)}" if from_loss else "the sum of losses"
            why, remedy = (
                f"inputs are, but not {which}",
                "resume the last checkpoint, or start anew, with a lower optim.lr",
            )
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
        batches = Batches(test.samples, self.config.train.batch, 0, shuffle=False, drop_last=False)
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
        self.console.note(wrapped(f"{ranks}, {what}, {self.plan.allreduce} allreduce; {backend}"))
        self.console.note(self.usage.heading())
        if short := self.usage.warning():
            self.console.warn(short)
        if self.plan.ranks < self.world.size:
            self._warn(f"the plan uses {self.plan.ranks} of {self.world.size} ranks; the others idle")
        for line in self.plan.notes:
            self.console.note(wrapped(line))
