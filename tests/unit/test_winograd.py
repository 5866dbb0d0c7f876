"""Winograd's convolution on every instruction set, against `reference` in float64; its tiles, threads and refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain.backends.native import Native
from hpctrain.backends.reference import Reference

pytestmark = pytest.mark.skipif(
    os.environ.get("HPCTRAIN_NATIVE") == "0", reason="HPCTRAIN_NATIVE=0: installed without compiled kernels"
)

EPS = float(np.finfo(np.float32).eps)
AMPLIFICATION = {(3, 4): 2.0, (3, 6): 7.2, (5, 6): 9.7, (5, 8): 36.0}
"""By edges of kernel and tile: how much more than a direct convolution Winograd's rounds, see winograd_transform.h."""


@pytest.fixture(scope="module")
def kernels() -> Any:
    """The compiled module."""
    import hpctrain._native

    return hpctrain._native


@pytest.fixture(params=["avx512", "avx2", "portable"])
def engine(request: pytest.FixtureRequest, kernels: Any) -> Iterator[Any]:
    """The compiled module, using one instruction set."""
    if request.param not in kernels.isas():
        pytest.skip(f"this machine has no {request.param}")
    kernels.select_isa(request.param)
    yield kernels
    kernels.select_isa("")


def arrays(
    rng: np.random.Generator,
    outputs: tuple[int, ...],
    channels: int,
    filters: int,
    samples: int = 1,
    groups: int = 1,
    edge: int = 3,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and dy in float32: x and dy are inside of larger arrays, w is a slice of channels and filters."""
    kernel = (3,) * (len(outputs) - 2) + (edge, edge)

    def inside(*shape: int) -> np.ndarray:
        whole = rng.standard_normal([n + 2 for n in shape[:-1]] + [shape[-1]]).astype(np.float32)
        return whole[tuple(slice(1, 1 + n) for n in shape[:-1])]

    x = inside(samples, *(n + k - 1 for n, k in zip(outputs, kernel, strict=True)), channels * groups)
    dy = inside(samples, *outputs, filters * groups)
    w = rng.standard_normal((*kernel, channels + 3, filters * groups + 1)).astype(np.float32)
    return x, w[..., 2:-1, 1:], dy


def error(got: np.ndarray, want: np.ndarray) -> float:
    """max|got - want| / max|want|."""
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30)) if want.size else 0.0


def bound(terms: int, run: int, edges: tuple[int, int] = (3, 6)) -> float:
    """Of `error`, where in the transformed domain so many terms are summed up: runs of so many, then the runs."""
    return AMPLIFICATION[edges] * EPS / 2 * (32 + min(terms, run) + terms / run) ** 0.5


def results(
    kernels: Any, x: Any, w: Any, dy: Any, groups: int = 1, anchor: tuple[int, ...] = (0, 0)
) -> list[np.ndarray]:
    """y, dx and dw; what stood there before does not matter."""
    y, dx, dw = (np.full(a.shape, np.nan, np.float32) for a in (dy, x, w))
    kernels.winograd_conv(x, w, y, groups, anchor=anchor)
    kernels.winograd_dx(dy, w, dx, groups, anchor=anchor)
    kernels.winograd_dw(x, dy, dw, groups, anchor=anchor)
    return [y, dx, dw]


def references(x: Any, w: Any, dy: Any, groups: int = 1) -> list[np.ndarray]:
    """y, dx and dw in float64."""
    x, w, dy = (a.astype(float) for a in (x, w, dy))
    y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
    ones, reference = (1,) * (x.ndim - 2), Reference()
    reference.conv(x, w, y, ones, ones, groups)
    reference.conv_dx(dy, w, dx, ones, ones, groups)
    reference.conv_dw(x, dy, dw, ones, ones, groups)
    return [y, dx, dw]


def check(kernels: Any, x: Any, w: Any, dy: Any, groups: int = 1, anchor: tuple[int, ...] = (0, 0)) -> None:
    """All three passes against float64."""
    edge, taps = w.shape[-3], int(np.prod(w.shape[:-4]))
    edges = (edge, anchor[2] if len(anchor) == 3 else 6)
    channels, filters, tile = w.shape[-2], w.shape[-1] // groups, edges[1] + 1 - edge
    tiles = int(np.prod(dy.shape[:-3])) * -(-dy.shape[-3] // tile) * -(-dy.shape[-2] // tile)
    bounds = (bound(taps * channels, 64, edges), bound(taps * filters, 64, edges), bound(tiles, 256, edges))
    found, wanted = results(kernels, x, w, dy, groups, anchor), references(x, w, dy, groups)
    for name, got, want, limit in zip(("y", "dx", "dw"), found, wanted, bounds, strict=True):
        wrong = error(got, want)
        most = 3e-5 if name == "dw" and edges == (5, 8) else 1e-5  # never chosen but by an anchor
        assert wrong <= min(limit, most), f"{name} of {x.shape} by {w.shape}: {wrong:.2g}, more than {limit:.2g}"


def test_random_geometries(engine: Any) -> None:
    seed, cases = 11, 90
    rng = np.random.default_rng(seed)
    print(f"seed {seed}, {cases} cases")
    for _ in range(cases):
        dims = int(rng.integers(2, 4))
        outputs = tuple(int(n) for n in rng.integers(1, 15 if dims == 2 else 8, dims))
        channels, filters = (int(n) for n in rng.choice([1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 33, 48, 70, 130], 2))
        samples, groups = int(rng.integers(1, 4)), int(rng.choice([1, 1, 1, 2, 3]))
        edge = int(rng.choice([3, 3, 5]))
        points = int(rng.choice([4, 6] if edge == 3 else [6, 8]))
        height, width = (int(a) for a in rng.integers(0, points + 1 - edge, 2))
        check(engine, *arrays(rng, outputs, channels, filters, samples, groups, edge), groups, (height, width, points))


@pytest.mark.parametrize(
    ("size", "channels", "filters", "samples", "edges"),
    [
        *((32, 64, 64, 2, (3, 6)), (16, 128, 128, 2, (3, 6)), (8, 256, 256, 4, (3, 6)), (4, 512, 512, 8, (3, 6))),
        *((13, 192, 384, 2, (3, 6)), (4, 512, 300, 70, (3, 6)), (2, 512, 512, 16, (3, 4))),
        *((27, 64, 192, 2, (5, 6)), (27, 64, 192, 2, (5, 8))),
    ],
)
def test_layers_of_networks_are_accurate(
    engine: Any, size: int, channels: int, filters: int, samples: int, edges: tuple[int, int]
) -> None:
    given = arrays(np.random.default_rng(3), (size, size), channels, filters, samples, 1, edges[0])
    check(engine, *given, anchor=(0, 0, edges[1]))


def test_more_planes_than_a_block_has(engine: Any) -> None:
    check(engine, *arrays(np.random.default_rng(4), (37, 6, 5), 5, 18, 1, 1))


@pytest.mark.parametrize("anchor", [(0, 0), (3, 1)])
def test_empty_dims(engine: Any, anchor: tuple[int, int]) -> None:
    rng = np.random.default_rng(5)
    for channels, filters in ((0, 3), (3, 0), (0, 0)):
        check(engine, *arrays(rng, (5, 6), channels, filters, 2, 1), anchor=anchor)


def test_bias_and_what_stands_there_are_added(engine: Any) -> None:
    rng = np.random.default_rng(6)
    for filters in (5, 16, 21):
        x, w, dy = arrays(rng, (6, 9), 7, filters, 2, 1)
        bias, before = rng.standard_normal((2, filters)).astype(np.float32), dy.copy()
        out = dy.copy()
        engine.winograd_conv(x, w, out, bias=bias[0], accumulate=True)
        want = references(x, w, dy)[0] + bias[0] + before
        assert error(out, want) < bound(7, 64)


def test_writes_nothing_else(engine: Any) -> None:
    """Between the rows and channels of strided outputs, and beside them, everything stays as it was."""
    rng = np.random.default_rng(7)
    x, w, dy = arrays(rng, (6, 7), 5, 3, 2, 1)
    for name, given, like in (("conv", (x, w), dy), ("dx", (dy, w), x), ("dw", (x, dy), w)):
        whole = np.full([n + 2 for n in like.shape], 7, np.float32)
        inner = tuple(slice(1, n + 1) for n in like.shape)
        getattr(engine, f"winograd_{name}")(*given, whole[inner])
        untouched = np.ones(whole.shape, bool)
        untouched[inner] = False
        assert (whole[untouched] == 7).all()
        assert not (whole[inner] == 7).any()


def test_a_cut_image_has_the_rounding_of_the_whole_one(engine: Any) -> None:
    """With tiles where the whole image has them, outputs of tiles that are not cut are the same bits."""
    x, w, dy = arrays(np.random.default_rng(8), (19, 21), 9, 20, 1, 1)
    whole, below = np.empty_like(dy), np.empty_like(dy[:, 6:])
    engine.winograd_conv(x, w, whole)
    engine.winograd_conv(x[:, 6:], w, below, anchor=(6 % 4, 0))
    assert np.array_equal(below[:, 2:], whole[:, 8:])
    assert error(below, whole[:, 6:]) < 1e-6


def test_nan_reaches_the_outputs_that_see_it(engine: Any) -> None:
    x, w, dy = arrays(np.random.default_rng(9), (9, 9), 4, 4, 2, 1)
    x[1, 4, 4, 0] = np.nan
    out = np.zeros_like(dy)
    engine.winograd_conv(x, w, out)
    assert np.isnan(out[1, 2:5, 2:5]).all()
    assert np.isfinite(out[0]).all()


@pytest.mark.parametrize(
    ("size", "channels", "filters", "kernel", "stride"),
    [((115, 118), 3, 64, 11, 4), ((61, 64), 8, 40, 5, 2), ((60, 51), 2, 48, 6, 2), ((70, 66), 2, 33, 9, 2)],
)
def test_strided_convolutions_of_few_channels(
    engine: Any, size: tuple[int, int], channels: int, filters: int, kernel: int, stride: int
) -> None:
    """Their last phases lack a row or channels of the last column, or do not; other bits than the direct one's."""
    rng = np.random.default_rng(13)
    x = rng.standard_normal((4, size[0] + 2, size[1] + 2, channels)).astype(np.float32)[:, 1:-1, 1:-1]
    w = rng.standard_normal((kernel, kernel, channels, filters + 1)).astype(np.float32)[..., 1:]
    dy = rng.standard_normal((4, *((n - kernel) // stride + 1 for n in size), filters)).astype(np.float32)
    steps, ones, reference = (stride, stride), (1, 1), Reference()
    for name, given, like in (("conv", (x, w), dy), ("conv_dw", (x, dy), w)):
        got, direct, want = np.full_like(like, np.nan), np.empty_like(like), np.empty(like.shape)
        getattr(engine, name)(*given, got, steps, ones, 1)
        getattr(engine, name)(*given, direct, steps, ones, 1, exact=True)
        getattr(reference, name)(*(a.astype(float) for a in given), want, steps, ones, 1)
        assert not np.array_equal(got, direct), name
        assert error(got, want) < 1e-5, name
        assert error(direct, want) < 2e-6, name


@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_share_the_tiles(kernels: Any, threads: int, tmp_path: Path) -> None:
    """Shares that begin inside of an image, shares of planes, more threads than tiles; and the same bits twice."""
    script, saved = tmp_path / "threads.py", tmp_path / "found.npz"
    script.write_text(
        "import sys, numpy as np, hpctrain._native as kernels\n"
        "given, saved = np.load(sys.argv[1]), {}\n"
        "for name in {key[1:] for key in given}:\n"
        "    x, w, dy = (given[kind + name] for kind in 'xwd')\n"
        "    at = (0, 0, 4 if name == 'small' else 8 if name == 'seams' else 6)\n"
        "    for time in '01':\n"
        "        y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)\n"
        "        kernels.winograd_conv(x, w, y, anchor=at), kernels.winograd_dx(dy, w, dx, anchor=at)\n"
        "        kernels.winograd_dw(x, dy, dw, anchor=at)\n"
        "        saved |= {kind + name + time: a for kind, a in zip(('y', 'dx', 'dw'), (y, dx, dw))}\n"
        "np.savez(sys.argv[2], **saved)\n"
    )
    rng = np.random.default_rng(12)
    shapes = {
        "rows": ((50, 9), 5, 20, 1),
        "planes": ((60, 5, 6), 3, 4, 1),
        "weights": ((4, 4), 256, 300, 9),
        "few": ((4, 3), 2, 3, 1),
        "units": ((31, 30), 256, 192, 2),
        "seams": ((13, 9), 5, 20, 1, 1, 5),
        "small": ((2, 2), 5, 20, 7),
    }
    cases = {name: arrays(rng, *shape) for name, shape in shapes.items()}
    given = {kind + name: a for name, case in cases.items() for kind, a in zip("xwd", case, strict=True)}
    np.savez(tmp_path / "given.npz", **given)
    subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path / "given.npz"), str(saved)],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
    )
    found = np.load(saved)
    for name, case in cases.items():
        for kind, want in zip(("y", "dx", "dw"), references(*case), strict=True):
            assert np.array_equal(found[f"{kind}{name}0"], found[f"{kind}{name}1"]), (name, kind)
            assert error(found[f"{kind}{name}0"], want) < 1e-5, (name, kind)


def test_what_does_not_fit_is_refused(kernels: Any) -> None:
    x, y = np.ones((1, 8, 8, 4), np.float32), np.ones((1, 4, 4, 4), np.float32)
    with pytest.raises(ValueError, match=r"winograd_conv: .* takes kernels 3 x 3 and 5 x 5"):
        kernels.winograd_conv(x, np.ones((7, 7, 4, 4), np.float32), y[:, :2, :2])
    y = np.ones((1, 6, 6, 4), np.float32)
    with pytest.raises(ValueError, match="anchor needs two numbers from 0 to 3"):
        kernels.winograd_conv(x, np.ones((3, 3, 4, 4), np.float32), y, anchor=(4, 0))
    with pytest.raises(ValueError, match="points of a tile per dim: 4 or 6"):
        kernels.winograd_conv(x, np.ones((3, 3, 4, 4), np.float32), y, anchor=(0, 0, 8))


def test_native_uses_it_unless_exact() -> None:
    """64 channels pay everywhere, one channel nowhere: there exact and not exact are the same bits."""
    for channels, same in ((64, False), (1, True)):
        x, w, dy = arrays(np.random.default_rng(10), (16, 16), channels, channels, 1, 1)
        found = []
        for backend in (Native(), Native(exact=True)):
            y, dx, dw = np.empty_like(dy), np.empty_like(x), np.empty_like(w)
            backend.conv(x, w, y, (1, 1), (1, 1))
            backend.conv_dx(dy, w, dx, (1, 1), (1, 1))
            backend.conv_dw(x, dy, dw, (1, 1), (1, 1))
            found.append((y, dx, dw))
        for one, other, want in zip(*found, references(x, w, dy), strict=True):
            assert np.array_equal(one, other) == same
            assert max(error(one, want), error(other, want)) < 1e-5
