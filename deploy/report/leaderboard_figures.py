"""The figures of a leaderboard, one function each, from its standings.

A rule's mark tells what it asks for: blue rules take the task vector alone, orange ones statistics too. A
full mark is a rule whose result does not depend on the order of arrival, a hollow one depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from fedmerge.deploy.report.figures import DOWN, GREY, INK, UP, WIDTH, grid, new_figure, short
from fedmerge.deploy.report.leaderboard import Leaderboard
from fedmerge.deploy.report.standings import Standing, bounds, standings_of

MEANING = ("vector alone", "with statistics"), ("any order", "order matters")
NAME_SIZE = 8.5
"""Points, of a rule's name beside its mark."""
GAPS = (8, 12, 18, 26, 36, 48, 62, 78, 96)
"""Points from a mark to its name, tried in turn; beyond the first a line joins them."""
SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7))


def ranking(board: Leaderboard, stream: str) -> Figure:
    """Rules from the highest mean ACC down: the mean as a mark, every single run as a tick."""
    ranked = [entry for entry in standings_of(board, stream) if entry.acc is not None]
    figure = new_figure(WIDTH, 1.6 + 0.27 * max(len(ranked), 1))
    ax = figure.add_subplot()
    for row, entry in enumerate(ranked):
        runs = [100 * run.acc for run in board.of(stream, entry.rule) if run.acc is not None]
        ax.plot(runs, [row] * len(runs), "|", color=GREY, markersize=8, markeredgewidth=1.1, zorder=2)
        _mark(ax, board, entry.rule, 100 * (entry.acc or 0), row)
    zero_shot, fine_tuned = bounds(board, stream)
    for bound, dash in ((fine_tuned, "--"), (zero_shot, ":")):
        if bound is not None:
            ax.axvline(100 * bound, color=INK, linestyle=dash, linewidth=1.6, zorder=1)
    ax.set_yticks(range(len(ranked)), [short(entry.rule, 26) for entry in ranked])
    ax.set(xlabel="mean accuracy over all tasks after the last merge, ACC (%)", ylabel="rule")
    ax.set_ylim(max(len(ranked), 1) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    grid(ax, "both")
    runs_drawn = Line2D(
        [], [], color=GREY, marker="|", linestyle="", markersize=8, label="one seed and order"
    )
    lines = [
        Line2D([], [], color=INK, linewidth=1.6, linestyle="--", label="fine-tuned alone"),
        Line2D([], [], color=INK, linewidth=1.6, linestyle=":", label="base, zero-shot"),
    ]
    _legend(figure, board, [runs_drawn, *lines])
    return figure


def state_cost(board: Leaderboard, stream: str) -> Figure:
    """ACC against what the server keeps between arrivals."""
    return _against(
        board,
        stream,
        lambda s: s.state_ratio,
        "state kept between arrivals (multiples of the base; log scale)",
    )


def time_cost(board: Leaderboard, stream: str) -> Figure:
    """ACC against the time of a merge."""
    return _against(
        board, stream, lambda s: s.seconds, "absorbing and reading one merge, median (s; log scale)"
    )


def balance(board: Leaderboard, stream: str) -> Figure:
    """ACC against backward transfer: good at the end, and what that cost the old tasks."""
    label = "BWT: change of old tasks since their own merge (points)"
    return _against(board, stream, lambda s: None if s.bwt is None else 100 * s.bwt, label, log=False)


def _against(
    board: Leaderboard, stream: str, cost: Callable[[Standing], float | None], label: str, *, log: bool = True
) -> Figure:
    found = [
        (entry.rule, x, 100 * entry.acc)
        for entry in standings_of(board, stream)
        if entry.acc is not None and (x := cost(entry)) is not None and (x > 0 or not log)
    ]
    figure = new_figure(WIDTH, 5.4)
    ax = figure.add_subplot()
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.axvline(0, color=GREY, linewidth=1, zorder=1)
    for rule, x, acc in found:
        _mark(ax, board, rule, x, acc)
    ax.set(xlabel=label, ylabel="ACC (%)")
    ax.margins(0.12, 0.1)
    grid(ax, "both")
    _legend(figure, board)
    _name_marks(ax, [(short(rule, 26), x, acc) for rule, x, acc in found])
    return figure


def _mark(ax: Axes, board: Leaderboard, rule: str, x: float, y: float) -> None:
    facts = board.rules[rule]
    ax.plot([x], [y], **_look(bool(facts.needs), facts.order_free), zorder=3)  # type: ignore[arg-type]


def _look(needs: bool, order_free: bool) -> dict[str, object]:
    colour = DOWN if needs else UP
    return {
        "marker": "o",
        "linestyle": "",
        "markersize": 7.5,
        "markeredgewidth": 1.8,
        "markeredgecolor": colour,
        "markerfacecolor": colour if order_free else "white",
    }


def _legend(figure: Figure, board: Leaderboard, more: Sequence[Line2D] = ()) -> None:
    """What the marks of these rules mean, above the figure."""
    there = sorted({(bool(facts.needs), not facts.order_free) for facts in board.rules.values()})
    marks = [
        Line2D(
            [],
            [],
            **_look(needs, not ordered),  # type: ignore[arg-type]
            label=f"{MEANING[0][needs]}, {MEANING[1][ordered]}",
        )
        for needs, ordered in there
    ]
    handles = [*marks, *more]
    figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(handles)), frameon=False)


