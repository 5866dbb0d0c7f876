"""What users may rely on: names of the package and commands of the command line, which change on purpose only."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest

import hpctrain
from hpctrain import cli

API = ["Distribution", "Exchange", "Executor", "Graph", "Partition", "Plan", "ProcessGrid", "layers"]
COMMANDS = {"bench", "calibrate", "data", "demo", "doctor", "plan", "train", "verify"}
LAYERS = [
    *("AdaptiveAvgPool", "Add", "AvgPool", "BCEWithLogits", "BatchNorm", "Concat", "Conv", "ConvTranspose", "Dense"),
    *("Dice", "Dropout", "Flatten", "GELU", "GlobalAvgPool", "GroupNorm", "Huber", "Input", "InstanceNorm", "Layer"),
    *("LayerNorm", "LeakyReLU", "Loss", "MAE", "MSE", "MaxPool", "Multiply", "Op", "Phase", "Place", "ReLU"),
    *("Reshape", "SiLU", "Sigmoid", "Slice", "Softmax", "SoftmaxCrossEntropy", "Softplus", "Tanh", "Upsample"),
    "Weight",
]


def test_names_of_the_package() -> None:
    assert sorted(hpctrain.__all__) == API == dir(hpctrain)
    assert sorted(hpctrain.layers.__all__) == sorted(LAYERS)


@pytest.mark.parametrize("name", API)
def test_every_public_name_is_documented(name: str) -> None:
    documentation = getattr(hpctrain, name).__doc__
    assert documentation
    assert not documentation.startswith(f"{name}(")  # what a dataclass gets where nobody wrote any


@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_is_documented(name: str) -> None:
    documentation = getattr(hpctrain.layers, name).__doc__
    assert documentation
    assert not documentation.startswith(f"{name}(")


def test_unknown_name_says_which_there_are() -> None:
    with pytest.raises(AttributeError, match="'Tensor'; it has Distribution, Exchange"):
        hpctrain.Tensor  # noqa: B018


def test_commands() -> None:
    (subparsers,) = (a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert set(subparsers.choices) == COMMANDS


def test_names_are_imported_when_used() -> None:
    code = "import sys, hpctrain; assert 'numpy' not in sys.modules; hpctrain.Graph; assert 'mpi4py' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
