"""The ledger: which updates were acknowledged, what became of them, and which versions there are.

One SQLite file with a write-ahead log, synced at every commit. What must hold is in the constraints of its
tables, in :mod:`fedmerge.server.store.schema`.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from threading import RLock
from typing import Any

from fedmerge.common.errors import (
    ConfigError,
    Duplicate,
    FedmergeError,
    NotFound,
    StateError,
    StoreDamaged,
    StoreError,
    StoreFull,
    StoreLocked,
    VersionMismatch,
)
from fedmerge.common.records import Refusal, UpdateRecord, UpdateState, VersionKind, VersionRecord, update_id
from fedmerge.server.store.blobs import BLOBS, SUFFIX
from fedmerge.server.store.disk import Disk
from fedmerge.server.store.schema import SCHEMA, SCHEMA_VERSION

LEDGER = "ledger.sqlite"
BUSY_SECONDS = 5.0


@dataclass(frozen=True)
class Identity:
    """What all versions of a ledger have in common.

    Attributes:
        base: fingerprint of the base. ``rule``: name of the merge rule. ``options``: of the rule; as in JSON.
    """

    base: str
    rule: str
    options: Mapping[str, object]


@dataclass(frozen=True)
class Act:
    """What an admin did, and when."""

    at: float
    who: str
    what: str
    detail: str


KINDS: Mapping[int, tuple[type[FedmergeError], str]] = {
    sqlite3.SQLITE_CONSTRAINT: (StateError, "the ledger does not allow it"),
    sqlite3.SQLITE_BUSY: (StoreLocked, "another program writes to the ledger"),
    sqlite3.SQLITE_CORRUPT: (StoreDamaged, "not an intact database"),
    sqlite3.SQLITE_NOTADB: (StoreDamaged, "not a database"),
    sqlite3.SQLITE_FULL: (StoreFull, "cannot be written"),
    sqlite3.SQLITE_IOERR: (StoreFull, "cannot be written"),
    sqlite3.SQLITE_READONLY: (StoreFull, "cannot be written"),
    sqlite3.SQLITE_CANTOPEN: (StoreFull, "cannot be opened"),
}
"""SQLite's primary result codes as errors for callers."""


def _columns(record: type) -> str:
    return ", ".join(f'"{field.name}"' for field in fields(record))


UPDATE = _columns(UpdateRecord)
VERSION = _columns(VersionRecord)
REFUSAL = _columns(Refusal)
ACT = _columns(Act)


