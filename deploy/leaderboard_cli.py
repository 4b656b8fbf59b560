"""The command ``fedmerge leaderboard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fedmerge.common.config import listed, validated

console = Console()


def leaderboard(
    stream: Annotated[str, typer.Option(help="Streams, comma-separated.")] = "text",
    rule: Annotated[str, typer.Option(help="Merge rules, comma-separated; 'all' takes every one.")] = "all",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="[OWNER.]OPTION=VALUE",
            help="Option of a rule, a training option or loop; may be repeated.",
        ),
    ] = None,
    train: Annotated[str, typer.Option(help="Training options, comma-separated; docs/methods.md.")] = "",
    seeds: Annotated[
        str, typer.Option(help="Of data, training and orders of arrival, comma-separated.")
    ] = "0,1,2",
    orders: Annotated[
        int, typer.Option(min=1, help="Orders of arrival per seed: the stream's own, then random ones.")
    ] = 3,
    rows: Annotated[int | None, typer.Option(min=1, help="At most so many training rows per task.")] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many tasks of each stream.")
    ] = None,
    quick: Annotated[
        bool, typer.Option(help="Score a task only after its own merge and the last: no forgetting.")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps task vectors, so that later runs do not train.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Tasks scored and layers merged at a time; one per core by default."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for leaderboard.json, CSV files and report.html.")] = Path(
        "runs/leaderboard"
    ),
) -> None:
    """Compare rules on the same task vectors: accuracy, order, state, upload and time."""
    from fedmerge.common.writing import make_folder
    from fedmerge.deploy.choices import parse_trained
    from fedmerge.deploy.leaderboard import LeaderboardConfig, Listener, chosen
    from fedmerge.deploy.leaderboard import leaderboard as run
    from fedmerge.deploy.progress import bars
    from fedmerge.deploy.report.leaderboard import FailedRun, Leaderboard, save
    from fedmerge.deploy.report.leaderboard_page import print_standings, write_report
    from fedmerge.deploy.report.standings import save_standings

    rules, training = parse_trained(rule, train, settings or [])
    given = {
        "streams": listed(stream),
        "seeds": listed(seeds),
        "orders": orders,
        "rows": rows,
        "tasks": tasks,
        "quick": quick,
        "cache": cache,
        "workers": workers,
        "training": training,
    }
    config = validated(LeaderboardConfig, {name: value for name, value in given.items() if value is not None})
    make_folder(out)  # before hours of training
    learnings = sum(len(entry.tasks) for entry in chosen(config)) * len(config.seeds)
    console.print(
        f"streams {stream}; {len(rules)} rules; seeds {seeds}; {orders} orders each", highlight=False
    )

    def keep(board: Leaderboard) -> None:
        save(board, out)
        save_standings(board, out)
        write_report(board, out / "report.html")

    with bars(console) as shown:
        learning = shown.add_task("fine-tuning", total=learnings, note="")
        merging = shown.add_task("merging", total=learnings * orders * len(rules), note="")

        def tell(failed: FailedRun) -> None:
            console.print(
                f"[red]failed[/red] {failed.rule} on {failed.stream}: {failed.reason}", highlight=False
            )

        listener = Listener(
            learned=lambda note: shown.update(learning, advance=1, note=note),
            merged=lambda note: shown.update(merging, advance=1, note=note),
            failed=tell,
            completed=keep,
        )
        board = run(config, rules, listener)
    print_standings(board, console)
    console.print(f"report: {out / 'report.html'}", highlight=False, soft_wrap=True)
