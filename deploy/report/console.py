"""The end of a run on a terminal: rules by number, then tasks by rule."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedmerge.deploy.report import metrics
from fedmerge.deploy.report.results import Results, RuleResults

_RULE_WIDTH = 11  # a rule's column in the second table, padding and line included
_TASK_WIDTH = 16
_BOUNDS_WIDTH = _TASK_WIDTH + 3 + 7 + 8 + 1  # the columns before the rules: task, base, alone, and the edge


def print_summary(results: Results, console: Console) -> None:
    """Prints the rules from best to worst ACC, then each task after the last merge.

    Where the terminal is too narrow for all rules side by side, the second table is split.
    """
    console.print(_rules_table(results))
    rules = by_acc(results)
    fitting = max(1, (console.width - _BOUNDS_WIDTH) // _RULE_WIDTH)
    for start in range(0, len(rules), fitting):
        console.print(_tasks_table(results, rules[start : start + fitting]))
    if results.failures:
        console.print(Text(f"{len(results.failures)} failed; see the report for where and why", style="red"))


def by_acc(results: Results) -> list[str]:
    """Rules from the highest ACC to the lowest; those without one come last."""
    return sorted(results.rules, key=lambda rule: -_or_lowest(results.rules[rule].acc))


def percent(fraction: float | None, *, signed: bool = False) -> str:
    """A fraction in %, or a difference in points, with one digit; a dash where nothing was measured."""
    if fraction is None:
        return "–"  # noqa: RUF001
    points = round(100 * fraction, 1) + 0.0  # no minus zero
    return f"{points:+.1f}" if signed and points else f"{points:.1f}"


def mean_seconds_per_merge(result: RuleResults) -> float | None:
    """The mean over merges of all seconds the rule spent on one: absorb and read together."""
    return metrics.mean(sum(merge.seconds.values()) for merge in result.merges)


def _rules_table(results: Results) -> Table:
    table = Table(title=Text(f"{results.stream}: {len(results.tasks)} tasks, seed {results.seed}"))
    table.add_column("rule", overflow="ellipsis", no_wrap=True, max_width=24)
    for name in ("ACC %", "BWT pt", "forget pt", "s/merge"):
        table.add_column(name, justify="right", no_wrap=True)
    for rule in by_acc(results):
        result = results.rules[rule]
        spent = mean_seconds_per_merge(result)
        table.add_row(
            Text(rule),
            percent(result.acc),
            percent(result.bwt, signed=True),
            percent(result.forgetting, signed=True),
            "–" if spent is None else f"{spent:.2f}",  # noqa: RUF001
        )
    return table


def _tasks_table(results: Results, rules: Sequence[str]) -> Table:
    table = Table(title="accuracy after the last merge (%)")
    table.add_column("task", overflow="ellipsis", no_wrap=True, max_width=_TASK_WIDTH)
    table.add_column("base", justify="right", no_wrap=True)
    table.add_column("alone", justify="right", no_wrap=True)
    for rule in rules:
        table.add_column(
            Text(rule), justify="right", overflow="ellipsis", no_wrap=True, max_width=_RULE_WIDTH - 3
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
