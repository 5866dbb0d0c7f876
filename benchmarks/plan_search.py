"""How long the search for a plan takes: ResNet-50 and Inception-v3 on 64 and 4096 ranks, VGG-16 on 4, on one core.

Every search runs in a process of its own, whose imports and network are made before; CPU time counts, where other
programs share the cores.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from common import Worker, medians, print_json, set_threads, timed, warn_of_load

from hpctrain import machine, models
from hpctrain.models import Sample
from hpctrain.planner.search import Found, search
from hpctrain.planner.setting import Setting


class Case(NamedTuple):
    """A search, and how many seconds it may take; without a target, it is only shown."""

    network: str
    ranks: int
    machine: str
    fewer: Any = "head"
    target: float | None = None
    per_rank: int = 32

    @property
    def image(self) -> Sample:
        """Of the size that the network was published for."""
        side = 299 if self.network == "inception3" else 224
        return Sample((side, side, 3), classes=1000)


CASES = (
    Case("vgg16", 4, "p100-cluster", target=0.1),
    Case("resnet50", 64, "perlmutter-gpu", target=1.0),
    Case("inception3", 64, "perlmutter-gpu", target=1.0),
    Case("resnet50", 4096, "perlmutter-gpu", target=10.0),
    Case("inception3", 4096, "perlmutter-gpu", target=10.0),
    Case("resnet50", 64, "perlmutter-gpu", "all"),
    Case("inception3", 64, "perlmutter-gpu", "all"),
    Case("resnet50", 512, "perlmutter-gpu", "all"),
)


@dataclass
class Row:
    """A case, and what came out."""

    network: str
    ranks: int
    fewer: str
    target: float | None
    cpu: float
    wall: float
    candidates: int
    rounds: int
    gap: float


class Side:
    """Searches once."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.graph = models.build(case.network, case.per_rank * case.ranks, case.image, {})
        self.setting = Setting(machine.named(case.machine), fewer=case.fewer)

    def run(self) -> tuple[Any, int, int, float]:
        """Seconds, candidates, rounds and the gap."""
        found: list[Found] = []
        seconds = timed(lambda: found.append(search(self.graph, self.setting, self.case.ranks, deadline=600.0)), 1)
        return seconds, found[0].candidates, found[0].rounds, found[0].gap


def measure(case: Case, rounds: int) -> Row:
    """The median of so many searches."""
    taken = []
    for _ in range(rounds):
        worker = Worker("plan_search:Side", case)
        seconds, candidates, passes, gap = worker.call("run")
        worker.stop()
        taken.append(seconds)
    cpu, wall = medians(taken)
    return Row(case.network, case.ranks, case.fewer, case.target, cpu, wall, candidates, passes, gap)


def main() -> int:
    """Prints a row for each case; 1 where one takes longer than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one object as the last line")
    parser.add_argument(
        "--quick", action="store_true", help="once, and only those with up to 64 ranks that have a target"
    )
    parser.add_argument("--rounds", type=int, default=5, help="searches of each case (5)")
    options = parser.parse_args()
    warn_of_load()
    set_threads(1)
    cases = [case for case in CASES if not options.quick or (case.target and case.ranks <= 64)]
    heads = f"{'network':12}{'ranks':>6}  fewer{'CPU s':>9}{'wall s':>9}{'target':>8}"
    print(f"{heads}{'partitions':>12}{'rounds':>8}{'gap':>9}")
    rows = []
    for case in cases:
        row = measure(case, 1 if options.quick or not case.target else options.rounds)
        target = "-" if row.target is None else f"{row.target:g}"
        print(
            f"{row.network:12}{row.ranks:>6}  {row.fewer:5}{row.cpu:>9.3f}{row.wall:>9.3f}{target:>8}"
            f"{row.candidates:>12}{row.rounds:>8}{row.gap:>9.2%}",
            flush=True,
        )
        rows.append(row)
    slow = [row for row in rows if row.target is not None and row.cpu > row.target]
    print("all within their targets" if not slow else f"{len(slow)} of {len(rows)} take longer than they should")
    if options.json:
        print_json("plan_search", [asdict(row) for row in rows])
    return 1 if slow and not options.quick else 0


if __name__ == "__main__":
    sys.exit(main())
