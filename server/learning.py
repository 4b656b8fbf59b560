"""Updates in: every site is asked to learn what the service does not have from it, once.

A result arrives in one message or in ranges, goes into the inbox on disk and from there to the service. It
counts as learned when the service has acknowledged it. Whatever fails is asked for again, later each time;
the site then answers with the result it has kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial

from flwr.app import RecordDict

from fedmerge.common import wire
from fedmerge.common.errors import (
    AccessError,
    Busy,
    EngineError,
    FedmergeError,
    QuotaExceeded,
    StoreError,
    TooLarge,
    Unreachable,
)
from fedmerge.common.ranges import RangeFile, RangeManifest
from fedmerge.common.training import PLAIN, LocalTraining, SketchSpec
from fedmerge.common.wire import ShardJob, TrainJob
from fedmerge.server.backing import Backing
from fedmerge.server.history import History
from fedmerge.server.inbox import Arrived, Inbox
from fedmerge.server.mailbox import Mailbox, Reply, Request
from fedmerge.server.peers import WINDOW, Peer, ServingSettings, Tries, reported


@dataclass(frozen=True)
class Teaching:
    """What sites are asked of their learning.

    Attributes:
        needs: statistics that the service's rule needs. ``sketch``: how to sketch, where it needs sketches.
        training: options and settings of the training loop. ``compress``: how updates are made smaller.
        held: whether sites start from the version they hold, and not from the base.
    """

    needs: Collection[str] = ()
    sketch: SketchSpec | None = None
    training: LocalTraining = PLAIN
    compress: str = "none"
    held: bool = False


NOTHING_MORE = Teaching()


@dataclass(frozen=True)
class Taught:
    """What a train request was for."""

    site: str
    task: str


@dataclass(frozen=True)
class RangeAsked:
    """What a range was asked for."""

    site: str
    task: str
    index: int


@dataclass
class _Download:
    """A vector that arrives in ranges.

    ``under_way``: messages still out. ``moved``: whether any brought something. ``gone``: the site has left.
    """

    file: RangeFile
    under_way: int
    moved: bool = False
    gone: bool = False


@dataclass
class Verdicts:
    """What a site has yet to be told of its results, by their hashes."""

    acknowledged: set[str] = field(default_factory=set)
    refused: dict[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.acknowledged or self.refused)


class Learning:
    """Asks sites to learn, and hands in what they send.

    Args:
        base: fingerprint of the pretrained model.
        on_verdict: called with a site's name when there is something to tell it.
        teaching: what sites are asked of their learning.

    Attributes:
        verdicts: by site's name, only where there are any.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        backing: Backing,
        inbox: Inbox,
        settings: ServingSettings,
        history: History,
        base: str,
        clock: Callable[[], float],
        on_verdict: Callable[[str], None],
        teaching: Teaching = NOTHING_MORE,
    ) -> None:
        self._mailbox, self._backing, self._inbox = mailbox, backing, inbox
        self._settings, self._history, self._base, self._clock = settings, history, base, clock
        self._on_verdict, self._teaching = on_verdict, teaching
        self._tries: dict[tuple[str, str], Tries] = {}
        self._handing_in: dict[tuple[str, str], Tries] = {}
        self._downloads: dict[tuple[str, str], _Download] = {}
        self.verdicts: dict[str, Verdicts] = {}

    @property
    def arriving(self) -> int:
        """Vectors that are arriving in ranges."""
        return len(self._downloads)

    def teach(self, peer: Peer) -> bool:
        """Asks a site for the first task that the service does not have from it, if there is one."""
        if self._backing.current is None:
            return False  # it is not known yet what the service has
        now = self._clock()
        for task in peer.tasks:
            tries = self._tries.get((peer.site, task), Tries(0.0))
            if self._is_here(peer.site, task):
                continue
            if tries.count < self._settings.attempts and now >= tries.at:
                self._ask_to_train(peer, task)
                return True
        return False

    def _is_here(self, site: str, task: str) -> bool:
        """Whether a task need not be asked for: the service has it, or it has arrived, or is arriving."""
        known = self._backing.has(site, task) or (site, task) in self._downloads
        return known or self._inbox.holds(site, task)

    def _ask_to_train(self, peer: Peer, task: str) -> None:
        teaching = self._teaching
        job = TrainJob(
            task,
            self._base,
            seed=self._settings.seed,
            keep=True,
            message_bytes=self._settings.max_message_bytes,
            range_bytes=self._settings.range_bytes,
            needs=tuple(sorted(teaching.needs)),
            sketch="" if teaching.sketch is None else teaching.sketch.model_dump_json(),
            training=teaching.training.model_dump_json(exclude_none=True),
            compress=teaching.compress,
            held=teaching.held,
        )
        content = RecordDict({wire.JOB: wire.pack_job(job)})
        peer.published_last = False
        self._mailbox.put(
            Request(
                peer.node,
                wire.TRAIN,
                Taught(peer.site, task),
                lambda: content,
                self._settings.timeout_seconds,
                late=self._settings.late_seconds,
                bulky=True,
            )
        )

    def take_result(self, reply: Reply, key: Taught) -> None:
        if reply.content is None:
            self._fail(key.site, key.task, "train", reply.reason)
            self._try_later(key.site, key.task, gone=reply.gone)
            return
        if self._is_here(key.site, key.task):
            return  # an answer to an earlier request
        where = f"update of {key.site}"
        try:
            if wire.MANIFEST in reply.content:
                self._download(reply.request.node, key, self._manifest(reply.content, where))
            else:
                data = wire.vector_bytes(reply.content, wire.VECTOR, where=where)
                self._inbox.take(key.site, key.task, data)
        except FedmergeError as error:
            self._fail(key.site, key.task, "refused", str(error))
            self._try_later(key.site, key.task)
            return
        metrics: Mapping[str, object] = reply.content.metric_records.get(wire.METRICS, {})
        self._history.record(
            "trained",
            site=key.site,
            task=key.task,
            examples=reported(metrics.get("num-examples")),
            bytes_up=wire.bytes_in(reply.content),
            seconds=round(reply.seconds, 3),
            train_seconds=reported(metrics.get("train-seconds")),
            score_seconds=reported(metrics.get("score-seconds")),
            loss=reported(metrics.get("train-loss")),
        )

    def _manifest(self, content: RecordDict, where: str) -> RangeManifest:
        manifest = wire.unpack_job(RangeManifest, content, where=where, key=wire.MANIFEST)
        if manifest.size > self._settings.max_update_bytes:
            raise TooLarge(
                "an update that is too large",
                where=where,
                got=f"{manifest.size} bytes",
                wanted=f"at most {self._settings.max_update_bytes}",
            )
        return manifest

    def _download(self, node: int, key: Taught, manifest: RangeManifest) -> None:
        """Asks for the ranges that are not here yet."""
        file = self._inbox.receive(key.site, key.task, manifest)
        missing = file.missing
        self._downloads[key.site, key.task] = _Download(file, len(missing))
        for index in missing:
            job = ShardJob(manifest.sha256, index)
            self._mailbox.put(
                Request(
                    node,
                    wire.GET_SHARD,
                    RangeAsked(key.site, key.task, index),
                    partial(_job_content, job),
                    self._settings.range_seconds,
                    window=WINDOW,
                    bulky=True,
                )
            )
        if not missing:
            self._finish_download(key.site, key.task)

    def take_range(self, reply: Reply, key: RangeAsked) -> None:
        download = self._downloads[key.site, key.task]
        download.under_way -= 1
        download.gone |= reply.gone
        try:
            if reply.content is None:
                raise Unreachable("a range did not come", where=f"range {key.index}", got=reply.reason)
            data = wire.vector_bytes(reply.content, wire.RANGE, where=f"update of {key.site}")
            download.file.write(key.index, data)
            download.moved = True
        except FedmergeError as error:
            if not reply.gone:
                self._fail(key.site, key.task, "transfer", str(error))
        if not download.under_way:
            self._finish_download(key.site, key.task)

    def _finish_download(self, site: str, task: str) -> None:
        """Completes a vector, or has it asked for again: the site then answers with the same manifest."""
        download = self._downloads.pop((site, task))
        if download.moved:
            self._tries.pop((site, task), None)
        if download.file.missing:
            self._try_later(site, task, gone=download.gone)
            return
        try:
            self._inbox.finish(site, task, download.file)
        except FedmergeError as error:
            self._fail(site, task, "transfer", str(error))
            self._try_later(site, task)
            return
        self._history.record("received", site=site, task=task, bytes_up=download.file.manifest.size)

    def _try_later(self, site: str, task: str, *, gone: bool = False) -> None:
        tries = self._tries.setdefault((site, task), Tries(self._settings.retry_seconds))
        if gone:
            tries.gone(self._clock())
            return
        tries.failed(self._clock())
        if tries.count == self._settings.attempts:
            self._fail(site, task, "given up", f"{tries.count} attempts")

    def hand_in(self) -> bool:
        """Submits one vector of those that wait in the inbox; returns whether there was one."""
        now = self._clock()
        for item in self._inbox.waiting():
            if not self._backing.away and now >= self._handing_in_tries(item).at:
                self._submit(item)
                return True
        return False

    def _submit(self, item: Arrived) -> None:
        try:
            receipt = self._backing.service.submit(self._inbox.path(item.site, item.task), site=item.site)
        except (Unreachable, StoreError) as error:
            self._backing.failed(error)
            return
        except (Busy, QuotaExceeded, AccessError, EngineError) as error:
            self._fail(item.site, item.task, "submit", str(error))
            self._handing_in_tries(item).failed(self._clock(), getattr(error, "retry_after", None))
            return
        except FedmergeError as error:
            self._refused(item, error)
            return
        self._history.record(
            "acknowledged",
            site=item.site,
            task=item.task,
            update=receipt.update,
            state=str(receipt.state),
            again=receipt.again,
        )
        self._done(item)
        self._tries.pop((item.site, item.task), None)
        self._verdict(item.site).acknowledged.add(item.sha256)
        self._check_task(item)

    def _handing_in_tries(self, item: Arrived) -> Tries:
        return self._handing_in.setdefault((item.site, item.task), Tries(self._settings.retry_seconds))

    def _check_task(self, item: Arrived) -> None:
        """The ledger says whether it was the task that was asked for."""
        self._backing.look()
        if not self._backing.away and not self._backing.has(item.site, item.task):
            self._fail(item.site, item.task, "refused", "the site sent a vector for another task")
            self._try_later(item.site, item.task)

    def _refused(self, item: Arrived, error: FedmergeError) -> None:
        self._fail(item.site, item.task, "refused", str(error))
        self._done(item)
        self._verdict(item.site).refused[item.sha256] = str(error)
        self._try_later(item.site, item.task)

    def _done(self, item: Arrived) -> None:
        self._inbox.remove(item)
        self._handing_in.pop((item.site, item.task), None)

    def _verdict(self, site: str) -> Verdicts:
        """What a site is to be told, now that there is something."""
        self._on_verdict(site)
        return self.verdicts.setdefault(site, Verdicts())

    def told(self, site: str, acknowledged: Collection[str], refused: Collection[str]) -> None:
        """A site has been told these."""
        verdicts = self.verdicts.get(site, Verdicts())
        verdicts.acknowledged -= set(acknowledged)
        for found in refused:
            verdicts.refused.pop(found, None)
        if not verdicts:
            self.verdicts.pop(site, None)

    def acknowledge_again(self, site: str, waiting: Collection[str]) -> None:
        """A site may have missed what became of its results, or another server took them in."""
        for found in waiting:
            if self._backing.has_update(site, found):
                self._verdict(site).acknowledged.add(found)

    def _fail(self, site: str, task: str, phase: str, reason: str) -> None:
        self._history.record("failed", site=site, task=task, phase=phase, reason=reason)


def _job_content(job: ShardJob) -> RecordDict:
    return RecordDict({wire.JOB: wire.pack_job(job)})
