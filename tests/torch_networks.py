"""Networks in PyTorch, written from their publications: what ours are compared with, given the same weights.

Inputs and results are channels last, as ours; in between is PyTorch's own layout.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F


class Weights:
    """Parameters and statistics of one of our networks by name, in our layout, as PyTorch's functions take them.

    `used` tells which parameters a network has asked for.
    """

    def __init__(
        self, trained: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], training: bool = False
    ) -> None:
        self.trained, self.state, self.training = trained, state, training
        self.used: set[str] = set()

    def take(self, name: str) -> torch.Tensor:
        """A parameter that must exist."""
        self.used.add(name)
        return self.trained[name]

    def bias(self, name: str) -> torch.Tensor | None:
        """The bias of a layer, or None where it has none."""
        return self.take(f"{name}.bias") if f"{name}.bias" in self.trained else None

    def conv(self, name: str, x: torch.Tensor, stride: int = 1, padding: object = 0, groups: int = 1) -> torch.Tensor:
        """Convolution over 2 or 3 dims; our weight is (*kernel, C/groups, filters)."""
        weight = torch.movedim(self.take(f"{name}.weight"), (-1, -2), (0, 1))
        function = F.conv2d if x.ndim == 4 else F.conv3d
        return function(x, weight, self.bias(name), stride=stride, padding=padding, groups=groups)

    def up(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Transposed convolution over 3 dims with stride 2."""
        weight = torch.movedim(self.take(f"{name}.weight"), (-2, -1), (0, 1))
        return F.conv_transpose3d(x, weight, self.bias(name), stride=2)

    def norm(self, name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
        """Batch norm with the batch's statistics in training, the running ones otherwise."""
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        gamma, beta = self.take(f"{name}.gamma"), self.take(f"{name}.beta")
        return F.batch_norm(x, mean, var, gamma, beta, training=self.training, momentum=0.1, eps=eps)

    def dense(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Our weight is (inputs, units)."""
        y = x @ self.take(f"{name}.weight")
        bias = self.bias(name)
        return y if bias is None else y + bias


def channels_first(x: torch.Tensor) -> torch.Tensor:
    return torch.movedim(x, -1, 1)


def flat(x: torch.Tensor) -> torch.Tensor:
    """Per sample, in the order of our layout."""
    return torch.movedim(x, 1, -1).flatten(1)


# --- AlexNet, VGG ---------------------------------------------------------------------------------------------------


def alexnet(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """torchvision's, in evaluation mode."""
    return _alexnet(w, channels_first(x), 2, 1)


def alexnet_two_groups(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Krizhevsky et al. 2012 without response normalization, in evaluation mode."""
    return _alexnet(w, channels_first(x), 0, 2)


def _alexnet(w: Weights, x: torch.Tensor, padding: int, groups: int) -> torch.Tensor:
    x = F.max_pool2d(F.relu(w.conv("conv1", x, 4, padding)), 3, 2)
    x = F.max_pool2d(F.relu(w.conv("conv2", x, 1, 2, groups)), 3, 2)
    x = F.relu(w.conv("conv3", x, 1, 1))
    x = F.relu(w.conv("conv4", x, 1, 1, groups))
    x = F.max_pool2d(F.relu(w.conv("conv5", x, 1, 1, groups)), 3, 2)
    x = flat(F.adaptive_avg_pool2d(x, 6))
    return w.dense("fc3", F.relu(w.dense("fc2", F.relu(w.dense("fc1", x)))))


def vgg11(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Configuration A of Simonyan & Zisserman 2015, in evaluation mode."""
    x = channels_first(x)
    for name in ("1_1", "pool", "2_1", "pool", "3_1", "3_2", "pool", "4_1", "4_2", "pool", "5_1", "5_2", "pool"):
        x = F.max_pool2d(x, 2) if name == "pool" else F.relu(w.conv(f"conv{name}", x, padding=1))
    x = flat(F.adaptive_avg_pool2d(x, 7))
    return w.dense("fc3", F.relu(w.dense("fc2", F.relu(w.dense("fc1", x)))))


# --- ResNet ---------------------------------------------------------------------------------------------------------


def resnet18(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """He et al. 2016, table 1."""
    x = _imagenet_stem(w, x)
    for stage in (1, 2, 3, 4):
        for block in (0, 1):
            at = f"layer{stage}.{block}"
            first = stage > 1 and block == 0
            y = F.relu(w.norm(f"{at}.norm1", w.conv(f"{at}.conv1", x, 2 if first else 1, 1)))
            y = w.norm(f"{at}.norm2", w.conv(f"{at}.conv2", y, 1, 1))
            x = F.relu(y + (_projection(w, at, x, 2) if first else x))
    return w.dense("fc", x.mean(dim=(2, 3)))


def resnet50(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """He et al. 2016, table 1, with the stride in the 3x3 convolution."""
    x = _imagenet_stem(w, x)
    for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3)):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            y = F.relu(w.norm(f"{at}.norm1", w.conv(f"{at}.conv1", x)))
            y = F.relu(w.norm(f"{at}.norm2", w.conv(f"{at}.conv2", y, stride, 1)))
            y = w.norm(f"{at}.norm3", w.conv(f"{at}.conv3", y))
            x = F.relu(y + (x if block > 0 else _projection(w, at, x, stride)))
    return w.dense("fc", x.mean(dim=(2, 3)))


def _imagenet_stem(w: Weights, x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(F.relu(w.norm("norm1", w.conv("conv1", channels_first(x), 2, 3))), 3, 2, 1)


def _projection(w: Weights, at: str, x: torch.Tensor, stride: int) -> torch.Tensor:
    return w.norm(f"{at}.shortcut.norm", w.conv(f"{at}.shortcut.conv", x, stride))


# --- Inception-v3 ---------------------------------------------------------------------------------------------------


def inception3(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Szegedy et al. 2016 as in torchvision, without auxiliary head and dropout."""

    def unit(name: str, x: torch.Tensor, stride: int = 1, padding: object = 0) -> torch.Tensor:
        return F.relu(w.norm(f"{name}.norm", w.conv(f"{name}.conv", x, stride, padding), eps=0.001))

    def average(x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(x, 3, 1, 1)

    tall, flat_ = (3, 0), (0, 3)
    x = unit("conv2b", unit("conv2a", unit("conv1a", channels_first(x), 2)), padding=1)
    x = F.max_pool2d(unit("conv4a", unit("conv3b", F.max_pool2d(x, 3, 2))), 3, 2)
    for at in ("mixed5b", "mixed5c", "mixed5d"):
        one = unit(f"{at}.1x1.1", x)
        five = unit(f"{at}.5x5.2", unit(f"{at}.5x5.1", x), 1, 2)
        three = unit(f"{at}.3x3.3", unit(f"{at}.3x3.2", unit(f"{at}.3x3.1", x), 1, 1), 1, 1)
        x = torch.cat([one, five, three, unit(f"{at}.pool.2", average(x))], 1)
    at = "mixed6a"
    twice = unit(f"{at}.3x3twice.3", unit(f"{at}.3x3twice.2", unit(f"{at}.3x3twice.1", x), 1, 1), 2)
    x = torch.cat([unit(f"{at}.3x3.1", x, 2), twice, F.max_pool2d(x, 3, 2)], 1)
    for at in ("mixed6b", "mixed6c", "mixed6d", "mixed6e"):
        one = unit(f"{at}.1x1.1", x)
        seven = unit(f"{at}.7x7.3", unit(f"{at}.7x7.2", unit(f"{at}.7x7.1", x), 1, flat_), 1, tall)
        twice = unit(f"{at}.7x7twice.1", x)
        for i, padding in ((2, tall), (3, flat_), (4, tall), (5, flat_)):
            twice = unit(f"{at}.7x7twice.{i}", twice, 1, padding)
        x = torch.cat([one, seven, twice, unit(f"{at}.pool.2", average(x))], 1)
    at = "mixed7a"
    three = unit(f"{at}.3x3.2", unit(f"{at}.3x3.1", x), 2)
    seven = unit(f"{at}.7x7.3", unit(f"{at}.7x7.2", unit(f"{at}.7x7.1", x), 1, flat_), 1, tall)
    x = torch.cat([three, unit(f"{at}.7x7.4", seven, 2), F.max_pool2d(x, 3, 2)], 1)
    for at in ("mixed7b", "mixed7c"):
        one = unit(f"{at}.1x1.1", x)
        three = unit(f"{at}.3x3.1", x)
        three = torch.cat([unit(f"{at}.3x3.2a", three, 1, (0, 1)), unit(f"{at}.3x3.2b", three, 1, (1, 0))], 1)
        twice = unit(f"{at}.3x3twice.2", unit(f"{at}.3x3twice.1", x), 1, 1)
        twice = torch.cat([unit(f"{at}.3x3twice.3a", twice, 1, (0, 1)), unit(f"{at}.3x3twice.3b", twice, 1, (1, 0))], 1)
        x = torch.cat([one, three, twice, unit(f"{at}.pool.2", average(x))], 1)
    return w.dense("fc", x.mean(dim=(2, 3)))


# --- volumes --------------------------------------------------------------------------------------------------------


def unet3d(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Çiçek et al. 2016 with as many levels as there are weights, padded so that every extent is kept.

    A volume of odd extent is pooled as if one more voxel of -inf followed it.
    """
    return _unet3d(w, x, 1)


def unet3d_valid(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """The same without padding: skips lose as much on either side as the path below them."""
    return _unet3d(w, x, 0)


def _unet3d(w: Weights, x: torch.Tensor, padding: int) -> torch.Tensor:
    def double(at: str, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(w.norm(f"{at}.norm1", w.conv(f"{at}.conv1", x, 1, padding)))
        return F.relu(w.norm(f"{at}.norm2", w.conv(f"{at}.conv2", x, 1, padding)))

    levels = 1 + sum(name.startswith("up") and name.endswith("conv0.weight") for name in w.trained)

    def below(x: torch.Tensor, level: int) -> torch.Tensor:
        if level == levels:
            return double("bottom", x)
        skip = double(f"down{level}", x)
        odd = [extent % 2 * padding for extent in reversed(skip.shape[2:])]
        more = F.pad(skip, [n for extent in odd for n in (0, extent)], value=float("-inf"))
        y = w.up(f"up{level}.conv0", below(F.max_pool3d(more, 2), level + 1))
        if padding:
            y = y[(..., *(slice(0, n) for n in skip.shape[2:]))]
        else:
            lost = [(n - n % 2 - m) // 2 for n, m in zip(skip.shape[2:], y.shape[2:], strict=True)]
            skip = skip[(..., *(slice(k, k + m) for k, m in zip(lost, y.shape[2:], strict=True)))]
        return double(f"up{level}", torch.cat([skip, y], 1))

    return torch.movedim(w.conv("out", below(channels_first(x), 1)), 1, -1)


def cosmoflow_mlperf(w: Weights, x: torch.Tensor) -> torch.Tensor:
    """The reference model of MLPerf HPC 1.0 without its last scaled tanh, in evaluation mode."""
    x = channels_first(x)
    for i in range(1, 6):
        x = F.max_pool3d(F.leaky_relu(w.conv(f"conv{i}", x, padding=1), 0.3), 2)
    x = F.leaky_relu(w.dense("fc1", flat(x)), 0.3)
    return w.dense("fc3", F.leaky_relu(w.dense("fc2", x), 0.3))
