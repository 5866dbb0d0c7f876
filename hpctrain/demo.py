"""`hpctrain demo`: from nothing to a network trained on a process grid of this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from hpctrain import launch
from hpctrain.comm.launchers import LOST_RANK, STOPPED, launched
from hpctrain.errors import LaunchError
from hpctrain.toml_text import dumps


@dataclass(frozen=True)
class Demo:
    """One demonstration: its data, its network, the grid axis that cuts a sample, and how it is trained."""

    about: str
    make: Callable[[Path, bool], object]
    """(folder, quick): writes folder/train and folder/test."""
    model: str
    axis: str
    batch: int
    epochs: int
    lr: float
    weight_decay: float


def _make_digits(folder: Path, quick: bool) -> object:
    from hpctrain.data.make.digits import make_digits

    return make_digits(folder)


def _make_volumes(folder: Path, quick: bool) -> object:
    from hpctrain.data.make.volumes import make_volumes

    return make_volumes(folder, size=16, train=32, test=16) if quick else make_volumes(folder)


DEMOS = {
    "digits": Demo("1797 handwritten digits", _make_digits, "lenet", "height", 16, 15, 0.01, 5e-3),
    "volumes": Demo("640 random volumes", _make_volumes, "cosmoflow", "depth", 16, 10, 0.001, 1e-3),
}


def run(name: str, folder: Path, ranks: int, epochs: int | None, quick: bool) -> int:
    """Make the data if it is not there, write FOLDER/NAME.toml, train on `ranks` ranks, and say what to try next.

    Returns the exit status of the training. Raises LaunchError without an mpirun, or inside an MPI job.
    """
    demo = DEMOS[name]
    if launched(os.environ):
        raise LaunchError(f"demo starts its own ranks, so run it without a launcher:\nhpctrain demo {name}")
    launch.find_mpirun()  # before time is spent on data
    data = folder / ("data-quick" if quick else "data")
    if not data.exists():
        print(f"writing {demo.about} to {data}", flush=True)
        _make(demo, data, quick)
    config, run_folder = folder / f"{name}.toml", _unused(folder)
    config.write_text(_toml(demo, data, run_folder, ranks, epochs or (1 if quick else demo.epochs)), encoding="utf-8")
    print(f"training on {ranks} ranks with {config}; Ctrl-C: checkpoint and stop\n", flush=True)
    status = launch.spawn(ranks, [*launch.module(), "train", str(config)])
    if status == 0:
        print(_what_next(config, data, run_folder, ranks))
    elif status in (LOST_RANK, STOPPED):
        what = "stopped" if status == STOPPED else "error: a rank died, or was waited for too long"
        resume = launch.command_line(ranks, ["train", "--resume", str(run_folder)])
        print(f"hpctrain: {what}; to go on from the last checkpoint:\n{resume}", file=sys.stderr)
    return status


def _make(demo: Demo, data: Path, quick: bool) -> None:
    """Data that is there is whole: it is made under another name first."""
    partial = data.with_name(f"{data.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    demo.make(partial, quick)
    partial.rename(data)


def _unused(folder: Path) -> Path:
    return next(run for n in count(1) if not (run := folder / f"run-{n}").exists())


def _grid(demo: Demo, ranks: int) -> dict[str, int]:
    """Half of the ranks cut the batch, pairs of them each sample; an odd number cuts the batch only."""
    return {"batch": ranks // 2, demo.axis: 2} if ranks % 2 == 0 else {"batch": ranks}


def _toml(demo: Demo, data: Path, run_folder: Path, ranks: int, epochs: int) -> str:
    # a schedule that does not depend on when training ends, so that the run can be resumed for longer
    schedule = {"name": "step", "milestones": [max(1, epochs * 2 // 3)]}
    return dumps(
        {
            "model": {"name": demo.model},
            "data": {"train": str(data / "train"), "test": str(data / "test")},
            "plan": {"grid": _grid(demo, ranks)},
            "optim": {"lr": demo.lr, "momentum": 0.9, "weight_decay": demo.weight_decay, "schedule": schedule},
            "train": {"epochs": epochs, "batch": demo.batch, "seed": 1},
            "run": {"folder": str(run_folder)},
        }
    )


def _what_next(config: Path, data: Path, run_folder: Path, ranks: int) -> str:
    line = launch.command_line
    other = ["train", str(config), f"plan.grid={{batch={ranks}}}", f"run.folder={run_folder}-batch{ranks}"]
    return f"""
{run_folder} has the config, plan, metrics and checkpoints. What to try next:

# train on, from the last checkpoint
{line(ranks, ["train", "--resume", str(run_folder), "train.epochs=20"])}

# the same on another grid
{line(ranks, other)}

# what the data looks like
{line(1, ["data", "inspect", str(data / "train")])}"""
