"""Predicted scaling as a picture, with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.errors import BackendUnavailable, ConfigError
from hpctrain.planner.scaling import Scaling

SUFFIXES = (".png", ".svg", ".pdf")

STYLES = {"data": ("s", "tab:orange"), "best uniform grid": ("^", "tab:green")}
"""{baseline: (marker, colour)}"""


def require(path: Path) -> None:
    """Raises ConfigError on another kind of file, BackendUnavailable where there is no matplotlib."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--plot {path}: name a file that ends in {', '.join(SUFFIXES)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.absolute().parent}; make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise BackendUnavailable(
            "--plot needs matplotlib; leave --plot out, or\npip install 'hpctrain[report]'"
        ) from None


def scaling(path: Path, found: Scaling, others: Mapping[str, Mapping[int, float]], title: str, subtitle: str) -> None:
    """Samples per second over ranks, both axes logarithmic, with the ideal line and the baselines, into `path`."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    ranks = [point.ranks for point in found.points]
    rates = [point.throughput for point in found.points]
    samples = found.chosen.samples
    figure = Figure(figsize=(7.2, 4.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ideal = [rates[0] * n / ranks[0] for n in ranks]
    axes.plot(ranks, ideal, linestyle=":", color="0.45", label="ideal")
    for name, taken in others.items():
        marker, colour = STYLES.get(name, ("x", "tab:red"))
        at = [n for n in ranks if n in taken]
        axes.plot(at, [samples / taken[n] for n in at], marker=marker, markersize=4, color=colour, label=name)
    axes.plot(ranks, rates, marker="o", markersize=5, color="tab:blue", linewidth=2, label="searched plan")
    _mark(axes, found)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(_thinned(ranks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:,.0f}" if rate >= 1 else f"{rate:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("ranks")
    axes.set_ylabel("samples per second (predicted)")
    axes.grid(True, which="major", color="0.9")
    axes.set_axisbelow(True)
    axes.set_title(subtitle, fontsize="small", color="0.3", loc="left")
    figure.suptitle(title, x=0.01, ha="left", fontsize="medium")
    axes.legend(frameon=False, loc="upper left")
    try:
        figure.savefig(path)
    except OSError as error:
        raise ConfigError(f"--plot {path}: cannot be written ({error})") from None


def _mark(axes: Any, found: Scaling) -> None:
    """The number of ranks that is taken."""
    point = found.chosen
    text = f"{point.ranks} ranks, efficiency {100 * found.efficiency(point):.0f} %"
    axes.plot([point.ranks], [point.throughput], "o", markersize=11, fillstyle="none", color="tab:blue")
    axes.annotate(
        text, (point.ranks, point.throughput), (0, -16), textcoords="offset points", ha="center", va="top", fontsize=8
    )


def _thinned(ranks: list[int]) -> list[int]:
    """Numbers that have room below the axis: those that are not within a third of the one before."""
    found: list[int] = []
    for n in ranks:
        if not found or n >= 1.4 * found[-1]:
            found.append(n)
    return found
