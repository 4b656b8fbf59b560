"""Versions out: every site gets the current one, whole or in ranges, and may score it.

A large version is offered by its manifest; the site answers with the ranges it lacks, these are sent, and
the version is offered again, until nothing is missing. A version on its way is finished before a newer one
is begun, so that a site on a slow line gets some version however fast they come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import RecordDict

from fedmerge.common import wire
from fedmerge.common.errors import FedmergeError, MismatchError, StateError, Unreachable
from fedmerge.common.ranges import RangeManifest, read_file
from fedmerge.common.records import VersionRecord
from fedmerge.common.wire import Holding, PublishJob, ShardJob
from fedmerge.server.backing import Backing, model_of
from fedmerge.server.history import History
from fedmerge.server.mailbox import Mailbox, Reply, Request
from fedmerge.server.peers import WINDOW, Peer, ServingSettings, reported


@dataclass(frozen=True)
class Offered:
    """What a publish request was for."""

    version: int


@dataclass(frozen=True)
class RangeSent:
    """What a range was sent for."""

    index: int


@dataclass
class _Offer:
    """A version as it is sent. ``manifest``: where it is too large for one message."""

    record: VersionRecord
    path: Path
    manifest: RangeManifest | None


class Publishing:
    """Sends versions to sites.

    Args:
        folder: for versions on their way out; whatever is in it is removed.
        base: fingerprint of the pretrained model. ``tangent``: whether sites train its linearisation there.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        backing: Backing,
        settings: ServingSettings,
        history: History,
        folder: Path,
        base: str,
        clock: Callable[[], float],
        tangent: bool = False,
    ) -> None:
        self._mailbox, self._backing, self._settings, self._history = mailbox, backing, settings, history
        self._folder, self._base, self._clock, self._tangent = folder, base, clock, tangent
        self._offers: dict[int, _Offer] = {}
        self._not_offered: tuple[int, str] = (0, "")
        for leftover in folder.glob("*"):
            leftover.unlink()

    def offer(self, peer: Peer) -> bool:
        """Sends a site the version on its way to it, or else the current one, unless it has it."""
        if self._clock() < peer.publishing.at:
            return False
        offer = self._offers[peer.offer] if peer.offer is not None else self._current_offer(peer)
        if offer is None:
            return False
        tasks = peer.tasks if self._settings.evaluate else ()
        record = offer.record
        dtype, seed = self._settings.dtype, self._settings.seed
        job = PublishJob(record.number, record.sha256, self._base, dtype, tasks, seed, self._tangent)
        peer.offer, peer.published_last = record.number, True
        self._mailbox.put(
            Request(
                peer.node,
                wire.PUBLISH,
                Offered(record.number),
                partial(_publish_content, job, offer),
                self._settings.timeout_seconds,
            )
        )
        return True

    def _current_offer(self, peer: Peer) -> _Offer | None:
        """The current version ready to be sent; None if the site has it or there is nothing to send."""
        current = self._backing.current
        if current is None or current.number == 0 or model_of(current) in (peer.holds, self._not_offered):
            return None
        offer = self._offers.get(current.number)
        if offer is not None and model_of(offer.record) == model_of(current):
            return offer
        if self._backing.away:
            return None
        path = self._folder / f"{current.number}-{current.sha256[:12]}-{self._settings.dtype}.safetensors"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._backing.service.fetch(path, current.number, self._settings.dtype)
            large = path.stat().st_size > self._settings.max_message_bytes
            manifest = RangeManifest.of(path, self._settings.range_bytes) if large else None
        except StateError as error:
            self._history.record("failed", site="", task="", phase="fetch", reason=str(error))
            self._not_offered = model_of(current)
            return None
        except FedmergeError as error:
            self._backing.failed(error)
            return None
        self._offers[current.number] = _Offer(current, path, manifest)
        return self._offers[current.number]

    def take(self, peer: Peer, reply: Reply, key: Offered) -> None:
        """A site's answer to a version: it holds it now, lacks ranges of it, or could not take it."""
        offer = self._offers.get(key.version)
        try:
            if reply.content is None:
                raise Unreachable("not taken", where=peer.site, got=reply.reason)
            holding = wire.unpack_job(Holding, reply.content, where=peer.site)
            if holding.missing and offer is not None:
                self._send_ranges(peer, offer, holding.missing)
                return
        except FedmergeError as error:
            peer.offer = None
            self._failed(peer, reply, str(error))
            return
        peer.holds, peer.offer = (holding.holds, holding.model), None
        peer.publishing.worked()
        self._history.record("published", site=peer.site, version=holding.holds)
        self._take_scores(peer, reply, holding.holds)

    def _send_ranges(self, peer: Peer, offer: _Offer, missing: tuple[int, ...]) -> None:
        manifest = offer.manifest
        if manifest is None or not set(missing) <= set(range(len(manifest.hashes))):
            raise MismatchError("asks for ranges that there are not", where=peer.site)
        for index in missing:
            self._mailbox.put(
                Request(
                    peer.node,
                    wire.PUT_SHARD,
                    RangeSent(index),
                    partial(_range_content, offer.path, manifest, index),
                    self._settings.range_seconds,
                    window=WINDOW,
                )
            )

    def take_range(self, peer: Peer, reply: Reply, key: RangeSent) -> None:
        """When all have been answered the version is offered again; the site says whether any is missing."""
        if reply.content is None:
            self._failed(peer, reply, f"range {key.index}: {reply.reason}")

    def _failed(self, peer: Peer, reply: Reply, reason: str) -> None:
        if not reply.gone:
            self._history.record("failed", site=peer.site, task="", phase="publish", reason=reason)
        if self._clock() >= peer.publishing.at:  # many ranges may fail at once: that is one failure
            peer.publishing.failed(self._clock())

    def _take_scores(self, peer: Peer, reply: Reply, version: int) -> None:
        assert reply.content is not None
        found = wire.unpack_scores(reply.content, [wire.PUBLISHED], peer.tasks)
        if not found:
            return
        metrics: Mapping[str, object] = reply.content.metric_records.get(wire.METRICS, {})
        self._history.record(
            "evaluated",
            site=peer.site,
            version=version,
            scores=len(found),
            accuracy={task: score.accuracy for (_, task), score in found.items()},
            examples={task: score.examples for (_, task), score in found.items()},
            seconds=round(reply.seconds, 3),
            score_seconds=reported(metrics.get("score-seconds")),
        )

    def tidy(self, peers: Collection[Peer]) -> None:
        """Removes the files of versions that are neither current nor on their way to anybody."""
        wanted = {peer.offer for peer in peers}
        if self._backing.current is not None:
            wanted.add(self._backing.current.number)
        for number in set(self._offers) - wanted:
            self._offers.pop(number).path.unlink(missing_ok=True)


def _publish_content(job: PublishJob, offer: _Offer) -> RecordDict:
    content = RecordDict({wire.JOB: wire.pack_job(job)})
    if offer.manifest is not None:
        content[wire.MANIFEST] = wire.pack_job(offer.manifest)
    else:
        content[wire.VECTOR] = wire.pack_vector(read_file(offer.path))
    return content


def _range_content(path: Path, manifest: RangeManifest, index: int) -> RecordDict:
    job = ShardJob(manifest.sha256, index)
    return RecordDict(
        {wire.JOB: wire.pack_job(job), wire.RANGE: wire.pack_vector(manifest.read(path, index))}
    )
