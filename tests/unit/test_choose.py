"""The chooser: brute force over tables, crossover sizes of the formulas, and the file of measurements."""

from __future__ import annotations

import json
from math import log2
from pathlib import Path

import numpy as np
import pytest

from hpctrain import machine
from hpctrain.comm.allreduce import LIBRARIES, TABLE, choose
from hpctrain.comm.allreduce.choose import SLACK, Choice
from hpctrain.errors import ConfigError
from hpctrain.machine import Level, Machine, Table

ROOM = 1 << 40
OPEN_MPI = "Open MPI v5.0.11"


def by_formula(nbytes: int, hosts: list[int], level: Level, room: int = 0) -> Choice:
    """The choice where only alpha, beta and gamma are known."""
    return choose.choose(nbytes, hosts, Machine(OPEN_MPI, level, level), room)


# --- tables ----------------------------------------------------------------------------------------------------------


def random_hosts(rng: np.random.Generator) -> list[int]:
    """2 to 9 ranks on up to 4 hosts, in any order."""
    return rng.integers(0, rng.integers(1, 5), rng.integers(2, 10)).tolist()


def line(times: dict[int, float], nbytes: int) -> float:
    """Seconds for `nbytes`, by NumPy: flat below the sizes, linear between them, in proportion above."""
    sizes = sorted(times)
    return float(np.interp(nbytes, sizes, [times[n] for n in sizes])) * max(1.0, nbytes / sizes[-1])


def test_choice_from_random_tables_is_the_best_of_what_is_allowed(seed: int) -> None:
    rng, natives, ours = np.random.default_rng(seed), 0, 0
    for _ in range(500):
        hosts, room = random_hosts(rng), int(rng.choice([0, 10**5, 10**9]))
        sizes = sorted({int(n) for n in 4 ** rng.uniform(5, 13, 3)})
        seconds = {name: {n: float(rng.uniform(1, 9)) * (1 + n) for n in sizes} for name in TABLE}
        nbytes = int(4 ** rng.uniform(4, 14))
        found = choose.choose(nbytes, hosts, Machine(OPEN_MPI, tables=(Table(machine.numbered(hosts), seconds),)), room)
        times = {name: line(known, nbytes) for name, known in seconds.items()}
        allowed = set(TABLE) - {"mpi"}
        if len(set(hosts)) > 1 or len(hosts) * nbytes > room:
            allowed -= {"shared"}
        if len(set(hosts)) in (1, len(hosts)):
            allowed -= {"hierarchical"}
        best = min(times[name] for name in allowed)
        if best > SLACK * times["mpi"] * (1 + 1e-9):
            assert found.name == "mpi"
        elif best < SLACK * times["mpi"] * (1 - 1e-9):
            assert found.name in allowed
            assert times[found.name] == pytest.approx(best)
        assert found.seconds == pytest.approx(times[found.name])
        assert times[found.name] <= SLACK * times["mpi"] * (1 + 1e-9)
        natives, ours = natives + (found.name == "mpi"), ours + (found.name != "mpi")
    print(f"cases: {natives} times MPI's own, {ours} times one of ours; seed {seed}")
    assert min(natives, ours) > 20


def test_choice_does_not_depend_on_the_order_in_a_file_or_on_the_numbers_of_hosts() -> None:
    seconds = {name: {1000: 1e-3} for name in TABLE}
    tables = [
        Machine(OPEN_MPI, tables=(Table((0, 1, 0), dict(order)),))
        for order in (seconds.items(), reversed(seconds.items()))
    ]
    found = {choose.choose(1000, hosts, table, 0) for table in tables for hosts in ([0, 1, 0], [7, 3, 7])}
    assert len(found) == 1


def test_another_layout_is_not_taken_from_a_table() -> None:
    table = Machine(OPEN_MPI, tables=(Table((0, 0), {"tree": {1000: 1e-9}, "mpi": {1000: 1.0}}),))
    assert choose.choose(1000, [0, 0], table, 0) == ("tree", 1e-9, "measured on 2 ranks on 1 host")
    for hosts in ([0, 1], [0, 0, 0], [0, 0, 1, 1]):
        found = choose.choose(1000, hosts, table, 0)
        assert found.why.startswith(f"by formula, nothing measured on {len(hosts)} ranks on {len(set(hosts))} host")


