"""The training loop: read a batch, forward, agree, backward, update; evaluate, save, and stop or resume anywhere."""

from __future__ import annotations

from dataclasses import asdict, replace
from math import isfinite, sqrt
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

import numpy as np

from hpctrain import announce, backends, memory, optim, prepare, reckoning, runfolder, starting, summation, sync, usage
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
from hpctrain.reckoning import Clock
from hpctrain.saving import Progress, Saver, common
from hpctrain.starting import Start
from hpctrain.together import Together
from hpctrain.verdict import LOWER, Suspects, Verdict, blame, judge

if TYPE_CHECKING:
    from mpi4py.MPI import Intracomm


def run(world: World, config: Config, resume: Path | None = None, json_output: bool = False) -> int:
    """Train as `config` says; the exit status. `resume` is a run folder to continue. Collective."""
    console = Console(world.rank, config.run.log_every)
    begin(world.comm, config.run.stall_seconds, config.run.abort_seconds, config.debug.collectives)
    try:
        start = starting.start(world, config, resume)
        with memory.explained(lambda: prepare.most_memory(start.alone, start.graph, start.plan)):
            return Trainer(world, config, console, start, resume).train(json_output)
    finally:
        console.close()


class Trainer:
    """One run. Collective over `world`; errors in config, data and plan are raised on all ranks alike."""

    def __init__(
        self, world: World, config: Config, console: Console, start: Start, resume: Path | None = None
    ) -> None:
        self.world, self.config, self.console, self.start = world, config, console, start
        self.everybody, self.folder = watched(world.comm, "agreement of all ranks"), Path(config.run.folder)
        self.graph, self.plan, self.replicas, self.comm = start.graph, start.plan, start.replicas, start.comm
        self.losses = {node.name: node.layer for node in self.graph.losses if isinstance(node.layer, Loss)}
        alone, around, copies = start.alone, start.around, self.replicas.count
        with all_ranks(self.everybody):
            self.batches = Batches(start.data.samples, config.train.batch, config.train.seed)
            need = planned.of_run(alone, self.graph, self.plan, [self.comm.rank], around.hosts)[self.comm.rank]
            backend = backends.get(config.train.backend, config.train.exact)
        if config.data.verify:
            with all_ranks(watched(world.comm, "verification of the data", patient=True)):
                prepare.verify(start.data, start.test, world.rank, world.size)
        keeping = prepare.without_recomputing(alone, self.graph, self.plan, self.comm.rank, around.hosts)
        self.usage = usage.Usage(world, need, keeping)
        backend.use_threads(world.threads)
        announce.run(console, world, config, self.replicas, self.plan, backend.describe(), self.usage)
        precision, seed = config.train.precision, config.train.seed
        economy = planned.economy(alone, self.graph, self.plan)
        how = summation.summing(config, around, self.batches.steps * copies)
        self.executor = Executor(self.graph, self.plan, self.comm, backend, precision, seed, economy, how)
        summation.require_worthwhile(config, self.executor, around)
        for line in summation.notes(self.executor):
            console.note(wrapped(line))
        flat, rules = self.executor.parameters, summation.optimizer_config(config)
        comm = watched(self.comm, "optimizer")
        self.optimizer = optim.TABLE[rules.name](flat.blocks(), flat.shards(), backend, rules, comm)
        self.together = Together(world, self.replicas, config, self.executor, self.optimizer)
        with all_ranks(self.everybody):
            self.feed = self._feed(start.data, self.batches)
            self.tests = None if start.test is None else self._test_feed(start.test)
        self.clock = Clock(self.executor, self.feed, self.together, config.train.batch)
        self.saver = Saver(world, config, self.executor, self.optimizer, self.together, start.data.uuid, console)
        self.at: Progress = self.saver.restore(resume)
        with all_ranks(self.everybody):
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
                announce.stopped(self.console, self.world, self.folder, self.at.step)
                return STOPPED
            records.append(self._finish_epoch() if self.at.position == self.batches.steps else self._report("end"))
        self._save()
        if records:
            records[-1] |= self._report_memory() | self._report_steps()
        self.console.note(f"run folder {self.folder}")
        if json_output and self.world.rank == 0:
            print_json("train", records)
        return 0

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch; whether it ended early because a rank was asked to stop."""
        steps = self.batches.steps
        self.clock.begin_epoch(self.at.step)
        with self.console.progress(steps, f"epoch {self.at.epoch + 1}/{self.config.train.epochs}") as bar:
            bar.advance(self.at.position)
            while self.at.position < steps and not self._enough():
                stop = self.step()
                self.clock.count(self.at.step)
                loss = self.at.totals.means(self.losses)["loss"]
                bar.advance(self.at.position - bar.done, f"loss {loss:.4f}  {self.clock.rate:.0f} samples/s")
                due = self._due(self.config.checkpoint.every_steps, self.at.step) and self.at.position < steps
                if (stop or due) and self._meet():
                    return True
                if due:
                    self._save()
        stop = self.together.apart and self._meet()
        self.clock.count(self.at.step)
        return stop

    def _meet(self) -> bool:
        """Wait until all replicas are here; whether any rank was asked to stop. Raises what any replica met, on all."""
        while not self.together.complete(self.at.step):
            self.step()
        return self.together.settle()

    def step(self) -> bool:
        """One step, forward to update; whether any rank was asked to stop. Raises what any rank met, on all.

        Of replicas that do not agree in every step: whether they are called to a meeting, and nothing is raised.
        """
        self.clock.begin_step()
        epoch, position, steps, train = self.at.epoch, self.at.position, self.batches.steps, self.config.train
        lr = schedule.learning_rate(self.config.optim, train.batch, self.at.step, steps, train.epochs * steps)
        verdict = self.together.gradients(self.at.step, self._gradients)
        if verdict.finite:
            self.at.totals.add(verdict.totals)
        done = self.together.update(self.at.step, lr, verdict.finite)
        self.at.step += done
        self.at.position += done
        if self.world.rank == 0 and verdict.totals.sums:
            fields = verdict.totals.means(self.losses) | {"lr": lr}
            if verdict.gradient_norm is not None:
                fields["gradient_norm"] = verdict.gradient_norm
            digest = runfolder.digest(self.batches.ids(epoch, position)[0])
            self.metrics.write("step", step=self.at.step, epoch=epoch, **fields, samples=digest)
        self.clock.end_step()
        return verdict.stop

    def _gradients(self) -> Verdict:
        """The step as far as gradients, ready for the update: the sum of those of equal parts of the batch."""
        if self.world.rank == self.config.debug.delay_rank:
            sleep(self.config.debug.delay_seconds)
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
        # replicas draw different dropout
        step = (self.at.step * parts + part) * self.replicas.count + self.replicas.index
        rows = self.executor.forward(Phase(training=True, step=step))
        weights = self.feed.weights(epoch, number)
        suspects = self.feed.suspects(epoch, number, rows) if error is None else ([], [])
        verdict = judge(self.comm, self.feed.sums(rows, weights), error, suspects, self.together.stop_asked())
        if not verdict.finite:
            self._not_finite(self.comm, self._where(), *blame(self.comm, self.feed, suspects))
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
                self._not_finite(self.comm, self._where(), "the loss is, but not its gradient", remedy)
        if factor != 1:
            self.executor.gradients.scale(factor)
        return norm

    def _where(self) -> str:
        return f"step {self.at.step + 1} (epoch {self.at.epoch + 1})"

    def evaluate(self, feed: Feed) -> Totals:
        """Sums over a whole data set, of which the last batch is padded with samples of weight 0, by the mean of all
        replicas. Collective over all ranks.
        """
        with sync.averaged(self.replicas, [tensor.array for tensor in self.executor.tensors()]):
            return self._evaluate(feed)

    def _evaluate(self, feed: Feed) -> Totals:
        totals, error = Totals(), None
        suspects: Suspects = ([], [])
        for step in range(feed.batches.steps):
            error = error or feed.fill(0, step)
            rows = self.executor.forward(Phase(training=False))
            totals.add(feed.sums(rows, feed.weights(0, step)))
            if error is None:
                for found, more in zip(suspects, feed.suspects(0, step, rows), strict=True):
                    found += more
        verdict = judge(self.everybody, totals, error, suspects, stop=False)
        if not verdict.finite:
            why = blame(self.everybody, feed, suspects)
            self._not_finite(self.everybody, f"evaluation after step {self.at.step}", *why)
        return verdict.totals

    def _finish_epoch(self) -> dict[str, Any]:
        """Report and save; the epoch's record."""
        if common(self.replicas, self.at).totals.samples == 0:
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
        spent = self.clock.epoch()
        totals = common(self.replicas, self.at).totals
        record: dict[str, Any] = {"epoch": self.at.epoch, "step": self.at.step} | totals.means(self.losses)
        last = event == "end" or self.at.epoch == self.config.train.epochs
        if self.tests is not None and (last or self._due(self.config.train.eval_every, self.at.epoch)):
            record |= self.evaluate(self.tests).means(self.losses, "test_")
        record |= spent
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

    def _report_steps(self) -> dict[str, float | None]:
        """Record and say what a step took, beside what it should by the plan; figures of a whole one. Collective."""
        found, forecast = reckoning.slowest(self.everybody.allgather(self.clock.steps(self.world.rank))), None
        if found is None:
            return {}
        with all_ranks(self.everybody):
            if self.world.rank == 0:
                forecast = self.start.forecast(summation.recorded(self.plan, self.executor))
                reckoning.write(self.folder, found, forecast)
                self.metrics.write("prediction", step=self.at.step, **reckoning.record(found, forecast))
                self.metrics.flush()
        announce.steps(self.console, self.world, self.folder, found, forecast)
        return reckoning.summary(found, forecast)

    def _not_finite(self, comm: Intracomm, where: str, why: str, remedy: str) -> None:
        """Stop or go on as the config says, all ranks of `comm` alike."""
        if self.config.train.nonfinite == "stop":
            raise NumericsError(f"{where}: not finite: {why}; {remedy}, or with train.nonfinite=skip")
        if comm.rank == 0:
            self.console.warn(f"{where}: not finite: {why}; skipped")

    # --- small things ----------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self.saver.save(self.at)
        if self.world.rank == 0:
            self.metrics.flush()

    def _test_feed(self, test: Dataset) -> Feed:
        return self._feed(test, Batches(test.samples, self.config.train.part, 0, shuffle=False, drop_last=False))

    def _feed(self, data: Dataset, batches: Batches) -> Feed:
        """This replica's samples of each part of a batch."""
        part, stripe = self.config.train.part, self.replicas.index
        return Feed(data, replace(batches, batch=part, stripe=stripe, stripes=self.replicas.count), self.executor)

    @staticmethod
    def _due(every: int, count: int) -> bool:
        return every > 0 and count % every == 0

    def _enough(self) -> bool:
        limit = self.config.train.steps
        return limit is not None and self.at.step >= limit
