"""Versions out to the sites that hold test data, accuracies in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ArrayRecord, RecordDict

from fedmerge.common import wire
from fedmerge.common.score import Score, pooled
from fedmerge.common.wire import EvaluateJob
from fedmerge.server.history import History
from fedmerge.server.layout import FederationConfig, Site, TaskRun
from fedmerge.server.mailbox import Mailbox, Reply, Request
from fedmerge.server.peers import reported


@dataclass(frozen=True)
class Scored:
    """What an evaluate request was for."""

    version: int


class Scoring:
    """Has versions scored on every task, by the sites that hold it.

    Args:
        runs: the tasks and their sites; ``merged``: those in the versions, in order. Both lists may grow.
        on_failure: called with a site's label, a task, a phase and a reason.

    Attributes:
        scores: what sites have found, by rule, version and task.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        base: str,
        config: FederationConfig,
        history: History,
        runs: Sequence[TaskRun],
        merged: Sequence[TaskRun],
        on_failure: Callable[[str, str, str, str], None],
    ) -> None:
        self._mailbox, self._base, self._config, self._history = mailbox, base, config, history
        self._runs, self._merged, self._on_failure = runs, merged, on_failure
        self._published: dict[int, Mapping[str, ArrayRecord]] = {}
        self._unscored: dict[int, int] = {}
        self.scores: dict[tuple[str, int, str], list[Score]] = {}

    @property
    def unscored(self) -> dict[int, dict[str, bytes]]:
        """The merged vectors of the versions that some site has not scored yet, by number and rule."""
        return {
            version: {rule: record["bytes"].data for rule, record in merged.items()}
            for version, merged in self._published.items()
        }

    def score(self, rule: str, version: int, task: str) -> Score | None:
        """The accuracy of a version on a task over all sites that scored it, weighted by examples."""
        return pooled(self.scores.get((rule, version, task), []))

    def publish(self, number: int, merged: Mapping[str, ArrayRecord], sites: Iterable[Site]) -> None:
        """Sends a version to those sites that hold test data of some task.

        Args:
            merged: the merged vector of each rule; empty for the base.
        """
        self._published[number] = merged
        for site in sites:
            held = [
                (name, run.part_of(site.node), len(run.sites))
                for run in self._runs
                if site in run.sites
                for name in run.names
            ]
            if not held:
                continue
            tasks, part, parts = zip(*held, strict=True)
            self._unscored[number] = self._unscored.get(number, 0) + 1
            self._send(site, number, tasks, part, parts)

    def _send(
        self, site: Site, number: int, tasks: tuple[str, ...], part: tuple[int, ...], parts: tuple[int, ...]
    ) -> None:
        config = self._config
        tangent = config.training.tangent is not None and number > 0
        known = {name for run in self._merged[:number] for name in run.names}
        job = EvaluateJob(
            number,
            self._base,
            config.seed,
            tasks,
            part,
            parts,
            config.partition,
            tangent,
            learning="+".join(self._published[number]),
            learned=tuple(name for name in tasks if name in known),
        )

        def content() -> RecordDict:
            merged = {wire.MERGED + rule: record for rule, record in self._published[number].items()}
            return RecordDict({wire.JOB: wire.pack_job(job), **merged})

        request = Request(site.node, wire.EVALUATE, Scored(number), content, config.timeout_seconds)
        self._mailbox.put(request, first=True)

    def take(self, reply: Reply, version: int, label: str) -> None:
        """Files a site's accuracies of a version."""
        rules = list(self._published[version]) or ["base"]
        self._unscored[version] -= 1
        if not self._unscored[version]:
            del self._published[version], self._unscored[version]
        if reply.content is None:
            self._on_failure(label, "", "evaluate", reply.reason)
            return
        node = reply.request.node
        held = [
            name for run in self._runs if any(site.node == node for site in run.sites) for name in run.names
        ]
        found = wire.unpack_scores(reply.content, rules, held)
        for (rule, task), score in found.items():
            self.scores.setdefault((rule, version, task), []).append(score)
        metrics: Mapping[str, object] = reply.content.metric_records.get(wire.METRICS, {})
        self._history.record(
            "evaluated",
            site=label,
            version=version,
            scores=len(found),
            seconds=round(reply.seconds, 3),
            score_seconds=reported(metrics.get("score-seconds")),
        )
