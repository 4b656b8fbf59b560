"""The aggregator: takes updates in, merges them one by one, keeps every version on disk.

    admit -> stage -> acknowledge -> merge -> commit -> publish

Submissions come from any thread. An update is acknowledged once its bytes and its row in the ledger are
on disk. One worker thread owns the engine and takes staged updates in the order of acknowledgement: it
absorbs, writes the merged vector as it will be, commits the version in one transaction, and only then
makes it the engine's. So whatever is killed, the ledger is the truth and the engine follows it.

It knows nothing of transport: the gRPC service and the Flower ServerApp are two faces of it.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Condition, Lock, Thread
from types import TracebackType
from typing import Self

import torch
from pydantic import BaseModel, ConfigDict

from fedmerge import __version__
from fedmerge.common import vectorfile
from fedmerge.common.base import Base
from fedmerge.common.errors import (
    Busy,
    Duplicate,
    EngineError,
    FactorisationFailed,
    FedmergeError,
    FileError,
    MismatchError,
    NormExceeded,
    NotFound,
    NotKept,
    StateError,
    StoreDamaged,
    StoreError,
    StoreFull,
)
from fedmerge.common.records import (
    Dtype,
    Receipt,
    Refusal,
    Status,
    UpdateRecord,
    UpdateState,
    VersionKind,
    VersionRecord,
    update_id,
)
from fedmerge.common.taskvector import Dense, LayerUpdate, Manifest
from fedmerge.common.writing import replacing
from fedmerge.server import snapshot
from fedmerge.server.admission import (
    Admitted,
    BaseNorms,
    Limits,
    admit_update,
    check_held,
    check_queue,
    check_quota,
    check_site_name,
    check_size,
    check_step,
    needs_approval,
)
from fedmerge.server.audit import Audit, Fact
from fedmerge.server.engine.engine import Engine
from fedmerge.server.merge.rule import Totals
from fedmerge.server.metrics import Metrics
from fedmerge.server.replay import Replay
from fedmerge.server.retention import Retention, expired_versions, replay_floor
from fedmerge.server.store.blobs import Blob, Blobs, Incoming
from fedmerge.server.store.disk import Disk
from fedmerge.server.store.ledger import Identity, Ledger
from fedmerge.server.store.lock import hold

logger = logging.getLogger("fedmerge.server")

CHUNK_BYTES = 2**20

VERIFY_SECONDS = 3600.0
"""How long a file that was found intact is taken to be so."""

LONGEST_PAUSE = 60.0
"""Seconds between two attempts while merging stands still."""

DAY = 86_400.0

AUDIT = "audit.jsonl"


class AggregatorSettings(BaseModel):
    """What a server lets in and what it keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limits: Limits = Limits()
    retention: Retention = Retention()


@dataclass(frozen=True)
class Published:
    """A version's merged vector as a file that stays while it is open; ``sha256`` of the file."""

    record: VersionRecord
    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class _Act:
    """Something an admin asked for, done by the worker between two merges."""

    run: Callable[[], VersionRecord]
    done: Future[VersionRecord]


