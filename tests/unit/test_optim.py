"""The update rule unrolled by hand, and learning rates at points computed by hand."""

from __future__ import annotations

from fractions import Fraction as F

import numpy as np
import pytest

from hpctrain.backends.reference import Reference
from hpctrain.config import Optim, Schedule
from hpctrain.optim import SGD, TABLE, Block, Shard
from hpctrain.optim.schedule import describe, learning_rate

GRADIENTS = (F(1), F(-1, 2), F(2))
"""Of three steps."""


def steps(optim: Optim, decay: bool = True, start: float = 1.0) -> list[float]:
    """The weight after each step with GRADIENTS and the rates 1/2, 1/2, 1/4."""
    weights, gradients = np.array([start]), np.zeros(1)
    sgd = SGD([Block(weights, gradients)], [Shard(0, 0, slice(0, 1), decay)], Reference(), optim)
    found = []
    for gradient, lr in zip(GRADIENTS, (0.5, 0.5, 0.25), strict=True):
        gradients[:] = float(gradient)
        sgd.step(lr)
        found.append(float(weights[0]))
    return found


# All numbers are binary fractions, so that float64 gives exactly what the arithmetic by hand gives.


def test_plain_descent() -> None:
    # 1 - 1/2 = 1/2; 1/2 + 1/4 = 3/4; 3/4 - 1/2 = 1/4
    assert steps(Optim(lr=0.5)) == [0.5, 0.75, 0.25]


def test_momentum() -> None:
    # v = 1: w = 1/2; v = 1/2 - 1/2 = 0: w = 1/2; v = 0 + 2: w = 1/2 - 1/2 = 0
    assert steps(Optim(lr=0.5, momentum=0.5)) == [0.5, 0.5, 0.0]


def test_nesterov() -> None:
    # v = 1, g + v/2 = 3/2: w = 1/4; v = 0, g + 0 = -1/2: w = 1/2; v = 2, g + 1 = 3: w = 1/2 - 3/4
    assert steps(Optim(lr=0.5, momentum=0.5, nesterov=True)) == [0.25, 0.5, -0.25]


def test_weight_decay() -> None:
    # g' = 1 + 1/4 = 5/4: w = 3/8; g' = -1/2 + 3/32 = -13/32: w = 3/8 + 13/64 = 37/64;
    # g' = 2 + 37/256 = 549/256: w = 37/64 - 549/1024 = 43/1024
    assert steps(Optim(lr=0.5, weight_decay=0.25)) == [3 / 8, 37 / 64, 43 / 1024]


def test_no_decay_where_the_run_says_so() -> None:
    assert steps(Optim(lr=0.5, weight_decay=0.25), decay=False) == steps(Optim(lr=0.5))


