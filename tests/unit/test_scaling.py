"""How many ranks: what is taken is what the definition says, and each choice says why."""

from __future__ import annotations

import random

import pytest

from hpctrain.errors import ConfigError, PlanError
from hpctrain.machine import Machine, Power
from hpctrain.planner.scaling import Point, Scaling, Step, counts, how_many, joules

BARE = Machine(name="bare")
KNOWN = Machine(name="known", power=Power(40.0, 250.0), price=2.5)


def scaled(seconds: dict[int, float], objective: str = "time", machine: Machine = BARE, busy: float = 0.0) -> Scaling:
    """The choice among steps of 128 samples that take so long; `busy` is what one rank would compute in all."""
    return how_many(lambda n: Step(seconds[n], busy / n), seconds, 128, objective, machine)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({1: 1.0, 2: 1.3, 4: 1.7}, 1),  # AlexNet at batch 128 on PCIe: 4 devices slow it down
        ({1: 1.0, 2: 0.6, 4: 0.7}, 2),
        ({1: 1.0, 2: 0.6, 4: 0.4}, 4),
        ({1: 1.0, 2: 0.6, 4: 0.598}, 2),  # 0.3 % is not worth two more
        ({1: 1.0, 2: 0.6, 4: 0.59}, 4),  # 1.7 % is
        ({2: 1.0}, 2),
    ],
)
def test_best_number_of_ranks(seconds: dict[int, float], best: int) -> None:
    found = scaled(seconds)
    assert found.chosen.ranks == best
    assert [point.ranks for point in found.points] == sorted(seconds)


def test_published_choice_of_devices() -> None:
    """Shin et al. 2019, table 2: 2244 images per second expected of 1 device, 1491 of 4; 1 is taken."""
    found = scaled({1: 128 / 2244, 4: 128 / 1491})
    assert found.chosen.ranks == 1
    assert "2,244 samples per second; 4: 34 % less" in found.why


def test_energy_by_hand() -> None:
    """3 ranks that compute for 2 s and wait for 5: 3 * (2 * 250 + 5 * 40) J."""
    assert joules(3, Step(7.0, 2.0), Power(40.0, 250.0)) == 2100.0
    assert Point(3, Step(7.0, 2.0), 6).joules(Power(40.0, 250.0)) == 2100.0
    assert Point(3, Step(7200.0, 2.0), 6).price(2.5) == 15.0
    assert Point(3, Step(7.0, 2.0), 21).gain("energy", KNOWN) == 0.01


def test_energy_takes_fewer_ranks_than_time() -> None:
    """Ranks that wait draw power too."""
    steps = {n: 1 / n + 0.004 * n for n in (1, 2, 4, 8, 16, 32)}
    assert scaled(steps, busy=1.0).chosen.ranks == 16
    assert scaled(steps, "energy", KNOWN, busy=1.0).chosen.ranks == 1
    assert scaled(steps, "cost", KNOWN, busy=1.0).chosen.ranks == 1
    # where one rank wastes its time (a batch that is too small for none, say), energy asks for more as well
    wasteful = {1: 8.0, 2: 2.0, 4: 1.5}
    assert scaled(wasteful, "energy", KNOWN, busy=0.5).chosen.ranks == 2
    assert scaled(wasteful, "cost", KNOWN, busy=0.5).chosen.ranks == 2


def test_ranks_that_slow_it_down_are_refused_whatever_the_objective() -> None:
    """Here 2 ranks would take less energy than 1, and more time."""
    steps = {1: Step(1.0, 1.0), 2: Step(1.1, 0.1)}
    power = Machine(power=Power(1.0, 1000.0))
    found = how_many(steps.__getitem__, steps, 10, "energy", power)
    assert Point(2, steps[2], 10).gain("energy", power) > Point(1, steps[1], 10).gain("energy", power)
    assert found.chosen.ranks == 1
    assert "2 would slow the step down" in found.why


def test_choice_is_the_definition(seed: int) -> None:
    rng, cases = random.Random(seed), 300
    for _ in range(cases):
        ranks = sorted(rng.sample(range(1, 65), rng.randint(1, 9)))
        steps = {n: Step(seconds := rng.uniform(0.5, 3), seconds * rng.random()) for n in ranks}
        objective = rng.choice(["time", "energy", "cost"])
        tolerance = rng.choice([0.0, 0.01, 0.1])
        found = how_many(steps.__getitem__, rng.sample(ranks, len(ranks)), 7, objective, KNOWN, tolerance)
        kept = [n for n in ranks if all(steps[n].seconds < steps[m].seconds for m in ranks if m < n)]
        gains = {
            "time": {n: 1 / steps[n].seconds for n in kept},
            "energy": {n: 1 / (n * (40 * steps[n].seconds + 210 * steps[n].busy)) for n in kept},
            "cost": {n: 1 / (n * steps[n].seconds) for n in kept},
        }[objective]
        expected = min(n for n in kept if gains[n] >= (1 - tolerance) * max(gains.values()) * (1 - 1e-12))
        assert found.chosen.ranks == expected, (steps, objective, tolerance)
        assert found.why
    print(f"{cases} cases")


def test_efficiency_is_that_of_a_rank_beside_the_fewest() -> None:
    found = scaled({2: 1.0, 4: 0.5, 8: 0.5})
    assert [found.efficiency(point) for point in found.points] == [1.0, 1.0, 0.5]


def test_larger_numbers_are_not_tried_once_they_are_slower() -> None:
    steps = {1: 1.0, 2: 0.5, 4: 0.6, 8: 0.4, 16: 0.5, 32: 0.6, 64: 0.55, 128: 0.1}
    found = how_many(lambda n: Step(steps[n], 0.0), steps, 128, "time", BARE, patience=3)
    assert [point.ranks for point in found.points] == [1, 2, 4, 8, 16, 32, 64]
    assert found.chosen.ranks == 8
    assert scaled(steps).chosen.ranks == 128


def test_numbers_without_a_plan_are_left_out_and_told() -> None:
    def step(ranks: int) -> Step:
        if ranks < 4:
            raise PlanError(f"{ranks} ranks have too little memory")
        return Step(1 / ranks, 0.0)

    found = how_many(step, [1, 2, 4, 8], 5, "time", BARE)
    assert found.refused == {1: "1 ranks have too little memory", 2: "2 ranks have too little memory"}
    assert found.chosen.ranks == 8
    with pytest.raises(PlanError, match=r"no plan for 1 to 3 ranks\. On 3: 3 ranks have too little memory"):
        how_many(step, [1, 2, 3], 5, "time", BARE)
    with pytest.raises(PlanError, match="give --ranks N, or --sweep"):
        how_many(step, [], 5, "time", BARE)


@pytest.mark.parametrize(("objective", "remedy"), [("energy", '"power"'), ("cost", '"price"')])
def test_objective_without_figures_is_refused_before_anything_is_tried(objective: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=f"bare has no .*{remedy}.*--objective time"):
        how_many(lambda n: pytest.fail("tried"), [1], 5, objective, BARE)


@pytest.mark.parametrize(
    ("first", "last", "per_host", "expected"),
    [
        (1, 1, None, [1]),
        (1, 12, None, [1, 2, 4, 8, 12]),
        (3, 40, None, [3, 4, 8, 16, 32, 40]),
        (1, 50, 6, [1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 50]),
        (5, 5, 4, [5]),
        (64, 4096, None, [64, 128, 256, 512, 1024, 2048, 4096]),
    ],
)
def test_numbers_to_try(first: int, last: int, per_host: int | None, expected: list[int]) -> None:
    assert counts(first, last, per_host) == expected
