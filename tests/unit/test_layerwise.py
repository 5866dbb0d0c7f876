"""What layer-wise parallelism moves and how it cuts, beside Jia et al. 2018, arXiv 1802.04924: docs/papers.md."""

from __future__ import annotations

import importlib.util
import re
from math import prod
from pathlib import Path
from typing import Any

import pytest

from hpctrain import models
from hpctrain.graph import Graph
from hpctrain.models import Sample
from hpctrain.partition import Partition
from hpctrain.planner.cost import price
from hpctrain.planner.plan import uniform
from hpctrain.planner.setting import Setting

GIB = 2**30


def script() -> Any:
    """docs/papers.py, which makes the tables of docs/papers.md."""
    spec = importlib.util.spec_from_file_location("docs_papers", Path(__file__).parents[2] / "docs" / "papers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


papers = script()


def network(name: str, gpus: int) -> Graph:
    """For 32 images a GPU."""
    side = 299 if name == "inception3" else 224
    return models.build(name, 32 * gpus, Sample((side, side, 3), classes=1000), {})


@pytest.mark.parametrize(
    ("name", "gpus", "published"),
    [
        *(("vgg16", gpus, gib) for gpus, gib in {2: 2.056, 4: 4.112, 8: 8.225, 16: 16.45}.items()),
        *(("inception3", gpus, gib) for gpus, gib in {2: 0.354, 4: 0.709, 8: 1.418, 16: 2.837}.items()),
    ],
)
def test_volumes_of_data_parallelism(name: str, gpus: int, published: float) -> None:
    """Every GPU sends its gradients to a parameter server and gets weights back: figure 8, in GiB of a step."""
    graph = network(name, gpus)
    weights = sum(prod(weight.shape) for _, _, weight in graph.weights())
    found = papers.moved(graph, uniform(graph, Partition(batch=gpus)))
    assert found == pytest.approx(2 * 4 * weights * gpus / GIB, rel=1e-12)  # and nothing else moves
    # the paper's networks have 138.0 and 23.8 million weights, ours 138.36 and 23.83
    assert found == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(
    ("name", "gpus", "published"),
    [
        *(("vgg16", gpus, gib) for gpus, gib in {2: 0.238, 4: 0.541, 8: 1.336, 16: 3.688}.items()),
        *(("inception3", gpus, gib) for gpus, gib in {2: 0.326, 4: 0.656, 8: 1.328, 16: 2.718}.items()),
    ],
)
def test_volumes_of_one_weird_trick(name: str, gpus: int, published: float) -> None:
    """Dense layers by channels: their inputs move in place of their weights."""
    graph = network(name, gpus)
    assert papers.moved(graph, papers.one_weird_trick(graph, gpus)) == pytest.approx(published, rel=0.015)


def cuts(gpus: int, names: str) -> set[str]:
    """How the search cuts the layers of VGG-16 whose names start so."""
    plan = papers.found_plan(gpus).plan
    return {str(partition) for name, partition in plan.partitions.items() if re.match(names, name)}


@pytest.mark.parametrize("gpus", [4, 16])
def test_pattern_of_vgg16(gpus: int) -> None:
    """Table 5: early layers by samples over all GPUs, dense layers by channels over few, and never over more again."""
    assert cuts(gpus, "(conv|pool)[1-4]") == {f"batch={gpus}"}
    assert cuts(gpus, "fc[12]") == {"channel=4"}
    sizes = [partition.size for name, partition in papers.found_plan(gpus).plan.partitions.items() if name != "y"]
    assert sizes == sorted(sizes, reverse=True)


def test_what_of_the_pattern_does_not_come_out() -> None:
    """Block 5 by height and width, and fc3 on two: docs/papers.md says why. The paper's plan is not far behind."""
    assert cuts(4, "(conv|pool)5") == {"batch=4"}
    assert cuts(4, "fc3") == {"channel=4"}
    found = papers.example("vgg16-p100")
    setting = Setting.of(found.config, found.machine)
    published = price(found.graph, papers.as_published(found.graph), setting).seconds
    assert papers.found_plan(4).cost.seconds < published < 1.03 * papers.found_plan(4).cost.seconds


def test_the_search_is_no_worse_than_what_it_is_compared_with() -> None:
    found = papers.example("vgg16-p100")
    setting, graph = Setting.of(found.config, found.machine), found.graph
    others = [
        papers.one_weird_trick(graph, 4),
        *(uniform(graph, p) for p in (Partition(batch=4), Partition(channel=4))),
    ]
    assert papers.found_plan(4).cost.seconds <= min(price(graph, plan, setting).seconds for plan in others)


def test_the_tables_of_the_document_are_not_stale() -> None:
    assert papers.DOCUMENT.read_text(encoding="utf-8") == papers.text(), "run `python docs/papers.py`"
