"""The array operations a backend provides, named like the mathematics. Local, deterministic; nothing communicates.

Arrays are channels last, `(N, [D,] H, W, C)`, weights `([kd,] kh, kw, Cin, Cout)`, and may have strided outer dims.
Every operation writes into `out`, which the caller owns; `*_grad` and `conv_dw` overwrite, they do not add.
A convolution or pooling input arrives assembled: its halo and padding are already part of `x`, so its output extent is
exactly `(extent - dilation * (kernel - 1) - 1) // stride + 1`. NaN and infinity pass through every operation.

Where arrays are bfloat16 (`ml_dtypes.bfloat16`), sums are float32, and so are vectors (biases, gamma, beta) and every
gradient by a weight; what is stored as bfloat16 is rounded once.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[Any]
Ints = NDArray[Any]
Sizes = tuple[int, ...]

ACTIVATIONS = ("leaky_relu", "gelu", "silu", "sigmoid", "tanh", "softplus")
"""gelu is x * Phi(x) with the normal distribution function Phi, not its tanh approximation."""
POINTWISE_LOSSES = ("squared", "absolute", "huber", "logistic")


class Backend(Protocol):
    """What `reference` defines and every other backend must equal (to rounding)."""

    name: str
    dtypes: tuple[str, ...]
    """Float types that it computes in, e.g. ("float32", "float64", "bfloat16")."""

    def describe(self) -> str:
        """One line for the run's log: what computes what."""

    def use_threads(self, count: int) -> None:
        """Run on so many threads from now on, where the backend has threads of its own."""

    def empty(self, shape: Sizes, dtype: np.dtype) -> Array:
        """An uninitialised array where this backend computes."""

    # --- convolution and matrix multiplication -------------------------------------------------------------------

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
        """out[n, o, k] = sum over taps t and c of x[n, o * stride + t * dilation, c] w[t, c, k] (cross-correlation).

        Then `bias` (filters,) is added, and what is <= 0 becomes `slope` times itself: 0 is `relu`, other slopes are
        leaky_relu, and 1 changes nothing.

        With `groups`, channels of x and filters fall into as many equal runs, and each run of filters reads its own run
        of channels: w is (*kernel, C / groups, filters).
        """

    def conv_dx(self, dy: Floats, w: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int = 1) -> None:
        """Adjoint of `conv` in x; input elements that no window touches get 0."""

    def conv_dw(self, x: Floats, dy: Floats, out: Floats, stride: Sizes, dilation: Sizes, groups: int = 1) -> None:
        """Adjoint of `conv` in w."""

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
        """out = op(a) @ op(b) for matrices; op transposes where asked. `bias` and `slope` as of `conv`."""

    def bias_add(self, y: Floats, b: Floats) -> None:
        """y[..., c] += b[c], in place."""

    def bias_grad(self, dy: Floats, out: Floats, y: Floats | None = None, slope: float = 1.0) -> None:
        """out[c] = sum of dy[..., c]. Where y is given, first `activation_grad(dy, y, slope)`, which changes dy."""

    def widen(self, x: Floats, out: Floats) -> None:
        """out = x, from bfloat16 to float32. 1D arrays."""

    def narrow(self, x: Floats, out: Floats) -> None:
        """out = x, from float32 to bfloat16: to nearest, ties to even. 1D arrays."""

    # --- pooling ---------------------------------------------------------------------------------------------------

    def max_pool(
        self, x: Floats, out: Floats, index: Ints, kernel: Sizes, stride: Sizes, dilation: Sizes | None = None
    ) -> None:
        """Largest element of each window; `index` (int32, like out) is its tap there, the first where tied."""

    def max_pool_dx(
        self, dy: Floats, index: Ints, out: Floats, kernel: Sizes, stride: Sizes, dilation: Sizes | None = None
    ) -> None:
        """Adds each dy to the element that won its window; elements that won none get 0."""

    def avg_pool(self, x: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        """Sum of each window divided by `divisor` (broadcast against out)."""

    def avg_pool_dx(self, dy: Floats, out: Floats, divisor: Floats, kernel: Sizes, stride: Sizes) -> None:
        """Adjoint of `avg_pool`."""

    def sum_positions(self, x: Floats, out: Floats, scale: float) -> None:
        """out[n, c] = scale * sum over all positions of x[n, ..., c]."""

    def spread_positions(self, dy: Floats, out: Floats, scale: float) -> None:
        """out[n, ..., c] = scale * dy[n, c]: the adjoint of `sum_positions`."""

    def resample(self, x: Floats, out: Floats, dim: int, index: Ints, weight: Floats) -> None:
        """Along `dim`: out[.., o, ..] = sum over k of weight[o, k] * x[.., index[o, k], ..].

        `index` and `weight` are (outputs, taps); all other dims of x and out agree. Interpolation along one dim.
        """

    def resample_dx(self, dy: Floats, out: Floats, dim: int, index: Ints, weight: Floats) -> None:
        """Adjoint of `resample`; elements that no output reads get 0."""

    # --- normalization: statistics are float64, gamma and beta are of x's dtype, or float32 beside bf16 ---------------
    #
    # Statistics, gamma and beta broadcast against x: shape (C,) is per channel, (N, 1, 1, 1) per sample, (N, 1, 1, C)
    # per sample and channel, (N, H, W, 1) per position. Sums are over the dims that their output has not, or has as 1.

    def moments(self, x: Floats, mean: Floats, m2: Floats) -> None:
        """The mean, and the sum of squared differences from it (0 where nothing is summed)."""

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
        """out = act((x - mean) * rstd * gamma + beta [+ add]), where act multiplies by `slope` what is not above 0.

        1 is no activation and 0 that of `relu`. Raises ValueError on a slope below 0.
        """

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
        """Sums of dy and of dy * xhat, with xhat = (x - mean) * rstd.

        Where y, the output of an activated `normalize`, is given, first `activation_grad(dy, y, slope)`, which changes
        dy: it is then also the gradient by `add`.
        """

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
        """out = rstd * (g - mean_g - xhat * mean_g_xhat) with g = gamma * dy; both means broadcast against x."""

    # --- elementwise -----------------------------------------------------------------------------------------------

    def add(self, a: Floats, b: Floats, out: Floats) -> None:
        """out = a + b; out may be a or b."""

    def relu(self, x: Floats, out: Floats) -> None:
        """out = max(x, 0)."""

    def relu_dx(self, dy: Floats, y: Floats, out: Floats) -> None:
        """out = dy where y > 0, else 0; y is the output of `relu`."""

    def activation_grad(self, dy: Floats, y: Floats, slope: float) -> None:
        """dy = dy where y > 0, else slope * dy, in place, and 0 where the slope is 0, whatever dy is.

        The gradient of an activation with that slope below 0 by its output y. That tells the side only where the slope
        is not below 0: else raises ValueError.
        """

    def multiply(self, a: Floats, b: Floats, out: Floats) -> None:
        """out = a * b; out may be a or b."""

    def activate(self, kind: str, x: Floats, out: Floats, slope: float = 0.0) -> None:
        """out = f(x) for f named by `kind`: one of ACTIVATIONS. `slope` is that of leaky_relu below 0."""

    def activate_dx(self, kind: str, dy: Floats, x: Floats, out: Floats, slope: float = 0.0) -> None:
        """out = dy * f'(x); at the kink of leaky_relu, 0, the slope below it."""

    def softmax(self, x: Floats, out: Floats) -> None:
        """out = exp(x) / sum of exp(x) over the last dim, without overflow."""

    def softmax_dx(self, dy: Floats, y: Floats, out: Floats) -> None:
        """out = y * (dy - sum of dy * y over the last dim); y is the output of `softmax`."""

    # --- losses: summed over all dims but the first into one row per sample -------------------------------------------

    def cross_entropy(
        self, logits: Floats, labels: Ints, weight: Floats, smoothing: float, loss: Floats, probability: Floats
    ) -> None:
        """Softmax cross-entropy of logits (N, ..., K) and labels (N, ...), summed per sample into loss (N,).

        Of one position, with p = softmax(logits): (1 - smoothing) * weight[label] * -log p[label]
        + smoothing / K * sum over k of weight[k] * -log p[k]. `weight` (K,) is per class. Where the label is not in
        [0, K) the position counts for nothing. `probability` gets p.
        """

    def cross_entropy_dx(
        self, probability: Floats, labels: Ints, weight: Floats, smoothing: float, scale: Floats, out: Floats
    ) -> None:
        """Gradient by the logits of the sum over n of scale[n] * loss[n]."""

    def label_scores(
        self, logits: Floats, labels: Ints, weight: Floats, total: Floats, correct: Floats, count: Floats
    ) -> None:
        """Of each sample's positions whose label is in [0, K), three numbers per sample, each (N,).

        total: the sum of weight[label]. correct: how many have their largest logit, the first where tied, at the label.
        count: how many there are. Logits (N, ..., K), labels (N, ...), `weight` (K,).
        """

    def pointwise_loss(self, kind: str, x: Floats, target: Floats, loss: Floats, delta: float = 1.0) -> None:
        """loss[n] = sum of f(x, target), of one shape (N, ...), for f named by `kind`: one of POINTWISE_LOSSES.

        squared: (x - t)^2. absolute: |x - t|. huber: with d = |x - t|, d^2 / 2 up to d = delta, then
        delta * (d - delta / 2). logistic: binary cross-entropy of the logit x, log(1 + exp(x)) - t * x.
        """

    def pointwise_loss_dx(
        self, kind: str, x: Floats, target: Floats, scale: Floats, out: Floats, delta: float = 1.0
    ) -> None:
        """Gradient by x of the sum over n of scale[n] * loss[n]; 0 at the kink of absolute."""

    def agreement(self, x: Floats, target: Floats, out: Floats) -> None:
        """out[n] = for how many elements of sample n, of arrays (N, ...), x > 0 goes with target > 0.5."""

    # --- optimizer ---------------------------------------------------------------------------------------------------

    def sgd_update(
        self, w: Floats, g: Floats, velocity: Floats, lr: float, momentum: float, weight_decay: float, nesterov: bool
    ) -> None:
        """With g' = g + weight_decay * w: velocity = momentum * velocity + g', then w -= lr * velocity, in place.

        With Nesterov w -= lr * (g' + momentum * velocity), PyTorch's form of Sutskever et al. 2013. 1D arrays.
        """

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
        """With g' = g + weight_decay * w, or if `decoupled` first w -= lr * weight_decay * w and g' = g, in place:

        mean = beta1 * mean + (1 - beta1) * g', square = beta2 * square + (1 - beta2) * g'^2, and with t = `update`,
        from 1: w -= lr * mean / (1 - beta1^t) / (sqrt(square / (1 - beta2^t)) + eps). 1D arrays.
        """

    def lars_update(
        self, w: Floats, g: Floats, velocity: Floats, rate: float, momentum: float, weight_decay: float
    ) -> None:
        """velocity = momentum * velocity + rate * (g + weight_decay * w), then w -= velocity, in place. 1D arrays."""

    def sum_squares(self, x: Floats) -> float:
        """The sum of x^2 in float64, of a 1D array."""
