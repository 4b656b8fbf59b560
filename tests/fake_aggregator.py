"""An aggregator without merging: every update becomes the next version at once. Files are real."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

from fedmerge.common.errors import FileError, NotFound, StateError
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
from fedmerge.server.service.access import Caller, Role


@dataclass
class Opened:
    """A version's file."""

    record: VersionRecord
    path: Path
    size: int
    sha256: str


class Incoming:
    """An upload; what is written lies in a file of its own until it is finished."""

    def __init__(self, aggregator: FakeAggregator, site: str, size: int, sha256: str) -> None:
        self._aggregator, self._site, self._size, self._sha256 = aggregator, site, size, sha256
        self.known = aggregator.receipt(update_id(site, sha256))
        self.path = aggregator.incoming / f"{uuid4().hex}.part"
        self._file = self.path.open("xb", buffering=0)
        self._hash = hashlib.sha256()

    def write(self, chunk: bytes) -> None:
        self._aggregator.on_write(len(chunk))
        self._hash.update(chunk)
        self._file.write(chunk)

    def finish(self) -> Receipt:
        if self._hash.hexdigest() != self._sha256:
            raise FileError("the bytes are not those announced", where=f"update of {self._site}")
        os.fsync(self._file.fileno())
        receipt = self._aggregator.take_in(self._site, self.path, self._size, self._sha256)
        self._aggregator.on_reply()
        return receipt

    def discard(self) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


