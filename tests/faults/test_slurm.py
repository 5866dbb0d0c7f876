"""jobs/slurm.sh on a real Slurm: munge, a controller and two virtual nodes on this machine, private to these tests."""

from __future__ import annotations

import contextlib
import faulthandler
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import launching
import pytest
import runs

import hpctrain
from hpctrain.checkpoint import newest
from hpctrain.data.make.digits import make_digits

pytestmark = [pytest.mark.slow, pytest.mark.faults]

ROOT = Path(hpctrain.__file__).parents[1]
INSTALL = "apt-get install -y --no-install-recommends slurm-wlm munge libpmix-dev"
PROGRAMS = ("munged", "mungekey", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
SEARCH = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/usr/local/sbin"

# A requeued job may start again when the credential of its last start has expired (2 minutes unless set), and when
# the scheduler next looks (1 minute). TmpFS must differ between nodes on one host: PMIx has its sockets there.
CONF = """
ClusterName=hpctrain
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
TmpFS={folder}/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
SwitchType=switch/none
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobRequeue=0
KillWait=10
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=500
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=500
PartitionName=main Nodes=ALL Default=YES MaxTime=01:00:00 State=UP
"""

# `hpctrain`, of which one rank leaves a second after the others, as one of many will.
COMMAND = """#!/bin/sh
[ "$SLURM_PROCID" = 3 ] || exec "{python}" -m hpctrain "$@"
trap : USR1 TERM
"{python}" -m hpctrain "$@"
status=$?
trap - TERM
sleep 1
exit $status
"""


def until(what: str, condition: Callable[[], object], seconds: float = 90) -> None:
    """Wait for `condition` to hold; a failure says `what` did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds} s: {what}")
        time.sleep(0.1)


@dataclass(frozen=True)
class Cluster:
    """A Slurm of two nodes with two cores each; its files and logs are in `folder`."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: str | Path, cwd: Path | None = None) -> str:
        """What a command writes to stdout, given this Slurm."""
        ended = subprocess.run(command, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def job(self, number: str) -> dict[str, str]:
        """The fields of `scontrol show job`, for example JobState, Restarts and ExitCode."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "-o", "show", "job", number)))

    def processes(self, *variables: str) -> list[int]:
        """Ids of the processes in this Slurm that were started with these variables, given as NAME=value."""
        wanted = {f"SLURM_CONF={self.env['SLURM_CONF']}", *variables}
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):  # it ended, or is another user's
                if wanted <= set(path.read_text(errors="replace").split("\0")):
                    found.append(int(path.parent.name))
        return found


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A running Slurm, of which nothing is left afterwards."""
    faulthandler.cancel_dump_traceback_later()
    if missing := [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]:
        pytest.fail(f"{', '.join(missing)} not found; install Slurm (its services need not run):\n{INSTALL}")
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool-n1", "spool-n2", "tmp-n1", "tmp-n2", "bin"):
        (folder / name).mkdir()
    command = folder / "bin" / "hpctrain"
    command.write_text(COMMAND.format(python=sys.executable))
    command.chmod(0o755)
    write_conf(folder)
    path = f"{command.parent}:{SEARCH}"
    env = launching.environment(SLURM_CONF=str(folder / "slurm.conf"), PATH=path, PYTHONPATH=str(ROOT))
    cluster = Cluster(folder, {name: value for name, value in env.items() if not name.startswith("SLURM_JOB")})
    with contextlib.ExitStack() as daemons:
        daemons.callback(end_leftovers, cluster)
        munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file", "seed-file")]
        cluster.run("mungekey", "--create", f"--keyfile={folder}/munge.key")
        key = f"--key-file={folder}/munge.key"
        start(daemons, cluster, "munged", "munged", "--foreground", "--force", key, *munge)
        until("munge's socket", (folder / "munge.socket").exists)
        start(daemons, cluster, "slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            start(daemons, cluster, f"slurmd-{node}", "slurmd", "-D", "-N", node)
        until("two idle nodes", lambda: "n[1-2] idle" in cluster.run("sinfo", "-h", "-o", "%N %T"))
        refused = subprocess.run(["srun", "--mpi=pmix", "true"], env=cluster.env, capture_output=True, text=True)
        if refused.returncode:
            pytest.fail(f"{refused.stderr}Slurm has no PMIx (its plugin needs libpmix.so):\n{INSTALL}")
        yield cluster
        cluster.run("scancel", "--full", f"--user={getpass.getuser()}")
        until("an empty queue", lambda: not cluster.run("squeue", "-h"))


def write_conf(folder: Path) -> None:
    """slurm.conf, on three ports that are free now."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        ports = [each.getsockname()[1] for each in sockets]
    host, user = socket.gethostname().split(".")[0], getpass.getuser()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, user=user, ports=ports))


def start(daemons: contextlib.ExitStack, cluster: Cluster, name: str, *command: str) -> None:
    """Start a daemon that ends with `daemons`, or when this process is killed; it writes to NAME.log."""
    log = (cluster.folder / f"{name}.log").open("w")
    daemon = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *command], env=cluster.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )

    def end() -> None:
        daemon.terminate()
        try:
            daemon.wait(20)
        finally:
            daemon.kill()
            daemon.wait()
            log.close()

    daemons.callback(end)


def end_leftovers(cluster: Cluster) -> None:
    """Kill what outlived its Slurm."""
    for process in cluster.processes():
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


# --- the runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data sets train and test."""
    folder = tmp_path_factory.mktemp("digits")
    make_digits(folder)
    return folder


@dataclass(frozen=True)
class Run:
    """An endless run on 4 ranks of both nodes, which jobs/slurm.sh trains until `finish_after` some steps."""

    cluster: Cluster
    folder: Path

    def submit(self, *options: str) -> str:
        """Submit jobs/slurm.sh as a person would; the number of the job."""
        faulthandler.cancel_dump_traceback_later()  # everything here has limits of its own
        script = ROOT / "jobs" / "slurm.sh"
        sbatch = ("sbatch", "--parsable", "--ntasks-per-node=2", "--cpus-per-task=1", *options)
        return self.cluster.run(*sbatch, script, "train.toml", cwd=self.folder).strip()

    def edit(self, old: str, new: str) -> None:
        """Change the config file."""
        path = self.folder / "train.toml"
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def saved(self) -> int:
        """The step of the newest checkpoint; 0 without one."""
        checkpoint, damaged = newest(self.folder / "run" / "checkpoints")
        assert not damaged
        return checkpoint.step if checkpoint else 0

    def finish_after(self, steps: int) -> int:
        """Let the next start end `steps` steps after the newest checkpoint; the number of that step."""
        last = self.saved() + steps
        self.edit("[train]\n", f"[train]\nsteps = {last}\n")
        return last

    def log(self, job: str) -> str:
        """What all starts of a job have written."""
        return (self.folder / f"hpctrain-{job}.log").read_text()

    def assert_finished(self, job: str, restarts: int, resumed: int, last: int) -> None:
        """The job ends well after these restarts, the last of them from step `resumed`; no step is lost or doubled."""
        until("the end of the job", lambda: self.cluster.job(job)["JobState"] in ("COMPLETED", "FAILED"), 150)
        log, record = self.log(job), self.cluster.job(job)
        assert (record["JobState"], record["ExitCode"], record["Restarts"]) == ("COMPLETED", "0:0", str(restarts)), log
        assert re.findall(r"^resumed \S+ at step (\d+)$", log, re.M)[-1] == str(resumed), log
        assert [r["step"] for r in runs.records(self.folder / "run", "step")] == list(range(1, last + 1))
        assert self.saved() == last


@pytest.fixture
def run(cluster: Cluster, digits: Path, tmp_path: Path) -> Run:
    config = tmp_path / "train.toml"
    runs.write_config(config, digits, tmp_path / "run", grid="batch = 2, height = 2", epochs=100_000)
    run = Run(cluster, tmp_path)
    run.edit("[run]\n", "[checkpoint]\nevery_steps = 10\n[run]\n")
    return run


def test_run_that_the_walltime_cuts_is_requeued_and_finishes(run: Run) -> None:
    job = run.submit("--time=1", "--signal=USR1@15")  # a minute at least, and the signal up to half of one early
    until("a requeue", lambda: run.cluster.job(job)["Restarts"] == "1")
    log, stopped = run.log(job), run.saved()
    assert re.search(rf"stopped on request after step {stopped} with status 75", log), log
    assert "slurm.sh: status 75, starting again" in log
    last = run.finish_after(15)
    run.assert_finished(job, restarts=1, resumed=stopped, last=last)
    assert run.log(job).startswith(log)
    (line,) = (run.folder / f"hpctrain-{job}.restarts").read_text().splitlines()
    assert line.endswith("n[1-2] status 75")


def test_job_that_loses_a_rank_is_requeued_and_goes_on_from_its_checkpoint(run: Run) -> None:
    job = run.submit("--time=30")
    until("a checkpoint", lambda: run.saved() >= 20)
    (rank,) = run.cluster.processes(f"SLURM_JOB_ID={job}", "SLURM_PROCID=2")
    os.kill(rank, signal.SIGKILL)
    until("a requeue", lambda: run.cluster.job(job)["Restarts"] == "1", 40)
    stopped = run.saved()
    last = run.finish_after(15)
    run.assert_finished(job, restarts=1, resumed=stopped, last=last)
    (line,) = (run.folder / f"hpctrain-{job}.restarts").read_text().splitlines()
    assert re.search(r"status (?!0$|2$|75$)\d+$", line), line


def test_cancelled_job_saves_stays_away_and_leaves_a_run_that_goes_on(run: Run) -> None:
    job = run.submit("--time=30")
    until("a checkpoint", lambda: run.saved() >= 10)
    run.cluster.run("scancel", job)
    until("the end of its processes", lambda: not run.cluster.processes(f"SLURM_JOB_ID={job}"), 40)
    stopped = run.saved()
    assert f"stopped on request after step {stopped} with status 75" in run.log(job)
    time.sleep(15)  # a requeued job would be back
    assert run.cluster.job(job)["JobState"] == "CANCELLED"
    assert run.cluster.job(job)["Restarts"] == "0"
    last = run.finish_after(15)
    run.assert_finished(run.submit("--time=30"), restarts=0, resumed=stopped, last=last)


def test_bad_input_is_not_requeued(run: Run) -> None:
    run.edit("batch = 32\n", "bath = 32\n")
    job = run.submit("--time=30")
    until("the end of the job", lambda: run.cluster.job(job)["JobState"] == "FAILED", 40)
    record, log = run.cluster.job(job), run.log(job)
    assert (record["ExitCode"], record["Restarts"]) == ("2:0", "0"), log
    assert log.count("train.bath") == 1, log
