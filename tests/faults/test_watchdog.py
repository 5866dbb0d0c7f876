"""A rank that hangs or takes another way: the others say so, the guard names both ways, and the job ends."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

import launching
import numpy as np
import pytest
import runs

from hpctrain import launch
from hpctrain.data.make.digits import make_digits

pytestmark = pytest.mark.faults

LOST = {3} if launch.find_mpirun()[1] == "Open MPI" else {3, 9, 137}
"""Status of a job that the watchdog ended: MPICH's mpirun gives that of the ranks that it then killed."""

NET = """
import os, time
from dataclasses import dataclass
from hpctrain.comm.launchers import launched
from hpctrain.layers import BatchNorm, Conv, Dense, GlobalAvgPool
from hpctrain.models import finish, start

@dataclass(frozen=True)
class Norm(BatchNorm):
    trouble: str = ""
    seconds: float = 0.0

    def bind(self, place):
        rank = launched(os.environ).rank
        return Troubled(super().bind(place), self.trouble if rank == 1 else "", self.seconds)

class Troubled:
    def __init__(self, op, trouble, seconds):
        self.op, self.trouble, self.seconds, self.now = op, trouble, seconds, False

    def forward(self, x, w, y, phase):
        self.now = phase.training and phase.step == 2
        if self.now and self.trouble == "before":
            time.sleep(self.seconds)
        if self.now and self.trouble == "skip":
            y[...] = x[0]
            return
        self.op.forward(x, w, y, phase)
        if self.now and self.trouble == "after":
            time.sleep(self.seconds)

    def backward(self, dy, w, dx, dw):
        self.op.backward(dy, w, dx, dw)
        if self.now and self.trouble == "gradient":
            time.sleep(self.seconds)

def build(batch, sample, trouble="", seconds=0.0):
    net, x = start(batch, sample)
    x = net.add("conv1", Conv(3, kernel=3, padding=1), x)
    x = net.add("norm", Norm(trouble=trouble, seconds=seconds), x)
    x = net.add("conv2", Conv(4, kernel=3, padding=1), x)
    x = net.add("pool", GlobalAvgPool(), x)
    return finish(net, net.add("out", Dense(sample.outputs), x), sample)
"""


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder)
    return folder


def train(digits: Path, folder: Path, ranks: int, grid: str, *words: str) -> tuple[launching.Finished, float]:
    """How 4 steps of the network ended, and the seconds that they took."""
    (folder / "net.py").write_text(NET)
    model = f"{folder}/net.py:build"
    config = runs.write_config(folder / "run.toml", digits, folder / "run", grid, batch=32, epochs=1, model=model)
    begin = time.monotonic()
    ended = runs.train(ranks, config, "train.steps=4", "data.test=", *words)
    return ended, time.monotonic() - begin


def one_line(text: str) -> str:
    """Messages without the ends of lines that they were broken into."""
    return re.sub(r"\n  +", " ", text)


@pytest.mark.parametrize(
    ("trouble", "operation"),
    [
        ("before", r"statistics \(Allgather\) of norm"),
        ("after", "forward exchange of conv2"),
        ("gradient", r"gradient allreduce of \w+ and \d more"),
    ],
)
def test_rank_that_hangs_is_named_and_ends_the_job(digits: Path, tmp_path: Path, trouble: str, operation: str) -> None:
    words = [f"model.options.trouble={trouble}", "model.options.seconds=300"]
    limits = ["run.stall_seconds=1", "run.abort_seconds=3"]
    ended, seconds = train(digits, tmp_path, 2, "height = 2", *words, *limits)
    said = one_line(ended.stderr)
    assert ended.status in LOST, said
    assert seconds < 60
    for waited in (1, 2):
        warning = rf"^hpctrain: rank 0 on \S+ has waited {waited} s for rank 1 in {operation}; at 3 s the job ends"
        assert len(re.findall(warning, said, re.M)) == 1, said
    fatal = rf"^hpctrain: error: rank 0 on \S+ has waited \d s for rank 1 in {operation}; this ends the job"
    assert len(re.findall(fatal, said, re.M)) == 1, said
    ours = [line for line in ended.stderr.splitlines() if "rank 0 on" in line or line.startswith("  ")]
    assert max(map(len, ours)) < 80
    assert "rank 1 on" not in said


