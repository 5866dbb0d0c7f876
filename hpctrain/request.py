"""What the words of `hpctrain train` and `verify` ask for, and whether enough ranks were started for it."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hpctrain.errors import CheckpointError, ConfigError, LaunchError

if TYPE_CHECKING:
    from hpctrain.config import Config


class RunRequest:
    """A config file or a run folder, and overrides. Raises ConfigError where the words name none, or two."""

    def __init__(self, args: argparse.Namespace) -> None:
        words, command = list(args.words), args.command
        self.words = [command, *words]
        """The command line without its options, but for --resume."""
        if args.resume is not None:
            self.words += ["--resume", args.resume] if args.resume else ["--resume"]
        # `--resume` takes the next word, which may have been meant as the config or an override.
        if args.resume and not os.path.isdir(args.resume) and (args.resume.endswith(".toml") or "=" in args.resume):
            words.insert(0, args.resume)
            args.resume = ""
        self.overrides = [word for word in words if "=" in word and not os.path.exists(word)]
        files = [word for word in words if word not in self.overrides]
        if len(files) > 1:
            raise ConfigError(
                f"{command}: one config at a time, not {' '.join(files)}; an override is section.key=value"
            )
        self.resuming = args.resume is not None
        self.run = Path(args.resume) if args.resume else None
        if files:
            self.path = Path(files[0])
        elif self.run:  # which then goes on in its own folder, wherever that is by now
            self.path = self.run / "config.toml"
            self.overrides.insert(0, f"run.folder={json.dumps(str(self.run))}")
        else:
            or_resume = ", or --resume RUN to continue one" if command == "train" else ""
            raise ConfigError(f"{command}: which run? give CONFIG.toml{or_resume}")

    def load(self) -> Config:
        """The config: that of CONFIG, or of the run folder to resume. Raises ConfigError or CheckpointError."""
        from hpctrain import config_file

        if self.run and self.path.parent == self.run and not self.path.is_file():
            raise CheckpointError(f"{self.run}: not a run folder, it has no config.toml; {_runs_near(self.run)}")
        return config_file.load(self.path, self.overrides)

    def resume(self, config: Config) -> Path | None:
        """The run folder to continue, or None to start anew."""
        if not self.resuming:
            return None
        return self.run or Path(config.run.folder)


def _runs_near(folder: Path) -> str:
    found = sorted(path.parent for path in folder.parent.glob("*/config.toml"))
    return f"there are {', '.join(map(str, found[-4:]))}" if found else "give the folder that the run named at its end"


def grid_override(text: str) -> str:
    """The override of plan.grid for what stands after --grid: `axis=blocks,...`. Raises ConfigError on another form."""
    pairs = [re.fullmatch(r"\s*([A-Za-z_]+)\s*=\s*([0-9]+)\s*", part) for part in text.split(",")]
    parts = {pair[1]: int(pair[2]) for pair in pairs if pair}
    if len(parts) < len(pairs):
        raise ConfigError(f"--grid {text}: give axis=blocks, e.g. depth=2,height=2")
    return f"plan.grid={{{', '.join(f'{axis}={blocks}' for axis, blocks in parts.items())}}}"


def require_ranks(config: Config, size: int) -> None:
    """Raises LaunchError, with the line to paste, where the plan of `config` is for more than `size` ranks.

    A plan that no number of ranks could run is refused as such: raises what `prepare` raises.
    """
    from hpctrain import launch, prepare
    from hpctrain.config import AUTO

    grid, asked = config.plan.grid, prepare.asked_ranks(config)
    copies = prepare.replicas(config, size)
    if copies * asked <= size:
        return
    # Small layers may get less of a grid than was asked for. That takes the network, so it is found out only here.
    data, _ = prepare.open_datasets(config)
    alone = prepare.of_replica(config, copies)
    each = 1 if grid == AUTO else prepare.make_plan(alone, prepare.build_graph(alone, data)).ranks
    ranks = copies * each
    if ranks <= size:
        return
    what = f"plan.grid: {grid}" if grid == AUTO else grid if isinstance(grid, str) else f"plan.grid: {grid.partition}"
    fitted = ", coarsened to fit the network," if each < asked else ""
    fitted += f" for {copies} replicas" if copies > 1 else ""
    there = f"{size} were started" if launch.under_launcher() else "no launcher started this process"
    line = launch.command_line(ranks, sys.argv[1:])
    raise LaunchError(f"{what}{fitted} needs {ranks} ranks, but {there}; give a smaller grid, or:\n{line}")
