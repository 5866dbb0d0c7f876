"""How long a training step takes: hpctrain and PyTorch on the same networks, batches and weights, in turn.

python benchmarks/train_step.py [--networks resnet18,lenet] [--threads 2] [--precision bf16] [--profile] [--quick]
"""

from __future__ import annotations

import argparse
from typing import Any

from common import FmaPeak, Seconds, Worker, interleave, mib, print_json, set_threads, warn_of_load
from networks import CASES, FORMATS

AGREEMENT = {"float32": {"prediction": 1e-4, "gradient": 5e-2}, "bf16": {"prediction": 0.1, "gradient": 0.5}}
"""Largest |ours - theirs| / |theirs|. float32 gives about 1e-6 a layer; gradients differ by more where a rectified or
pooled value is so close to a tie that the sides decide it differently: from its own gradients in float64 those of
ResNet-18 differ in PyTorch by 3e-3 in one memory format and 1e-2 in the other. bf16 rounds each tensor to 2**-9, and
decides more ties otherwise. Another network differs by order 1."""

TURN = 0.2
"""Seconds that a side computes at least, before it is another one's turn."""

SMALL = 0.005
"""Share of the time below which a layer is not shown by itself."""

HEAD = f"{'network':<16}{'nchw':>9}{'ch.last':>9}{'hpctrain':>9}{'ratio':>7}{'target':>7}{'MiB':>7}{'torch':>7}{'':>8}"


