"""Gaussian random fields whose power spectrum a network learns to read: P(k) = A * (k / k0) ** n."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from hpctrain.data.index import Index, Layout, Target
from hpctrain.data.writer import Chunk, Statistics, write_shards
from hpctrain.errors import DataError
from hpctrain.randomness import random_words

# Drawn uniformly. A is the power at the pivot k0, so that the two are nearly independent in the field.
SPECTRAL_INDEX = (-3.0, -1.0)
AMPLITUDE = (0.5, 1.5)


def make_volumes(folder: Path, size: int = 32, train: int = 512, test: int = 128, seed: int = 0) -> tuple[Index, Index]:
    """Writes FOLDER/train and FOLDER/test: x (size, size, size, 1) float32, y (2,) float32; returns their indices.

    y is (spectral index n, amplitude A), each scaled to mean 0 and variance 1; offset and scale lie in the index.
    Sample ids are 0 to train - 1 and train to train + test - 1: the numbers that `volume` makes the sample from. The
    same arguments give the same data. Raises DataError on sizes below 2 and where the folders already hold data.
    """
    if size < 2 or train < 1 or test < 1:
        raise DataError(
            f"volumes: size = {size}, train = {train}, test = {test}; give a size of 2 or more and 1 sample or more"
        )
    targets = tuple(
        Target(name, offset=(low + high) / 2, scale=(high - low) / 12**0.5)
        for name, (low, high) in (("spectral index", SPECTRAL_INDEX), ("amplitude", AMPLITUDE))
    )
    layout = Layout((size, size, size, 1), "float32", (2,), "float32", targets=targets)

    def write(part: str, ids: range, statistics: Statistics | None = None) -> Index:
        uuid = str(uuid5(NAMESPACE_URL, f"hpctrain volumes {part} size={size} seed={seed} ids={ids}"))
        return write_shards(
            Path(folder) / part, _samples(ids, layout, seed), layout, len(ids), uuid=uuid, statistics=statistics
        )

    training = write("train", range(train))
    return training, write("test", range(train, train + test), statistics=(training.mean, training.std))


def _samples(ids: range, layout: Layout, seed: int) -> Iterator[Chunk]:
    offset = np.array([target.offset for target in layout.targets])
    scale = np.array([target.scale for target in layout.targets])
    for sample in ids:
        field, parameters = volume(layout.x_shape[0], seed, sample)
        x = field.astype(np.float32)[None, ..., None]
        yield x, ((parameters - offset) / scale).astype(np.float32)[None], np.array([sample], np.int64)


def volume(size: int, seed: int, sample: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample number `sample`: a field (size, size, size) and its parameters (n, A), float64, from Philox(seed, sample).

    With F = fftn(field) and k = |integer frequencies|, the mean of |F|**2 / size**3 at k is P(k) = A * (k / k0) ** n,
    P(0) = 0.
    """
    cells = size**3
    pairs = -(-cells // 2)
    words = random_words("volume", seed, sample, 2 + 2 * pairs)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), so that the log is finite
    low, high = np.transpose([SPECTRAL_INDEX, AMPLITUDE])
    parameters = low + (high - low) * uniform[:2]
    noise = box_muller(uniform[2 : 2 + pairs], uniform[2 + pairs :])[:cells].reshape(size, size, size)
    filtered = np.fft.rfftn(noise) * np.sqrt(power(size, *parameters))
    return np.fft.irfftn(filtered, s=noise.shape, axes=(0, 1, 2)), parameters


def pivot(size: int) -> float:
    """k0: the geometric mean of the lowest frequency, 1, and the highest along an axis, size / 2."""
    return (size / 2) ** 0.5


def power(size: int, spectral_index: float, amplitude: float) -> np.ndarray:
    """P(k) at the frequencies of rfftn, (size, size, size // 2 + 1) float64."""
    whole, half = np.fft.fftfreq(size, 1 / size), np.fft.rfftfreq(size, 1 / size)
    k = np.sqrt(whole[:, None, None] ** 2 + whole[None, :, None] ** 2 + half**2)
    k[0, 0, 0] = np.inf if spectral_index < 0 else 0  # no power at k = 0: the mean of a field is 0
    return amplitude * (k / pivot(size)) ** spectral_index


def box_muller(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Independent standard normals, twice as many as the uniforms `u` and `v` in (0, 1)."""
    radius, angle = np.sqrt(-2 * np.log(u)), 2 * np.pi * v
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
