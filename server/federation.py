"""One run: tasks out to sites, vectors in, versions out, scores in.

Every reply is handled as it comes. A task's round closes when all its sites have answered, failed or
timed out; its vector is merged as soon as every earlier task has been merged or has failed, so that
the order of merging is fixed however fast sites are. Nobody waits for a slow site but its own task.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any

from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.serverapp import Grid
from pydantic import BaseModel, ConfigDict, Field

from fedmerge import __version__
from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.config import Partition, Seed
from fedmerge.common.errors import BaseMismatch, ConfigError, FedmergeError, StatisticsMissing
from fedmerge.common.score import Score, pooled
from fedmerge.common.statistics import statistics_of
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.common.wire import EvaluateJob, Hello, TrainJob
from fedmerge.server.admission import LIMITS, MAX_EXAMPLES, BaseNorms, Limits, admit, weight
from fedmerge.server.combine import add_vectors, combine
from fedmerge.server.history import History
from fedmerge.server.mailbox import Mailbox, Reply, Request
from fedmerge.server.merge.rule import Rule
from fedmerge.server.model import GlobalModel
from fedmerge.server.needs import check_needs

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class FederationConfig(BaseModel):
    """How a run is laid out.

    Attributes:
        tasks: names in merging order; empty takes every task the sites announce, in order of their labels.
        rounds: local fine-tunings per task; from the second on, sites start from the task's combined vector.
        sites_per_task: how many sites share a task's data.
        partition: how they share it: ``iid`` or ``dirichlet:ALPHA``.
        seed: of every local run and partition.
        min_sites: how many to wait for; ``wait_seconds``: how long before starting with those there are.
        timeout_seconds: for one message, from sending it to its reply.
        max_examples: cap of a self-reported example count.
        evaluate: whether sites score every version on every task.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = ()
    rounds: Positive = 1
    sites_per_task: Positive = 1
    partition: Partition = "iid"
    seed: Seed = 0
    min_sites: Positive = 1
    wait_seconds: Seconds = 120.0
    timeout_seconds: Seconds = 3600.0
    max_examples: Positive = MAX_EXAMPLES
    evaluate: bool = True


@dataclass(frozen=True)
class Site:
    """A connected node and what it said about itself."""

    node: int
    label: str
    tasks: tuple[str, ...]


@dataclass
class TaskRun:
    """One task under way: who learns it, what has come back, what it has moved so far."""

    task: str
    sites: list[Site]
    round: int = 1
    waiting: set[int] = field(default_factory=set)
    arrived: dict[int, tuple[TaskVector, int]] = field(default_factory=dict)
    moved: TaskVector | None = None
    taught: set[int] = field(default_factory=set)
    learned_by: list[str] = field(default_factory=list)
    closed: bool = False

    def part_of(self, node: int) -> int:
        return [site.node for site in self.sites].index(node)


@dataclass(frozen=True)
class _Hello:
    pass


@dataclass(frozen=True)
class _Train:
    run: int
    round: int


@dataclass(frozen=True)
class _Evaluate:
    version: int