def test_long_wait_that_ends_is_told_and_goes_on(digits: Path, tmp_path: Path) -> None:
    words = ["model.options.trouble=before", "model.options.seconds=2.5", "run.stall_seconds=1"]
    ended, _ = train(digits, tmp_path, 2, "batch = 2", *words)
    assert ended.status == 0, ended.stderr
    assert "waited 1 s for rank 1 in statistics (Allgather) of norm; at 600 s the job ends" in one_line(ended.stderr)
    assert len(runs.records(tmp_path / "run", "step")) == 4


def test_guard_names_the_rank_that_leaves_something_out(digits: Path, tmp_path: Path) -> None:
    words = ["model.options.trouble=skip", "debug.collectives=true"]
    ended, seconds = train(digits, tmp_path, 3, "height = 3", *words)
    assert ended.status == 70, ended.stderr
    assert seconds < 60
    assert ended.stderr.count("hpctrain: error:") == 1, ended.stderr
    assert (
        "hpctrain: error: the ranks do not do the same:\n"
        "  rank 1 calls forward exchange of conv2\n"
        "  ranks 0, 2 call statistics (Allgather) of norm, 72 B\n"
    ) in ended.stderr


def test_guarded_run_has_the_same_bits(digits: Path, tmp_path: Path) -> None:
    found = []
    for guarded in ("true", "false"):
        folder = tmp_path / guarded
        folder.mkdir()
        ended, _ = train(digits, folder, 4, "batch = 2, height = 2", f"debug.collectives={guarded}")
        assert ended.status == 0, ended.stderr
        found.append(runs.final_tensors(folder / "run"))
    (steps, with_guard), (same_steps, without) = found
    assert steps == same_steps == 4
    assert with_guard.keys() == without.keys()
    for name, tensor in without.items():
        np.testing.assert_array_equal(tensor, with_guard[name], err_msg=name)


# --- programs of a few lines -----------------------------------------------------------------------------------------

PRELUDE = """
import sys, time
import numpy as np
from hpctrain.comm import world
from hpctrain.comm.watch import WATCH
from hpctrain.comm.watched import begin, watched
def main(w):
    norms = watched(w.comm, "statistics", "norm2")
    sums = watched(w.comm, "gradient allreduce", "conv1")
    pair = watched(w.comm.Split(w.rank // 2), "statistics", "norm5")
    every = np.empty((w.size, 12))
{body}
    return 0
if __name__ == "__main__":
    sys.exit(world.run_spmd(main))
"""


def run(folder: Path, body: str, ranks: int = 4) -> launching.Finished:
    """How a program ended whose main function, of a World `w`, is `body`."""
    path = folder / "program.py"
    path.write_text(PRELUDE.format(body="\n".join("    " + line for line in body.strip().split("\n"))))
    return launching.run([*launching.mpirun(ranks), sys.executable, path], timeout=60)


def diverged(ended: launching.Finished) -> list[str]:
    """Who calls what, of a program that all ranks left with one message."""
    assert ended.status == 70, ended.stderr
    assert "Abort" not in ended.stderr
    assert ended.stderr.count("hpctrain: error: the ranks do not do the same:\n") == 1, ended.stderr
    return re.findall(r"^  (ranks? .*)$", ended.stderr, re.M)


def test_guard_tells_apart_operations_of_the_same_communicator(tmp_path: Path) -> None:
    body = """
begin(w.comm, 5.0, 20.0, guarded=True)
for i in range(100):
    norms.Allgather(np.zeros(12), every)
if w.rank == 2:
    sums.Allgather(np.zeros(12), every)
norms.Allgather(np.zeros(12), every)
"""
    assert diverged(run(tmp_path, body)) == [
        "rank 2 calls gradient allreduce (Allgather) of conv1, 96 B",
        "ranks 0, 1, 3 call statistics (Allgather) of norm2, 96 B",
    ]


def test_guard_tells_apart_lengths(tmp_path: Path) -> None:
    body = """
begin(w.comm, 5.0, 20.0, guarded=True)
sums.Allreduce(np.zeros(5 + (w.rank == 3)), np.zeros(6))
"""
    assert diverged(run(tmp_path, body)) == [
        "rank 3 calls gradient allreduce (Allreduce) of conv1, 48 B",
        "ranks 0-2 call gradient allreduce (Allreduce) of conv1, 40 B",
    ]


