"""Damaged checkpoints are named and passed over, whatever is damaged; retention never counts on them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoint_cases import Crash, crash_at, deal, one_tensor, random_tensors, save_ranks

from hpctrain.checkpoint import newest, open_checkpoint, retain, writer
from hpctrain.errors import CheckpointError
from hpctrain.partition import whole

FLIPS = 60


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def steps_in(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.iterdir())


def test_every_flipped_bit_is_found_and_the_older_checkpoint_taken(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "HASH_BLOCK", 256)
    rng = np.random.default_rng(seed)
    save_ranks(tmp_path, 100, one_tensor(1))
    path = save_ranks(tmp_path, 200, deal(rng, random_tensors(rng), ranks=3, cuts=1))
    files = sorted(path.iterdir())
    assert [file.name for file in files] == ["MANIFEST.json", *(f"rank-0000{r}.bin" for r in range(3))]
    for i in range(FLIPS):
        file = files[i % len(files)]
        bit = int(rng.integers(8 * file.stat().st_size))
        flip(file, bit)
        checkpoint, messages = newest(tmp_path)
        assert checkpoint is not None, (file, bit)
        assert checkpoint.step == 100, (file, bit)
        (message,) = messages
        assert message.startswith(str(path)), message
        assert file.name in message
        assert message.endswith("falling back to step-000000000100")
        if file.suffix == ".bin":
            with pytest.raises(CheckpointError, match=f"{file.name}, (tensor '.*'|padding), bytes .*: (hash|not zero)"):
                open_checkpoint(path).verify()
        flip(file, bit)
    checkpoint, messages = newest(tmp_path)
    assert (checkpoint.step, messages) == (200, [])  # type: ignore[union-attr]


def test_a_read_is_stopped_by_damage_in_its_box_only(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "HASH_BLOCK", 64)
    rng = np.random.default_rng(seed)
    checkpoint = open_checkpoint(save_ranks(tmp_path, 1, one_tensor(5, ranks=2, rows=4)))
    row = np.empty((1, 13), np.float32)
    for _ in range(40):
        byte = int(rng.integers(4 * 13 * 4))
        flip(checkpoint.path / "rank-00001.bin", 8 * byte + int(rng.integers(8)))
        touched = range(byte // 64 * 64 // 52, min(4, (byte // 64 * 64 + 63) // 52 + 1))
        for r in range(8):
            box = (slice(r, r + 1), slice(0, 13))
            if r - 4 in touched:
                first, last = byte // 64 * 64, min(byte // 64 * 64 + 63, 207)
                with pytest.raises(
                    CheckpointError, match=f"rank-00001.bin, tensor 'w', bytes {first} to {last}: hash differs"
                ):
                    checkpoint.read("w", box, row)
            else:
                checkpoint.read("w", box, row)
                assert (row == 5).all()
        save_ranks(tmp_path, 1, one_tensor(5, ranks=2, rows=4))


def truncate(path: Path) -> None:
    os.truncate(path / "rank-00001.bin", 4095)


def extend(path: Path) -> None:
    os.truncate(path / "rank-00001.bin", 8192)


def lose_file(path: Path) -> None:
    (path / "rank-00001.bin").unlink()


def lose_manifest(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def empty_manifest(path: Path) -> None:
    (path / "MANIFEST.json").write_bytes(b"")


def link_away(path: Path) -> None:
    (path / "rank-00001.bin").rename(path.parent / "elsewhere")
    (path / "rank-00001.bin").symlink_to(path.parent / "elsewhere")


def pipe(path: Path) -> None:
    (path / "rank-00001.bin").unlink()
    os.mkfifo(path / "rank-00001.bin")


def swap_files(path: Path) -> None:
    (path / "rank-00001.bin").rename(path / "x")
    (path / "rank-00002.bin").rename(path / "rank-00001.bin")
    (path / "x").rename(path / "rank-00002.bin")


def older_payload(path: Path) -> None:
    older = path.with_name("step-000000000100") / "rank-00001.bin"
    (path / "rank-00001.bin").write_bytes(older.read_bytes())


def other_step(path: Path) -> None:
    older = path.with_name("step-000000000100") / "MANIFEST.json"
    (path / "MANIFEST.json").write_bytes(older.read_bytes())


DAMAGE = {
    truncate: r"rank-00001.bin has 4095 of 4096 bytes; restore",
    extend: r"rank-00001.bin has 8192 of 4096 bytes; restore",
    lose_file: r"rank-00001.bin cannot be read: No such file or directory; restore",
    lose_manifest: r"MANIFEST.json cannot be read: No such file or directory; restore",
    empty_manifest: r"MANIFEST.json is damaged",
    link_away: r"rank-00001.bin cannot be read: Too many levels of symbolic links; restore",
    pipe: r"rank-00001.bin cannot be read: not a regular file; restore",
    swap_files: r"rank-00001.bin, tensor 'w', bytes 0 to 363: hash differs; restore",
    older_payload: r"rank-00001.bin, tensor 'w', bytes 0 to 363: hash differs; restore",
    other_step: r"MANIFEST.json is of step 100",
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.items(), ids=[f.__name__ for f in DAMAGE])
def test_other_damage_is_named_and_passed_over(tmp_path: Path, damage: Callable, message: str) -> None:
    save_ranks(tmp_path, 100, one_tensor(1))
    blocks = one_tensor(2)
    blocks[2][0].array[0, 0] = 3  # else swapped files would be the same
    path = save_ranks(tmp_path, 200, blocks)
    damage(path)
    with pytest.raises(CheckpointError, match=f"step-000000000200: {message}"):
        open_checkpoint(path).verify()
    checkpoint, messages = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.step == 100
    assert len(messages) == 1
    assert messages[0].endswith("; falling back to step-000000000100")


def test_when_all_are_damaged_all_are_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        flip(save_ranks(tmp_path, step, one_tensor(step)) / "rank-00000.bin", 7)
    checkpoint, messages = newest(tmp_path)
    assert checkpoint is None
    assert [message.rsplit("; ", 1)[1] for message in messages] == [
        "falling back to step-000000000002",
        "falling back to step-000000000001",
        "there is no older one",
    ]


def test_newest_goes_by_step_whatever_the_times_say(tmp_path: Path) -> None:
    for step in (300, 100, 200):
        save_ranks(tmp_path, step, one_tensor(step))
    os.utime(tmp_path / "step-000000000300", (0, 0))
    (tmp_path / "step-000000000900.tmp").mkdir()
    (tmp_path / "step-900").mkdir()
    assert newest(tmp_path)[0].step == 300  # type: ignore[union-attr]
    assert newest(tmp_path / "no such folder") == (None, [])


def test_a_damaged_checkpoint_is_replaced_by_saving_its_step_again(tmp_path: Path) -> None:
    flip(save_ranks(tmp_path, 5, one_tensor(1)) / "rank-00002.bin", 100)
    save_ranks(tmp_path, 5, one_tensor(2, ranks=2))
    checkpoint, messages = newest(tmp_path)
    assert (checkpoint.step, messages) == (5, [])  # type: ignore[union-attr]
    assert sorted(path.name for path in (tmp_path / "step-000000000005").iterdir()) == [
        "MANIFEST.json",
        "rank-00000.bin",
        "rank-00001.bin",
    ]


# --- retention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "left"), [(3, [3, 4, 5]), (2, [4, 5]), (1, [4, 5]), (0, [4, 5]), (9, [1, 2, 3, 4, 5])]
)
def test_retention_keeps_the_newest_and_never_fewer_than_two(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (3, 1, 5, 2, 4):
        save_ranks(tmp_path, step, one_tensor(step))
    retain(tmp_path, keep)
    assert steps_in(tmp_path) == left
    retain(tmp_path, keep)
    assert steps_in(tmp_path) == left


def test_retention_does_not_count_damaged_checkpoints(tmp_path: Path) -> None:
    for step in range(1, 7):
        save_ranks(tmp_path, step, one_tensor(step))
    for step in (6, 5, 3):
        flip(tmp_path / f"step-{step:012d}" / "rank-00001.bin", 1000)
    retain(tmp_path, 2)
    assert steps_in(tmp_path) == [2, 3, 4, 5, 6], "4 and 2 are the newest that verify"
    assert newest(tmp_path)[0].step == 4  # type: ignore[union-attr]


def test_retention_never_deletes_the_only_good_one(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(6):
        good = int(rng.integers(1, 5))
        for step in range(1, 5):
            path = save_ranks(tmp_path, step, one_tensor(step))
            if step != good:
                flip(path / f"rank-0000{rng.integers(3)}.bin", int(rng.integers(8 * 4096)))
        retain(tmp_path, 2)
        assert newest(tmp_path)[0].step == good  # type: ignore[union-attr]


def test_a_crash_while_deleting_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crashed, n = True, -1
    while crashed:
        n += 1
        for step in (1, 2, 3):
            save_ranks(tmp_path, step, one_tensor(step))
        crash_at(monkeypatch, n)
        try:
            retain(tmp_path, 2)
            crashed = False
        except Crash:
            monkeypatch.undo()
        for path in tmp_path.glob("step-????????????"):
            open_checkpoint(path).verify()
        assert newest(tmp_path)[0].step == 3  # type: ignore[union-attr]
    monkeypatch.undo()
    assert steps_in(tmp_path) == [2, 3]
    assert n > 5


def test_reading_does_not_need_the_ranks_that_wrote(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_ranks(tmp_path, 1, one_tensor(4, ranks=5)))
    os.unlink(checkpoint.path / "rank-00004.bin")
    out = np.empty((28, 13), np.float32)
    checkpoint.read("w", whole(out.shape), out)
    assert (out == 4).all()
    with pytest.raises(CheckpointError, match=r"rank-00004.bin cannot be read"):
        checkpoint.read("w", (slice(28, 35), slice(0, 13)), out[:7])
