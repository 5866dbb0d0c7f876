"""Adam, LARS and LAMB against PyTorch, against their papers' formulas, and their norms of tensors cut over ranks."""

from __future__ import annotations

import math
import os
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
from allocations import peak

from hpctrain import backends
from hpctrain.backends.base import Backend
from hpctrain.config import Optim
from hpctrain.optim import LAMB, LARS, TABLE, Block, Shard
from hpctrain.optim.clip import clip_factor

SHARDS = [Shard(0, 0, slice(0, 41), True), Shard(1, 0, slice(41, 60), True), Shard(2, 0, slice(60, 67), False)]
"""Three parameters in flat buffers of 67."""
RATES = (0.1, 0.1, 0.05, 0.2, 0.1, 0.01, 0.1, 0.1, 0.3, 0.1)


def trained(backend: Backend, config: Optim, seed: int, dtype: str = "float64") -> tuple[list[np.ndarray], Any]:
    """The weights at the start and after each of ten steps, and the optimizer."""
    rng = np.random.default_rng(seed)
    weights, gradients = rng.normal(size=67).astype(dtype), np.zeros(67, dtype)
    optimizer = TABLE[config.name]([Block(weights, gradients)], SHARDS, backend, config)
    found = [weights.copy()]
    for number, lr in enumerate(RATES):
        gradients[...] = gradient(seed, number)
        optimizer.step(lr)
        found.append(weights.copy())
    return found, optimizer


def gradient(seed: int, number: int) -> np.ndarray:
    """Of a step; sizes differ by orders of magnitude from element to element, and some are 0."""
    rng = np.random.default_rng([seed, number])
    return rng.normal(size=67) * 10.0 ** rng.integers(-6, 3, 67) * (rng.random(67) > 0.1)


# --- Adam -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.03])
def test_ten_steps_of_adam_equal_pytorch(backend: Backend, decoupled: bool, decay: float, seed: int) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is what is compared with: pip install '.[oracle]'")
    config = Optim(
        name="adam", lr=1.0, beta1=0.8, beta2=0.99, weight_decay=decay, decoupled_decay=decoupled and decay > 0
    )
    found, _ = trained(backend, config, seed)
    parameters = [torch.tensor(found[0][shard.where], requires_grad=True) for shard in SHARDS]
    groups = [
        {"params": [p], "weight_decay": decay if s.decay else 0.0} for p, s in zip(parameters, SHARDS, strict=True)
    ]
    theirs = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups, betas=(0.8, 0.99), eps=1e-8)
    for number, lr in enumerate(RATES):
        for group, parameter, shard in zip(theirs.param_groups, parameters, SHARDS, strict=True):
            group["lr"], parameter.grad = lr, torch.tensor(gradient(seed, number)[shard.where])
        theirs.step()
        expected = np.concatenate([p.detach().numpy() for p in parameters])
        np.testing.assert_allclose(found[number + 1], expected, rtol=1e-12, atol=1e-12)


def test_first_step_of_adam_is_the_rate_in_the_direction_of_the_sign(backend: Backend) -> None:
    """Both means are corrected for their start at 0, so that their quotient is g / |g|, whatever the betas."""
    weights, gradients = np.zeros(5), np.array([3.0, -1e-3, 1e4, -7.0, 0.0])
    adam = TABLE["adam"](
        [Block(weights, gradients)], [Shard(0, 0, slice(0, 5), True)], backend, Optim(name="adam", lr=1.0, eps=1e-15)
    )
    adam.step(0.25)
    np.testing.assert_allclose(weights, -0.25 * np.sign(gradients), rtol=1e-9)
    assert adam.updates == 1


def test_adam_in_float32_follows_float64(backend: Backend, seed: int) -> None:
    config = Optim(name="adam", lr=1.0, weight_decay=0.03)
    exact, _ = trained(backend, config, seed)
    found, adam = trained(backend, config, seed, "float32")
    assert found[-1].dtype == adam.state["mean"].dtype == adam.state["square"].dtype == np.float32
    # ten steps, each of about ten roundings of a step of length about 1
    np.testing.assert_allclose(found[-1], exact[-1], rtol=0, atol=100 * float(np.finfo(np.float32).eps))


