"""Exchanges between ranks of one host: by messages, and out of each other's arrays in shared memory.

python benchmarks/exchange.py [--quick] [--json]

Halos of convolutions, a redistribution, and a gather, forward and backward, on 2 and 4 ranks. Both ways run in the same
processes and take turns; that they give the same bits is checked first. The ratio is messages / shared memory.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
from common import print_json, set_threads, warn_of_load

RANKS = (2, 4)
TRANSFERS = {
    "halo 8x64x64x64": (8, 64, 64, 64),
    "halo 1x512x512x32": (1, 512, 512, 32),
    "halo 32x8x8x256": (32, 8, 8, 256),
    "halo 1x64x64x64x16": (1, 64, 64, 64, 16),
    "batch to channel 128x4096": (128, 4096),
    "gather 64x4096": (64, 4096),
    "halo 2x16x8x8": (2, 16, 8, 8),
    "gather 8x64": (8, 64),
}
"""By kind and shape, in float32; the last two are as small as they get."""


def main() -> None:
    """Measure all, or as one of the ranks that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank:
        run(asked.quick)
        return
    set_threads(1)
    warn_of_load()
    records = [record for ranks in RANKS for record in launch(ranks, asked.quick)]
    if asked.json:
        print_json("benchmarks/exchange.py", records)


def launch(ranks: int, quick: bool) -> list[dict[str, Any]]:
    """What the first of so many ranks prints: the records; a table goes to stdout."""
    program = [sys.executable, __file__, "--rank", *(["--quick"] if quick else [])]
    done = subprocess.run(["mpirun", "-n", str(ranks), *program], stdout=subprocess.PIPE, text=True, check=True)
    records: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    print(f"{ranks} ranks, microseconds{'':<13}{'bytes':>9}{'messages':>10}{'shared':>9}{'ratio':>8}")
    for r in records:
        figures = f"{r['peer_seconds'] * 1e6:>10.1f}{r['seconds'] * 1e6:>9.1f}{r['ratio']:>8.2f}"
        print(f"{r['transfer']:<26}{r['direction']:<9}{r['bytes']:>9}{figures}")
    return records


def run(quick: bool) -> None:
    """One of the ranks."""
    from hpctrain.comm import world

    comm = world.start().comm
    records = []
    for name, shape in TRANSFERS.items():
        records += measure(comm, name, shape, quick)
    if comm.rank == 0:
        print(json.dumps(records), flush=True)


def regions(name: str, shape: tuple[int, ...], ranks: int) -> tuple[Any, Any]:
    """Who has what, and who wants what."""
    from hpctrain.partition import Partition, split
    from hpctrain.regions import Cut, Distribution, Wanted

    if name.startswith("gather"):
        grid = Partition(channel=ranks)
        return Distribution(shape, (None, "channel"), grid), Distribution(shape, (None, None), grid)
    if name.startswith("batch"):
        return (
            Distribution(shape, ("batch", None), Partition(batch=ranks)),
            Distribution(shape, (None, "channel"), Partition(channel=ranks)),
        )
    grid = Partition(height=ranks)
    blocks = [split(shape[1], ranks, rank) for rank in range(ranks)]
    halo = Cut(("height",), tuple((start - 1, stop + 1) for start, stop in blocks))
    cuts = [Cut((), ((0, n),)) for n in shape]
    have = Distribution(shape, (None, "height", *[None] * (len(shape) - 2)), grid)
    return have, Wanted(grid, (cuts[0], halo, *cuts[2:]))


def measure(comm: Any, name: str, shape: tuple[int, ...], quick: bool) -> list[dict[str, Any]]:
    """Both directions by both ways."""
    from hpctrain.comm.exchange import Exchange, own_arrays
    from hpctrain.comm.neighbours import neighbours
    from hpctrain.partition import volume

    have, want = regions(name, shape, comm.size)
    dtype = np.dtype(np.float32)
    nbytes = 2 * sum(dtype.itemsize * volume(region.box(comm.rank)) + 64 for region in (have, want))
    near, by = neighbours(comm, [0] * comm.size, set(range(comm.size)), nbytes, 2)
    if near is None:
        raise RuntimeError(f"no shared memory: {by}")
    memory, at = near.memory, 0

    def zeros(extents: tuple[int, ...], kind: np.dtype) -> np.ndarray:
        nonlocal at
        size = int(np.prod(extents)) * kind.itemsize
        at, begin = at + -(-size // 64) * 64, at
        return memory[begin : begin + size].view(kind).reshape(extents)

    shared = Exchange(comm, have, want, own_arrays(have, want, comm.rank, dtype, True, zeros), tag=0, near=near)
    sent = Exchange(comm, have, want, own_arrays(have, want, comm.rank, dtype, True), tag=0)
    records = []
    for direction, ways in (("forward", (sent.fwd, shared.fwd)), ("backward", (sent.bwd, shared.bwd))):
        same(comm, ways)
        times = repetitions(comm, ways[0], 0.002 if quick else 0.02)
        peer, ours = turns(comm, ways, times, 3 if quick else 15)
        records.append(
            {
                "transfer": name,
                "direction": direction,
                "ranks": comm.size,
                "precision": "float32",
                "bytes": ways[0].bytes_per_transfer,
                "seconds": ours,
                "peer": "messages",
                "peer_seconds": peer,
                "ratio": peer / ours,
            }
        )
    shared.free()
    sent.free()
    near.free()
    return records


def same(comm: Any, ways: Any) -> None:
    """Raises RuntimeError where the two ways do not give the same bits."""
    values = np.random.default_rng(comm.rank).normal(size=ways[0].src.shape).astype(np.float32)
    found = []
    for way in ways:
        way.reserve()[...] = values
        found.append(way.run().copy())
    if not np.array_equal(*found):
        raise RuntimeError("messages and shared memory give different results")


def repetitions(comm: Any, way: Any, seconds: float) -> int:
    """How often `way` runs in so many seconds, about."""
    begin = perf_counter()
    for _ in range(5):
        way.src.fill(0)
        way.run()
    found: int = comm.bcast(max(3, int(seconds / (perf_counter() - begin) * 5)))
    return found


def turns(comm: Any, ways: Any, times: int, rounds: int) -> list[float]:
    """Seconds of a transfer by each way, the median over rounds in turn."""
    taken: list[list[float]] = [[] for _ in ways]
    for way in ways:
        way.src.fill(0)  # sums that go on and on would end in infinity
        way.dst.fill(0)
    for _ in range(rounds):
        for i, way in enumerate(ways):
            comm.Barrier()
            begin = perf_counter()
            for _ in range(times):
                way.run()
            taken[i].append((perf_counter() - begin) / times)
    return [median(found) for found in taken]


if __name__ == "__main__":
    main()
