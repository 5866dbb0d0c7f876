"""The layers in PyTorch: channels last on the outside, what its functions want within."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import pytest

from hpctrain import layers
from hpctrain.layers import (
    AdaptiveAvgPool,
    AvgPool,
    BatchNorm,
    Concat,
    Conv,
    ConvTranspose,
    Dice,
    GroupNorm,
    Huber,
    InstanceNorm,
    Layer,
    LayerNorm,
    LeakyReLU,
    MaxPool,
    Reshape,
    Slice,
    SoftmaxCrossEntropy,
    Upsample,
)

torch = pytest.importorskip("torch", reason="PyTorch, to compare with, is not installed: pip install '.[oracle]'")
F = torch.nn.functional
Tensor = Any
Weights = dict[str, Tensor]

# --- layouts ------------------------------------------------------------------------------------------------------


def first(x: Tensor) -> Tensor:
    """Channels first, contiguous, and so the weights below: slow_conv2d wants them to be."""
    return x.movedim(-1, 1).contiguous()


def last(x: Tensor) -> Tensor:
    """Channels last. PyTorch 2.13 gets the gradient of instance_norm of one sample wrong where dy is not contiguous."""
    if x.requires_grad:
        x.register_hook(lambda dy: dy.contiguous())
    return x.movedim(1, -1)


def numbers(value: Any, dims: int) -> tuple[Any, ...]:
    """One entry per position dim."""
    return (value,) * dims if isinstance(value, int) else value


def by_dims(name: str, dims: int) -> Callable[..., Tensor]:
    """conv1d, conv2d, conv3d and the like."""
    return getattr(F, f"{name}{dims}d")


def padded(x: Tensor, padding: Any, border: str = "zero", value: float = 0.0) -> Tensor:
    """Channels first; circular padding of more than the extent, which F.pad has not, by index."""
    modes = {"zero": "constant", "periodic": "circular", "reflect": "reflect"}
    if border == "periodic" and any(max(p) > n for p, n in zip(padding, x.shape[2:], strict=True)):
        for dim, (before, after) in enumerate(padding, start=2):
            n = x.shape[dim]
            x = x.index_select(dim, torch.arange(-before, n + after) % n)
        return x
    flat = [n for p in reversed(padding) for n in p]
    return F.pad(x, flat, modes[border], value) if border == "zero" else F.pad(x, flat, modes[border])


# --- the layers in PyTorch ----------------------------------------------------------------------------------------


def conv(layer: Conv, x: Tensor, w: Weights) -> Tensor:
    dims = x.ndim - 2
    weight = w["weight"].movedim((-1, -2), (0, 1)).contiguous()
    image = padded(first(x), layer.padding, layer.border)
    y = by_dims("conv", dims)(image, weight, w.get("bias"), layer.stride, 0, layer.dilation, layer.groups)
    return last(y)


def transposed(layer: ConvTranspose, x: Tensor, w: Weights) -> Tensor:
    dims, groups = x.ndim - 2, layer.groups
    *kernel, channels, filters = w["weight"].shape
    grouped = w["weight"].reshape(*kernel, channels, groups, filters // groups)
    weight = (
        grouped.movedim((-2, -3, -1), (0, 1, 2)).reshape(groups * channels, filters // groups, *kernel).contiguous()
    )
    y = by_dims("conv_transpose", dims)(
        first(x), weight, w.get("bias"), layer.stride, 0, layer.output_padding, groups, layer.dilation
    )
    for dim, (before, after) in enumerate(layer.padding, start=2):  # asymmetric: cut off what padding takes away
        y = y.narrow(dim, before, y.shape[dim] - before - after)
    return last(y)


@dataclass(frozen=True)
class Geometry:
    """A pool's numbers, one entry per position dim."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    symmetric: bool
    """Whether PyTorch's own padding, at most half of the kernel, can do it."""
    full: tuple[tuple[int, int], ...]
    """Padding that makes every window fit, beyond what is given too: PyTorch has no asymmetric ceil mode."""


