"""kill -9 of one of four ranks that write checkpoints: each time a complete one is left, no older than promised."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import numpy as np
import pytest

from hpctrain.checkpoint import newest, writer
from hpctrain.partition import whole

RANKS = 4
SHAPE = (RANKS * 1024, 257)  # 1 MiB and a bit per rank
PATIENCE = 30  # seconds for a job to start, and to end after the kill

WORKER = """
import os, sys
from pathlib import Path
import numpy as np
from mpi4py import MPI
from hpctrain.checkpoint import Block, retain, save

folder, comm = Path(sys.argv[1]), MPI.COMM_WORLD
shape = (comm.size * 1024, 257)
box = (slice(comm.rank * 1024, (comm.rank + 1) * 1024), slice(0, 257))
(folder / f"pid-{comm.rank}").write_text(str(os.getpid()))
for step in range(1, 100_000):
    if step % 4 == 0:
        step -= 1  # every fourth time the same step again
    save(folder / "checkpoints", step, [Block("w", shape, box, np.full((1024, 257), step, np.float32))], {}, comm)
    if comm.rank == 0:
        (folder / "promised.new").write_text(str(step))
        os.rename(folder / "promised.new", folder / "promised")
    retain(folder / "checkpoints", 2, comm)
"""


def wait_for(path: Path, job: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert job.poll() is None, f"the job ended by itself: {job.stderr.read() if job.stderr else ''}"
        assert time.monotonic() < deadline, f"no {path.name} after {PATIENCE} s"
        time.sleep(0.005)


def trial(folder: Path, victim: int, delay: float) -> tuple[int, int, list[str]]:
    """(step promised, step found, messages) after the launcher has ended a job whose rank `victim` was killed."""
    faulthandler.cancel_dump_traceback_later()  # pytest's timer is for one test; each trial has limits of its own
    (folder / "worker.py").write_text(WORKER)
    env = launching.environment(PYTHONPATH=str(Path(writer.__file__).parents[2]))
    command = [*launching.mpirun(RANKS), sys.executable, str(folder / "worker.py"), str(folder)]
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        try:
            wait_for(folder / "promised", job)
            time.sleep(delay)
            os.kill(int((folder / f"pid-{victim}").read_text()), signal.SIGKILL)
            job.communicate(timeout=PATIENCE)
        finally:
            if job.poll() is None:
                os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0
    promised = int((folder / "promised").read_text())
    checkpoint, messages = newest(folder / "checkpoints")
    assert checkpoint is not None, messages
    values = np.empty(SHAPE, np.float32)
    checkpoint.read("w", whole(SHAPE), values)
    assert (values == checkpoint.step).all()
    return promised, checkpoint.step, messages


def run_trials(base: Path, rng: np.random.Generator, count: int) -> None:
    interrupted = 0
    for i in range(count):
        folder = base / str(i)
        folder.mkdir()
        victim, delay = int(rng.integers(RANKS)), float(rng.uniform(0, 0.3))
        promised, found, messages = trial(folder, victim, delay)
        assert found >= promised, f"trial {i}: rank {victim} killed after {delay:.3f} s"
        assert messages == [], f"trial {i}: rank {victim} killed after {delay:.3f} s"
        interrupted += any(path.suffix == ".tmp" for path in (folder / "checkpoints").iterdir())
    print(f"{count} trials, {interrupted} in the middle of writing or deleting")
    assert count < 10 or interrupted > 0


@pytest.mark.faults
def test_kill_of_one_rank_leaves_a_complete_checkpoint(tmp_path: Path, seed: int) -> None:
    run_trials(tmp_path, np.random.default_rng(seed), 3)


@pytest.mark.faults
@pytest.mark.slow
def test_kill_of_one_rank_leaves_a_complete_checkpoint_every_time(tmp_path: Path, seed: int) -> None:
    run_trials(tmp_path, np.random.default_rng(seed), 25)
