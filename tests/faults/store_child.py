"""A server's work on its store, in processes that are killed before their n-th step.

    python store_child.py kill VARIANT LOSS ROOT    for every number n on stdin: works in ROOT/n in a
                                                    process of its own, killed before its n-th step;
                                                    answers "killed" or "done"
    python store_child.py hold FOLDER               says "held" once it holds the folder, until killed

LOSS is what the power takes along: nothing, the bytes of unsynced files, or unsynced names.
What the work was told is durable stands in ROOT/n.acknowledged, one line each.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from fedmerge.common.records import (
    Refusal,
    UpdateRecord,
    UpdateState,
    VersionKind,
    VersionRecord,
    update_id,
)
from fedmerge.server.store.blobs import Blobs
from fedmerge.server.store.disk import Disk, DiskFile
from fedmerge.server.store.ledger import Identity, Ledger
from fedmerge.server.store.lock import hold

IDENTITY = Identity("b" * 64, "opcm", {"alpha": 0.5})
PAYLOADS = (b"first" * 900, b"second" * 1100)
CHUNK_BYTES = 3000
REFUSAL = Refusal(1.0, "site", "task", "c" * 64, 7, "NonFinite", "layer 'x': NaN")

Acknowledge = Callable[[str], None]


@dataclass
class Store:
    ledger: Ledger
    blobs: Blobs


@contextmanager
def opened(folder: Path, disk: Disk, kind: type[Ledger] = Ledger) -> Iterator[Store]:
    """A store as a server opens it."""
    with hold(folder):
        ledger = kind(folder, IDENTITY, disk)
        try:
            blobs = Blobs(folder, disk)
            blobs.sweep(ledger.names)
            yield Store(ledger, blobs)
        finally:
            ledger.close()


def work(store: Store, acknowledge: Acknowledge) -> None:
    """Two updates arrive and are merged, one is taken out; goes on from wherever it was stopped."""
    for number, payload in enumerate(PAYLOADS):
        submit(store, f"site-{number}", payload, acknowledge)
        while store.ledger.next_staged():
            merge(store, acknowledge)
    if not version(store, 2).snapshot:
        snapshot = store.blobs.write(lambda file: file.write(b"state"))
        store.ledger.set_snapshot(2, snapshot.sha256, snapshot.size)
        acknowledge("snapshot")
    if store.ledger.current().number == 2:
        remove(store, acknowledge)
    if not store.ledger.refusal_counts():
        store.ledger.add_refusal(REFUSAL)
        acknowledge("refusal")


def submit(store: Store, site: str, payload: bytes, acknowledge: Acknowledge) -> None:
    sha256 = hashlib.sha256(payload).hexdigest()
    if store.ledger.update(update_id(site, sha256)) is not None:
        return
    with store.blobs.receive(len(payload)) as incoming:
        for start in range(0, len(payload), CHUNK_BYTES):
            incoming.write(payload[start : start + CHUNK_BYTES])
        blob = incoming.seal()
    update = store.ledger.add_update(
        site, f"task-{site}", UpdateState.STAGED, blob.sha256, blob.size, 10, 0, 1.0, at=1.0
    )
    acknowledge(f"update {update.id}")


def merge(store: Store, acknowledge: Acknowledge) -> None:
    update, current = store.ledger.next_staged(), store.ledger.current()
    assert update is not None
    taken = [sha256 for sha256 in (current.sha256, update.sha256) if sha256]
    for sha256 in taken:
        store.blobs.verify(sha256)
    payload = b"".join(store.blobs.path(sha256).read_bytes() for sha256 in taken)
    blob = store.blobs.write(lambda file: header_last(file, payload))
    merged = VersionRecord(
        current.number + 1,
        VersionKind.MERGE,
        current.number,
        at=1.0,
        update=update.id,
        task=update.task,
        site=update.site,
        merges=current.merges + 1,
        sha256=blob.sha256,
        size=blob.size,
    )
    store.ledger.commit_merge(merged)
    acknowledge(f"version {merged.number}")


def remove(store: Store, acknowledge: Acknowledge) -> None:
    first = version(store, 1)
    without = replace(
        version(store, 2),
        number=3,
        kind=VersionKind.REMOVAL,
        parent=2,
        update="",
        task=first.task,
        snapshot="",
    )
    store.ledger.commit_act(without, [first.update])
    acknowledge("version 3")


def version(store: Store, number: int) -> VersionRecord:
    found = store.ledger.version(number)
    assert found is not None
    return found


def header_last(file: BinaryIO, payload: bytes) -> None:
    """As task vectors are written."""
    file.seek(8)
    file.write(payload)
    file.seek(0)
    file.write(len(payload).to_bytes(8, "little"))


def history(store: Store) -> tuple[object, ...]:
    """All that a ledger says."""
    ledger = store.ledger
    return ledger.updates(0, 100), ledger.versions(0, 100), ledger.refusals(100), ledger.acts(100)


class FailingDisk(Disk):
    """Fails at its n-th step, once or until it is mended."""

    def __init__(self, nth: int, code: int, lasting: bool) -> None:
        self.steps = 0
        self.failed = ""
        self._nth, self._code, self._lasting = nth, code, lasting

    def step(self, name: str) -> None:
        self.steps += 1
        if self.steps == self._nth or (self.failed and self._lasting):
            self.failed = self.failed or name
            raise OSError(self._code, os.strerror(self._code))

    def mend(self) -> None:
        self._nth, self._lasting = 0, False


class KillingDisk(Disk):
    """Kills the process before its n-th step; the power may take along what is not synced.

    Args:
        loss: ``nothing``, as when only the process dies; ``bytes`` of files written and not synced, whose
            names are there; ``names`` made and not synced, whose files are gone or as they were before.
    """

    def __init__(self, nth: int, loss: str) -> None:
        self._left = nth
        self._loss = loss
        self._unsynced: set[Path] = set()
        self._names: defaultdict[Path, dict[Path, bytes | None]] = defaultdict(dict)

    def step(self, name: str) -> None:
        self._left -= 1
        if self._left == 0:
            self._lose()
            os.kill(os.getpid(), signal.SIGKILL)

    def create(self, path: Path) -> DiskFile:
        file = super().create(path)
        self._unsynced.add(path)
        self._names[path.parent][path] = None
        return file

    def sync(self, file: DiskFile) -> None:
        super().sync(file)
        self._unsynced.discard(file.path)

    def sync_folder(self, folder: Path) -> None:
        super().sync_folder(folder)
        self._names.pop(folder, None)

    def make_folder(self, folder: Path) -> None:
        if not folder.exists():
            self._names[folder.parent][folder] = None
        super().make_folder(folder)

    def rename(self, source: Path, target: Path) -> None:
        before = target.read_bytes() if target.exists() else None
        super().rename(source, target)
        self._names[target.parent].setdefault(target, before)
        if source in self._unsynced:
            self._unsynced.remove(source)
            self._unsynced.add(target)

    def _lose(self) -> None:
        if self._loss == "bytes":
            for path in self._unsynced:
                with suppress(FileNotFoundError):
                    os.truncate(path, 0)
        if self._loss == "names":
            for path, before in [item for names in self._names.values() for item in names.items()]:
                restore(path, before)


def restore(path: Path, before: bytes | None) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if before is not None:
        path.write_bytes(before)


# Planted bugs: each must be found by the harness that finds nothing in the store itself.


class TwoTransactions(Ledger):
    """Enters a version, and only then marks its update."""

    def commit_merge(self, version: VersionRecord) -> None:
        with self._transaction():
            self._insert_version(version)
        with self._transaction():
            values = (UpdateState.MERGED, version.number)
            self._move(version.update, UpdateState.STAGED, "state = ?, version = ?", *values)


class UnsyncedFiles(KillingDisk):
    def sync(self, file: DiskFile) -> None:
        self.step("sync")


class UnsyncedFolders(KillingDisk):
    def sync_folder(self, folder: Path) -> None:
        self.step("sync the folder")


class AcknowledgesEarly(Ledger):
    """Leaves the commit of an update to the next transaction."""

    early = False

    def add_update(self, *args: Any, **more: Any) -> UpdateRecord:
        self.early = True
        try:
            return super().add_update(*args, **more)
        finally:
            self.early = False

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if self._db.in_transaction:
            self._change("COMMIT")
        with super()._transaction():
            yield

    def _change(self, sql: str, *values: object) -> None:
        if not (self.early and sql == "COMMIT"):
            super()._change(sql, *values)


VARIANTS: dict[str, tuple[type[Ledger], type[KillingDisk]]] = {
    "sound": (Ledger, KillingDisk),
    "two transactions": (TwoTransactions, KillingDisk),
    "acknowledged early": (AcknowledgesEarly, KillingDisk),
    "unsynced files": (Ledger, UnsyncedFiles),
    "unsynced folders": (Ledger, UnsyncedFolders),
}


def work_until_killed(kind: type[Ledger], disk: Disk, folder: Path) -> None:
    log = os.open(f"{folder}.acknowledged", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with opened(folder, disk, kind) as store:
        work(store, lambda what: os.write(log, f"{what}\n".encode()))
    os._exit(0)


def serve(variant: str, loss: str, root: Path) -> None:
    ledger, disk = VARIANTS[variant]
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            work_until_killed(ledger, disk(int(line), loss), root / line.strip())
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print({0: "done", -signal.SIGKILL: "killed"}.get(status, f"failed {status}"), flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "hold":
        with hold(Path(sys.argv[2])):
            print("held", flush=True)
            sys.stdin.read()
    else:
        serve(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