class Ledger:
    """The ledger of a state folder. Every method may be called from any thread.

    A method that changes something has changed it durably when it returns, and nothing when it raises.
    It raises StoreFull when the disk refuses, StoreDamaged when the file is no intact database, and
    StateError when the change would break what the ledger promises.

    Args:
        folder: the state folder; a ledger is made there if the folder has none and no blobs.
        identity: stored when the ledger is made, compared ever after.

    Raises:
        ConfigError: made with another identity; says what differs.
        VersionMismatch: written by newer software.
        StoreDamaged: the file is no intact ledger, or it is gone while its blobs are there.
    """

    def __init__(self, folder: Path, identity: Identity, disk: Disk) -> None:
        self._path = folder / LEDGER
        self._disk = disk
        self._lock = RLock()
        with self._typed_errors():
            if not self._path.exists():
                self._create(identity)
            self._db = _connect(self._path)
            try:
                self._open(identity)
            except BaseException:
                self._db.close()
                raise

    def close(self) -> None:
        """Closes the file. Any other call after this raises StateError."""
        with self._lock:
            self._db.close()

    def integrity_check(self) -> None:
        """Reads the whole file. Raises StoreDamaged."""
        self._check("integrity_check")
        self._check("foreign_key_check")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Makes all changes of the block, or none."""
        with self._transaction():
            yield

    # Updates

    def add_update(
        self,
        site: str,
        task: str,
        state: UpdateState,
        sha256: str,
        size: int,
        examples: int,
        origin_version: int,
        norm: float,
        at: float,
    ) -> UpdateRecord:
        """Enters an update whose blob is sealed; it is acknowledged when this returns.

        Raises:
            Duplicate: this site has sent these bytes before.
        """
        update = update_id(site, sha256)
        with self._transaction():
            if self.update(update) is not None:
                raise Duplicate("already acknowledged", where=f"update {update}")
            row = {
                "id": update,
                "site": site,
                "task": task,
                "state": state,
                "sha256": sha256,
                "size": size,
                "examples": examples,
                "origin_version": origin_version,
                "norm": norm,
                "at": at,
            }
            self._insert("updates", row)
            return self._existing(update)

    def update(self, update: str) -> UpdateRecord | None:
        """The update with this id."""
        return next(map(_update, self._rows(f"SELECT {UPDATE} FROM updates WHERE id = ?", update)), None)

    def update_with_content(self, sha256: str) -> UpdateRecord | None:
        """The first update, from any site, with these bytes; rejected and failed ones do not count."""
        found = self._rows(
            f"SELECT {UPDATE} FROM updates WHERE sha256 = ? AND state NOT IN ('rejected', 'failed')"
            " ORDER BY seq LIMIT 1",
            sha256,
        )
        return next(map(_update, found), None)

    def updates(self, after: int, limit: int, state: UpdateState | None = None) -> list[UpdateRecord]:
        """At most ``limit`` updates with a ``seq`` above ``after``, in order."""
        where = "seq > ?" if state is None else "seq > ? AND state = ?"
        values = (after,) if state is None else (after, state)
        rows = self._rows(f"SELECT {UPDATE} FROM updates WHERE {where} ORDER BY seq LIMIT ?", *values, limit)
        return [_update(row) for row in rows]

    def next_staged(self) -> UpdateRecord | None:
        """The update whose turn it is."""
        return next(iter(self.updates(0, 1, UpdateState.STAGED)), None)

    def count(self, state: UpdateState) -> int:
        """How many updates are in a state."""
        return int(self._rows("SELECT COUNT(*) FROM updates WHERE state = ?", state)[0][0])

    def site_usage(self, site: str, since: float) -> tuple[int, int]:
        """Updates, and their bytes, acknowledged for a site at ``since`` or later."""
        sql = "SELECT COUNT(*), COALESCE(SUM(size), 0) FROM updates WHERE site = ? AND at >= ?"
        updates, size = self._rows(sql, site, since)[0]
        return int(updates), int(size)

    def has_merged(self, site: str) -> bool:
        """Whether an update of this site was ever merged."""
        sql = "SELECT EXISTS (SELECT 1 FROM updates WHERE site = ? AND version IS NOT NULL)"
        return bool(self._rows(sql, site)[0][0])

    def vectors_up_to(self, version: int) -> list[UpdateRecord]:
        """Updates merged up to a version whose bytes are kept."""
        sql = f"SELECT {UPDATE} FROM updates WHERE kept AND version <= ? ORDER BY seq"
        return [_update(row) for row in self._rows(sql, version)]

    def set_state(self, update: str, state: UpdateState, reason: str = "", *, expect: UpdateState) -> None:
        """Moves an update from the state ``expect`` to another; merging and removing come with a version.

        Raises:
            NotFound: no such update.
            StateError: it is in another state, or its bytes are gone and it would have to wait.
        """
        with self._transaction():
            self._move(update, expect, "state = ?, reason = ?", state, reason)

    def restage(self, update: str, at: float) -> UpdateRecord:
        """An update that failed waits again, its blob sealed anew. Raises NotFound, StateError."""
        with self._transaction():
            change = "state = ?, reason = '', kept = 1, at = ?"
            self._move(update, UpdateState.FAILED, change, UpdateState.STAGED, at)
            return self._existing(update)

    def forget_vector(self, update: str) -> None:
        """Notes that the bytes of an update that no longer waits are not kept. Raises NotFound."""
        with self._transaction():
            self._existing(update)
            self._change("UPDATE updates SET kept = 0 WHERE id = ?", update)

    # Versions

    def commit_merge(self, version: VersionRecord) -> None:
        """Enters the next version and marks its update as merged, both or neither.

        Raises:
            NotFound: no such update.
            StateError: another number is next, or the update is not staged.
        """
        assert version.kind is VersionKind.MERGE
        with self._transaction():
            self._insert_version(version)
            values = (UpdateState.MERGED, version.number)
            self._move(version.update, UpdateState.STAGED, "state = ?, version = ?", *values)

    def commit_act(self, version: VersionRecord, removed: Sequence[str] = ()) -> None:
        """Enters a rollback or a removal, the act behind it, and marks the updates taken out.

        Raises:
            NotFound: no such update.
            StateError: another number is next, or an update is not merged.
        """
        assert version.kind in (VersionKind.ROLLBACK, VersionKind.REMOVAL)
        task = f" without task {version.task!r}" if version.task else ""
        with self._transaction():
            self._insert_version(version)
            for update in removed:
                self._move(update, UpdateState.MERGED, "state = ?", UpdateState.REMOVED)
            detail = f"version {version.number} from version {version.parent}{task}"
            self._insert("acts", asdict(Act(version.at, version.by, version.kind, detail)))

    def current(self) -> VersionRecord:
        """The newest version; 0, the base, if there is no other."""
        return _version(self._rows(f"SELECT {VERSION} FROM versions ORDER BY number DESC LIMIT 1")[0])

    def version(self, number: int) -> VersionRecord | None:
        """One version."""
        rows = self._rows(f"SELECT {VERSION} FROM versions WHERE number = ?", number)
        return next(map(_version, rows), None)

    def versions(self, after: int, limit: int) -> list[VersionRecord]:
        """At most ``limit`` versions with a number above ``after``, in order."""
        sql = f"SELECT {VERSION} FROM versions WHERE number > ? ORDER BY number LIMIT ?"
        return [_version(row) for row in self._rows(sql, after, limit)]

    def lineage(self, number: int) -> Iterator[VersionRecord]:
        """What a version is made of: itself, its parent, and so on, down to but without the base.

        Reads one row at a time and holds no lock between them. Raises NotFound.
        """
        while number != 0:
            version = self._existing_version(number)
            yield version
            number = version.parent

    def kept_versions(self) -> list[VersionRecord]:
        """Versions whose merged vector is still there, in order."""
        sql = f"SELECT {VERSION} FROM versions WHERE kept AND sha256 <> '' ORDER BY number"
        return [_version(row) for row in self._rows(sql)]

    def snapshots(self) -> list[VersionRecord]:
        """Versions that have a snapshot, in order."""
        sql = f"SELECT {VERSION} FROM versions WHERE snapshot <> '' ORDER BY number"
        return [_version(row) for row in self._rows(sql)]

    def set_snapshot(self, number: int, sha256: str, size: int) -> None:
        """Notes that the engine's state at a version is in a sealed blob. Raises NotFound."""
        with self._transaction():
            self._existing_version(number)
            self._change(
                "UPDATE versions SET snapshot = ?, snapshot_size = ? WHERE number = ?", sha256, size, number
            )

    def drop_snapshot(self, number: int) -> None:
        """Notes that a version has no snapshot any more. Raises NotFound."""
        self.set_snapshot(number, "", 0)

    def drop_blob(self, number: int) -> None:
        """Notes that the merged vector of a version is not kept. Raises NotFound."""
        with self._transaction():
            self._existing_version(number)
            self._change("UPDATE versions SET kept = 0 WHERE number = ?", number)

    def names(self, sha256: str) -> bool:
        """Whether an update or a version that is kept, or a snapshot, is in this blob."""
        sql = (
            "SELECT EXISTS (SELECT 1 FROM updates WHERE sha256 = ?1 AND kept)"
            " OR EXISTS (SELECT 1 FROM versions WHERE sha256 = ?1 AND kept)"
            " OR EXISTS (SELECT 1 FROM versions WHERE snapshot = ?1 AND snapshot <> '')"
        )
        return bool(self._rows(sql, sha256)[0][0])

    # Refusals and acts

    def add_refusal(self, refusal: Refusal, keep: int = 1000) -> None:
        """Counts a refusal, and keeps it among the newest ``keep``."""
        with self._transaction():
            self._insert("refusals", asdict(refusal))
            self._change(
                "INSERT INTO refusal_counts VALUES (?, 1)"
                " ON CONFLICT (error) DO UPDATE SET count = count + 1",
                refusal.error,
            )
            self._change("DELETE FROM refusals WHERE seq <= (SELECT MAX(seq) FROM refusals) - ?", keep)

    def refusals(self, limit: int) -> list[Refusal]:
        """The latest refusals, newest first."""
        rows = self._rows(f"SELECT {REFUSAL} FROM refusals ORDER BY seq DESC LIMIT ?", limit)
        return [Refusal(*row) for row in rows]

    def refusal_counts(self) -> dict[str, int]:
        """How many updates were ever refused, by the error's name."""
        return dict(map(tuple, self._rows("SELECT error, count FROM refusal_counts ORDER BY error")))

    def add_act(self, at: float, who: str, what: str, detail: str) -> None:
        """Notes what an admin did, where no version comes of it."""
        with self._transaction():
            self._insert("acts", asdict(Act(at, who, what, detail)))

    def acts(self, limit: int) -> list[Act]:
        """What admins did last, newest first."""
        return [Act(*row) for row in self._rows(f"SELECT {ACT} FROM acts ORDER BY seq DESC LIMIT ?", limit)]

    # Opening

    def _create(self, identity: Identity) -> None:
        """Makes the ledger under another name first, so that one under its own name is whole."""
        log = self._path.with_name(f"{LEDGER}-wal")
        if log.exists() or any((self._path.parent / BLOBS).glob(f"??/*{SUFFIX}")):
            raise StoreDamaged(
                "the ledger is missing beside its log or its blobs",
                where=self._path,
                do="Bring it back from a backup, or start in an empty folder.",
            )
        new = self._path.with_name(f"{LEDGER}.new")
        for path in (new, new.with_name(f"{new.name}-journal")):
            self._disk.remove(path)
        with closing(_connect(new)) as self._db, self._transaction():
            for statement in SCHEMA:
                self._change(statement)
            for key, value in _as_text(identity).items():
                self._insert("meta", {"key": key, "value": value})
            self._insert("versions", asdict(VersionRecord(0, VersionKind.BASE, 0, at=time.time())))
            self._change(f"PRAGMA user_version = {SCHEMA_VERSION}")
        self._disk.rename(new, self._path)
        self._disk.sync_folder(self._path.parent)

    def _open(self, identity: Identity) -> None:
        self._check("quick_check")
        found = self._rows("PRAGMA user_version")[0][0]
        if found > SCHEMA_VERSION:
            raise VersionMismatch(
                "written by newer software",
                where=self._path,
                got=f"format {found}",
                wanted=f"format {SCHEMA_VERSION}",
                do="Use the fedmerge version that wrote it, or a newer one.",
            )
        if found != SCHEMA_VERSION:
            raise StoreDamaged("not a ledger", where=self._path)
        self._compare(identity)
        self._change("PRAGMA journal_mode = WAL")

    def _compare(self, identity: Identity) -> None:
        stored = dict(map(tuple, self._rows("SELECT key, value FROM meta")))
        for key, wanted in _as_text(identity).items():
            if stored.get(key) != wanted:
                raise ConfigError(
                    f"this state folder was made with another {key}",
                    where=self._path.parent,
                    got=wanted,
                    wanted=stored.get(key),
                    do="Start with the settings it was made with, or name another state folder.",
                )

    def _check(self, pragma: str) -> None:
        found = [tuple(row) for row in self._rows(f"PRAGMA {pragma}")]
        if found not in ([], [("ok",)]):
            raise StoreDamaged("not an intact database", where=self._path, got=str(found[0][0])[:200])

    # Reading and writing

    def _rows(self, sql: str, *values: object) -> list[sqlite3.Row]:
        with self._lock, self._typed_errors():
            return self._db.execute(sql, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All changes of the block, or none; one inside another is part of it."""
        with self._lock, self._typed_errors():
            if self._db.in_transaction:
                yield
                return
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._change("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def _change(self, sql: str, *values: object) -> None:
        """One step of the disk."""
        with self._typed_errors(), self._disk.changing(f"sql {' '.join(sql.split()[:3])} in", self._path):
            self._db.execute(sql, values)

    def _insert(self, table: str, row: Mapping[str, object]) -> None:
        columns = ", ".join(f'"{name}"' for name in row)
        marks = ", ".join("?" * len(row))
        self._change(f"INSERT INTO {table} ({columns}) VALUES ({marks})", *row.values())

    def _insert_version(self, version: VersionRecord) -> None:
        following = self.current().number + 1
        if version.number != following:
            raise StateError("not the next version", got=str(version.number), wanted=str(following))
        self._insert("versions", asdict(version))

    def _move(self, update: str, expect: UpdateState, change: str, *values: object) -> None:
        found = self._existing(update).state
        if found is not expect:
            raise StateError(f"update {update} is in another state", got=found, wanted=expect)
        self._change(f"UPDATE updates SET {change} WHERE id = ?", *values, update)

    def _existing(self, update: str) -> UpdateRecord:
        found = self.update(update)
        if found is None:
            raise NotFound("no such update", got=ascii(update[:80]))
        return found

    def _existing_version(self, number: int) -> VersionRecord:
        found = self.version(number)
        if found is None:
            raise NotFound("no such version", got=str(number))
        return found

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _typed(error, self._path) from error
        except OverflowError as error:
            raise NotFound("no such number", wanted="one below 2^63") from error


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    db.row_factory = sqlite3.Row
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA synchronous = FULL")
    return db


def _typed(error: sqlite3.Error, path: Path) -> FedmergeError:
    if isinstance(error, sqlite3.ProgrammingError):
        return StateError("the ledger is closed", where=path, got=str(error))
    kind, what = KINDS.get(error.sqlite_errorcode & 0xFF, (StoreError, "cannot be used"))
    return kind(what, where=path, got=str(error))


def _as_text(identity: Identity) -> dict[str, str]:
    options = json.dumps(dict(identity.options), sort_keys=True)
    return {"base": identity.base, "rule": identity.rule, "options": options}


def _update(row: sqlite3.Row) -> UpdateRecord:
    found: dict[str, Any] = dict(row)
    return UpdateRecord(**found | {"state": UpdateState(row["state"]), "kept": bool(row["kept"])})


def _version(row: sqlite3.Row) -> VersionRecord:
    found: dict[str, Any] = dict(row)
    return VersionRecord(**found | {"kind": VersionKind(row["kind"]), "kept": bool(row["kept"])})
