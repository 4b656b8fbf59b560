"""Faults F1, F2, F4 and F7 on the store: killed, out of space, damaged, opened twice.

The work is two updates received, merged and one taken out, from an empty folder on. It is stopped
before each of its steps in turn, however many there are. Whatever happened, what was acknowledged is
there, every file that the ledger names is whole, and the work goes on to the same end.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from resource import RLIM_INFINITY, RLIMIT_FSIZE, getrlimit, setrlimit

import pytest
import store_child
from store_child import FailingDisk, Store, history, opened, work

from fedmerge.common.errors import FedmergeError, StoreDamaged, StoreError, StoreFull, StoreLocked
from fedmerge.server.store.blobs import Blobs
from fedmerge.server.store.disk import Disk
from fedmerge.server.store.ledger import Ledger
from fedmerge.server.store.lock import hold

KNOWN_FILES = {"lock", "ledger.sqlite", "ledger.sqlite-wal", "ledger.sqlite-shm"}


@contextmanager
def child(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, store_child.__file__, *map(str, arguments)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def killed_runs(variant: str, loss: str, root: Path) -> Iterator[Path]:
    """The folder that each kill leaves, one step later each, until the work finishes."""
    with child("kill", variant, loss, root) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for nth in count(1):
            print(nth, file=process.stdin, flush=True)
            answer = process.stdout.readline().strip()
            assert answer in ("killed", "done"), f"step {nth}: {answer}"
            yield root / str(nth)
            if answer == "done":
                return


def acknowledged(folder: Path) -> list[str]:
    log = folder.with_name(f"{folder.name}.acknowledged")
    return log.read_text().splitlines() if log.exists() else []


def torn(folder: Path, promised: list[str], wanted: object) -> str:
    """What is wrong with a store that was stopped, and cannot go on; empty if nothing is."""
    try:
        with opened(folder, Disk()) as store:
            return lost(store, promised) or unsound(store, folder) or unfinished(store, wanted)
    except FedmergeError as error:
        return f"{type(error).__name__}: {error}"


def lost(store: Store, promised: list[str]) -> str:
    ledger = store.ledger
    there = {f"update {update.id}" for update in ledger.updates(0, 100)}
    there |= {f"version {version.number}" for version in ledger.versions(0, 100)}
    there |= {"snapshot" for _ in ledger.snapshots()} | {"refusal" for _ in ledger.refusals(1)}
    return "".join(f"lost {what}. " for what in promised if what not in there)


def unsound(store: Store, folder: Path) -> str:
    store.ledger.integrity_check()
    updates, versions = store.ledger.updates(0, 100), store.ledger.versions(0, 100)
    if [version.number for version in versions] != list(range(1, len(versions) + 1)):
        return "versions with a gap"
    merged = {version.update: version.number for version in versions if version.update}
    for update in updates:
        if update.version != merged.get(update.id):
            return f"{update.id} is {update.state} and version {merged.get(update.id)} has merged it"
    named = {update.sha256 for update in updates} | {version.sha256 for version in versions}
    named |= {version.snapshot for version in store.ledger.snapshots()}
    for sha256 in named:
        store.blobs.verify(sha256)
    found = {path for path in folder.rglob("*") if path.is_file() and path.name not in KNOWN_FILES}
    strays = found - {store.blobs.path(sha256) for sha256 in named}
    return f"left over: {sorted(strays)}" if strays else ""


def unfinished(store: Store, wanted: object) -> str:
    work(store, lambda _: None)
    return "" if history(store) == wanted else "the work ends otherwise"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> object:
    """What the ledger says after the whole work."""
    with opened(tmp_path_factory.mktemp("unbroken"), Disk()) as store:
        work(store, lambda _: None)
        return history(store)


@pytest.mark.parametrize("loss", ["nothing", "bytes", "names"])
def test_a_kill_before_any_step_tears_nothing(loss: str, tmp_path: Path, unbroken: object) -> None:
    runs = list(killed_runs("sound", loss, tmp_path))
    assert any(list(folder.glob("incoming/*.part")) for folder in runs) or loss == "names"
    found = {folder.name: torn(folder, acknowledged(folder), unbroken) for folder in runs}
    assert {step: problem for step, problem in found.items() if problem} == {}
    print(f"losing {loss}: 0 torn of {len(runs) - 1}")
    assert len(runs) > 60
    assert len(acknowledged(runs[-1])) == 7


@pytest.mark.parametrize(
    ("variant", "loss", "problem"),
    [
        ("two transactions", "nothing", "is staged and version 1 has merged it"),
        ("acknowledged early", "nothing", "lost update"),
        ("unsynced files", "bytes", "not what was written"),
        ("unsynced folders", "names", "cannot be read|lost|is missing"),
    ],
)
def test_the_kill_harness_finds_a_planted_bug(
    variant: str, loss: str, problem: str, tmp_path: Path, unbroken: object
) -> None:
    runs = killed_runs(variant, loss, tmp_path)
    found = next(filter(None, (torn(folder, acknowledged(folder), unbroken) for folder in runs)), "")
    runs.close()  # type: ignore[attr-defined]
    assert re.search(problem, found)


def stopped_by(disk: FailingDisk, folder: Path, wanted: object) -> str:
    """Works until the disk fails, goes on once it is mended, and tells what is wrong then."""
    promised: list[str] = []
    try:
        with opened(folder, disk) as store:
            problem = goes_on(store, disk, promised, wanted)
    except FedmergeError as error:  # while opening
        problem = "" if isinstance(error, StoreFull) else str(error)
    return problem or torn(folder, promised, wanted)


def goes_on(store: Store, disk: FailingDisk, promised: list[str], wanted: object) -> str:
    try:
        with suppress(StoreFull):
            work(store, promised.append)
            return "no error" if disk.failed else ""
        disk.mend()
        return lost(store, promised) or unfinished(store, wanted)
    except FedmergeError as error:
        return f"not usable any more: {error}"


@pytest.mark.parametrize(
    ("code", "lasting"), [(errno.EIO, False), (errno.ENOSPC, True)], ids=["EIO once", "ENOSPC for long"]
)
def test_a_disk_that_fails_at_any_step_acknowledges_nothing_and_recovers(
    code: int, lasting: bool, tmp_path: Path, unbroken: object
) -> None:
    problems = {}
    for nth in count(1):
        disk = FailingDisk(nth, code, lasting)
        problem = stopped_by(disk, tmp_path / str(nth), unbroken)
        if problem:
            problems[nth, disk.failed] = problem
        if not disk.failed:
            break
    assert problems == {}
    assert nth > 60


class ForgetsRenames(FailingDisk):
    """The planted bug: nobody hears of a rename that failed."""

    def rename(self, source: Path, target: Path) -> None:
        with suppress(StoreFull):
            super().rename(source, target)


class KeepsTransactions(Ledger):
    """The planted bug: a failed transaction is neither ended nor undone."""

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        if not self._db.in_transaction:
            self._db.execute("BEGIN IMMEDIATE")
        yield
        self._change("COMMIT")


def test_the_disk_harness_finds_a_lost_error(tmp_path: Path, unbroken: object) -> None:
    runs = (
        stopped_by(ForgetsRenames(n, errno.EIO, False), tmp_path / str(n), unbroken) for n in range(1, 60)
    )
    assert any("cannot be read" in problem for problem in runs)


def test_the_disk_harness_finds_a_missing_rollback(
    tmp_path: Path, unbroken: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ledger, "_transaction", KeepsTransactions._transaction)
    runs = (stopped_by(FailingDisk(n, errno.EIO, False), tmp_path / str(n), unbroken) for n in range(1, 90))
    assert next(filter(None, runs), "")


def largest_file(size: int) -> None:
    """From here on the system itself writes no file beyond ``size`` bytes."""
    setrlimit(RLIMIT_FSIZE, (size, getrlimit(RLIMIT_FSIZE)[1]))


@pytest.fixture
def any_size() -> Iterator[None]:
    yield
    largest_file(RLIM_INFINITY)


@pytest.mark.usefixtures("any_size")
def test_a_short_write_is_finished(tmp_path: Path) -> None:
    class Roomier(Disk):
        writes = 0

        def step(self, name: str) -> None:
            self.writes += name.startswith("write")
            largest_file(1000 if self.writes == 1 else RLIM_INFINITY)

    disk, payload = Roomier(), os.urandom(3000)
    blob = Blobs(tmp_path, disk).write(lambda file: file.write(payload))
    assert disk.writes == 2
    assert blob.sha256 == hashlib.sha256(payload).hexdigest()


@pytest.mark.usefixtures("any_size")
def test_a_file_whose_write_failed_cannot_be_sealed(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, Disk())
    with blobs.receive(10_000) as incoming:
        largest_file(1000)
        with pytest.raises(StoreFull, match="File too large"):
            incoming.write(bytes(3000))
        largest_file(RLIM_INFINITY)
        incoming.write(bytes(3000))
        with pytest.raises(StoreFull):
            incoming.seal()
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.usefixtures("any_size")
def test_a_ledger_that_runs_out_of_room_keeps_what_it_has(tmp_path: Path) -> None:
    with opened(tmp_path, Disk()) as store:
        for nth in range(2000):
            if nth == 3:
                largest_file((tmp_path / "ledger.sqlite-wal").stat().st_size + 20_000)
            before = store.ledger.acts(5000)
            try:
                store.ledger.add_act(float(nth), "admin", "note", "x" * 1000)
            except StoreFull:
                break
        assert store.ledger.acts(5000) == before
        largest_file(RLIM_INFINITY)
        store.ledger.add_act(0.0, "admin", "note", "after")
        assert store.ledger.acts(5000)[1:] == before
        store.ledger.integrity_check()
    assert 3 < nth < 100


# F2: bytes on disk that nobody wrote


def rewrite(path: Path, change: Callable[[bytearray], object]) -> None:
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: rewrite(path, lambda data: data.clear()),
    "truncated": lambda path: rewrite(path, lambda data: data.pop()),
    "longer": lambda path: rewrite(path, lambda data: data.append(0)),
    "zeroed": lambda path: rewrite(path, lambda data: data.__setitem__(slice(None), bytes(len(data)))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_blob_is_named(damage: str, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, Disk())
    hurt, whole = (blobs.write(lambda file, data=data: file.write(data)) for data in (b"hurt", b"whole"))
    DAMAGES[damage](blobs.path(hurt.sha256))
    with pytest.raises(StoreDamaged, match=hurt.sha256) as caught:
        blobs.verify(hurt.sha256)
    assert caught.value.where == blobs.path(hurt.sha256)
    blobs.verify(whole.sha256)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    chance = random.Random(seed)
    blobs = Blobs(tmp_path, Disk())
    blob = blobs.write(lambda file: file.write(chance.randbytes(100_000)))
    path = blobs.path(blob.sha256)
    for _ in range(200):
        place, bit = chance.randrange(100_000), 1 << chance.randrange(8)
        rewrite(path, lambda data, place=place, bit=bit: data.__setitem__(place, data[place] ^ bit))
        with pytest.raises(StoreDamaged):
            blobs.verify(blob.sha256)
        rewrite(path, lambda data, place=place, bit=bit: data.__setitem__(place, data[place] ^ bit))
    blobs.verify(blob.sha256)


def test_sending_a_damaged_blob_again_mends_it(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path, Disk())
    blob = blobs.write(lambda file: file.write(b"vector"))
    DAMAGES["zeroed"](blobs.path(blob.sha256))
    assert blobs.write(lambda file: file.write(b"vector")) == blob
    blobs.verify(blob.sha256)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.clear(),
        lambda data: data.__setitem__(slice(0, 100), bytes(100)),
        lambda data: data.__setitem__(slice(None), b"not a database" * 1000),
        lambda data: data.__delitem__(slice(8192, None)),
        lambda data: data.__setitem__(slice(4096, None), b"\xff" * (len(data) - 4096)),
    ],
    ids=["empty", "header zeroed", "another file", "truncated", "pages overwritten"],
)
def test_a_damaged_ledger_is_refused_and_no_blob_is_lost(
    damage: Callable[[bytearray], object], tmp_path: Path
) -> None:
    with opened(tmp_path, Disk()) as store:
        work(store, lambda _: None)
    blobs = sorted(tmp_path.glob("blobs/*/*"))
    rewrite(tmp_path / "ledger.sqlite", damage)
    with pytest.raises(StoreDamaged, match=r"ledger\.sqlite"), opened(tmp_path, Disk()):
        pass
    assert sorted(tmp_path.glob("blobs/*/*")) == blobs


def test_a_lost_ledger_does_not_take_the_blobs_along(tmp_path: Path) -> None:
    with opened(tmp_path, Disk()) as store:
        work(store, lambda _: None)
    (tmp_path / "ledger.sqlite").unlink()
    with pytest.raises(StoreDamaged, match="missing"), opened(tmp_path, Disk()):
        pass
    assert len(list(tmp_path.glob("blobs/*/*"))) == 5


# F7: two servers on one state folder


def test_a_second_holder_is_refused_with_the_first_one_named(tmp_path: Path) -> None:
    with child("hold", tmp_path) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "held\n"
        with (
            pytest.raises(StoreLocked, match=rf"{re.escape(str(tmp_path))}.*process {first.pid}\b"),
            hold(tmp_path),
        ):
            pass
        first.kill()
        first.wait()
        with hold(tmp_path):
            pass


def test_a_second_holder_in_the_same_process_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "state"
    with hold(folder):
        assert folder.stat().st_mode & 0o777 == 0o700
        with pytest.raises(StoreLocked, match=f"process {os.getpid()}"), hold(folder):
            pass
        with pytest.raises(StoreLocked), hold(folder):
            pass
    with hold(folder):
        pass


def test_a_folder_that_cannot_be_used_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="file"), hold(tmp_path / "file"):
        pass
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError), hold(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()
