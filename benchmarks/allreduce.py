"""Sums of gradients beside the MPI library's own, gloo's and Horovod's.

python benchmarks/allreduce.py [--ranks 2,4] [--horovod PYTHON] [--quick] [--json]

`hpctrain bench allreduce` times our algorithms and MPI's in turn, in the same processes. gloo (torch.distributed) and
Horovod need processes of their own, and these take turns with the others. Needs an idle core for each rank.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any

from common import print_json, set_threads, warn_of_load
from scaling import together

SIZES = (1 << 10, 1 << 16, 1 << 20, 1 << 24, 1 << 26)
QUICK = (1 << 10, 1 << 16)
LONG = 1 << 16
"""Bytes from which on the larger target holds."""

TARGETS = {"always": 0.9, "long": 4.0}
"""Times as fast as MPI's own, of the algorithm that is chosen, on 2 ranks."""

Key = tuple[str, int]
"""Algorithm and bytes."""


def main() -> None:
    """Run what is asked for, or be one of the processes that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="2", help="numbers of ranks, with commas (default: 2)")
    parser.add_argument("--horovod", metavar="PYTHON", help="the Python of build_horovod.sh, if not this one")
    parser.add_argument("--quick", action="store_true", help="short buffers, one round: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--gloo", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.gloo:
        gloo(QUICK if asked.quick else SIZES)
        return
    set_threads(1)
    warn_of_load()
    records = []
    for ranks in map(int, asked.ranks.split(",")):
        found, chosen = measure(ranks, asked.horovod or sys.executable, asked.quick)
        records += report(ranks, found, chosen)
    if asked.json:
        print_json("benchmarks/allreduce.py", records)


def measure(ranks: int, horovod: str, quick: bool) -> tuple[dict[Key, list[tuple[float, float]]], dict[int, str]]:
    """({(algorithm, bytes): seconds beside MPI's own, one pair a launch}, {bytes: the chosen algorithm})."""
    sizes = QUICK if quick else SIZES
    found: dict[Key, list[tuple[float, float]]] = {}
    chosen: dict[int, str] = {}
    able = has_horovod(horovod)
    if not able:
        print("Horovod is not installed: benchmarks/build_horovod.sh VENV, then --horovod VENV/bin/python")
    for _ in range(1 if quick else 3):
        ours = bench(sys.executable, ranks, sizes, quick)
        chosen |= {r["bytes"]: r["algorithm"] for r in ours if r["chosen"]}
        native = {r["bytes"]: r["peer_seconds"] for r in ours}
        theirs = bench(horovod, ranks, sizes, quick, "horovod") if able else []
        for r in (*ours, *(r for r in theirs if r["algorithm"] == "horovod")):
            found.setdefault((r["algorithm"], r["bytes"]), []).append((r["seconds"], r["peer_seconds"]))
        for nbytes, seconds in gloo_on(ranks, quick).items():
            found.setdefault(("gloo", nbytes), []).append((seconds, native[nbytes]))
    return found, chosen


def bench(python: str, ranks: int, sizes: Sequence[int], quick: bool, algorithm: str = "") -> list[dict[str, Any]]:
    """Records of `hpctrain bench allreduce`."""
    words = ["bench", "allreduce", "--json", "--sizes", ",".join(map(str, sizes))]
    words += ["--repeat", "3"] if quick else []
    words += ["--algorithms", algorithm] if algorithm else []
    here = os.path.join(os.path.dirname(python), "mpirun")
    launcher = here if os.path.exists(here) else "mpirun"
    threads = {"HPCTRAIN_MPI_THREADS": "multiple"} if algorithm else {}
    done = subprocess.run(
        [launcher, "-n", str(ranks), python, "-m", "hpctrain", *words],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | threads,
    )
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["results"]
    return records


def has_horovod(python: str) -> bool:
    """Whether that Python has it."""
    return subprocess.run([python, "-c", "import horovod.torch"], capture_output=True, check=False).returncode == 0


def gloo_on(ranks: int, quick: bool) -> dict[int, float]:
    """{bytes: seconds}."""
    program = [sys.executable, __file__, "--gloo", *(["--quick"] if quick else [])]
    return dict(together([program] * ranks))


def gloo(sizes: Sequence[int]) -> None:
    """A process of torch.distributed: prints [(bytes, median over rounds of the slowest rank)]."""
    import torch
    from torch import distributed

    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    distributed.init_process_group("gloo")
    found = []
    for nbytes in sizes:
        buffer, taken = torch.empty(nbytes // 4), []
        for _ in range(max(7, min(51, (64 << 20) // nbytes))):
            buffer.fill_(rank + 1)
            distributed.barrier()
            begin = perf_counter()
            distributed.all_reduce(buffer)
            seconds = torch.tensor(perf_counter() - begin)
            if float(buffer[-1]) != ranks * (ranks + 1) / 2:
                raise RuntimeError("gloo's sum is wrong")
            distributed.all_reduce(seconds, distributed.ReduceOp.MAX)
            taken.append(float(seconds))
        found.append((nbytes, median(taken[1:])))
    distributed.destroy_process_group()
    if rank == 0:
        print(json.dumps(found))


def report(ranks: int, found: dict[Key, list[tuple[float, float]]], chosen: dict[int, str]) -> list[dict[str, Any]]:
    """Print a table of ratios, and whether the targets are met; the records."""
    sizes = sorted(chosen)
    print(f"\n{ranks} ranks; times as fast as MPI's own, medians of {len(found['mpi', sizes[0]])} launches")
    print(f"{'':<22}" + "".join(f"{_bytes(n):>11}" for n in sizes))
    native = "".join(f"{1e6 * median(s for s, _ in found['mpi', n]):>11.1f}" for n in sizes)
    print(f"{'mpi, microseconds':<22}{native}")
    records = []
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for nbytes in sizes:
            pairs = found.get((name, nbytes), [])
            ratio = median(peer / seconds for seconds, peer in pairs) if pairs else None
            mark = "*" if chosen[nbytes] == name else " "
            cells.append(f"{'-' if ratio is None else f'{ratio:.2f}'}{mark}".rjust(11))
            if ratio is not None:
                records.append(_record(name, nbytes, ranks, pairs, ratio, chosen[nbytes] == name))
        print(f"{name:<22}" + "".join(cells))
    if ranks == 2:
        for r in (r for r in records if r["chosen"]):
            target = TARGETS["long"] if r["bytes"] >= LONG else TARGETS["always"]
            r["target"] = target
            said = "met" if r["ratio"] >= target else "missed"
            print(f"chosen for {_bytes(r['bytes'])}: {r['algorithm']}, {r['ratio']:.2f}, target {target}: {said}")
    return records


def _record(
    name: str, nbytes: int, ranks: int, pairs: Sequence[tuple[float, float]], ratio: float, chosen: bool
) -> dict[str, Any]:
    seconds = median(s for s, _ in pairs)
    return {
        "algorithm": name,
        "bytes": nbytes,
        "ranks": ranks,
        "seconds": seconds,
        "peer": "mpi",
        "peer_seconds": median(peer for _, peer in pairs),
        "ratio": ratio,
        "bus_bandwidth": 2 * (ranks - 1) / ranks * nbytes / seconds,
        "chosen": chosen,
    }


def _bytes(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    main()
