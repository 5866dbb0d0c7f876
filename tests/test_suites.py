"""The tests under tests/mpi, run on every number of ranks that they ask for: one item here is one run of mpirun."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import launching
import pytest

TESTS = Path(__file__).parent
TIMEOUT = 900
"""Seconds until a suite is ended, whatever it does; a test of it that hangs is ended much sooner, by pytest."""

PYTEST_FRAMES = re.compile(r'^  File ".*(?:/_pytest/|/pluggy/|/tests/launching.py).*\n', re.M)
"""Lines of a stack dump that are the same in every one."""


def marked_ranks(source: str, path: str) -> set[int]:
    """Every number of ranks that a test file's `parallel` markers name, read without importing the file."""
    ranks: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "parallel":
            try:
                value = ast.literal_eval(node.args[0])
            except (ValueError, IndexError):
                raise pytest.UsageError(
                    f"{path}:{node.lineno}: give parallel() a literal, for example [2, 3]"
                ) from None
            ranks |= {value} if isinstance(value, int) else set(value)
    return ranks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One item of test_suite for each number of ranks in use."""
    if "ranks" in metafunc.fixturenames:
        metafunc.parametrize("ranks", sorted(set().union(*ranks_of_files().values())))


@cache
def ranks_of_files() -> dict[Path, set[int]]:
    """The files of parallel tests, and the numbers of ranks that each is for."""
    files = sorted((TESTS / "mpi").rglob("test_*.py"))
    return {path: marked_ranks(path.read_text(), str(path)) for path in files}


@dataclass(frozen=True)
class Suite:
    """How a suite ended: whether all is well, rank 0's closing line, what ranks wrote, how many random cases ran."""

    good: bool
    closing: str
    output: str
    cases: tuple[str, ...]


def run_suite(ranks: int, targets: Sequence[Path], logs: Path, *options: str, timeout: float = TIMEOUT) -> Suite:
    """The tests in `targets` that are for this number of ranks; `logs` is an empty folder."""
    command = [
        *launching.mpirun(ranks),
        *(sys.executable, str(TESTS / "launching.py"), str(logs)),
        *("-q", "-m", "parallel[match]", "-p", "no:cacheprovider", "--color=no", f"--rootdir={TESTS.parent}"),
        *("-c", str(TESTS.parent / "pyproject.toml"), *options, *map(str, targets)),
    ]
    ended = launching.run(command, timeout, launching.environment(HPCTRAIN_TEST_RANKS=str(ranks)))
    texts = [path.read_text(errors="replace") for rank in range(ranks) if (path := logs / f"rank-{rank}.txt").exists()]
    # pytest's status is 5 where it ran no test; a closing line without "passed" (all skipped) is not good either.
    closing = re.findall(r"^.*\d+ passed.* in [\d.]+s.*$", texts[0], re.M) if texts else []
    how = "ran out of time" if ended.status is None else f"exit status {ended.status}"
    parts = [f"{ranks} ranks: {how}"]
    parts += [f"---- rank {rank} ----\n{PYTEST_FRAMES.sub('', text)[-8000:]}" for rank, text in enumerate(texts)]
    parts += [f"---- mpirun ----\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}"]
    good = ended.status == 0 and len(texts) == ranks and len(closing) == 1
    cases = tuple(re.findall(r"^cases: (.*)$", texts[0], re.M)) if texts else ()
    return Suite(good, closing[0].strip("= ") if good else how, "\n".join(parts), cases)


def test_suite(
    ranks: int, tmp_path: Path, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]
) -> None:
    slow = ["--slow"] if request.config.option.slow else []
    seed = f"--seed={request.config.option.seed}"
    targets = [path for path, has in ranks_of_files().items() if ranks in has]  # importing the others takes long
    suite = run_suite(ranks, targets, tmp_path, seed, *slow)
    for line in (suite.closing, *suite.cases):
        record_property("suite", f"{ranks} rank{'s' * (ranks > 1)}: {line}")
    if not suite.good:
        pytest.fail(suite.output, pytrace=False)


# --- the harness itself ---------------------------------------------------------------------------------------------


def run_source(
    tmp_path: Path, source: str, *options: str, ranks: int = 3, timeout: float = 60
) -> tuple[bool, str, str]:
    """`run_suite` of one test file with this source, which is outside tests/ and so has to be given conftest.py."""
    target, logs = tmp_path / "test_it.py", tmp_path / "logs"
    target.write_text(source)
    logs.mkdir()
    return run_suite(ranks, [target], logs, "-p", "conftest", *options, timeout=timeout)


FAILS_ON_RANK_1 = """
import pytest

@pytest.mark.parallel(3)
def test_it(comm):
    if comm.rank == 1:
        assert 6 * 7 == 41, "the rest waits in a collective"
    comm.barrier()
"""


def test_failure_on_one_rank_ends_all_and_names_rank_test_and_line(tmp_path: Path) -> None:
    suite = run_source(tmp_path, FAILS_ON_RANK_1)
    assert not suite.good
    assert re.search(r"^rank 1 of 3: \S*::test_it failed in call$", suite.output, re.M)
    assert "AssertionError: the rest waits in a collective" in suite.output
    assert "test_it.py:7" in suite.output


DEADLOCK = """
import pytest

@pytest.mark.parallel(3)
def test_it(comm):
    if comm.rank != 1:
        comm.barrier()
    else:
        comm.recv(source=0)
"""


def test_deadlock_prints_the_stack_of_every_rank(tmp_path: Path) -> None:
    suite = run_source(tmp_path, DEADLOCK, "-o", "faulthandler_timeout=3")
    assert not suite.good
    sections = suite.output.split("---- mpirun ")[0].split("---- rank ")[1:]
    assert [section[0] for section in sections] == ["0", "1", "2"]
    for section, line in zip(sections, (7, 9, 7), strict=True):
        assert f'test_it.py", line {line} in test_it' in section


def test_hang_that_pytest_does_not_end_is_ended(tmp_path: Path) -> None:
    source = "import time, pytest\n\n@pytest.mark.parallel(2)\ndef test_it():\n    time.sleep(300)\n"
    suite = run_source(tmp_path, source, "-o", "faulthandler_timeout=0", ranks=2, timeout=6)
    assert (suite.good, suite.closing) == (False, "ran out of time")
    assert suite.output.count("line 5 in test_it") == 2


def test_suite_without_tests_for_its_ranks_is_a_failure(tmp_path: Path) -> None:
    source = "import pytest\n\n@pytest.mark.parallel([2])\ndef test_it():\n    pass\n"
    suite = run_source(tmp_path, source)
    assert not suite.good
    assert "1 deselected" in suite.output


def test_marked_ranks_reads_numbers_lists_and_module_marks() -> None:
    source = "pytestmark = pytest.mark.parallel(5)\n@pytest.mark.parallel([2, 3])\ndef test_it(): pass\n"
    assert marked_ranks(source, "test_x.py") == {2, 3, 5}
    with pytest.raises(pytest.UsageError, match=r"test_x.py:1: give parallel\(\) a literal"):
        marked_ranks("pytest.mark.parallel(RANKS)", "test_x.py")
