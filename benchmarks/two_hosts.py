"""Sums of gradients between two hosts over a link of 1 Gbit/s: how much of it is used, and how many bytes cross it.

python benchmarks/two_hosts.py [--quick] [--json]

The hosts are network namespaces of this machine: Linux, root, iproute2, Open MPI.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import namespaces
import numpy as np
from common import print_json, set_threads, warn_of_load
from networks import CASES

GIGABITS = 1.0
LINK = GIGABITS * 1e9 / 8
USED = 0.85
"""Of the link, that the best algorithm is to use with one rank a host."""

FLAT = "ring"
NETWORKS = ("resnet18", "vgg11")
"""Whose gradients, 43 and 35 MiB, are summed while backward goes on; half of the batch of the other benchmarks."""

NAMES = ("ring", "segmented_ring", "recursive_doubling", "halving_doubling", "mpi")


def main() -> None:
    """Run what is asked for, or be one of the ranks that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 MiB, one round: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        ROLES[asked.role](asked.quick)
        return
    set_threads(1)
    warn_of_load()
    try:
        with namespaces.two_hosts(GIGABITS) as agent:
            records = one_rank_a_host(agent, asked.quick) + two_ranks_a_host(agent, asked.quick)
            records += overlap(agent, asked.quick)
    except namespaces.Unavailable as error:
        print(f"skipped: {error}")
        return
    if asked.json:
        print_json("benchmarks/two_hosts.py", records, link_bytes_per_second=LINK)


def launch(agent: Path, per_host: int, role: str, quick: bool, in_turn: bool = False) -> Any:
    """What rank 0 of the ranks that play `role` prints."""
    program = [sys.executable, str(Path(__file__).absolute()), "--role", role, *(["--quick"] if quick else [])]
    command = namespaces.mpirun(agent, per_host, program, in_turn)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    return json.loads(done.stdout.splitlines()[-1])


def size(quick: bool) -> int:
    """Bytes that are summed."""
    return (4 if quick else 64) << 20


# --- what is measured ------------------------------------------------------------------------------------------------


def one_rank_a_host(agent: Path, quick: bool) -> list[dict[str, Any]]:
    """How much of the link each algorithm uses. Two ranks send the buffer once each, both ways at once."""
    found, n = launch(agent, 1, "sums", quick), size(quick)
    print(f"1 rank on each of 2 hosts, {n >> 20} MiB, a link of {LINK / 1e9} GB/s each way")
    print(f"{'':<22}{'seconds':>10}{'GB/s':>8}{'of link':>9}{'x mpi':>8}")
    records = []
    for name, (seconds, _) in sorted(found.items(), key=lambda item: item[1]):
        used, ratio = n / seconds / LINK, found["mpi"][0] / seconds
        print(f"{name:<22}{seconds:>10.3f}{n / seconds / 1e9:>8.3f}{used:>9.2f}{ratio:>8.2f}")
        records.append(record(name, n, 2, seconds, found["mpi"][0]) | {"link_used": used, "target": USED})
    best = max(r["link_used"] for r in records if r["algorithm"] != "mpi")
    print(f"the best of ours uses {best:.2f} of the link, target {USED}: {'met' if best >= USED else 'missed'}")
    return records


def two_ranks_a_host(agent: Path, quick: bool) -> list[dict[str, Any]]:
    """Bytes over the link, and time, of the flat ring and of hierarchical sums, for both orders of ranks."""
    n, records = size(quick), []
    for order, in_turn in (("host by host", False), ("in turn", True)):
        found = launch(agent, 2, "sums", quick, in_turn)
        print(f"\n2 ranks on each of 2 hosts, dealt out {order}, {n >> 20} MiB")
        print(f"{'':<22}{'seconds':>10}{'bytes/n over the link':>23}{'formula':>9}{'x ' + FLAT:>8}")
        for name, (seconds, crossed) in sorted(found.items(), key=lambda item: item[1]):
            expected = {"ring": 3.0 if in_turn else 1.5, "hierarchical": 1.0}.get(name)
            said = "" if expected is None else f"{expected:.2f}"
            print(f"{name:<22}{seconds:>10.3f}{crossed / n:>23.2f}{said:>9}{found[FLAT][0] / seconds:>8.2f}")
            records.append(
                record(name, n, 4, seconds, found[FLAT][0], FLAT)
                | {"order": order, "link_bytes": crossed, "expected_link_bytes": expected and expected * n}
            )
        share = found["hierarchical"][1] / found[FLAT][1]
        print(f"hierarchical sends {share:.2f} of the flat ring's bytes over the link, each way")
    return records


