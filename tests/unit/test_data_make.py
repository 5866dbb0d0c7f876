"""The data sets made here: real digits, split fairly; volumes whose measured spectrum is what their targets say."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage
from sklearn.datasets import load_digits

from hpctrain.data.dataset import Dataset
from hpctrain.data.make.digits import make_digits, stratified_split, upscale
from hpctrain.data.make.volumes import make_volumes, volume
from hpctrain.errors import DataError
from hpctrain.partition import whole


def read_all(folder: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x and y in stored units, and the sample ids, of a whole data set."""
    data = Dataset(folder, normalize=False)
    ids = np.arange(data.samples)
    x, y = np.empty((data.samples, *data.x_shape)), np.empty((data.samples, *data.y_shape))
    data.read_x(ids, whole(data.x_shape), x)
    data.read_y(ids, y)
    return x, y, data.sample_ids(ids)


# --- digits --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, once for all tests."""
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder)
    return folder


def test_digits_are_scikit_learn_s(digits: Path) -> None:
    """Every image and label, upscaled by another library."""
    source = load_digits()
    for part in ("train", "test"):
        x, y, ids = read_all(digits / part)
        np.testing.assert_array_equal(y, source.target[ids])
        expected = [ndimage.zoom(image, 3.5, order=1, mode="nearest", grid_mode=True) for image in source.images[ids]]
        assert x.shape == (len(ids), 28, 28, 1)
        np.testing.assert_allclose(x[..., 0], np.array(expected) * (255 / 16), rtol=0, atol=0.5 + 1e-9)
        assert Dataset(digits / part).x_dtype == np.uint8


def test_the_split_is_stratified_disjoint_and_complete(digits: Path) -> None:
    (_, y_train, train), (_, y_test, test) = read_all(digits / "train"), read_all(digits / "test")
    assert sorted([*train, *test]) == list(range(1797))
    for label in range(10):
        share = (y_test == label).sum() / ((y_test == label).sum() + (y_train == label).sum())
        assert share == pytest.approx(0.2, abs=0.5 / 170)
    assert set(np.diff(test)) > {1, 2, 3}  # spread over the file, not its tail


def test_both_parts_are_normalized_by_the_training_data(digits: Path) -> None:
    x, _, _ = read_all(digits / "train")
    for part in ("train", "test"):
        data = Dataset(digits / part)
        np.testing.assert_allclose((data.mean, data.std), ([x.mean()], [x.std()]))
        assert data.classes == 10


