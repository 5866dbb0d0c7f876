"""What the program is for: a volume network that is too large for one process trains when it is cut."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import launching
import pytest
import runs

from hpctrain.data.make.volumes import make_volumes

MIB = 2**20
LIMIT = 256 * MIB
"""Of each process: Python, MPI and libraries take 115 MiB, the network 310 on one rank and about a third of it on
each of four."""

CONFIG = """
[model]
name = "cosmoflow"
options = {{ filters = 32 }}
[data]
train = "{data}/train"
[plan]
grid = {{ depth = {ranks} }}
[optim]
lr = 1e-4
[train]
epochs = 1
batch = 2
backend = "native"
[run]
folder = "{folder}"
"""


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four volumes of 64 x 64 x 64."""
    folder = tmp_path_factory.mktemp("volumes")
    make_volumes(folder, 64, 4, 2, seed=0)
    return folder


def train(ranks: int, volumes: Path, folder: Path) -> launching.Finished:
    """Train on `depth=ranks`, each rank within LIMIT."""
    config = folder / "run.toml"
    config.write_text(CONFIG.format(data=volumes, ranks=ranks, folder=folder / "run"))
    limited = ["bash", "-c", f'ulimit -d {LIMIT // 1024}; exec "$@"', "_", sys.executable]
    return launching.run([*launching.mpirun(ranks), *limited, "-m", "hpctrain", "train", config, "--json"], timeout=80)


def test_one_rank_has_not_the_memory_and_says_so(volumes: Path, tmp_path: Path) -> None:
    ended = train(1, volumes, tmp_path)
    print(ended.stderr)
    assert ended.status == 2
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("hpctrain: error: ") == 1
    assert f"out of memory, within ulimit -d {LIMIT // 1024}" in ended.stderr
    need = re.search(r"by the plan rank 0 needs most, (\d+) MiB \(tensors \d+ MiB", ended.stderr)
    assert need is not None
    assert int(need.group(1)) * MIB > LIMIT
    assert "larger plan.grid" in ended.stderr


def test_four_ranks_train_it_in_the_memory_that_the_plan_says(volumes: Path, tmp_path: Path) -> None:
    ended = train(4, volumes, tmp_path)
    print(ended.stdout)
    assert ended.status == 0, ended.stderr
    losses = [record["loss"] for record in runs.records(tmp_path / "run", "step")]
    assert len(losses) == 2
    assert all(0 < loss < 1e3 for loss in losses)
    ranks = runs.records(tmp_path / "run", "memory")
    assert [record["rank"] for record in ranks] == [0, 1, 2, 3]
    for r in ranks:
        used = r["peak_memory_bytes"] - r["start_memory_bytes"]
        # beyond the plan: the batch that is read, MPI's buffers, and Python's garbage
        assert 0.8 * r["predicted_memory_bytes"] < used < r["predicted_memory_bytes"] + 32 * MIB
        assert r["peak_memory_bytes"] < LIMIT
        need = -(-r["predicted_memory_bytes"] // MIB)
        assert re.search(rf"rank {r['rank']}: \d+ MiB; \d+ MiB at the start, {need} MiB by the plan", ended.stdout)
    last = json.loads(ended.stdout.splitlines()[-1])["results"][-1]
    assert last["peak_memory_bytes"] == max(r["peak_memory_bytes"] for r in ranks)
