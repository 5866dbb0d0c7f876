"""The rules that keep the program changeable: who imports whom, which library is used where, and how long a file is."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "hpctrain"

LEVELS = {
    0: (
        *(
            "partition",
            "precision",
            "regions",
            "errors",
            "config",
            "config_file",
            "toml_text",
            "toml_errors",
            "randomness",
            "environment",
        ),
        *("durable", "memory", "machine"),
    ),
    1: ("comm", "backends"),
    2: ("layers", "optim"),
    3: ("graph", "models", "importers"),
    4: ("planner",),
    5: ("binding", "executor", "gradients", "parameters", "sync", "data", "checkpoint", "metrics"),
    6: (
        "trainer",
        "announce",
        "together",
        "feed",
        "verdict",
        "verify",
        "prepare",
        "runfolder",
        "saving",
        "summation",
        "console",
        "launch",
        "usage",
        "starting",
        "automatic",
        "reckoning",
        "planning",
    ),
    7: (
        *("cli", "request", "report", "demo", "doctor", "dryrun", "bench", "calibration", "__main__"),
        *("plan_command", "plan_arguments"),
    ),
}
"""Top-level modules and packages of hpctrain; a module may import those of its own level and of lower ones."""

LEVEL = {name: level for level, names in LEVELS.items() for name in names}

ONLY_IN = {
    "mpi4py": ("comm/",),
    "h5py": ("data/",),
    "cupy": ("backends/cuda.py", "comm/nccl.py"),
    "torch": ("comm/horovod.py",),
    "horovod": ("comm/horovod.py",),
}
"""Libraries that only these files may import; others may name their types, under `if TYPE_CHECKING`."""

MAX_LINES = 330

MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def top_level(path: Path) -> str:
    """The top-level module or package of hpctrain that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that is imported, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def type_checking_lines(tree: ast.AST) -> set[int]:
    """Lines under `if TYPE_CHECKING:`, which never run."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    return {line for block in blocks for node in block.body for line in range(node.lineno, (node.end_lineno or 0) + 1)}


def breaches(path: Path, source: str) -> list[str]:
    """What a file does that it may not, each with its line and the rule."""
    tree, name, found = ast.parse(source), path.relative_to(PACKAGE).as_posix(), []
    own = LEVEL.get(top_level(path), 99)  # hpctrain/__init__.py stands above all
    types = type_checking_lines(tree)
    for line, imported in imports(tree):
        first, *rest = imported.split(".")
        if first == "":
            found.append(f"{name}:{line}: relative import; write it in full: from hpctrain...")
        elif first == "hpctrain" and rest and LEVEL.get(rest[0], own) > own:
            found.append(f"{name}:{line}: imports {imported} of level {LEVEL[rest[0]]}, but is itself of level {own}")
        elif first in ONLY_IN and line not in types and not name.startswith(ONLY_IN[first]):
            found.append(f"{name}:{line}: imports {first}, which only {', '.join(ONLY_IN[first])} may")
    asserts = (node.lineno for node in ast.walk(tree) if isinstance(node, ast.Assert))
    found += [f"{name}:{line}: assert vanishes under -O; raise a class of hpctrain.errors" for line in asserts]
    length = source.count("\n")
    if length > MAX_LINES:
        found.append(f"{name}: {length} lines; split it (soft limit 300, hard limit {MAX_LINES})")
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_module_keeps_the_rules(path: Path) -> None:
    assert breaches(path, path.read_text()) == []


def test_every_module_has_a_level() -> None:
    unknown = {top_level(path) for path in MODULES} - {*LEVEL, "__init__"}
    assert not unknown, f"add {', '.join(sorted(unknown))} to LEVELS in {Path(__file__).name}, and to docs/DESIGN.md"


@pytest.mark.parametrize(
    ("file", "source", "breach"),
    [
        (
            "partition.py",
            "from hpctrain.comm.world import world",
            "comm.world.world of level 1, but is itself of level 0",
        ),
        ("layers/conv.py", "def f():\n    import hpctrain.executor", "layers/conv.py:2: imports hpctrain.executor"),
        ("layers/conv.py", "from hpctrain import trainer", "imports hpctrain.trainer of level 6"),
        ("layers/conv.py", "from .. import trainer", "relative import"),
        ("planner/search.py", "from mpi4py import MPI", "planner/search.py:1: imports mpi4py, which only comm/ may"),
        ("backends/native.py", "import cupy as cp", "imports cupy, which only backends/cuda.py, comm/nccl.py may"),
        ("trainer.py", "import h5py", "imports h5py"),
        ("trainer.py", "x = 1\nassert x", "trainer.py:2: assert vanishes"),
        ("trainer.py", "x = 1\n" * 331, "trainer.py: 331 lines"),
    ],
)
def test_breach_is_found(file: str, source: str, breach: str) -> None:
    (found,) = breaches(PACKAGE / file, source)
    assert breach in found


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("comm/world.py", "from mpi4py import MPI\nfrom hpctrain.errors import LaunchError"),
        ("comm/exchange.py", "from hpctrain.comm.world import world\nimport hpctrain.backends.base"),
        ("cli.py", "from hpctrain.trainer import train\n" * 330),
        ("executor.py", "if TYPE_CHECKING:\n    from mpi4py import MPI"),
    ],
)
def test_what_is_allowed_passes(file: str, source: str) -> None:
    assert breaches(PACKAGE / file, source) == []


def loaded_after(statement: str, folder: Path) -> set[str]:
    """Top-level names and dotted modules in sys.modules of a fresh interpreter after `statement`."""
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", ["hpctrain", "hpctrain.cli"])
def test_import_starts_no_mpi_and_touches_no_gpu(module: str, tmp_path: Path) -> None:
    loaded = loaded_after(f"import {module}", tmp_path)
    assert module in loaded
    assert loaded.isdisjoint({"mpi4py", "mpi4py.MPI", "cupy", "torch", "h5py", "hpctrain._native"})
