"""The same network in PyTorch as its users write it: nn modules, in-place activations, contiguous weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from common import Seconds, reset_peak, timed
from networks import CASES
from ours import OPTIM, random_batch
from torch import nn
from torch.nn import functional as F

from hpctrain import layers, memory
from hpctrain.graph import Graph, Node


class Peer(nn.Module):
    """A graph of ours, layer by layer. Takes channels-first tensors of either memory format."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.predictions = graph.losses[0].inputs[0]
        self.parts = nn.ModuleDict()
        self.program: list[tuple[Callable[..., torch.Tensor], Node, list[str]]] = []
        left = {node.name: len(graph.consumers(node.name)) for node in graph}
        for node in graph:
            if isinstance(node.layer, layers.Input | layers.Loss):
                continue
            run = self._part(node)
            if isinstance(run, nn.Module):
                self.parts[node.name.replace(".", "/")] = run
            for name in node.inputs:
                left[name] -= 1
            # what nobody needs any more is let go at once
            self.program.append((run, node, [name for name in node.inputs if left[name] == 0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Predictions for `x`."""
        values = {"x": x}
        del x
        for run, node, done in self.program:
            result = run(*(values[name] for name in node.inputs))
            for name in done:
                del values[name]
            values[node.name] = result
        return values[self.predictions]

    def _part(self, node: Node) -> Callable[..., torch.Tensor]:
        layer, dims, channels = node.layer, len(node.input_shapes[0]) - 2, node.input_shapes[0][-1]
        # in place, as everybody has it, where nobody else reads what is overwritten
        alone = len(self.graph.consumers(node.inputs[0])) == 1 and node.inputs[0] != "x"

        def of(name: str) -> Any:
            return getattr(nn, f"{name}{dims}d")

        if isinstance(layer, layers.Conv):
            return of("Conv")(
                channels,
                layer.filters,
                layer.kernel,
                layer.stride,
                layer.padding,
                layer.dilation,
                layer.groups,
                layer.bias,
            )
        if isinstance(layer, layers.Dense):
            return nn.Linear(channels, layer.units, layer.bias)
        if isinstance(layer, layers.BatchNorm):
            return of("BatchNorm")(channels, layer.eps, layer.momentum)
        if isinstance(layer, layers.ReLU):
            return nn.ReLU(inplace=alone)
        if isinstance(layer, layers.LeakyReLU):
            return nn.LeakyReLU(layer.slope, inplace=alone)
        if isinstance(layer, layers.MaxPool):
            return of("MaxPool")(layer.kernel, layer.stride, layer.padding, layer.dilation, ceil_mode=layer.ceil)
        if isinstance(layer, layers.AdaptiveAvgPool):
            return of("AdaptiveAvgPool")(layer.size)
        if isinstance(layer, layers.GlobalAvgPool):
            return nn.Sequential(of("AdaptiveAvgPool")(1), nn.Flatten())
        if isinstance(layer, layers.Flatten):
            return nn.Flatten()
        if isinstance(layer, layers.Dropout) and layer.rate == 0:
            return nn.Identity()
        if isinstance(layer, layers.Add):
            return torch.Tensor.add_ if alone else torch.add
        raise TypeError(f"layer {node.name}: {type(layer).__name__} has no counterpart here yet; add it to peers.py")

    def named(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by our names."""
        own = {"gamma": "weight", "beta": "bias"}
        return {
            f"{node.name}.{name}": getattr(self.parts[node.name.replace(".", "/")], own.get(name, name))
            for node, name, _ in self.graph.weights()
        }

    def layout(self, name: str, array: np.ndarray) -> np.ndarray:
        """One of our parameters or its gradient, dims and elements in PyTorch's order."""
        node = self.graph[name.rpartition(".")[0]]
        if isinstance(node.layer, layers.Conv) and array.ndim > 2:
            return np.moveaxis(array, (-1, -2), (0, 1))
        if isinstance(node.layer, layers.Dense) and array.ndim == 2:
            source = self.graph[node.inputs[0]]
            while isinstance(source.layer, layers.Dropout):
                source = self.graph[source.inputs[0]]
            if isinstance(source.layer, layers.Flatten):  # positions before channels with us
                inner = array.reshape(*source.input_shapes[0][1:], -1)
                array = np.moveaxis(inner, -2, 0).reshape(array.shape)
            return array.T
        return array


class Training:
    """A peer with its optimizer and a batch; in bf16 with autocast, as its documentation says."""

    def __init__(self, graph: Graph, memory_format: str, precision: str = "float32") -> None:
        self.net = Peer(graph)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        batch = random_batch(graph)
        x = torch.tensor(np.moveaxis(batch["x"], -1, 1).copy())
        if memory_format == "channels_last":
            self.format = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
            self.net, x = self.net.to(memory_format=self.format), x.to(memory_format=self.format)
        self.x, self.y = x, torch.tensor(batch["y"])
        self.criterion: Callable[..., torch.Tensor] = F.cross_entropy if self.y.dtype == torch.int64 else F.mse_loss
        # the fastest of its implementations
        self.optimizer = torch.optim.SGD(self.net.parameters(), OPTIM.lr, OPTIM.momentum, fused=True)

    def step(self, net: nn.Module | None = None) -> None:
        """One step of training, of `net` where the peer is wrapped in it."""
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(net)[1].backward()
        self.optimizer.step()

    def loss(self, net: nn.Module | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Predictions and the loss on them."""
        with self.autocast:
            predictions = (net or self.net)(self.x)
            return predictions, self.criterion(predictions, self.y)


class Side:
    """For `common.Worker`."""

    def __init__(self, name: str, batch: int, memory_format: str, threads: int, precision: str = "float32") -> None:
        torch.set_num_threads(threads)
        self.start = memory.peak()
        self.training = Training(CASES[name].build(batch), memory_format, precision)

    def load(self, weights: dict[str, np.ndarray]) -> None:
        """Take over our weights."""
        net = self.training.net
        named = net.named()
        if named.keys() != weights.keys() or len(named) != len(list(net.parameters())):
            raise ValueError(f"parameters differ: {sorted(named.keys() ^ weights.keys())}")
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(torch.from_numpy(np.ascontiguousarray(net.layout(name, weights[name]))))

    def differences(self, expected: dict[str, np.ndarray]) -> dict[str, float]:
        """|ours - theirs| / |theirs|, as norms, for what `ours.Side.first_gradients` returns."""
        net = self.training.net
        predictions, loss = self.training.loss()
        loss.backward()
        found = {name: p.grad.numpy() for name, p in net.named().items()}
        expected = {name: net.layout(name, a) if name in found else a for name, a in expected.items()}
        found |= {"predictions": predictions.detach().float().numpy(), "loss": loss.detach().float().numpy().reshape(1)}
        return {name: _distance(expected[name], theirs) for name, theirs in found.items()}

    def reset_memory(self) -> None:
        """Let `memory` count from here."""
        self.training.optimizer.zero_grad(set_to_none=True)
        reset_peak()

    def memory(self) -> tuple[int, int]:
        """As that of our side."""
        return memory.peak(), self.start

    def step(self, times: int = 1) -> Seconds:
        """Steps, timed."""
        return timed(self.training.step, times)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
