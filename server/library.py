"""The files of a state folder that updates, versions and snapshots are in: written, read, and let go.

A file stays while the ledger names it or somebody reads it. It is verified before it is served, and taken
to be intact for an hour after that.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import torch

from fedmerge.common import vectorfile
from fedmerge.common.errors import FedmergeError, NotKept
from fedmerge.common.hashing import hash_file
from fedmerge.common.records import Dtype, UpdateRecord, VersionRecord
from fedmerge.server.retention import Retention, expired_versions, replay_floor
from fedmerge.server.store.blobs import Blob, Blobs, Incoming
from fedmerge.server.store.ledger import Ledger

VERIFY_SECONDS = 3600.0
"""How long a file that was found intact is taken to be so."""


@dataclass(frozen=True)
class Published:
    """A version's merged vector as a file that stays while it is open; ``sha256`` of the file."""

    record: VersionRecord
    path: Path
    size: int
    sha256: str


class Library:
    """Files and the ledger that names them. Every method may be called from any thread.

    Attributes:
        naming: held while a file is sealed and named, so that it is not taken for one that nobody needs.
    """

    def __init__(self, ledger: Ledger, blobs: Blobs) -> None:
        self._ledger, self._blobs = ledger, blobs
        self.naming = Lock()
        self._rounding = Lock()
        self._rounded: dict[str, Blob] = {}
        self._readers: Counter[str] = Counter()
        self._intact: dict[str, float] = {}

    # In

    def receive(self, limit: int) -> AbstractContextManager[Incoming]:
        """Takes in a file of at most ``limit`` bytes. Raises StoreFull."""
        return self._blobs.receive(limit)

    def write(self, writer: Callable[[BinaryIO], object]) -> Blob:
        """Stores what ``writer`` writes. Raises StoreFull, and whatever the writer raises."""
        blob = self._blobs.write(writer)
        self._intact[blob.sha256] = time.monotonic()
        return blob

    def commit(self, enter: Callable[[], None], *sha256s: str) -> None:
        """Names new files in one transaction; if it fails, they go again."""
        with self.naming:
            try:
                enter()
            except BaseException:
                for sha256 in sha256s:
                    self.discard_unnamed(sha256)
                raise

    # Out

    @contextmanager
    def open(self, version: VersionRecord, dtype: Dtype) -> Iterator[Published]:
        """A version's file; nothing removes it while inside.

        Raises:
            NotKept: dropped by retention. StoreDamaged: its bytes are not what was written.
        """
        with self._reading(version.sha256):
            current = self._ledger.version(version.number)
            require_kept(current or version)
            self.require_intact(version.sha256)
            if dtype == "bf16":
                yield self._in_bfloat16(version)
            else:
                path = self._blobs.path(version.sha256)
                yield Published(version, path, version.size, version.sha256)

    def require_intact(self, sha256: str) -> None:
        """Raises StoreDamaged, naming the file."""
        if time.monotonic() - self._intact.get(sha256, -math.inf) > VERIFY_SECONDS:
            self._blobs.verify(sha256)
            self._intact[sha256] = time.monotonic()

    def total_bytes(self) -> int:
        """Of the whole state folder."""
        return self._blobs.total_bytes()

    # Away

    def expire(self, retention: Retention) -> None:
        """Lets go of what need not be kept: old versions, snapshots, and vectors no replay takes."""
        for number in expired_versions(self._ledger, retention.versions):
            version = self._ledger.version(number)
            assert version is not None
            self._ledger.drop_blob(number)
            self.discard(version.sha256)
        floor = replay_floor(self._ledger, retention)
        for version in self._ledger.snapshots():
            if version.number < floor:
                self._ledger.drop_snapshot(version.number)
                self.discard(version.snapshot)
        for update in self._ledger.vectors_up_to(floor):
            self.forget(update)

    def forget(self, update: UpdateRecord) -> None:
        """Drops an update's vector; its row stays."""
        self._ledger.forget_vector(update.id)
        self.discard(update.sha256)

    def discard(self, sha256: str) -> None:
        """Removes a file that nothing names any more."""
        with self.naming:
            self.discard_unnamed(sha256)

    def discard_unnamed(self, sha256: str) -> None:
        """The same for callers that hold ``naming``. What cannot be removed now is at the next start."""
        with suppress(FedmergeError, OSError):
            if not self._readers[sha256] and not self._ledger.names(sha256):
                self._blobs.discard(sha256)
                self._path_in_bfloat16(sha256).unlink(missing_ok=True)
                self._rounded.pop(sha256, None)
                self._intact.pop(sha256, None)

    @contextmanager
    def _reading(self, sha256: str) -> Iterator[None]:
        with self.naming:
            self._readers[sha256] += 1
        try:
            yield
        finally:
            with self.naming:
                self._readers[sha256] -= 1
                if not self._readers[sha256]:
                    del self._readers[sha256]
                self.discard_unnamed(sha256)

    def _in_bfloat16(self, version: VersionRecord) -> Published:
        """The merged vector in bfloat16, made when it is first asked for."""
        path = self._path_in_bfloat16(version.sha256)
        with self._rounding:
            found = self._rounded.get(version.sha256)
            if found is None or not path.exists():
                vector = vectorfile.load(self._blobs.path(version.sha256))
                vectorfile.save(vector, path, dtype=torch.bfloat16)
                found = self._rounded[version.sha256] = hashed(path)
        return Published(version, path, found.size, found.sha256)

    def _path_in_bfloat16(self, sha256: str) -> Path:
        return self._blobs.cache / f"{sha256}.bf16.safetensors"


def require_kept(version: VersionRecord) -> None:
    """Raises NotKept for a version whose merged vector retention has dropped."""
    if not version.kept:
        raise NotKept(
            "its merged vector was not kept",
            where=f"version {version.number}",
            do="The setting 'versions' says how many are kept.",
        )


def hashed(path: Path) -> Blob:
    """Hash and size of a file. Raises FileError."""
    return Blob(*hash_file(path))
