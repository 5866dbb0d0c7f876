"""index.json and verification: a tampered index and a flipped bit are found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import data_cases
import msgspec
import numpy as np
import pytest

from hpctrain.data.dataset import Dataset, inspect
from hpctrain.data.index import INDEX, Index, Layout, ShardEntry, read_index, self_hash, write_index
from hpctrain.errors import DataError

SHARD = "shard-00000.h5"


# --- the index -----------------------------------------------------------------------------------------------------


def edit(folder: Path, change: Callable[[dict], None]) -> None:
    """Changes index.json and leaves its hash."""
    content = json.loads((folder / INDEX).read_text())
    change(content)
    (folder / INDEX).write_text(json.dumps(content))


@pytest.mark.parametrize("key", ["uuid", "samples", "mean", "shards", "layout", "tile", "hash"])
def test_a_tampered_index(tmp_path, seed, key: str) -> None:
    data_cases.write(tmp_path, np.random.default_rng(seed))

    def change(content: dict) -> None:
        value = content[key]
        if isinstance(value, str):
            content[key] = value[:-1] + ("0" if value[-1] != "0" else "1")
        elif isinstance(value, int):
            content[key] = value + 1
        elif isinstance(value, dict):
            value["classes"] += 1
        else:
            value[0] = {**value[0], "bytes": 1} if key == "shards" else value[0] + 1

    edit(tmp_path, change)
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX}: its content does not match its hash .*; restore"):
        Dataset(tmp_path)


def test_an_index_that_is_only_formatted_differently_is_good(tmp_path, seed) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed))
    edit(tmp_path, lambda content: None)
    assert read_index(tmp_path) == made.index


def test_index_without_an_ignored_label_is_what_it_was_before_there_were_any() -> None:
    """The hash is that of the first data sets, whose layout had no such field."""
    shard = ShardEntry("shard-00000.h5", 100, "0" * 32, 3, 0, 10, 80, 90)
    index = Index(
        uuid="12345678-1234-5678-1234-567812345678",
        samples=3,
        layout=Layout((5, 4, 1), "uint8", (), "int64", 3),
        tile=(256, 5),
        mean=(0.5,),
        std=(1.25,),
        shards=(shard,),
    )
    assert self_hash(index) == "40868dca07e60e0b4c5372c0c05150c7"
    assert self_hash(layout(ignore=255)(index)) != self_hash(index)


@pytest.mark.parametrize("ignore", [0, -1, 255, 2**63 - 1, -(2**63)])
def test_index_keeps_the_ignored_label(tmp_path, seed, ignore: int) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed), ignore=ignore)
    assert read_index(tmp_path).layout.ignore == made.index.layout.ignore == ignore


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["layout"].update(ignore=2**63), r"Expected `int` <= 9223372036854775807 - at `\$.layout.ignore`"),
        (lambda c: c["layout"].update(ignore="255"), r"Expected `int`, got `str` - at `\$.layout.ignore`"),
        (lambda c: c.update(color=1), "unknown field `color`"),
        (lambda c: c["shards"][1].update(bytes="9"), r"Expected `int`, got `str` - at `\$.shards\[1\].bytes`"),
        (lambda c: c.pop("uuid"), "missing required field `uuid`"),
        (lambda c: c["std"].__setitem__(0, -1.0), r"Expected `float` >= 0.0 - at `\$.std"),
        (lambda c: c["mean"].__setitem__(0, float("nan")), "JSON is malformed"),
        (lambda c: c["shards"][0].update(samples=0), r"Expected `int` >= 1 - at `\$.shards\[0\].samples`"),
        (lambda c: c.update(version=2), "'hpctrain-shards' version 2; this program reads 'hpctrain-shards' 1"),
        (lambda c: c.update(format="other"), "'other' version 1"),
    ],
)
def test_an_index_of_another_form(tmp_path, seed, change, message: str) -> None:
    data_cases.write(tmp_path, np.random.default_rng(seed))
    edit(tmp_path, change)
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX}: .*{message}"):
        Dataset(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"[" * 100_000, b'{"shards": 1e999}'])
def test_an_index_that_is_no_json(tmp_path, content: bytes) -> None:
    (tmp_path / INDEX).write_bytes(content)
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX}: not an index of shards"):
        Dataset(tmp_path)


def test_no_index(tmp_path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path}/{INDEX}: No such file or directory; check the folder"):
        Dataset(tmp_path)


def entry(i: int, **values: object) -> Callable[[Index], Index]:
    """Changes one shard's entry."""

    def change(index: Index) -> Index:
        shards = list(index.shards)
        shards[i] = msgspec.structs.replace(shards[i], **values)
        return msgspec.structs.replace(index, shards=tuple(shards))

    return change


