"""The handwritten digits of scikit-learn (1797 real images of 8 x 8), upscaled and split into training and test set."""

from __future__ import annotations

from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from hpctrain.data.index import Index, Layout
from hpctrain.data.order import permutation
from hpctrain.data.writer import Statistics, write_shards
from hpctrain.errors import DataError

TEST_SHARE = 0.2
WHITE = 16  # the brightest value in scikit-learn's images


def make_digits(folder: Path, seed: int = 0, size: int = 28) -> tuple[Index, Index]:
    """Writes FOLDER/train and FOLDER/test: x (size, size, 1) uint8 0 to 255, labels 0 to 9; returns their indices.

    The test set is 20 % of every class, drawn with `seed`; sample ids are scikit-learn's row numbers. The same
    arguments give the same bytes. Raises DataError where scikit-learn is missing or the folders already hold data.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("digits: scikit-learn carries them; run: pip install 'hpctrain[demo]'") from error
    if size < 1:
        raise DataError(f"digits: size = {size}; give 1 or more")
    digits = load_digits()
    labels = digits.target.astype(np.int64)
    x = np.rint(upscale(digits.images, size) * (255 / WHITE)).astype(np.uint8)[..., None]
    train, test = stratified_split(labels, seed)
    layout = Layout((size, size, 1), "uint8", (), "int64", classes=10)

    def write(part: str, ids: np.ndarray, statistics: Statistics | None = None) -> Index:
        uuid = str(uuid5(NAMESPACE_URL, f"hpctrain digits {part} seed={seed} size={size}"))
        return write_shards(
            Path(folder) / part, [(x[ids], labels[ids], ids)], layout, len(ids), uuid=uuid, statistics=statistics
        )

    training = write("train", train)
    return training, write("test", test, statistics=(training.mean, training.std))


def stratified_split(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, test) row numbers, int64, ascending: the test set takes 20 % of each class, rounded."""
    test = []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        chosen = permutation(seed, int(label), len(rows), purpose="split")[: round(TEST_SHARE * len(rows))]
        test.append(rows[chosen])
    held_out = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def upscale(images: np.ndarray, size: int) -> np.ndarray:
    """Bilinear interpolation of images (N, h, w) to (N, size, size) float64, centre to centre, edges repeated."""
    for dim in (1, 2):
        n = images.shape[dim]
        at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
        low = np.minimum(at.astype(np.int64), max(n - 2, 0))
        high = np.minimum(low + 1, n - 1)
        weight = (at - low).reshape([-1 if d == dim else 1 for d in range(3)])
        images = images.take(low, axis=dim) * (1 - weight) + images.take(high, axis=dim) * weight
    return images
