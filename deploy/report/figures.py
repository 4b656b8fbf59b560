"""The figures of a report, one function each, from results alone.

Each returns a matplotlib Figure of its own; pyplot and its global state are not used. Colours are
the colour-blind-safe ones of Okabe and Ito, continued by Paul Tol's "muted"; a rule keeps its colour
and its marker in every figure. Black and grey belong to the bounds: the base (zero-shot) below, one
fine-tuned model per task above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fedmerge.deploy.report import metrics
from fedmerge.deploy.report.learning import noun
from fedmerge.deploy.report.results import Results

LineStyle = Literal["-", "--", ":"]

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#882255",
    "#332288",
    "#999933",
    "#117733",
    "#AA4499",
    "#44AA99",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "*")
HATCHES = ("", "//", "..", "xx")  # a second round of the colours
INK, GREY, PALE, WASH = "#1a1a1a", "#6b6b6b", "#dddddd", "#f2f2f2"
UP, DOWN = "#0072B2", "#E69F00"
WIDTH = 10.5  # inches; the report's column
MAX_NAME = 18  # letters of a task's or site's name in a figure
MAX_BARS_IN_A_ROW = 48
LEGEND_LINE = 0.21  # inches
LEAST_ROOM = 10  # points of accuracy that the lines of a figure are given at least
BOUNDS: tuple[tuple[str, str, LineStyle, LineStyle], ...] = (
    ("fine-tuned alone", "fine_tuned", "--", "-"),
    ("base, zero-shot", "zero_shot", ":", ":"),
)
"""Name in a figure, field of the results, line over merges, mark of a single task."""


@dataclass(frozen=True)
class Look:
    """How a rule is drawn, everywhere."""

    colour: str
    marker: str
    hatch: str


def looks(results: Results) -> dict[str, Look]:
    """One look per rule, by its place in the results."""
    return {
        rule: Look(
            COLOURS[n % len(COLOURS)],
            MARKERS[n % len(MARKERS)],
            HATCHES[n // len(COLOURS) % len(HATCHES)],
        )
        for n, rule in enumerate(results.rules)
    }


def short(name: str, letters: int = MAX_NAME) -> str:
    """A name for a figure: the middle of a long one is left out, and ``$`` stays a dollar sign."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    if len(name) > letters:
        tail = (letters - 1) // 3
        name = f"{name[: letters - 1 - tail]}…{name[len(name) - tail :]}"
    return name.replace("$", r"\$")


def accuracy_over_merges(results: Results) -> Figure:
    """The mean accuracy over the tasks merged so far, one line per rule, with both bounds dashed.

    The bounds, and a model that learned all tasks at once, are means over the very same tasks as the rules'
    points, so they move with them. A bound far below all rules is a number in the legend.
    """
    figure = new_figure(WIDTH, 4.6)
    ax = figure.add_subplot()
    drawn_heights: list[float] = []
    for rule, look in looks(results).items():
        reached = results.rules[rule].accuracy_so_far
        if results.rules[rule].joint:
            reached = _so_far(results, results.final(rule))
        _line(ax, reached, look, short(rule, 26), factor=100)
        drawn_heights += [100 * value for value in reached if value is not None]
    for name, source, dash, _ in BOUNDS:
        accuracies = getattr(results, source)
        heights = [percentage(a) for a in _so_far(results, [accuracies.get(task) for task in results.tasks])]
        known = [height for height in heights if height is not None]
        if known and _far_below(known, drawn_heights):
            ax.plot([], [], color=INK, linestyle=dash, label=f"{name}: {known[-1]:.0f} %, far below")
        elif known:
            places, drawn = _points(heights)
            if len(places) == 1:  # a line of one point is not seen
                places, drawn = [0.8, 1.2], drawn * 2
            ax.plot(places, drawn, color=INK, linestyle=dash, linewidth=1.6, label=name)
    _merge_axis(ax, results)
    grid(ax, "y")
    ax.set_ylabel("mean accuracy over\nthe tasks merged so far (%)")
    low, high = ax.get_ylim()
    ax.set_ylim(max(low - 2, 0), min(high + 2, 101))
    legend_right(ax)
    return figure


def _far_below(bound: Sequence[float], reached: Sequence[float]) -> bool:
    """Whether drawing a bound would press the lines of the rules together; both in %."""
    if not reached:
        return False
    room = max(max(reached) - min(reached), LEAST_ROOM)
    return max(bound) < min(reached) - 3 * room


