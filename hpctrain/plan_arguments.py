"""The words of `hpctrain plan`: its grammar, apart from what it does, so that `--help` is instant."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

AUTO = "auto"


def add(sub: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    sub.add_argument("words", nargs="*", metavar="CONFIG.toml section.key=value", help="the config, and changes to it")
    sub.add_argument(
        "--machine", metavar="NAME", help="a machine that comes with the program, or a file (default: this one)"
    )
    sub.add_argument("--ranks", type=_ranks, metavar="N|auto", help="on how many ranks (default: auto, what is best)")
    sub.add_argument("--batch", type=_count, metavar="B", help="samples of a step, instead of train.batch")
    sub.add_argument("--sweep", type=_range, metavar="A..B", help="how a step scales with the number of ranks")
    sub.add_argument(
        "--objective", choices=("time", "energy", "cost"), help="what the best number of ranks has least of, per sample"
    )
    sub.add_argument("--memory", type=_gib, metavar="GIB", help="of a rank, instead of what the machine's file says")
    sub.add_argument("--grids", choices=("all",), help="list every Pr x Pc that is the same for all layers, instead")
    sub.add_argument("--per", choices=("step", "epoch"), default="step", help="records: seconds of what")
    sub.add_argument(
        "--accounting",
        choices=("model", "paper"),
        default="model",
        help="--grids: this program's, or arXiv 1712.04432's",
    )
    sub.add_argument("--trace", type=Path, metavar="FILE.json", help="simulate a step, for ui.perfetto.dev")
    sub.add_argument("--plot", type=Path, metavar="FILE.png|svg", help="draw how a step scales with ranks")
    sub.add_argument("--all", action="store_true", help="a line for every layer of a large network")
    sub.add_argument("-o", "--out", type=Path, metavar="PLAN.json", help="write the plan, for plan.grid")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, not {text!r}")
    return int(text)


def _ranks(text: str) -> int | str:
    if text == AUTO:
        return AUTO
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, or auto, not {text!r}")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected FEWEST..MOST ranks, such as 1..64, not {text!r}")
    return int(found[1]), int(found[2])


def _gib(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected GiB, a number above 0, not {text!r}")
    return found
