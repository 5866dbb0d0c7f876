"""The figures of three papers beside those of this program: the tables of docs/papers.md.

    python docs/papers.py    # puts them into docs/papers.md

No data, no MPI, no measurement: all is computed from examples/papers/*.toml and the shipped machines. What stands for
a paper is printed in it, or read off its figures to about one pixel.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hpctrain import config_file, models
from hpctrain.config import Config
from hpctrain.graph import Graph
from hpctrain.layers import Dense
from hpctrain.machine import Machine, named
from hpctrain.models import Sample
from hpctrain.partition import Partition, volume
from hpctrain.planner import paper
from hpctrain.planner.cost import price
from hpctrain.planner.layout import edges, layouts, sent_bytes
from hpctrain.planner.plan import Plan, extents, uniform
from hpctrain.planner.search import Found, search
from hpctrain.planner.setting import Setting

ROOT = Path(__file__).parents[1]
DOCUMENT = Path(__file__).with_suffix(".md")
GIB = 2**30


class Example(NamedTuple):
    """A file of examples/papers, read."""

    config: Config
    graph: Graph
    machine: Machine
    samples: int


@lru_cache
def example(name: str, *overrides: str) -> Example:
    """The example of that name with these overrides."""
    config = config_file.load(ROOT / "examples" / "papers" / f"{name}.toml", overrides)
    described, machine = config.data.sample, config.plan.machine
    if described is None or machine is None:
        raise SystemExit(f"{name}.toml: no data.sample or no plan.machine")
    sample = Sample(described.shape, classes=described.classes)
    graph = models.build(config.model.name, config.train.part, sample, config.model.options)
    return Example(config, graph, named(machine), described.count)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Rows as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


# --- arXiv 1712.04432 ------------------------------------------------------------------------------------------------

FIGURE_7 = {
    8: {(1, 8): (318.7, 0.00, 37.94), (2, 4): (300.3, 3.25, 17.34), (4, 2): (294.9, 8.67, 6.50)}
    | {(8, 1): (301.4, 20.60, 1.08)},
    32: {(1, 32): (130.0, 0.00, 42.83), (2, 16): (109.3, 0.74, 21.78), (4, 8): (100.1, 2.22, 11.08)}
    | {(8, 4): (97.5, 5.17, 5.54), (16, 2): (100.8, 11.08, 2.95), (32, 1): (111.5, 22.89, 1.48)},
    128: {(1, 128): (80.0, 0.00, 44.09), (2, 64): (58.6, 0.23, 22.73), (4, 32): (48.4, 0.68, 12.05)}
    | {(8, 16): (43.9, 1.14, 6.82), (16, 8): (42.7, 2.73, 4.09), (32, 4): (44.3, 5.68, 2.73)}
    | {(64, 2): (49.5, 11.59, 2.05), (128, 1): (60.9, 23.64, 1.59)},
    512: {(1, 512): (66.8, 0.00, 44.39), (2, 256): (45.3, 0.19, 22.95), (4, 128): (34.9, 0.19, 12.33)}
    | {(8, 64): (29.6, 0.38, 7.02), (16, 32): (27.3, 0.76, 4.36), (32, 16): (26.8, 1.52, 3.04)}
    | {(64, 8): (27.5, 3.04, 2.28), (128, 4): (30.2, 6.07, 1.90)},
}
"""{ranks: {(Pr, Pc): seconds of an epoch in total, model and domain, batch}}, read off the bars."""

SPEEDUPS_7 = {8: ((4, 2), 1.1, 2.5), 32: ((8, 4), 1.3, 3.9), 128: ((16, 8), 1.9, 6.4), 512: ((32, 16), 2.5, 9.7)}
"""{ranks: (best grid, how many times faster than one row in total, in communication)}, as printed."""

SPEEDUPS_6 = {8: ((1, 8), 1.0, 1.0), 32: ((4, 8), 1.1, 1.5), 128: ((8, 16), 1.6, 2.8), 512: ((16, 32), 2.1, 5.0)}


def epoch(ranks: int, batch: int = 2048, by: paper.ConvBy | None = None, overlap: bool = False) -> list[paper.Record]:
    """Every grid, in seconds of an epoch of alexnet-cori.toml."""
    found = example("alexnet-cori", f"train.batch={batch}")
    by = by or paper.conv_by(found.config.plan.only)
    records = paper.grids(found.graph, found.machine, ranks, by, overlap)
    return [record.times(found.samples / batch) for record in records]


def best(records: Sequence[paper.Record]) -> paper.Record:
    """The fastest."""
    return min(records, key=lambda record: record.seconds)


def grid(pr: int, pc: int) -> str:
    """As the paper writes it."""
    return f"{pr}x{pc}"


def figure_7() -> str:
    """Every bar."""
    rows = []
    for ranks, bars in FIGURE_7.items():
        ours = {(r.pr, r.pc): r for r in epoch(ranks)}
        for (pr, pc), (total, model, batch) in bars.items():
            r = ours[pr, pc]
            rows.append((ranks, grid(pr, pc), f"{model:.2f}", f"{r.model_seconds:.2f}"))
            rows[-1] += (f"{batch:.2f}", f"{r.batch_seconds:.2f}", f"{total:.1f}", f"{r.seconds:.1f}")
    head = ("P", "Pr x Pc", "model, read", "model, here", "batch, read", "batch, here", "total, read", "total, here")
    return table(head, rows)


def speedups(printed: dict[int, tuple[tuple[int, int], float, float]], by: paper.ConvBy) -> str:
    """Of the best grid beside one row."""
    rows = []
    for ranks, (at, total, communication) in printed.items():
        records = epoch(ranks, by=by)
        pure, found = records[0], best(records)
        spent = [r.model_seconds + r.batch_seconds for r in (pure, found)]
        rows.append((ranks, grid(*at), grid(found.pr, found.pc), f"{total:.1f}", f"{pure.seconds / found.seconds:.2f}"))
        rows[-1] += (f"{communication:.1f}", f"{spent[0] / spent[1]:.2f}")
    head = ("P", "best, printed", "best, here", "total, printed", "total, here", "sent, printed", "sent, here")
    return table(head, rows)


def figure_8() -> str:
    """With sums of gradients behind computing."""
    records = epoch(512, overlap=True)
    first, found = records[0], best(records)
    rows = [
        ("best grid", "4x128", grid(found.pr, found.pc)),
        ("times faster than 1x512", "2.0", f"{first.seconds / found.seconds:.2f}"),
        ("seconds of 1x512", "", f"{first.seconds:.1f}"),
        ("seconds of the best", "", f"{found.seconds:.1f}"),
    ]
    return table(("P = 512, B = 2048", "printed", "here"), rows)


def figures_9_and_10() -> str:
    """Our figures for their settings: B and P."""
    rows = []
    for figure, batch, ranks in [("9", 2048, 512), *(("10", 512, n) for n in (512, 1024, 2048, 4096))]:
        records = epoch(ranks, batch)
        first, found = records[0], best(records)
        rows.append((figure, batch, ranks, grid(first.pr, first.pc), f"{first.seconds:.1f}"))
        rows[-1] += (f"{first.compute_seconds:.2f}", grid(found.pr, found.pc), f"{found.seconds:.1f}")
    return table(("figure", "B", "P", "first bar", "its seconds", "of these compute", "best", "its seconds"), rows)


def readings() -> str:
    """The communication of figure 7 by other readings of the paper: times faster than one row, and seconds of that."""

    def line(name: str, sent: Callable[[paper.Record], float]) -> list[str]:
        ratios = []
        for ranks, (at, _, _) in SPEEDUPS_7.items():
            found = {(r.pr, r.pc): sent(r) for r in epoch(ranks)}
            ratios.append(found[1, ranks] / found[at])
        return [name, *(f"{ratio:.2f}" for ratio in ratios), f"{sent(epoch(512)[0]):.1f}"]

    found = example("alexnet-cori")
    steps, dense = found.samples / 2048, next(m for m in paper.matrices(found.graph) if m.dense)
    wire = found.machine.network
    if wire is None:
        raise SystemExit("cori-knl: no network")

    def entry(r: paper.Record) -> float:
        return steps * paper.gather(dense, 2048, paper.Cut(r.pr, r.pc, "model"), wire)

    def sent(r: paper.Record) -> float:
        return r.model_seconds + r.batch_seconds

    def ring(ranks: int) -> float:
        return 2 * (ranks - 1) - 2 * (ranks - 1).bit_length()

    def as_ring(r: paper.Record) -> float:
        rows, columns, both = ring(r.pr), ring(r.pc), ring(r.pr * r.pc)
        # allreduces of 5 convolutions' weights over all, of 3 dense layers' over a row, of their inputs over a column
        return sent(r) + steps * wire.alpha * (5 * both + 3 * columns + 3 * rows)

    rows = [
        ["printed", *(str(ratio) for _, _, ratio in SPEEDUPS_7.values()), "44.4, read"],
        line("as here", sent),
        line("without equation 6", lambda r: sent(r) - entry(r)),
        line("6 GB/s are 6e9", lambda r: sent(r) * 6 * 2**30 / 6e9),
        line("P - 1 latencies of a ring allreduce", as_ring),
    ]
    return table(("reading", *(f"P = {ranks}" for ranks in SPEEDUPS_7), "1x512, s"), rows)


FIGURE_4 = {1: 30.8e3, 4: 9.7e3, 16: 4.0e3, 64: 2.4e3, 256: 1.81e3}
"""{batch: seconds of an epoch on one node}, as measured there."""


def compute() -> str:
    """Seconds of an epoch on one node by figure 4, and by the bars of figures 6 to 10."""
    rows = []
    for batch, measured in FIGURE_4.items():
        found = example("alexnet-cori", f"train.batch={batch}")
        bars = paper.compute_seconds(found.graph, found.machine, 1) * found.samples / batch
        rows.append((batch, f"{measured:.0f}", f"{bars:.0f}", f"{bars / measured:.2f}"))
    return table(("batch", "figure 4", "bars", "ratio"), rows)


def activations() -> str:
    """How many numbers an image the model bar of 128x4 in figure 6 implies by equation 8, and how many there are."""
    found = example("alexnet-cori")
    wire, read = found.machine.network, 36.04
    if wire is None:
        raise SystemExit("cori-knl: no network")
    implied = read / (found.samples / 2048) / (3 * wire.beta * paper.WORD * 2048 / 4 * 127 / 128)
    here = sum(matrix.outputs for matrix in paper.matrices(found.graph))
    return table(("implied by figure 6", "AlexNet"), [(f"{implied:,.0f}", f"{here:,}")])


# --- arXiv 1802.04924 ------------------------------------------------------------------------------------------------

VOLUMES = {
    "VGG-16": ("vgg16", 224, (2.056, 4.112, 8.225, 16.45), (0.238, 0.541, 1.336, 3.688)),
    "Inception-v3": ("inception3", 299, (0.354, 0.709, 1.418, 2.837), (0.326, 0.656, 1.328, 2.718)),
    "AlexNet": ("alexnet", 224, (1.113, 2.227, 4.454, 8.908), (0.049, 0.121, 0.338, 1.06)),
}
"""Network: builder, images, GiB of a step on 2, 4, 8 and 16 GPUs by data parallelism and by "one weird trick"."""


def one_weird_trick(graph: Graph, ranks: int) -> Plan:
    """Layers before the first dense one cut by samples, the others by channels where they have any."""
    partitions, dense = {}, False
    for node in graph:
        dense = dense or isinstance(node.layer, Dense)
        by_channel = dense and "channel" in extents(node)
        partitions[node.name] = Partition(channel=ranks) if by_channel else Partition(batch=ranks)
    return Plan(partitions)


def moved(graph: Graph, plan: Plan) -> float:
    """GiB that ranks send in a step: exchanges, and each replica's gradients to a server and its weights back."""
    places, ranks = layouts(graph, plan), range(plan.ranks)
    summed = (dist for place in places.values() for dist in place.weights.values() if dist.replicated_axes)
    servers = 2 * 4 * sum(volume(dist.box(rank)) for dist in summed for rank in ranks)
    exchanged = (sent_bytes(edge, rank, np.dtype(np.float32)) for edge in edges(graph, plan, places) for rank in ranks)
    return (servers + sum(map(sum, exchanged))) / GIB


