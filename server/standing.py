"""Where a run stands, on disk, so that a long one can go on after a stop.

A folder of two generations at most; ``standing.json`` names the files of the one that counts and is written
last, so that a stop at any moment leaves the one before:

    standing.json            tasks merged, the round that comes next, scores, events; hashes of the files
    N-model-NAME             snapshot of each model's engine (:mod:`fedmerge.server.snapshot`)
    N-moved                  what the task under way has moved so far, a task vector file
    N-version-V-NAME         merged vectors that have not been scored by all sites

What sites keep is theirs and is not here. After a stop privacy accounts begin anew, and so does what options
remember of earlier tasks: runs with these had better start over. What compression left out is remembered
within a task alone, so runs with compression write nothing down between a task's rounds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError

from fedmerge.common import vectorfile
from fedmerge.common.errors import MismatchError, StoreDamaged
from fedmerge.common.hashing import hash_file
from fedmerge.common.score import Score
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.writing import make_folder, replacing
from fedmerge.server import snapshot
from fedmerge.server.history import Event
from fedmerge.server.layout import TaskRun
from fedmerge.server.model import GlobalModel

NAME = "standing.json"


class MergedTask(BaseModel):
    """A task whose vector is in the models, and who taught it."""

    model_config = ConfigDict(extra="forbid")

    task: str
    learned_by: list[str]


class UnderWay(BaseModel):
    """A task some of whose rounds are in the models: ``round`` is the next, ``seconds`` were spent on merging
    those before."""

    model_config = ConfigDict(extra="forbid")

    task: str
    round: int
    learned_by: list[str]
    seconds: float


class Standing(BaseModel):
    """How far a run has come.

    Attributes:
        number: of this generation. ``layout``: hash of the layout and the rules it is of.
        merged: in order. ``passed``: tasks that have had their turn, merged or not, in order.
        scores: rule, version, task, accuracy and examples, one line per site; ``fine_tuned``: the same of
            tasks after their last round. ``unscored``: versions that some site has not scored yet.
        events: the history. ``files``: hash by file name.
    """

    model_config = ConfigDict(extra="forbid")

    number: int
    layout: str
    merged: list[MergedTask]
    passed: list[str]
    under_way: UnderWay | None
    scores: list[tuple[str, int, str, float, int]]
    fine_tuned: list[tuple[str, float, int]]
    unscored: list[int]
    events: list[Event]
    files: dict[str, str] = {}

    @classmethod
    def of(
        cls,
        number: int,
        layout: str,
        merged: Sequence[TaskRun],
        passed: Sequence[TaskRun],
        run: TaskRun | None,
        scores: Mapping[tuple[str, int, str], Sequence[Score]],
        fine_tuned: Mapping[str, Sequence[Score]],
        unscored: Collection[int],
        events: list[Event],
    ) -> Standing:
        """How far a run has come; ``run`` is the task under way, if its rounds count.

        Of tasks that have not had their turn nothing is written down: they are learned again.
        """
        done = {name for run in passed for name in run.names}
        return cls(
            number=number,
            layout=layout,
            merged=[MergedTask(task=run.task, learned_by=run.learned_by) for run in merged],
            passed=[run.task for run in passed],
            under_way=None
            if run is None
            else UnderWay(task=run.task, round=run.round, learned_by=run.learned_by, seconds=run.seconds),
            scores=[
                (rule, version, task, score.accuracy, score.examples)
                for (rule, version, task), found in scores.items()
                if version not in unscored
                for score in found
            ],
            fine_tuned=[
                (task, score.accuracy, score.examples)
                for task, found in fine_tuned.items()
                if task in done
                for score in found
            ],
            unscored=sorted(unscored),
            events=events,
        )

    @property
    def round(self) -> int:
        """The next one."""
        return self.under_way.round if self.under_way is not None else 1

    def take_over(
        self,
        runs: list[TaskRun],
        moved: TaskVector | None,
        scores: dict[tuple[str, int, str], list[Score]],
        fine_tuned: dict[str, list[Score]],
    ) -> list[TaskRun]:
        """Puts tasks and scores to where they were; returns the tasks that are merged.

        Args:
            runs: as sites hold the tasks now. Those that have had their turn come first then, as they had it.
            moved: by the task under way.

        Raises:
            MismatchError: nobody holds the task under way.
        """
        by_task = {run.task: run for run in runs}
        for task in self.passed:
            by_task.setdefault(task, TaskRun(task, [])).closed = True
        for done in self.merged:
            by_task[done.task].learned_by = done.learned_by
        first = list(self.passed)
        if self.under_way is not None:
            self._go_on_with(by_task, self.under_way, moved)
            first.append(self.under_way.task)
        runs[:] = [*(by_task[task] for task in first), *(run for run in runs if run.task not in first)]
        for rule, version, task, accuracy, examples in self.scores:
            scores.setdefault((rule, version, task), []).append(Score(accuracy, examples))
        for task, accuracy, examples in self.fine_tuned:
            fine_tuned.setdefault(task, []).append(Score(accuracy, examples))
        return [by_task[done.task] for done in self.merged]

    def _go_on_with(self, by_task: Mapping[str, TaskRun], stood: UnderWay, moved: TaskVector | None) -> None:
        run = by_task.get(stood.task)
        if run is None:
            raise MismatchError(
                "nobody holds the task that is under way",
                got=stood.task,
                do="Connect the sites that have learned it so far.",
            )
        run.round, run.moved, run.seconds = stood.round, moved, stood.seconds
        run.taught = {site.node for site in run.sites if site.label in stood.learned_by}
        run.learned_by = stood.learned_by


@dataclass(frozen=True)
class Checkpoints:
    """Writes and reads standings.

    Attributes:
        folder: of one run. ``every``: rounds between two standings, at least 1; one follows every task.
    """

    folder: Path
    every: int = 10

    def due(self, round: int) -> bool:
        """Whether a standing is written after this round of a task."""
        return round % self.every == 0

    def write(
        self,
        standing: Standing,
        base: str,
        models: Mapping[str, GlobalModel],
        moved: TaskVector | None,
        published: Mapping[int, Mapping[str, bytes]],
    ) -> None:
        """Puts a standing in place of the one before.

        Args:
            published: merged vectors of the versions that are unscored, by number and model.
        """
        make_folder(self.folder)
        number = standing.number
        files: dict[str, str] = {}

        def put(name: str, write: Callable[[BinaryIO], object]) -> None:
            path = self.folder / f"{number}-{name}"
            with replacing(path) as file:
                write(file)
            files[path.name], _ = hash_file(path)

        for name, model in models.items():
            put(f"model-{name}", partial(snapshot.write, model.engine, base))
        if moved is not None:
            put("moved", partial(vectorfile.write, moved))
        for version, merged in published.items():
            for name, data in merged.items():
                put(f"version-{version}-{name}", partial(_write, data))
        with replacing(self.folder / NAME) as file:
            file.write(standing.model_copy(update={"files": files}).model_dump_json().encode())
        for old in self.folder.iterdir():
            if old.name != NAME and old.name not in files:
                old.unlink(missing_ok=True)

    def read(self, layout: str) -> Standing | None:
        """The standing of a run of this layout; None if there is none.

        Raises:
            MismatchError: of another layout. StoreDamaged: not as it was written.
        """
        path = self.folder / NAME
        try:
            standing = Standing.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise StoreDamaged(
                "not the standing of a run", where=path, got=str(error).splitlines()[0]
            ) from error
        if standing.layout != layout:
            raise MismatchError(
                "the standing of a run that was laid out differently",
                where=path,
                do="Give the same settings, or another folder.",
            )
        for name, wanted in standing.files.items():
            if not (self.folder / name).is_file() or hash_file(self.folder / name)[0] != wanted:
                raise StoreDamaged("a file of a standing is missing or damaged", where=self.folder / name)
        return standing

    def restore(self, standing: Standing, base: str, models: Mapping[str, GlobalModel]) -> TaskVector | None:
        """Brings models to a standing; returns what the task under way has moved."""
        for name, model in models.items():
            snapshot.restore(model.engine, base, self.folder / f"{standing.number}-model-{name}")
        moved = self.folder / f"{standing.number}-moved"
        return vectorfile.load(moved).in_memory() if moved.name in standing.files else None

    def published(self, standing: Standing, version: int, name: str) -> bytes:
        """The merged vector of an unscored version."""
        return (self.folder / f"{standing.number}-version-{version}-{name}").read_bytes()

    def clear(self) -> None:
        """Removes everything, once the run's results are safe."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()


def layout_hash(config: BaseModel, models: Mapping[str, GlobalModel], base: str) -> str:
    """Equal for runs that can go on from each other's standing."""
    rules = {name: [m.engine.rule.name, m.engine.rule.model_dump(mode="json")] for name, m in models.items()}
    told = json.dumps([config.model_dump(mode="json"), rules, base], sort_keys=True)
    return sha256(told.encode()).hexdigest()


def _write(data: bytes, file: BinaryIO) -> None:
    file.write(data)
