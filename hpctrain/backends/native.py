"""Our compiled kernels (kernels/cpu) where there are some, NumPy for the rest; `describe` says which is which."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.backends.base import Array, Floats, Ints, Sizes
from hpctrain.backends.reference import Reference
from hpctrain.backends.rounding import in_float32
from hpctrain.errors import BackendUnavailable
from hpctrain.precision import BF16

COMPILED = (
    *("conv", "conv_dx", "conv_dw", "gemm", "widen", "narrow"),
    *("add", "multiply", "relu", "relu_dx", "activation_grad", "activate", "activate_dx", "bias_add", "bias_grad"),
    *("max_pool", "max_pool_dx", "sum_positions", "spread_positions"),
    *("avg_pool", "avg_pool_dx", "resample", "resample_dx"),
    *("moments", "normalize", "normalize_grad", "normalize_dx"),
    *("softmax", "softmax_dx", "cross_entropy", "cross_entropy_dx", "label_scores"),
    *("pointwise_loss", "pointwise_loss_dx", "agreement"),
    *("sgd_update", "adam_update", "lars_update", "sum_squares"),
)
"""The operations that compiled kernels compute; the others are inherited from `Reference`.

Convolution and matrix multiplication in float32 and bf16, in float64 as `Reference`.
"""

ALIKE = (
    *("softmax", "softmax_dx", "activate", "activate_dx"),
    *("pointwise_loss", "pointwise_loss_dx", "agreement"),
)
"""Those that are compiled for arrays of one type; losses take numbers in bf16 beside exact targets."""

OF_BF16 = tuple(name for name in COMPILED if not name.endswith("_update") and name not in ("sum_squares", *ALIKE))
"""Those that take arrays of bf16; the others compute on copies in float32."""


@in_float32("describe", "use_threads", *OF_BF16, alike=ALIKE)
class Native(Reference):
    """Takes arrays of one type, statistics of normalization in float64, channels contiguous; refuses anything else.

    Arrays of bf16 (ml_dtypes.bfloat16) are computed with in float32, and have float32 vectors (gamma, beta, bias) at
    their side. Sums are taken in double precision, in an order that depends on shapes alone; those of convolution and
    matrix products in float32, in an order that depends on shapes, instruction set and number of threads. Raises
    BackendUnavailable without the compiled module hpctrain._native or without what HPCTRAIN_ISA asks for, TypeError or
    ValueError on arrays that do not fit.
    """

    name = "native"

    def __init__(self, exact: bool = False) -> None:
        """Where `exact`, never use Winograd's convolution, which is faster but rounds about 3 times as much."""
        self._kernels = _import_kernels()
        self._exact = exact
        try:
            self._kernels.isa()
        except ValueError as error:
            raise BackendUnavailable(f"backend 'native': {error}") from error

    def describe(self) -> str:
        return (
            f"native: compiled kernels for all {len(COMPILED)} operations, convolution with {self._kernels.isa()}; "
            f"NumPy {np.__version__} for convolution and matrix products in float64"
        )

    def use_threads(self, count: int) -> None:
        self._kernels.use_threads(count)

    def conv(
        self,
        x: Floats,
        w: Floats,
        out: Floats,
        stride: Sizes,
        dilation: Sizes,
        groups: int = 1,
        bias: Floats | None = None,
        slope: float = 1.0,
    ) -> None:
        if x.dtype != np.float64:
            arrays = _bits(x), _bits(w), _bits(out)
            self._kernels.conv(*arrays, stride, dilation, groups, bias, exact=self._exact, slope=slope)
        else:
            super().conv(x, w, out, stride, dilation, groups, bias, slope)

    def conv_dx(self, dy: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int = 1) -> None:
        if dy.dtype != np.float64:
            self._kernels.conv_dx(_bits(dy), _bits(w), _bits(out), stride, dilation, groups, exact=self._exact)
        else:
            super().conv_dx(dy, w, out, stride, dilation, groups)

    def conv_dw(self, x: Floats, dy: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int = 1) -> None:
        if x.dtype != np.float64:
            self._kernels.conv_dw(_bits(x), _bits(dy), out, stride, dilation, groups, exact=self._exact)
        else:
            super().conv_dw(x, dy, out, stride, dilation, groups)

    def gemm(
        self,
        a: Floats,
        b: Floats,
        out: Floats,
        transpose_a: bool = False,
        transpose_b: bool = False,
        bias: Floats | None = None,
        slope: float = 1.0,
    ) -> None:
        if a.dtype != np.float64:
            self._kernels.gemm(_bits(a), _bits(b), _bits(out), transpose_a, transpose_b, bias, slope=slope)
        else:
            super().gemm(a, b, out, transpose_a, transpose_b, bias, slope)

    def widen(self, x: Floats, out: Floats) -> None:
        self._kernels.widen(_bits(x), out)

    def narrow(self, x: Floats, out: Floats) -> None:
        self._kernels.narrow(x, _bits(out))

    def add(self, a: Floats, b: Floats, out: Floats) -> None:
        self._kernels.add(*_stored(a, b, out))

    def multiply(self, a: Floats, b: Floats, out: Floats) -> None:
        self._kernels.multiply(*_stored(a, b, out))

    def relu(self, x: Floats, out: Floats) -> None:
        self._kernels.relu(*_stored(x, out))

    def relu_dx(self, dy: Floats, y: Floats, out: Floats) -> None:
        self._kernels.relu_dx(*_stored(dy, y, out))

    def activation_grad(self, dy: Floats, y: Floats, slope: float) -> None:
        self._kernels.activation_grad(*_stored(dy, y), slope)

    def activate(self, kind: str, x: Floats, out: Floats, slope: float = 0.0) -> None:
        self._kernels.activate(kind, *_stored(x, out), slope)

    def activate_dx(self, kind: str, dy: Floats, x: Floats, out: Floats, slope: float = 0.0) -> None:
        self._kernels.activate_dx(kind, *_stored(dy, x, out), slope)

    def max_pool(
        self, x: Floats, out: Floats, index: Ints, kernel: Sizes, stride: Sizes, dilation: Sizes | None = None
    ) -> None:
        self._kernels.max_pool(*_stored(x, out), index, kernel, stride, dilation or (1,) * len(kernel))

    def max_pool_dx(
        self, dy: Floats, index: Ints, out: Floats, kernel: Sizes, stride: Sizes, dilation: Sizes | None = None
    ) -> None:
        self._kernels.max_pool_dx(*_stored(dy, index, out), kernel, stride, dilation or (1,) * len(kernel))

    def bias_add(self, y: Floats, b: Floats) -> None:
        self._kernels.bias_add(*_stored(y, b))

    def bias_grad(self, dy: Floats, out: Floats, y: Floats | None = None, slope: float = 1.0) -> None:
        masked = () if y is None else (*_stored(y), slope)
        self._kernels.bias_grad(*_stored(dy, out), *masked)

    def sum_positions(self, x: Floats, out: Floats, scale: float) -> None:
        self._kernels.sum_positions(*_stored(x, out), scale)

    def spread_positions(self, dy: Floats, out: Floats, scale: float) -> None:
        self._kernels.spread_positions(*_stored(dy, out), scale)

    def avg_pool(self, x: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        self._kernels.avg_pool(*_stored(x, out), divisor, kernel, stride)

    def avg_pool_dx(self, dy: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        self._kernels.avg_pool_dx(*_stored(dy, out), divisor, kernel, stride)

    def resample(self, x: Floats, out: Floats, dim: int, index: Ints, weight: Floats) -> None:
        self._kernels.resample(*_stored(x, out), dim, index, weight)

    def resample_dx(self, dy: Floats, out: Floats, dim: int, index: Ints, weight: Floats) -> None:
        self._kernels.resample_dx(*_stored(dy, out), dim, index, weight)

    def moments(self, x: Floats, mean: Floats, m2: Floats) -> None:
        if _per_channel(x, mean, m2):
            self._kernels.moments(*_stored(x), mean, m2)
        else:
            self._kernels.moments_of(*_stored(x), mean, m2)

    def normalize(
        self,
        x: Floats,
        mean: Floats,
        rstd: Floats,
        gamma: Floats,
        beta: Floats,
        out: Floats,
        add: Floats | None = None,
        slope: float = 1.0,
    ) -> None:
        per_channel = _per_channel(x, mean, rstd, gamma, beta)
        compute = self._kernels.normalize if per_channel else self._kernels.normalize_by
        added = None if add is None else _stored(add)[0]
        compute(*_stored(x), mean, rstd, gamma, beta, *_stored(out), added, slope)

    def normalize_grad(
        self,
        dy: Floats,
        x: Floats,
        mean: Floats,
        rstd: Floats,
        sum_dy: Floats,
        sum_dy_xhat: Floats,
        y: Floats | None = None,
        slope: float = 1.0,
    ) -> None:
        if _per_channel(x, mean, rstd, sum_dy, sum_dy_xhat):
            masked = () if y is None else (*_stored(y), slope)
            self._kernels.normalize_grad(*_stored(dy, x), mean, rstd, sum_dy, sum_dy_xhat, *masked)
            return
        if y is not None:
            self.activation_grad(dy, y, slope)
        self._kernels.normalize_grad_of(*_stored(dy, x), mean, rstd, sum_dy, sum_dy_xhat)

    def normalize_dx(
        self,
        dy: Floats,
        x: Floats,
        mean: Floats,
        rstd: Floats,
        gamma: Floats,
        mean_g: Floats,
        mean_g_xhat: Floats,
        out: Floats,
    ) -> None:
        if _per_channel(x, mean, rstd, gamma, mean_g, mean_g_xhat):
            self._kernels.normalize_dx(*_stored(dy, x), mean, rstd, gamma, mean_g, mean_g_xhat, *_stored(out))
        else:
            self._kernels.normalize_dx_by(*_stored(dy, x), mean, rstd, gamma, mean_g, mean_g_xhat, *_stored(out))

    def softmax(self, x: Floats, out: Floats) -> None:
        self._kernels.softmax(*_stored(x, out))

    def softmax_dx(self, dy: Floats, y: Floats, out: Floats) -> None:
        self._kernels.softmax_dx(*_stored(dy, y, out))

    def cross_entropy(
        self, logits: Floats, labels: Ints, weight: Floats, smoothing: float, loss: Floats, probability: Floats
    ) -> None:
        if probability.dtype == BF16:
            super().cross_entropy(logits, labels, weight, smoothing, loss, probability)
        else:
            self._kernels.cross_entropy(*_stored(logits), labels, weight, smoothing, loss, probability)

    def cross_entropy_dx(
        self, probability: Floats, labels: Ints, weight: Floats, smoothing: float, scale: Floats, out: Floats
    ) -> None:
        self._kernels.cross_entropy_dx(probability, labels, weight, smoothing, scale, *_stored(out))

    def label_scores(
        self, logits: Floats, labels: Ints, weight: Floats, total: Floats, correct: Floats, count: Floats
    ) -> None:
        self._kernels.label_scores(*_stored(logits), labels, weight, total, correct, count)

    def pointwise_loss(self, kind: str, x: Floats, target: Floats, loss: Floats, delta: float = 1.0) -> None:
        self._kernels.pointwise_loss(kind, *_stored(x, target), loss, delta)

    def pointwise_loss_dx(
        self, kind: str, x: Floats, target: Floats, scale: Floats, out: Floats, delta: float = 1.0
    ) -> None:
        self._kernels.pointwise_loss_dx(kind, *_stored(x, target), scale, *_stored(out), delta)

    def agreement(self, x: Floats, target: Floats, out: Floats) -> None:
        self._kernels.agreement(*_stored(x, target), out)

    def sgd_update(
        self, w: Floats, g: Floats, velocity: Floats, lr: float, momentum: float, weight_decay: float, nesterov: bool
    ) -> None:
        self._kernels.sgd_update(w, g, velocity, lr, momentum, weight_decay, nesterov)

    def adam_update(
        self,
        w: Floats,
        g: Floats,
        mean: Floats,
        square: Floats,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        decoupled: bool,
        update: int,
    ) -> None:
        self._kernels.adam_update(w, g, mean, square, lr, beta1, beta2, eps, weight_decay, decoupled, update)

    def lars_update(
        self, w: Floats, g: Floats, velocity: Floats, rate: float, momentum: float, weight_decay: float
    ) -> None:
        self._kernels.lars_update(w, g, velocity, rate, momentum, weight_decay)

    def sum_squares(self, x: Floats) -> float:
        found: float = self._kernels.sum_squares(x)
        return found


def _per_channel(x: Array, *vectors: Array) -> bool:
    """Whether each vector holds one number per channel of x, as in batch normalization."""
    return all(vector.shape == x.shape[-1:] for vector in vectors)


def _bits(a: Array) -> Array:
    """An array as the kernels take it: bf16, which NumPy does not know, as the uint16 that hold its bits."""
    return a.view(np.uint16) if isinstance(a, np.ndarray) and a.dtype == BF16 else a


def _stored(*arrays: Array) -> tuple[Array, ...]:
    """`_bits` of each."""
    return tuple(map(_bits, arrays))


def _import_kernels() -> Any:
    try:
        import hpctrain._native as kernels
    except ImportError as error:
        here = Path(__file__).parents[1]
        if (here.parent / "setup.py").exists():  # `python -m` takes what lies in the current folder
            here_is = f"{here} is a source folder; start the installed program, `hpctrain` or `python -P -m hpctrain`"
            raise BackendUnavailable(
                f"backend 'native': no compiled module: {here_is}, or `pip install -e .`"
            ) from error
        raise BackendUnavailable(
            f"backend 'native': the compiled module does not load ({error}); build it where the sources are with "
            "`pip install .` (needs a C++ compiler, HPCTRAIN_NATIVE not 0), or choose the backend 'reference'"
        ) from error
    return kernels
