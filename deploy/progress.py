"""What a person sees while a run is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedmerge.server.history import Event

PHASES = ("fine-tuning", "merging", "scoring")


class RunProgress:
    """Bars for fine-tuning, merging and scoring; failures as lines above them. Where nobody watches, as in a
    file, every version is a line too."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars: Progress | None = None
        self._ids: dict[str, TaskID] = {}

    @contextmanager
    def run(self, trainings: int, merges: int, scorings: int) -> Iterator[None]:
        """Shows the bars while inside; the numbers are how many of each are expected."""
        totals = dict(zip(PHASES, (trainings, merges, scorings), strict=True))
        with bars(self.console) as self._bars:
            self._ids = {
                phase: self._bars.add_task(phase, total=total, note="") for phase, total in totals.items()
            }
            yield
        self._bars = None

    def follow(self, event: Event) -> None:
        """Moves the bars with one event of the run's history."""
        match event:
            case {"event": "trained", "site": site, "task": task}:
                self._advance("fine-tuning", f"{site} learned {task}")
            case {"event": "learning", "methods": methods}:
                self._write(event, f"learning for {', '.join(methods)}")
            case {"event": "published", "task": task, "version": number}:
                self._advance("merging", f"version {number}: {task}")
                self._write(event, f"version {number}: {task}")
            case {"event": "evaluated", "site": site, "version": number}:
                self._advance("scoring", f"{site}, version {number}")
            case {"event": "failed", "site": site, "task": task, "phase": phase, "reason": reason}:
                self.console.print(f"[red]failed[/red] {phase} {task} {site}: {reason}", highlight=False)

    def _write(self, event: Event, line: str) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{event['at']:8.1f} s  {line}", highlight=False)

    def _advance(self, phase: str, note: str) -> None:
        if self._bars is not None:
            self._bars.update(self._ids[phase], advance=1, note=note)


def bars(console: Console) -> Progress:
    """Progress bars as everywhere in fedmerge: name, bar, count, time, a note."""
    columns: tuple[Any, ...] = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", style="dim"),
    )
    return Progress(*columns, console=console)
