"""Predicted scaling as a picture, by matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import BackendUnavailable, ConfigError
from hpctrain.planner.scaling import Scaling

SUFFIXES = (".png", ".svg", ".pdf")

OTHERS = {"data": ("s", 7, "tab:orange"), "domain": ("^", 8, "tab:green")}
"""{baseline: (marker, its size, colour)}: hollow, so that what lies below can be seen."""

PLANS = "tab:blue"


def require(path: Path) -> None:
    """Raises ConfigError where `path` is another kind of file, BackendUnavailable where there is no matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: name a file that ends in {', '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BackendUnavailable(
            "--plot needs matplotlib, which is not installed; leave --plot out, or\npip install 'hpctrain[report]'"
        ) from None


def scaling(path: Path, found: Scaling, others: Mapping[str, Mapping[int, float]], title: str) -> None:
    """Samples per second over ranks, both axes logarithmic, with the ideal line and the baselines, into `path`.

    `others` is {baseline: {ranks: seconds of a step}}. Raises ConfigError where the file cannot be written.
    """
    from matplotlib.figure import Figure

    points = found.points
    ranks, rates = [point.ranks for point in points], [point.throughput for point in points]
    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(ranks, [rates[0] * n / ranks[0] for n in ranks], linestyle=":", color="0.4", label="ideal")
    for name, taken in others.items():
        marker, size, colour = OTHERS.get(name, ("x", 7, "tab:red"))
        at = [point for point in points if point.ranks in taken]
        style: dict[str, Any] = {"marker": marker, "markersize": size, "fillstyle": "none", "color": colour}
        rates_of = [point.samples / taken[point.ranks] for point in at]
        axes.plot([point.ranks for point in at], rates_of, linestyle="--", linewidth=1, label=f"{name} alone", **style)
    axes.plot(ranks, rates, marker="o", markersize=4, color=PLANS, linewidth=2, label="plan of hpctrain")
    point = found.chosen
    best = f"taken: {point.ranks:,} rank{'s' * (point.ranks > 1)}, {100 * found.efficiency(point):.0f} % of ideal"
    ring: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 12, "fillstyle": "none", "color": PLANS}
    axes.plot([point.ranks], [point.throughput], label=best, **ring)
    _label(axes, ranks)
    axes.set_title("\n".join(textwrap.wrap(title, 88)), fontsize=9, loc="left")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error})") from None


def _label(axes: Any, ranks: list[int]) -> None:
    """Logarithmic axes with plain numbers, and what they count."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([n for i, n in enumerate(ranks) if i == 0 or n >= 1.4 * ranks[i - 1]])  # others have no room
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    bottom, top = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if top < 100 * bottom else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}" if rate >= 1 else f"{rate:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ranks")
    axes.set_ylabel("samples per second, predicted")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="best", fontsize=9)
