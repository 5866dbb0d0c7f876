"""What only the compiled backend promises: it says what it compiles, refuses misfits, and repeats its bits."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import Arrays

from hpctrain import backends
from hpctrain.backends import native
from hpctrain.backends.base import ACTIVATIONS, Backend
from hpctrain.backends.native import COMPILED, Native
from hpctrain.backends.reference import Reference
from hpctrain.errors import BackendUnavailable

pytestmark = pytest.mark.skipif(
    os.environ.get("HPCTRAIN_NATIVE") == "0", reason="HPCTRAIN_NATIVE=0: installed without compiled kernels"
)


def test_describe_says_what_computes_what() -> None:
    others = {"describe", "empty", "use_threads", "name", "dtypes"}
    operations = {name for name in vars(Backend) if not name.startswith("_")} - others
    ours = {name for name in operations if getattr(Native, name) is not getattr(Reference, name)}
    assert ours == set(COMPILED)
    compiled, inherited = Native().describe().split("; NumPy ")
    isa = native._import_kernels().isa()
    assert compiled == f"native: compiled kernels for {len(COMPILED)} operations, convolution with {isa}"
    gradients = ("_dx", "_dw")
    expected = sorted(name for name in operations - ours if not name.endswith(gradients))
    families, rest = inherited.split(" for ")[1].split(", convolution and ")
    assert sorted(families.split(", ")) == expected
    assert rest == "matrix products in float64, and normalization other than per channel"


def test_normalization_is_compiled_per_channel_and_numpy_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    native, compiled, by_numpy = Native(), [], []
    x, channel, sample = np.ones((3, 5, 4)), np.ones((3, 4)), np.ones((3, 3, 1, 1))

    class Kernels:
        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *arguments: compiled.append(name)

    monkeypatch.setattr(native, "_kernels", Kernels())
    names = ("moments", "normalize", "normalize_grad", "normalize_dx")
    for name in names:
        monkeypatch.setattr(Reference, name, lambda self, *arguments, name=name: by_numpy.append(name))
    for statistics in (channel, sample):
        native.moments(x, *statistics[:2])
        native.normalize(x, *statistics[:2], channel[0], channel[1], x)
        native.normalize_grad(x, x, *statistics[:2], *channel[:2])
        native.normalize_dx(x, x, *statistics[:2], channel[0], *statistics[1:], x)
    native.normalize_grad(x, x, *channel[:2], *sample[:2])
    assert (compiled, by_numpy) == ([*names], [*names, "normalize_grad"])


def test_missing_module_is_refused_with_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "hpctrain._native", None)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "hpctrain" / "backends" / "native.py"))
    with pytest.raises(BackendUnavailable, match=r"'native'.*`pip install \.`.*'reference'"):
        backends.get("native")
    (tmp_path / "setup.py").touch()  # the sources in the current folder stood before what is installed
    with pytest.raises(BackendUnavailable, match=r"'native'.*/hpctrain is a source folder.*`pip install -e \.`"):
        backends.get("native")


A = np.ones((3, 4), np.float32)
X, INDEX = np.ones((1, 3, 4, 2), np.float32), np.zeros((1, 3, 4, 2), np.int32)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n: n.add(A, A, A.astype(float)), TypeError, r"_native\.add: .*one type.*got float32, float32, float64"),
        (lambda n: n.add(A, A, A[:2].copy()), ValueError, r"add: .*one shape.*\(3, 4\) and \(2, 4\)"),
        (lambda n: n.relu([1.0], A), TypeError, r"relu: .*got <class 'list'>, float32"),
        (lambda n: n.relu(A, np.broadcast_to(A[0], (3, 4))), TypeError, r"relu: .*writeable"),
        (lambda n: n.relu(A.astype(">f4"), A), TypeError, r"relu: .*got >f4, float32"),
        (
            lambda n: n.bias_add(np.ones((4, 3), np.float32).T, A[0]),
            ValueError,
            r"bias_add: channels.*ascontiguousarray",
        ),
        (lambda n: n.bias_add(A, A[:, 0]), ValueError, r"bias_add: .*4 channels.*\(3\)"),
        (lambda n: n.moments(A, A[0], A[1]), TypeError, r"moments: .*statistics always float64"),
        (lambda n: n.sum_positions(A, A[:2].copy(), 1.0), ValueError, r"sum_positions: .*\(2, 4\) beside \(3, 4\)"),
        (lambda n: n.activate("gelu", A, A[:2].copy()), ValueError, r"activate: .*one shape.*\(3, 4\) and \(2, 4\)"),
        (
            lambda n: n.activate("gelu", A, A.astype(float)),
            TypeError,
            r"activate: .*got <class 'str'>, float32, float64",
        ),
        (lambda n: n.max_pool(X, X, X, (1, 1), (1, 1)), TypeError, r"max_pool: .*indices int32.*got float32, float32"),
        (
            lambda n: n.max_pool(X, X, INDEX, (2, 1), (1, 1)),
            ValueError,
            r"max_pool: .*\(1, 3, 4, 2\) do not give outputs",
        ),
        (lambda n: n.max_pool(X, X, INDEX[:0], (1, 1), (1, 1)), ValueError, r"max_pool: .*one shape.*\(0, 3, 4, 2\)"),
        (lambda n: n.max_pool(X, X, INDEX, (1, 1), (1, 0)), ValueError, r"max_pool: .*stride.* start at 1"),
        (lambda n: n.max_pool(X, X, INDEX, (1,), (1,)), ValueError, r"max_pool: .*one number per position dim"),
        (
            lambda n: n.max_pool(X.swapaxes(1, 3), X, INDEX, (1, 1), (1, 1)),
            ValueError,
            r"max_pool: channels.*ascontiguous",
        ),
        (lambda n: n.max_pool_dx(X[..., :1], INDEX, X, (1, 1), (1, 1)), ValueError, r"max_pool_dx: .*one shape"),
        (lambda n: n.sgd_update(A, A, A, 0.1, 0.9, 0.0, False), ValueError, r"sgd_update: 1D.*\(3, 4\)"),
        (lambda n: n.relu(np.ones((1,) * 8), np.ones((1,) * 8)), ValueError, r"relu: an array of 8 dims; .* to 7"),
    ],
)
def test_unfit_arrays(call: Callable[[Native], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(Native())


@pytest.mark.parametrize("channels", [1, 3, 64, 100])
def test_bits_do_not_depend_on_strides(channels: int, seed: int) -> None:
    native, rng = Native(), np.random.default_rng(seed)
    values = rng.standard_normal((2, 5, 13, 17, channels)).astype(np.float32)
    results = []
    for strided in (False, True):
        arrays = Arrays(np.dtype("float32"), seed, strided)
        x, y, out = arrays.of(values), arrays.of(values[::-1]), arrays.out(*values.shape)
        index = arrays.out(2, 2, 6, 8, channels, dtype=np.int32)
        gamma, beta, mean, m2, sums = values[0, 0, 0, 0], values[1, 0, 0, 0], *np.zeros((3, channels))
        native.moments(x, mean, m2)
        native.normalize(x, mean, 1 / np.sqrt(m2), gamma, beta, out)
        native.normalize_grad(x, y, mean, m2, sums, sums_xhat := np.zeros(channels))
        native.bias_grad(y, bias := np.zeros(channels, np.float32))
        results.append(b"".join(a.tobytes() for a in (mean, m2, out, sums, sums_xhat, bias)))
        for kind in ACTIVATIONS:
            native.activate_dx(kind, x, y, out, 0.1)
            results[-1] += out.tobytes()
        native.max_pool(x, pooled := arrays.out(2, 2, 6, 8, channels), index, (3, 3, 3), (2, 2, 2))
        native.max_pool_dx(pooled, index, out, (3, 3, 3), (2, 2, 2))
        results[-1] += pooled.tobytes() + index.tobytes() + out.tobytes()
        arrays.check_surroundings()
    assert results[0] == results[1]


@pytest.mark.parametrize("channels", [3, 64, 700])
def test_bits_do_not_depend_on_threads(channels: int, seed: int) -> None:
    native, rng, results = Native(), np.random.default_rng(seed), []
    x, y, dy = rng.standard_normal((3, 5, 13, 700 * 64 // (13 * channels) + 1, channels)).astype(np.float32)
    for threads in (1, 2, 3):
        native.use_threads(threads)
        mean, m2, sums, sums_xhat = np.zeros((4, channels))
        out, masked, bias = np.empty_like(x), dy.copy(), np.zeros(channels, np.float32)
        native.moments(x, mean, m2)
        native.normalize(x, mean, 1 / np.sqrt(m2), mean.astype(np.float32), bias, out, y, 0.0)
        native.normalize_grad(masked, x, mean, m2, sums, sums_xhat, y, 0.25)
        native.bias_grad(dy, bias)
        results.append(b"".join(a.tobytes() for a in (mean, m2, out, masked, sums, sums_xhat, bias)))
    native.use_threads(1)
    assert results[0] == results[1] == results[2]


def test_innermost_dim_may_be_strided_for_elementwise_operations(seed: int) -> None:
    rng, out = np.random.default_rng(seed), np.zeros((7, 5, 3), np.float32)
    a, b = rng.standard_normal((2, 3, 5, 7)).astype(np.float32)
    Native().add(a.T, b[::-1].T, out)
    np.testing.assert_array_equal(out, a.T + b[::-1].T)


def test_sum_of_many_float32_keeps_float32_accuracy() -> None:
    n = 2**22 + 1
    x, out = np.full((n, 1), 0.1, np.float32), np.zeros(1, np.float32)
    Native().bias_grad(x, out)
    assert out[0] == np.float32(n * float(np.float32(0.1)))


def test_an_index_out_of_its_window_is_left_out() -> None:
    """A gradient must not be written beside the array, whatever the indices are."""
    dx, index = np.full((1, 4, 4, 3), np.nan), np.array([-1, 4, 2**31 - 1, 3] * 3, np.int32).reshape(1, 2, 2, 3)
    Native().max_pool_dx(np.ones((1, 2, 2, 3)), index, dx, (2, 2), (2, 2))
    assert dx.sum() == 3
