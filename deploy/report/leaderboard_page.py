"""A leaderboard to look at: one HTML file that asks nothing of a network, and tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmerge.deploy.report import leaderboard_figures as figures
from fedmerge.deploy.report.leaderboard import Leaderboard
from fedmerge.deploy.report.learning import trained_with
from fedmerge.deploy.report.page import SVG_STYLE, Drawn, as_svg, templates
from fedmerge.deploy.report.standings import YARDSTICK, Standing, bounds, overall, standings_of
from fedmerge.deploy.report.words import percent

DASH = "–"  # noqa: RUF001


def write_report(board: Leaderboard, path: Path) -> Path:
    """Writes the whole report as one HTML file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(board), encoding="utf-8")
    return path


def render(board: Leaderboard) -> str:
    """The report as HTML. Names from outside are escaped; the same leaderboard gives the same page."""
    environment = templates()
    environment.filters.update({"spread": spread, "times": times, "short_seconds": short_seconds})
    done = [stream for stream in board.streams if board.references_of(stream)]
    return environment.get_template("leaderboard.html.j2").render(
        board=board,
        streams=done,
        overall=overall(board) if len(board.streams) > 1 and done == board.streams else [],
        standings={stream: standings_of(board, stream) for stream in done},
        bounds={stream: bounds(board, stream) for stream in done},
        drawn={stream: _figures(board, stream, place) for place, stream in enumerate(done, start=1)},
        expected=len(board.seeds) * board.orders,
        trained=trained_with(board.training, board.loop),
        vector_bytes={stream: _vector_bytes(board, stream) for stream in done},
        yardstick=YARDSTICK if YARDSTICK in board.rules else None,
        dash=DASH,
    )


def print_standings(board: Leaderboard, console: Console) -> None:
    """Prints one table per stream, rules from the highest ACC to the lowest, and one over all streams."""
    for stream in board.streams:
        console.print(_table(stream, standings_of(board, stream)))
    if len(board.streams) > 1:
        console.print(_table("all streams", overall(board)))
    for failed in board.failures:
        where = f"{failed.rule} on {failed.stream}, seed {failed.seed}, order {failed.order}"
        console.print(Text(f"failed: {where}: {failed.reason}", style="red"))


def spread(value: float | None) -> str:
    """``± 1.2`` of a fraction in points; empty where there is none."""
    return "" if value is None else f"± {percent(value)}"


def times(ratio: float | None) -> str:
    """``2.0 x``, three digits or so; a dash where nothing was measured."""
    if ratio is None:
        return DASH
    return f"{ratio:.{2 if ratio < 1 else 1 if ratio < 100 else 0}f} ×"  # noqa: RUF001


def short_seconds(spent: float | None) -> str:
    """Seconds with two or three digits that count; a dash where not measured."""
    if spent is None:
        return DASH
    return f"{spent:.2g}" if spent < 1 else f"{spent:.{2 if spent < 10 else 1}f}"


def _vector_bytes(board: Leaderboard, stream: str) -> float:
    references = board.references_of(stream)
    return sum(found.vector_bytes for found in references) / sum(len(found.tasks) for found in references)


def _table(title: str, standings: Sequence[Standing]) -> Table:
    table = Table(title=Text(title), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("rule", overflow="ellipsis", no_wrap=True, max_width=18)
    for name in ("ACC %", "orders", f"vs {YARDSTICK}", "BWT", "state", "s/merge"):
        table.add_column(name, justify="right", no_wrap=True)
    for entry in standings:
        table.add_row(
            Text(entry.rule),
            f"{percent(entry.acc)} {spread(entry.spread)}".strip(),
            percent(entry.order_spread),
            f"{percent(entry.gain, signed=True)} {spread(entry.gain_spread)}".strip(),
            percent(entry.bwt, signed=True),
            times(entry.state_ratio),
            short_seconds(entry.seconds),
        )
    return table


def _figures(board: Leaderboard, stream: str, place: int) -> dict[str, Drawn]:
    with mpl.rc_context(SVG_STYLE):
        return {
            "ranking": as_svg(f"ranking-{place}", figures.ranking(board, stream), f"ACC by rule on {stream}"),
            "state": as_svg(
                f"state-{place}", figures.state_cost(board, stream), f"ACC and state on {stream}"
            ),
            "time": as_svg(f"time-{place}", figures.time_cost(board, stream), f"ACC and time on {stream}"),
            "balance": as_svg(f"balance-{place}", figures.balance(board, stream), f"ACC and BWT on {stream}"),
        }
