"""Serial tests run in the process of `pytest`, those marked `parallel` under a launcher, with -m "parallel[match]".

`pytest` never starts MPI itself: test_suites.py launches the N-rank suites. By hand, one of them:
`mpirun -n 3 python -m pytest -m "parallel[match]" tests/mpi/test_exchange.py`.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import size_of_environment

MPI_TESTS = Path(__file__).parent / "mpi"
MATCH = "parallel[match]"
STDERR = pytest.StashKey[int]()
"""A copy of stderr: during a test pytest has a file of its own in the place of descriptor 2."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this test suite."""
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")
    parser.addoption("--seed", type=int, default=0, help="vary the random numbers of randomised tests (default: 0)")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Register the markers; under -m "parallel[match]" start MPI."""
    # Processes that tests start use what is installed, as this one does: sources in a clone lack compiled kernels.
    os.environ["PYTHONSAFEPATH"] = "1"
    config.addinivalue_line("markers", "parallel(ranks): runs on that many ranks: a literal number or list of numbers")
    config.addinivalue_line("markers", f"{MATCH}: set on parallel tests for the number of ranks that run now")
    config.addinivalue_line("markers", "slow: takes more than half a minute; only run with --slow")
    config.addinivalue_line("markers", "faults: kills, hangs or corrupts something on purpose")
    if in_suite(config):
        enter_suite(config)
        return
    if size_of_environment() > 1:
        raise pytest.UsageError(f'a launcher runs {size_of_environment()} copies of pytest: add -m "{MATCH}"')
    asked = [arg for arg in config.args if is_mpi_test(Path(arg.split("::")[0]).absolute())]
    if asked:
        raise pytest.UsageError(f'run it under a launcher: mpirun -n 2 python -m pytest -m "{MATCH}" {asked[0]}')


def in_suite(config: pytest.Config) -> bool:
    """Whether this process is one rank of a suite."""
    return MATCH in config.option.markexpr


def is_mpi_test(path: Path) -> bool:
    """Whether `path` is tests/mpi or in it."""
    return MPI_TESTS in (path, *path.parents)


def enter_suite(config: pytest.Config) -> None:
    """Start MPI, see that all ranks are in one world, and leave the reporting to rank 0; failures name their rank."""
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # mpi4py's word on what is checked below
        from mpi4py import MPI

    expected = int(os.environ.get("HPCTRAIN_TEST_RANKS", size_of_environment()))
    if expected != MPI.COMM_WORLD.size:
        raise pytest.UsageError(
            f"the launcher started {expected} ranks, MPI sees {MPI.COMM_WORLD.size}: mpirun and the MPI library that "
            f"mpi4py loads ({MPI.Get_library_version().split(',')[0]}) are of different kinds; use the mpirun beside it"
        )
    if MPI.COMM_WORLD.rank > 0:
        config.pluginmanager.unregister(name="terminalreporter")
    config.stash[STDERR] = os.dup(2)
    if "HPCTRAIN_TEST_RANKS" in os.environ:
        # The first rank that ends makes the launcher end the others: test_suites.py shows where they were then.
        faulthandler.register(signal.SIGTERM, file=config.stash[STDERR], all_threads=True, chain=True)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Outside a suite tests/mpi is not even imported, as that may start MPI."""
    return True if is_mpi_test(collection_path) and not in_suite(config) else None


def ranks_of(item: pytest.Item) -> tuple[int, ...]:
    """The numbers of ranks that a test is for; none for a serial test."""
    marker = item.get_closest_marker("parallel")
    if marker is None:
        return ()
    (ranks,) = marker.args
    return tuple(ranks) if isinstance(ranks, list | tuple) else (ranks,)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what fits this number of ranks (pytest's own -m then selects), and leave out what is slow."""
    if in_suite(config):
        from mpi4py import MPI

        for item in items:
            if MPI.COMM_WORLD.size in ranks_of(item):
                item.add_marker(MATCH)
    else:
        misplaced = [item.nodeid for item in items if ranks_of(item)]
        if misplaced:
            raise pytest.UsageError(f"parallel tests belong in tests/mpi: {misplaced[0]}")
    if not config.option.slow:
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """A test that fails on one rank leaves the others waiting in a collective: end them all."""
    report = yield
    if report.failed and in_suite(item.config):
        abort(f"{item.nodeid} failed in {report.when}", report.longreprtext)
    return report


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """The same for a test file that does not import; never seen outside a suite, where nothing has started MPI."""
    if report.failed and "mpi4py.MPI" in sys.modules:
        abort(f"{report.nodeid} cannot be collected", report.longreprtext)


def abort(headline: str, text: str) -> None:
    """Say what happened on which rank, then end all ranks, if there are others."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if world.size > 1:
        print(f"\nrank {world.rank} of {world.size}: {headline}\n{text}", file=sys.__stderr__, flush=True)
        world.Abort(1)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The seed of a randomised test, the same on every rank and in every run, until --seed varies it."""
    value = zlib.crc32(request.node.nodeid.encode()) ^ request.config.option.seed
    print(f"seed {value} (--seed={request.config.option.seed})")
    return value


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Iterator[Any]:
    """An intracommunicator of all ranks, this test's own."""
    if not in_suite(request.config):
        pytest.fail("comm is for tests marked parallel, in tests/mpi")
    from mpi4py import MPI

    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    duplicate.Free()


@pytest.fixture(autouse=True)
def _in_step(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ranks of a suite end each test together, so that a deadlock is reported for the test that caused it."""
    if not in_suite(request.config):
        yield
        return
    from mpi4py import MPI

    world, seconds = MPI.COMM_WORLD, float(request.config.getini("faulthandler_timeout"))
    if seconds:
        # In place of pytest's own timer: every rank prints its stack before one ends all, which is the last to do so.
        ends = world.rank == 0
        faulthandler.dump_traceback_later(seconds + ends, exit=ends, file=request.config.stash[STDERR])
    yield
    world.Barrier()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many random cases of each kind ran; for each suite that ran its ranks and its rank 0's closing line."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    properties = [pair for report in reports for pair in report.user_properties]
    found: dict[str, list[tuple[str, int]]] = {}
    for what, kind, count in [value for name, value in properties if name == "cases"]:
        found.setdefault(what, []).append((kind, count))
    if found:
        terminalreporter.section("random cases")
    for what, counts in found.items():
        kinds = "; ".join(f"{kind} {count}" for kind, count in counts)
        terminalreporter.line(f"cases: {what}: {sum(count for _, count in counts)} ({kinds})")
    lines = [value for name, value in properties if name == "suite"]
    if lines:
        terminalreporter.section("suites under mpirun")
    for line in sorted(set(lines)):
        terminalreporter.line(line)