class FakeAggregator:
    """Implements ``records.AggregationService`` and what the service needs beside it.

    ``gone`` is released when an upload has left, finished or not, and its part file is removed.
    ``on_write`` is called with each chunk's size before it is written, ``on_reply`` after a commit and
    before its receipt, ``on_status`` when a status is asked for; a test may block or raise in them.
    """

    def __init__(self, folder: Path, *, held: bool = False) -> None:
        self.folder, self.incoming, self._held = folder, folder / "incoming", held
        self.incoming.mkdir(parents=True, exist_ok=True)
        self.changed = threading.Condition(threading.RLock())
        self.gone = threading.Semaphore(0)
        self.on_write: Callable[[int], None] = lambda size: None
        self.on_reply: Callable[[], None] = lambda: None
        self.on_status: Callable[[], None] = lambda: None
        self.calls: Counter[str] = Counter()
        self.said_by: list[str] = []
        self._updates: dict[str, UpdateRecord] = {}
        self._versions = [VersionRecord(0, VersionKind.BASE, 0, 1.0)]
        self._closed = False

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    @contextmanager
    def receive(self, site: str, *, size: int, sha256: str) -> Iterator[Incoming]:
        self.calls["receive"] += 1
        upload = Incoming(self, site, size, sha256)
        try:
            yield upload
        finally:
            upload.discard()
            self.gone.release()

    def take_in(self, site: str, path: Path, size: int, sha256: str) -> Receipt:
        with self.changed:
            name = update_id(site, sha256)
            if name in self._updates:
                return replace(self._receipt(name), again=True)
            state = UpdateState.HELD if self._held else UpdateState.STAGED
            path.rename(self.folder / sha256)
            seq = len(self._updates) + 1
            self._updates[name] = UpdateRecord(
                seq, name, site, f"task-{seq}", state, sha256, size, 10, 0, 1.5, 2.0
            )
            if not self._held:
                self._merge(name)
            return self._receipt(name)

    def receipt(self, update: str) -> Receipt | None:
        with self.changed:
            return replace(self._receipt(update), again=True) if update in self._updates else None

    def parts(self) -> list[Path]:
        """Files of uploads that are not finished."""
        return list(self.incoming.iterdir())

    def submit(self, source: Path, *, site: str) -> Receipt:
        data = source.read_bytes()
        with self.receive(site, size=len(data), sha256=hashlib.sha256(data).hexdigest()) as upload:
            if upload.known:
                return upload.known
            upload.write(data)
            return upload.finish()

    def update(self, update: str) -> UpdateRecord:
        self.calls["update"] += 1
        if update not in self._updates:
            raise NotFound("no such update", got=repr(update))
        return self._updates[update]

    def updates(self, after: int = 0, limit: int = 100) -> list[UpdateRecord]:
        return [record for record in self._updates.values() if record.seq > after][:limit]

    def refusals(self, limit: int = 100) -> list[Refusal]:
        return [Refusal(3.0, "site-9", "", "ab" * 32, 7, "NonFinite", "NaN in a layer")][:limit]

    def status(self) -> Status:
        self.calls["status"] += 1
        self.on_status()
        options = {"alpha": 0.5, "diagonal": "cleared"}
        current = self._versions[-1]
        tasks = tuple(record.task for record in self._updates.values() if record.version)
        return Status(
            "0.1", "ab" * 32, "opcm", options, current.number, tasks, 0, 0, len(tasks), {"NonFinite": 1}
        )

    def version(self, number: int | None = None) -> VersionRecord:
        with self.changed:
            if number is None:
                return self._versions[-1]
            if not 0 <= number < len(self._versions):
                raise NotFound("no such version", got=number)
            return self._versions[number]

    def versions(self, after: int = 0, limit: int = 100) -> list[VersionRecord]:
        with self.changed:
            return self._versions[after + 1 :][:limit]

    @contextmanager
    def open_version(self, version: int | None = None, dtype: Dtype = "f32") -> Iterator[Opened]:
        self.calls["open"] += 1
        record = self.version(version)
        if record.number == 0:
            raise NotFound("the base is not sent", got="version 0")
        yield Opened(record, self.folder / record.sha256, record.size, record.sha256)

    def fetch(self, into: Path, version: int | None = None, dtype: Dtype = "f32") -> VersionRecord:
        with self.open_version(version, dtype) as opened:
            into.write_bytes(opened.path.read_bytes())
        return opened.record

    def roll_back(self, version: int, *, by: str) -> VersionRecord:
        self.said_by.append(by)
        source = self.version(version)
        return self._append(
            replace(source, number=len(self._versions), kind=VersionKind.ROLLBACK, parent=version, by=by)
        )

    def remove(self, task: str, *, by: str) -> VersionRecord:
        self.said_by.append(by)
        if task not in self.status().tasks:
            raise NotFound("no such task", got=task)
        return self._append(
            replace(
                self._versions[-1], number=len(self._versions), kind=VersionKind.REMOVAL, task=task, by=by
            )
        )

    def approve(self, update: str, *, by: str) -> Receipt:
        self.said_by.append(by)
        with self.changed:
            if self.update(update).state is not UpdateState.HELD:
                raise StateError("not held", where=update)
            self._merge(update)
            return self._receipt(update)

    def reject(self, update: str, *, by: str, reason: str = "") -> None:
        self.said_by.append(by)
        with self.changed:
            if self.update(update).state is not UpdateState.HELD:
                raise StateError("not held", where=update)
            self._updates[update] = replace(self._updates[update], state=UpdateState.REJECTED, reason=reason)

    def watch(self, after: int) -> Iterator[VersionRecord]:
        while True:
            with self.changed:
                self.changed.wait_for(lambda known=after: self._closed or self._versions[-1].number > known)
                if self._closed:
                    return
                latest = self._versions[-1]
            yield latest
            after = latest.number

    def _merge(self, name: str) -> None:
        update = self._updates[name]
        number = len(self._versions)
        self._updates[name] = replace(update, state=UpdateState.MERGED, version=number)
        self._append(
            VersionRecord(
                number,
                VersionKind.MERGE,
                number - 1,
                4.0,
                name,
                update.task,
                update.site,
                merges=number,
                sha256=update.sha256,
                size=update.size,
            )
        )

    def _append(self, record: VersionRecord) -> VersionRecord:
        with self.changed:
            self._versions.append(record)
            self.changed.notify_all()
        return record

    def _receipt(self, name: str) -> Receipt:
        record = self._updates[name]
        return Receipt(name, record.state, record.version)


class FakeAccess:
    """Callers are who they say they are in metadata, with the roles given here."""

    def __init__(self, *roles: Role) -> None:
        self._roles = frozenset(roles or Role)

    def caller(self, context: object) -> Caller:
        names = dict(context.invocation_metadata() or ())  # type: ignore[attr-defined]
        return Caller(str(names.get("fedmerge-site", "somebody")), self._roles)
