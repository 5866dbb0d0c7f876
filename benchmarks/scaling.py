"""What a second rank brings: ResNet-18 on twice the images, beside PyTorch DDP, and one large image cut in two.

python benchmarks/scaling.py [--quick] [--json]

Every rank has one thread and a core to itself, under MPI (mpirun binds ranks) and under DDP (gloo) alike. One rank and
two, ours and PyTorch, take turns. Needs two idle cores.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from typing import Any

from common import print_json, set_threads, timed, warn_of_load
from networks import CASES, resnet18_large

RANKS = 2
TARGETS = {"efficiency": 0.95, "ratio": 1.8, "linear": 0.9}


def main() -> None:
    """Run what is asked for: all, or as one of the processes that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few images, one round: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.role:
        ROLES[asked.role](asked.quick)
        return
    set_threads(1)
    warn_of_load()
    found = measure(asked.quick)
    records = [several_images(found, asked.quick), one_image(found)]
    if asked.json:
        print_json("benchmarks/scaling.py", records)


# --- all ------------------------------------------------------------------------------------------------------------


def measure(quick: bool) -> dict[tuple[str, int], float]:
    """Seconds of a step by (role, ranks): the median over rounds of the medians of a launch."""
    taken: dict[tuple[str, int], list[float]] = {}
    for _ in range(1 if quick else 3):
        for role in ROLES:
            for ranks in (1, RANKS):
                taken.setdefault((role, ranks), []).append(launch(role, ranks, quick))
    return {key: median(seconds) for key, seconds in taken.items()}


def launch(role: str, ranks: int, quick: bool) -> float:
    """Seconds of a step of `role` on so many ranks, as rank 0 prints them."""
    program = [sys.executable, __file__, "--role", role, *(["--quick"] if quick else [])]
    if role == "ddp":
        return together([program] * ranks)
    return together([["mpirun", "-n", str(ranks), *program]])


def together(commands: Sequence[Sequence[str]]) -> float:
    """Run these processes at the same time; the number that the first one prints. Raises where one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(len(commands))}
    started = [
        subprocess.Popen(command, env=common | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank, command in enumerate(commands)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError(f"{' '.join(commands[0])} ended with {[process.returncode for process in started]}")
    seconds: float = json.loads(said[0].splitlines()[-1])
    return seconds


def several_images(found: dict[tuple[str, int], float], quick: bool) -> dict[str, Any]:
    """Images per second of both sides with one rank and two, each rank with a batch of its own."""
    batch = per_rank(quick)
    rate = {key: batch * key[1] / seconds for key, seconds in found.items()}
    efficiency = {role: rate[role, RANKS] / RANKS / rate[role, 1] for role in ("batch", "ddp")}
    ratio = rate["batch", RANKS] / rate["ddp", RANKS]
    print(f"{CASES['resnet18'].title}, {batch} images a rank, images/s")
    print(f"{'':<24}{'1 rank':>10}{'2 ranks':>10}{'efficiency':>12}{'target':>8}")
    print(
        row("hpctrain, batch = 2", rate["batch", 1], rate["batch", RANKS], efficiency["batch"], TARGETS["efficiency"])
    )
    print(row("PyTorch DDP, gloo", rate["ddp", 1], rate["ddp", RANKS], efficiency["ddp"], None))
    print(f"ratio to DDP: {ratio:.2f}, target {TARGETS['ratio']}")
    return {
        "network": "resnet18",
        "ranks": RANKS,
        "threads": 1,
        "batch": batch * RANKS,
        "seconds": found["batch", RANKS],
        "images_per_second": rate["batch", RANKS],
        "efficiency": efficiency["batch"],
        "peer": "torch DDP gloo",
        "peer_seconds": found["ddp", RANKS],
        "peer_images_per_second": rate["ddp", RANKS],
        "peer_efficiency": efficiency["ddp"],
        "ratio": ratio,
        "target": TARGETS["ratio"],
        "efficiency_target": TARGETS["efficiency"],
    }


def one_image(found: dict[tuple[str, int], float]) -> dict[str, Any]:
    """How much faster one image is done when its height is cut in two."""
    one, two = found["height", 1], found["height", RANKS]
    print("\nResNet-18 on one image, seconds per step")
    print(f"{'':<24}{'1 rank':>10}{'2 ranks':>10}{'of linear':>12}{'target':>8}")
    print(row("hpctrain, height = 2", one, two, one / two / RANKS, TARGETS["linear"]))
    record = {"network": "resnet18 512x512", "ranks": RANKS, "threads": 1, "batch": 1, "height": RANKS}
    return record | {
        "seconds": two,
        "peer": "1 rank",
        "peer_seconds": one,
        "ratio": one / two,
        "target": TARGETS["linear"] * RANKS,
    }


def row(title: str, one: float, two: float, share: float, target: float | None) -> str:
    """A line of a table."""
    verdict = "" if target is None else f"{target:>8.2f}{'' if share >= target else '  missed'}"
    return f"{title:<24}{one:>10.3f}{two:>10.3f}{share:>12.3f}{verdict}"


# --- one process of a launch ----------------------------------------------------------------------------------------


def batch(quick: bool) -> None:
    """A rank of ours, the batch cut."""
    _ours(quick, "batch", lambda ranks: CASES["resnet18"].build(per_rank(quick) * ranks))


def height(quick: bool) -> None:
    """A rank of ours, the height of one image cut."""
    _ours(quick, "height", lambda ranks: resnet18_large(1, 128 if quick else 512))


def _ours(quick: bool, axis: str, build: Any) -> None:
    from ours import Ours

    from hpctrain.comm import world
    from hpctrain.partition import Partition

    comm = world.start().comm
    side = Ours(build(comm.size), comm, Partition.of({axis: comm.size}))
    _time(side.step, comm.Barrier, quick, comm.rank)


def ddp(quick: bool) -> None:
    """A rank of DDP, on the core that mpirun would give it."""
    import torch
    from peers import Training
    from torch import distributed
    from torch.nn.parallel import DistributedDataParallel

    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    # the faster of its memory formats by train_step.py
    training = Training(CASES["resnet18"].build(per_rank(quick)), "channels_last")
    net = DistributedDataParallel(training.net, gradient_as_bucket_view=True)
    _time(lambda: training.step(net), distributed.barrier, quick, rank)
    distributed.destroy_process_group()


def _time(step: Any, barrier: Any, quick: bool, rank: int) -> None:
    step()
    taken = []
    for _ in range(2 if quick else 7):
        barrier()
        taken.append(timed(step, 1).wall)
    if rank == 0:
        print(json.dumps(median(taken)), flush=True)


def per_rank(quick: bool) -> int:
    """Images of a rank."""
    return 8 if quick else CASES["resnet18"].batch


ROLES = {"batch": batch, "ddp": ddp, "height": height}

if __name__ == "__main__":
    main()