def pooling(layer: MaxPool | AvgPool, x: Tensor) -> Geometry:
    dims = x.ndim - 2
    kernel = numbers(layer.kernel, dims)
    stride = kernel if layer.stride is None else numbers(layer.stride, dims)
    dilation = numbers(getattr(layer, "dilation", 1), dims)
    full = []
    counts = layer.output_shape(tuple(x.shape))[1:-1]
    for k, s, d, (before, after), n, count in zip(
        kernel, stride, dilation, layer.padding, x.shape[1:-1], counts, strict=True
    ):
        full.append((before, max(after, (count - 1) * s + d * (k - 1) + 1 - n - before)))
    alike = all(before == after <= k // 2 for (before, after), k in zip(layer.padding, kernel, strict=True))
    return Geometry(kernel, stride, layer.padding, dilation, alike, tuple(full))


def max_pool(layer: MaxPool, x: Tensor, w: Weights) -> Tensor:
    g, pool = pooling(layer, x), by_dims("max_pool", x.ndim - 2)
    if g.symmetric:
        sides = tuple(before for before, _ in g.padding)
        return last(pool(first(x), g.kernel, g.stride, sides, g.dilation, ceil_mode=layer.ceil))
    pads = g.full if layer.ceil else g.padding
    return last(pool(padded(first(x), pads, value=-torch.inf), g.kernel, g.stride, 0, g.dilation))


def avg_pool(layer: AvgPool, x: Tensor, w: Weights) -> Tensor:
    g, pool = pooling(layer, x), by_dims("avg_pool", x.ndim - 2)
    if g.symmetric:
        sides = tuple(before for before, _ in g.padding)
        return last(pool(first(x), g.kernel, g.stride, sides, layer.ceil, layer.count_padding))
    counted, margin = torch.ones_like(first(x)), g.full
    if layer.count_padding:
        counted = padded(counted, g.padding, value=1.0)
        margin = tuple((0, full - after) for (_, full), (_, after) in zip(g.full, g.padding, strict=True))
    image, ones = padded(first(x), g.full), padded(counted, margin)
    return last(pool(image, g.kernel, g.stride) / pool(ones, g.kernel, g.stride))


def adaptive(layer: AdaptiveAvgPool, x: Tensor, w: Weights) -> Tensor:
    dims = x.ndim - 2
    return last(by_dims("adaptive_avg_pool", dims)(first(x), numbers(layer.size, dims)))


def upsample(layer: Upsample, x: Tensor, w: Weights) -> Tensor:
    dims = x.ndim - 2
    scale = [float(s) for s in numbers(layer.scale, dims)]
    if layer.mode == "nearest":
        return last(F.interpolate(first(x), scale_factor=scale))
    mode = ("linear", "bilinear", "trilinear")[dims - 1]
    return last(F.interpolate(first(x), scale_factor=scale, mode=mode, align_corners=layer.align_corners))


def reshape(layer: Reshape, x: Tensor, w: Weights) -> Tensor:
    return x.reshape(x.shape[0], *layer.shape)


def sliced(layer: Slice, x: Tensor, w: Weights) -> Tensor:
    n = x.shape[layer.dim]
    return x.index_select(layer.dim, torch.tensor(range(n)[layer.start : layer.stop : layer.step]))


def batch_norm(layer: BatchNorm, x: Tensor, w: Weights) -> Tensor:
    parts = [first(part) if part.ndim > 2 else part for part in torch.tensor_split(x, layer.groups)]
    done = [F.batch_norm(p, None, None, w["gamma"], w["beta"], True, 0.0, layer.eps) for p in parts]
    return torch.cat([last(part) if part.ndim > 2 else part for part in done])


def group_norm(layer: GroupNorm, x: Tensor, w: Weights) -> Tensor:
    return last(F.group_norm(first(x), layer.groups, w["gamma"], w["beta"], layer.eps))


def instance_norm(layer: InstanceNorm, x: Tensor, w: Weights) -> Tensor:
    return last(F.instance_norm(first(x), None, None, w.get("gamma"), w.get("beta"), eps=layer.eps))


def layer_norm(layer: LayerNorm, x: Tensor, w: Weights) -> Tensor:
    return F.layer_norm(x, x.shape[-layer.dims :], w["gamma"], w["beta"], layer.eps)


ORACLES: dict[type[Layer], Callable[[Any, Tensor, Weights], Tensor]] = {
    Conv: conv,
    ConvTranspose: transposed,
    MaxPool: max_pool,
    AvgPool: avg_pool,
    layers.GlobalAvgPool: lambda layer, x, w: x.mean(dim=tuple(range(1, x.ndim - 1))),
    AdaptiveAvgPool: adaptive,
    Upsample: upsample,
    layers.Dense: lambda layer, x, w: F.linear(x, w["weight"].T, w.get("bias")),
    layers.Flatten: lambda layer, x, w: x.flatten(1),
    Reshape: reshape,
    Slice: sliced,
    layers.ReLU: lambda layer, x, w: F.relu(x),
    LeakyReLU: lambda layer, x, w: F.leaky_relu(x, layer.slope),
    layers.GELU: lambda layer, x, w: F.gelu(x),
    layers.SiLU: lambda layer, x, w: F.silu(x),
    layers.Sigmoid: lambda layer, x, w: torch.sigmoid(x),
    layers.Tanh: lambda layer, x, w: torch.tanh(x),
    layers.Softplus: lambda layer, x, w: F.softplus(x, threshold=100),  # the default gives x itself above 20
    layers.Softmax: lambda layer, x, w: F.softmax(x, dim=-1),
    BatchNorm: batch_norm,
    GroupNorm: group_norm,
    InstanceNorm: instance_norm,
    LayerNorm: layer_norm,
}
SEVERAL: dict[type[Layer], Callable[[Any, list[Tensor]], Tensor]] = {
    layers.Add: lambda layer, xs: torch.stack(xs).sum(dim=0),
    layers.Multiply: lambda layer, xs: torch.stack(xs).prod(dim=0),
    Concat: lambda layer, xs: torch.cat(xs, dim=layer.dim),
}


def comparable(layer: Layer, x: tuple[int, ...]) -> bool:
    """PyTorch refuses statistics of a single value."""
    if isinstance(layer, BatchNorm):
        return x[0] // layer.groups * prod(x[1:-1]) > 1
    return not isinstance(layer, GroupNorm) or prod(x[1:]) // layer.groups > 1


# --- losses: all elements, or one row per sample, and the mean ----------------------------------------------------


def cross_entropy(layer: SoftmaxCrossEntropy, x: Tensor, target: Tensor, reduction: str) -> Tensor:
    weight = None if layer.class_weights is None else torch.tensor(layer.class_weights, dtype=torch.float64)
    ignore = -100 if layer.ignore is None else layer.ignore
    return F.cross_entropy(first(x), target, weight, None, ignore, None, reduction, layer.smoothing)


def huber(layer: Huber, x: Tensor, target: Tensor, reduction: str) -> Tensor:
    return F.huber_loss(x, target, reduction=reduction, delta=layer.delta)


def dice(layer: Dice, x: Tensor, target: Tensor, reduction: str) -> Tensor:
    labels, classes = target.ndim < x.ndim, x.shape[-1]
    p = torch.softmax(x, -1) if labels else torch.sigmoid(x)
    kept = target != layer.ignore if labels and layer.ignore is not None else torch.ones(x.shape[:-1], dtype=torch.bool)
    t = F.one_hot(torch.where(kept, target, 0), classes).to(x.dtype) if labels else target
    p, t = p * kept[..., None], t * kept[..., None]
    p, t = (values.reshape(len(x), -1, classes) for values in (p, t))
    quotient = (2 * (p * t).sum(1) + layer.smooth) / (p.sum(1) + t.sum(1) + layer.smooth)
    loss = 1 - quotient[:, 0 if layer.background else 1 :].mean(dim=1)
    return loss if reduction == "none" else loss[kept.reshape(len(x), -1).any(dim=1)].mean()


LOSSES: dict[type[Layer], Callable[[Any, Tensor, Tensor, str], Tensor]] = {
    SoftmaxCrossEntropy: cross_entropy,
    layers.MSE: lambda layer, x, target, reduction: F.mse_loss(x, target, reduction=reduction),
    layers.MAE: lambda layer, x, target, reduction: F.l1_loss(x, target, reduction=reduction),
    Huber: huber,
    layers.BCEWithLogits: lambda layer, x, t, reduction: F.binary_cross_entropy_with_logits(x, t, reduction=reduction),
    Dice: dice,
}
