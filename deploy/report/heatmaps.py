"""The heat maps of a report: tasks by column, one colour scale for all rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fedmerge.deploy.report import metrics
from fedmerge.deploy.report.figures import GREY, INK, PALE, WASH, WIDTH, new_figure, percentage, short
from fedmerge.deploy.report.learning import noun
from fedmerge.deploy.report.results import Results


def accuracy_matrix(results: Results, rule: str) -> Figure:
    """Heat map of one rule: task by column, merge by row, base on top, what sites had at the bottom.

    Every rule has the same colours: from the lowest accuracy of a merged task under any rule, rounded
    down to tens, to 100 %. A filled cell is a task that has been merged; a white cell with a grey
    number is one that has not been yet; a hatched cell was not measured.
    """
    result, learned, brought = results.rules[rule], results.learned(rule), results.brought(rule)
    tasks, merges = len(results.tasks), len(result.merges)
    cmap, scale = mpl.colormaps["viridis"].resampled(20), Normalize(_lowest_merged(results), 100)
    figure = new_figure(max(4.8, 2.5 + 0.46 * tasks), 1.9 + 0.27 * (merges + 2))
    ax = figure.add_subplot()

    lines: list[tuple[float, str, Sequence[float | None], Sequence[bool]]] = []
    lines.append((0, "base, zero-shot", [results.zero_shot.get(t) for t in results.tasks], [False] * tasks))
    for merge, row in enumerate(result.accuracy):
        seen = [at is not None and at <= merge for at in learned]
        lines.append((merge + 1.3, f"{merge + 1}  {short(brought[merge])}", row, seen))
    name, own = at_sites(results, rule)
    lines.append((merges + 1.6, name, [own.get(t) for t in results.tasks], [True] * tasks))
    for top, _, line, filled in lines:
        for column, accuracy in enumerate(line):
            _cell(ax, column, top, percentage(accuracy), scale, cmap, seen=filled[column])

    ax.set(xlim=(0, max(tasks, 1)), ylim=(merges + 2.6, 0), ylabel="after merge (number, task merged)")
    ax.set_yticks([top + 0.5 for top, *_ in lines], [label for _, label, *_ in lines])
    ax.set_xticks([n + 0.5 for n in range(tasks)], [short(t) for t in results.tasks], rotation=90)
    ax.set_xlabel("task tested on, in order of arrival")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title(f"{short(rule, 40)}", loc="left", weight="bold")
    figure.colorbar(ScalarMappable(scale, cmap), ax=ax, label="accuracy (%)", pad=0.02, aspect=25)
    return figure


def forgetting(results: Results) -> Figure:
    """Heat map, rule by row and task by column: points lost since a task's best accuracy."""
    lost = {
        rule: [
            percentage(f)
            for f in metrics.forgetting_by_task(results.rules[rule].accuracy, results.learned(rule))
        ]
        for rule, result in results.rules.items()
        if not result.joint
    }
    bound = max((abs(f) for row in lost.values() for f in row if f is not None), default=1.0) or 1.0
    cmap, scale = mpl.colormaps["PuOr_r"], Normalize(-bound, bound)
    tasks = len(results.tasks)
    figure = new_figure(min(WIDTH, max(5.5, 3 + 0.5 * (tasks + 1))), 2.1 + 0.3 * len(lost))
    ax = figure.add_subplot()
    for row, values in enumerate(lost.values()):
        _cell(ax, tasks + 0.3, row, metrics.mean(values), scale, cmap, seen=True, digits=1)
        for column, value in enumerate(values):
            _cell(ax, column, row, value, scale, cmap, seen=True, digits=1)
    ax.set(
        xlim=(0, tasks + 1.3),
        ylim=(max(len(lost), 1), 0),
        xlabel="task, in order of arrival",
        ylabel=noun(results),
    )
    ax.set_yticks([n + 0.5 for n in range(len(lost))], [short(rule, 24) for rule in lost])
    ax.set_xticks(
        [*(n + 0.5 for n in range(tasks)), tasks + 0.8],
        [*(short(t) for t in results.tasks), "mean"],
        rotation=90,
    )
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    figure.colorbar(ScalarMappable(scale, cmap), ax=ax, label="forgetting\n(points)", pad=0.02)
    return figure


def at_sites(results: Results, rule: str) -> tuple[str, Mapping[str, float | None]]:
    """What sites reached before merging under a rule, in words and by task."""
    learning = results.rules[rule].learning
    if learning is None or (learning.start == "base" and not learning.joint):
        return "fine-tuned alone", results.fine_tuned if learning is None else learning.fine_tuned
    return "at the sites", learning.fine_tuned


def _cell(
    ax: Axes,
    left: float,
    top: float,
    value: float | None,
    scale: Normalize,
    cmap: Colormap,
    *,
    seen: bool,
    digits: int = 0,
) -> None:
    """One cell of a heat map: filled when ``seen``, else white; hatched when there is no value."""
    face = to_rgba("white" if value is None or not seen else cmap(float(scale(value))))
    ax.add_patch(
        Rectangle(
            (left, top),
            1,
            1,
            facecolor=WASH if value is None else face,
            edgecolor=PALE if value is None or not seen else "white",
            linewidth=0.8,
            hatch="////" if value is None else None,
        )
    )
    if value is None:
        return
    red, green, blue, _ = face
    dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.45
    ax.text(
        left + 0.5,
        top + 0.52,
        f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−"),  # noqa: RUF001  (a minus sign)
        ha="center",
        va="center",
        fontsize=8,
        color="white" if dark else INK if seen else GREY,
    )


def _lowest_merged(results: Results) -> float:
    """The lowest accuracy of a merged task under any rule or fine-tuned alone, in %, in tens; 90 at most."""
    merged: list[float] = []
    for rule, result in results.rules.items():
        merged += [a for a in at_sites(results, rule)[1].values() if a is not None]
        for task, row in enumerate(results.learned(rule)):
            seen = result.accuracy[row:] if row is not None else []
            merged += [a for line in seen if (a := line[task]) is not None]
    return min(10.0 * math.floor(10 * min(merged, default=0.0)), 90.0)
