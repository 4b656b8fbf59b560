"""results.json: everything one run of a stream measured, and nothing that has to be guessed later.

Accuracies are fractions in [0, 1]; norms are Frobenius norms over all merged layers together; sizes
are bytes; times are seconds. ``None`` means not measured.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedmerge.common.errors import ConfigError, FileError
from fedmerge.deploy.report import metrics

FORMAT = "fedmerge.results/1"

Fraction = Annotated[float, Field(ge=0, le=1)]
Difference = Annotated[float, Field(ge=-1, le=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Settings = dict[str, float | str | int | bool | None]


class Frozen(BaseModel):
    """A record that is checked when it is made and never changes."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class MergeRow(Frozen):
    """One merge of one rule.

    ``scale`` is the factor c_t from the running sum to the merged weights, ``lambda_t`` the rule's own
    normaliser; ``update_norm`` is the norm of the arriving task vector, ``merged_norm`` that of the
    merged one. ``seconds``: ``absorb`` takes the update in, ``read`` builds the weights.
    """

    version: Count
    task: str
    sites: list[str]
    examples: Count
    scale: float
    lambda_t: float
    update_norm: Amount
    merged_norm: Amount
    seconds: dict[str, Amount]


class Learning(Frozen):
    """How sites learned what a rule merged.

    ``start``: ``base`` or ``merged``; ``joint``: all tasks at once; ``rounds`` per task; ``sites``: asked in
    each; ``training``: options in use with their settings; ``loop``: settings of the training loop that were
    not the stream's.
    ``up_bytes``: sent by all sites, of which ``statistics_bytes`` are statistics; ``cut``: mean norm of what
    compression left out, relative to the update's; ``fine_tuned``: accuracy at the sites, by task.
    ``epsilon``: the largest that any site has spent by the end, other methods before this one included, at
    the run's delta; None: not known, or no bound at all.
    """

    rule: str
    start: Literal["base", "merged"] = "base"
    joint: bool = False
    rounds: Count = 1
    sites: Count = 1
    training: dict[str, Settings] = {}
    loop: Settings = {}
    compress: str = "none"
    up_bytes: Count = 0
    statistics_bytes: Count = 0
    updates: Count = 0
    cut: Amount | None = None
    fine_tuned: dict[str, Fraction | None] = {}
    epsilon: Amount | None = None

    @property
    def plain(self) -> bool:
        """Whether sites fine-tuned from the base as the stream says, task by task, and sent that whole."""
        return not (
            self.start == "merged" or self.joint or self.training or self.loop or self.compress != "none"
        )


class RuleResults(Frozen):
    """One rule over the whole stream: its accuracy matrix (merges by tasks) and the numbers from it.

    ``needs``: statistics that sites sent for it. ``state_bytes``: what it keeps after the last merge.
    ``learning``: how sites learned; None where it was not written down.
    """

    options: dict[str, float | str | int | bool]
    accuracy: list[list[Fraction | None]]
    accuracy_so_far: list[Fraction | None]
    acc: Fraction | None
    bwt: Difference | None
    forgetting: Difference | None
    merges: list[MergeRow]
    needs: list[str] = []
    state_bytes: Count | None = None
    learning: Learning | None = None

    @classmethod
    def measured(
        cls,
        tasks: Sequence[str],
        accuracy: metrics.Matrix,
        merges: Sequence[MergeRow],
        options: Mapping[str, float | str | int | bool] | None = None,
        needs: Iterable[str] = (),
        state_bytes: int | None = None,
        learning: Learning | None = None,
    ) -> RuleResults:
        """Computes every number from the matrix, with the tasks in the order of its columns."""
        learned = _learned(tasks, merges, learning)
        return cls(
            options=dict(options or {}),
            accuracy=[list(row) for row in accuracy],
            accuracy_so_far=metrics.accuracy_so_far(accuracy, learned),
            acc=metrics.average_accuracy(accuracy),
            bwt=metrics.backward_transfer(accuracy, learned),
            forgetting=metrics.forgetting(accuracy, learned),
            merges=list(merges),
            needs=sorted(needs),
            state_bytes=state_bytes,
            learning=learning,
        )

    @model_validator(mode="after")
    def _one_row_per_merge(self) -> Self:
        wanted = len(self.merges)
        for name, got in (("accuracy", len(self.accuracy)), ("accuracy_so_far", len(self.accuracy_so_far))):
            if got != wanted:
                raise ValueError(f"{name} has {got} rows for {wanted} merges")
        return self

    @property
    def joint(self) -> bool:
        """Whether its one merge brought all tasks, learned at once."""
        return self.learning is not None and self.learning.joint

    def learned(self, tasks: Sequence[str]) -> list[int | None]:
        """For each task the row of the merge that brought it."""
        return _learned(tasks, self.merges, self.learning)


