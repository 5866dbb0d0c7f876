"""Random layers against PyTorch in float64: outputs, gradients of inputs and weights, running statistics, mean losses.

Sizes are drawn by properties.py, as for the comparison of plans; here everything is on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import hypothesis
import numpy as np
import pytest
from geometry import Drawn
from hypothesis import strategies as st
from ops import Bound, alone, random_weights
from oracle import LOSSES, ORACLES, SEVERAL, F, Tensor, comparable, first, last, torch
from properties import GEOMETRIES

from hpctrain.layers import BatchNorm, BCEWithLogits, Dice, Dropout, Layer, Loss, Phase
from hpctrain.layers.loss import LOSS, WEIGHT
from hpctrain.partition import Shape, extent, whole, within
from hpctrain.regions import Wanted

CASES = dict.fromkeys(GEOMETRIES, 10) | {"conv": 30, "transposed conv": 30, "max pool": 50, "avg pool": 50}
"""Cases of each kind."""
LEAST = 200
WITHOUT = (Dropout,)
"""Layers that PyTorch computes otherwise: from random numbers of its own."""

TOLERANCE = 1e-9
"""Absolute, of results divided by the largest element if that is above 1. Both sides add up to about 1e3 terms of order
1 in different orders, which errs by at most 1e3 * 2**-53 = 1e-13. A norm, and its gradient, divide that by the standard
deviation, sqrt(eps) = 3e-3 at least: twice in a row, and their results are as large. A wrong term is of order 1e-2."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- ours ---------------------------------------------------------------------------------------------------------


def assembled(want: Wanted, x: np.ndarray, fill: float) -> np.ndarray:
    """What one rank wants of `x`, beyond its borders too."""
    box = want.box(0)
    block = np.full(extent(box), fill, x.dtype)
    for share in want.shares(0, whole(x.shape)):
        flips = tuple(slice(None, None, -1 if flipped else 1) for flipped in share.flipped)
        block[within(share.target, box)] = x[share.source][flips]
    return block


def returned(want: Wanted, block: np.ndarray, shape: Shape) -> np.ndarray:
    """The adjoint of `assembled`."""
    dx = np.zeros(shape)
    for share in want.shares(0, whole(shape)):
        flips = tuple(slice(None, None, -1 if flipped else 1) for flipped in share.flipped)
        dx[share.source] += block[within(share.target, want.box(0))][flips]
    return dx


def drawn_inputs(layer: Layer, shapes: tuple[Shape, ...], rng: np.random.Generator) -> list[np.ndarray]:
    """Numbers of order 1; labels, some of them ignored; targets from 0 to 1 where they are probabilities."""
    xs = [rng.normal(size=shape) for shape in shapes]
    if isinstance(layer, Loss):
        if len(shapes[1]) < len(shapes[0]):
            xs[1] = rng.integers(0, shapes[0][-1], shapes[1])
        elif isinstance(layer, BCEWithLogits | Dice):
            xs[1] = rng.uniform(size=shapes[1])
        if layer.ignore is not None:
            xs[1][rng.random(shapes[1]) < 0.3] = layer.ignore
    return xs


def compare(what: str, found: np.ndarray, expected: Tensor) -> None:
    """To TOLERANCE."""
    theirs = expected.detach().numpy()
    assert found.shape == theirs.shape, f"{what}: {found.shape}, PyTorch {theirs.shape}"
    scale = max(1.0, float(np.abs(theirs).max(initial=0)))
    np.testing.assert_allclose(found, theirs, rtol=0, atol=TOLERANCE * scale, err_msg=what)


