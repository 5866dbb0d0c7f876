"""One data set bound to a network's inputs on this rank: fills them batch by batch, and looks at what it fills in."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np

from hpctrain.data.dataset import Dataset
from hpctrain.data.loader import Loader
from hpctrain.data.order import Batches
from hpctrain.errors import DataError, HpctrainError
from hpctrain.executor import Executor
from hpctrain.layers.loss import LOSS, SCORE, WEIGHT, Loss
from hpctrain.metrics import Totals
from hpctrain.partition import volume


class Feed:
    """Local: nothing here communicates, so that every rank can go on to where all of them agree what to do."""

    def __init__(self, data: Dataset, batches: Batches, executor: Executor) -> None:
        self.data, self.batches, self.executor = data, batches, executor
        self.loader = Loader(data, batches, executor.box("x"), executor.box("y"))
        self.loss = executor.graph.loss
        self.seconds = 0.0
        """Time spent reading so far."""

    def fill(self, epoch: int, step: int) -> HpctrainError | None:
        """Fill the inputs; an error is returned, as the other ranks are already on their way into `forward`."""
        begin = perf_counter()
        try:
            self.loader.load(epoch, step, self.executor.input("x"), self.executor.input("y"))
            self._check_targets(epoch, step)
        except HpctrainError as error:
            return error
        finally:
            self.seconds += perf_counter() - begin
        return None

    def sums(self, rows: np.ndarray, weights: np.ndarray) -> Totals:
        """What the loss rows (n, 3) of this rank's samples add up to; padding, of weight 0, counts for nothing."""
        real = weights > 0
        sums = rows[real].astype(np.float64).T @ weights[real]
        return Totals(float(sums[LOSS]), float(sums[WEIGHT]), float(sums[SCORE]), float(weights.sum()))

    def weights(self, epoch: int, step: int) -> np.ndarray:
        """Weights of the samples whose loss rows this rank holds, float64 (n,)."""
        return self.batches.ids(epoch, step)[1][self.executor.box(self.loss.name)[0]]

    def suspects(self, epoch: int, step: int, rows: np.ndarray) -> tuple[list[int], list[int]]:
        """Samples of a batch that are not finite: by what this rank reads of them, and by its rows of the loss."""
        ids, weights = self.batches.ids(epoch, step)
        x_box, mine = self.loader.x_box, self.executor.box(self.loss.name)[0]
        read: list[int] = []
        if volume(x_box) and not np.isfinite(self.executor.input("x")).all():
            read = self.data.nonfinite(ids[x_box[0]], x_box[1:])
        broken = ~np.isfinite(rows[:, LOSS]) & (weights[mine] > 0)
        return read, ids[mine][broken].tolist()

    def name(self, samples: Sequence[int], most: int = 8) -> str:
        """The user's ids of samples, for a message."""
        ids = self.data.sample_ids(np.array(sorted(set(samples))))
        more = f" and {len(ids) - most} more" if len(ids) > most else ""
        return f"sample{'s' if len(ids) > 1 else ''} {', '.join(map(str, ids[:most]))}{more}"

    def _check_targets(self, epoch: int, step: int) -> None:
        layer, outputs, targets = self.loss.layer, self.loss.input_shapes[0][-1], self.executor.input("y")
        wrong = layer.invalid(targets, outputs) if isinstance(layer, Loss) else np.zeros(len(targets), bool)
        if wrong.any():
            ids = self.batches.ids(epoch, step)[0][self.loader.y_box[0]][wrong]
            raise DataError(
                f"{self.data.folder}: label {targets[wrong][0]} of {self.name(ids.tolist()[:1])}, but the network has "
                f"{outputs} outputs (labels 0 to {outputs - 1}); mend the data or the network"
            )
