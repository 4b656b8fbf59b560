"""The end of a run on a terminal: rules by number, how sites learned, then tasks by rule."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmerge.deploy.report import metrics
from fedmerge.deploy.report.learning import Way, noun, spent, ways
from fedmerge.deploy.report.results import Results, RuleResults
from fedmerge.deploy.report.words import format_bytes, percent, seconds

_NAME_WIDTH = 28  # letters of a rule's name
_TASK_WIDTH = 16
_LEAST_WIDTH = 5  # of a column of accuracies, in letters
_PADDING = 3  # of a column, its line included
_BOUNDS_WIDTH = 7 + 8 + 1  # the columns base and alone, and the edge


def print_summary(results: Results, console: Console) -> None:
    """Prints the rules from best to worst ACC, how sites learned where that was not plain, what privacy they
    have left, and each task after the last merge.

    Where the terminal is too narrow for all rules side by side, the last table is split.
    """
    console.print(_rules_table(results))
    if told := ways(results):
        console.print(_ways_table(told))
    if results.privacy is not None:
        console.print(Text(_privacy(results)))
    tasks = min(max(map(len, results.tasks), default=0), _TASK_WIDTH) + _PADDING
    for rules in _fitting(by_acc(results), console.width - tasks - _BOUNDS_WIDTH):
        console.print(_tasks_table(results, rules))
    if results.failures:
        console.print(Text(f"{len(results.failures)} failed; see the report for where and why", style="red"))


def by_acc(results: Results) -> list[str]:
    """Rules from the highest ACC to the lowest; those without one come last."""
    return sorted(results.rules, key=lambda rule: -_or_lowest(results.rules[rule].acc))


def mean_seconds_per_merge(result: RuleResults) -> float | None:
    """The mean over merges of all seconds the rule spent on one: absorb and read together."""
    return metrics.mean(sum(merge.seconds.values()) for merge in result.merges)


def _rules_table(results: Results) -> Table:
    table = Table(title=Text(f"{results.stream}: {len(results.tasks)} tasks, seed {results.seed}"))
    table.add_column(noun(results), overflow="ellipsis", no_wrap=True, max_width=_NAME_WIDTH)
    for name in ("ACC %", "BWT pt", "forget pt", "s/merge"):
        table.add_column(name, justify="right", no_wrap=True)
    for rule in by_acc(results):
        result = results.rules[rule]
        table.add_row(
            Text(rule),
            percent(result.acc),
            percent(result.bwt, signed=True),
            percent(result.forgetting, signed=True),
            seconds(mean_seconds_per_merge(result)),
        )
    return table


def _ways_table(told: Sequence[Way]) -> Table:
    compressed = any(way.compress != "none" for way in told)
    table = Table(title="how each was learned")
    table.add_column("method", overflow="ellipsis", no_wrap=True, max_width=_NAME_WIDTH)
    table.add_column("from, with")
    for name in ("rounds", "sent", *(["cut %"] if compressed else []), "sites %"):
        table.add_column(name, justify="right")
    for way in told:
        table.add_row(
            Text(way.name),
            Text(", ".join((way.start.removesuffix(" model"), *way.options))),
            f"{way.rounds} x {way.sites}",
            format_bytes(way.sent),
            *([percent(way.cut)] if compressed else []),
            percent(way.at_sites),
        )
    return table


def _privacy(results: Results) -> str:
    assert results.privacy is not None
    clipped = f"privacy: updates clipped to norm {results.privacy['clip']:g}"
    if not results.privacy["noise"]:
        return f"{clipped}, no noise: no guarantee"
    return (
        f"{clipped}, noise {results.privacy['noise']:g} times that: "
        f"epsilon {spent(results)} at delta {results.privacy['delta']:g}"
    )


def _fitting(rules: Sequence[str], width: int) -> Iterator[list[str]]:
    """The rules in groups whose columns fit side by side, at least one in each."""
    group: list[str] = []
    left = width
    for rule in rules:
        needed = max(_LEAST_WIDTH, min(len(rule), _NAME_WIDTH)) + _PADDING
        if group and needed > left:
            yield group
            group, left = [], width
        group.append(rule)
        left -= needed
    if group:
        yield group


def _tasks_table(results: Results, rules: Sequence[str]) -> Table:
    table = Table(title="accuracy after the last merge (%)")
    table.add_column("task", overflow="ellipsis", no_wrap=True, max_width=_TASK_WIDTH)
    table.add_column("base", justify="right", no_wrap=True)
    table.add_column("alone", justify="right", no_wrap=True)
    for rule in rules:
        table.add_column(
            Text(rule), justify="right", overflow="ellipsis", no_wrap=True, max_width=_NAME_WIDTH
        )
    finals = [results.final(rule) for rule in rules]
    for n, task in enumerate(results.tasks):
        table.add_row(
            Text(task),
            percent(results.zero_shot.get(task)),
            percent(results.fine_tuned.get(task)),
            *(percent(final[n]) for final in finals),
        )
    return table


def _or_lowest(acc: float | None) -> float:
    return -1.0 if acc is None else acc