def check(layer: Layer, shapes: tuple[Shape, ...], seed: int) -> None:
    """Output and all gradients of `layer`, for random inputs, weights and output gradients."""
    rng = np.random.default_rng(seed)
    place, xs = alone(layer, *shapes), drawn_inputs(layer, shapes, rng)
    weights = random_weights(place, rng)
    theirs = [torch.tensor(x, requires_grad=x.dtype.kind == "f") for x in xs]
    w = {name: torch.tensor(weights[name], requires_grad=True) for name in place.weights}
    if isinstance(layer, Loss):
        expected = LOSSES[type(layer)](layer, *theirs, "none").reshape(shapes[0][0], -1).sum(dim=1)
    elif type(layer) in SEVERAL:
        expected = SEVERAL[type(layer)](layer, theirs)
    else:
        expected = ORACLES[type(layer)](layer, *theirs, w)

    bound = Bound(place, 0, weights)
    blocks = [assembled(want, x, layer.fill) for want, x in zip(place.inputs, xs, strict=True)]
    y = bound.compute(blocks)
    dy = rng.normal(size=y.shape)
    if isinstance(layer, Loss):
        compare("loss", y[:, LOSS], expected)
        if y[:, WEIGHT].sum() > 0:
            mean = LOSSES[type(layer)](layer, *theirs, "mean")
            compare("mean loss", np.array(y[:, LOSS].sum() / y[:, WEIGHT].sum()), mean)
        dy[:, LOSS + 1 :] = 0
        expected.backward(torch.tensor(dy[:, LOSS]))
    else:
        compare("output", y, expected)
        expected.backward(torch.tensor(dy))
    dxs = [np.full(block.shape, np.nan) if x.requires_grad else None for block, x in zip(blocks, theirs, strict=True)]
    dws = {name: np.full(weights[name].shape, np.nan) for name in w}
    bound.op.backward(dy, bound.w, dxs, dws)
    for slot, (dx, want, x) in enumerate(zip(dxs, place.inputs, theirs, strict=True)):
        if dx is not None:
            compare(f"gradient of input {slot}", returned(want, dx, tuple(x.shape)), x.grad)
    for name, dw in dws.items():
        compare(f"gradient of {name}", dw, w[name].grad)
    if isinstance(layer, BatchNorm):
        check_running(layer, bound, blocks, weights)


def check_running(layer: BatchNorm, bound: Bound, blocks: list[np.ndarray], before: dict[str, np.ndarray]) -> None:
    """The statistics after the training step, of all groups together, and what evaluation makes of them."""
    x = torch.tensor(blocks[0])
    x = first(x) if x.ndim > 2 else x
    mean, var = (torch.tensor(before[name]) for name in ("running_mean", "running_var"))
    F.batch_norm(x, mean, var, None, None, True, layer.momentum, layer.eps)
    compare("running mean", bound.w["running_mean"], mean)
    compare("running variance", bound.w["running_var"], var)
    gamma, beta = (torch.tensor(before[name]) for name in ("gamma", "beta"))
    expected = F.batch_norm(x, mean, var, gamma, beta, False, 0.0, layer.eps)
    compare("evaluation", bound.compute(blocks, Phase(training=False)), last(expected) if x.ndim > 2 else expected)


@pytest.mark.parametrize("kind", [kind for kind, (layer, _) in GEOMETRIES.items() if layer not in WITHOUT])
def test_layer_equals_pytorch(kind: str, seed: int, record_property: Callable[[str, object], None]) -> None:
    compared: dict[str, bool] = {}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=3 * CASES[kind],  # some are drawn twice
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(GEOMETRIES[kind][1], st.integers(0, 2**16))
    def trial(drawn: Drawn, seed: int) -> None:
        layer, shapes = drawn
        hypothesis.assume(comparable(layer, shapes[0]))
        case = f"{drawn} {seed}"
        if compared.get(case, len(compared) >= CASES[kind]):
            return
        compared[case] = False
        check(layer, shapes, seed)
        compared[case] = True

    trial()
    assert all(compared.values())
    print(f"{kind}: {len(compared)} cases equal PyTorch's")
    record_property("cases", ("random layers equal PyTorch", kind, len(compared)))
    assert len(compared) == CASES[kind]


def test_cases_are_enough() -> None:
    kinds = [kind for kind, (layer, _) in GEOMETRIES.items() if layer not in WITHOUT]
    assert sum(CASES[kind] for kind in kinds) >= LEAST
    assert {layer for layer, _ in GEOMETRIES.values()} == {*ORACLES, *SEVERAL, *LOSSES, *WITHOUT}
