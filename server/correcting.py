"""Corrections: after a merge the sites that taught a task fit one projection of the new model, and what they
find moves the model (arXiv 2509.23592)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from flwr.app import RecordDict

from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.errors import FedmergeError
from fedmerge.common.vectorfile import to_bytes
from fedmerge.common.wire import CorrectJob
from fedmerge.server.admission import BaseNorms, Limits, admit, weight
from fedmerge.server.combine import combine
from fedmerge.server.history import History
from fedmerge.server.layout import FederationConfig, TaskRun
from fedmerge.server.mailbox import Mailbox, Reply, Request
from fedmerge.server.model import GlobalModel
from fedmerge.server.peers import reported
from fedmerge.server.rounds import content_of


@dataclass(frozen=True)
class Corrected:
    """What a correction request was for: the site's label."""

    label: str


@dataclass
class _UnderWay:
    run: TaskRun
    model: GlobalModel
    version: int
    done: Callable[[], None]


class Correcting:
    """Has one version at a time corrected.

    Args:
        on_failure: called with a site's label, a task, a phase and a reason.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        base: Base,
        norms: BaseNorms,
        limits: Limits,
        config: FederationConfig,
        history: History,
        on_failure: Callable[[str, str, str, str], None],
    ) -> None:
        self._mailbox, self._base, self._norms, self._limits = mailbox, base, norms, limits
        self._config, self._history, self._on_failure = config, history, on_failure
        self._under_way: _UnderWay | None = None

    @property
    def busy(self) -> bool:
        """Whether answers are awaited."""
        return self._under_way is not None

    def start(
        self, run: TaskRun, model: GlobalModel, version: int, before: bytes, done: Callable[[], None]
    ) -> None:
        """Asks the sites that taught a task; ``done`` is called once the model has been moved.

        Args:
            version: the number of the model. ``before``: the merged vector of the one before it.
        """
        assert self._config.correction is not None
        self._under_way = _UnderWay(run, model, version, done)
        records = {
            wire.MERGED: wire.pack_vector(to_bytes(model.merged())),
            wire.PREVIOUS: wire.pack_vector(before),
        }
        run.asked = [site for site in run.sites if site.node in run.taught]
        run.waiting, run.arrived = {site.node for site in run.asked}, {}
        for site in run.asked:
            job = CorrectJob(
                run.task,
                self._base.fingerprint,
                version,
                self._config.seed,
                run.part_of(site.node),
                len(run.sites),
                self._config.partition,
                self._config.correction.model_dump_json(),
                self._config.training.model_dump_json(exclude_none=True),
            )
            self._mailbox.put(
                Request(
                    site.node,
                    wire.CORRECT,
                    Corrected(site.label),
                    partial(content_of, job, records),
                    self._config.timeout_seconds,
                )
            )

    def take(self, reply: Reply, key: Corrected) -> None:
        """One site's answer; the last of them moves the model."""
        at = self._under_way
        assert at is not None
        at.run.waiting.discard(reply.request.node)
        if reply.content is None:
            self._on_failure(key.label, at.run.task, "correct", reply.reason)
        else:
            try:
                self._admit(at, reply.request.node, key.label, reply.content)
            except FedmergeError as error:
                self._on_failure(key.label, at.run.task, "refused", str(error))
        if not at.run.waiting:
            self._under_way = None
            self._adjust(at)
            at.done()

    def _admit(self, at: _UnderWay, node: int, label: str, content: RecordDict) -> None:
        where = f"correction of {label}"
        vector = wire.unpack_vector(content, wire.VECTOR, where=where)
        admit(vector, self._base, self._norms, self._limits, task=at.run.task, origin=at.version)
        metrics: Mapping[str, object] = content.metric_records.get(wire.METRICS, {})
        examples = weight(metrics.get("num-examples"), where=where, cap=self._config.max_examples)
        at.run.arrived[node] = vector, examples
        self._history.record(
            "corrected",
            site=label,
            task=at.run.task,
            bytes_up=wire.bytes_in(content),
            loss_before=reported(metrics.get("loss-before")),
            loss_after=reported(metrics.get("loss-after")),
            epsilon=reported(metrics.get("epsilon")),
        )

    def _adjust(self, at: _UnderWay) -> None:
        """Moves the model by the mean of what the sites have found, weighted like their vectors."""
        vectors, shares, _ = at.run.gathered(self._config.weights)
        at.run.arrived = {}
        if vectors:
            at.model.adjust(combine(vectors, shares))
