"""Making versions: merges, rollbacks and removals, each one transaction in the ledger, then the engine's.

Whatever is killed when, the ledger is the truth and the engine follows it. Not for two threads.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import fsum, sqrt
from typing import TYPE_CHECKING

from fedmerge.common import vectorfile
from fedmerge.common.errors import (
    EngineError,
    FedmergeError,
    NotFound,
    StoreDamaged,
)
from fedmerge.common.records import UpdateRecord, UpdateState, VersionKind, VersionRecord
from fedmerge.common.taskvector import Dense, LayerUpdate, Manifest
from fedmerge.server import snapshot
from fedmerge.server.admission import BaseNorms, Limits, check_step
from fedmerge.server.engine.engine import Act, Engine
from fedmerge.server.library import require_kept
from fedmerge.server.merge.rule import Totals
from fedmerge.server.replay import OnMerge, Replay
from fedmerge.server.retention import Retention
from fedmerge.server.store.blobs import Blob

if TYPE_CHECKING:
    from fedmerge.server.audit import Audit
    from fedmerge.server.library import Library
    from fedmerge.server.metrics import Metrics
    from fedmerge.server.store.ledger import Ledger

logger = logging.getLogger("fedmerge.server")


class Merging:
    """An engine and the ledger it follows.

    Args:
        make_engine: an engine that has merged nothing; called again when one is beyond repair.

    Attributes:
        behind: whether the engine is not at the ledger's current version.
    """

    def __init__(
        self,
        base: str,
        norms: BaseNorms,
        limits: Limits,
        retention: Retention,
        make_engine: Callable[[], Engine],
        ledger: Ledger,
        library: Library,
        replay: Replay,
        audit: Audit,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._base, self._norms, self._limits, self._retention = base, norms, limits, retention
        self._make_engine, self._engine = make_engine, make_engine()
        self._ledger, self._library, self._replay = ledger, library, replay
        self._audit, self._metrics, self._clock = audit, metrics, clock
        self.rule = self._engine.rule
        self.behind = True
        self._ended = False

    def close(self) -> None:
        """Ends the engine's workers."""
        self._engine.close()

    # Following the ledger

    def recover(self, on_merge: OnMerge) -> bool:
        """Brings the engine to the current version; whether that version's file had to be mended.

        Raises:
            NotKept, StoreDamaged, EngineError: it cannot be rebuilt, or mended.
        """
        current = self._ledger.current()
        self._replay.load(self._engine, current.number, on_merge)
        self.behind = False
        mended = bool(current.number) and self._mend(current)
        self._tidy(current)
        self._engine.prepare()
        return mended

    def catch_up(self) -> None:
        """Brings the engine to the ledger's current version.

        Raises:
            NotKept, StoreError, EngineError: not possible now.
        """
        if self.behind:
            self._load(self._ledger.current().number)
            self.behind = False

    def _load(self, number: int) -> None:
        """Brings the engine to a version, on new workers if need be."""
        try:
            if self._ended:
                raise EngineError("its workers have ended")
            self._replay.load(self._engine, number)
        except Exception as error:
            if isinstance(error, FedmergeError) and not isinstance(error, EngineError):
                raise
            logger.warning("a new engine takes over: %r", error)
            self._renew()
            self._replay.load(self._engine, number)

    def _renew(self) -> None:
        """Another engine; if none can be made, the one before is not asked again."""
        self._ended = True
        with suppress(Exception):
            self._engine.close()
        self._engine = self._make_engine()
        self._ended = False

    def _mend(self, version: VersionRecord) -> bool:
        """Writes a version's file again if it is damaged. Raises StoreDamaged if that gives other bytes."""
        try:
            self._library.require_intact(version.sha256)
        except StoreDamaged as error:
            blob, _ = self._write_merged(version.number)
            if blob.sha256 != version.sha256:
                self._library.discard(blob.sha256)
                raise
            logger.warning("mended: %s", error)
            return True
        return False

    # Versions

    def merge(self, update: UpdateRecord) -> VersionRecord:
        """Merges a staged update.

        Raises:
            NormExceeded: the step would be larger than the limits allow, and nobody has approved it.
            NonFinite: the model would overflow.
            NotKept, StoreDamaged, FactorisationFailed: it cannot be merged.
            StateError: it was rejected meanwhile.
            StoreError, EngineError: not now. In every case nothing has changed.
        """
        started = time.perf_counter()
        totals = self._engine.absorb(self._replay.vector(update))
        self._metrics.took("absorb", time.perf_counter() - started)
        committing = time.perf_counter()
        draft = replace(
            self._draft(VersionKind.MERGE, self._ledger.current().number, totals),
            update=update.id,
            task=update.task,
            site=update.site,
            examples=update.examples,
        )
        try:
            version = self._store(draft, started, bounded=not update.reason)
            self._library.commit(lambda: self._ledger.commit_merge(version), version.sha256)
        except FedmergeError:
            self._engine.abandon()
            raise
        self._make_current()
        self._metrics.took("commit", time.perf_counter() - committing)
        self._metrics.merged(version.seconds)
        self._audit.note("merged", update.site, update=update.id, task=update.task, version=version.number)
        return version

    def after_merge(self, version: VersionRecord) -> None:
        """What nobody waits for: factorising for the next arrival, a snapshot if one is due, tidying up."""
        if not self.behind:
            self._engine.prepare()
            self._tidy(version)

    def roll_back(self, number: int, by: str) -> VersionRecord:
        """The model of an earlier version as a new one."""
        target = self._ledger.version(number)
        if target is None:
            raise NotFound("no such version", got=number)
        require_kept(target)
        self.behind = True
        self._load(number)
        draft = self._draft(VersionKind.ROLLBACK, number, self._engine.totals)
        return self._act(replace(draft, by=by), ())

    def remove(self, task: str, by: str) -> VersionRecord:
        """The current model without a task as a new version."""
        current = self._ledger.current()
        inside = self._replay.contributions(current.number)
        removed = [update for update in inside if update.task == task]
        if not removed:
            known = sorted({update.task for update in inside})
            raise NotFound("the current model has no such task", got=repr(task), wanted=" or ".join(known))
        if self.rule.additive:
            self._subtract(removed)
        else:
            self._merge_again([update for update in inside if update.task != task])
        draft = self._draft(VersionKind.REMOVAL, current.number, self._engine.totals)
        return self._act(replace(draft, task=task, by=by), _ids_of_merged(removed))

    def _subtract(self, removed: Sequence[UpdateRecord]) -> None:
        self._replay.require(removed)
        self.catch_up()
        self.behind = True
        for update in removed:
            self._engine.absorb(self._replay.vector(update), act=Act.REMOVE)
            self._engine.commit()
        if not self._engine.totals.merges:
            self._engine.restore(self._engine.state, (), Totals())

    def _merge_again(self, wanted: Sequence[UpdateRecord]) -> None:
        """Back to the last version that has none but these updates, and the rest of them from there."""
        number, rest = self._replay.beginning(self._ledger.current().number, wanted)
        self._replay.require(rest)
        self.behind = True
        self._load(number)
        for update in rest:
            self._engine.merge(self._replay.vector(update))

    def _act(self, draft: VersionRecord, removed: Sequence[str]) -> VersionRecord:
        """Commits a version whose state the engine already has, with a snapshot of it."""
        version = self._store(draft, time.perf_counter())
        try:
            version = replace(version, snapshot=self._snapshot().sha256)
        except BaseException:
            self._library.discard(version.sha256)
            raise
        self._library.commit(
            lambda: self._ledger.commit_act(version, removed), version.sha256, version.snapshot
        )
        self.behind = False
        self._audit.note(
            version.kind, version.by, version=version.number, parent=version.parent, task=version.task
        )
        logger.info("version %d: %s of version %d", version.number, version.kind, version.parent)
        self._tidy(version)
        return version

    def _draft(self, kind: VersionKind, parent: int, totals: Totals) -> VersionRecord:
        return VersionRecord(
            number=self._ledger.current().number + 1,
            kind=kind,
            parent=parent,
            at=self._clock(),
            merges=totals.merges,
            norm_sum=totals.norm_sum,
            update_norm=totals.update_norm,
            state_norm=totals.state_norm,
            scale=self.rule.scale(totals),
            lambda_t=self.rule.lambda_t(totals),
        )

    def _store(self, draft: VersionRecord, started: float, *, bounded: bool = False) -> VersionRecord:
        """Writes the merged vector as it is about to be; ``bounded`` refuses too large a step to it."""
        blob, norm = self._write_merged(draft.number, bounded)
        seconds = time.perf_counter() - started
        return replace(draft, sha256=blob.sha256, size=blob.size, merged_norm=norm, seconds=round(seconds, 6))

    def _write_merged(self, number: int, bounded: bool = False) -> tuple[Blob, float]:
        """The file of the coming version, and its norm."""
        manifest = Manifest(base=self._base, origin_version=number, task="merged", site="server")
        vector = self._engine.pending()
        squares: dict[str, float] = {}

        def read(name: str) -> LayerUpdate:
            coming = vector.read(name)
            squares[name] = coming.sum_of_squares()
            if bounded:
                self._check_step(name, coming)
            return coming

        measured = replace(vector, manifest=manifest, read=read)
        blob = self._library.write(lambda file: vectorfile.write(measured, file))
        return blob, sqrt(fsum(squares.values()))

    def _check_step(self, name: str, coming: LayerUpdate) -> None:
        """Refuses a layer of the coming version if the step to it from the current one exceeds the limits."""
        step = Dense(coming.to_dense() - self._engine.read_layer(name))
        check_step(name, step.sum_of_squares(), self._norms, self._limits)

    def _make_current(self) -> None:
        """The ledger has the version: the engine follows, now or before its next use."""
        try:
            self._engine.commit()
        except Exception as error:
            logger.warning("the engine will be rebuilt: %r", error)
            self.behind = True

    # Snapshots

    def _snapshot(self) -> Blob:
        started = time.perf_counter()
        blob = self._library.write(partial(snapshot.write, self._engine, self._base))
        self._metrics.took("snapshot", time.perf_counter() - started)
        return blob

    def _tidy(self, version: VersionRecord) -> None:
        """After a commit: a snapshot if one is due, and out with what need not be kept."""
        try:
            if self._merges_since_snapshot(version) >= self._retention.snapshot_every:
                blob = self._snapshot()
                self._library.commit(
                    partial(self._ledger.set_snapshot, version.number, blob.sha256, blob.size), blob.sha256
                )
            self._library.expire(self._retention)
        except Exception as error:
            logger.warning("tidying up is put off: %r", error)

    def _merges_since_snapshot(self, version: VersionRecord) -> int:
        count = 0
        for each in self._ledger.lineage(version.number):
            if each.snapshot:
                break
            count += 1
        return count


def _ids_of_merged(updates: Sequence[UpdateRecord]) -> list[str]:
    """Without those that were taken out before and came back with a rollback."""
    return [update.id for update in updates if update.state is UpdateState.MERGED]
