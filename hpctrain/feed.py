"""One data set bound to a network's inputs on this rank: fills them batch by batch, and looks at what it fills in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter

import numpy as np

from hpctrain.data.dataset import Dataset
from hpctrain.data.loader import Loader
from hpctrain.data.order import Batches
from hpctrain.errors import DataError, HpctrainError
from hpctrain.executor import Executor
from hpctrain.layers.loss import LOSS, Loss
from hpctrain.metrics import Totals
from hpctrain.partition import volume
from hpctrain.precision import BF16, exact


class Feed:
    """Local: nothing here communicates, so that every rank can go on to where all of them agree what to do."""

    def __init__(self, data: Dataset, batches: Batches, executor: Executor) -> None:
        self.data, self.batches, self.executor = data, batches, executor
        self.loader = Loader(data, batches, executor.box("x"), executor.box("y"))
        x = executor.input("x")
        self.read = np.empty(x.shape, exact(x.dtype)) if x.dtype == BF16 else x
        """Where x is read to and normalized."""
        self.losses = executor.graph.losses
        self.seconds = 0.0
        """Time spent reading so far."""

    def fill(self, epoch: int, step: int) -> HpctrainError | None:
        """Fill the inputs; an error is returned, as the other ranks are already on their way into `forward`."""
        begin = perf_counter()
        try:
            self.loader.load(epoch, step, self.read, self.executor.input("y"))
            if self.read.dtype != self.executor.dtype:
                np.copyto(self.executor.input("x"), self.read, casting="unsafe")
            self._check_targets(epoch, step)
        except HpctrainError as error:
            return error
        finally:
            self.seconds += perf_counter() - begin
        return None

    def sums(self, rows: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]) -> Totals:
        """What this rank's rows (n, 4) of each loss add up to; padding, of weight 0, counts for nothing."""
        found = Totals()
        for name, mine in rows.items():
            real = weights[name] > 0
            found.sums[name] = (mine[real].astype(np.float64).T @ weights[name][real]).tolist()
        found.samples = float(weights[self.losses[0].name].sum())
        return found

    def weights(self, epoch: int, step: int) -> dict[str, np.ndarray]:
        """By loss layer, the weights of the samples whose rows this rank holds, float64 (n,)."""
        _, every = self.batches.ids(epoch, step)
        return {loss.name: every[self.executor.box(loss.name)[0]] for loss in self.losses}

    def suspects(self, epoch: int, step: int, rows: Mapping[str, np.ndarray]) -> tuple[list[int], list[int]]:
        """Samples of a batch that are not finite: by what this rank reads of them, and by its rows of the losses."""
        ids, weights = self.batches.ids(epoch, step)
        x_box = self.loader.x_box
        read: list[int] = []
        if volume(x_box) and not np.isfinite(self.read).all():
            read = self.data.nonfinite(ids[x_box[0]], x_box[1:])
        broken = []
        for name, found in rows.items():
            mine = self.executor.box(name)[0]
            broken += ids[mine][~np.isfinite(found[:, LOSS]) & (weights[mine] > 0)].tolist()
        return read, broken

    def name(self, samples: Sequence[int], most: int = 8) -> str:
        """The user's ids of samples, for a message."""
        ids = self.data.sample_ids(np.array(sorted(set(samples))))
        more = f" and {len(ids) - most} more" if len(ids) > most else ""
        return f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:most]))}{more}"

    def _check_targets(self, epoch: int, step: int) -> None:
        """Raises DataError naming a sample whose target does not go with the network's outputs."""
        targets = self.executor.input("y")
        for loss in self.losses:
            if loss.inputs[1] != "y" or not isinstance(loss.layer, Loss):
                continue
            outputs = loss.input_shapes[0][-1]
            wrong = loss.layer.invalid(targets, outputs)
            if wrong.any():
                rows = wrong.reshape(len(wrong), -1).any(axis=1)
                ids = self.batches.ids(epoch, step)[0][self.loader.y_box[0]][rows]
                label, remedy = targets[wrong][0], "mend the data or the network"
                if label == self.data.ignore:
                    remedy = f"the data set ignores this label: give layer {loss.name} ignore=sample.ignore"
                raise DataError(
                    f"{self.data.folder}: label {label} of {self.name(ids.tolist()[:1])}, but the network "
                    f"has {outputs} outputs (labels 0 to {outputs - 1}); {remedy}"
                )
