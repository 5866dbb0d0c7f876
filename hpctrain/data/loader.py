"""Fills this rank's blocks of one batch: only its samples, only its slab."""

from __future__ import annotations

import numpy as np

from hpctrain.data.dataset import Dataset
from hpctrain.data.index import extents
from hpctrain.data.order import Batches
from hpctrain.errors import DataError
from hpctrain.partition import Box, Shape, contains, volume, whole


class Loader:
    """Reads `x_box` of x (size, *x_shape) and `y_box` of y (size, *y_shape), global boxes, the samples of a step first.

    Boxes may be empty, and may cut the batch differently. `bytes_read` counts the bytes that this loader read:
    exactly its boxes' elements times the stored item size, step after step. Raises DataError where a box does not lie
    in its tensor.
    """

    def __init__(self, dataset: Dataset, batches: Batches, x_box: Box, y_box: Box) -> None:
        if batches.samples != dataset.samples:
            raise DataError(f"{dataset.folder}: has {dataset.samples} samples, the batches are of {batches.samples}")
        for name, box, shape in (("x", x_box, dataset.x_shape), ("y", y_box, dataset.y_shape)):
            _require_inside(dataset, name, box, (batches.size, *shape))
        self.dataset, self.batches, self.x_box, self.y_box = dataset, batches, x_box, y_box
        self.bytes_read = 0

    def load(self, epoch: int, step: int, x_out: np.ndarray, y_out: np.ndarray) -> None:
        """Fills `x_out` (*extent(x_box)), float32 or float64, and `y_out` (*extent(y_box)) with the batch of `step`.

        Raises DataError naming shard and sample where a file cannot be read, or holds a label out of range.
        """
        ids, _ = self.batches.ids(epoch, step)
        before = self.dataset.bytes_read
        if volume(self.x_box):
            self.dataset.read_x(ids[self.x_box[0]], self.x_box[1:], x_out)
        if volume(self.y_box):
            self.dataset.read_y(ids[self.y_box[0]], y_out, self.y_box[1:])
        self.bytes_read += self.dataset.bytes_read - before


def _require_inside(dataset: Dataset, name: str, box: Box, shape: Shape) -> None:
    if len(box) != len(shape) or not contains(whole(shape), box):
        wanted = extents(tuple(s.stop for s in box))
        raise DataError(
            f"{dataset.folder}: a batch of {name} is {extents(shape)}, the network takes {wanted}; "
            "give a network of this input shape or other data"
        )
