"""Checkpoints of several ranks: round trips to other tilings, and errors of one rank that all ranks raise alike."""

from __future__ import annotations

import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_cases import deal, one_tensor, random_box, random_tensors

from hpctrain.checkpoint import Block, newest, open_checkpoint, retain, save, writer
from hpctrain.errors import CheckpointError
from hpctrain.partition import extent, whole


@pytest.fixture
def folder(comm: Any) -> Iterator[Path]:
    """One new folder for all ranks, that does not exist yet."""
    base = comm.bcast(tempfile.mkdtemp(prefix="checkpoint-") if comm.rank == 0 else None)
    yield Path(base, "run", "checkpoints")
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(base)


def same_everywhere(comm: Any, value: object) -> bool:
    """Whether all ranks have the same value."""
    values = comm.allgather(value)
    return all(other == values[0] for other in values)


@pytest.mark.parallel([1, 2, 3, 4])
def test_round_trip_to_random_boxes(comm: Any, folder: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "HASH_BLOCK", 128)
    rng, own = np.random.default_rng(seed), np.random.default_rng([seed, comm.rank])
    for step in range(5):
        tensors = random_tensors(rng)
        state = {"step": step, "seed": 2**80}
        path = save(folder, step, deal(rng, tensors, comm.size)[comm.rank], state, comm)
        assert path == folder / f"step-{step:012d}"
        checkpoint, messages = newest(folder, comm)
        assert checkpoint is not None
        assert (checkpoint.path, checkpoint.step, checkpoint.state, messages) == (path, step, state, [])
        for name, array in tensors.items():
            for box in [whole(array.shape), *(random_box(own, array.shape) for _ in range(4))]:
                out = np.empty(extent(box), array.dtype)
                checkpoint.read(name, box, out)
                np.testing.assert_array_equal(out, array[box], strict=True)


@pytest.mark.parallel([2, 3, 4])
def test_an_error_on_one_rank_is_the_same_error_on_all(comm: Any, folder: Path) -> None:
    for guilty in range(comm.size):
        blocks = one_tensor(1, ranks=comm.size)[comm.rank]
        if comm.rank == guilty:
            blocks = [Block("w", blocks[0].shape, blocks[0].box, np.zeros((1, 1), np.float32))]
        with pytest.raises(CheckpointError, match=f"rank {guilty}, tensor 'w': array of shape") as caught:
            save(folder, 1, blocks, {}, comm)
        assert same_everywhere(comm, str(caught.value))
        assert newest(folder, comm) == (None, [])


@pytest.mark.parallel([2, 3, 4])
def test_all_errors_are_told(comm: Any, folder: Path) -> None:
    block = Block("w", (2,), (slice(0, 2),), np.zeros(3))
    with pytest.raises(CheckpointError) as caught:
        save(folder, 1, [block], {}, comm)
    assert all(f"rank {rank}, tensor 'w'" in str(caught.value) for rank in range(comm.size))


@pytest.mark.parallel([2, 3, 4])
def test_blocks_that_overlap_or_leave_a_gap_are_refused_everywhere(comm: Any, folder: Path) -> None:
    def rows(start: int, stop: int) -> list[Block]:
        return [Block("w", (comm.size * 2,), (slice(start, stop),), np.zeros(stop - start))]

    r, n = comm.rank, 2 * comm.size
    overlap = (2 * r - (r == 1), 2 * r + 2, "rank-00000.bin and rank-00001.bin overlap")
    gap = (2 * r + (r == 1), 2 * r + 2, f"hold {n - 1} of the {n}")
    for start, stop, message in (overlap, gap):
        with pytest.raises(CheckpointError, match=message) as caught:
            save(folder, 1, rows(start, stop), {}, comm)
        assert same_everywhere(comm, str(caught.value))


