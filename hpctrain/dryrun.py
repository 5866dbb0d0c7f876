"""`hpctrain train --dry-run`: what a run would be."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hpctrain import launch, machine, prepare
from hpctrain.comm.allreduce import choose
from hpctrain.comm.shared import room
from hpctrain.config import AUTO, Config
from hpctrain.config_file import to_toml
from hpctrain.console import print_json, wrapped
from hpctrain.data.files import write_atomic
from hpctrain.errors import PlanError
from hpctrain.graph import Graph
from hpctrain.memory import mib
from hpctrain.optim import schedule
from hpctrain.planner.plan import Plan
from hpctrain.planner.replicas import ranks, replica_groups
from hpctrain.precision import TYPES


def run(config: Config, words: Sequence[str], plan_out: Path | None, as_json: bool) -> int:
    """Print the resolved config, what every layer would become, and the memory of the plan, without starting MPI.

    The last line runs it: `words` are those of the command line that asks for that. The plan goes to `plan_out` too.
    """
    if config.plan.grid == AUTO:
        given = [word for word in words[1:] if not word.startswith("plan.grid=")]
        line = shlex.join(["hpctrain", "plan", *given, "--ranks", "2", "-o", "plan.json"])
        raise PlanError(
            f'plan.grid = "{AUTO}" is found for the ranks of a run, and --dry-run has none; to see it for any number '
            f"of them, and have it as a file for plan.grid:\n{line}"
        )
    data, _ = prepare.open_datasets(config)
    copies = prepare.replicas(config)
    alone = prepare.of_replica(config, copies)
    graph = prepare.build_graph(alone, data)
    plan = prepare.make_plan(alone, graph)
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
    print("\n".join(wrapped(note, "# ") for note in plan.notes))
    width = max(len(layer["layer"]) for layer in layers)
    for layer in layers:
        name, shape = layer["layer"], " x ".join(map(str, layer["shape"]))
        print(f"# {name.ljust(width)}  {layer['kind']:<20} {shape:<24} {plan.partitions[name]}")
    if rate := schedule.describe(config.optim, config.train.batch):
        print(wrapped(rate, "# "))
    print(f"# memory by the plan: {prepare.most_memory(alone, graph, plan)}")
    for line in summed(alone, graph, plan):
        print(wrapped(line, "# "))
    if plan_out is not None:
        write_atomic(plan_out, plan.to_json().encode())
        print(f"# plan written to {plan_out}")
    print(f"# {launch.command_line(copies * plan.ranks, words)}")
    if as_json:
        print_json("train", layers)
    return 0


def summed(config: Config, graph: Graph, plan: Plan) -> list[str]:
    """How each group of ranks will sum its gradients, one line each; where they will run is not known yet."""
    table = machine.load(machine.default_path())
    lines = []
    for group, nbytes in replica_groups(graph, plan, TYPES[config.train.precision]).items():
        name = plan.algorithm(group)
        if name is None:
            found = choose.choose(nbytes, [0] * ranks(group), table, room())
            name = f"{found.name} if they share a host ({found.why})"
        partition, axes = group
        lines.append(f"{mib(nbytes)} of gradients of {partition}, summed along {', '.join(axes)}: {name}")
    return lines