class Federation:
    """Runs tasks over the sites of a grid and merges what they learn, under one or more rules.

    Every rule merges the same vectors; fine-tuning is done once. Statistics that any of the rules needs
    are asked for in a task's last round, at the weights that are merged.

    Args:
        grid: Flower's.
        base: the pretrained model everybody starts from.
        models: one per rule, by the rule's name.
        config: the layout of the run.
        history: receives every event.
        limits: how large a vector may be against the base.
    """

    def __init__(
        self,
        grid: Grid,
        base: Base,
        models: Mapping[str, GlobalModel],
        config: FederationConfig,
        history: History,
        poll_seconds: float = 0.1,
        clock: Callable[[], float] = time.monotonic,
        limits: Limits = LIMITS,
    ) -> None:
        self.base, self.models, self.config, self.history = base, models, config, history
        self._norms, self._limits = BaseNorms.of(base), limits
        self._mailbox = Mailbox(grid, self._note_sent, clock)
        self._poll_seconds, self._clock = poll_seconds, clock
        self.sites: dict[int, Site] = {}
        self._greeted: set[int] = set()
        self.runs: list[TaskRun] = []
        self.merged: list[TaskRun] = []
        self._next = 0
        self._published: dict[int, dict[str, ArrayRecord]] = {}
        self._unscored: dict[int, int] = {}
        self.scores: dict[tuple[str, int, str], list[Score]] = {}
        self.fine_tuned: dict[str, list[Score]] = {}
        self._needs = tuple(sorted({need for m in models.values() for need in m.engine.rule.needs}))

    def run(self) -> None:
        """Runs until every task has been merged or has failed and every score has come in.

        Raises:
            ConfigError: not one usable site came in time, or none holds any of the tasks.
        """
        self._wait_for_sites()
        self._assign()
        if self.config.evaluate:
            self._publish(0, {}, self.sites.values())
        for index in range(len(self.runs)):
            self._start_round(index)
        while not self._mailbox.idle:
            self._step()
        self.history.record("finished", versions=len(self.merged))

    def score(self, rule: str, version: int, task: str) -> Score | None:
        """The accuracy of a version on a task over all sites that scored it, weighted by examples."""
        return pooled(self.scores.get((rule, version, task), []))

    def _step(self) -> None:
        replies = self._mailbox.step()
        for reply in replies:
            match reply.request.key:
                case _Hello():
                    self._welcome(reply)
                case _Train() as key:
                    self._receive(reply, key)
                case _Evaluate() as key:
                    self._take_scores(reply, key.version)
        self._greet_newcomers()
        if not replies:
            time.sleep(self._poll_seconds)

    # --- sites ---

    def _wait_for_sites(self) -> None:
        deadline = self._clock() + self.config.wait_seconds
        self._greet_newcomers()
        while len(self.sites) < self.config.min_sites and self._clock() < deadline:
            self._step()
        while not self._mailbox.idle and self._clock() < deadline:
            self._step()
        if not self.sites:
            raise ConfigError(
                "no site is ready",
                got=f"{len(self._greeted)} connected, none usable",
                wanted=f"{self.config.min_sites}",
                do="The history says why each was refused.",
            )

    def _greet_newcomers(self) -> None:
        content = RecordDict({wire.JOB: ConfigRecord({"version": __version__})})
        # A node that never says hello must not hold up a run whose tasks are done.
        timeout = min(self.config.wait_seconds, self.config.timeout_seconds)
        for node in sorted(self._mailbox.nodes() - self._greeted):
            self._greeted.add(node)
            self._mailbox.put(Request(node, wire.HELLO, _Hello(), lambda: content, timeout))

    def _welcome(self, reply: Reply) -> None:
        node = reply.request.node
        if reply.content is None:
            self._fail(f"node {node}", "", "hello", reply.reason)
            return
        try:
            hello = wire.unpack_job(Hello, reply.content, where=f"node {node}")
            wire.check_version(hello.version, __version__, where=hello.site)
            if hello.base != self.base.fingerprint:
                raise BaseMismatch(
                    "another pretrained model",
                    where=hello.site,
                    got=hello.base[:12],
                    wanted=self.base.fingerprint[:12],
                )
        except FedmergeError as error:
            self._fail(f"node {node}", "", "hello", str(error))
            return
        self.sites[node] = Site(node, hello.site, hello.tasks)
        self.history.record("joined", site=hello.site, tasks=list(hello.tasks))
        if self.runs:
            self._add_runs_of(self.sites[node])

    def _label(self, node: int) -> str:
        return self.sites[node].label if node in self.sites else f"node {node}"

    # --- tasks ---

    def _assign(self) -> None:
        """Gives each task to sites that hold it, taking turns."""
        sites = sorted(self.sites.values(), key=lambda site: (site.label, site.node))
        tasks = self.config.tasks or tuple(dict.fromkeys(task for site in sites for task in site.tasks))
        share = self.config.sites_per_task
        for turn, task in enumerate(tasks):
            holders = [site for site in sites if task in site.tasks]
            if not holders:
                self._fail("", task, "assign", "no connected site holds this task")
                continue
            first = turn * share % len(holders)
            chosen = (holders[first:] + holders[:first])[:share]
            self.runs.append(TaskRun(task, chosen))
        if not self.runs:
            raise ConfigError("no connected site holds any of the tasks", got=list(tasks))

    def _add_runs_of(self, newcomer: Site) -> None:
        """A site that joins late brings the wanted tasks that nobody else has, after the others."""
        known = {run.task for run in self.runs}
        wanted = self.config.tasks or newcomer.tasks
        brought = [task for task in newcomer.tasks if task in wanted and task not in known]
        first = len(self.runs)
        self.runs += [TaskRun(task, [newcomer]) for task in brought]
        if brought and self.config.evaluate:
            self._publish(0, {}, [newcomer])
        for index in range(first, len(self.runs)):
            self._start_round(index)

    def _start_round(self, index: int) -> None:
        run = self.runs[index]
        run.waiting, run.arrived = {site.node for site in run.sites}, {}
        origin = wire.pack_vector(to_bytes(run.moved)) if run.moved is not None else None
        for site in run.sites:
            job = TrainJob(
                run.task,
                self.base.fingerprint,
                run.round,
                0,
                self.config.seed,
                run.part_of(site.node),
                len(run.sites),
                self.config.partition,
                needs=self._needs if self._asks(run) else (),
            )
            self._send(site.node, wire.TRAIN, _Train(index, run.round), partial(_train_content, job, origin))

    def _asks(self, run: TaskRun) -> bool:
        """Whether the statistics that the rules need come with the round that a task is in."""
        return run.round == self.config.rounds

    def _asking(self, run: TaskRun) -> list[Rule]:
        """The rules whose needs the vectors of that round must meet."""
        return [model.engine.rule for model in self.models.values()] if self._asks(run) else []

    def _receive(self, reply: Reply, key: _Train) -> None:
        """One site's answer to a training request: admitted, refused or missing."""
        run, node = self.runs[key.run], reply.request.node
        run.waiting.discard(node)
        label = self._label(node)
        if reply.content is None:
            self._fail(label, run.task, "train", reply.reason)
        else:
            try:
                self._admit(run, node, label, reply.content, reply.seconds)
            except FedmergeError as error:
                self._fail(label, run.task, "refused", str(error))
        if not run.waiting:
            self._close_round(key.run)

    def _admit(self, run: TaskRun, node: int, label: str, content: RecordDict, seconds: float) -> None:
        where = f"update of {label}"
        vector = wire.unpack_vector(content, wire.VECTOR, where=where)
        admit(vector, self.base, self._norms, self._limits, task=run.task, rules=self._asking(run))
        metrics: Mapping[str, object] = content.metric_records.get(wire.METRICS, {})
        examples = weight(metrics.get("num-examples"), where=where, cap=self.config.max_examples)
        # What is recorded and merged is what was admitted, not what the site claims in its file.
        manifest = replace(vector.manifest, site=label, examples=examples)
        run.arrived[node] = replace(vector, manifest=manifest), examples
        if run.round == self.config.rounds:
            found = wire.unpack_scores(content, ["fine-tuned"], [run.task]).values()
            self.fine_tuned.setdefault(run.task, []).extend(found)
        self.history.record(
            "trained",
            site=label,
            task=run.task,
            round=run.round,
            examples=examples,
            bytes_up=wire.bytes_in(content),
            statistics_bytes=statistics_of(vector).payload_bytes,
            seconds=round(seconds, 3),
            train_seconds=_number(metrics.get("train-seconds")),
            score_seconds=_number(metrics.get("score-seconds")),
            loss=_number(metrics.get("train-loss")),
        )

    def _close_round(self, index: int) -> None:
        run = self.runs[index]
        if run.arrived:
            try:
                self._add_round(run)
            except StatisticsMissing as error:
                self._fail("", run.task, "combine", str(error))
                run.moved = None
            if run.round < self.config.rounds:
                run.round += 1
                self._start_round(index)
                return
        elif run.moved is not None and self._needs:
            self._fail("", run.task, "merge", "its last round brought no statistics, which a rule needs")
            run.moved = None
        run.closed, run.arrived = True, {}
        self._merge_in_order()

    def _add_round(self, run: TaskRun) -> None:
        """What the sites of a round have learned, on top of the rounds before.

        Raises:
            StatisticsMissing: sites do not bring the same ones, or a layer moved before the last round alone.
        """
        ordered = [run.arrived[site.node] for site in run.sites if site.node in run.arrived]
        needs = self._needs if self._asks(run) else ()
        step = combine([vector for vector, _ in ordered], [count for _, count in ordered], needs)
        run.moved = step if run.moved is None else add_vectors(run.moved, step).in_memory()
        check_needs(run.moved, self.base, self._asking(run), f"task {run.task!r}")
        run.taught |= set(run.arrived)
        run.learned_by = [site.label for site in run.sites if site.node in run.taught]

    # --- versions ---

    def _merge_in_order(self) -> None:
        while self._next < len(self.runs) and self.runs[self._next].closed:
            run = self.runs[self._next]
            self._next += 1
            if run.moved is not None:
                self._merge(run, run.moved)
                run.moved = None

    def _merge(self, run: TaskRun, vector: TaskVector) -> None:
        self.merged.append(run)
        number = len(self.merged)
        published = {}
        for name, model in self.models.items():
            version = model.merge(vector, run.learned_by)
            started = time.perf_counter()
            if self.config.evaluate:
                published[name] = wire.pack_vector(to_bytes(model.merged()))
            read_seconds = time.perf_counter() - started
            model.prepare()
            self.history.record(
                "merged",
                rule=name,
                task=run.task,
                sites=run.learned_by,
                version=number,
                examples=version.examples,
                lambda_t=version.lambda_t,
                scale=version.scale,
                update_norm=version.update_norm,
                merged_norm=version.merged_norm,
                absorb_seconds=round(version.absorb_seconds, 4),
                read_seconds=round(read_seconds, 4),
            )
        self.history.record("published", task=run.task, version=number)
        if self.config.evaluate:
            self._publish(number, published, self.sites.values())

    def _publish(self, number: int, merged: dict[str, ArrayRecord], sites: Iterable[Site]) -> None:
        """Sends a version to those sites that hold test data of some task."""
        self._published[number] = merged
        for site in sites:
            held = [
                (run.task, run.part_of(site.node), len(run.sites)) for run in self.runs if site in run.sites
            ]
            if not held:
                continue
            tasks, part, parts = zip(*held, strict=True)
            job = EvaluateJob(
                number, self.base.fingerprint, self.config.seed, tasks, part, parts, self.config.partition
            )
            self._unscored[number] = self._unscored.get(number, 0) + 1
            self._send(
                site.node,
                wire.EVALUATE,
                _Evaluate(number),
                partial(self._evaluate_content, job),
                first=True,
            )

    def _evaluate_content(self, job: EvaluateJob) -> RecordDict:
        merged = self._published[job.version].items()
        return RecordDict(
            {wire.JOB: wire.pack_job(job), **{wire.MERGED + rule: record for rule, record in merged}}
        )

    def _take_scores(self, reply: Reply, version: int) -> None:
        label = self._label(reply.request.node)
        rules = list(self._published[version]) or ["base"]
        self._unscored[version] -= 1
        if not self._unscored[version]:
            del self._published[version], self._unscored[version]
        if reply.content is None:
            self._fail(label, "", "evaluate", reply.reason)
            return
        held = [run.task for run in self.runs if any(site.node == reply.request.node for site in run.sites)]
        found = wire.unpack_scores(reply.content, rules, held)
        for (rule, task), score in found.items():
            self.scores.setdefault((rule, version, task), []).append(score)
        metrics: Mapping[str, object] = reply.content.metric_records.get(wire.METRICS, {})
        self.history.record(
            "evaluated",
            site=label,
            version=version,
            scores=len(found),
            seconds=round(reply.seconds, 3),
            score_seconds=_number(metrics.get("score-seconds")),
        )

    # --- messages ---

    def _send(
        self, node: int, kind: str, key: Any, content: Callable[[], RecordDict], *, first: bool = False
    ) -> None:
        self._mailbox.put(Request(node, kind, key, content, self.config.timeout_seconds), first=first)

    def _note_sent(self, request: Request, content: RecordDict) -> None:
        self.history.record(
            "sent", site=self._label(request.node), message=request.kind, bytes_down=wire.bytes_in(content)
        )

    def _fail(self, site: str, task: str, phase: str, reason: str) -> None:
        self.history.record("failed", site=site, task=task, phase=phase, reason=reason)


def _train_content(job: TrainJob, origin: ArrayRecord | None) -> RecordDict:
    return RecordDict({wire.JOB: wire.pack_job(job), **({wire.ORIGIN: origin} if origin else {})})


def _number(value: object) -> float | None:
    return round(float(value), 4) if isinstance(value, int | float) and abs(value) < math.inf else None
