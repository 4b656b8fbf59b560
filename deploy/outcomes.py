"""What each method of a simulation left, and keeping that while others are still to come.

A folder ``unfinished`` beside the results holds a JSON file per method that has ended, the events up to then,
and where the method under way stands; it is removed when the results are written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from pydantic import Field

from fedmerge.common.errors import ConfigError, StoreDamaged
from fedmerge.common.score import Score, pooled
from fedmerge.common.writing import make_folder, replacing
from fedmerge.deploy.report.metrics import mean
from fedmerge.deploy.report.results import Frozen, Learning, MergeRow, RuleResults
from fedmerge.server.federation import Federation
from fedmerge.server.history import Event
from fedmerge.server.methods import Method
from fedmerge.server.standing import Checkpoints

EVENTS, KEPT = "events.jsonl", "methods.json"


class Outcome(Frozen):
    """What one method left.

    Attributes:
        shared: whether other methods learn from the same task vectors, so that its fine-tuned models are
            those of any rule.
        zero_shot: accuracy of the base by task, and on how many examples; empty unless it was scored.
        held: tasks by site.
    """

    result: RuleResults
    shared: bool
    zero_shot: dict[str, tuple[float, int]]
    held: dict[str, list[str]]


def outcome(
    method: Method, federation: Federation, state_bytes: int, tasks: Sequence[str], events: Sequence[Event]
) -> Outcome:
    """What a method left, from its federation.

    Args:
        state_bytes: what its rule keeps. ``tasks``: of the stream, in order. ``events``: its own.
    """
    name = method.name

    def accuracy(number: int, task: str) -> float | None:
        found = federation.score(name, number, task)
        return found.accuracy if found else None

    matrix = [[accuracy(number, task) for task in tasks] for number in range(1, len(federation.merged) + 1)]
    rows = [_merge_row(event) for event in events if event["event"] == "merged" and event["rule"] == name]
    learning = _learning(method, federation, tasks, events)
    options = method.rule.model_dump()
    needs = method.rule.needs
    base = {task: score for task in tasks if (score := federation.score("base", 0, task)) is not None}
    return Outcome(
        result=RuleResults.measured(tasks, matrix, rows, options, needs, state_bytes, learning),
        shared=method.learning is not None,
        zero_shot={task: (score.accuracy, score.examples) for task, score in base.items()},
        held={
            site.label: [name for run in federation.runs if site in run.sites for name in run.names]
            for site in federation.sites.values()
        },
    )


def _learning(
    method: Method, federation: Federation, tasks: Sequence[str], events: Sequence[Event]
) -> Learning:
    layout = federation.config
    sent = [event for event in events if event["event"] in ("trained", "corrected")]
    trained = [event for event in sent if event["event"] == "trained"]
    told = method.training.model_dump(exclude_none=True)
    fine_tuned: dict[str, Score | None] = {
        task: pooled(federation.fine_tuned.get(task, [])) for task in tasks
    }
    return Learning(
        rule=method.rule.name,
        start=layout.start,
        joint=layout.joint,
        rounds=layout.rounds,
        sites=layout.sites_asked,
        training={name: told[name] for name in method.training.options},
        loop=told["loop"],
        compress=method.compress,
        up_bytes=sum(event["bytes_up"] for event in sent),
        statistics_bytes=sum(event["statistics_bytes"] for event in trained),
        updates=len(trained),
        cut=mean(event["cut"] for event in trained),
        fine_tuned={task: score.accuracy if score else None for task, score in fine_tuned.items()},
        epsilon=max((event["epsilon"] for event in sent if event["epsilon"] is not None), default=None),
    )


def _merge_row(event: Event) -> MergeRow:
    facts = {key: event[key] for key in MergeRow.model_fields if key != "seconds"}
    return MergeRow(**facts, seconds={"absorb": event["absorb_seconds"], "read": event["read_seconds"]})


class _Kept(Frozen):
    """What counts in the folder: of each method that has ended its file's hash, and how many events."""

    methods: dict[str, str] = Field(default_factory=dict)
    events: int = 0


@dataclass(frozen=True)
class Unfinished:
    """The folder of a simulation that is under way; ``methods.json`` says what counts and is written last."""

    folder: Path

    def begin(self, settings: str, resume: bool) -> tuple[dict[str, Outcome], list[Event]]:
        """Opens the folder for a simulation of these settings; what is there already if it is to go on.

        Raises:
            ConfigError: to go on, where nothing was begun or with other settings. StoreDamaged: what methods
                left is not as it was written.
        """
        about = self.folder / "settings.json"
        if not resume:
            shutil.rmtree(self.folder, ignore_errors=True)
            make_folder(self.folder)
            with replacing(about) as file:
                file.write(settings.encode())
            return {}, []
        if not about.is_file():
            raise ConfigError(
                "nothing to go on with", where=self.folder, do="Start without --resume, or name the folder."
            )
        if about.read_text() != settings:
            raise ConfigError(
                "the simulation was begun with other settings",
                where=self.folder,
                do="Give the same command, with --resume added.",
            )
        kept = self._kept()
        found = {name: self._outcome(name, wanted) for name, wanted in kept.methods.items()}
        return found, self._events(kept.events)

    def keep(self, outcomes: Mapping[str, Outcome], events: Sequence[Event]) -> None:
        """Writes down what methods left, and all events so far."""
        hashes = self._kept().methods
        with replacing(self.folder / EVENTS) as file:
            file.write("".join(json.dumps(event) + "\n" for event in events).encode())
        for name, found in outcomes.items():
            data = found.model_dump_json().encode()
            hashes[name] = sha256(data).hexdigest()
            with replacing(self._path(name)) as file:
                file.write(data)
        with replacing(self.folder / KEPT) as file:
            file.write(_Kept(methods=hashes, events=len(events)).model_dump_json().encode())

    def checkpoints(self, methods: Sequence[Method]) -> Checkpoints:
        """Where the methods stand that learn together."""
        words = "\n".join(method.name for method in methods)
        return Checkpoints(self.folder / f"standing-{_short_hash(words)}")

    def clear(self) -> None:
        """Removes the folder, once the results are written."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        return self.folder / f"method-{_short_hash(name)}.json"

    def _kept(self) -> _Kept:
        path = self.folder / KEPT
        try:
            return _Kept.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return _Kept()
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def _outcome(self, name: str, wanted: str) -> Outcome:
        path = self._path(name)
        try:
            data = path.read_bytes()
            if sha256(data).hexdigest() != wanted:
                raise ValueError("other bytes than were written")
            return Outcome.model_validate_json(data)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def _events(self, count: int) -> list[Event]:
        """The first events, as many as belong to methods that have ended."""
        path = self.folder / EVENTS
        try:
            lines = path.read_text().splitlines()[:count] if count else []
            if len(lines) < count:
                raise ValueError(f"{len(lines)} events of {count}")
            return [json.loads(line) for line in lines]
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error


def _short_hash(words: str) -> str:
    """What a file may be named by, whatever a method is."""
    return sha256(words.encode()).hexdigest()[:12]


def _damaged(path: Path, error: Exception) -> StoreDamaged:
    return StoreDamaged(
        "what a simulation had left is damaged",
        where=path,
        got=str(error).splitlines()[0],
        do="Start without --resume.",
    )
