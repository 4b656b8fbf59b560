"""``fedmerge leaderboard``: every rule on the same task vectors, over streams, seeds and orders of arrival.

Each task is learned once per seed from the base, by the code that sites run. Every rule then merges the
vectors in several orders, in this process; see :mod:`fedmerge.deploy.contest`.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fedmerge.client.loading import first_tasks, load_stream
from fedmerge.client.tasks import Stream, StreamOptions
from fedmerge.common.config import Seed
from fedmerge.common.errors import ConfigError
from fedmerge.common.machine import cores
from fedmerge.common.training import PLAIN, LocalTraining
from fedmerge.deploy.contest import Contest, Judges, arrival_orders, torch_threads
from fedmerge.deploy.learned import Learner
from fedmerge.deploy.report.leaderboard import FailedRun, Leaderboard, Reference, RuleFacts, RuleRun
from fedmerge.server.merge.rule import Rule

LIBRARIES = ("fedmerge", "torch", "numpy", "transformers")


class LeaderboardConfig(BaseModel):
    """What to compare rules on.

    Attributes:
        streams: see ``load_stream``. ``tasks``: how many of each stream's tasks, in order; None takes all.
        seeds: of data splits, training and orders. ``rows``: bound on training rows per task.
        orders: orders of arrival per seed: the stream's own, then random ones.
        quick: score each task after its own merge and after the last one only; forgetting is then unknown.
        workers: tasks scored at a time, each on its own copy of the model; also threads of an engine.
        cache: folder that keeps task vectors for later runs.
        training: what departs from the streams' training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    streams: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)]
    orders: int = Field(default=3, ge=1)
    tasks: int | None = Field(default=None, ge=1)
    rows: int | None = Field(default=None, ge=1)
    quick: bool = False
    workers: int = Field(default_factory=cores, ge=1)
    cache: Path | None = None
    training: LocalTraining = PLAIN

    @field_validator("streams", "seeds")
    @classmethod
    def _each_once(cls, given: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(given)) < len(given):
            raise ValueError("each may be named once")
        return given


@dataclass(frozen=True)
class Listener:
    """Told of every task learned, vector merged and run failed; and, after every seed, of all so far."""

    learned: Callable[[str], None] = lambda _: None
    merged: Callable[[str], None] = lambda _: None
    failed: Callable[[FailedRun], None] = lambda _: None
    completed: Callable[[Leaderboard], None] = lambda _: None


SILENT = Listener()


def leaderboard(config: LeaderboardConfig, rules: Sequence[Rule], listener: Listener = SILENT) -> Leaderboard:
    """Runs every rule over every stream, seed and order.

    A run that a typed error ends is listed among the failures, and the others go on.

    Raises:
        ConfigError: a setting that does not fit a stream. Errors of fetching data and of learning come
            through.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    streams = chosen(config)
    board = Leaderboard(
        command=shlex.join(["fedmerge", *sys.argv[1:]]),
        started=started.isoformat(timespec="seconds"),
        versions={name: version(name) for name in LIBRARIES},
        streams=[entry.stream.name for entry in streams],
        rules={rule.name: _facts(rule) for rule in rules},
        references=[],
        runs=[],
        failures=[],
        seconds=0.0,
        training=config.training.model_dump(exclude_none=True, exclude={"loop"}),
        loop=config.training.loop.model_dump(exclude_none=True),
        **config.model_dump(include={"seeds", "orders", "rows", "quick", "workers"}),
    )
    for entry in streams:
        entry.stream.prepare()
        for seed in config.seeds:
            learner = Learner(entry.spec, seed, config.rows, entry.tasks, config.cache, config.training)
            reference, found = _seed(entry.stream.name, learner, config, rules, listener)
            board = board.model_copy(
                update={
                    "references": [*board.references, reference],
                    "runs": [*board.runs, *(run for run in found if isinstance(run, RuleRun))],
                    "failures": [*board.failures, *(run for run in found if isinstance(run, FailedRun))],
                    "seconds": time.perf_counter() - clock,
                }
            )
            listener.completed(board)
    return board


@dataclass(frozen=True)
class Chosen:
    """A stream and the tasks of it to learn; ``spec`` is how it was asked for."""

    spec: str
    stream: Stream
    tasks: tuple[str, ...]


def chosen(config: LeaderboardConfig) -> list[Chosen]:
    """The streams to run.

    Raises:
        ConfigError: a stream that is not there or has fewer tasks, two of one name, or too many orders.
    """
    found: dict[str, Chosen] = {}
    for spec in config.streams:
        stream = load_stream(spec, StreamOptions(config.seeds[0], config.rows))
        tasks = first_tasks(stream, config.tasks)
        arrival_orders(tasks, config.orders, seed=0)
        if stream.name in found:
            raise ConfigError("two streams of one name", where=f"stream {spec!r}", got=repr(stream.name))
        found[stream.name] = Chosen(spec, stream, tasks)
    return list(found.values())


def _seed(
    name: str, learner: Learner, config: LeaderboardConfig, rules: Sequence[Rule], listener: Listener
) -> tuple[Reference, list[RuleRun | FailedRun]]:
    """Learns a stream's tasks with one seed and runs all rules on them."""
    needs = frozenset[str]().union(*(rule.needs for rule in rules))
    with torch_threads(config.workers):
        tasks = learner.load()
        vectors = learner.learn(tasks, needs, listener.learned)
    contest = Contest(
        stream=name,
        seed=learner.seed,
        site=learner.site,
        tasks={task.name: task for task in tasks},
        vectors=vectors,
        orders=arrival_orders(learner.tasks, config.orders, learner.seed),
        judges=Judges(learner.site, config.workers),
        quick=config.quick,
    )
    with torch_threads(1):
        reference = contest.reference()
        found = []
        for rule in rules:
            for run in contest.runs(rule, listener.merged):
                found.append(run)
                if isinstance(run, FailedRun):
                    listener.failed(run)
    return reference, found


def _facts(rule: Rule) -> RuleFacts:
    return RuleFacts(options=rule.model_dump(), needs=sorted(rule.needs), order_free=rule.order_free)