class SiteTraffic(Frozen):
    """What one site sent (up) and received (down), and how often it failed.

    ``statistics_bytes`` is the part of ``up_bytes`` that statistics take, for the rules that need them.
    """

    site: str
    tasks: list[str]
    up_bytes: Count
    down_bytes: Count
    failures: Count
    statistics_bytes: Count = 0


class Failure(Frozen):
    """One thing that did not work: where, on which task, in which phase, and why."""

    site: str
    task: str
    phase: str
    reason: str


class Results(Frozen):
    """One run of a stream under every rule, or method, that was asked for.

    ``tasks`` is the order of merging. ``rules``: by the name of the rule or method. ``privacy``: what sites
    do to their updates before they send them, if anything.
    """

    format: Literal["fedmerge.results/1"] = "fedmerge.results/1"
    stream: str
    seed: int
    sites: Count
    rounds: Count
    rows: Count | None
    sites_per_task: Count
    sites_per_round: Count | None = None
    partition: str
    privacy: dict[str, float] | None = None
    command: str
    started: str
    base_fingerprint: str
    versions: dict[str, str]
    threads_per_worker: Count
    actors: Count
    tasks: list[str]
    zero_shot: dict[str, Fraction | None]
    fine_tuned: dict[str, Fraction | None]
    test_examples: dict[str, Count]
    rules: dict[str, RuleResults]
    sites_traffic: list[SiteTraffic]
    seconds: dict[str, Amount]
    failures: list[Failure]

    def learned(self, rule: str) -> list[int | None]:
        """For each task the row of the merge that brought it, under one rule."""
        return self.rules[rule].learned(self.tasks)

    def brought(self, rule: str) -> list[str]:
        """What each merge of a rule brought, in words."""
        result = self.rules[rule]
        return ["all tasks" if result.joint else merge.task for merge in result.merges]

    def sampling_error(self, rule: str) -> float | None:
        """The standard error of a rule's ACC that comes from finite test sets."""
        return metrics.sampling_error(
            self.final(rule), [self.test_examples.get(task, 0) for task in self.tasks]
        )

    def final(self, rule: str) -> list[float | None]:
        """The accuracy of each task after the last merge, in the order of ``tasks``."""
        accuracy = self.rules[rule].accuracy
        return list(accuracy[-1]) if accuracy else [None] * len(self.tasks)

    @field_validator("started")
    @classmethod
    def _iso(cls, started: str) -> str:
        datetime.fromisoformat(started)
        return started

    @field_validator("tasks")
    @classmethod
    def _each_task_once(cls, tasks: list[str]) -> list[str]:
        if twice := sorted({task for task in tasks if tasks.count(task) > 1}):
            raise ValueError(f"tasks named twice: {twice}")
        return tasks

    @model_validator(mode="after")
    def _one_column_per_task(self) -> Self:
        for name in ("zero_shot", "fine_tuned", "test_examples"):
            if unknown := sorted(set(getattr(self, name)) - set(self.tasks)):
                raise ValueError(f"{name} names unknown tasks: {unknown}")
        for rule, result in self.rules.items():
            if unknown := sorted({merge.task for merge in result.merges} - set(self.tasks)):
                raise ValueError(f"rules.{rule}.merges name unknown tasks: {unknown}")
            for merge, row in enumerate(result.accuracy, start=1):
                if len(row) != len(self.tasks):
                    raise ValueError(
                        f"rules.{rule}.accuracy, merge {merge}: "
                        f"{len(row)} entries for {len(self.tasks)} tasks"
                    )
        return self