def test_library_that_need_not_repeat_its_bits_is_not_chosen() -> None:
    seconds = {"mpi": {1000: 1e-6}, "ring": {1000: 1e-5}}
    table = Table((0, 0), seconds)
    assert choose.choose(1000, [0, 0], Machine(OPEN_MPI, tables=(table,)), 0).name == "mpi"
    found = choose.choose(1000, [0, 0], Machine("MPICH Version: 5.0.2", tables=(table,)), 0)
    assert found.name == "ring"
    assert "need not repeat its bits" in found.why


# --- formulas --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [4, 8, 16, 64])
def test_recursive_doubling_below_the_crossover_and_fewest_bytes_above(ranks: int) -> None:
    """n (lg p - 2 (p - 1) / p) beta = lg p alpha, additions not counted: Thakur et al. 2005."""
    level, lg = Level(alpha=1e-5, beta=1e-9, gamma=0.0), log2(ranks)
    crossover = lg * level.alpha / ((lg - 2 * (ranks - 1) / ranks) * level.beta)
    hosts = list(range(ranks))
    assert by_formula(int(0.99 * crossover), hosts, level).name == "recursive_doubling"
    assert by_formula(int(1.01 * crossover), hosts, level).name in ("halving_doubling", "binary_blocks")


def test_ring_beats_rabenseifner_where_ranks_are_no_power_of_two_and_buffers_long() -> None:
    level = Level(alpha=1e-5, beta=1e-9, gamma=0.0)
    for ranks in (3, 6, 12):
        short, long = (by_formula(n, list(range(ranks)), level) for n in (100, 10**9))
        assert short.name in ("recursive_doubling", "tree")
        assert long.name in ("ring", "segmented_ring", "two_dimensional", "binary_blocks")
        assert long.seconds == pytest.approx(2 * (ranks - 1) / ranks, rel=0.01)


