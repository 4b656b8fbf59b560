"""One run: tasks out to sites, vectors in, versions out, scores in.

Every reply is handled as it comes. A task's round closes when all its sites have answered, failed or
timed out. Where sites start from the base, all tasks are learned at the same time, and a task's vector is
merged as soon as every earlier task has been merged or has failed, so that the order of merging is fixed
however fast sites are: nobody waits for a slow site but its own task. Where they start from the merged
model, a task begins when the one before it is in.

A rule with the cadence of a round takes in every round's vector; other rules the sum of a task's rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from flwr.app import RecordDict
from flwr.serverapp import Grid

from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError, FedmergeError, StatisticsMissing
from fedmerge.common.score import Score
from fedmerge.common.statistics import statistics_of
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.server.admission import LIMITS, BaseNorms, Limits, admit, weight
from fedmerge.server.combine import add_vectors
from fedmerge.server.correcting import Corrected, Correcting
from fedmerge.server.history import History
from fedmerge.server.layout import FederationConfig, Site, TaskRun, assign, check_layout
from fedmerge.server.mailbox import Mailbox, Reply, Request
from fedmerge.server.model import GlobalModel
from fedmerge.server.needs import check_needs
from fedmerge.server.peers import reported
from fedmerge.server.roster import Greeted, Roster
from fedmerge.server.rounds import Rounds
from fedmerge.server.scoring import Scored, Scoring
from fedmerge.server.standing import Checkpoints, Standing, layout_hash

MOST_IDLE = 3
"""Rounds in a row that may bring nothing before a task that goes on from the merged model is given up."""


@dataclass(frozen=True)
class _Train:
    run: int
    round: int


class Federation:
    """Runs tasks over the sites of a grid and merges what they learn, under one or more rules.

    Every rule merges the same vectors; fine-tuning is done once. Statistics that any of the rules needs
    are asked for in a task's last round, at the weights that are merged.

    Args:
        grid: Flower's.
        base: the pretrained model everybody starts from.
        models: one per rule, by the name it goes by in this run.
        config: the layout of the run.
        history: receives every event.
        limits: how large a vector may be against the base.
        checkpoints: where it is written down how far the run has come; it goes on from there.

    Attributes:
        runs: the tasks in merging order. ``merged``: those whose vectors are in the models.
        fine_tuned: what sites scored after their last round, by task.

    Raises:
        ConfigError: several models, or a layout that one of the rules cannot follow.
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
        checkpoints: Checkpoints | None = None,
    ) -> None:
        check_layout(config, [model.engine.rule for model in models.values()])
        self.base, self.models, self.config, self.history = base, models, config, history
        self._norms, self._limits = BaseNorms.of(base), limits
        self._mailbox = Mailbox(grid, self._note_sent, clock)
        self._poll_seconds, self._clock, self._checkpoints = poll_seconds, clock, checkpoints
        self._roster = Roster(self._mailbox, base.fingerprint, config, history, self._fail)
        self.runs: list[TaskRun] = []
        self.merged: list[TaskRun] = []
        self._next = 0
        self._scoring = Scoring(
            self._mailbox, base.fingerprint, config, history, self.runs, self.merged, self._fail
        )
        self.fine_tuned: dict[str, list[Score]] = {}
        self._rounds = Rounds(base.fingerprint, models, config)
        self._correcting = Correcting(
            self._mailbox, base, self._norms, self._limits, config, history, self._fail
        )
        self._saved, self._first_event = 0, len(history.events)

    def run(self) -> None:
        """Runs until every task has been merged or has failed and every score has come in.

        Raises:
            ConfigError: not one usable site came in time, or none holds any of the tasks.
        """
        self._wait_for_sites()
        self._assign()
        standing = self._checkpoints.read(self._layout) if self._checkpoints is not None else None
        if standing is not None:
            self._go_on_from(standing)
        elif self.config.evaluate and self.config.evaluate_base:
            self._scoring.publish(0, {}, self.sites.values())
        self._start_tasks(self._next)
        while not self._mailbox.idle:
            self._step()
        self.history.record("finished", versions=len(self.merged))

    @property
    def sites(self) -> Mapping[int, Site]:
        """Those let in, by node."""
        return self._roster.sites

    @property
    def scores(self) -> dict[tuple[str, int, str], list[Score]]:
        """What sites have found, by rule, version and task."""
        return self._scoring.scores

    def score(self, rule: str, version: int, task: str) -> Score | None:
        """The accuracy of a version on a task over all sites that scored it, weighted by examples."""
        return self._scoring.score(rule, version, task)

    def _step(self) -> None:
        replies = self._mailbox.step()
        for reply in replies:
            match reply.request.key:
                case Greeted():
                    newcomer = self._roster.welcome(reply)
                    if newcomer is not None and self.runs:
                        self._add_runs_of(newcomer)
                case _Train() as key:
                    self._receive(reply, key)
                case Corrected() as key:
                    self._correcting.take(reply, key)
                case Scored() as key:
                    self._scoring.take(reply, key.version, self._roster.label(reply.request.node))
        self._roster.greet_newcomers()
        if not replies:
            time.sleep(self._poll_seconds)

    # --- sites ---

    def _wait_for_sites(self) -> None:
        deadline = self._clock() + self.config.wait_seconds
        self._roster.greet_newcomers()
        while len(self.sites) < self.config.min_sites and self._clock() < deadline:
            self._step()
        while not self._mailbox.idle and self._clock() < deadline:
            self._step()
        if not self.sites:
            raise ConfigError(
                "no site is ready",
                got=f"{len(self._roster.greeted)} connected, none usable",
                wanted=f"{self.config.min_sites}",
                do="The history says why each was refused.",
            )

    # --- tasks ---

    def _assign(self) -> None:
        runs, orphans = assign(self.config, self.sites.values())
        for task in orphans:
            self._fail("", task, "assign", "no connected site holds this task")
        self.runs += runs
        if not self.runs:
            raise ConfigError("no connected site holds any of the tasks", got=list(self.config.tasks))

    def _add_runs_of(self, newcomer: Site) -> None:
        """A site that joins late brings the wanted tasks that nobody else has, after the others.

        It brings none where all tasks are learned at once.
        """
        if self.config.joint:
            return
        known = {name for run in self.runs for name in run.names}
        wanted = self.config.tasks or newcomer.tasks
        brought = [task for task in newcomer.tasks if task in wanted and task not in known]
        first = len(self.runs)
        self.runs += [TaskRun(task, [newcomer]) for task in brought]
        if brought and self.config.evaluate and self.config.evaluate_base:
            self._scoring.publish(0, {}, [newcomer])
        self._start_tasks(first)

    def _start_tasks(self, first: int) -> None:
        """Starts new tasks: all where sites start from the base, else one if none is under way."""
        if self.config.start == "base":
            for index in range(first, len(self.runs)):
                self._start_round(index)
        elif self._next == first and not self._correcting.busy:
            self._start_next()

    def _start_next(self) -> None:
        if self._next < len(self.runs):
            self._start_round(self._next)

    def _start_round(self, index: int) -> None:
        run = self.runs[index]
        run.begin(self.config.sites_per_round, self.config.seed)
        for site, content in self._rounds.requests(run, self._origin_version):
            self._send(site.node, wire.TRAIN, _Train(index, run.round), content)

    @property
    def _origin_version(self) -> int:
        """The version that sites start from."""
        return len(self.merged) if self.config.start == "merged" else 0

    def _receive(self, reply: Reply, key: _Train) -> None:
        """One site's answer to a training request: admitted, refused or missing."""
        run, node = self.runs[key.run], reply.request.node
        run.waiting.discard(node)
        label = self._roster.label(node)
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
        origin, rules = self._origin_version, self._rounds.asking(run)
        admit(vector, self.base, self._norms, self._limits, task=run.task, origin=origin, rules=rules)
        metrics: Mapping[str, object] = content.metric_records.get(wire.METRICS, {})
        examples = weight(metrics.get("num-examples"), where=where, cap=self.config.max_examples)
        # What is recorded and merged is what was admitted, not what the site claims in its file.
        manifest = replace(vector.manifest, site=label, examples=examples)
        run.arrived[node] = replace(vector, manifest=manifest), examples
        if self._rounds.is_last(run):
            found = wire.unpack_scores(content, ["fine-tuned"], run.names)
            for (_, task), score in found.items():
                self.fine_tuned.setdefault(task, []).append(score)
        self.history.record(
            "trained",
            site=label,
            task=run.task,
            round=run.round,
            examples=examples,
            bytes_up=wire.bytes_in(content),
            statistics_bytes=statistics_of(vector).payload_bytes,
            seconds=round(seconds, 3),
            train_seconds=reported(metrics.get("train-seconds")),
            score_seconds=reported(metrics.get("score-seconds")),
            loss=reported(metrics.get("train-loss")),
            cut=reported(metrics.get("cut")),
            epsilon=reported(metrics.get("epsilon")),
        )

    def _close_round(self, index: int) -> None:
        run = self.runs[index]
        run.idle = 0 if run.arrived else run.idle + 1
        if run.arrived:
            try:
                self._add_round(run)
            except StatisticsMissing as error:
                self._leave_out(run, "combine", str(error))
        if self._goes_on(run):
            run.round += 1
            if self._rounds.at_once and run.arrived:
                self._save(run)
            self._start_round(index)
            return
        if run.moved is not None and self._rounds.needs and not (run.arrived and self._rounds.is_last(run)):
            self._leave_out(run, "merge", "its last round brought no statistics, which a rule needs")
        run.closed, run.arrived = True, {}
        self._merge_in_order()

    def _goes_on(self, run: TaskRun) -> bool:
        """Whether a task has another round; one that starts from the base ends with an idle one."""
        patience = MOST_IDLE if self.config.start == "merged" else 1
        return not self._rounds.is_last(run) and run.idle < patience

    def _leave_out(self, run: TaskRun, phase: str, reason: str) -> None:
        """Says what is wrong with a task, and forgets what it has moved unless the model has."""
        self._fail("", run.task, phase, reason)
        if not self._rounds.at_once:
            run.moved = None

    def _add_round(self, run: TaskRun) -> None:
        """What the sites of a round have learned, on top of the rounds before.

        Raises:
            StatisticsMissing: sites do not bring the same ones, or a layer moved before the last round alone.
        """
        step = self._rounds.combined(run)
        if self._rounds.at_once:
            step = step.in_memory()
        moved = step if run.moved is None else add_vectors(run.moved, step).in_memory()
        checked = step if self._rounds.at_once else moved
        check_needs(checked, self.base, self._rounds.asking(run), f"task {run.task!r}")
        run.note_taught()
        if self._rounds.at_once:
            self._take_in(run, step)
        run.moved = moved

    def _take_in(self, run: TaskRun, step: TaskVector) -> None:
        """Merges one round at once."""
        for model in self.models.values():
            version = model.merge(step, run.learned_by, step=True)
            run.seconds += version.absorb_seconds
        self.history.record(
            "round",
            task=run.task,
            round=run.round,
            sites=len(run.arrived),
            update_norm=version.update_norm,
            merged_norm=version.merged_norm,
            absorb_seconds=round(version.absorb_seconds, 4),
        )

    # --- versions ---

    def _merge_in_order(self) -> None:
        while self._next < len(self.runs) and self.runs[self._next].closed:
            run = self.runs[self._next]
            self._next += 1
            if run.moved is None:
                continue
            before = self._merge(run, run.moved)
            run.moved = None
            if before is not None:
                (model,) = self.models.values()
                self._correcting.start(run, model, len(self.merged), before, partial(self._corrected, run))
                return
            self._publish(run)
        if self.config.start == "merged":
            self._start_next()

    def _merge(self, run: TaskRun, vector: TaskVector) -> bytes | None:
        """Merges a task; returns the merged vector of before if sites are to correct the new one by it."""
        before = None
        if self.config.correction is not None and self.merged:
            before = to_bytes(next(iter(self.models.values())).merged())
        self.merged.append(run)
        for name, model in self.models.items():
            if self._rounds.at_once:
                version = model.current(vector, run.learned_by, run.seconds)
            else:
                version = model.merge(vector, run.learned_by, step=self.config.start == "merged")
            run.versions[name] = version
        return before

    def _corrected(self, run: TaskRun) -> None:
        self._publish(run)
        self._start_next()

    def _publish(self, run: TaskRun) -> None:
        number = len(self.merged)
        published = {}
        for name, model in self.models.items():
            version = run.versions[name]
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
            self._scoring.publish(number, published, self.sites.values())
        self._save()

    # --- standing ---

    @property
    def _layout(self) -> str:
        return layout_hash(self.config, self.models, self.base.fingerprint)

    def _save(self, run: TaskRun | None = None) -> None:
        """Writes down how far the run has come; ``run`` is the task under way, and its rounds count.

        Where updates are compressed they do not: within a task, sites remember what they have not sent.
        """
        if self._checkpoints is None:
            return
        if run is not None and (self.config.compress != "none" or not self._checkpoints.due(run.round - 1)):
            return
        unscored = self._scoring.unscored
        self._saved += 1
        standing = Standing.of(
            self._saved,
            self._layout,
            self.merged,
            self.runs[: self._next],
            run,
            self.scores,
            self.fine_tuned,
            unscored,
            self.history.events[self._first_event :],
        )
        moved = run.moved if run is not None else None
        self._checkpoints.write(standing, self.base.fingerprint, self.models, moved, unscored)

    def _go_on_from(self, standing: Standing) -> None:
        """Takes over what an earlier process had done."""
        assert self._checkpoints is not None
        moved = self._checkpoints.restore(standing, self.base.fingerprint, self.models)
        self.merged += standing.take_over(self.runs, moved, self.scores, self.fine_tuned)
        self._next, self._saved = len(standing.passed), standing.number
        self.history.events[self._first_event : self._first_event] = standing.events
        self.history.record("resumed", tasks=len(self.merged), round=standing.round)
        for version in standing.unscored:
            records = {
                name: wire.pack_vector(self._checkpoints.published(standing, version, name))
                for name in (self.models if version else ())
            }
            self._scoring.publish(version, records, self.sites.values())

    # --- messages ---

    def _send(self, node: int, kind: str, key: Any, content: Callable[[], RecordDict]) -> None:
        self._mailbox.put(Request(node, kind, key, content, self.config.timeout_seconds))

    def _note_sent(self, request: Request, content: RecordDict) -> None:
        self.history.record(
            "sent",
            site=self._roster.label(request.node),
            message=request.kind,
            bytes_down=wire.bytes_in(content),
        )

    def _fail(self, site: str, task: str, phase: str, reason: str) -> None:
        self.history.record("failed", site=site, task=task, phase=phase, reason=reason)
