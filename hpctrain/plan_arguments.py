"""The words of `hpctrain plan`, apart from what it does: `--help` is instant."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, fields
from pathlib import Path

from hpctrain.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """What the command line asks for besides the config; None leaves it to the config, the machine or the search."""

    machine: str | None = None
    ranks: int | None = None
    batch: int | None = None
    sweep: tuple[int, int] | None = None
    """The fewest and the most ranks."""
    objective: str | None = None
    memory: float | None = None
    """GiB."""
    grids: str | None = None
    per: str = "step"
    accounting: str = "model"
    trace: Path | None = None
    plot: Path | None = None
    every: bool = False
    """A line for every layer."""
    out: Path | None = None
    json: bool = False

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Those of a command line. Raises ConfigError where two do not go together, or a folder is not there."""
        found = cls(**{field.name: getattr(args, field.name) for field in fields(cls)})
        found._check_grids()
        if found.plot is not None and found.ranks is not None and found.sweep is None:
            raise ConfigError("--plot draws how a step scales with ranks: give --sweep 1..N too, or leave out --ranks")
        for name, path in (("--trace", found.trace), ("--plot", found.plot), ("--out", found.out)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"{name} {path}: there is no folder {path.absolute().parent}; make it first")
        return found

    def _check_grids(self) -> None:
        if self.grids is None:
            if self.accounting == "paper":
                raise ConfigError("--accounting paper is for grids: give --grids all too")
            return
        others = {"--sweep": self.sweep, "--trace": self.trace, "--plot": self.plot, "--out": self.out}
        for name, given in others.items():
            if given is not None:
                raise ConfigError(f"{name} has no effect with --grids, which lists grids; leave one of them out")
        if self.ranks is None:
            raise ConfigError("--grids all: of how many ranks? give --ranks N")


def add(sub: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    sub.add_argument("words", nargs="*", metavar="CONFIG.toml section.key=value", help="the config, and changes to it")
    sub.add_argument("--machine", metavar="NAME", help="one that comes with the program, or a file (default: this one)")
    sub.add_argument(
        "--ranks", type=_ranks, metavar="N|auto", help="on how many ranks (default: auto, the best number)"
    )
    sub.add_argument("--batch", type=_count, metavar="B", help="samples of a step, instead of train.batch")
    sub.add_argument("--sweep", type=_range, metavar="A..B", help="also how a step scales, from A to B ranks")
    objectives = ("time", "energy", "cost")
    sub.add_argument("--objective", choices=objectives, help="most samples per second, per joule, or per price")
    sub.add_argument("--memory", type=_gib, metavar="GIB", help="of a rank, instead of what the machine's file says")
    sub.add_argument("--grids", choices=("all",), help="instead, every Pr x Pc that is the same for all layers")
    sub.add_argument("--per", choices=("step", "epoch"), default="step", help="seconds of grids and records")
    kinds = ("model", "paper")
    sub.add_argument("--accounting", choices=kinds, default="model", help="of grids: ours, or that of arXiv 1712.04432")
    sub.add_argument("--trace", type=Path, metavar="FILE.json", help="simulate a step, to be seen at ui.perfetto.dev")
    sub.add_argument("--plot", type=Path, metavar="FILE.png|svg", help="draw how a step scales")
    sub.add_argument("--all", action="store_true", dest="every", help="a line for every layer of a large network")
    sub.add_argument("-o", "--out", type=Path, metavar="PLAN.json", help="write the plan, for plan.grid")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, not {text!r}")
    return int(text)


def _ranks(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number, at least 1, or auto, not {text!r}")
    return int(text)


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise argparse.ArgumentTypeError(f"expected FEWEST..MOST ranks, 1..64 for instance, not {text!r}")
    return int(found[1]), int(found[2])


def _gib(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"expected GiB, a number above 0, not {text!r}")
    return found
