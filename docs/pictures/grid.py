"""Draws grid.svg: a batch of images on a 2 x 2 process grid, from the boxes that the program computes.

python docs/pictures/grid.py
"""

from __future__ import annotations

from pathlib import Path

from hpctrain.layers import Conv
from hpctrain.partition import Box, Partition, extent
from hpctrain.regions import wanted

SHAPE = (2, 12, 16, 1)
CONV = Conv(filters=4, kernel=5, padding=2)
GRID = Partition(batch=2, height=2)
COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759")
CELL, LEFT, TOP, GAP = 15, 50, 58, 190


def rectangle(box: Box, colour: str, opacity: float, inset: float = 0, dash: str = "") -> str:
    """One box of one sample as an SVG rectangle; `inset` keeps outlines of neighbours apart."""
    sample, rows, columns = box[0].start, box[1], box[2]
    x, y = LEFT + sample * (SHAPE[2] * CELL + GAP) + columns.start * CELL, TOP + rows.start * CELL
    _, height, width, _ = extent(box)
    size = f'width="{width * CELL - 2 * inset}" height="{height * CELL - 2 * inset}"'
    return (
        f'<rect x="{x + inset}" y="{y + inset}" {size} '
        f'fill="{colour}" fill-opacity="{opacity}" stroke="{colour}" stroke-width="2"{dash}/>'
    )


def text(x: float, y: float, words: str, size: int = 13, anchor: str = "middle", colour: str = "#333") -> str:
    """Words at a point."""
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def draw() -> str:
    """The picture as SVG."""
    output = CONV.output(GRID, SHAPE)
    needed = wanted(CONV.work(GRID, SHAPE), CONV.needs(SHAPE)[0], SHAPE)
    width, height = LEFT + 2 * SHAPE[2] * CELL + GAP + 30, TOP + SHAPE[1] * CELL + 92
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="Helvetica, Arial, sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for rank in range(GRID.size):
        rows = output.box(rank)[1]
        box = output.box(rank)
        middle = LEFT + box[0].start * (SHAPE[2] * CELL + GAP) + SHAPE[2] * CELL / 2
        parts.append(rectangle(box, COLOURS[rank], 0.3, inset=1.5))
        parts.append(text(middle, TOP + (rows.start + rows.stop) / 2 * CELL + 5, f"rank {rank}", 17))
    for rank in range(GRID.size):
        sample, rows, _, channels = needed.box(rank)
        own = output.box(rank)[1]
        inside = slice(max(rows.start, 0), min(rows.stop, SHAPE[1]))
        halo = slice(own.stop, inside.stop) if own.start == 0 else slice(inside.start, own.start)
        box = (sample, halo, slice(0, SHAPE[2]), channels)
        parts.append(rectangle(box, COLOURS[rank], 0.12, inset=3.5, dash=' stroke-dasharray="5 3"'))
    for sample in range(2):
        x = LEFT + sample * (SHAPE[2] * CELL + GAP)
        parts.append(text(x + SHAPE[2] * CELL / 2, TOP - 14, f"samples of batch block {sample}"))
    middle, bottom = width / 2, TOP + SHAPE[1] * CELL
    x0, x1 = LEFT + SHAPE[2] * CELL + 8, LEFT + SHAPE[2] * CELL + GAP - 8
    y = TOP + SHAPE[1] * CELL / 2
    parts.append(
        f'<line x1="{x0 + 6}" y1="{y}" x2="{x1 - 6}" y2="{y}" stroke="#333" stroke-width="1.5" '
        'marker-start="url(#a)" marker-end="url(#a)"/>'
    )
    labels = ("weights: on every rank", "their gradients: summed", f"over all {GRID.size} (ring allreduce)")
    for at, words in zip((y - 12, y + 20, y + 37), labels, strict=True):
        parts.append(text((x0 + x1) / 2, at, words, 12))
    parts.insert(
        1,
        '<defs><marker id="a" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="7" markerHeight="7" '
        'orient="auto-start-reverse"><path d="M0 0 L10 5 L0 10 z" fill="#333"/></marker></defs>',
    )
    kernel = CONV.windows(SHAPE)[0].kernel
    parts += [
        text(middle, 22, "grid batch=2 x height=2: Pc = 2 cuts the batch, Pr = 2 cuts every sample", 15),
        text(16, TOP + SHAPE[1] * CELL / 2 + 4, "height", 12).replace(
            "<text", f'<text transform="rotate(-90 22 {TOP + SHAPE[1] * CELL / 2})"'
        ),
        text(middle, bottom + 30, f"dashed: the rows that a {kernel} x {kernel} convolution reads from the neighbour"),
        text(middle, bottom + 49, "(halo). The exchange fetches them forward and returns their gradients backward."),
        text(middle, bottom + 74, "Every layer may have a grid of its own; between two grids the same exchange moves."),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
