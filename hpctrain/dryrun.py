"""`hpctrain train --dry-run`: what a run would be."""

from __future__ import annotations

import sys
from typing import Any

from hpctrain import launch, prepare
from hpctrain.config import Config, to_toml
from hpctrain.console import print_json


def run(config: Config, as_json: bool) -> int:
    """Print the resolved config, what every layer would become, and the memory of the plan, without starting MPI."""
    data, _ = prepare.open_datasets(config)
    graph = prepare.build_graph(config, data)
    plan = prepare.make_plan(config, graph)
    layers: list[dict[str, Any]] = [
        {
            "layer": node.name,
            "kind": type(node.layer).__name__,
            "shape": list(node.shape),
            "partition": plan.partitions[node.name].parts(),
        }
        for node in graph
    ]
    print(to_toml(config))
    print("\n".join(f"# {note}" for note in plan.notes))
    width = max(len(layer["layer"]) for layer in layers)
    for layer in layers:
        name, shape = layer["layer"], " x ".join(map(str, layer["shape"]))
        print(f"# {name.ljust(width)}  {layer['kind']:<20} {shape:<24} {plan.partitions[name]}")
    print(f"# memory by the plan: {prepare.most_memory(config, graph, plan)}")
    print(f"# {launch.command_line(plan.ranks, ['train', *[w for w in sys.argv[2:] if w != '--dry-run']])}")
    if as_json:
        print_json("train", layers)
    return 0
