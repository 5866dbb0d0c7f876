"""Written by any tiling, read by any box: round trips, what the files hold, what is refused, crashes while writing."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import launching
import numpy as np
import pytest
from checkpoint_cases import (
    Crash,
    crash_at,
    deal,
    hash_blocks_touched,
    one_tensor,
    random_box,
    random_tensors,
    save_ranks,
)

from hpctrain.checkpoint import Block, Checkpoint, newest, open_checkpoint, reader, save, storage, writer
from hpctrain.checkpoint.agree import Alone
from hpctrain.errors import CheckpointError
from hpctrain.partition import extent, whole

STATE = {"epoch": 2, "next": 31, "seed": 2**70, "lr": 0.1, "plan": {"conv1": [2, 1]}, "note": "Zürich", "best": None}


@pytest.fixture
def small_hash_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 bytes under one hash, so that small tensors have many."""
    monkeypatch.setattr(writer, "HASH_BLOCK", 64)


def read_all(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    out = {name: np.empty(shape, dtype) for name, (shape, dtype) in checkpoint.tensors.items()}
    for name, array in out.items():
        checkpoint.read(name, whole(array.shape), array)
    return out


@pytest.mark.usefixtures("small_hash_blocks")
def test_any_tiling_reads_back_as_any_box(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for step in range(12):
        tensors = random_tensors(rng)
        save_ranks(tmp_path, step, deal(rng, tensors, ranks=1 + step % 5, cuts=step), STATE)
        checkpoint, messages = newest(tmp_path)
        assert checkpoint is not None
        assert (checkpoint.step, checkpoint.state, messages) == (step, STATE, [])
        assert checkpoint.tensors == {name: (array.shape, array.dtype) for name, array in tensors.items()}
        for name, array in tensors.items():
            for box in [whole(array.shape), *(random_box(rng, array.shape) for _ in range(20))]:
                wide = np.full((*extent(box), 3), 77, array.dtype)
                out = wide[..., 1].T if array.ndim == 1 else wide[..., 1]
                checkpoint.read(name, box, out)
                np.testing.assert_array_equal(out, array[box], strict=True)
                assert (wide[..., [0, 2]] == 77).all()


@pytest.mark.parametrize("dtype", ["?", "i1", "<i2", ">i4", "<u8", ">f4", "<f2", "=f8"])
def test_every_dtype_is_stored_little_endian(tmp_path: Path, dtype: str) -> None:
    array = np.arange(-7, 8).reshape(3, 5).astype(dtype)
    path = save(tmp_path, 3, [Block("x", (3, 5), whole((3, 5)), array)], {}, Alone())
    stored = np.fromfile(path / "rank-00000.bin", array.dtype.newbyteorder("<"), count=15)
    np.testing.assert_array_equal(stored.reshape(3, 5), array)
    np.testing.assert_array_equal(read_all(open_checkpoint(path))["x"], array)


def test_special_values_keep_their_bits(tmp_path: Path) -> None:
    bits = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001, 0x7F800000], np.uint32)
    path = save(tmp_path, 0, [Block("x", (5,), whole((5,)), bits.view(np.float32))], {}, Alone())
    np.testing.assert_array_equal(read_all(open_checkpoint(path))["x"].view(np.uint32), bits)


