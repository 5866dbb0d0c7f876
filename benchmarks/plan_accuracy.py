"""How near the planner's prices are: predicted and measured steps of several plans, calibrated in the same run.

python benchmarks/plan_accuracy.py [--quick] [--json] [--networks resnet18,vgg11]

On 1 and on 2 ranks, rehearsals of layers, which `hpctrain calibrate` makes, and steps of all plans take turns; then
each plan is priced by what was measured, and the plan that the planner finds is among those that are timed. On 3 to 6
ranks, more than there are cores, only the bytes are compared, exactly. Needs two idle cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from common import print_json, set_threads, warn_of_load
from planned import NETWORKS, ROLES

MEAN, WORST, BEST = 0.08, 0.20, 0.05
"""Largest errors of a step's time: mean and worst; and how much slower than the best plan the planner's may be."""

QUICK = ("vgg11", "cosmoflow")

MORE = (3, 4, 5, 6)
"""Ranks of which the bytes are compared."""


def main() -> None:
    """Run what is asked for: all, or as one of the ranks that this script starts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", help=f"some of {','.join(NETWORKS)} (default: all, or two in a hurry)")
    parser.add_argument("--quick", action="store_true", help="small batches, few rounds: to see that it runs")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    names = asked.networks.split(",") if asked.networks else list(QUICK if asked.quick else NETWORKS)
    if unknown := set(names) - NETWORKS.keys():
        parser.error(f"--networks {','.join(unknown)}: choose among {','.join(NETWORKS)}")
    if asked.role:
        ROLES[asked.role](names, asked.quick, asked.out)
        return
    set_threads(1)
    warn_of_load()
    timed = [record for ranks in (1, 2) for record in launch("time", ranks, names, asked.quick)]
    show(timed)
    counted = [record for ranks in MORE for record in launch("count", ranks, names, asked.quick)]
    wrong = [r for r in (*timed, *counted) if r["bytes"] != r["predicted_bytes"]]
    print(f"\nbytes of {len(timed) + len(counted)} plans on 1 to {MORE[-1]} ranks: {len(wrong)} differ")
    for r in wrong:
        print(f"  {r['network']} {r['plan']} on {r['ranks']}: {r['bytes']:,}, predicted {r['predicted_bytes']:,}")
    if asked.json:
        print_json("benchmarks/plan_accuracy.py", timed + counted)
    sys.exit(bool(wrong))


def launch(role: str, ranks: int, networks: Sequence[str], quick: bool) -> list[dict[str, Any]]:
    """The records of a job on so many ranks."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "records.json")
        more = ["--quick"] if quick else []
        program = [sys.executable, __file__, "--role", role, "--networks", ",".join(networks), "--out", out, *more]
        subprocess.run(["mpirun", "-n", str(ranks), *program], check=True)
        found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


def show(records: Sequence[dict[str, Any]]) -> None:
    """The table of all plans, and whether targets are met."""
    phases = ("compute", "exchange", "allreduce", "update")
    print("seconds of a step, measured (median) / predicted; exchange is halo and redistribution")
    print(f"{'network, ranks, plan':<44}{'step':>15}{'error':>8}" + "".join(f"{phase:>17}" for phase in phases))
    for r in records:
        title = f"{r['network']} {r['ranks']} {r['plan']}{' *' if r['chosen'] else ''}"
        parts = "".join(f"{r[f'{p}_seconds']:>9.4f} /{r[f'predicted_{p}_seconds']:>6.4f}" for p in phases)
        print(f"{title:<44}{r['seconds']:>7.4f} /{r['predicted_seconds']:>6.4f}{100 * r['error']:>+7.1f}%{parts}")
    errors = [abs(r["error"]) for r in records]
    print(f"\nerror of {len(errors)} plans: mean {verdict(mean(errors), MEAN)}, worst {verdict(max(errors), WORST)}")
    print("* what the planner finds, beside the best plan that was measured")
    for network in dict.fromkeys(r["network"] for r in records):
        here = [r for r in records if r["network"] == network and r["ranks"] > 1]
        best, found = min(here, key=lambda r: r["seconds"]), next((r for r in here if r["chosen"]), None)
        if found is not None:
            behind = found["seconds"] / best["seconds"] - 1
            print(f"  {network:<12}{found['plan']:<24} {verdict(behind, BEST)} slower than {best['plan']}")


def verdict(share: float, target: float) -> str:
    """A share in percent, and whether it is at most the target."""
    return f"{100 * share:.1f} % (target {100 * target:.0f}{'' if share <= target else ', missed'})"


if __name__ == "__main__":
    main()