def overlap(agent: Path, quick: bool) -> list[dict[str, Any]]:
    """A training step whose gradients are summed after backward, and while it goes on."""
    records = []
    print("\na training step, 1 rank on each of 2 hosts")
    print(f"{'':<22}{'overlap':>9}{'seconds':>10}{'sums, s':>10}{'ratio':>8}")
    for network in ("lenet",) if quick else NETWORKS:
        found = launch(agent, 1, network, quick)
        after = found["False"]["seconds"]
        for on, taken in (("no", found["False"]), ("yes", found["True"])):
            seconds, summing = taken["seconds"], taken["allreduce"]
            print(f"{CASES[network].title:<22}{on:>9}{seconds:>10.3f}{summing:>10.3f}{after / seconds:>8.2f}")
            records.append(
                {"network": network, "ranks": 2, "hosts": 2, "overlap": on == "yes", "allreduce_seconds": summing}
                | {"seconds": seconds, "peer": "no overlap", "peer_seconds": after, "ratio": after / seconds}
            )
    return records


def record(name: str, nbytes: int, ranks: int, seconds: float, peer: float, of: str = "mpi") -> dict[str, Any]:
    """The names that all benchmarks use."""
    return {
        "algorithm": name,
        "bytes": nbytes,
        "ranks": ranks,
        "hosts": 2,
        "seconds": seconds,
        "peer": of,
        "peer_seconds": peer,
        "ratio": peer / seconds,
    }


# --- a rank ----------------------------------------------------------------------------------------------------------


def sums(quick: bool) -> None:
    """{algorithm: (median seconds, bytes that a host has sent for one sum)}."""
    from hpctrain.comm import world
    from hpctrain.comm.allreduce import measure
    from hpctrain.comm.link import Link

    comm = world.start().comm
    link, buffer = Link(comm), np.zeros(size(quick) // 4, np.float32)
    names = NAMES if comm.size == 2 else (*NAMES, "hierarchical")
    sides = measure.messages(link, names, buffer)
    seconds = measure.in_turn(comm, sides, 1 if quick else 3)
    found = {}
    for side in sides:
        comm.Barrier()
        before = namespaces.sent()
        side.sum()
        comm.Barrier()
        found[side.name] = seconds[side.name], max(comm.allgather(namespaces.sent() - before))
    if comm.rank == 0:
        print(json.dumps(found), flush=True)


def step(quick: bool, network: str) -> None:
    """{overlap: medians of the seconds of a step, and of those spent waiting for sums}; both take turns."""
    from ours import Ours, chooser

    from hpctrain.comm import world
    from hpctrain.gradients import Summing
    from hpctrain.partition import Partition

    comm = world.start().comm
    choose, case = chooser(comm), CASES[network]
    grid, graph = Partition(batch=comm.size), case.build(case.batch // 2 * comm.size)
    sides = {on: Ours(graph, comm, grid, summing=Summing(overlap=on, choose=choose)) for on in (False, True)}
    taken: dict[bool, list[tuple[float, float]]] = {on: [] for on in sides}
    for _ in range(3 if quick else 10):
        for on, side in sides.items():
            comm.Barrier()
            begin, before = perf_counter(), side.executor.seconds["allreduce"]
            side.step()
            comm.Barrier()
            taken[on].append((perf_counter() - begin, side.executor.seconds["allreduce"] - before))
    if comm.rank == 0:
        middle = {on: [median(column) for column in zip(*rounds[1:], strict=True)] for on, rounds in taken.items()}
        print(json.dumps({str(on): {"seconds": s, "allreduce": a} for on, (s, a) in middle.items()}), flush=True)


ROLES: dict[str, Callable[[bool], None]] = {
    "sums": sums,
    **{name: partial(step, network=name) for name in ("lenet", *NETWORKS)},
}

if __name__ == "__main__":
    main()
