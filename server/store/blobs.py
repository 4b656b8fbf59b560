"""Files named by what is in them: complete, durable and read-only under their name, or not there."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from fedmerge.common.errors import NotFound, StoreDamaged, StoreError, StoreFull, TooLarge
from fedmerge.common.hashing import SHA256
from fedmerge.server.store.disk import Disk, DiskFile

BLOBS, INCOMING, CACHE = "blobs", "incoming", "cache"
SUFFIX = ".safetensors"
PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN})
"""What says nothing about a file that cannot be read."""


@dataclass(frozen=True)
class Blob:
    """A stored file: its SHA-256 as 64 hex digits, and its size in bytes."""

    sha256: str
    size: int


class Incoming:
    """A file on its way in, hashed as it is written.

    Attributes:
        path: where its bytes can be read until it is sealed.
        size: bytes written so far.
    """

    def __init__(self, blobs: Blobs, file: DiskFile, limit: int) -> None:
        self.path = file.path
        self.size = 0
        self._blobs = blobs
        self._file = file
        self._limit = limit
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """Of the bytes written so far."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes | memoryview) -> None:
        """Appends a chunk.

        Raises:
            TooLarge: more bytes than the limit; nothing of the chunk is written.
            StoreFull: the disk refuses it; the file can no longer be sealed.
        """
        size = self.size + memoryview(chunk).nbytes
        if size > self._limit:
            raise TooLarge("too many bytes", wanted=f"at most {self._limit}")
        self.size = size
        self._hash.update(chunk)
        self._file.write(chunk)

    def seal(self) -> Blob:
        """Gives the file its name; once this returns, it is durable. Only once.

        Raises:
            StoreFull: the disk refuses, or has refused a chunk before.
        """
        return self._blobs._seal(self._file, Blob(self.sha256, self.size))


class Blobs:
    """The files of a state folder. Every method may be called from any thread.

    A blob that nothing in the ledger names lasts until the next start only. So whoever seals one names
    it in the ledger, or discards it.

    Raises:
        StoreFull: the folders cannot be made.
    """

    def __init__(self, folder: Path, disk: Disk) -> None:
        self._folder = folder
        self._disk = disk
        for name in (BLOBS, INCOMING, CACHE):
            disk.make_folder(folder / name)

    @property
    def cache(self) -> Path:
        """A folder for files that can be made again; emptied by :meth:`sweep`."""
        return self._folder / CACHE

    @contextmanager
    def receive(self, limit: int) -> Iterator[Incoming]:
        """Takes in at most ``limit`` bytes; what is not sealed when the block ends is removed.

        Raises:
            StoreFull: the file cannot be made.
        """
        with self._part() as file:
            yield Incoming(self, file, limit)

    def write(self, writer: Callable[[BinaryIO], object]) -> Blob:
        """Stores what ``writer`` writes into a file, which it may do out of order.

        Raises:
            StoreFull: the disk refuses. Errors of ``writer`` come through; nothing is left then.
        """
        with self._part() as file:
            writer(file)
            return self._seal(file, Blob(_hash_of(file.path, StoreFull), _size_of(file)))

    def path(self, sha256: str) -> Path:
        """Where a blob is, if it is there. Raises NotFound for what is not a hash."""
        if not SHA256.fullmatch(sha256):
            raise NotFound("not the hash of a file", got=ascii(sha256[:80]), wanted="64 hex digits")
        return self._folder / BLOBS / sha256[:2] / f"{sha256}{SUFFIX}"

    def verify(self, sha256: str) -> None:
        """Reads a blob in full and compares.

        Raises:
            StoreDamaged: it is missing, cannot be read, or holds other bytes.
            StoreError: it cannot be read for now.
        """
        path = self.path(sha256)
        found = _hash_of(path, StoreDamaged)
        if found != sha256:
            raise StoreDamaged("not what was written", where=path, got=f"SHA-256 {found}", wanted=sha256)

    def discard(self, sha256: str) -> None:
        """Removes a blob, if it is there. Raises StoreFull if the disk refuses."""
        self._disk.remove(self.path(sha256))

    def sweep(self, keep: Callable[[str], bool]) -> list[Path]:
        """Removes what an earlier run left, and returns it; not while anything is being written.

        Goes: unfinished files, blobs whose hash ``keep`` turns down, and all of the cache. Files that no
        store has made stay.

        Raises:
            StoreFull: the disk refuses.
        """
        gone = [
            *(self._folder / INCOMING).glob("*.part"),
            *(path for path in (self._folder / CACHE).iterdir() if path.is_file()),
            *(path for path in (self._folder / BLOBS).glob(f"??/*{SUFFIX}") if self._is_stray(path, keep)),
        ]
        for path in gone:
            self._disk.remove(path)
        return gone

    def total_bytes(self) -> int:
        """Bytes of all files in the state folder."""
        total = 0
        for folder, _, names in os.walk(self._folder):
            for name in names:
                with suppress(FileNotFoundError):  # removed since it was listed
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    @contextmanager
    def _part(self) -> Iterator[DiskFile]:
        path = self._folder / INCOMING / f"{uuid4().hex}.part"
        file = self._disk.create(path)
        try:
            with file:
                yield file
        finally:
            if path.exists():
                with suppress(StoreFull):  # the next start removes it
                    self._disk.remove(path)

    def _seal(self, file: DiskFile, blob: Blob) -> Blob:
        """Replaces a blob of that name, so that sending it again mends one that has been damaged."""
        with file:
            if _size_of(file) != blob.size:
                raise StoreFull("a write has failed before", where=file.path)
            self._disk.sync(file)
        target = self.path(blob.sha256)
        self._disk.make_folder(target.parent)
        self._disk.rename(file.path, target)
        self._disk.sync_folder(target.parent)
        return blob

    def _is_stray(self, path: Path, keep: Callable[[str], bool]) -> bool:
        sha256 = path.name.removesuffix(SUFFIX)
        return bool(SHA256.fullmatch(sha256)) and path == self.path(sha256) and not keep(sha256)


def _hash_of(path: Path, failure: type[StoreError]) -> str:
    """``failure`` is raised if the file cannot be read, StoreError if that may pass by itself."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        kind = StoreError if error.errno in PASSING else failure
        raise kind("cannot be read", where=path, got=error.strerror) from error


def _size_of(file: DiskFile) -> int:
    return os.fstat(file.fileno()).st_size
