"""Bringing an engine to the state of any version: from the nearest snapshot, and the vectors merged since."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import isclose

from fedmerge.common.errors import EngineError, NotKept, StoreDamaged, StoreError
from fedmerge.common.records import UpdateRecord, VersionKind, VersionRecord
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import load
from fedmerge.server import snapshot
from fedmerge.server.engine.engine import Engine
from fedmerge.server.merge.rule import Totals
from fedmerge.server.store.blobs import Blobs
from fedmerge.server.store.ledger import Ledger

logger = logging.getLogger("fedmerge.server")

SAME_MODEL = 1e-4
"""Relative difference of a norm above which a replayed version is another model. Within one environment
replays give equal bits; other versions of the linear algebra libraries round differently."""

OnMerge = Callable[[VersionRecord], None]


class Replay:
    """Reads versions back out of a store.

    Args:
        base: fingerprint of the base.
    """

    def __init__(self, base: str, ledger: Ledger, blobs: Blobs) -> None:
        self._base, self._ledger, self._blobs = base, ledger, blobs

    def load(self, engine: Engine, number: int, on_merge: OnMerge = lambda _: None) -> None:
        """Brings ``engine`` to the state after version ``number``.

        Raises:
            NotKept: a vector or a snapshot it takes was dropped by retention.
            StoreDamaged: a file it takes is damaged, or the replay gives another model.
        """
        damaged: list[StoreError] = []
        try:
            self._load(engine, number, on_merge, damaged)
        except NotKept as error:
            if damaged:
                raise damaged[0] from error
            raise

    def _load(self, engine: Engine, number: int, on_merge: OnMerge, damaged: list[StoreError]) -> None:
        """``damaged`` takes the errors of snapshots that are passed over."""
        merges: list[VersionRecord] = []
        for version in self._ledger.lineage(number):
            if version.snapshot and self._restore(engine, version, damaged):
                break
            if version.kind is VersionKind.REMOVAL:
                raise NotKept("its state was not kept", where=f"version {version.number}")
            if version.kind is VersionKind.MERGE:
                merges.append(version)
        else:
            engine.restore(engine.state, (), Totals())
        for version in reversed(merges):
            engine.merge(self.vector(self._update_of(version)))
            self._compare(engine.totals, version)
            on_merge(version)

    def vector(self, update: UpdateRecord) -> TaskVector:
        """An update's task vector, its bytes verified, with what was admitted in its manifest.

        Raises:
            NotKept: dropped by retention. StoreDamaged: its file is not what was acknowledged.
        """
        if not update.kept:
            raise NotKept(
                "its task vector was not kept",
                where=f"update {update.id}, task {update.task!r}",
                do="The setting 'vectors' says how many are kept.",
            )
        self._blobs.verify(update.sha256)
        vector = load(self._blobs.path(update.sha256))
        manifest = replace(vector.manifest, site=update.site, examples=update.examples)
        return replace(vector, manifest=manifest, label=f"update {update.id}", id=update.id)

    def contributions(self, number: int) -> list[UpdateRecord]:
        """The updates whose vectors are in the model of a version, in the order of merging."""
        removed: set[str] = set()
        found = []
        for version in self._ledger.lineage(number):
            if version.kind is VersionKind.REMOVAL:
                removed.add(version.task)
            elif version.kind is VersionKind.MERGE and version.task not in removed:
                found.append(self._update_of(version))
        return found[::-1]

    def beginning(self, number: int, wanted: Sequence[UpdateRecord]) -> tuple[int, Sequence[UpdateRecord]]:
        """The newest version behind ``number`` whose model is some first of these, and the others."""
        ids = [(update.id, update.task) for update in wanted]
        found, length = 0, 0
        inside: list[tuple[str, str]] = []
        for version in reversed(list(self._ledger.lineage(number))):
            if version.kind is VersionKind.REMOVAL:
                inside = [(update, task) for update, task in inside if task != version.task]
            elif version.kind is VersionKind.MERGE:
                inside.append((version.update, version.task))
            if inside == ids[: len(inside)]:
                found, length = version.number, len(inside)
        return found, wanted[length:]

    def require(self, updates: Iterable[UpdateRecord]) -> None:
        """Refuses if any of these vectors cannot be read, before anything is changed."""
        for update in updates:
            self.vector(update)

    def _restore(self, engine: Engine, version: VersionRecord, damaged: list[StoreError]) -> bool:
        """Whether the engine was restored from a version's snapshot."""
        try:
            self._blobs.verify(version.snapshot)
            snapshot.restore(engine, self._base, self._blobs.path(version.snapshot))
        except StoreError as error:
            logger.warning("snapshot of version %d passed over: %s", version.number, error)
            damaged.append(error)
            return False
        return True

    def _update_of(self, version: VersionRecord) -> UpdateRecord:
        update = self._ledger.update(version.update)
        if update is None:
            raise StoreDamaged("its update is not in the ledger", where=f"version {version.number}")
        return update

    def _compare(self, totals: Totals, version: VersionRecord) -> None:
        for name in ("merges", "norm_sum", "update_norm", "state_norm"):
            got, wanted = getattr(totals, name), getattr(version, name)
            if not isclose(got, wanted, rel_tol=SAME_MODEL):
                raise EngineError(
                    "the replay gives another model",
                    where=f"version {version.number}",
                    got=f"{name} {got!r}",
                    wanted=f"{wanted!r}",
                    do="Use the versions of fedmerge and torch that made it.",
                )