def volumes() -> str:
    """Of 32 images a GPU."""
    rows = []
    for network, (name, side, data, owt) in VOLUMES.items():
        for gpus, by_data, by_owt in zip((2, 4, 8, 16), data, owt, strict=True):
            graph = models.build(name, 32 * gpus, Sample((side, side, 3), classes=1000), {})
            ours = [
                moved(graph, plan) for plan in (uniform(graph, Partition(batch=gpus)), one_weird_trick(graph, gpus))
            ]
            rows.append((network, gpus, f"{by_data:.3f}", f"{ours[0]:.3f}", f"{by_owt:.3f}", f"{ours[1]:.3f}"))
    head = ("network", "GPUs", "data, paper", "data, here", "one weird trick, paper", "one weird trick, here")
    return table(head, rows)


VGG = {
    "blocks 1 to 4": (r"(conv|pool)[1-4]", "batch=4"),
    "block 5": (r"(conv|pool)5", "height=2 x width=2"),
    "fc1": ("fc1", "channel=4"),
    "fc2": ("fc2", "channel=4"),
    "fc3": ("fc3", "channel=2"),
    "softmax": ("loss", "1 rank"),
}
"""{part of VGG-16: (names of its layers, its configuration on 4 GPUs in table 5)}"""


def vgg() -> Example:
    """VGG-16 on one node."""
    return example("vgg16-p100")