def _name_marks(ax: Axes, marks: Sequence[tuple[str, float, float]]) -> None:
    """Writes names beside marks so that none covers another or a mark, where there is room for that."""
    figure = ax.figure
    assert isinstance(figure, Figure)
    figure.draw_without_rendering()  # decides the layout, which is then kept
    figure.set_layout_engine("none")
    point = figure.dpi / 72
    room = ax.get_window_extent()
    places = [ax.transData.transform((x, y)) for _, x, y in marks]
    taken = [Bbox.from_bounds(x, y, 0, 0).padded(6.5 * point) for x, y in places]
    for (name, x, y), (left, bottom) in zip(marks, places, strict=True):
        text = ax.annotate(
            name, (x, y), (0, 0), textcoords="offset points", fontsize=NAME_SIZE, va="center", ha="center"
        )
        size = text.get_window_extent()
        shifts = [
            (side_x * (gap * point + size.width / 2), side_y * (gap * point + size.height / 2), gap)
            for gap in GAPS
            for side_x, side_y in SIDES
        ]
        boxes = [
            Bbox.from_bounds(
                left + dx - size.width / 2, bottom + dy - size.height / 2, size.width, size.height
            )
            for dx, dy, _ in shifts
        ]
        costs = [_crowding(box, taken, room) for box in boxes]
        best = costs.index(min(costs))
        dx, dy, gap = shifts[best]
        taken.append(boxes[best].padded(2 * point))
        text.set_position((dx / point, dy / point))
        if gap > GAPS[0]:
            ax.annotate(
                "",
                (x, y),
                _edge(dx, dy, size.width / 2, size.height / 2, point),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 4},
                zorder=2,
            )


def _crowding(box: Bbox, taken: Sequence[Bbox], room: Bbox) -> float:
    """Area of the box that is taken or outside the axes; 0 is a free place."""
    inside = Bbox.intersection(box, room)
    outside = box.width * box.height - (inside.width * inside.height if inside else 0.0)
    overlaps = (Bbox.intersection(box, other) for other in taken)
    return outside + sum(shared.width * shared.height for shared in overlaps if shared)


def _edge(dx: float, dy: float, half_width: float, half_height: float, point: float) -> tuple[float, float]:
    """Where the line from a mark meets its name's box, in points from the mark."""
    toward_x = min(max(0.0, dx - half_width), dx + half_width)
    toward_y = min(max(0.0, dy - half_height), dy + half_height)
    return toward_x / point, toward_y / point
