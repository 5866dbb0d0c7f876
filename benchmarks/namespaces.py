"""Two hosts on one machine: network namespaces with a limited link, which Open MPI's mpirun takes for hosts.

Linux, root, iproute2. Everything made is removed again, whatever happens.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HOSTS = ("hpcta", "hpctb")
BRIDGE = "hpctbr"
NETWORK = "10.77.0"

LAUNCH = f"""#!/bin/bash
# stands in for ssh: mpirun gives an address and a command
while [[ "$1" == -* ]]; do shift; done
case "$1" in {NETWORK}.1) host={HOSTS[0]} ;; *) host={HOSTS[1]} ;; esac
shift
exec ip netns exec "$host" unshare -u -i -m bash -c "hostname $host; mount -t tmpfs tmpfs /dev/shm; $*"
"""


class Unavailable(Exception):
    """This machine cannot be two hosts; the message says why."""


@contextmanager
def two_hosts(gigabits: float) -> Iterator[Path]:
    """Two hosts whose links send so many Gbit/s each way; yields what stands in for ssh. Raises Unavailable."""
    if os.geteuid() != 0:
        raise Unavailable("network namespaces take root")
    for tool in ("ip", "tc", "unshare"):
        if shutil.which(tool) is None:
            raise Unavailable(f"there is no {tool}: apt-get install iproute2 util-linux")
    with tempfile.TemporaryDirectory() as folder:
        agent = Path(folder, "launch")
        agent.write_text(LAUNCH)
        agent.chmod(0o755)
        _remove()  # what a killed run may have left
        try:
            _make(gigabits)
            yield agent
        except subprocess.CalledProcessError as error:
            raise Unavailable(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None
        finally:
            _remove()


def _make(gigabits: float) -> None:
    _do("ip", "link", "add", BRIDGE, "type", "bridge")
    _do("ip", "address", "add", f"{NETWORK}.254/24", "dev", BRIDGE)
    _do("ip", "link", "set", BRIDGE, "up")
    for number, host in enumerate(HOSTS, start=1):
        inside = ("ip", "-n", host)
        _do("ip", "netns", "add", host)
        _do("ip", "link", "add", f"{host}0", "type", "veth", "peer", "name", "eth0", "netns", host)
        _do("ip", "link", "set", f"{host}0", "master", BRIDGE, "up")
        _do(*inside, "address", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
        _do(*inside, "link", "set", "eth0", "up")
        _do(*inside, "link", "set", "lo", "up")
        limit = ("rate", f"{gigabits}gbit", "burst", "128kb", "latency", "50ms")
        _do("tc", "-n", host, "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)


def _remove() -> None:
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True, check=False)


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


def sent() -> int:
    """Bytes that this host has sent over its link so far, headers included. To be asked on it."""
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def mpirun(agent: Path, per_host: int, program: Sequence[str], in_turn: bool = False) -> list[str]:
    """The command that runs `program` on so many ranks of each host; `in_turn` deals them out one by one."""
    hosts = ",".join(f"{NETWORK}.{number}:{per_host}" for number in (1, 2))
    tcp = ("--mca", "btl", "self,sm,tcp", "--mca", "pml", "ob1", "--mca", "btl_tcp_if_include", f"{NETWORK}.0/24")
    return [
        "mpirun",
        *("--prtemca", "plm_ssh_agent", str(agent), "--prtemca", "prte_if_include", f"{NETWORK}.0/24"),
        *("--host", hosts, "-n", str(2 * per_host), "--map-by", "node" if in_turn else "slot", "--bind-to", "none"),
        *tcp,
        *("--mca", "mpi_yield_when_idle", "1"),
        *program,
    ]
