"""3D U-Net (Çiçek et al. 2016): a class for every voxel, from four scales of convolutions joined by skips."""

from __future__ import annotations

from math import gcd

from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.layers import BatchNorm, Concat, Conv, ConvTranspose, GroupNorm, InstanceNorm, Layer, MaxPool, ReLU, Slice
from hpctrain.models import Sample, finish, one_of, start

NORMS = ("batch", "group", "instance", "none")

GROUPS = 8
"""Groups of channels of a group norm, or as many as divide both 8 and the channels."""


def build(
    batch: int,
    sample: Sample,
    filters: int = 32,
    levels: int = 4,
    norm: bool | str = True,
    padding: str = "same",
) -> Graph:
    """Logits (N, D, H, W, classes) for a volume; `filters` in the first convolution, twice as many at every level.

    `padding` "same" gives the volume's own extents, whatever they are: pooling rounds up, and what upsampling has too
    much is cut off at the far end. "valid" is as published: 3x3x3 convolutions without padding, skips cut to their
    middle; 132 x 132 x 116 voxels give 44 x 44 x 28, and the labels must be as large as the logits.

    Published are 19,069,955 parameters for 3 channels and 3 classes: kernels, a bias for every 3x3x3 convolution and
    for the last one. `norm=False` has exactly these. With `norm` the biases are batch norm's shifts, and its 2,336
    scales come on top. `norm` is "batch" (the same as true), "group" (of 8 groups), "instance", or "none" (false):
    group and instance norm do not depend on the batch, which large volumes keep small. Raises ValueError on another
    norm or padding or no levels, PlanError on labels of another shape.
    """
    if levels < 1:
        raise ValueError(f"levels = {levels}; give 1 or more")
    if isinstance(norm, bool):
        norm = "batch" if norm else "none"
    one_of("norm", norm, NORMS)
    net, x = start(batch, sample)
    same = one_of("padding", padding, ("same", "valid")) == "same"
    skips = []
    for level in range(1, levels):
        inner = filters * 2 ** (level - 1)
        x = _conv(net, f"down{level}.", 1, inner, norm, same, x)
        x = _conv(net, f"down{level}.", 2, 2 * inner, norm, same, x)
        skips.append(x)
        # where nothing is left to pool, a window of 1; what is upsampled there is cut off again
        x = net.add(f"down{level}.pool", MaxPool(tuple(min(2, n) for n in net[x].shape[1:-1]), ceil=same), x)
    inner = filters * 2 ** (levels - 1)
    x = _conv(net, "bottom.", 1, inner, norm, same, x)
    x = _conv(net, "bottom.", 2, 2 * inner, norm, same, x)
    for level in range(levels - 1, 0, -1):
        name, skip = f"up{level}.", skips[level - 1]
        outputs = net[skip].shape[-1]
        x = net.add(f"{name}conv0", ConvTranspose(net[x].shape[-1], kernel=2, stride=2, bias=False), x)
        x, skip = _crop(net, f"{name}crop", x, skip), _crop(net, f"{name}skip", skip, x)
        x = net.add(f"{name}concat", Concat(), skip, x)
        x = _conv(net, name, 1, outputs, norm, same, x)
        x = _conv(net, name, 2, outputs, norm, same, x)
    x = net.add("out", Conv(sample.outputs, kernel=1), x)
    found = net[x].shape[1:-1]
    if sample.classes is None or sample.positions != found:
        labels = "values" if sample.classes is None else f"labels of shape {sample.positions}"
        raise PlanError(
            f"unet3d: padding = {padding!r} makes logits for {found} of {sample.shape[:-1]} voxels, but a sample "
            f"of the data has {labels}; give a label for every voxel of the middle {found}"
        )
    return finish(net, x, sample)


def _conv(net: Graph, name: str, i: int, filters: int, norm: str, same: bool, x: str) -> str:
    """A 3x3x3 convolution, norm and ReLU."""
    x = net.add(f"{name}conv{i}", Conv(filters, kernel=3, padding=1 if same else 0, bias=norm == "none"), x)
    if norm != "none":
        x = net.add(f"{name}norm{i}", _norm(norm, filters), x)
    return net.add(f"{name}relu{i}", ReLU(), x)


def _norm(norm: str, filters: int) -> Layer:
    if norm == "group":
        return GroupNorm(gcd(GROUPS, filters))
    return BatchNorm() if norm == "batch" else InstanceNorm()


def _crop(net: Graph, name: str, x: str, like: str) -> str:
    """The middle of `x`, along every dim of positions where it is larger than `like`."""
    for dim, (n, kept) in enumerate(zip(net[x].shape[1:-1], net[like].shape[1:-1], strict=True), start=1):
        if n > kept:
            # An odd rest goes to the far end: pooling began its windows at the near end, and upsampling fills these.
            first = (n - kept) // 2
            x = net.add(f"{name}{dim}", Slice(dim, first, first + kept), x)
    return x