def as_published(graph: Graph) -> Plan:
    """Table 5 of the paper as a plan; what stands between the layers that it names is cut as what is before."""
    partitions, now = {}, Partition(batch=4)
    published = {"height=2 x width=2": Partition(height=2, width=2), "1 rank": Partition()}
    for node in graph:
        for pattern, said in VGG.values():
            if re.match(pattern, node.name):
                now = published.get(said) or Partition.of({a: int(n) for a, n in [said.split("=")]})
        able = extents(node)
        partitions[node.name] = now if all(axis in able for axis in now.parts()) else Partition(batch=4)
    return Plan(partitions)


@lru_cache
def found_plan(gpus: int) -> Found:
    """What the search chooses for VGG-16 on so many GPUs."""
    found = example("vgg16-p100", f"train.batch={32 * gpus}")
    return search(found.graph, Setting.of(found.config, found.machine), gpus)


def pattern() -> str:
    """Of the partitions of VGG-16."""
    rows = []
    for part, (names, published) in VGG.items():
        ours = []
        for gpus in (4, 16):
            cuts = {str(p): None for name, p in found_plan(gpus).plan.partitions.items() if re.match(names, name)}
            ours.append(", then ".join(cuts))
        rows.append((part, published, *ours))
    return table(("VGG-16", "paper, 4 GPUs", "here, 4 GPUs", "here, 16 GPUs"), rows)


