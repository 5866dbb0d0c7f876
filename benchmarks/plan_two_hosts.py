"""Plans for two ranks of one host, and of two hosts with a link of 1 Gbit/s: do they differ, is each right at home?

python benchmarks/plan_two_hosts.py [--quick] [--json] [--networks vgg11,alexnet]

Both places are calibrated, the planner finds a plan for each, and both plans are timed in both places, in turn. The
hosts are network namespaces of this machine: Linux, root, iproute2, Open MPI. Needs two idle cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import namespaces
from common import print_json, set_threads, warn_of_load
from ours import OPTIM, Ours
from planned import NETWORKS

from hpctrain import backends, machine
from hpctrain.bench import Options, Ranks
from hpctrain.calibration import command, copies, layers
from hpctrain.comm.allreduce import choose
from hpctrain.comm.allreduce.choose import Choice
from hpctrain.console import Console
from hpctrain.gradients import Summing
from hpctrain.graph import Graph
from hpctrain.machine import Kernel, Machine
from hpctrain.partition import Partition
from hpctrain.planner.cost import price
from hpctrain.planner.plan import Plan, uniform
from hpctrain.planner.search import search
from hpctrain.planner.setting import Setting

GIGABITS = 1.0
RANKS = 2
HERE, APART = "one host", "two hosts"

ASKED = ("vgg11", "resnet18", "alexnet")
"""With few weights beside their work, and with many."""

SIZES = (1024, 1 << 16, 1 << 20, 1 << 24)
"""Bytes of the allreduces that are measured."""

SECONDS = 30.0
"""For measuring the layers of a network."""

ROUNDS = 9

FEW = 3
"""Layers up to which each is named."""

CLOSE = 0.05
"""How far behind the best plan measured in a place the one that was found for it may be."""

DATA = "data parallelism"
"""The plan beside which both are held."""

Start = Callable[..., None]
"""Starts the ranks of a place, in a role, with its other arguments."""


def main() -> None:
    """Run what is asked for, or be one of the ranks that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(ASKED), help="some of %(default)s, or others of planned.py")
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--network", help=argparse.SUPPRESS)
    parser.add_argument("--machine", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        ROLES[asked.role](asked.network, asked.machine, asked.out, asked.quick)
        return
    names = asked.networks.split(",")
    if unknown := set(names) - NETWORKS.keys():
        parser.error(f"--networks {','.join(unknown)}: choose among {','.join(NETWORKS)}")
    set_threads(1)
    warn_of_load()
    try:
        with places() as started, tempfile.TemporaryDirectory() as folder:
            records = [record for name in names for record in compare(name, started, Path(folder), asked.quick)]
    except namespaces.Unavailable as error:
        print(f"skipped: {error}")
        return
    judge(records)
    if asked.json:
        print_json("benchmarks/plan_two_hosts.py", records, gigabits=GIGABITS)


@contextmanager
def places() -> Iterator[dict[str, Start]]:
    """How ranks are started in each place."""
    with namespaces.two_hosts(GIGABITS) as agent:

        def start(apart: bool) -> Start:
            def run(role: str, network: str, found: Path, out: Path, quick: bool) -> None:
                words = ["--role", role, "--network", network, "--machine", str(found), "--out", str(out)]
                program = [sys.executable, str(Path(__file__).absolute()), *words, *(["--quick"] if quick else [])]
                near = ["mpirun", "-n", str(RANKS), "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1", *program]
                subprocess.run(namespaces.mpirun(agent, 1, program) if apart else near, check=True, timeout=900)

            return run

        yield {HERE: start(False), APART: start(True)}


def compare(network: str, started: Mapping[str, Start], folder: Path, quick: bool) -> list[dict[str, Any]]:
    """A record for each plan in each place."""
    graph, plans, settings = build(network, quick), {}, {}
    for place, start in started.items():
        known = folder / f"{place}.json"
        start("calibrate", network, known, known, quick)
        settings[place] = Setting(machine.named(str(known)))
        plans[place] = search(graph, settings[place], RANKS).plan
    print(f"\n{network}, batches of {graph['x'].shape[0]}, {RANKS} ranks")
    for line in differences(plans[HERE], plans[APART]):
        print(f"  {line}")
    plans[DATA] = uniform(graph, Partition(batch=RANKS))
    texts, records = {place: plan.to_json() for place, plan in plans.items()}, []
    (folder / "plans.json").write_text(json.dumps(texts))
    print(f"  {'seconds of a step':<34}{'measured':>10}{'predicted':>11}{'error':>8}")
    for place, start in started.items():
        start("time", network, folder / f"{place}.json", folder / "plans.json", quick)
        taken = json.loads((folder / "plans.json.taken").read_text())
        for of, plan in plans.items():
            predicted = price(graph, plan, settings[place], RANKS).seconds
            record = {"network": network, "batch": graph["x"].shape[0], "ranks": RANKS, "place": place, "plan_for": of}
            record |= {"seconds": taken[of], "predicted_seconds": predicted, "error": predicted / taken[of] - 1}
            records.append(record | {"same_plan": plans[HERE].partitions == plans[APART].partitions})
            title = f"on {place}, {of if of == DATA else f'plan for {of}'}"
            print(f"  {title:<34}{taken[of]:>10.4f}{predicted:>11.4f}{100 * record['error']:>+7.1f}%")
    return records


def differences(here: Plan, apart: Plan) -> Iterator[str]:
    """Layers that the two plans cut in the same two ways, one line each."""
    yield f"{'plan for ' + HERE:<24}{'plan for ' + APART:<24}layers"
    alike: dict[tuple[str, str], list[str]] = {}
    for name, partition in here.partitions.items():
        alike.setdefault((str(partition), str(apart.partitions[name])), []).append(name)
    for (near, far), names in alike.items():
        said = ", ".join(names) if len(names) <= FEW else f"{len(names)}: {names[0]}, {names[1]}, ... {names[-1]}"
        yield f"{near:<24}{far:<24}{said}"


def judge(records: Sequence[Mapping[str, Any]]) -> None:
    """Print, network by network, whether the plans differ, and whether each is right at home."""
    print()
    for network in dict.fromkeys(r["network"] for r in records):
        mine = [r for r in records if r["network"] == network]
        taken = {(r["place"], r["plan_for"]): r["seconds"] for r in mine}
        print(f"{network}: {'the same plan in both places' if mine[0]['same_plan'] else 'different plans'}")
        for place, other in ((HERE, APART), (APART, HERE)):
            home = taken[place, place]
            best = min(seconds for (where, _), seconds in taken.items() if where == place)
            behind = home / best - 1
            said = f"{100 * behind:.1f} % behind the best of these" if behind else "the best of these"
            print(
                f"  on {place}, the plan for it is {taken[place, other] / home:.2f} times as fast as the other's, "
                f"{taken[place, DATA] / home:.2f} times as fast as {DATA}; {said}: "
                f"{'right' if behind <= CLOSE else 'wrong'}"
            )


# --- a rank ----------------------------------------------------------------------------------------------------------


def build(network: str, quick: bool) -> Graph:
    """The network at its batch."""
    case = NETWORKS[network]
    return case.build(case.quick if quick else case.batch)


def calibrate(network: str, known: Path, out: Path, quick: bool) -> None:
    """Measure the place and the layers of a network; sums only where `known` has none yet."""
    from hpctrain.comm import world

    here, graph, backend = world.start(), build(network, quick), backends.get("native")
    backend.use_threads(here.threads)
    old = here.comm.bcast(machine.load(known) if here.rank == 0 else None)
    if old is None:
        with Ranks(here) as ranks:
            old, _ = command.sums(
                here, ranks, Options(SIZES[:3] if quick else SIZES, rounds=3 if quick else 7), Console(1)
            )
    near = copies.measure(here.node, 3 if quick else command.ROUNDS)
    plans = layers.plans(graph, here.size)
    found = layers.rehearse(here.comm, graph, plans, backend, "float32", OPTIM, SECONDS, 1 if quick else None)
    kernels: tuple[Kernel, ...] = found.times.kernels(here.node_size)
    new = Machine(
        library=here.library,
        copies=near,
        compute=layers.compute(found.times.measured()),
        kernels=kernels,
        update=found.update,
        step=command.agreement(here, 5 if quick else command.ROUNDS),
        per_host=here.node_size if here.node_size < here.size else None,
    )
    if here.rank == 0:
        out.write_bytes(machine.encode(old.updated(new)))


def time(network: str, known: Path, plans: Path, quick: bool) -> None:
    """Median seconds of a step by each of `plans`, which take turns, into a file beside them."""
    from hpctrain.comm import world
    from hpctrain.comm.link import Topology

    here, graph = world.start(), build(network, quick)
    found, hosts = machine.named(str(known)), Topology(here.comm).hosts
    room = choose.least_room(here.comm)

    def choice(nbytes: int, ranks: Sequence[int]) -> Choice:
        return choose.choose(nbytes, [hosts[rank] for rank in ranks], found, room)

    sides, taken = {}, dict[str, list[float]]()
    for name, text in json.loads(plans.read_text()).items():
        sides[name] = Ours(graph, here.comm, Plan.from_json(text, name), summing=Summing(choose=choice))
    for at in range(-1, 2 if quick else ROUNDS):
        for name, side in sides.items():
            here.comm.Barrier()
            begin = perf_counter()
            side.step()
            spent = max(here.comm.allgather(perf_counter() - begin))
            if at >= 0:
                taken.setdefault(name, []).append(spent)
    if here.rank == 0:
        medians = {name: median(spent) for name, spent in taken.items()}
        Path(f"{plans}.taken").write_text(json.dumps(medians))


ROLES: Mapping[str, Callable[[str, Path, Path, bool], None]] = {"calibrate": calibrate, "time": time}

if __name__ == "__main__":
    main()
