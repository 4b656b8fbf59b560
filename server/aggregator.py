"""The aggregator: takes updates in, merges them one by one, keeps every version on disk.

    admit -> stage -> acknowledge -> merge -> commit -> publish

Submissions come from any thread (``intake``). An update is acknowledged once its bytes and its row in the
ledger are on disk. One worker thread takes staged updates in the order of acknowledgement and makes a
version of each (``merging``), in one transaction. Files are kept as long as the settings say (``library``).

It knows nothing of transport: the gRPC service and the Flower ServerApp are two faces of it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ConfigDict

from fedmerge import __version__
from fedmerge.common.base import Base
from fedmerge.common.errors import (
    EngineError,
    FactorisationFailed,
    FedmergeError,
    MismatchError,
    NormExceeded,
    NotFound,
    NotKept,
    StateError,
    StoreDamaged,
    StoreError,
    ValueRefused,
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
)
from fedmerge.common.writing import replacing
from fedmerge.server.admission import BaseNorms, Limits
from fedmerge.server.audit import Audit
from fedmerge.server.engine.engine import Engine
from fedmerge.server.intake import Intake, Upload
from fedmerge.server.library import Library, Published, hashed
from fedmerge.server.merge.rule import Rule
from fedmerge.server.merging import Merging
from fedmerge.server.metrics import Metrics
from fedmerge.server.replay import OnMerge, Replay
from fedmerge.server.retention import Retention
from fedmerge.server.store.blobs import Blobs
from fedmerge.server.store.disk import Disk
from fedmerge.server.store.ledger import Identity, Ledger
from fedmerge.server.store.lock import hold

logger = logging.getLogger("fedmerge.server")

CHUNK_BYTES = 2**20

LONGEST_PAUSE = 60.0
"""Seconds between two attempts while merging stands still."""

AUDIT = "audit.jsonl"


class AggregatorSettings(BaseModel):
    """What a server lets in and what it keeps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    limits: Limits = Limits()
    retention: Retention = Retention()


@dataclass(frozen=True)
class _Act:
    """Something an admin asked for, done by the worker between two merges."""

    run: Callable[[], VersionRecord]
    done: Future[VersionRecord]


