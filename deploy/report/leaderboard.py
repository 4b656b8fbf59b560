"""leaderboard.json: every run of every rule over streams, seeds and orders of arrival.

Accuracies are fractions in [0, 1], sizes bytes, times seconds; ``None`` means not measured. What these
runs come to is in :mod:`fedmerge.deploy.report.standings`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from fedmerge.common.writing import make_folder
from fedmerge.deploy.report import metrics
from fedmerge.deploy.report.results import Amount, Count, Difference, Fraction, Frozen, Settings, write_csv

RUN_COLUMNS = (
    "stream",
    "rule",
    "seed",
    "order",
    "acc",
    "bwt",
    "forgetting",
    "state_bytes",
    "statistics_bytes",
)


class RuleRun(Frozen):
    """One rule over one stream, with one seed and one order of arrival.

    Attributes:
        order: which of the seed's orders; 0 is the stream's own. ``tasks``: that order.
        accuracy: row i after merge i, columns as in ``tasks``.
        forgetting: None also where only the diagonal and the last row were scored.
        absorb_seconds: by merge, what is factorised for it included; ``read_seconds``: of the merged vector,
            None where the model was not needed.
        state_bytes: what the rule keeps after the last merge.
        statistics_bytes: payload that the sites sent for this rule beside the task vectors, over all tasks.
    """

    stream: str
    rule: str
    seed: Count
    order: Count
    tasks: list[str]
    accuracy: list[list[Fraction | None]]
    acc: Fraction | None
    bwt: Difference | None
    forgetting: Difference | None
    absorb_seconds: list[Amount]
    read_seconds: list[Amount | None]
    state_bytes: Count
    statistics_bytes: Count

    def merge_seconds(self) -> list[float]:
        """Absorbing and reading, of each merge that was also read."""
        pairs = zip(self.absorb_seconds, self.read_seconds, strict=True)
        return [absorb + read for absorb, read in pairs if read is not None]


class Reference(Frozen):
    """What one stream and seed give without any merging.

    Attributes:
        base_bytes: of the base's merged layers. ``vector_bytes``: payload of all task vectors, without
            statistics.
        zero_shot: accuracy of the base by task; ``fine_tuned``: of the base plus the task's own vector.
    """

    stream: str
    seed: Count
    base_fingerprint: str
    base_bytes: Count
    vector_bytes: Count
    tasks: list[str]
    zero_shot: dict[str, Fraction]
    fine_tuned: dict[str, Fraction]
    test_examples: dict[str, Count]


class RuleFacts(Frozen):
    """A rule's options, and what it asks for and promises."""

    options: dict[str, float | str | int | bool | None]
    needs: list[str]
    order_free: bool


class FailedRun(Frozen):
    """A run that an error ended."""

    stream: str
    rule: str
    seed: Count
    order: Count
    reason: str


class Leaderboard(Frozen):
    """All runs, and how they came about. ``orders`` is how many each seed has; ``seconds`` the whole time.

    ``training`` and ``loop`` are what departed from the streams' own training, as in
    :class:`~fedmerge.deploy.report.results.Learning`.
    """

    format: Literal["fedmerge.leaderboard/1"] = "fedmerge.leaderboard/1"
    command: str
    started: str
    versions: dict[str, str]
    streams: list[str]
    seeds: list[Count]
    orders: Count
    rows: Count | None
    quick: bool
    training: dict[str, Settings] = Field(default_factory=dict)
    loop: Settings = Field(default_factory=dict)
    workers: Count
    rules: dict[str, RuleFacts]
    references: list[Reference]
    runs: list[RuleRun]
    failures: list[FailedRun]
    seconds: Amount

    def of(self, stream: str, rule: str) -> list[RuleRun]:
        """The runs of a rule over a stream, by seed and order."""
        return [run for run in self.runs if (run.stream, run.rule) == (stream, rule)]

    def references_of(self, stream: str) -> list[Reference]:
        """By seed."""
        return [found for found in self.references if found.stream == stream]


def measured(accuracy: metrics.Matrix, quick: bool) -> dict[str, float | None]:
    """ACC, BWT and forgetting of an accuracy matrix whose columns are in order of arrival.

    Args:
        quick: only the diagonal and the last row were scored, which does not tell forgetting.
    """
    return {
        "acc": metrics.average_accuracy(accuracy),
        "bwt": metrics.backward_transfer(accuracy),
        "forgetting": None if quick else metrics.forgetting(accuracy),
    }


def save(board: Leaderboard, folder: Path) -> Path:
    """Writes leaderboard.json, runs.csv and accuracy.csv; returns the path of the first.

    runs.csv has one line per run, accuracy.csv one per accuracy, merges numbered from 1. Fields of what was
    not measured are empty.
    """
    make_folder(folder)
    path = folder / "leaderboard.json"
    path.write_text(board.model_dump_json(indent=1) + "\n", encoding="utf-8")
    write_csv(folder / "runs.csv", [*RUN_COLUMNS, "seconds_per_merge"], _runs(board))
    write_csv(
        folder / "accuracy.csv",
        ["stream", "rule", "seed", "order", "merge", "merged_task", "task", "accuracy"],
        _accuracies(board),
    )
    return path


def _runs(board: Leaderboard) -> Iterable[Sequence[object]]:
    for run in board.runs:
        yield *(getattr(run, column) for column in RUN_COLUMNS), metrics.mean(run.merge_seconds())


def _accuracies(board: Leaderboard) -> Iterable[Sequence[object]]:
    for run in board.runs:
        for merge, (merged, row) in enumerate(zip(run.tasks, run.accuracy, strict=True), start=1):
            for task, accuracy in zip(run.tasks, row, strict=True):
                if accuracy is not None:
                    yield run.stream, run.rule, run.seed, run.order, merge, merged, task, accuracy
