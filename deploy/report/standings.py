"""What the runs of a leaderboard come to, by stream and rule.

Means go over orders first and then over seeds, so that every seed counts alike. Spreads are sample standard
deviations: over seeds, of the means over orders; ``order_spread`` over the orders of one seed, averaged over
seeds. Data and task vectors of a seed are the same for all rules, so rules are best told apart by ``gain``,
the difference to OPCM on the same seed and order: its spread leaves out what seeds do to all rules alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from fedmerge.deploy.report.leaderboard import Leaderboard, RuleRun
from fedmerge.deploy.report.metrics import mean
from fedmerge.deploy.report.results import write_csv

YARDSTICK = "opcm"
"""The rule that gains and ratios of time compare with, where it is among the rules."""

Value = Callable[[RuleRun], float | None]


@dataclass(frozen=True)
class Standing:
    """One rule on one stream. Accuracies are fractions, sizes bytes; None: not measured.

    Attributes:
        runs: how many of them ended without an error.
        acc, spread, order_spread: mean ACC, and its spread over seeds and within a seed over orders.
        gain, gain_spread: ACC minus OPCM's on the same seed and order, and its spread over seeds.
        state_bytes: after the last merge; ``state_ratio``: over the bytes of the base's merged layers.
        upload_bytes: statistics per task, mean; ``upload_ratio``: over the bytes of the task vectors.
        seconds: per merge, absorbing and reading, median; ``seconds_ratio``: over OPCM's.
    """

    stream: str
    rule: str
    runs: int
    acc: float | None
    spread: float | None
    order_spread: float | None
    gain: float | None
    gain_spread: float | None
    bwt: float | None
    bwt_spread: float | None
    forgetting: float | None
    forgetting_spread: float | None
    state_bytes: float | None
    state_ratio: float | None
    upload_bytes: float | None
    upload_ratio: float | None
    seconds: float | None
    seconds_ratio: float | None


def standings(board: Leaderboard) -> list[Standing]:
    """One entry per stream and rule, streams in their order, rules from the highest ACC to the lowest."""
    return [entry for stream in board.streams for entry in standings_of(board, stream)]


def standings_of(board: Leaderboard, stream: str) -> list[Standing]:
    """The rules on one stream, from the highest ACC to the lowest; those without one come last."""
    return sorted((_standing(board, stream, rule) for rule in board.rules), key=lambda s: -_or_lowest(s.acc))


def overall(board: Leaderboard) -> list[Standing]:
    """The rules over all streams, each counting alike: means of ACC, gain, BWT, forgetting and the ratios.

    What a rule lacks on some stream it lacks overall. Spreads, sizes and seconds belong to a stream: None.
    """
    by_rule = {rule: [_standing(board, stream, rule) for stream in board.streams] for rule in board.rules}
    found = [_over_streams(rule, entries) for rule, entries in by_rule.items()]
    return sorted(found, key=lambda s: -_or_lowest(s.acc))


def bounds(board: Leaderboard, stream: str) -> tuple[float | None, float | None]:
    """Mean accuracy over tasks and seeds of the base, and of one fine-tuned model per task."""
    references = board.references_of(stream)
    return (
        mean(mean(found.zero_shot.values()) for found in references),
        mean(mean(found.fine_tuned.values()) for found in references),
    )


def save_standings(board: Leaderboard, folder: Path) -> Path:
    """Writes standings.csv, one line per stream and rule; returns its path."""
    path = folder / "standings.csv"
    names = [field.name for field in fields(Standing)]
    write_csv(path, names, ([getattr(entry, name) for name in names] for entry in standings(board)))
    return path


def _standing(board: Leaderboard, stream: str, rule: str) -> Standing:
    runs, yardstick = board.of(stream, rule), board.of(stream, YARDSTICK)
    references = board.references_of(stream)
    acc, spread = _over_seeds(runs, lambda run: run.acc)
    bwt, bwt_spread = _over_seeds(runs, lambda run: run.bwt)
    forgetting, forgetting_spread = _over_seeds(runs, lambda run: run.forgetting)
    gain, gain_spread = _over_seeds(runs if rule != YARDSTICK else (), _gain_over(yardstick))
    state, upload = mean(run.state_bytes for run in runs), mean(_upload(run) for run in runs)
    seconds = _median_seconds(runs)
    return Standing(
        stream=stream,
        rule=rule,
        runs=len(runs),
        acc=acc,
        spread=spread,
        order_spread=mean(_spread(values) for values in _by_seed(runs, lambda run: run.acc)),
        gain=gain,
        gain_spread=gain_spread,
        bwt=bwt,
        bwt_spread=bwt_spread,
        forgetting=forgetting,
        forgetting_spread=forgetting_spread,
        state_bytes=state,
        state_ratio=_ratio(state, mean(found.base_bytes for found in references)),
        upload_bytes=upload,
        upload_ratio=_ratio(upload, mean(found.vector_bytes / len(found.tasks) for found in references)),
        seconds=seconds,
        seconds_ratio=_ratio(seconds, _median_seconds(yardstick)),
    )


def _over_streams(rule: str, entries: Sequence[Standing]) -> Standing:
    def over(name: str) -> float | None:
        values = [getattr(entry, name) for entry in entries]
        return None if None in values else mean(values)

    means = ("acc", "gain", "bwt", "forgetting", "state_ratio", "upload_ratio", "seconds_ratio")
    blank = dict.fromkeys(field.name for field in fields(Standing) if field.name not in means)
    facts = {"stream": "all streams", "rule": rule, "runs": sum(entry.runs for entry in entries)}
    return Standing(**blank | facts | {name: over(name) for name in means})  # type: ignore[arg-type]


def _over_seeds(runs: Iterable[RuleRun], value: Value) -> tuple[float | None, float | None]:
    """Mean over seeds of the mean over orders, and its spread over seeds."""
    by_seed = [mean(values) for values in _by_seed(runs, value)]
    return mean(by_seed), _spread(by_seed)


def _by_seed(runs: Iterable[RuleRun], value: Value) -> list[list[float | None]]:
    found: dict[int, list[float | None]] = {}
    for run in runs:
        found.setdefault(run.seed, []).append(value(run))
    return list(found.values())


def _gain_over(yardstick: Iterable[RuleRun]) -> Value:
    theirs = {(run.seed, run.order): run.acc for run in yardstick}

    def gain(run: RuleRun) -> float | None:
        other = theirs.get((run.seed, run.order))
        return None if run.acc is None or other is None else run.acc - other

    return gain


def _upload(run: RuleRun) -> float:
    return run.statistics_bytes / len(run.tasks)


def _median_seconds(runs: Iterable[RuleRun]) -> float | None:
    seconds = [spent for run in runs for spent in run.merge_seconds()]
    return statistics.median(seconds) if seconds else None


def _spread(values: Iterable[float | None]) -> float | None:
    """Sample standard deviation; None of fewer than two."""
    found = [value for value in values if value is not None]
    return statistics.stdev(found) if len(found) > 1 else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def _or_lowest(acc: float | None) -> float:
    return -1.0 if acc is None else acc