class Aggregator:
    """A server's state folder, its engine and its worker. Implements ``records.AggregationService``.

    Opening one makes the folder, or goes on where it was left: what an interrupted run left unfinished is
    removed, the current version's file is verified, and mended if it is damaged, and the engine is rebuilt
    from the last snapshot and the vectors since. Where that cannot be done, what is intact is served all
    the same, and :meth:`status` says why merging stands still.

    Every public method may be called from any thread.

    Args:
        folder: the state folder, made if it is missing; one aggregator has it at a time.
        base: what updates are measured from.
        rule: the merge rule; with the base, it belongs to the folder for good.
        make_engine: an engine of that rule that has merged nothing; called again when one is beyond repair.
        disk, clock: replaced in tests.
        on_merge: called with every version that is replayed; for progress bars.

    Raises:
        StoreLocked: another aggregator has the folder.
        ConfigError: it belongs to another base or rule.
        StoreDamaged, StoreFull: the ledger is damaged, or nothing can be written.
        EngineError: no engine could be made.
    """

    def __init__(
        self,
        folder: Path,
        base: Base,
        rule: Rule,
        make_engine: Callable[[], Engine],
        settings: AggregatorSettings | None = None,
        *,
        metrics: Metrics | None = None,
        disk: Disk | None = None,
        clock: Callable[[], float] = time.time,
        on_merge: OnMerge = lambda _: None,
    ) -> None:
        self.base, self.settings = base, settings or AggregatorSettings()
        self.metrics = metrics or Metrics()
        self._rule, self._clock, self._started = rule, clock, clock()
        self._failing, self._pause = "", 0.0
        self._closing = self._working = False
        self._acts: deque[_Act] = deque()
        self._changed = Condition()
        self._tasks: tuple[int, tuple[str, ...]] = 0, ()
        with ExitStack() as stack:
            stack.enter_context(hold(folder))
            disk = disk or Disk()
            identity = Identity(base.fingerprint, rule.name, rule.model_dump(mode="json"))
            self._ledger = Ledger(folder, identity, disk)
            stack.callback(self._ledger.close)
            blobs = Blobs(folder, disk)
            strays = len(blobs.sweep(self._ledger.names))
            self._audit = Audit(folder / AUDIT)
            stack.callback(self._audit.close)
            self._library = Library(self._ledger, blobs)
            self._replay = Replay(base.fingerprint, self._ledger, blobs)
            norms = BaseNorms.of(base)
            self._intake = Intake(
                base,
                norms,
                rule,
                self.settings.limits,
                self._ledger,
                self._library,
                self._audit,
                self.metrics,
                clock,
                self._notify,
            )
            self._merging = Merging(
                base.fingerprint,
                norms,
                self.settings.limits,
                self.settings.retention,
                make_engine,
                self._ledger,
                self._library,
                self._replay,
                self._audit,
                self.metrics,
                clock,
            )
            stack.callback(self._merging.close)
            self._recover(strays, on_merge)
            self._resources = stack.pop_all()
        self._worker = Thread(target=self._work, name="aggregator", daemon=True)
        self._worker.start()

    def close(self) -> None:
        """Ends the worker after the merge it is in, and lets go of the folder. Closing twice is harmless."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
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
        blob = hashed(source)
        with self.receive(site, size=blob.size, sha256=blob.sha256) as upload:
            if upload.known is not None:
                return upload.known
            with source.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    upload.write(chunk)
            return upload.finish()

    def receive(self, site: str, *, size: int, sha256: str) -> AbstractContextManager[Upload]:
        """Takes an update in piece by piece; what is not finished when the block ends leaves no trace.

        Args:
            size, sha256: of the whole file, as the site announces them.

        Raises:
            ConfigError: not a site's name. TooLarge, QuotaExceeded, Busy: before any byte. StoreFull.
        """
        return self._intake.receive(site, size, sha256)

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
        with self._ledger.together():
            self._ledger.set_state(update, UpdateState.STAGED, f"approved by {by}", expect=UpdateState.HELD)
            self._ledger.add_act(self._clock(), by, "approve", update)
        self._audit.note("approved", by, update=update)
        self._notify()
        return Receipt(update, UpdateState.STAGED, again=True)

    def reject(self, update: str, *, by: str, reason: str = "") -> None:
        """Turns a held update away, or a staged one that has not been merged. Raises NotFound, StateError."""
        found = self.update(update)
        if found.state not in (UpdateState.HELD, UpdateState.STAGED):
            raise StateError("it does not wait any more", where=f"update {update}", got=found.state)
        with self._ledger.together():
            self._ledger.set_state(update, UpdateState.REJECTED, reason, expect=found.state)
            self._ledger.forget_vector(update)
            self._ledger.add_act(self._clock(), by, "reject", update)
        self._audit.note("rejected", by, update=update, reason=reason)
        self._library.discard(found.sha256)

    # Versions

    def status(self) -> Status:
        """The server at a glance."""
        current = self._ledger.current()
        return Status(
            fedmerge=__version__,
            base=self.base.fingerprint,
            rule=self._rule.name,
            options=self._rule.model_dump(mode="json"),
            version=current.number,
            tasks=self._tasks_of(current),
            staged=self._ledger.count(UpdateState.STAGED),
            held=self._ledger.count(UpdateState.HELD),
            merged=current.merges,
            refused=self._ledger.refusal_counts(),
            failing=self._failing,
            disk=self._library.total_bytes(),
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
        with ExitStack() as stack:
            yield self._open_newest(stack, dtype) if version is None else self._open(stack, version, dtype)

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
        return self._ask(partial(self._merging.roll_back, version, by))

    def remove(self, task: str, *, by: str) -> VersionRecord:
        """Takes a task out of the current model, as a new version.

        Rules whose state is a sum subtract its vectors; others go back to the version before the task and
        merge everything since again, without it.

        Raises:
            NotFound: the current model has no such task. NotKept: a vector it takes was not kept.
        """
        return self._ask(partial(self._merging.remove, task, by))

    def watch(self, after: int) -> Iterator[VersionRecord]:
        """The current version once it is above ``after``, and every newer one as it comes.

        Versions in between may be passed over. Ends when the aggregator is closed.
        """
        while (found := self._newer_than(after)) is not None:
            yield found
            after = found.number

    def wait_until_merged(self, timeout: float | None = None) -> bool:
        """Waits until no update is staged and nothing is asked for; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._closing or not (self._working or self._has_work()), timeout=timeout
            )

    def _newer_than(self, after: int) -> VersionRecord | None:
        """Waits for a version above ``after``; None once the aggregator is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._ledger.current().number > after)
            return None if self._closing else self._ledger.current()

    def _open(self, stack: ExitStack, version: int, dtype: Dtype) -> Published:
        record = self.version(version)
        if not record.number:
            raise NotFound("version 0 is the base", do="Merge something first; sites have the base.")
        return stack.enter_context(self._library.open(record, dtype))

    def _open_newest(self, stack: ExitStack, dtype: Dtype) -> Published:
        """The newest version that is intact; where retention drops one meanwhile, there is a newer one."""
        damaged = None
        for record in reversed(self._ledger.kept_versions()):
            try:
                return stack.enter_context(self._library.open(record, dtype))
            except NotKept:
                return self._open_newest(stack, dtype)
            except StoreDamaged as error:
                damaged = damaged or error
                self._stands(error)
        if damaged is not None:
            raise damaged
        return self._open(stack, 0, dtype)

    def _tasks_of(self, version: VersionRecord) -> tuple[str, ...]:
        """Tasks in a version's model, in order of merging; remembered, for lineages are long."""
        number, tasks = self._tasks
        if version.number != number:
            if version.kind is VersionKind.MERGE and version.parent == number:
                tasks = tuple(dict.fromkeys((*tasks, version.task)))
            else:
                updates = self._replay.contributions(version.number)
                tasks = tuple(dict.fromkeys(update.task for update in updates))
            self._tasks = version.number, tasks
        return tasks

    # The worker

    def _recover(self, strays: int, on_merge: OnMerge) -> None:
        mended = False
        try:
            mended = self._merging.recover(on_merge)
        except FedmergeError as error:
            self._stands(error)
        version = self._ledger.current().number
        self._audit.note("opened", "server", version=version, strays=strays, mended=mended)

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
        """Whatever goes wrong, the worker lives on: what is acknowledged is merged once it can be."""
        while not self._closing:
            try:
                self._take_turn()
            except Exception as error:
                if not isinstance(error, FedmergeError):
                    logger.exception("merging failed")
                self._merging.behind |= not isinstance(error, StoreError)
                self._try_later(error)
            self._working = False
            self._notify()
        for act in self._acts:
            act.done.set_exception(StateError("the server is stopping"))

    def _take_turn(self) -> None:
        """Waits for something to do, and does it."""
        with self._changed:
            if self._pause:
                self._changed.wait_for(lambda: self._closing or self._acts, timeout=self._pause)
            else:
                self._changed.wait_for(lambda: self._closing or self._has_work())
            if self._closing:
                return
            self._working = True
            act = self._acts[0] if self._acts else None
        if act is not None:
            self._run(act)
        else:
            self._merge_next()

    def _run(self, act: _Act) -> None:
        try:
            version = act.run()
        except FedmergeError as error:
            act.done.set_exception(error)
        except Exception as error:
            logger.exception("an admin's request failed")
            self._merging.behind = True
            act.done.set_exception(EngineError("the engine failed", got=type(error).__name__))
        else:
            self._goes_on()
            act.done.set_result(version)
        finally:
            self._acts.popleft()

    def _merge_next(self) -> None:
        """Merges the update whose turn it is; if that cannot be done now, it stays and is tried again."""
        update = self._ledger.next_staged()
        self._merging.catch_up()
        if update is None:
            self._goes_on()
            return
        try:
            version = self._merging.merge(update)
        except NormExceeded as error:
            room = self._ledger.count(UpdateState.HELD) < self.settings.limits.max_held
            self._set_aside(update, UpdateState.HELD if room else UpdateState.FAILED, error)
        except (FactorisationFailed, MismatchError, ValueRefused, NotKept, StoreDamaged) as error:
            self._set_aside(update, UpdateState.FAILED, error)
        except FedmergeError:
            if self._is_staged(update):
                raise
        else:
            self._goes_on()
            self._notify()
            self._merging.after_merge(version)

    def _set_aside(self, update: UpdateRecord, state: UpdateState, error: FedmergeError) -> None:
        """The update cannot be merged, at least not without an admin; those behind it can."""
        if not self._is_staged(update):
            return
        logger.error("update %s of %s is %s: %s", update.id, update.site, state, error)
        with self._ledger.together():
            self._ledger.set_state(update.id, state, str(error), expect=UpdateState.STAGED)
            if state is UpdateState.FAILED:
                self._ledger.forget_vector(update.id)
        self._audit.note(state, update.site, update=update.id, task=update.task, reason=str(error))
        if state is UpdateState.FAILED:
            self.metrics.failed()
            self._library.discard(update.sha256)

    def _is_staged(self, update: UpdateRecord) -> bool:
        """False if it was rejected while it was being merged."""
        return self.update(update.id).state is UpdateState.STAGED

    def _goes_on(self) -> None:
        self._failing, self._pause = "", 0.0

    def _try_later(self, error: Exception) -> None:
        self._pause = min(2 * self._pause or 1.0, LONGEST_PAUSE)
        self._stands(error)
        logger.error("next attempt in %.0f s", self._pause)

    def _stands(self, error: Exception) -> None:
        self._failing = f"{type(error).__name__}: {error}"
        logger.error("%s", self._failing)