def top(**values: object) -> Callable[[Index], Index]:
    """Changes the index itself."""
    return lambda index: msgspec.structs.replace(index, **values)


def layout(**values: object) -> Callable[[Index], Index]:
    """Changes its layout."""
    return lambda index: msgspec.structs.replace(index, layout=msgspec.structs.replace(index.layout, **values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (entry(0, name="../../etc/passwd"), f"{INDEX}: shard name '../../etc/passwd' is not a plain file name"),
        (entry(0, name="/etc/passwd"), f"{INDEX}: shard name '/etc/passwd' is not a plain file name"),
        (entry(1, name="a/b.h5"), f"{INDEX}: shard name 'a/b.h5' is not"),
        (entry(1, name=".."), f"{INDEX}: shard name '..' is not"),
        (entry(1, name=""), f"{INDEX}: shard name '' is not"),
        (entry(1, name="shard\n"), f"{INDEX}: shard name .* is not"),
        (entry(1, name="shard\0.h5"), f"{INDEX}: shard name .* is not"),
        (entry(1, name="shard-9.h5"), "shard-9.h5: No such file"),
        (entry(1, first=8), f"{INDEX}: shard shard-00001.h5 starts at sample 8, the one before it ends at 9"),
        (entry(2, samples=6), f"{INDEX}: samples = 23, but the shards hold 24"),
        (top(samples=10**12), f"{INDEX}: samples = 1000000000000, but the shards hold 23"),
        (top(shards=()), f"{INDEX}: samples = 23, but the shards hold 0"),
        (top(uuid="none"), f"{INDEX}: uuid = 'none' is not a UUID"),
        (top(uuid="0" * 32), f"{SHARD}: dataset uuid is .*, the index says 0+"),
        (top(mean=(1.0,)), f"{INDEX}: mean has 1 values for 3 channels"),
        (top(std=(1.0,) * 4), f"{INDEX}: std has 4 values for 3 channels"),
        (top(tile=(256, 6)), rf"{SHARD}: tile is \(256, 7\), the index says \(256, 6\)"),
        (layout(x_shape=(5, 7, 3)), rf"{SHARD}: x is \(\(9, 7, 5, 3\).*, the index says \(\(9, 5, 7, 3\)"),
        (layout(x_dtype="int8"), f"{SHARD}: x is .*uint8.*, the index says .*int8"),
        (layout(x_dtype="object"), f"{INDEX}: x_dtype = 'object'; give one of"),
        (layout(y_shape=(1,)), rf"{SHARD}: y is \(\(9,\).*, the index says \(\(9, 1\)"),
        (entry(0, bytes=17), rf"{SHARD}: bytes is \d+, the index says 17; restore both from one source"),
        (entry(0, x_offset=17), rf"{SHARD}: x offset is \d+, the index says 17"),
        (entry(0, y_offset=17), rf"{SHARD}: y offset is \d+, the index says 17"),
        (entry(0, sample_id_offset=17), rf"{SHARD}: sample_id offset is \d+, the index says 17"),
    ],
)
def test_an_index_that_lies_with_a_good_hash(tmp_path, seed, change, message: str) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed))
    write_index(tmp_path, change(made.index))
    with pytest.raises(DataError, match=f"{tmp_path}/.*{message}"):
        Dataset(tmp_path)