def test_guard_finds_ranks_in_different_communicators(tmp_path: Path) -> None:
    # 2 and 3 agree with each other; only what they do next meets 0 and 1, who then have been somewhere else
    body = """
begin(w.comm, 5.0, 20.0, guarded=True)
pair.allgather(0)
if w.rank >= 2:
    pair.Barrier()
else:
    time.sleep(0.5)
sums.bcast(1) if w.rank >= 2 else norms.allreduce(1)
"""
    assert diverged(run(tmp_path, body)) == [
        "ranks 0, 1 call statistics (allreduce) of norm2",
        "ranks 2, 3 call gradient allreduce (bcast) of conv1",
    ]


def test_guard_reaches_ranks_that_come_late(tmp_path: Path) -> None:
    body = """
begin(w.comm, 5.0, 20.0, guarded=True)
if w.rank == 0:
    time.sleep(1)
norms.barrier() if w.rank != 1 else pair.barrier()
"""
    assert diverged(run(tmp_path, body)) == [
        "rank 1 calls statistics (barrier) of norm5",
        "ranks 0, 2, 3 call statistics (barrier) of norm2",
    ]


def test_guard_names_who_does_not_answer(tmp_path: Path) -> None:
    body = """
begin(w.comm, 1.0, 20.0, guarded=True)
if w.rank == 0:
    time.sleep(50)
norms.barrier() if w.rank == 3 else pair.barrier()
"""
    ended = run(tmp_path, body)
    assert ended.status == 70, ended.stderr
    assert "  rank 2 calls statistics (barrier) of norm5\n" in ended.stderr
    assert "  rank 3 calls statistics (barrier) of norm2\n" in ended.stderr
    assert re.search(r"^  (rank 0 does|ranks 0, 1 do) not answer$", ended.stderr, re.M)


def test_guard_and_watchdog_name_only_those_who_have_not_come(tmp_path: Path) -> None:
    body = """
begin(w.comm, 0.5, 30.0, guarded=True)
if w.rank in (1, 2):
    time.sleep(2.8)
norms.barrier()
"""
    ended = run(tmp_path, body)
    assert ended.status == 0, ended.stderr
    said = one_line(ended.stderr)
    found = re.findall(r"^hpctrain: ranks 0, 3 on \S+ have waited \d s for ranks 1, 2 in statistics", said, re.M)
    assert found
    assert len(found) < said.count("hpctrain: ") <= 4
    assert "rank 1 on" not in said


def test_patient_wait_is_told_and_never_ends_the_job(tmp_path: Path) -> None:
    body = """
begin(w.comm, 0.3, 0.6)
if w.rank == 1:
    time.sleep(1.5)
watched(w.comm, "verification of the data", patient=True).allgather(0)
"""
    ended = run(tmp_path, body, ranks=2)
    assert ended.status == 0, ended.stderr
    assert "for rank 1 in verification of the data (allgather)\n" in one_line(ended.stderr)


def test_rank_that_left_is_waited_for_no_longer_than_others(tmp_path: Path) -> None:
    body = """
begin(w.comm, 1.0, 2.5)
if w.rank == 1:
    return 0
norms.allreduce(1)
"""
    ended = run(tmp_path, body, ranks=3)
    assert ended.status in LOST, ended.stderr
    said = one_line(ended.stderr)
    assert re.search(r"ranks 0, 2 on \S+ have waited \d s for rank 1 in statistics \(allreduce\) of norm2", said)
    assert "for ranks 0, 2 in end of the program; at 2.5 s the job ends" in said


def test_status_3_reaches_who_starts_the_ranks(tmp_path: Path) -> None:
    body = "begin(w.comm, 0.3, 1.0)\nif w.rank == 1:\n    time.sleep(60)\nsums.barrier()"
    (tmp_path / "program.py").write_text(PRELUDE.format(body="\n".join("    " + line for line in body.split("\n"))))
    starter = tmp_path / "starter.py"
    starter.write_text(
        "import sys\nfrom hpctrain import launch\n"
        f"print('status', launch.spawn(2, [sys.executable, {str(tmp_path / 'program.py')!r}]))"
    )
    ended = launching.run([sys.executable, starter], timeout=50)
    assert ended.stdout == "status 3\n", ended.stderr
