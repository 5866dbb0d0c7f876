"""What a run leaves behind beside metrics and checkpoints: its resolved config, plan and environment."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import xxhash

from hpctrain import environment
from hpctrain.comm.world import World
from hpctrain.config import Config
from hpctrain.config_file import to_toml
from hpctrain.errors import CheckpointError, ConfigError
from hpctrain.planner.plan import Plan


def refuse_used(folder: Path) -> None:
    """Raises CheckpointError where `folder` already holds checkpoints: a new run would mix with the old one."""
    if any((folder / "checkpoints").glob("step-*")):
        raise CheckpointError(
            f"{folder}: holds checkpoints of an earlier run; continue it with --resume {folder}, "
            "or give run.folder another name"
        )


def write(folder: Path, config: Config, plan: Plan, world: World) -> None:
    """Create the run folder with config.toml, plan.json and environment.json. Raises ConfigError where it cannot."""
    about = {
        "versions": environment.versions(),
        "machine": environment.machine(),
        "mpi": world.library,
        "launcher": world.launcher,
        "ranks": world.size,
        "ranks_on_first_node": world.node_size,
    }
    texts = {
        "config.toml": to_toml(config),
        "plan.json": plan.to_json(),
        "environment.json": json.dumps(about, indent=2) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.folder = {str(folder)!r}: cannot be written: {error}") from None


def ranks(folder: Path) -> int | None:
    """On how many ranks the run in `folder` last began; None where that is not to be found."""
    try:
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))["ranks"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def digest(ids: np.ndarray) -> str:
    """16 hex digits that stand for a sequence of sample ids in metrics.jsonl."""
    return xxhash.xxh3_64_hexdigest(ids.astype(np.int64).tobytes())