def test_digits_are_the_same_bytes_for_the_same_seed(digits: Path, tmp_path) -> None:
    time.sleep(1.1)  # HDF5 likes to write the time, in seconds, into its files
    make_digits(tmp_path / "again")
    make_digits(tmp_path / "other", seed=1)
    for name in ("train/index.json", "train/shard-00000.h5", "test/index.json", "test/shard-00000.h5"):
        assert (digits / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
        assert (digits / name).read_bytes() != (tmp_path / "other" / name).read_bytes()


@pytest.mark.parametrize("size", [1, 5, 8, 13, 32])
def test_upscale(size: int, seed) -> None:
    images = np.random.default_rng(seed).random((3, 8, 8))
    if size >= 8:
        expected = [ndimage.zoom(image, size / 8, order=1, mode="nearest", grid_mode=True) for image in images]
        np.testing.assert_allclose(upscale(images, size), expected, atol=1e-12)
    # Whatever the size, a plane stays a plane inside: interpolation is exact for it.
    plane = np.add.outer(np.arange(8.0), 2 * np.arange(8.0))[None]
    centres = np.clip((np.arange(size) + 0.5) * 8 / size - 0.5, 0, 7)
    np.testing.assert_allclose(upscale(plane, size)[0], np.add.outer(centres, 2 * centres), atol=1e-12)


@pytest.mark.parametrize("counts", [(10, 10), (7, 13, 1), (3, 100)])
def test_a_split_of_any_classes(counts, seed) -> None:
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    train, test = stratified_split(labels, seed=3)
    assert sorted([*train, *test]) == list(range(sum(counts)))
    assert np.bincount(labels[test], minlength=len(counts)).tolist() == [round(n / 5) for n in counts]


def test_digits_without_scikit_learn(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match=r"pip install 'hpctrain\[demo\]'"):
        make_digits(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_digits_are_not_written_over(digits: Path) -> None:
    with pytest.raises(DataError, match=f"{digits}/train: already holds a data set"):
        make_digits(digits)
    with pytest.raises(DataError, match="size = 0; give 1 or more"):
        make_digits(digits, size=0)


# --- volumes -------------------------------------------------------------------------------------------------------


def spectrum(field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """|k| and |F(k)|^2 / N^3 of every mode but k = 0, by the complex transform."""
    size = len(field)
    k = np.linalg.norm(np.stack(np.meshgrid(*[np.fft.fftfreq(size) * size] * 3, indexing="ij")), axis=0)
    power = np.abs(np.fft.fftn(field)) ** 2 / size**3
    return k.ravel()[1:], power.ravel()[1:]


@pytest.mark.parametrize("size", [16, 17])
def test_the_spectrum_is_what_the_targets_say(tmp_path, size: int) -> None:
    """20 volumes, measured back: P(k) = A (k / k0)^n with k0 = sqrt(size / 2)."""
    make_volumes(tmp_path, size, train=14, test=6, seed=5)
    errors = []
    for part in ("train", "test"):
        data = Dataset(tmp_path / part)
        assert data.names == ("spectral index", "amplitude")
        x, y, _ = read_all(tmp_path / part)
        for field, (n, amplitude) in zip(x[..., 0], y * data.y_scale + data.y_offset, strict=True):
            assert -3 <= n <= -1
            assert 0.5 <= amplitude <= 1.5
            k, power = spectrum(field)
            assert abs(field.mean()) < 1e-6
            ratio = power / (k / np.sqrt(size / 2)) ** n
            modes = len(k) / 2  # k and -k are one
            assert ratio.mean() == pytest.approx(amplitude, rel=5 / np.sqrt(modes))
            shells = [(k >= low) & (k < low + 1) for low in range(1, size // 2)]
            means = np.array([ratio[shell].mean() / amplitude for shell in shells])
            deviations = (means - 1) * np.sqrt([shell.sum() / 2 for shell in shells])
            errors.append(deviations)
            weights = np.sqrt([shell.sum() for shell in shells])
            centres = [np.exp(np.log(k[shell]).mean()) for shell in shells]
            measured = n + np.polyfit(np.log(centres), np.log(means), 1, w=weights)[0]
            assert measured == pytest.approx(n, abs=0.25)
    # Each shell's power is exponential with the right mean: deviations in units of sigma are standard.
    assert abs(np.mean(errors)) < 5 / np.sqrt(np.size(errors))
    assert np.std(errors) == pytest.approx(1, abs=0.25)


def test_any_volume_can_be_made_alone(tmp_path) -> None:
    make_volumes(tmp_path, size=7, train=5, test=3, seed=11)
    for part, first in (("train", 0), ("test", 5)):
        data = Dataset(tmp_path / part)
        x, y, ids = read_all(tmp_path / part)
        assert ids.tolist() == list(range(first, first + data.samples))
        for i, sample in enumerate(ids.tolist()):
            field, parameters = volume(7, 11, sample)
            np.testing.assert_array_equal(x[i, ..., 0], field.astype(np.float32))
            np.testing.assert_allclose(y[i] * data.y_scale + data.y_offset, parameters, rtol=1e-6)


def test_more_volumes_begin_with_the_same(tmp_path) -> None:
    make_volumes(tmp_path / "few", size=5, train=3, test=1)
    make_volumes(tmp_path / "many", size=5, train=6, test=1)
    make_volumes(tmp_path / "other", size=5, train=3, test=1, seed=1)
    few, many, other = (read_all(tmp_path / name / "train")[0] for name in ("few", "many", "other"))
    np.testing.assert_array_equal(few, many[:3])
    assert not np.isin(few, other).any()


def test_targets_are_uniform_and_standard() -> None:
    """2000 samples: mean 0 and variance 1 in the scaled units, uncorrelated, and each quarter of the range as full."""
    parameters = np.array([volume(2, 0, sample)[1] for sample in range(2000)])
    unit = (parameters - [-3, 0.5]) / [2, 1]
    for values in unit.T:
        assert np.abs(np.histogram(values, 4, (0, 1))[0] - 500).max() < 5 * np.sqrt(375)
    assert abs(np.corrcoef(unit.T)[0, 1]) < 5 / np.sqrt(2000)


def test_noise_is_standard_normal() -> None:
    """Moments of white noise: a field with its spectrum divided out, 32768 values."""
    field, (n, amplitude) = volume(32, 9, 4)
    k = np.linalg.norm(np.stack(np.meshgrid(*[np.fft.fftfreq(32) * 32] * 3, indexing="ij")), axis=0)
    k[0, 0, 0] = 1
    white = np.fft.ifftn(np.fft.fftn(field) / np.sqrt(amplitude * (k / 4) ** n))
    assert np.abs(white.imag).max() < 1e-10
    moments = [(white.real**p).mean() for p in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.15)


@pytest.mark.parametrize(("size", "train", "test"), [(1, 4, 4), (8, 0, 4), (8, 4, 0)])
def test_volumes_that_cannot_be(tmp_path, size: int, train: int, test: int) -> None:
    with pytest.raises(DataError, match=f"size = {size}, train = {train}, test = {test}; give"):
        make_volumes(tmp_path, size, train, test)
    assert list(tmp_path.iterdir()) == []
