"""The array operations a backend provides, named like the mathematics. Local, deterministic; nothing communicates.

Arrays are channels last, `(N, [D,] H, W, C)`, weights `([kd,] kh, kw, Cin, Cout)`, and may have strided outer dims.
Every operation writes into `out`, which the caller owns; `*_grad` and `conv_dw` overwrite, they do not add.
A convolution or pooling input arrives assembled: its halo and padding are already part of `x`, so its output extent is
exactly `(extent - dilation * (kernel - 1) - 1) // stride + 1`. NaN and infinity pass through every operation.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[Any]
Ints = NDArray[Any]
Sizes = tuple[int, ...]


class Backend(Protocol):
    """What `reference` defines and every other backend must equal (to rounding)."""

    name: str
    dtypes: tuple[str, ...]
    """Float types that it computes in, e.g. ("float32", "float64")."""

    def describe(self) -> str:
        """One line for the run's log: what computes what."""

    def empty(self, shape: Sizes, dtype: np.dtype) -> Array:
        """An uninitialised array where this backend computes."""

    # --- convolution and matrix multiplication -------------------------------------------------------------------

    def conv(self, x: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes) -> None:
        """out[n, o, k] = sum over taps t and c of x[n, o * stride + t * dilation, c] w[t, c, k] (cross-correlation)."""

    def conv_dx(self, dy: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes) -> None:
        """Adjoint of `conv` in x; input elements that no window touches get 0."""

    def conv_dw(self, x: Floats, dy: Floats, out: Floats, stride: Sizes, dilation: Sizes) -> None:
        """Adjoint of `conv` in w."""

    def gemm(self, a: Floats, b: Floats, out: Floats, transpose_a: bool = False, transpose_b: bool = False) -> None:
        """out = op(a) @ op(b) for matrices; op transposes where asked."""

    def bias_add(self, y: Floats, b: Floats) -> None:
        """y[..., c] += b[c], in place."""

    def bias_grad(self, dy: Floats, out: Floats) -> None:
        """out[c] = sum of dy[..., c]."""

    # --- pooling ---------------------------------------------------------------------------------------------------

    def max_pool(self, x: Floats, out: Floats, index: Ints, kernel: Sizes, stride: Sizes) -> None:
        """Largest element of each window; `index` (int32, like out) is its place there, the first where tied."""

    def max_pool_dx(self, dy: Floats, index: Ints, out: Floats, kernel: Sizes, stride: Sizes) -> None:
        """Adds each dy to the element that won its window; elements that won none get 0."""

    def avg_pool(self, x: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        """Sum of each window divided by `divisor` (broadcast against out)."""

    def avg_pool_dx(self, dy: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        """Adjoint of `avg_pool`."""

    def sum_positions(self, x: Floats, out: Floats, scale: float) -> None:
        """out[n, c] = scale * sum over all positions of x[n, ..., c]."""

    def spread_positions(self, dy: Floats, out: Floats, scale: float) -> None:
        """out[n, ..., c] = scale * dy[n, c]: the adjoint of `sum_positions`."""

    # --- normalization: per-channel statistics are float64 vectors (C,), gamma and beta are of x's dtype --------------

    def moments(self, x: Floats, mean: Floats, m2: Floats) -> None:
        """Per channel over all other dims: the mean, and the sum of squared differences from it (0 if x is empty)."""

    def normalize(self, x: Floats, mean: Floats, rstd: Floats, gamma: Floats, beta: Floats, out: Floats) -> None:
        """out = (x - mean) * rstd * gamma + beta, per channel."""

    def normalize_grad(
        self, dy: Floats, x: Floats, mean: Floats, rstd: Floats, sum_dy: Floats, sum_dy_xhat: Floats
    ) -> None:
        """Per channel sums of dy and of dy * xhat, with xhat = (x - mean) * rstd."""

    def normalize_dx(
        self,
        dy: Floats,
        x: Floats,
        mean: Floats,
        rstd: Floats,
        gamma: Floats,
        mean_dy: Floats,
        mean_dy_xhat: Floats,
        out: Floats,
    ) -> None:
        """out = gamma * rstd * (dy - mean_dy - xhat * mean_dy_xhat), per channel."""

    # --- elementwise -----------------------------------------------------------------------------------------------

    def add(self, a: Floats, b: Floats, out: Floats) -> None:
        """out = a + b; out may be a or b."""

    def relu(self, x: Floats, out: Floats) -> None:
        """out = max(x, 0)."""

    def relu_dx(self, dy: Floats, y: Floats, out: Floats) -> None:
        """out = dy where y > 0, else 0; y is the output of `relu`."""

    # --- losses, one row per sample ----------------------------------------------------------------------------------

    def softmax_cross_entropy(self, logits: Floats, labels: Ints, loss: Floats, probability: Floats) -> None:
        """loss[n] = -log softmax(logits[n])[labels[n]]; `probability` (N, K) gets the softmax. Labels lie in [0, K)."""

    def softmax_cross_entropy_dx(self, probability: Floats, labels: Ints, scale: Floats, out: Floats) -> None:
        """out[n] = scale[n] * (probability[n] - onehot(labels[n]))."""

    def squared_error(self, x: Floats, target: Floats, loss: Floats) -> None:
        """loss[n] = sum over k of (x[n, k] - target[n, k])^2."""

    def squared_error_dx(self, x: Floats, target: Floats, scale: Floats, out: Floats) -> None:
        """out[n, k] = scale[n] * 2 (x[n, k] - target[n, k])."""

    # --- optimizer ---------------------------------------------------------------------------------------------------

    def sgd_update(
        self, w: Floats, g: Floats, velocity: Floats, lr: float, momentum: float, weight_decay: float, nesterov: bool
    ) -> None:
        """With g' = g + weight_decay * w: velocity = momentum * velocity + g', then w -= lr * velocity, in place.

        With Nesterov w -= lr * (g' + momentum * velocity), PyTorch's form of Sutskever et al. 2013. 1D arrays.
        """
