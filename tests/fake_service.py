"""An aggregation service in memory, for tests of its callers: what is submitted is the next version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

from fedmerge.common.errors import FedmergeError, NotFound
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
from fedmerge.common.vectorfile import load


class FakeService:
    """Takes every well-formed vector that ``admit`` lets through; version N is the N-th update's bytes.

    Attributes:
        errors: raised by the next calls, one each, before anything is done. ``down``: raised by all.
        crash_after: whether the next submission is taken in, and its answer is then lost.
        calls: names of the methods called, in order.
    """

    def __init__(self, base: str, admit: Callable[[Path, str], None] = lambda path, site: None) -> None:
        self._base, self._admit = base, admit
        self.errors: dict[str, list[FedmergeError]] = {}
        self.down: FedmergeError | None = None
        self.crash_after = False
        self.calls: list[str] = []
        self.submitted: list[UpdateRecord] = []
        self.released: list[VersionRecord] = [VersionRecord(0, VersionKind.BASE, 0, 0.0)]
        self.files: dict[int, bytes] = {}

    def submit(self, source: Path, *, site: str) -> Receipt:
        self._call("submit")
        data = source.read_bytes()
        manifest = load(source).manifest
        self._admit(source, site)
        sha256 = hashlib.sha256(data).hexdigest()
        number = update_id(site, sha256)
        for record in self.submitted:
            if record.id == number:
                return Receipt(number, record.state, record.version, again=True)
        seq = len(self.submitted) + 1
        record = UpdateRecord(
            seq, number, site, manifest.task, UpdateState.MERGED, sha256, len(data), 1, 0, 1.0, 0.0, seq
        )
        self.submitted.append(record)
        self.release(data, update=number, task=manifest.task, site=site)
        if self.crash_after:
            self.crash_after = False
            raise SystemExit("killed between the acknowledgement and its arrival")
        return Receipt(number, UpdateState.MERGED, seq)

    def release(self, data: bytes, *, update: str = "", task: str = "", site: str = "") -> None:
        """Makes bytes the next version."""
        number = len(self.released)
        sha256 = hashlib.sha256(data).hexdigest()
        self.files[number] = data
        self.released.append(
            VersionRecord(
                number, VersionKind.MERGE, number - 1, 0.0, update, task, site, sha256=sha256, size=len(data)
            )
        )

    def updates(self, after: int = 0, limit: int = 100) -> list[UpdateRecord]:
        self._call("updates")
        return [record for record in self.submitted if record.seq > after][:limit]

    def update(self, update: str) -> UpdateRecord:
        self._call("update")
        for record in self.submitted:
            if record.id == update:
                return record
        raise NotFound("no such update")

    def version(self, number: int | None = None) -> VersionRecord:
        self._call("version")
        return self.released[-1 if number is None else number]

    def fetch(self, into: Path, version: int | None = None, dtype: Dtype = "f32") -> VersionRecord:
        self._call("fetch")
        record = self.version(version)
        if record.number not in self.files:
            raise NotFound("no such version")
        into.write_bytes(self.files[record.number])
        return record

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.down is not None:
            raise self.down
        if self.errors.get(name):
            raise self.errors[name].pop(0)

    def refusals(self, limit: int = 100) -> list[Refusal]:
        raise NotImplementedError

    def status(self) -> Status:
        raise NotImplementedError

    def versions(self, after: int = 0, limit: int = 100) -> list[VersionRecord]:
        raise NotImplementedError

    def roll_back(self, version: int, *, by: str) -> VersionRecord:
        raise NotImplementedError

    def remove(self, task: str, *, by: str) -> VersionRecord:
        raise NotImplementedError

    def approve(self, update: str, *, by: str) -> Receipt:
        raise NotImplementedError

    def reject(self, update: str, *, by: str, reason: str = "") -> None:
        raise NotImplementedError

    def watch(self, after: int) -> Iterator[VersionRecord]:
        raise NotImplementedError
