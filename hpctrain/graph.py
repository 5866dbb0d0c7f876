"""A network: named layers and the tensors between them, a DAG with inferred shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpctrain.errors import PlanError
from hpctrain.layers import Input, Layer, Loss, Weight
from hpctrain.partition import Shape


@dataclass(frozen=True)
class Node:
    """One layer of a graph: its inputs by name, and the global shapes that follow."""

    name: str
    layer: Layer
    inputs: tuple[str, ...]
    input_shapes: tuple[Shape, ...]
    shape: Shape


class Graph:
    """Layers in the order they were added, which is a topological order since inputs must exist already.

    net = Graph()
    x = net.input("x", (64, 28, 28, 1))
    x = net.add("conv1", Conv(6, kernel=5, padding=2), x)
    """

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}
        self._uses: dict[str, list[tuple[Node, int]]] = {}

    def input(self, name: str, shape: Shape, integer: bool = False) -> str:
        """A tensor that the loader fills, batch dim first. Returns `name`."""
        return self.add(name, Input(tuple(shape), integer))

    def add(self, name: str, layer: Layer, *inputs: str) -> str:
        """Append `layer` reading `inputs`; returns `name`. Raises PlanError, naming it, where shapes do not fit."""
        if name in self.nodes:
            raise PlanError(f"layer {name}: the name is taken; give each layer its own")
        if missing := [i for i in inputs if i not in self.nodes]:
            raise PlanError(f"layer {name}: no layer {missing[0]!r} before it; there are {', '.join(self.nodes)}")
        shapes = tuple(self.nodes[i].shape for i in inputs)
        try:
            if len(shapes) not in layer.inputs:
                some = f"{layer.inputs.start}" if len(layer.inputs) == 1 else f"{layer.inputs.start} or more"
                raise PlanError(f"{len(shapes)} inputs; give {some}")
            shape = layer.output_shape(*shapes)
            self._require_kinds(layer, inputs, shapes)
        except PlanError as error:
            raise PlanError(f"layer {name} (input {' and '.join(map(str, shapes))}): {error}") from None
        self.nodes[name] = Node(name, layer, inputs, shapes, shape)
        self._uses[name] = []
        for slot, used in enumerate(inputs):
            self._uses[used].append((self.nodes[name], slot))
        return name

    def _require_kinds(self, layer: Layer, inputs: tuple[str, ...], shapes: tuple[Shape, ...]) -> None:
        """Raises PlanError where labels go to a layer that computes with numbers, or the reverse."""
        for name, wanted in zip(inputs, layer.labels(*shapes), strict=True):
            source = self.nodes[name].layer
            given = isinstance(source, Input) and source.integer
            if wanted and not given:
                raise PlanError(f"{name} holds numbers, but labels are due; make it an input with integer=True")
            if given and not wanted:
                raise PlanError(f"{name} holds labels, but numbers are due; make it an input without integer=True")

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def consumers(self, name: str) -> list[tuple[Node, int]]:
        """(node, which of its inputs) for every use of `name`, in graph order."""
        return list(self._uses[name])

    @property
    def losses(self) -> list[Node]:
        """The loss layers, in graph order. Raises PlanError where there is none."""
        found = [node for node in self if isinstance(node.layer, Loss)]
        if not found:
            raise PlanError(f"a network is trained on a loss, this one has none among {', '.join(self.nodes)}")
        return found

    def weights(self) -> Iterator[tuple[Node, str, Weight]]:
        """(node, name, weight) of every trained parameter."""
        for node in self:
            for name, weight in node.layer.weights(*node.input_shapes).items():
                yield node, name, weight