# --- verification --------------------------------------------------------------------------------------------------


def flip(path: Path, at: int, bit: int) -> None:
    """Changes one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


@pytest.mark.parametrize(("x_shape", "dtype"), [((7, 5, 3), "uint8"), ((35, 13, 11, 1), "float32")])
def test_a_flipped_bit_of_x_names_its_tile(tmp_path, seed, x_shape, dtype) -> None:
    """20 bits, one after the other, in 600 small samples or 23 volumes."""
    rng = np.random.default_rng(seed)
    samples, per_shard = (600, 550) if dtype == "uint8" else (23, 9)
    made = data_cases.write(tmp_path, rng, samples, x_shape, dtype, per_shard=per_shard)
    Dataset(tmp_path).verify()
    samples_per_tile, planes = made.index.tile
    tiles_of_sample = -(-x_shape[0] // planes)
    plane = made.index.layout.x_bytes // x_shape[0]
    for _ in range(20):
        number, at, bit = rng.integers(samples), rng.integers(made.index.layout.x_bytes), rng.integers(8)
        shard, local = divmod(number, per_shard)
        held = made.index.shards[shard]
        tile = local // samples_per_tile * tiles_of_sample + at // plane // planes
        first = number - local % samples_per_tile
        last = min(first + samples_per_tile, held.first + held.samples) - 1
        path = tmp_path / held.name
        flip(path, held.x_offset + local * made.index.layout.x_bytes + at, bit)
        data = Dataset(tmp_path)
        message = rf"{path}: tile {tile} of x \(samples {first} to {last}\) does not match its hash; restore"
        with pytest.raises(DataError, match=message):
            data.verify()
        with pytest.raises(DataError, match=message):
            data.verify([shard])
        data.verify([i for i in range(len(data.shards)) if i != shard])
        flip(path, held.x_offset + local * made.index.layout.x_bytes + at, bit)


@pytest.mark.parametrize("field", ["y_offset", "sample_id_offset"])
def test_a_flipped_bit_elsewhere_is_found(tmp_path, seed, field: str) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed))
    path = tmp_path / "shard-00001.h5"
    flip(path, getattr(made.index.shards[1], field) + 13, 3)
    with pytest.raises(DataError, match=rf"{path}: .* hash in the index.*y, sample_id.*samples 9 to 17.*; restore"):
        Dataset(tmp_path).verify()


def test_inspect_hides_no_error(tmp_path, seed) -> None:
    made = data_cases.write(tmp_path, np.random.default_rng(seed), per_shard=5)
    *shards, summary = inspect(tmp_path, verify=True)
    assert [record["error"] for record in shards] == [None] * 5
    assert [(record["file"], record["samples"], record["first"]) for record in shards] == [
        (f"shard-0000{i}.h5", 3 if i == 4 else 5, 5 * i) for i in range(5)
    ]
    expected = {"samples": 23, "shards": 5, "errors": 0, "verified": True, "classes": 4, "uuid": made.index.uuid}
    assert expected.items() <= summary.items()
    assert json.loads(json.dumps([*shards, summary])) == [*shards, summary]

    (tmp_path / "shard-00001.h5").unlink()
    shutil.copy(tmp_path / "shard-00000.h5", tmp_path / "shard-00004.h5")
    flip(tmp_path / "shard-00003.h5", made.index.shards[3].x_offset, 0)
    *shards, summary = inspect(tmp_path)
    assert [record["error"] is None for record in shards] == [True, False, True, True, False]
    assert (summary["errors"], summary["verified"]) == (2, False)
    *shards, summary = inspect(tmp_path, verify=True)
    assert "shard-00001.h5: No such file" in shards[1]["error"]
    assert "shard-00003.h5: tile 0 of x (samples 15 to 19)" in shards[3]["error"]
    assert summary["errors"] == 3
    (tmp_path / INDEX).unlink()
    with pytest.raises(DataError, match=INDEX):
        inspect(tmp_path)