# --- LARS -------------------------------------------------------------------------------------------------------------


def test_ten_steps_of_lars_equal_the_paper(backend: Backend, seed: int) -> None:
    """Algorithm 1 of You, Gitman & Ginsburg 2017, parameter by parameter; what does not decay has the global rate."""
    eta, momentum, decay = 0.02, 0.9, 0.01
    config = Optim(name="lars", lr=1.0, momentum=momentum, weight_decay=decay, trust_coefficient=eta)
    found, _ = trained(backend, config, seed)
    for shard in SHARDS:
        w = found[0][shard.where].tolist()
        velocity = [0.0] * len(w)
        for number, lr in enumerate(RATES):
            g = gradient(seed, number)[shard.where].tolist()
            beta = decay if shard.decay else 0.0
            norm_w, norm_g = sum(a * a for a in w) ** 0.5, sum(a * a for a in g) ** 0.5
            local = eta * norm_w / (norm_g + beta * norm_w) if shard.decay else 1.0
            velocity = [momentum * v + lr * local * (a + beta * b) for v, a, b in zip(velocity, g, w, strict=True)]
            w = [b - v for b, v in zip(w, velocity, strict=True)]
            np.testing.assert_allclose(found[number + 1][shard.where], w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero", ["weights", "gradients"])
def test_lars_does_not_get_stuck_at_zero(backend: Backend, zero: str) -> None:
    weights, gradients = np.ones(4), np.ones(4)
    {"weights": weights, "gradients": gradients}[zero].fill(0)
    before = weights.copy()
    config = Optim(name="lars", lr=1.0, weight_decay=0.5)
    LARS([Block(weights, gradients)], [Shard(0, 0, slice(0, 4), True)], backend, config).step(0.25)
    np.testing.assert_array_equal(weights, before - 0.25 * (gradients + 0.5 * before))


class FakeRanks:
    """An Allgather in which this rank is the last of `others` + 1."""

    def __init__(self, others: list[np.ndarray]) -> None:
        self.others, self.size, self.calls = others, len(others) + 1, 0

    def Allgather(self, mine: np.ndarray, every: np.ndarray) -> None:
        every[:-1], every[-1] = self.others, mine
        self.calls += 1


def test_norms_are_of_global_tensors_with_each_shard_counted_once(backend: Backend) -> None:
    """Of two parameters this rank holds a part of the first and a copy, that another rank counts, of the second."""
    weights, gradients = np.array([3.0, 0.0, 5.0]), np.array([0.0, 4.0, 12.0])
    shards = [Shard(0, 0, slice(0, 2), True, True), Shard(1, 0, slice(2, 3), True, False)]
    comm = FakeRanks([np.array([[16.0, 9.0], [25.0, 144.0]])])
    config = Optim(name="lars", lr=1.0, trust_coefficient=0.5)
    LARS([Block(weights, gradients)], shards, backend, config, comm).step(1.0)  # type: ignore[arg-type]
    # |w| = 5, |g| = 5: rate 1/2; |w| = 5, |g| = 12: rate 5/24
    np.testing.assert_allclose(weights, [3.0, -2.0, 5.0 - 2.5], rtol=1e-15)
    assert comm.calls == 1


# --- LAMB -------------------------------------------------------------------------------------------------------------


def test_ten_steps_of_lamb_equal_the_paper(backend: Backend, seed: int) -> None:
    """Algorithm 2 of You et al. 2020, parameter by parameter; what does not decay takes Adam's step."""
    beta1, beta2, eps, decay = 0.8, 0.99, 1e-3, 0.05
    config = Optim(name="lamb", lr=1.0, beta1=beta1, beta2=beta2, eps=eps, weight_decay=decay)
    found, _ = trained(backend, config, seed)
    for shard in SHARDS:
        x = found[0][shard.where].tolist()
        m, v = [0.0] * len(x), [0.0] * len(x)
        for t, lr in enumerate(RATES, 1):
            g = gradient(seed, t - 1)[shard.where].tolist()
            m = [a + (1 - beta1) * (b - a) for a, b in zip(m, g, strict=True)]
            v = [a + (1 - beta2) * (b * b - a) for a, b in zip(v, g, strict=True)]
            r = [a / (1 - beta1**t) / ((b / (1 - beta2**t)) ** 0.5 + eps) for a, b in zip(m, v, strict=True)]
            if shard.decay:
                u = [a + decay * b for a, b in zip(r, x, strict=True)]
                lr *= math.hypot(*x) / math.hypot(*u)
            else:
                u = r
            x = [a - lr * b for a, b in zip(x, u, strict=True)]
            np.testing.assert_allclose(found[t][shard.where], x, rtol=1e-11, atol=1e-11)


def test_first_step_of_lamb_by_hand(backend: Backend) -> None:
    """Adam's first direction is the sign of the gradient."""
    cases = (
        # |w| = 5 and |u| = 2: steps of 0.5 * 5 / 2
        (0.0, [1.0, -2.0, 2.0, -4.0], [1e-2, 3.0, -20.0, 1e3], [-0.25, -3.25, 3.25, -5.25]),
        # u = (1 + 1, -1 + 1, 2 + 0, 1 + 0), so that |w| = sqrt(7) and |u| = 3
        (1.0, [1.0, -1.0, 2.0, 1.0], [7.0, 5.0, 0.0, 0.0], 0.5 * math.sqrt(7) / 3 * np.array([-2, 0, -2, -1])),
    )
    for decay, start, gradients, expected in cases:
        weights = np.array(start)
        config = Optim(name="lamb", lr=1.0, eps=1e-15, weight_decay=decay)
        shards = [Shard(0, 0, slice(0, 4), True)]
        LAMB([Block(weights, np.array(gradients))], shards, backend, config).step(0.5)
        np.testing.assert_allclose(weights, expected if decay == 0 else start + expected, rtol=1e-12)


@pytest.mark.parametrize("zero", ["weights", "gradients"])
def test_lamb_does_not_get_stuck_at_zero(backend: Backend, zero: str) -> None:
    weights, gradients = np.ones(4), np.ones(4)
    {"weights": weights, "gradients": gradients}[zero].fill(0)
    expected = weights - 0.25 * gradients  # a ratio of 1 times a direction of 1, or a direction of 0
    config = Optim(name="lamb", lr=1.0, eps=1e-15)
    LAMB([Block(weights, gradients)], [Shard(0, 0, slice(0, 4), True)], backend, config).step(0.25)
    np.testing.assert_allclose(weights, expected, rtol=1e-12)


def test_norms_of_lamb_are_of_global_tensors_with_each_shard_counted_once(backend: Backend) -> None:
    """This rank holds two pieces of the first parameter, and of the second a copy that another rank counts."""
    weights, gradients = np.array([3.0, 0.0, 5.0]), np.array([0.01, -4.0, 12.0])
    shards = [Shard(0, 0, slice(0, 1), True), Shard(0, 0, slice(1, 2), True), Shard(1, 0, slice(2, 3), True, False)]
    comm = FakeRanks([np.array([[16.0, 7.0], [25.0, 1.0]])])
    config = Optim(name="lamb", lr=1.0, eps=1e-15)
    LAMB([Block(weights, gradients)], shards, backend, config, comm).step(0.3)  # type: ignore[arg-type]
    # |w| = 5 and |u| = 3, as the other rank has 7 of 9; then 5 and 1
    np.testing.assert_allclose(weights, [2.5, 0.5, 3.5], rtol=1e-12)
    assert comm.calls == 1


# --- clipping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.5, 3.0, 1e9])
def test_clipping_equals_pytorch(limit: float, seed: int) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is what is compared with: pip install '.[oracle]'")
    arrays = [np.random.default_rng([seed, size]).normal(size=size) for size in (3, 41, 7)]
    theirs = [torch.zeros(a.size, requires_grad=True, dtype=torch.float64) for a in arrays]
    for parameter, a in zip(theirs, arrays, strict=True):
        parameter.grad = torch.tensor(a)
    norm = torch.nn.utils.clip_grad_norm_(theirs, limit).item()
    factor = clip_factor(sum(float(a @ a) for a in arrays), limit)
    assert norm == pytest.approx(math.hypot(*np.concatenate(arrays)))
    for parameter, a in zip(theirs, arrays, strict=True):
        # theirs is longer by 1e-6 in the divisor
        np.testing.assert_allclose(factor * a, parameter.grad.numpy(), rtol=2e-6)
    assert (factor == 1.0) == (limit > norm)


def test_clipping_leaves_alone_what_is_within_and_what_is_broken() -> None:
    assert clip_factor(25.0, 2.5) == 0.5
    assert [clip_factor(square, 5.0) for square in (0.0, 24.9, 25.0)] == [1.0] * 3
    assert [clip_factor(square, 5.0) for square in (math.nan, math.inf)] == [1.0] * 2


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_state_and_count_are_all_that_a_run_must_keep(backend: Backend, name: str, seed: int) -> None:
    """An optimizer made anew goes on with the same bits, given the weights, the arrays and the number of updates."""
    config = Optim(name=name, lr=1.0, weight_decay=0.01)  # type: ignore[arg-type]
    whole, _ = trained(backend, config, seed)
    weights, gradients = whole[0].copy(), np.zeros(67)
    old = TABLE[name]([Block(weights, gradients)], SHARDS, backend, config)
    for number, lr in enumerate(RATES):
        new = TABLE[name]([Block(weights, gradients)], SHARDS, backend, config)
        assert new.state.keys() == old.state.keys()
        for key, array in new.state.items():
            array[...] = old.state[key]
        new.updates = old.updates
        gradients[...] = gradient(seed, number)
        new.step(lr)
        np.testing.assert_array_equal(weights, whole[number + 1])
        old = new
    assert old.updates == len(RATES)


@pytest.mark.parametrize("name", TABLE)
def test_no_weights_is_no_trouble(backend: Backend, name: str) -> None:
    config = Optim(name=name, lr=0.5)  # type: ignore[arg-type]
    TABLE[name]([Block(np.zeros(0), np.zeros(0))], [], backend, config).step(0.5)
    TABLE[name]([Block(np.zeros(0), np.zeros(0))], [Shard(0, 0, slice(0, 0), True)], backend, config).step(0.5)


@pytest.mark.skipif(os.environ.get("HPCTRAIN_NATIVE") == "0", reason="installed without compiled kernels")
@pytest.mark.parametrize("name", TABLE)
def test_nothing_large_is_allocated_after_the_first_step(name: str) -> None:
    size, config = 1_000_003, Optim(name=name, lr=0.5, weight_decay=0.1)  # type: ignore[arg-type]
    block = Block(np.ones(size, np.float32), np.ones(size, np.float32))
    shards = [Shard(0, 0, slice(0, 900_001), True), Shard(1, 0, slice(900_001, size), False)]
    optimizer = TABLE[name]([block], shards, backends.get("native"), config)
    optimizer.step(0.5)
    assert peak(lambda: optimizer.step(0.5)) < 0.05 * block.weights.nbytes


@pytest.mark.parametrize("name", TABLE)
def test_memory_is_what_the_optimizer_says(name: str) -> None:
    size, config = 100_003, Optim(name=name, lr=0.5)  # type: ignore[arg-type]
    block = Block(np.ones(size, np.float32), np.ones(size, np.float32))
    made: list[Any] = []
    shards = [Shard(0, 0, slice(0, size), True)]
    found = peak(lambda: made.append(TABLE[name]([block], shards, backends.get("reference"), config)))
    assert found == pytest.approx(TABLE[name].arrays * block.weights.nbytes, rel=0.1)


def test_table_has_what_the_config_takes() -> None:
    assert tuple(TABLE) == get_args(get_type_hints(Optim)["name"])
