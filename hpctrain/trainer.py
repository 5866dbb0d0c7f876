"""The training loop: read a batch, forward, agree, backward, update; evaluate, save, and stop or resume anywhere."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from hpctrain import backends, launch, optim, prepare, runfolder
from hpctrain.comm.world import STOPPED, World, agree, all_ranks
from hpctrain.config import Config
from hpctrain.console import Console, print_json
from hpctrain.data.dataset import Dataset
from hpctrain.data.loader import Loader
from hpctrain.data.order import Batches
from hpctrain.errors import DataError, HpctrainError, NumericsError
from hpctrain.executor import Executor
from hpctrain.layers.loss import LOSS, SCORE, WEIGHT, Loss
from hpctrain.metrics import MetricsFile, Totals
from hpctrain.optim.schedule import learning_rate
from hpctrain.saving import Progress, Saver


def run(world: World, config: Config, resume: Path | None = None, json_output: bool = False) -> int:
    """Train as `config` says; the exit status. `resume` is a run folder to continue. Collective."""
    console = Console(world.rank, config.run.log_every)
    try:
        return Trainer(world, config, console, resume).train(json_output)
    finally:
        console.close()


class Trainer:
    """One run. Collective over `world`; every error is raised on all ranks alike before they communicate."""

    def __init__(self, world: World, config: Config, console: Console, resume: Path | None = None) -> None:
        self.world, self.config, self.console = world, config, console
        self.comm, self.folder = world.comm, Path(config.run.folder)
        with all_ranks(self.comm):
            self.data, self.test = prepare.open_datasets(config)
            self.graph = prepare.build_graph(config, self.data)
            self.plan = prepare.make_plan(config, self.graph)
            self.batches = Batches(self.data.samples, config.train.batch, config.train.seed)
            self.loss = self.graph.loss
            backend = backends.get(config.train.backend)
            if config.data.verify:
                self._verify_data()
        self._describe(backend.describe())
        precision, seed = config.train.precision, config.train.seed
        self.executor = Executor(self.graph, self.plan, self.comm, backend, precision, seed)
        flat = self.executor.parameters
        self.optimizer = optim.TABLE[config.optim.name](
            flat.weights, flat.gradients, flat.runs(), backend, config.optim
        )
        with all_ranks(self.comm):
            self.loader = self._loader(self.data, self.batches)
            self.tester = None if self.test is None else self._loader(self.test, self._test_batches(self.test))
        self.saver = Saver(world, config, self.executor, self.optimizer, self.data.uuid, console)
        self.at: Progress = self.saver.restore(resume)
        self.input_seconds = self.seconds = self.rate = 0.0
        with all_ranks(self.comm):
            if world.rank == 0:
                runfolder.write(self.folder, config, self.plan, world)
                self.metrics = MetricsFile(self.folder / "metrics.jsonl", self.at.step)

    # --- the loop --------------------------------------------------------------------------------------------------

    def train(self, json_output: bool = False) -> int:
        """Train to the end, or until asked to stop; the exit status. The last checkpoint is of the last step."""
        epochs: list[dict[str, Any]] = []
        while self.at.epoch < self.config.train.epochs and not self._enough():
            if self._train_epoch():
                self._save()
                self._say_stopped()
                return STOPPED
            if self.at.position == self.batches.steps:
                epochs.append(self._finish_epoch())
        self._save()
        self.console.note(f"run folder {self.folder}")
        if json_output and self.world.rank == 0:
            print_json("train", epochs)
        return 0

    def _train_epoch(self) -> bool:
        """Train to the end of the epoch; whether it ended early because a rank was asked to stop."""
        every = self.config.checkpoint.every_steps
        begin, done, self.phases = perf_counter(), 0, self._phases()
        with self.console.progress(self.batches.steps, f"epoch {self.at.epoch + 1}/{self.config.train.epochs}") as bar:
            bar.advance(self.at.position)
            while self.at.position < self.batches.steps and not self._enough():
                stop = self.step()
                done += self.config.train.batch
                means = self.at.totals.means(self._score)
                bar.advance(1, f"loss {means['loss']:.4f}  {done / (perf_counter() - begin):.0f} samples/s")
                if every and self.at.step % every == 0:
                    self._save()
                if stop:
                    return True
        self.seconds, self.rate = perf_counter() - begin, done / (perf_counter() - begin)
        return False

    def step(self) -> bool:
        """One step, forward to update; whether any rank was asked to stop. Raises what any rank met, on all."""
        lr = learning_rate(
            self.config.optim, self.at.step, self.batches.steps, self.config.train.epochs * self.batches.steps
        )
        ids, weights = self.batches.ids(self.at.epoch, self.at.position)
        skipping = self.config.train.nonfinite == "skip"
        running = [tensor.array.copy() for tensor in self.executor.state] if skipping else []
        error = self._load(self.loader, self.at.epoch, self.at.position)
        rows = self.executor.forward()
        weights = weights[self.executor.box(self.loss.name)[0]]
        totals, stop = self._agree(self._sums(rows, weights), error)
        finite = bool(np.isfinite(totals.loss))
        if finite:
            gradient = np.zeros_like(rows)
            gradient[:, LOSS] = weights / totals.weight
            self.executor.backward(gradient)
            self.optimizer.step(lr)
            self.at.totals.add(totals)
        else:
            self._not_finite(rows, ids)
            for tensor, before in zip(self.executor.state, running, strict=True):
                tensor.array[...] = before
        self.at.step += 1
        self.at.position += 1
        if self.world.rank == 0:
            fields = totals.means(self._score) | {"lr": lr, "samples": runfolder.digest(ids)}
            self.metrics.write("step", step=self.at.step, epoch=self.at.epoch, **fields)
        return stop

    def evaluate(self) -> Totals:
        """Sums over the whole test set, of which the last batch is padded with samples of weight 0."""
        totals, error = Totals(), None
        if self.tester is None:
            return totals
        box = self.executor.box(self.loss.name)[0]
        for step in range(self.tester.batches.steps):
            error = error or self._load(self.tester, 0, step)
            rows = self.executor.forward(training=False)
            totals.add(self._sums(rows, self.tester.batches.ids(0, step)[1][box]))
        return self._agree(totals, error)[0]

    def _finish_epoch(self) -> dict[str, Any]:
        """Evaluate, record and save; the epoch's record."""
        self.at.epoch, self.at.position = self.at.epoch + 1, 0
        spent = {phase: value - self.phases[phase] for phase, value in self._phases().items()}
        record: dict[str, Any] = {"epoch": self.at.epoch, "step": self.at.step} | self.at.totals.means(self._score)
        if self.tester is not None and self.at.epoch % self.config.train.eval_every == 0:
            record |= self.evaluate().means(self._score, "test_")
        self.at.totals = Totals()
        record |= {"seconds": self.seconds, "samples_per_second": self.rate}
        record |= spent
        if self.world.rank == 0:
            self.metrics.write("epoch", **record)
            self.metrics.flush()
        self.console.epoch(record)
        every = self.config.checkpoint.every_epochs
        if every and self.at.epoch % every == 0:
            self._save()
        return record

    # --- agreement -------------------------------------------------------------------------------------------------

    def _sums(self, rows: np.ndarray, weights: np.ndarray) -> Totals:
        sums = weights @ rows.astype(np.float64)
        return Totals(float(sums[LOSS]), float(sums[WEIGHT]), float(sums[SCORE]), float(weights.sum()))

    def _agree(self, mine: Totals, error: HpctrainError | None) -> tuple[Totals, bool]:
        """The small allreduce of every step: sums of all ranks, whether to stop; raises any rank's error on all.

        Gathered and added in rank order: some MPI libraries add in the order of arrival, other bits on every run.
        """
        said = [mine.loss, mine.weight, mine.score, mine.samples]
        said += [float(error is not None), float(self.world.stop.received is not None)]
        every = np.empty((self.world.size, len(said)))
        self.comm.Allgather(np.array(said), every)
        total = every.sum(axis=0)
        if total[-2]:
            agree(self.comm, error)
        return Totals(*total[:4]), bool(total[-1])

    def _load(self, loader: Loader, epoch: int, step: int) -> HpctrainError | None:
        """Fill the network's inputs; an error is returned, as the others are already on their way into `forward`."""
        begin = perf_counter()
        try:
            loader.load(epoch, step, self.executor.input("x"), self.executor.input("y"))
            self._check_targets(loader, epoch, step)
        except HpctrainError as error:
            return error
        finally:
            self.input_seconds += perf_counter() - begin
        return None

    def _check_targets(self, loader: Loader, epoch: int, step: int) -> None:
        layer, outputs = self.loss.layer, self.loss.input_shapes[0][-1]
        if not isinstance(layer, Loss) or not np.issubdtype(self.executor.input("y").dtype, np.integer):
            return
        wrong = layer.invalid(self.executor.input("y"), outputs)
        if wrong.any():
            ids = loader.batches.ids(epoch, step)[0][loader.y_box[0]][wrong]
            raise DataError(
                f"{loader.dataset.folder}: label {self.executor.input('y')[wrong][0]} of sample {ids[0]}, but the "
                f"network has {outputs} outputs (labels 0 to {outputs - 1}); mend the data or the network"
            )

    def _not_finite(self, rows: np.ndarray, ids: np.ndarray) -> None:
        """Name the samples behind a loss that is not finite, and stop or skip as the config says. Collective."""
        x_box = self.loader.x_box
        inputs = self.data.nonfinite(ids[x_box[0]], x_box[1:]) if all(s.start < s.stop for s in x_box) else []
        bad_rows = ids[self.executor.box(self.loss.name)[0]][~np.isfinite(rows[:, LOSS])].tolist()
        said = self.comm.allgather((inputs, bad_rows))
        from_data = sorted({i for found, _ in said for i in found})
        from_loss = sorted({i for _, found in said for i in found})
        where = f"step {self.at.step + 1} (epoch {self.at.epoch + 1}): the loss is not finite"
        if from_data:
            why = (
                f"{self.data.folder}: NaN or infinity in {_some(self.data.sample_ids(np.array(from_data)))}; mend them"
            )
        else:
            why = f"inputs are finite; loss of {_some(self.data.sample_ids(np.array(from_loss)))}; try a lower optim.lr"
        if self.config.train.nonfinite == "stop":
            raise NumericsError(f"{where}; {why}, or set train.nonfinite=skip")
        self._warn(f"{where}; {why}; this step is skipped")

    # --- small things ----------------------------------------------------------------------------------------------

    @property
    def _score(self) -> str:
        return self.loss.layer.score if isinstance(self.loss.layer, Loss) else "score"

    def _phases(self) -> dict[str, float]:
        """What this rank has spent so far: seconds by phase, and bytes sent in exchanges."""
        spent = {f"{phase}_seconds": seconds for phase, seconds in self.executor.seconds.items()}
        return spent | {"input_seconds": self.input_seconds, "bytes_sent": self.executor.bytes_sent()}

    def _save(self) -> None:
        self.saver.save(self.at)
        if self.world.rank == 0:
            self.metrics.flush()

    def _enough(self) -> bool:
        limit = self.config.train.steps
        return limit is not None and self.at.step >= limit

    def _loader(self, data: Dataset, batches: Batches) -> Loader:
        return Loader(data, batches, self.executor.box("x"), self.executor.box("y"))

    def _test_batches(self, test: Dataset) -> Batches:
        return Batches(test.samples, self.config.train.batch, 0, shuffle=False, drop_last=False)

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
        self.console.note(f"{self.world.size} ranks, {what}, {self.plan.allreduce} allreduce; {backend}")
        if self.plan.ranks < self.world.size:
            self._warn(f"the plan uses {self.plan.ranks} of {self.world.size} ranks; the others idle")
        for line in self.plan.notes:
            self.console.note(line)


def _some(ids: np.ndarray, most: int = 8) -> str:
    """Sample ids for a message."""
    more = f" and {len(ids) - most} more" if len(ids) > most else ""
    return f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:most]))}{more}"
