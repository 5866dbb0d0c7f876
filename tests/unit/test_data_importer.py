"""Importing NumPy files: every sample arrives, and what cannot be meant is refused by file and sample."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data.dataset import Dataset, inspect
from hpctrain.data.importer import import_arrays
from hpctrain.errors import DataError
from hpctrain.partition import whole


def saved(folder: Path, x: np.ndarray, y: np.ndarray) -> tuple[Path, Path]:
    """x.npy and y.npy in `folder`."""
    np.save(folder / "x.npy", x)
    np.save(folder / "y.npy", y)
    return folder / "x.npy", folder / "y.npy"


def read_back(folder: Path) -> tuple[np.ndarray, np.ndarray, Dataset]:
    """All of x and y as stored."""
    data = Dataset(folder, normalize=False)
    ids = np.arange(data.samples)
    x, y = np.empty((data.samples, *data.x_shape)), np.empty((data.samples, *data.y_shape))
    data.read_x(ids, whole(data.x_shape), x)
    data.read_y(ids, y)
    assert data.sample_ids(ids).tolist() == ids.tolist()
    data.verify()
    return x, y, data


@pytest.mark.parametrize(
    ("shape", "channels", "stored"),
    [
        ((11, 7, 5, 3), "last", (7, 5, 3)),
        ((11, 9, 7, 5, 2), "last", (9, 7, 5, 2)),
        ((11, 3, 7, 5), "first", (7, 5, 3)),
        ((11, 2, 9, 7, 5), "first", (9, 7, 5, 2)),
        ((11, 7, 5), "none", (7, 5, 1)),
        ((11, 9, 7, 5), "none", (9, 7, 5, 1)),
    ],
)
@pytest.mark.parametrize("dtype", ["uint8", ">f4", "<i2"])
def test_images_and_volumes(tmp_path, seed, shape, channels, stored, dtype) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 100, shape).astype(dtype)
    y = rng.integers(0, 4, 11).astype(np.uint8)
    y[3] = 4
    folder = tmp_path / "out"
    index = import_arrays(*saved(tmp_path, x, y), folder, channels=channels, shard_bytes=4 * x[0].nbytes)
    got, labels, data = read_back(folder)
    assert [entry.samples for entry in index.shards] == [4, 4, 3]
    assert (data.x_shape, data.x_dtype, data.classes) == (stored, np.dtype(dtype).newbyteorder("<"), 5)
    order = {"last": x, "first": np.einsum("nc...->n...c", x), "none": x.reshape(*shape, 1)}
    np.testing.assert_array_equal(got, order[channels])
    np.testing.assert_array_equal(labels, y)


def test_an_archive_equals_two_files(tmp_path, seed) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.random((6, 5, 3, 1)), rng.random((6, 2)).astype("f4")
    np.savez_compressed(tmp_path / "both.npz", x=x, y=y, more=[1])
    import_arrays(tmp_path / "both.npz", None, tmp_path / "a", names=("mass", "age"))
    import_arrays(*saved(tmp_path, np.asfortranarray(x), y), tmp_path / "b", names=("mass", "age"))
    for folder in ("a", "b"):
        got, values, data = read_back(tmp_path / folder)
        np.testing.assert_array_equal(got, x)
        np.testing.assert_array_equal(values, y)
        assert (data.classes, data.names, data.y_shape) == (None, ("mass", "age"), (2,))
        assert (data.y_offset.tolist(), data.y_scale.tolist()) == ([0, 0], [1, 1])


def test_one_value_a_sample_and_labels_of_every_point(tmp_path, seed) -> None:
    rng = np.random.default_rng(seed)
    x, values, mask = rng.random((6, 5, 3, 2)), rng.random(6), rng.integers(0, 3, (6, 5, 3))
    import_arrays(*saved(tmp_path, x, values), tmp_path / "values")
    np.testing.assert_array_equal(read_back(tmp_path / "values")[1], values[:, None])
    import_arrays(*saved(tmp_path, x, mask), tmp_path / "mask", classes=7)
    _, y, data = read_back(tmp_path / "mask")
    np.testing.assert_array_equal(y, mask)
    assert (data.y_shape, data.classes) == ((5, 3), 7)
    import_arrays(*saved(tmp_path, x, mask[:, 1:4, 1:2]), tmp_path / "middle", classes=3)
    assert read_back(tmp_path / "middle")[2].y_shape == (3, 1)


def test_test_data_take_mean_std_and_classes_of_the_training_data(tmp_path, seed) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.random((20, 5, 3, 2)), np.arange(20) % 6
    import_arrays(*saved(tmp_path, x[:14], y[:14]), tmp_path / "train")
    import_arrays(*saved(tmp_path, x[14:] + 9, y[14:] % 2), tmp_path / "test", like=tmp_path / "train")
    data = read_back(tmp_path / "test")[2]
    np.testing.assert_allclose(data.mean, x[:14].mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(data.std, x[:14].std(axis=(0, 1, 2)))
    assert data.classes == 6
    message = "y.npy: label 6 of sample 2, but .*train has 6 classes; import both with --classes 7, or --ignore 6 if"
    with pytest.raises(DataError, match=message):
        import_arrays(*saved(tmp_path, x[:3], np.array([1, 0, 6])), tmp_path / "high", like=tmp_path / "train")
    for wrong_x, wrong_y in ((x[..., :1], y), (x, y.astype("f4"))):
        message = "the training data .*train has x 5 x 3 x 2, y scalar int64; give data of one kind"
        with pytest.raises(DataError, match=message):
            import_arrays(*saved(tmp_path, wrong_x, wrong_y), tmp_path / "wrong", like=tmp_path / "train")


X, Y = np.ones((4, 5, 3, 1), "f4"), np.arange(4)


def spoilt(array: np.ndarray, at: tuple[int, ...], value: float) -> np.ndarray:
    """A copy with one value replaced."""
    array = array.copy()
    array[at] = value
    return array


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (spoilt(X, (2, 4, 1, 0), np.nan), Y, "x of sample 2 is not finite"),
        (spoilt(X, (3, 0, 0, 0), np.inf), Y, "x of sample 3 is not finite"),
        (X, np.array([1, 2, np.nan, 4.0]), "y of sample 2 is not finite"),
        (X, np.array([1, -1, 0, 2]), "y.npy: label -1 of sample 1, but labels count from 0; give --ignore -1 if"),
        (X, -Y - 1, "classes = 0; labels count from 0"),
        (X[0], Y, r"x.npy: x is \(5, 3, 1\).*y is \(4,\); give one y for every x"),
        (X[0, ..., 0], Y[:5], r"x.npy: x is \(5, 3\).*y is \(4,\)"),
        (X[:, 0, 0], Y, r"x.npy: x is \(4, 1\) with channels = 'last'; give \(N, H, W, C\)"),
        (X[..., 0], Y, r"x.npy: x is \(4, 5, 3\) with channels = 'last'.*channels = 'none' for \(N, H, W\)"),
        (X[..., None, None], Y, r"x.npy: x is \(4, 5, 3, 1, 1, 1\)"),
        (X[:3], Y, r"x.npy: x is \(3, 5, 3, 1\), and .*y.npy: y is \(4,\)"),
        (X[:0], Y[:0], r"x.npy: x is \(0, 5, 3, 1\)"),
        (X, Y[0], r"y.npy: y is \(\)"),
        (X, Y[:, None], r"y.npy: labels are \(4, 1\); give \(N,\) or one label for each point"),
        (X, np.ones((4, 3, 5), int), r"y.npy: labels are \(4, 3, 5\); give .* point of x \(4, 5, 3\)"),
        (X.astype("c8"), Y, "x.npy: x is complex64; convert it to one of uint8"),
        (X.astype(bool), Y, "x.npy: x is bool; convert it"),
        (X, Y.astype("M8[s]"), r"y.npy: y is datetime64\[s\]; convert it"),
        (X, Y.astype("S1"), "y.npy: y is .S1; convert it"),
    ],
)
def test_arrays_that_cannot_be_meant(tmp_path, x, y, message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_arrays(*saved(tmp_path, x, y), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint64", ">i4"])
@pytest.mark.parametrize("ignore", [255, -1, 2, 3])
def test_label_that_counts_for_nothing(tmp_path, seed, dtype: str, ignore: int) -> None:
    """It is stored as it is, and no class for it; of a type that does not hold it there is none."""
    rng = np.random.default_rng(seed)
    x, y = rng.random((11, 5, 3, 1)), rng.integers(0, 4, (11, 5, 3)).astype(dtype)
    if ignore >= np.iinfo(dtype).min:
        y[rng.random(y.shape) < 0.3] = ignore
    import_arrays(*saved(tmp_path, x, y), tmp_path / "train", ignore=ignore)
    _, labels, data = read_back(tmp_path / "train")
    np.testing.assert_array_equal(labels, y)
    assert (data.ignore, data.classes) == (ignore, 3 if ignore == 3 else 4)
    assert inspect(tmp_path / "train")[-1]["ignore"] == ignore
    import_arrays(*saved(tmp_path, x, y), tmp_path / "test", like=tmp_path / "train")
    assert read_back(tmp_path / "test")[2].ignore == ignore
    with pytest.raises(
        DataError, match=f"--ignore 7, but the training data .*train ignore label {ignore}; import both"
    ):
        import_arrays(*saved(tmp_path, x, y), tmp_path / "other", like=tmp_path / "train", ignore=7)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("y", "options", "message"),
    [
        (
            [1, 0, 255, 3],
            {"classes": 4},
            "y.npy: label 255 of sample 2, but --classes 4; give --classes 256, or --ignore 255 if it is to count for ",
        ),
        ([1, 0, 2, 4], {"classes": 4, "ignore": 2}, "y.npy: label 4 of sample 3, but --classes 4; give --classes 5$"),
        ([255, -1, 0, 3], {"ignore": 255}, "y.npy: label -1 of sample 1, .* from 0; mend it, as --ignore 255 is for"),
        ([-1] * 4, {"ignore": -1}, "y.npy: no label that counts for something; give the number of classes, --classes"),
        ([1, 2, 0, 3], {"ignore": 2**63}, "ignore = 9223372036854775808; give a label within int64"),
        ([0.5, 1, 2, 3], {"ignore": 2}, "y.npy: y is float64: values, not labels, so --ignore 2 says nothing; leave"),
    ],
)
def test_label_that_is_no_class_says_what_would_admit_it(tmp_path, y: list, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        import_arrays(*saved(tmp_path, X, np.array(y)), tmp_path / "new" / "out", **options)
    assert not (tmp_path / "new").exists()


def test_refused_import_leaves_a_folder_that_was_there(tmp_path) -> None:
    """And what is in it."""
    x_path, y_path = saved(tmp_path, spoilt(X, (3, 0, 0, 0), np.inf), Y)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    for folder in (tmp_path / "full", tmp_path / "full" / "deeper" / "out"):
        with pytest.raises(DataError, match="not finite"):
            import_arrays(x_path, y_path, folder, shard_bytes=60)
        assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


def test_pickles_are_never_loaded(tmp_path) -> None:
    opened = tmp_path / "opened"

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (opened,))

    trap = np.array([Trap()] * 4, dtype=object)
    np.save(tmp_path / "x.npy", trap)
    np.save(tmp_path / "y.npy", Y)
    np.savez(tmp_path / "both.npz", x=trap, y=Y)
    (tmp_path / "raw.npy").write_bytes(trap[:1].dumps())
    for x_path, y_path in (("x.npy", "y.npy"), ("both.npz", None), ("raw.npy", "y.npy"), ("y.npy", "x.npy")):
        message = f"{tmp_path}/[a-z]+.np[yz]: not usable: .*; give .npy files of plain numbers"
        with pytest.raises(DataError, match=message):
            import_arrays(tmp_path / x_path, y_path and tmp_path / y_path, tmp_path / "out")
    assert not opened.exists()


def test_files_that_cannot_be_read(tmp_path) -> None:
    x_path, y_path = saved(tmp_path, X, Y)
    np.savez(tmp_path / "both.npz", x=X, y=Y)
    np.savez(tmp_path / "other.npz", x=X, z=Y)
    (tmp_path / "short.npy").write_bytes(x_path.read_bytes()[:-1])
    (tmp_path / "short.npz").write_bytes((tmp_path / "both.npz").read_bytes()[:-30])
    (tmp_path / "empty.npy").touch()
    for x, y, message in [
        ("gone.npy", y_path, "gone.npy: not usable: .*No such file"),
        ("short.npy", y_path, "short.npy: not usable: "),
        ("short.npz", None, "short.npz: not usable: "),
        ("empty.npy", y_path, "empty.npy: not usable: "),
        ("other.npz", None, "other.npz: not usable: no key 'y', only x, z"),
        ("both.npz", y_path, "both.npz: not usable: the magic string is not correct"),
        ("x.npy", None, "x.npy: not usable: a single array, and no second file for y"),
    ]:
        with pytest.raises(DataError, match=f"{re.escape(str(tmp_path))}/{message}.*; give"):
            import_arrays(tmp_path / x, y, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_for_another_number_of_values(tmp_path) -> None:
    with pytest.raises(DataError, match="2 targets for the 1 values of y; name all of them or none"):
        import_arrays(*saved(tmp_path, X, Y.astype("f4")), tmp_path / "out", names=("a", "b"))
