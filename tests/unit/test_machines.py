"""The machines that come with the program: every figure says where it is from, and is of a likely size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from hpctrain import config_file, machine, models
from hpctrain.errors import ConfigError
from hpctrain.machine import Machine
from hpctrain.models import Sample

EXAMPLES = Path(__file__).parents[2] / "examples" / "papers"

WITHOUT = ("name", "source", "date", "version", "library", "topology")
"""Fields that are no figures."""


def figures(found: Machine) -> set[str]:
    """Dotted names of all figures that a file gives."""
    names = set()
    for field in found.__struct_fields__:
        value: Any = getattr(found, field)
        if field in WITHOUT or value == getattr(Machine(), field):
            continue
        if isinstance(value, msgspec.Struct):
            default = {f.name: f.default for f in msgspec.structs.fields(value)}
            names |= {f"{field}.{name}" for name in value.__struct_fields__ if getattr(value, name) != default[name]}
        else:
            names.add(field)
    return names


def test_these_are_shipped() -> None:
    assert set(machine.shipped()) == {
        *("cori-knl", "p100-cluster", "titanxp-node"),
        *("perlmutter-gpu", "frontier", "h100-cluster"),
    }


@pytest.mark.parametrize("name", machine.shipped())
def test_every_figure_has_a_source_and_every_source_a_figure(name: str) -> None:
    found = machine.named(name)
    assert found.date
    assert found.name
    assert figures(found) == set(found.source)
    assert all(len(text) > 5 for text in found.source.values())


@pytest.mark.parametrize("name", machine.shipped())
def test_figures_are_of_a_likely_size(name: str) -> None:
    found = machine.named(name)
    assert found.compute is not None
    assert found.memory is not None
    for level in (found.socket, found.node, found.network):
        if level is not None:
            assert 1e-7 < level.alpha < 1e-4
            assert 1e9 < 1 / level.beta < 1e12
            assert level.gamma < level.beta  # adding is faster than sending
    assert 1e12 < found.compute.flops < 1e15
    assert 1e11 < found.compute.bandwidth < 1e13
    calls = [calls for calls, _ in found.compute.efficiency]
    assert calls == sorted(calls)
    assert all(0.01 < share < 2.25 for _, share in found.compute.efficiency)  # Winograd multiplies 2.25 times less
    assert 1e9 < found.memory < 1e12
    assert 0 <= found.price < 20  # an hour of one rank
    if found.power is not None:
        assert 5 < found.power.idle < found.power.busy < 1500
    if found.node is not None and found.network is not None:
        assert found.node.beta <= found.network.beta / min(1, found.links / (found.per_host or 1))
    if found.socket is not None and found.node is not None:
        assert found.socket.beta <= found.node.beta


def test_unknown_machine_is_refused_with_those_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"no such file, and not one of cori-knl, frontier.*\n.*calibrate --out summit"
    ):
        machine.named("summit")


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.toml")), ids=lambda path: path.stem)
def test_examples_are_for_shipped_machines_and_need_no_data(path: Path) -> None:
    config = config_file.load(path)
    assert config.plan.machine in machine.shipped()
    described = config.data.sample
    assert described is not None
    assert described.count > config.train.batch
    sample = Sample(described.shape, classes=described.classes)
    graph = models.build(config.model.name, 2, sample, config.model.options)
    kinds = {type(node.layer).__name__ for node in graph}
    assert set(config.plan.only) <= kinds