def plans() -> str:
    """What plans for VGG-16 on 4 GPUs take by our model."""
    found = vgg()
    setting, graph = Setting.of(found.config, found.machine), found.graph
    priced = {
        "found": found_plan(4).plan,
        "one weird trick": one_weird_trick(graph, 4),
        "table 5 of the paper": as_published(graph),
        "data parallelism": uniform(graph, Partition(batch=4)),
        "model parallelism": uniform(graph, Partition(channel=4)),
    }
    measured = {"found": 727, "one weird trick": 700, "data parallelism": 632, "model parallelism": 502}
    rows = []
    for name, plan in priced.items():
        cost = price(graph, plan, setting)
        phases = (cost.compute, cost.halo + cost.redistribution, cost.allreduce, cost.seconds)
        rows.append((name, *(f"{1e3 * seconds:.1f}" for seconds in phases)))
        rows[-1] += (f"{128 / cost.seconds:.0f}", measured.get(name, ""))
    head = ("computing, ms", "exchanges, ms", "sums, ms", "step, ms", "images/s, here", "images/s, paper")
    return table(("plan for 4 GPUs", *head), rows)


# --- arXiv 1811.01532 ------------------------------------------------------------------------------------------------

WAP = {
    (128, 1): "2560 (2244 estimated)",
    (128, 4): "1473, another program's (1491 estimated)",
    (2048, 1): "2482, of 512",
    (2048, 4): "7904",
}
"""{(batch, GPUs): images a second of AlexNet}, tables 1 and 2."""


def gpus() -> str:
    """Data parallelism on 1 to 4."""
    rows = []
    for batch in (128, 2048):
        found = example("alexnet-wap", f"train.batch={batch}")
        setting = Setting.of(found.config, found.machine)
        for ranks in range(1, 5):
            cost = price(found.graph, uniform(found.graph, Partition(batch=ranks)), setting)
            rows.append((batch, ranks, f"{1e3 * cost.compute:.1f}", f"{1e3 * cost.allreduce:.1f}"))
            rows[-1] += (f"{batch / cost.seconds:.0f}", WAP.get((batch, ranks), ""))
    return table(("batch", "GPUs", "computing, ms", "sums, ms", "images/s, here", "images/s, paper"), rows)


# --- all -------------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "figure 7": figure_7,
    "speed-ups of figure 7": lambda: speedups(SPEEDUPS_7, "batch"),
    "figure 8": figure_8,
    "figures 9 and 10": figures_9_and_10,
    "readings": readings,
    "compute": compute,
    "speed-ups of figure 6": lambda: speedups(SPEEDUPS_6, "same"),
    "activations": activations,
    "volumes": volumes,
    "pattern": pattern,
    "plans": plans,
    "gpus": gpus,
}
"""{what docs/papers.md calls a table: what makes it}"""


def written(text: str, name: str, made: str) -> str:
    """`text` with the table between the comments of that name replaced."""
    marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
    pattern = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"{DOCUMENT}: no {marks[0]} ... {marks[1]} around the table")
    return pattern.sub(lambda _: f"{marks[0]}\n\n{made}\n\n{marks[1]}", text)


def text() -> str:
    """The document with all tables as they come out now."""
    found = DOCUMENT.read_text(encoding="utf-8")
    for name, make in TABLES.items():
        found = written(found, name, make())
    return found


if __name__ == "__main__":
    DOCUMENT.write_text(text(), encoding="utf-8")
