"""Accuracy against what sites sent: one point per method, those of one method in several sizes joined."""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedmerge.deploy.report.figures import (
    GREY,
    WIDTH,
    byte_unit,
    grid,
    legend_right,
    looks,
    new_figure,
    short,
)
from fedmerge.deploy.report.learning import family, per_update
from fedmerge.deploy.report.results import Results

DIFFERENT = 1.01
"""The largest over the smallest from which on sizes are told apart."""
ABOVE, BELOW = (7, 5), (7, -12)  # points, of a label beside its marker


@dataclass(frozen=True)
class Point:
    """A method's final accuracy and its standard error, in %, at the bytes of an update."""

    name: str
    family: str
    compress: str
    sent: float
    acc: float
    error: float


def points(results: Results) -> list[Point]:
    """The methods that learn task after task; none where their updates are of one size."""
    found = []
    for name, result in results.rules.items():
        learning = result.learning
        if learning is None or learning.joint or result.acc is None:
            continue
        if sent := per_update(learning):
            told = name, family(name, learning), learning.compress, sent
            found.append(Point(*told, 100 * result.acc, 100 * (results.sampling_error(name) or 0.0)))
    sizes = [point.sent for point in found]
    return found if sizes and max(sizes) >= DIFFERENT * min(sizes) else []


def accuracy_against_bytes(results: Results) -> Figure:
    """Final mean accuracy by the size of an update; what stands further up and left is better.

    A grey line joins the sizes of one method. Where only one comes in several, they stand beside its points;
    otherwise the legend alone has them.
    """
    figure = new_figure(WIDTH, 4.2)
    ax = figure.add_subplot()
    look, found = looks(results), points(results)
    families: dict[str, list[Point]] = {}
    for point in sorted(found, key=lambda point: point.sent):
        families.setdefault(point.family, []).append(point)
    for line in families.values():
        ax.plot([p.sent for p in line], [p.acc for p in line], color=GREY, linewidth=1, zorder=1)
    for point in found:
        ax.errorbar(
            point.sent,
            point.acc,
            point.error,
            color=look[point.name].colour,
            marker=look[point.name].marker,
            markersize=7,
            elinewidth=1,
            capsize=3,
            linestyle="none",
            label=short(point.name, 26),
        )
    several = [line for line in families.values() if len(line) > 1]
    for n, point in enumerate(several[0] if len(several) == 1 else []):
        place = (point.sent, point.acc)
        ax.annotate(
            short(point.compress), place, (ABOVE, BELOW)[n % 2], textcoords="offset points", fontsize=8
        )
    _byte_axis(ax, [point.sent for point in found])
    ax.set_ylabel("mean accuracy after\nthe last merge (%)")
    ax.margins(y=0.12)
    grid(ax, "both")
    legend_right(ax)
    return figure


def _byte_axis(ax: Axes, sizes: list[float]) -> None:
    """Logarithmic, over a factor of four at least, with round numbers."""
    low, high = min(sizes), max(sizes)
    room = max(1.3, 2 * (low / high) ** 0.5)
    unit, name = byte_unit(sizes)
    ax.set_xscale("log")
    ax.set_xlim(low / room, high * room)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / unit:,g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel(f"sent per update ({name}), logarithmic")
