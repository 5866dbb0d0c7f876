"""Networks as code, one file each: `build(batch, sample, **options)` gives a Graph with inputs "x", "y" and a loss."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from hpctrain.errors import ConfigError, HpctrainError
from hpctrain.graph import Graph
from hpctrain.layers import MSE, SoftmaxCrossEntropy
from hpctrain.partition import Shape

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "alexnet": ("alexnet", {}),
    "cosmoflow": ("cosmoflow", {}),
    "inception3": ("inception", {}),
    "lenet": ("lenet", {}),
    "mlp": ("mlp", {}),
    "resnet": ("resnet", {}),
    "resnet18": ("resnet", {"depth": 18}),
    "resnet34": ("resnet", {"depth": 34}),
    "resnet50": ("resnet", {"depth": 50}),
    "unet3d": ("unet3d", {}),
    "vgg": ("vgg", {}),
    "vgg11": ("vgg", {"depth": 11}),
    "vgg16": ("vgg", {"depth": 16}),
}
"""A name for [model] -> the file here that builds it, and the options that the name fixes."""


@dataclass(frozen=True)
class Sample:
    """What one sample of a dataset looks like: x channels last; y a label among `classes`, or `values` numbers.

    `positions` are the extents of y where it holds a label for each position, () where it is one label. Label `ignore`
    counts for nothing: a loss of labels takes it as its own `ignore`.
    """

    shape: Shape
    classes: int | None = None
    values: int = 0
    positions: Shape = ()
    ignore: int | None = None

    @property
    def outputs(self) -> int:
        """How many numbers a network predicts for a sample."""
        return self.classes if self.classes is not None else self.values


def start(batch: int, sample: Sample) -> tuple[Graph, str]:
    """A graph with its input "x" of shape (batch, *sample.shape)."""
    net = Graph()
    return net, net.input("x", (batch, *sample.shape))


def finish(net: Graph, x: str, sample: Sample) -> Graph:
    """Add the target "y" and the loss that fits it: softmax cross-entropy for labels, mean squared error for values.

    Labels of positions take predictions `x` (batch, *positions, classes). Raises PlanError where they do not fit.
    """
    batch = net[x].shape[0]
    if sample.classes is not None:
        labels = net.input("y", (batch, *sample.positions), integer=True)
        net.add("loss", SoftmaxCrossEntropy(ignore=sample.ignore), x, labels)
    else:
        net.add("loss", MSE(), x, net.input("y", (batch, sample.values)))
    return net


def one_of(option: str, value: Any, choices: Collection[Any]) -> Any:
    """`value`, if it is among `choices`; raises ValueError naming the option and these otherwise."""
    if value not in choices:
        raise ValueError(f"{option} = {value!r}; choose {', '.join(map(str, choices))}")
    return value


def scaled(filters: int, width: float) -> int:
    """`filters` times `width`, rounded up to an even number, which two groups divide."""
    if width <= 0:
        raise ValueError(f"width = {width}; give a number above 0")
    return 2 * ceil(filters * width / 2)


def build(name: str, batch: int, sample: Sample, options: Mapping[str, Any]) -> Graph:
    """The network `name`: one of ZOO, or "file.py:function". Raises ConfigError naming what does not fit."""
    fixed: Mapping[str, Any] = {}
    if ":" in name:
        builder = _from_file(*name.rsplit(":", 1))
    elif name in ZOO:
        file, fixed = ZOO[name]
        builder = importlib.import_module(f"hpctrain.models.{file}").build
    else:
        raise ConfigError(f"model.name = {name!r}: not a network here; choose {', '.join(ZOO)} or 'file.py:function'")
    parameters = [p for p in list(inspect.signature(builder).parameters.values())[2:] if p.name not in fixed]
    accepted = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    unknown = [key for key in options if key not in accepted]
    if unknown and len(accepted) == len(parameters):
        takes = ", ".join(accepted) or "no options"
        raise ConfigError(f"model.options.{unknown[0]}: {name} has no such option; it takes {takes}")
    if ":" in name:
        with _explained(name.rsplit(":", 1)[0]):
            return builder(batch, sample, **options)
    try:
        return builder(batch, sample, **fixed, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.options = {dict(options)}: {name} cannot be built: {error}") from error


def _from_file(path: str, function: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if not Path(path).is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"model.name: no Python file {path}; paths are relative to the current folder")
    module = importlib.util.module_from_spec(spec)
    with _explained(path):
        spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        raise ConfigError(f"model.name: {path} has no function {function}(batch, sample, **options)")
    return getattr(module, function)


@contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns what the user's code in `path` raises into a ConfigError with file and line, and then the traceback.

    Errors on purpose (a layer that does not fit) say all that there is to say, and stay.
    """
    try:
        yield
    except (HpctrainError, MemoryError):
        raise
    except Exception as error:
        raise ConfigError(_where(path, error)) from error


def _where(path: str, error: Exception) -> str:
    frames, own = traceback.extract_tb(error.__traceback__), os.path.abspath(path)
    theirs = [i for i, frame in enumerate(frames) if os.path.abspath(frame.filename) == own]
    line, what = (frames[theirs[-1]].lineno if theirs else None), str(error)
    if isinstance(error, SyntaxError):
        line, what = line or error.lineno, error.msg
    at = path if line is None else f"{path}, line {line}"
    text = f"{at}: {type(error).__name__}: {' '.join(what.split())}"
    if line is None:  # called in a way that it does not take
        return text
    shown = traceback.format_list(frames[theirs[0] :]) if theirs else []  # not the frames that lead to theirs
    return "".join([f"{text}\nTraceback (most recent call last):\n", *shown, *traceback.format_exception_only(error)])[
        :-1
    ]