def final_accuracy(results: Results) -> Figure:
    """Bars of every rule by task after the last merge, with the base and fine-tuned alone as marks."""
    tasks, rules = results.tasks, looks(results)
    across = max(1, min(len(tasks), MAX_BARS_IN_A_ROW // max(len(rules), 1)))
    down = math.ceil(len(tasks) / across) or 1
    across = math.ceil(len(tasks) / down) or 1
    figure = new_figure(WIDTH, 1.3 + 2.1 * down)
    for row in range(down):
        ax = figure.add_subplot(down, 1, row + 1)
        part = range(row * across, min((row + 1) * across, len(tasks)))
        _task_bars(ax, results, part, across)
    handles: list[Patch | Line2D] = [
        Patch(facecolor=look.colour, hatch=look.hatch, edgecolor="white", label=short(rule, 26))
        for rule, look in rules.items()
    ]
    handles += [
        Line2D([], [], color=INK, linewidth=1.6, linestyle=mark, label=name)
        for name, source, _, mark in BOUNDS
        if getattr(results, source)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(5, len(handles)), frameon=False)
    return figure


def norms(results: Results) -> Figure:
    """Norms of the arriving vectors and of the merged vector, and lambda_t, over merges."""
    figure = new_figure(WIDTH, 6.0)
    top = figure.add_subplot(2, 1, 1)
    bottom = figure.add_subplot(2, 1, 2, sharex=top)
    shared = _same_updates(results)
    for rule, look in looks(results).items():
        merges, late = results.rules[rule].merges, _late(results, rule)
        _line(top, [*late, *(merge.merged_norm for merge in merges)], look, short(rule, 26))
        _line(bottom, [*late, *(merge.lambda_t for merge in merges)], look)
        if not shared:
            _crosses(top, [*late, *(merge.update_norm for merge in merges)], look.colour)
    if shared and (longest := _longest(results)) is not None:
        _crosses(top, [merge.update_norm for merge in results.rules[longest].merges], INK)
    top.plot([], [], "x", color=INK, label="arriving task vector")
    legend_right(top)
    top.set_ylabel("Frobenius norm\n(weight units)")
    bottom.set_ylabel("lambda_t\n(no unit)")
    for ax in (top, bottom):
        grid(ax, "y")
        low, high = ax.get_ylim()
        ax.set_ylim(0 if low >= 0 else low, high)
    _merge_axis(bottom, results)
    top.tick_params(labelbottom=False)
    return figure


def traffic(results: Results) -> Figure:
    """Bytes each site sent and received."""
    sites = results.sites_traffic
    size, unit = byte_unit([b for site in sites for b in (site.up_bytes, site.down_bytes)])
    figure = new_figure(WIDTH, 1.3 + 0.36 * max(len(sites), 1))
    ax = figure.add_subplot()
    for offset, colour, name, sent in (
        (-0.19, UP, "up: site to server", [s.up_bytes / size for s in sites]),
        (0.19, DOWN, "down: server to site", [s.down_bytes / size for s in sites]),
    ):
        bars = ax.barh([n + offset for n in range(len(sites))], sent, 0.36, color=colour, label=name)
        ax.bar_label(bars, [f"{value:,.1f}" for value in sent], padding=3)
    ax.set_yticks(range(len(sites)), [short(s.site) for s in sites])
    ax.set(xlabel=f"payload ({unit})", ylabel="site", ylim=(max(len(sites), 1) - 0.4, -0.6))
    ax.margins(x=0.1)
    grid(ax, "x")
    legend_right(ax)
    return figure


def seconds(results: Results) -> Figure:
    """Working time by phase of the run; the total is not drawn, as it is no phase."""
    phases = {name: spent for name, spent in results.seconds.items() if name != "total"}
    figure = new_figure(WIDTH * 0.75, 1.1 + 0.36 * max(len(phases), 1))
    ax = figure.add_subplot()
    bars = ax.barh(range(len(phases)), list(phases.values()), 0.6, color=GREY)
    ax.bar_label(bars, [f"{spent:,.1f}" for spent in phases.values()], padding=3)
    ax.set_yticks(range(len(phases)), [short(name, 26) for name in phases])
    ax.set(
        xlabel=f"working time over all sites and {noun(results)}s (s)",
        ylabel="phase",
        ylim=(max(len(phases), 1) - 0.4, -0.6),
    )
    ax.margins(x=0.1)
    grid(ax, "x")
    return figure


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def percentage(fraction: float | None) -> float | None:
    """A fraction in %."""
    return None if fraction is None else 100 * fraction


def _points(values: Iterable[float | None]) -> tuple[list[float], list[float]]:
    """Merge numbers from 1 and values; a missing value breaks the line."""
    filled = [math.nan if v is None else v for v in values]
    return [float(n + 1) for n in range(len(filled))], filled


def _line(
    ax: Axes, values: Sequence[float | None], look: Look, label: str | None = None, *, factor: float = 1
) -> None:
    ax.plot(
        *_points(None if v is None else factor * v for v in values),
        color=look.colour,
        marker=look.marker,
        markersize=5,
        linewidth=1.6,
        linestyle="-" if not look.hatch else "-.",
        label=label,
    )


def _crosses(ax: Axes, norms: Sequence[float | None], colour: str) -> None:
    ax.plot(*_points(norms), "x", color=colour, markersize=6, markeredgewidth=1.6, zorder=5)


def _task_bars(ax: Axes, results: Results, part: range, across: int) -> None:
    """The bars of some tasks; ``across`` groups are given room, so that rows of tasks line up."""
    rules = looks(results)
    width = 0.8 / max(len(rules), 1)
    finals = {rule: results.final(rule) for rule in rules}
    for place, (rule, look) in enumerate(rules.items()):
        heights = [percentage(finals[rule][task]) or 0 for task in part]
        places = [n - 0.4 + (place + 0.5) * width for n in range(len(part))]
        ax.bar(
            places, heights, width * 0.94, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0
        )
        for x, task in zip(places, part, strict=True):
            if finals[rule][task] is None:
                ax.text(x, 1, "n/a", ha="center", va="bottom", fontsize=7, color=GREY, rotation=90)
    for n, task in enumerate(part):
        for _, source, _, mark in BOUNDS:
            bound = percentage(getattr(results, source).get(results.tasks[task]))
            if bound is not None:
                ax.plot([n - 0.45, n + 0.45], [bound, bound], color=INK, linewidth=1.6, linestyle=mark)
    crowded = across > 8
    ax.set_xticks(
        range(len(part)),
        [short(results.tasks[task]) for task in part],
        rotation=35 if crowded else 0,
        ha="right" if crowded else "center",
        rotation_mode="anchor" if crowded else None,
    )
    ax.set(xlim=(-0.6, max(across, 3) - 0.4), ylim=(0, 100), ylabel="accuracy (%)")
    ax.tick_params(axis="x", length=0)
    grid(ax, "y")


def _merge_axis(ax: Axes, results: Results) -> None:
    """Merges on the x axis, numbered from 1, with the task that each brought."""
    longest = _longest(results)
    merges = results.brought(longest) if longest is not None else []
    ax.set_xticks(
        range(1, len(merges) + 1),
        [f"{n}  {short(merge)}" for n, merge in enumerate(merges, start=1)],
        rotation=35,
        ha="right",
        rotation_mode="anchor",
    )
    ax.set(xlim=(0.6, max(len(merges), 1) + 0.4), xlabel="merge (number, task merged)")


def _longest(results: Results) -> str | None:
    """The rule with the most merges; its merges label the axis."""
    return max(results.rules, key=lambda rule: len(results.rules[rule].merges), default=None)


def _so_far(results: Results, accuracies: Sequence[float | None]) -> list[float | None]:
    """The mean of accuracies that do not change, over the tasks merged so far, after each merge."""
    longest = _longest(results)
    if longest is None:
        return []
    rows = [accuracies] * len(results.rules[longest].merges)
    return metrics.accuracy_so_far(rows, results.learned(longest))


def _late(results: Results, rule: str) -> list[float | None]:
    """What stands before the one merge of a rule that learned all tasks at once: it is drawn at the last."""
    longest = _longest(results)
    if longest is None or not results.rules[rule].joint:
        return []
    return [None] * (len(results.rules[longest].merges) - 1)


def _same_updates(results: Results) -> bool:
    """Whether every rule was given the same vectors, as far as their norms tell."""
    longest = _longest(results)
    wanted = [merge.update_norm for merge in results.rules[longest].merges] if longest is not None else []
    return all(
        math.isclose(merge.update_norm, norm, rel_tol=1e-6)
        for result in results.rules.values()
        if not result.joint
        for merge, norm in zip(result.merges, wanted, strict=False)
    )


def byte_unit(sizes: Sequence[float]) -> tuple[float, str]:
    """The decimal unit in which the largest of some sizes has one to three digits before the point."""
    largest = max(sizes, default=0)
    return next(
        ((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if largest >= size), (1, "B")
    )


def grid(ax: Axes, axis: str) -> None:
    """Pale lines across one axis, ``x`` or ``y``, or ``both``, and no frame above and right."""
    ax.grid(axis=axis, color=PALE, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def legend_right(ax: Axes) -> None:
    """What is drawn in these axes, beside the whole figure, which grows where that is long."""
    figure, (handles, labels) = ax.figure, ax.get_legend_handles_labels()
    assert isinstance(figure, Figure)
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False)
        figure.set_figheight(max(figure.get_figheight(), 0.3 + LEGEND_LINE * len(handles)))