def test_decay_enters_the_momentum_as_in_pytorch() -> None:
    """L2 regularization of the gradient, as torch.optim.SGD does, not the decoupled decay of AdamW."""
    # g' = 5/4, v = 5/4: w = 3/8; g' = -13/32, v = 5/8 - 13/32 = 7/32: w = 3/8 - 7/64 = 17/64;
    # g' = 2 + 17/256, v = 7/64 + 529/256 = 557/256: w = 17/64 - 557/1024
    expected = [3 / 8, 17 / 64, (17 * 16 - 557) / 1024]
    assert steps(Optim(lr=0.5, momentum=0.5, weight_decay=0.25)) == expected


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_many_weights_equal_exact_fractions(nesterov: bool, dtype: str, seed: int) -> None:
    """The same rule in rational numbers, for every weight of a buffer with runs that decay and runs that do not."""
    rng = np.random.default_rng(seed)
    optim = Optim(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    weights = rng.normal(size=13).astype(dtype)
    gradients = np.zeros(13, dtype)
    shards = [Shard(0, 0, slice(0, 5), True), Shard(1, 0, slice(5, 9), False), Shard(2, 0, slice(9, 13), True)]
    sgd = TABLE["sgd"]([Block(weights, gradients)], shards, Reference(), optim)
    exact, velocity = [F(float(w)) for w in weights], [F(0)] * 13
    for _ in range(5):
        gradients[:] = rng.normal(size=13)
        for _, _, run, decay, _ in shards:
            for i in range(run.start, run.stop):
                g = F(float(gradients[i])) + (F(0.01) * exact[i] if decay else 0)
                velocity[i] = F(0.9) * velocity[i] + g
                exact[i] -= F(0.1) * (g + F(0.9) * velocity[i] if nesterov else velocity[i])
        sgd.step(0.1)
    # five steps of at most eight roundings each, of numbers up to about 8; 0.9 and 0.1 themselves round in float32
    bound = 5 * 10 * 8 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(weights, [float(w) for w in exact], rtol=0, atol=bound)
    np.testing.assert_allclose(sgd.state["velocity"], [float(v) for v in velocity], rtol=0, atol=bound)
    assert sgd.state["velocity"].dtype == weights.dtype == np.dtype(dtype)


def test_no_weights_is_no_trouble() -> None:
    SGD([], [], Reference(), Optim(lr=0.5)).step(0.5)


# --- learning rates -----------------------------------------------------------------------------------------------


def rates(schedule: Schedule, at: list[int], steps_per_epoch: int = 10, total: int = 100) -> list[float]:
    """Learning rates of the steps `at`, with a rate of 8."""
    return [learning_rate(Optim(lr=8.0, schedule=schedule), 64, step, steps_per_epoch, total) for step in at]


def test_constant_rate() -> None:
    assert rates(Schedule(), [0, 1, 50, 99, 100, 1000]) == [8.0] * 6


def test_warm_up_is_linear_and_reaches_the_rate_when_it_ends() -> None:
    """Two epochs of four steps less one: eight steps of equal size from one ninth up to the whole rate."""
    warm = Schedule(warmup_epochs=2)
    found = rates(warm, list(range(12)), steps_per_epoch=4)
    assert found == pytest.approx([8 * (i + 1) / 9 for i in range(8)] + [8.0] * 4, rel=1e-15)
    assert rates(Schedule(warmup_epochs=0.5), [0, 4, 5], steps_per_epoch=10) == pytest.approx([8 / 6, 40 / 6, 8])


def test_steps_at_their_epochs() -> None:
    schedule = Schedule(name="step", milestones=(3, 6), gamma=0.5)
    assert rates(schedule, [0, 29, 30, 59, 60, 99]) == [8, 8, 4, 4, 2, 2]


def test_cosine() -> None:
    """Half a period: all, 3/4 at a third, half, 1/4 at two thirds, then what is last."""
    schedule = Schedule(name="cosine", final_lr=2.0)
    found = rates(schedule, [0, 30, 45, 60, 90, 99], total=90)
    assert found == pytest.approx([8, 2 + 6 * 3 / 4, 5, 2 + 6 / 4, 2, 2], rel=1e-14)


def test_polynomial() -> None:
    schedule = Schedule(name="polynomial", power=2.0, final_lr=4.0)
    assert rates(schedule, [0, 25, 50, 75, 100, 200]) == [8, 4 + 4 * 9 / 16, 5, 4.25, 4, 4]
    assert rates(Schedule(name="polynomial"), [0, 25, 50, 100]) == [8, 6, 4, 0]


def test_decay_begins_where_warm_up_ends() -> None:
    schedule = Schedule(name="polynomial", warmup_epochs=2)
    assert rates(schedule, [20, 60, 100]) == [8, 4, 0]
    cosine = Schedule(name="cosine", warmup_epochs=2)
    assert rates(cosine, [20, 60, 100]) == pytest.approx([8, 4, 0], abs=1e-15)


def test_warm_up_as_long_as_the_run_is_no_division_by_zero() -> None:
    for name in ("cosine", "polynomial"):
        schedule = Schedule(name=name, warmup_epochs=10, final_lr=1.0)  # type: ignore[arg-type]
        found = rates(schedule, [0, 99, 100, 200])
        assert found[:2] == pytest.approx([8 / 101, 8 * 100 / 101])
        assert all(1 <= rate <= 8 for rate in found[2:])


# A rate of 8 for 10 samples is one of 32 for 40, and of 20 for 25.
LINEAR = {"lr": 8.0, "scale_lr": "linear", "base_batch": 10}


@pytest.mark.parametrize(
    ("schedule", "batch", "expected"),
    [
        # steps 0, 1, 4, 8, 9 and 12 of 16, warmed up over 8
        (Schedule(), 40, [32, 32, 32, 32, 32, 32]),
        (Schedule(warmup_epochs=2), 40, [8, 11, 20, 32, 32, 32]),
        (Schedule(warmup_epochs=2, name="polynomial"), 40, [8, 11, 20, 32, 28, 16]),
        (Schedule(warmup_epochs=2, name="polynomial", final_lr=24.0), 40, [8, 11, 20, 32, 31, 28]),
        (Schedule(warmup_epochs=2, name="step", milestones=(3,), gamma=0.25), 40, [8, 11, 20, 32, 32, 8]),
        (Schedule(warmup_epochs=2, name="cosine"), 40, [8, 11, 20, 32, None, 16]),
        (Schedule(warmup_epochs=1.5), 25, [8, 10, 16, 20, 20, 20]),
        # batches below the base: the rate is smaller from the start, with nothing to warm up to
        (Schedule(warmup_epochs=2), 5, [4, 4, 4, 4, 4, 4]),
        (Schedule(warmup_epochs=2), 10, [8, 8, 8, 8, 8, 8]),
    ],
)
def test_linear_scaling_warms_up_from_the_rate_of_the_base(
    schedule: Schedule, batch: int, expected: list[float | None]
) -> None:
    optim = Optim(**LINEAR, schedule=schedule)
    for step, rate in zip((0, 1, 4, 8, 9, 12), expected, strict=True):
        assert rate is None or learning_rate(optim, batch, step, 4, 16) == pytest.approx(rate, rel=1e-15), step


def test_a_run_says_its_scaled_rate() -> None:
    assert describe(Optim(lr=8.0), 40) is None
    assert describe(Optim(**LINEAR), 40) == "learning rate 32: optim.lr = 8 for 10 samples, and batches are of 40"
    warm = describe(Optim(**LINEAR, schedule=Schedule(warmup_epochs=1)), 25)
    assert warm == "learning rate 20: optim.lr = 8 for 10 samples, and batches are of 25, warmed up from 8"