@pytest.mark.parallel([2, 3])
def test_ranks_at_different_steps_are_refused(comm: Any, folder: Path) -> None:
    last = comm.size - 1
    step = 8 if comm.rank == last else 7
    with pytest.raises(CheckpointError, match=rf"step-000000000007.tmp: rank {last} saves step 8"):
        save(folder, step, one_tensor(1, ranks=comm.size)[comm.rank], {}, comm)


@pytest.mark.parallel([2, 3])
def test_a_full_disk_on_one_rank_leaves_the_checkpoints_before(comm: Any, folder: Path) -> None:
    blocks = one_tensor(1, ranks=comm.size, rows=700)[comm.rank]
    save(folder, 1, blocks, {}, comm)
    for guilty in range(comm.size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        if comm.rank == guilty:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
        try:
            with pytest.raises(
                CheckpointError, match=rf"rank-0000{guilty}.bin: cannot write 36864 bytes, \d+ are free"
            ) as e:
                save(folder, 2, blocks, {}, comm)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert same_everywhere(comm, str(e.value))
        checkpoint, messages = newest(folder, comm)
        assert checkpoint is not None
        assert (checkpoint.step, messages) == (1, [])
        comm.Barrier()
        assert [path.name for path in folder.iterdir()] == ["step-000000000001"]
        comm.Barrier()  # before rank 0 begins the next one
    assert save(folder, 2, blocks, {}, comm).name == "step-000000000002"


@pytest.mark.parallel([2, 3, 4])
def test_damage_that_one_rank_sees_is_known_to_all(comm: Any, folder: Path) -> None:
    for step in (1, 2, 3):
        save(folder, step, one_tensor(step, ranks=comm.size)[comm.rank], {}, comm)
    last = comm.size - 1
    if comm.rank == 0:
        for step, name in ((3, "MANIFEST.json"), (2, f"rank-0000{last}.bin")):
            path = folder / f"step-{step:012d}" / name
            data = bytearray(path.read_bytes())
            data[100] ^= 4
            path.write_bytes(data)
    comm.Barrier()
    checkpoint, messages = newest(folder, comm)
    assert checkpoint is not None
    assert checkpoint.step == 1
    assert same_everywhere(comm, messages)
    assert len(messages) == 2
    assert "step-000000000003: MANIFEST.json" in messages[0]
    assert f"step-000000000002: rank-0000{last}.bin, tensor 'w', bytes 0 to 363: hash differs" in messages[1]
    assert newest(folder)[0].step == 1  # type: ignore[union-attr]


@pytest.mark.parallel([1, 3])
def test_files_are_read_once_by_all_ranks_together(comm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(folder, 1, one_tensor(1, ranks=comm.size)[comm.rank], {}, comm)
    seen: list[int] = []
    checkpoint = open_checkpoint(folder / "step-000000000001")
    real = type(checkpoint).verify_file
    monkeypatch.setattr(type(checkpoint), "verify_file", lambda self, n: (seen.append(n), real(self, n))[1])
    assert newest(folder, comm)[0] is not None
    assert sorted(n for ranks in comm.allgather(seen) for n in ranks) == list(range(comm.size))
    assert seen == [comm.rank]


@pytest.mark.parallel([2, 3])
def test_retention_with_all_ranks(comm: Any, folder: Path) -> None:
    for step in range(1, 6):
        save(folder, step, one_tensor(step, ranks=comm.size)[comm.rank], {}, comm)
        retain(folder, 3, comm)
        comm.Barrier()
        assert sorted(int(path.name[5:]) for path in folder.iterdir()) == list(range(max(1, step - 2), step + 1))
        comm.Barrier()


@pytest.mark.parallel([1, 2, 3, 4])
def test_written_by_n_ranks_read_by_one(comm: Any, folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = random_tensors(rng)
    path = save(folder, 1, deal(rng, tensors, comm.size)[comm.rank], {}, comm)
    if comm.rank == comm.size - 1:
        checkpoint = open_checkpoint(path)
        checkpoint.verify()
        for name, array in tensors.items():
            out = np.empty_like(array)
            checkpoint.read(name, whole(array.shape), out)
            np.testing.assert_array_equal(out, array)