def test_choice_is_the_cheapest_of_its_candidates(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(300):
        hosts, room, nbytes = random_hosts(rng), int(rng.choice([0, ROOM])), int(4 ** rng.uniform(2, 14))
        found, able = choose.choose(nbytes, hosts, None, room), choose.candidates(nbytes, hosts, room)
        prices = {name: choose.price(name, nbytes, hosts, None) for name in able}
        assert found.name in able
        assert found.seconds == prices[found.name] == min(prices.values())
        assert not {"mpi", *LIBRARIES} & set(able)
    print(f"cases: 300 layouts and sizes by formula; seed {seed}")


def test_hosts_of_several_ranks_send_long_buffers_hierarchically() -> None:
    level = Machine(OPEN_MPI, node=Level(1e-6, 1e-11, 1e-11), network=Level(1e-5, 1e-9, 1e-11))
    assert choose.choose(10**8, [0, 0, 0, 1, 1, 1], level, ROOM).name == "hierarchical"
    assert choose.choose(10**8, [0, 1, 0, 1, 0, 1], level, ROOM).name == "hierarchical"
    assert "hierarchical" not in choose.candidates(10**8, [0, 1, 2], ROOM)


def test_a_ring_that_crosses_the_link_often_is_priced_so() -> None:
    """2 + 2 ranks, 1 s for each byte on the link: in order one message at a time leaves a host, in turn two do."""
    level = Machine(OPEN_MPI, network=Level(1e-12, 1.0, 1e-12))
    assert choose.price("ring", 100, [0, 0, 1, 1], level) == pytest.approx(150)
    assert choose.price("ring", 100, [0, 1, 0, 1], level) == pytest.approx(300)


def test_shared_memory_only_where_it_fits() -> None:
    assert "shared" in choose.candidates(1000, [0, 0, 0], 3000)
    assert "shared" not in choose.candidates(1000, [0, 0, 0], 2999)
    assert "shared" not in choose.candidates(1000, [0, 0, 1], ROOM)


def test_one_rank_has_nothing_to_sum() -> None:
    assert choose.choose(1000, [0], None, 0).seconds == 0


# --- the file --------------------------------------------------------------------------------------------------------


def test_file_of_measurements_is_the_same_after_json(tmp_path: Path) -> None:
    made = Machine(OPEN_MPI, Level(1e-6, 1e-10, 1e-11), None, (Table((0, 0, 1), {"ring": {1024: 1e-5, 4096: 2e-5}}),))
    path = tmp_path / "machine.json"
    path.write_bytes(machine.encode(made))
    assert machine.load(path) == made
    assert json.loads(path.read_text())["tables"][0]["seconds"]["ring"] == {"1024": 1e-5, "4096": 2e-5}
    assert machine.load(tmp_path / "none.json") is None


def test_measuring_again_replaces_the_same_layout_only() -> None:
    old = Machine(
        OPEN_MPI, Level(1, 1, 1), None, (Table((0, 0), {"ring": {1: 1.0}}), Table((0, 1), {"ring": {1: 2.0}}))
    )
    newer = Machine(OPEN_MPI, None, Level(2, 2, 2), (Table((0, 0), {"ring": {1: 3.0}}),))
    both = old.updated(newer)
    assert (both.node, both.network) == (Level(1, 1, 1), Level(2, 2, 2))
    assert {table.hosts: table.seconds["ring"][1] for table in both.tables} == {(0, 0): 3.0, (0, 1): 2.0}
    other = Machine("MPICH Version: 5.0.2")
    assert old.updated(other) == other


def test_measurements_of_another_library_are_not_used_and_it_is_said(tmp_path: Path) -> None:
    path, made = tmp_path / "machine.json", Machine(OPEN_MPI)
    assert machine.usable(made, path, OPEN_MPI) == (made, f"measurements of {path}")
    found, said = machine.usable(made, path, "MPICH Version: 5.0.2")
    assert found is None
    assert said == f"{path} was measured with {OPEN_MPI}, this is MPICH Version: 5.0.2: not used; calibrate again"
    assert machine.usable(None, path, OPEN_MPI)[1] == f"no measurements in {path}; hpctrain calibrate makes them"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be used"),
        ("[]", "cannot be used"),
        ('{"library": "x", "speed": 1}', "cannot be used.*speed"),
        ('{"library": "x", "tables": [{"hosts": [0], "seconds": {"ring": {"1K": 1.0}}}]}', "cannot be used"),
        ('{"library": "x", "tables": [{"hosts": [0], "seconds": {"ring": {"1": -1.0}}}]}', "> 0"),
        ('{"library": "x", "tables": [{"hosts": [0], "seconds": {"ring": {}}}]}', "without sizes"),
        ('{"library": "x", "version": 1}', "version 1, this program reads 2"),
    ],
)
def test_damaged_file_is_named_with_the_remedy(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(
        ConfigError, match=rf"(?s)machine.json: .*{message}.*\nmpirun -n 2 hpctrain calibrate --out {path}$"
    ):
        machine.load(path)


def test_place_of_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HPCTRAIN_MACHINE", "/a/b.json")
    assert machine.default_path() == Path("/a/b.json")
    monkeypatch.setenv("HPCTRAIN_MACHINE", "")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/c")
    assert machine.default_path() == Path("/c/hpctrain/machine.json")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert machine.default_path() == tmp_path / ".config/hpctrain/machine.json"


def test_links_of_a_host_are_shared_by_what_sends_at_once() -> None:
    """4 ranks a host: on 1 link all share it, on 4 each has its own, and two groups on 4 share them by two."""
    hosts = [0] * 4 + [1] * 4
    one, four = (Machine(OPEN_MPI, Level(0, 0, 0), Level(0.0, 1e-9, 0.0), links=links) for links in (1, 4))
    for name in ("halving_doubling", "hierarchical"):
        alone = choose.price(name, 1 << 20, hosts, four)
        assert choose.price(name, 1 << 20, hosts, one) == pytest.approx(4 * alone)
        assert choose.price(name, 1 << 20, hosts, four, crowd=2) == pytest.approx(2 * alone)
