"""What a run says of itself: at its head how it is cut and what it needs, and where it stopped."""

from __future__ import annotations

from pathlib import Path

from hpctrain import launch, reckoning
from hpctrain.comm.replicas import Replicas
from hpctrain.comm.world import STOPPED, World
from hpctrain.config import Config
from hpctrain.console import Console, wrapped
from hpctrain.optim import schedule
from hpctrain.planner.plan import Plan
from hpctrain.reckoning import Forecast, Steps
from hpctrain.usage import Usage


def run(
    console: Console, world: World, config: Config, replicas: Replicas, plan: Plan, backend: str, usage: Usage
) -> None:
    """Ranks, plan, backend and memory. Called by all ranks, as each may warn."""
    grid = config.plan.grid
    what = f"plan {grid}" if isinstance(grid, str) else f"grid {grid.partition}"
    ranks = f"{world.size} ranks of {world.threads} thread{'s' * (world.threads != 1)}"
    copies = f"{replicas.count} replicas ({config.sync.strategy}), " if replicas.count > 1 else ""
    summed = f", {plan.allreduce} allreduce" if isinstance(plan.allreduce, str) else ""
    console.note(wrapped(f"{ranks}, {copies}{what}{summed}; {backend}"))
    if rate := schedule.describe(config.optim, config.train.batch):
        console.note(wrapped(rate))
    console.note(usage.heading())
    if short := usage.warning():
        console.warn(short)
    if plan.ranks < replicas.inside.size and world.rank == 0:
        console.warn(f"the plan uses {plan.ranks} of {world.size} ranks; the others idle")
    for line in plan.notes:
        console.note(wrapped(line))


def steps(console: Console, world: World, folder: Path, found: Steps, forecast: Forecast | None) -> None:
    """What a step took, beside what it should have taken, and how to know that better."""
    lines = reckoning.table(found, world.size, forecast)
    if forecast is None or forecast.guess:
        line = launch.command_line(world.size, ["calibrate", str(folder / "config.toml")])
        lines.append(f"for a prediction, measure the layers of this network on this machine:\n{line}")
    console.note("\n".join(lines))


def stopped(console: Console, world: World, folder: Path, step: int) -> None:
    """That the run stopped after `step`, and how to go on."""
    if world.rank == 0:
        line = launch.command_line(world.size, ["train", "--resume", str(folder)])
        console.note(
            f"stopped on request after step {step} with status {STOPPED}; a complaint of the launcher "
            f"about that is expected. To go on:\n{line}"
        )