def test_blocks_start_on_pages_and_ranks_without_elements_have_no_file(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dealt = [*deal(rng, random_tensors(rng), 3), []]
    path = save_ranks(tmp_path, 5, dealt)
    sizes = {file.name: file.stat().st_size for file in path.iterdir() if file.suffix == ".bin"}
    expected = {f"rank-{r:05d}.bin": sum(-(-b.array.nbytes // 4096) * 4096 for b in dealt[r]) for r in range(3)}
    assert sizes == {name: size for name, size in expected.items() if size}
    manifest = json.loads((path / "MANIFEST.json").read_bytes())
    offsets = [block["offset"] for tensor in manifest["tensors"].values() for block in tensor["blocks"]]
    assert len(offsets) > 10
    assert all(offset % 4096 == 0 for offset in offsets)


@pytest.mark.usefixtures("small_hash_blocks")
def test_only_the_hash_blocks_of_a_box_are_read(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    array = rng.random((7, 9, 5))
    checkpoint = open_checkpoint(save(tmp_path, 1, [Block("x", array.shape, whole(array.shape), array)], {}, Alone()))
    seen: list[int] = []
    real = storage.read_at
    monkeypatch.setattr(reader, "read_at", lambda fd, at, n: (seen.append(at // 64), real(fd, at, n))[1])
    for _ in range(100):
        seen.clear()
        box = random_box(rng, array.shape)
        checkpoint.read("x", box, np.empty(extent(box)))
        assert len(seen) == len(set(seen))
        assert set(seen) == hash_blocks_touched(array.shape, 8, 64, box), box


def test_reads_that_do_not_fit_name_tensor_and_shape(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save_ranks(tmp_path, 1, one_tensor(1)))
    box = (slice(0, 2), slice(0, 13))
    with pytest.raises(CheckpointError, match=r"step-000000000001: tensor 'v' is not in it.*has w"):
        checkpoint.read("v", box, np.empty((2, 13), np.float32))
    with pytest.raises(CheckpointError, match=r"tensor 'w': stored as float32.*float64 \(2, 13\)"):
        checkpoint.read("w", box, np.empty((2, 13)))
    with pytest.raises(CheckpointError, match=r"'w': stored as float32, box of \(2, 13\).*\(2, 12\)"):
        checkpoint.read("w", box, np.empty((2, 12), np.float32))
    with pytest.raises(CheckpointError, match=r"outside the stored shape \(21, 13\)"):
        checkpoint.read("w", (slice(20, 22), slice(0, 13)), np.empty((2, 13), np.float32))


# --- refused before anything becomes a checkpoint ---------------------------------------------------------------------


def block(start: int, stop: int, shape: tuple[int, ...] = (6,), dtype: str = "f4", name: str = "w") -> Block:
    return Block(name, shape, (slice(start, stop),), np.zeros(stop - start, dtype))


REFUSED = {
    "overlap": ([[block(0, 4)], [block(3, 6)]], "'w': boxes of rank-00000.bin and rank-00001.bin overlap.*0:4.*3:6"),
    "replicated": ([[block(0, 6)], [block(0, 6)]], "rank-00000.bin and rank-00001.bin overlap"),
    "overlap and gap": ([[block(0, 3)], [block(2, 5)]], "overlap"),
    "gap": ([[block(0, 2)], [block(3, 6)]], "'w': blocks hold 5 of the 6 elements"),
    "only empty": ([[block(0, 0)], []], "'w': blocks hold 0 of the 6"),
    "two scalars": ([[Block("s", (), (), np.zeros(()))]] * 2, "'s': blocks hold 2 of the 1"),
    "shapes": ([[block(0, 6)], [block(0, 0, (7,))]], r"'w' is float32 \(6,\) on rank 0, but float32 \(7,\) on rank 1"),
    "dtypes": ([[block(0, 3)], [block(3, 6, dtype="f8")]], "'w' is float32 .* on rank 0, but float64"),
    "outside": ([[block(0, 7)]], "rank 0, tensor 'w': box .* outside shape"),
    "array": ([[Block("w", (6,), (slice(0, 6),), np.zeros(5))]], r"rank 0, tensor 'w': array of shape \(5,\)"),
    "dims": ([[Block("w", (6, 1), (slice(0, 6),), np.zeros(6))]], "outside shape"),
    "objects": ([[Block("w", (1,), (slice(0, 1),), np.array([None]))]], "'w': dtype 'object' cannot be stored"),
    "complex": (
        [[Block("w", (1,), (slice(0, 1),), np.zeros(1, complex))]],
        "dtype 'complex128' cannot be stored; use one",
    ),
    "name": ([[block(0, 6, name="a\n")]], "tensor name"),
}


@pytest.mark.parametrize(("dealt", "message"), REFUSED.values(), ids=REFUSED)
def test_blocks_that_do_not_tile_are_refused(tmp_path: Path, dealt: list[list[Block]], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save_ranks(tmp_path, 1, dealt)
    assert newest(tmp_path) == (None, [])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"loss": float("nan")}, "state 'loss' is not JSON"),
        ({"seed": np.int64(3)}, "state 'seed' is not JSON.*int64"),
        ({"grid": (2, 2)}, "state 'grid' changes in JSON; use lists"),
        ({"lr": {1: 0.1}}, "state 'lr' changes in JSON"),
    ],
)
def test_state_that_json_would_change_is_refused(tmp_path: Path, state: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, 1, [block(0, 6)], state, Alone())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 10**12])
def test_steps_that_twelve_digits_cannot_hold_are_refused(tmp_path: Path, step: int) -> None:
    with pytest.raises(CheckpointError, match=f"step {step} cannot be stored"):
        save(tmp_path, step, [block(0, 6)], {}, Alone())


# --- crashes and full disks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["next step", "same step"])
def test_a_crash_at_any_point_leaves_a_complete_checkpoint(
    tmp_path: Path, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, outcomes = tmp_path / "run" / "checkpoints", []
    for n in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        save_ranks(folder, 100, one_tensor(1))
        crash_at(monkeypatch, n)
        try:
            save_ranks(folder, 100 if again else 200, one_tensor(2))
            crashed = False
        except Crash:
            crashed = True
        monkeypatch.undo()
        checkpoint, messages = newest(folder)
        assert checkpoint is not None, f"nothing left after {n} calls"
        assert messages == []
        values = np.unique(read_all(checkpoint)["w"])
        assert values.tolist() in ([1.0], [2.0])
        assert again or checkpoint.step == 100 * values[0]
        outcomes.append(int(values[0]))
        if not crashed:
            break
        save_ranks(folder, 300, one_tensor(3))
        names = {path.name for path in folder.iterdir()}
        assert not [name for name in names if name.endswith(".tmp") or f"{name}.replaced" in names]
        assert newest(folder)[0].step == 300  # type: ignore[union-attr]
    assert not crashed
    assert outcomes == sorted(outcomes), "once the new one is there it stays"
    assert outcomes.count(1) > 10
    assert outcomes.count(2) > 1


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[tuple[str, str]] = []

    def note(name: str) -> None:
        real = getattr(os, name)

        def call(first: int | Path, *args: object) -> object:
            path = Path(os.readlink(f"/proc/self/fd/{first}") if isinstance(first, int) else first)
            events.append((name, path.relative_to(tmp_path).name))
            return real(first, *args)

        monkeypatch.setattr(os, name, call)

    for name in ("pwrite", "fsync", "rename"):
        note(name)
    save_ranks(tmp_path / "checkpoints", 1, one_tensor(1, ranks=2))
    files = ["rank-00000.bin", "rank-00001.bin", "MANIFEST.json"]
    assert events == [
        ("fsync", ""),  # the new folder's own name
        *((call, file) for file in files for call in ("pwrite", "fsync")),
        ("fsync", "step-000000000001.tmp"),
        ("rename", "step-000000000001.tmp"),
        ("fsync", "checkpoints"),
    ]


def test_leftovers_are_removed_but_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "keep.txt").write_text("precious")
    (tmp_path / "step-000000000001.tmp").mkdir()
    (tmp_path / "step-000000000001.tmp" / "rank-00000.bin").write_bytes(b"x")
    (tmp_path / "step-000000000002.tmp").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "best.tmp").mkdir()
    save_ranks(tmp_path, 3, one_tensor(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.tmp", "elsewhere", "step-000000000003"]
    assert (tmp_path / "elsewhere" / "keep.txt").read_text() == "precious"


def test_a_file_size_limit_is_a_checkpoint_error_with_needed_and_free(tmp_path: Path) -> None:
    save_ranks(tmp_path, 1, one_tensor(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"rank-00000.bin: cannot write 24576 bytes, \d+ are free: File too large"
        ):
            save(tmp_path, 2, [block(0, 6000, (6000,))], {}, Alone())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000001"]
    assert newest(tmp_path)[0].step == 1  # type: ignore[union-attr]


FULL_DISK = """
import errno, os, sys
from pathlib import Path
import numpy as np
from hpctrain.checkpoint import Block, newest, save
from hpctrain.checkpoint.agree import Alone
from hpctrain.errors import CheckpointError

folder = Path(sys.argv[1])
if sys.argv[2] == "written":
    def refuse(fd, start, size):
        raise OSError(errno.EOPNOTSUPP, "no preallocation here")
    os.posix_fallocate = refuse
blocks = [Block("w", (40_000,), (slice(0, 40_000),), np.ones(40_000, np.float32))]
for step in range(1, 9):
    try:
        save(folder, step, blocks, {}, Alone())
    except CheckpointError as error:
        print(error)
        break
found, messages = newest(folder)
print(step - 1, found.step, messages, sorted(os.listdir(folder))[-1])
"""


@pytest.mark.parametrize("how", ["reserved", "written"])
def test_a_full_disk_leaves_the_checkpoints_before(tmp_path: Path, how: str) -> None:
    (tmp_path / "full.py").write_text(FULL_DISK)
    mount = 'mkdir "$1"; mount -t tmpfs -o size=600k none "$1" && exec "$2" "$3" "$1" "$4"'
    namespace = ["unshare", "--mount", *(["--user", "--map-root-user"] if os.getuid() else [])]
    probe = launching.run([*namespace, "true"], 10)
    if probe.status != 0:
        pytest.skip(f"needs a mount namespace for a small disk: {probe.stderr.strip()}")
    python = [sys.executable, tmp_path / "full.py", how]
    package = str(Path(writer.__file__).parents[2])
    env = launching.environment(PYTHONPATH=package)
    ended = launching.run([*namespace, "sh", "-c", mount, "sh", tmp_path / "disk", *python], 60, env)
    assert ended.status == 0, ended.stderr
    error, last = ended.stdout.splitlines()
    assert "step-000000000004.tmp/rank-00000.bin: cannot write 163840 bytes" in error
    assert "are free: No space left on device; free space" in error
    assert last == "3 3 [] step-000000000003"


def test_short_writes_go_on_and_no_progress_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: min(len(data), 1000)], at))
    checkpoint = open_checkpoint(save_ranks(tmp_path, 1, one_tensor(1, rows=70)))
    checkpoint.verify()
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: 0)
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        save_ranks(tmp_path, 2, one_tensor(2))


def test_folder_that_cannot_be_made_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(CheckpointError, match=r"checkpoints: .*; check"):
        save(tmp_path / "checkpoints", 1, [block(0, 6)], {}, Alone())