def _learned(tasks: Sequence[str], merges: Sequence[MergeRow], learning: Learning | None) -> list[int | None]:
    if learning is not None and learning.joint:
        return [0 if merges else None] * len(tasks)
    return metrics.learned_by(tasks, [merge.task for merge in merges])


def save(results: Results, folder: Path | str) -> Path:
    """Writes results.json, accuracy.csv and merges.csv into a folder; returns the path of the first.

    accuracy.csv is tidy, one accuracy per line (rule, merge, merged_task, task, accuracy), merge
    numbers from 1, an empty field for what was not measured. merges.csv has one line per rule and merge.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "results.json"
    path.write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
    write_csv(
        folder / "accuracy.csv", ["rule", "merge", "merged_task", "task", "accuracy"], _accuracies(results)
    )
    write_csv(folder / "merges.csv", _merge_columns(results), _merges(results))
    return path


def load(path: Path | str) -> Results:
    """Reads a results.json, given itself or its folder.

    Raises:
        FileError: no such file, not JSON, or of another format.
        ConfigError: a field is unknown, missing or out of range; the message names file and field.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    content = _read_json(path)
    if content.get("format") != FORMAT:
        raise FileError(
            "not results of a run", where=path, got=f"format {content.get('format')!r}", wanted=repr(FORMAT)
        )
    try:
        return Results.model_validate(content)
    except ValidationError as error:
        raise _config_error(path, error) from error


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(
            f"cannot be read ({error.strerror})", where=path, do="Give a results.json or its folder."
        ) from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise FileError(f"is not JSON ({error})", where=path) from error
    if not isinstance(content, dict):
        raise FileError("is not a JSON object", where=path, got=type(content).__name__, wanted="an object")
    return content


def _config_error(path: Path, error: ValidationError) -> ConfigError:
    """The first complaint in one sentence, with the nearest known key for an unknown one."""
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    near = difflib.get_close_matches(str(first["loc"][-1]), _known_keys()) if first["loc"] else []
    return ConfigError(
        f"field {field!r}: {first['msg']}{more}" if field else f"{first['msg']}{more}",
        where=path,
        do=f"Did you mean {near[0]!r}?" if first["type"] == "extra_forbidden" and near else None,
    )


def _known_keys() -> list[str]:
    models: list[type[BaseModel]] = [Results, RuleResults, Learning, MergeRow, SiteTraffic, Failure]
    return sorted({key for model in models for key in model.model_fields})


def write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(lines)


def _accuracies(results: Results) -> Iterable[Sequence[object]]:
    for rule, result in results.rules.items():
        for number, (merge, row) in enumerate(zip(result.merges, result.accuracy, strict=True), start=1):
            for task, accuracy in zip(results.tasks, row, strict=True):
                yield rule, number, merge.task, task, accuracy


def _merge_columns(results: Results) -> list[str]:
    named = [name for name in MergeRow.model_fields if name != "seconds"]
    return ["rule", "merge", *named, *(f"seconds_{phase}" for phase in _phases(results))]


def _merges(results: Results) -> Iterable[Sequence[object]]:
    for rule, result in results.rules.items():
        for number, merge in enumerate(result.merges, start=1):
            fields = merge.model_dump(exclude={"seconds"}) | {"sites": ";".join(merge.sites)}
            seconds = (merge.seconds.get(phase) for phase in _phases(results))
            yield rule, number, *fields.values(), *seconds


def _phases(results: Results) -> list[str]:
    merges = [merge for result in results.rules.values() for merge in result.merges]
    return list(dict.fromkeys(phase for merge in merges for phase in merge.seconds))