def main() -> None:
    """Measure the networks that are asked for, and print."""
    asked = arguments()
    set_threads(asked.threads)
    warn_of_load()
    peak = FmaPeak()
    clock = "CPU time" if asked.threads == 1 else "wall time"
    print(f"seconds per step ({clock}, median of {rounds(asked.quick)}), {asked.threads} threads, {asked.precision}")
    print("MiB: the peak of memory above that of the imported libraries")
    print(HEAD)
    records: list[dict[str, Any]] = []
    for name in asked.networks:
        found = measure(name, asked, peak)
        records += found
        line(found[0])
    if asked.profile:
        for name in asked.networks:
            profile([r for r in records if r["network"] == name and "layer" in r], name)
    print(f"FMA peak of a core: {peak.measure() / 1e9:.1f} GFLOP/s")
    if asked.json:
        print_json("benchmarks/train_step.py", records, fma_peak=peak.measure())


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(CASES), help="some of %(default)s")
    parser.add_argument("--threads", type=int, default=1, help="of each side (default: 1)")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--profile", action="store_true", help="also time every layer of ours")
    parser.add_argument("--quick", action="store_true", help="a quarter of the batch, few rounds: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    asked = parser.parse_args()
    asked.networks = asked.networks.split(",")
    if unknown := set(asked.networks) - CASES.keys():
        parser.error(f"--networks {','.join(unknown)}: choose among {','.join(CASES)}")
    return asked


def rounds(quick: bool) -> int:
    """How often each side is timed."""
    return 3 if quick else 7


def measure(name: str, asked: argparse.Namespace, peak: FmaPeak) -> list[dict[str, Any]]:
    """The record of a network, and with --profile one of each of its layers' passes."""
    case = CASES[name]
    batch = max(1, case.batch // 4) if asked.quick else case.batch
    own = Worker("ours:Side", name, batch, asked.precision)
    formats = FORMATS if asked.precision == "float32" else FORMATS[1:]  # bf16: as PyTorch advises
    others = {f: Worker("peers:Side", name, batch, f, asked.threads, asked.precision) for f in formats}
    try:
        agreement = agree(name, own, others, AGREEMENT[asked.precision])
        sides = {"hpctrain": own} | others
        for side in sides.values():
            side.call("reset_memory")
            side.call("step")
        # turns of a few steps where one is short: else it would be spent on waking up
        turn = max(1, min(100, int(TURN / max(side.call("step").cpu for side in sides.values()))))
        peak.measure()
        steps = {n: lambda s=side: s.call("step", turn) for n, side in sides.items()}
        times = interleave(steps, rounds(asked.quick))
        peak.measure()
        memory = {n: side.call("memory") for n, side in sides.items()}
        record = compare(times, memory, asked.threads) | agreement
        about = {"network": name, "batch": batch, "threads": asked.threads, "precision": asked.precision}
        target = case.target if asked.precision == "float32" else case.bf16_target
        records = [about | record | {"title": case.title, "target": target, "fma_peak": peak.measure()}]
        if asked.profile:
            own.call("time_layers")
            for _ in range(rounds(asked.quick)):
                own.call("step")
            layers = own.call("layers")
            for layer in layers:
                rate = None if layer["flops"] is None else layer["flops"] / layer["seconds"]
                fraction = None if rate is None else rate / peak.measure() / asked.threads
                records.append(about | layer | {"peak_fraction": fraction})
        return records
    finally:
        for side in (own, *others.values()):
            side.stop()


def agree(name: str, own: Worker, others: dict[str, Worker], allowed: dict[str, float]) -> dict[str, float]:
    """Give the peers our weights; the largest differences of what all compute. Raises RuntimeError on too much."""
    weights = own.call("weights")
    expected = own.call("first_gradients")
    worst = {"prediction_difference": 0.0, "gradient_difference": 0.0}
    for memory_format, other in others.items():
        other.call("load", weights)
        for what, difference in other.call("differences", expected).items():
            kind = "prediction" if what in ("predictions", "loss") else "gradient"
            if not difference <= allowed[kind]:
                raise RuntimeError(
                    f"{name}, {memory_format}: {what} differ by {difference:.1e}, at most {allowed[kind]:.0e}"
                )
            worst[f"{kind}_difference"] = max(worst[f"{kind}_difference"], difference)
    return worst


def compare(times: dict[str, Seconds], memory: dict[str, tuple[int, int]], threads: int) -> dict[str, Any]:
    """Ours against the better of the peers, by CPU time, or by wall time where threads share the work."""
    seconds = {name: t.cpu if threads == 1 else t.wall for name, t in times.items()}
    best = min((name for name in times if name != "hpctrain"), key=seconds.__getitem__)
    over = {name: most - start for name, (most, start) in memory.items()}
    return {
        "seconds": seconds["hpctrain"],
        "peer": f"torch {best}",
        "peer_seconds": seconds[best],
        "ratio": seconds[best] / seconds["hpctrain"],
        **{f"{name}_cpu_seconds": t.cpu for name, t in times.items()},
        **{f"{name}_wall_seconds": t.wall for name, t in times.items()},
        "peak_bytes": memory["hpctrain"][0],
        "peer_peak_bytes": memory[best][0],
        "step_bytes": over["hpctrain"],
        "peer_step_bytes": over[best],
    }


def line(found: dict[str, Any]) -> None:
    """A row of the table."""
    which, target = "cpu" if found["threads"] == 1 else "wall", found["target"]
    nchw, last = (f"{s:.4f}" if (s := found.get(f"{f}_{which}_seconds")) else "-" for f in FORMATS)
    verdict = "missed" if target and found["ratio"] < target else ""
    print(
        f"{found['title']:<16}{nchw:>9}{last:>9}{found['seconds']:>9.4f}{found['ratio']:>7.2f}{target or '-':>7}"
        f"{mib(found['step_bytes']):>7}{mib(found['peer_step_bytes']):>7}{verdict:>8}",
        flush=True,
    )


def profile(found: list[dict[str, Any]], name: str) -> None:
    """Layers of ours, the slowest first, and what fraction of the FMA peak their nominal operations are."""
    total = sum(r["seconds"] for r in found)
    print(f"\n{CASES[name].title}: {total:.4f} s in layers")
    print(f"{'layer':<32}{'pass':<10}{'seconds':>10}{'share':>8}{'of peak':>9}")
    small = sum(r["seconds"] for r in found if r["seconds"] < SMALL * total)
    for r in sorted((r for r in found if r["seconds"] >= SMALL * total), key=lambda r: -r["seconds"]):
        fraction = "" if r["peak_fraction"] is None else f"{r['peak_fraction']:.2f}"
        print(f"{r['layer']:<32}{r['way']:<10}{r['seconds']:>10.5f}{r['seconds'] / total:>8.1%}{fraction:>9}")
    print(f"{'the others':<42}{small:>10.5f}{small / total:>8.1%}")


if __name__ == "__main__":
    main()