class Aggregator:
    """A server's state folder, its engine and its worker. Implements ``records.AggregationService``.

    Use :meth:`open`. Every public method may be called from any thread.
    """

    def __init__(
        self,
        base: Base,
        engine: Engine,
        make_engine: Callable[[], Engine],
        settings: AggregatorSettings,
        ledger: Ledger,
        blobs: Blobs,
        audit: Audit,
        metrics: Metrics,
        clock: Callable[[], float],
        resources: ExitStack,
    ) -> None:
        self.base, self.settings, self.metrics = base, settings, metrics
        self._rule, self._fingerprint = engine.rule, base.fingerprint
        self._engine, self._make_engine = engine, make_engine
        self._ledger, self._blobs, self._audit, self._clock = ledger, blobs, audit, clock
        self._resources = resources
        self._norms = BaseNorms.of(base)
        self._replay = Replay(self._fingerprint, ledger, blobs)
        self._behind = True
        """Whether the engine is not at the ledger's current version."""
        self._started = clock()
        self._failing = ""
        self._pause = 0.0
        self._closing = self._working = False
        self._acts: deque[_Act] = deque()
        self._changed = Condition()
        self._files = Lock()
        self._rounding = Lock()
        self._rounded_hashes: dict[str, Blob] = {}
        self._open_files: Counter[str] = Counter()
        self._intact: dict[str, float] = {}
        self._worker = Thread(target=self._work, name="aggregator", daemon=True)

    @classmethod
    def open(
        cls,
        folder: Path,
        base: Base,
        make_engine: Callable[[], Engine],
        settings: AggregatorSettings | None = None,
        *,
        metrics: Metrics | None = None,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
        on_merge: Callable[[VersionRecord], None] = lambda _: None,
    ) -> Aggregator:
        """Opens a state folder, or makes one, and goes on where it was left.

        What an interrupted run left unfinished is removed, the current version's file is verified, and
        the engine is rebuilt from the last snapshot and the vectors since.

        Args:
            make_engine: an engine that has merged nothing; called again when the engine is beyond repair.
            on_merge: called with every version that is replayed; for progress bars.

        Raises:
            StoreLocked: another server uses the folder.
            ConfigError: it belongs to another base or rule. StoreDamaged, StoreFull, NotKept, EngineError.
        """
        settings = settings or AggregatorSettings()
        with ExitStack() as stack:
            stack.enter_context(hold(folder))
            disk = disk or Disk()
            blobs = Blobs(folder, disk)
            engine = make_engine()
            stack.callback(engine.close)
            rule = engine.rule
            identity = Identity(base.fingerprint, rule.name, rule.model_dump(mode="json"))
            ledger = Ledger(folder, identity, disk)
            stack.callback(ledger.close)
            audit = Audit(folder / AUDIT)
            stack.callback(audit.close)
            stray = blobs.sweep(ledger.names)
            opened = cls(
                base,
                engine,
                make_engine,
                settings,
                ledger,
                blobs,
                audit,
                metrics or Metrics(),
                clock,
                stack.pop_all(),
            )
            with ExitStack() as on_error:
                on_error.callback(opened._resources.close)
                opened._recover(len(stray), on_merge)
                on_error.pop_all()
        opened._worker.start()
        return opened

    def close(self) -> None:
        """Ends the worker after the merge it is in, and lets go of the folder. Closing twice is harmless."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._worker.is_alive():
            self._worker.join()
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Updates

    def submit(self, source: Path, *, site: str) -> Receipt:
        """Hands in a task vector file; when this returns, the update survives a crash.

        Raises:
            FedmergeError: it was refused; nothing has changed but the record of refusals.
        """
        blob = _hashed(source)
        with self.receive(site, size=blob.size, sha256=blob.sha256) as upload:
            if upload.known is not None:
                return upload.known
            with source.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    upload.write(chunk)
            return upload.finish()

    @contextmanager
    def receive(self, site: str, *, size: int, sha256: str) -> Iterator[Upload]:
        """Takes an update in piece by piece; what is not finished when the block ends leaves no trace.

        Args:
            size, sha256: of the whole file, as the site announces them.

        Raises:
            TooLarge, QuotaExceeded, Busy: before any byte. StoreFull.
        """
        check_site_name(site)
        known = self._known(site, sha256)
        if known is not None:
            yield Upload(self, site, size, sha256, known, None)
            return
        with self._refusing(site, size, sha256):
            check_size(size, self.settings.limits, where=f"update of {site}")
            self._check_room(site, size)
        with self._blobs.receive(size) as incoming, self.metrics.upload():
            yield Upload(self, site, size, sha256, None, incoming)

    def update(self, update: str) -> UpdateRecord:
        """One acknowledged update. Raises NotFound."""
        found = self._ledger.update(update)
        if found is None:
            raise NotFound("no such update", got=repr(update))
        return found

    def updates(self, after: int = 0, limit: int = 100) -> list[UpdateRecord]:
        """Acknowledged updates with a ``seq`` above ``after``, in order."""
        return self._ledger.updates(after, limit)

    def refusals(self, limit: int = 100) -> list[Refusal]:
        """The latest refusals, newest first."""
        return self._ledger.refusals(limit)

    def approve(self, update: str, *, by: str) -> Receipt:
        """Lets a held update in, however far it moves the model. Raises NotFound, StateError."""
        self._ledger.set_state(update, UpdateState.STAGED, f"approved by {by}", expect=UpdateState.HELD)
        self._ledger.add_act(self._clock(), by, "approve", update)
        self._note("approved", by, update=update)
        self._notify()
        return Receipt(update, UpdateState.STAGED, again=True)

    def reject(self, update: str, *, by: str, reason: str = "") -> None:
        """Turns a held update away, or a staged one that has not been merged. Raises NotFound, StateError."""
        found = self.update(update)
        if found.state not in (UpdateState.HELD, UpdateState.STAGED):
            raise StateError("it does not wait any more", where=f"update {update}", got=found.state)
        self._ledger.set_state(update, UpdateState.REJECTED, reason, expect=found.state)
        self._ledger.add_act(self._clock(), by, "reject", update)
        self._note("rejected", by, update=update, reason=reason)
        self._forget(found)

    # Versions

    def status(self) -> Status:
        """The server at a glance."""
        current = self._ledger.current()
        return Status(
            fedmerge=__version__,
            base=self._fingerprint,
            rule=self._rule.name,
            options=self._rule.model_dump(mode="json"),
            version=current.number,
            tasks=tuple(dict.fromkeys(u.task for u in self._replay.contributions(current.number))),
            staged=self._ledger.count(UpdateState.STAGED),
            held=self._ledger.count(UpdateState.HELD),
            merged=current.merges,
            refused=self._ledger.refusal_counts(),
            failing=self._failing,
            disk=self._blobs.total_bytes(),
            started=self._started,
        )

    def version(self, number: int | None = None) -> VersionRecord:
        """One version, the current one by default. Raises NotFound."""
        found = self._ledger.current() if number is None else self._ledger.version(number)
        if found is None:
            raise NotFound("no such version", got=number, wanted=f"at most {self._ledger.current().number}")
        return found

    def versions(self, after: int = 0, limit: int = 100) -> list[VersionRecord]:
        """Versions above ``after``, in order."""
        return self._ledger.versions(after, limit)

    @contextmanager
    def open_version(self, version: int | None = None, dtype: Dtype = "f32") -> Iterator[Published]:
        """A version's merged vector as a verified file, which stays until the block ends.

        While the current version's file is damaged, the newest intact one before it is served instead.

        Raises:
            NotFound: version 0, or one that never was. NotKept: dropped by retention.
            StoreDamaged: its file is damaged; names it.
        """
        record = self._servable(version)
        with self._keeping(record.sha256):
            self._require_kept(self.version(record.number))
            if dtype == "bf16":
                yield self._rounded(record)
            else:
                yield Published(record, self._blobs.path(record.sha256), record.size, record.sha256)

    def fetch(self, into: Path, version: int | None = None, dtype: Dtype = "f32") -> VersionRecord:
        """Writes a version's merged vector as a task vector file. Errors as :meth:`open_version`."""
        with (
            self.open_version(version, dtype) as published,
            published.path.open("rb") as source,
            replacing(into) as target,
        ):
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
        return published.record

    def roll_back(self, version: int, *, by: str) -> VersionRecord:
        """Serves an earlier version again, as a new version; 0 is the base.

        Raises:
            NotFound: no such version. NotKept: dropped by retention.
        """
        return self._ask(partial(self._roll_back, version, by))

    def remove(self, task: str, *, by: str) -> VersionRecord:
        """Takes a task out of the current model, as a new version.

        Rules that are order-free subtract its vectors; others go back to the version before the task and
        merge everything since again, without it.

        Raises:
            NotFound: the current model has no such task. NotKept: a vector it takes was not kept.
        """
        return self._ask(partial(self._remove, task, by))

    def watch(self, after: int) -> Iterator[VersionRecord]:
        """The current version once it is above ``after``, and every newer one as it comes.

        Versions in between may be passed over. Ends when the aggregator is closed.
        """
        while True:
            found = self.newer_than(after, timeout=None)
            if found is None:
                return
            yield found
            after = found.number

    def newer_than(self, after: int, timeout: float | None) -> VersionRecord | None:
        """Waits at most ``timeout`` seconds for a version above ``after``; None if there is none by then."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._ledger.current().number > after, timeout=timeout
            )
            if self._closing:
                return None
            current = self._ledger.current()
        return current if current.number > after else None

    def wait_until_merged(self, timeout: float | None = None) -> bool:
        """Waits until no update is staged and nothing is asked for; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closing or not (self._working or self._has_work()), timeout=timeout
            )

    # Taking in

    def _known(self, site: str, sha256: str) -> Receipt | None:
        """The receipt of an update that was acknowledged before."""
        found = self._ledger.update(update_id(site, sha256))
        if found is None:
            return None
        self.metrics.acknowledged(again=True)
        return Receipt(found.id, found.state, found.version, again=True)

    def _check_room(self, site: str, size: int) -> None:
        """Refuses what would be one too many, of this site or of all."""
        limits, ledger = self.settings.limits, self._ledger
        if self._is_held(site):
            check_held(ledger.count(UpdateState.HELD), limits)
        else:
            check_queue(ledger.count(UpdateState.STAGED), limits)
        used = ledger.site_usage(site, self._clock() - DAY)
        check_quota(*used, size, limits, where=f"update of {site}")

    def _is_held(self, site: str) -> bool:
        return needs_approval(self.settings.limits, new_site=not self._ledger.has_merged(site))

    def _take_in(self, site: str, incoming: Incoming, announced: Blob) -> Receipt:
        """Admits, stages and acknowledges what has arrived in full."""
        started = time.perf_counter()
        blob = Blob(incoming.sha256, incoming.size)
        with self._refusing(site, blob.size, blob.sha256) as about:
            if blob != announced:
                raise MismatchError(
                    "not what was announced", where=f"update of {site}", got=blob, wanted=announced
                )
            self._refuse_copy(blob.sha256, site)
            admitted = admit_update(
                incoming.path,
                self.base,
                self._norms,
                self.settings.limits,
                current_version=self._ledger.current().number,
                site=site,
            )
            about["task"] = admitted.manifest.task
            self.metrics.took("admit", time.perf_counter() - started)
            record, again = self._stage(site, incoming, blob, admitted)
        if not again:
            facts: dict[str, Fact] = {
                "update": record.id,
                "task": record.task,
                "bytes": record.size,
                "state": record.state,
            }
            self._note("admitted", site, **facts)
            self._notify()
        self.metrics.acknowledged(again=again, held=record.state is UpdateState.HELD)
        return Receipt(record.id, record.state, record.version, again=again)

    def _stage(
        self, site: str, incoming: Incoming, blob: Blob, admitted: Admitted
    ) -> tuple[UpdateRecord, bool]:
        """The update's row; whether another upload of the same bytes was faster."""
        with self._files:
            found = self._ledger.update(update_id(site, blob.sha256))
            if found is not None:
                return found, True
            self._refuse_copy(blob.sha256, site)
            self._check_room(site, blob.size)
            incoming.seal()
            try:
                record = self._ledger.add_update(
                    site,
                    admitted.manifest.task,
                    UpdateState.HELD if self._is_held(site) else UpdateState.STAGED,
                    blob.sha256,
                    blob.size,
                    admitted.examples,
                    admitted.manifest.origin_version,
                    admitted.norm,
                    self._clock(),
                )
            except BaseException:
                self._discard_unnamed(blob.sha256)
                raise
        return record, False

    def _refuse_copy(self, sha256: str, site: str) -> None:
        found = self._ledger.update_with_content(sha256)
        if found is not None and found.site != site:
            raise Duplicate("an exact copy of another site's update", where=f"update of {site}")

    @contextmanager
    def _refusing(self, site: str, size: int, sha256: str) -> Iterator[dict[str, str]]:
        """Records why an update was not let in; a full queue or disk is no fault of the update."""
        about = {"task": ""}
        try:
            yield about
        except (Busy, StoreError) as error:
            self.metrics.refused(error)
            raise
        except FedmergeError as error:
            kind = type(error).__name__
            self.metrics.refused(error)
            refusal = Refusal(self._clock(), site, about["task"], sha256, size, kind, str(error))
            with suppress(StoreFull):
                self._ledger.add_refusal(refusal)
            self._note("refused", site, sha256=sha256, bytes=size, error=kind, reason=str(error))
            raise

    # The worker

    def _ask(self, run: Callable[[], VersionRecord]) -> VersionRecord:
        act = _Act(run, Future())
        with self._changed:
            if self._closing:
                raise StateError("the server is stopping")
            self._acts.append(act)
            self._changed.notify_all()
        return act.done.result()

    def _has_work(self) -> bool:
        return bool(self._acts) or self._ledger.next_staged() is not None

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                if self._pause:
                    self._changed.wait_for(lambda: self._closing or self._acts, timeout=self._pause)
                else:
                    self._changed.wait_for(lambda: self._closing or self._has_work())
                if self._closing:
                    break
                self._working = True
                act = self._acts[0] if self._acts else None
            if act is not None:
                self._run(act)
            else:
                self._merge_next()
            self._working = False
            self._notify()
        for act in self._acts:
            act.done.set_exception(StateError("the server is stopping"))

    def _run(self, act: _Act) -> None:
        try:
            act.done.set_result(act.run())
        except FedmergeError as error:
            act.done.set_exception(error)
        except Exception as error:
            logger.exception("an admin's request failed")
            act.done.set_exception(EngineError("the engine failed", got=type(error).__name__))
            self._behind = True
        finally:
            self._acts.popleft()

    def _merge_next(self) -> None:
        """Merges the update whose turn it is; if that cannot be done now, it stays and is tried again."""
        update = self._ledger.next_staged()
        if update is None:
            self._pause = 0.0
            return
        try:
            self._catch_up()
            self._merge(update)
        except NormExceeded as error:
            self._hold_back(update, error)
        except (FactorisationFailed, MismatchError, NotKept, StoreDamaged) as error:
            self._give_up(update, error)
        except FedmergeError as error:
            self._stand_still(error)
        except Exception as error:
            logger.exception("merging update %s failed", update.id)
            self._behind = True
            self._stand_still(error)
        else:
            self._failing, self._pause = "", 0.0

    def _stand_still(self, error: Exception) -> None:
        self._failing = f"{type(error).__name__}: {error}"
        self._pause = min(2 * self._pause or 1.0, LONGEST_PAUSE)
        logger.error("merging stands still, next attempt in %.0f s: %s", self._pause, self._failing)

    def _hold_back(self, update: UpdateRecord, error: NormExceeded) -> None:
        """The step it would be is larger than the limits allow to any update: an admin decides."""
        self._engine.abandon()
        logger.warning("update %s of %s waits for approval: %s", update.id, update.site, error)
        self._ledger.set_state(update.id, UpdateState.HELD, str(error), expect=UpdateState.STAGED)
        self._note("held", update.site, update=update.id, task=update.task, reason=str(error))

    def _give_up(self, update: UpdateRecord, error: FedmergeError) -> None:
        """The update itself cannot be merged, now or later; those behind it can."""
        logger.error("update %s of %s cannot be merged: %s", update.id, update.site, error)
        self._ledger.set_state(update.id, UpdateState.FAILED, str(error), expect=UpdateState.STAGED)
        self._note("failed", update.site, update=update.id, task=update.task, reason=str(error))
        self.metrics.failed()
        self._forget(update)

    def _merge(self, update: UpdateRecord) -> None:
        started = time.perf_counter()
        totals = self._engine.absorb(self._replay.vector(update))
        self.metrics.took("absorb", time.perf_counter() - started)
        committing = time.perf_counter()
        draft = replace(
            self._draft(VersionKind.MERGE, self._ledger.current().number, totals),
            update=update.id,
            task=update.task,
            site=update.site,
            examples=update.examples,
        )
        version = self._store(draft, started, bounded=not update.reason)
        self._commit(version, lambda: self._ledger.commit_merge(version))
        self._make_current()
        self.metrics.took("commit", time.perf_counter() - committing)
        self.metrics.merged(version.seconds)
        self._note("merged", update.site, update=update.id, task=update.task, version=version.number)
        self._notify()
        self._engine.prepare()
        self._tidy(version)

    def _roll_back(self, number: int, by: str) -> VersionRecord:
        self._require_kept(self.version(number))
        self._behind = True
        self._replay.load(self._engine, number)
        draft = self._draft(VersionKind.ROLLBACK, number, self._engine.totals)
        return self._act(replace(draft, by=by), ())

    def _remove(self, task: str, by: str) -> VersionRecord:
        current = self._ledger.current()
        inside = self._replay.contributions(current.number)
        removed = [update for update in inside if update.task == task]
        if not removed:
            known = sorted({update.task for update in inside})
            raise NotFound("the current model has no such task", got=repr(task), wanted=" or ".join(known))
        self._take_out(removed, inside)
        draft = self._draft(VersionKind.REMOVAL, current.number, self._engine.totals)
        return self._act(replace(draft, task=task, by=by), [update.id for update in removed])

    def _take_out(self, removed: list[UpdateRecord], inside: list[UpdateRecord]) -> None:
        """Brings the engine to a state without some of its vectors."""
        if self._rule.order_free:
            self._replay.require(removed)
            self._catch_up()
            self._behind = True
            for update in removed:
                self._engine.absorb(self._replay.vector(update), removing=True)
                self._engine.commit()
            if not self._engine.totals.merges:
                self._engine.restore(self._engine.state, (), Totals())
            return
        first = removed[0]
        assert first.version is not None
        again = [u for u in inside if (u.version or 0) > first.version and u.task != first.task]
        self._replay.require(again)
        self._behind = True
        self._replay.load(self._engine, self._before(first))
        for update in again:
            self._engine.merge(self._replay.vector(update))

    def _before(self, update: UpdateRecord) -> int:
        """The version that an update was merged into."""
        return self.version(update.version).parent

    def _act(self, draft: VersionRecord, removed: Sequence[str]) -> VersionRecord:
        """Commits a version whose state the engine already has, with a snapshot of it."""
        version = self._store(draft, time.perf_counter())
        state = self._snapshot()
        version = replace(version, snapshot=state.sha256)
        self._commit(version, lambda: self._ledger.commit_act(version, removed))
        self._behind = False
        self._note(version.kind, version.by, version=version.number, parent=version.parent, task=version.task)
        logger.info("version %d: %s of version %d", version.number, version.kind, version.parent)
        self._tidy(version)
        return version

    def _draft(self, kind: VersionKind, parent: int, totals: Totals) -> VersionRecord:
        scale = self._rule.scale(totals)
        return VersionRecord(
            number=self._ledger.current().number + 1,
            kind=kind,
            parent=parent,
            at=self._clock(),
            merges=totals.merges,
            norm_sum=totals.norm_sum,
            update_norm=totals.update_norm,
            state_norm=totals.state_norm,
            scale=scale,
            lambda_t=self._rule.lambda_t(totals),
            merged_norm=scale * totals.state_norm,
        )

    def _store(self, draft: VersionRecord, started: float, *, bounded: bool = False) -> VersionRecord:
        """Writes the merged vector as it is about to be; ``bounded`` refuses too large a step to it."""
        blob = self._write_merged(draft.number, bounded)
        seconds = time.perf_counter() - started
        return replace(draft, sha256=blob.sha256, size=blob.size, seconds=round(seconds, 6))

    def _write_merged(self, number: int, bounded: bool = False) -> Blob:
        """Raises NormExceeded, leaving nothing, where ``bounded`` and a layer's step is out of bounds."""
        manifest = Manifest(base=self._fingerprint, origin_version=number, task="merged", site="server")
        vector = replace(self._engine.pending(), manifest=manifest)
        if bounded:
            vector = replace(vector, read=partial(self._bounded, vector.read))
        blob = self._blobs.write(lambda file: vectorfile.write(vector, file))
        self._intact[blob.sha256] = time.monotonic()
        return blob

    def _bounded(self, read: Callable[[str], LayerUpdate], name: str) -> LayerUpdate:
        """One layer of the coming version, if the step to it from the current one is within the limits."""
        coming = read(name)
        step = Dense(coming.to_dense() - self._engine.read_layer(name))
        check_step(name, step.sum_of_squares(), self._norms, self.settings.limits)
        return coming

    def _commit(self, version: VersionRecord, enter: Callable[[], None]) -> None:
        """One transaction; if it fails, files written for it go again."""
        with self._files:
            try:
                enter()
            except BaseException:
                for sha256 in {version.sha256, version.snapshot} - {""}:
                    self._discard_unnamed(sha256)
                raise

    def _make_current(self) -> None:
        """The ledger has the version: the engine follows, now or before its next use."""
        try:
            self._engine.commit()
        except EngineError as error:
            logger.warning("the engine will be rebuilt: %s", error)
            self._behind = True

    def _catch_up(self) -> None:
        """Brings the engine to the ledger's current version, on new workers if need be."""
        if not self._behind:
            return
        current = self._ledger.current().number
        try:
            self._replay.load(self._engine, current)
        except EngineError as error:
            logger.warning("a new engine takes over: %s", error)
            self._replace_engine()
            self._replay.load(self._engine, current)
        except FedmergeError:
            raise
        except Exception:
            logger.exception("a new engine takes over")
            self._replace_engine()
            self._replay.load(self._engine, current)
        self._behind = False

    def _replace_engine(self) -> None:
        old = self._engine
        with suppress(Exception):
            old.close()
        self._engine = self._make_engine()
        self._resources.callback(self._engine.close)

    # Files

    def _recover(self, strays: int, on_merge: Callable[[VersionRecord], None]) -> None:
        """Rebuilds the engine, and the current version's file if it is damaged.

        Where that cannot be done, what is intact is served all the same, and merging stands still.
        """
        current = self._ledger.current()
        mended = False
        try:
            self._replay.load(self._engine, current.number, on_merge)
            self._behind = False
            if current.number and not self._is_intact(current.sha256):
                mended = self._mend(current)
            self._tidy(current)
            self._engine.prepare()
        except FedmergeError as error:
            self._failing = f"{type(error).__name__}: {error}"
            logger.error("version %d cannot be rebuilt: %s", current.number, error)
        self._note("opened", "server", version=current.number, strays=strays, mended=mended)

    def _mend(self, version: VersionRecord) -> bool:
        """Writes the current version's file again; whether that gave the same bytes."""
        blob = self._write_merged(version.number)
        if blob.sha256 == version.sha256:
            self._failing = ""
            return True
        self._discard(blob.sha256)
        return False

    def _snapshot(self) -> Blob:
        started = time.perf_counter()
        blob = self._blobs.write(partial(snapshot.write, self._engine, self._fingerprint))
        self.metrics.took("snapshot", time.perf_counter() - started)
        return blob

    def _tidy(self, version: VersionRecord) -> None:
        """After a commit: a snapshot if one is due, and out with what need not be kept."""
        try:
            if self._merges_since_snapshot(version) >= self.settings.retention.snapshot_every:
                blob = self._snapshot()
                self._ledger.set_snapshot(version.number, blob.sha256, blob.size)
            self._expire()
        except StoreError as error:
            logger.warning("tidying up is put off: %s", error)

    def _merges_since_snapshot(self, version: VersionRecord) -> int:
        count = 0
        for each in self._ledger.lineage(version.number):
            if each.snapshot:
                break
            count += 1
        return count

    def _expire(self) -> None:
        ledger, retention = self._ledger, self.settings.retention
        for number in expired_versions(ledger, retention.versions):
            sha256 = self.version(number).sha256
            ledger.drop_blob(number)
            self._discard(sha256)
        floor = replay_floor(ledger, retention)
        for version in ledger.snapshots():
            if version.number < floor:
                ledger.drop_snapshot(version.number)
                self._discard(version.snapshot)
        for update in ledger.vectors_up_to(floor):
            self._forget(update)

    def _forget(self, update: UpdateRecord) -> None:
        """Drops an update's vector; its row stays."""
        self._ledger.forget_vector(update.id)
        self._discard(update.sha256)

    def _discard(self, sha256: str) -> None:
        with self._files:
            self._discard_unnamed(sha256)

    def _discard_unnamed(self, sha256: str) -> None:
        """Removes a file that nothing names any more, unless somebody is reading it."""
        with suppress(StoreFull):
            if not self._open_files[sha256] and not self._ledger.names(sha256):
                self._blobs.discard(sha256)
                self._rounded_hashes.pop(sha256, None)
                self._rounded_path(sha256).unlink(missing_ok=True)
                self._intact.pop(sha256, None)

    def _servable(self, version: int | None) -> VersionRecord:
        """The version to serve."""
        record = self.version(version)
        if not record.number:
            raise NotFound("version 0 is the base", do="Merge something first; sites have the base.")
        self._require_kept(record)
        if version is not None:
            self._require_intact(record.sha256)
            return record
        for candidate in reversed(self._ledger.kept_versions()):
            if self._is_intact(candidate.sha256):
                return candidate
        self._require_intact(record.sha256)
        return record

    def _require_kept(self, version: VersionRecord) -> None:
        if not version.kept:
            raise NotKept(
                "its merged vector was not kept",
                where=f"version {version.number}",
                do="Raise [retention] versions to keep more of them.",
            )

    def _is_intact(self, sha256: str) -> bool:
        try:
            self._require_intact(sha256)
        except StoreDamaged as error:
            self._failing = f"StoreDamaged: {error}"
            logger.error("%s", error)
            return False
        return True

    def _require_intact(self, sha256: str) -> None:
        if time.monotonic() - self._intact.get(sha256, -math.inf) > VERIFY_SECONDS:
            self._blobs.verify(sha256)
            self._intact[sha256] = time.monotonic()

    @contextmanager
    def _keeping(self, sha256: str) -> Iterator[None]:
        """Nothing removes a file while inside."""
        with self._files:
            self._open_files[sha256] += 1
        try:
            yield
        finally:
            with self._files:
                self._open_files[sha256] -= 1
                if not self._open_files[sha256]:
                    del self._open_files[sha256]
                self._discard_unnamed(sha256)

    def _rounded_path(self, sha256: str) -> Path:
        return self._blobs.cache / f"{sha256}.bf16.safetensors"

    def _rounded(self, record: VersionRecord) -> Published:
        """The merged vector in bfloat16, made when it is first asked for."""
        path = self._rounded_path(record.sha256)
        with self._rounding:
            found = self._rounded_hashes.get(record.sha256)
            if found is None or not path.exists():
                vectorfile.save(vectorfile.load(self._blobs.path(record.sha256)), path, dtype=torch.bfloat16)
                found = self._rounded_hashes[record.sha256] = _hashed(path)
        return Published(record, path, found.size, found.sha256)

    def _note(self, event: str, who: str, **facts: Fact) -> None:
        """Into the audit log. What the ledger has stands, whether or not the log could be written."""
        try:
            self._audit.record(event, who, **facts)
        except StoreFull as error:
            logger.error("audit: %s", error)


class Upload:
    """One update on its way in.

    Attributes:
        known: its receipt, if it was acknowledged before; then nothing need be sent.
    """

    def __init__(
        self,
        aggregator: Aggregator,
        site: str,
        size: int,
        sha256: str,
        known: Receipt | None,
        incoming: Incoming | None,
    ) -> None:
        self.known = known
        self._aggregator, self._site = aggregator, site
        self._size, self._sha256 = size, sha256
        self._incoming = incoming

    def write(self, chunk: bytes | memoryview) -> None:
        """Appends a chunk. Raises TooLarge for more bytes than announced; StoreFull."""
        if self._incoming is not None:
            self._incoming.write(chunk)
            self._aggregator.metrics.received(memoryview(chunk).nbytes)

    def finish(self) -> Receipt:
        """Admits, stages and acknowledges; when this returns, the update survives a crash.

        Raises:
            FedmergeError: it was refused, or could not be written.
        """
        if self.known is not None:
            return self.known
        assert self._incoming is not None
        return self._aggregator._take_in(self._site, self._incoming, Blob(self._sha256, self._size))


def _hashed(path: Path) -> Blob:
    """Hash and size of a file. Raises FileError."""
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            return Blob(sha256, file.tell())
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error
