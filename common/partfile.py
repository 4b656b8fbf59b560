"""A file that arrives in pieces: after an interruption, only what is missing need come."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from fedmerge.common.errors import FileError
from fedmerge.common.hashing import SHA256

READ_BYTES = 1 << 20


class PartFile:
    """The first bytes of a file to come; they stay beside the target, under a hidden name that tells of
    which file they are, until all are there. Every method raises FileError if the disk does not do it, or
    while somebody else has the same file on its way.

    Attributes:
        sha256: of the whole file, 64 hex digits; empty before it is known.
        size: bytes that are there.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.sha256, self.size = "", 0
        self._hash = hashlib.sha256()
        self._path: Path | None = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> PartFile:
        """Takes up what an earlier attempt left."""
        for path in self._target.parent.glob(glob.escape(f".{self._target.name}.") + "*.part"):
            self._open(path, path.name.split(".")[-2])
            break
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def expect(self, sha256: str, offset: int) -> None:
        """The bytes of a file from ``offset`` on come next; what they do not continue is dropped."""
        if not SHA256.fullmatch(sha256):
            raise FileError("not a SHA-256", where=self._target, got=ascii(sha256[:80]))
        if (sha256, offset) != (self.sha256, self.size):
            self.drop()
            self._open(self._target.with_name(f".{self._target.name}.{sha256}.part"), sha256)

    def append(self, chunk: bytes | memoryview) -> None:
        assert self._file is not None
        with self._writing():
            self._file.write(chunk)
        self._hash.update(chunk)
        self.size += len(chunk)

    def finish(self) -> None:
        """Gives the file its name, durable and verified, over whatever had it.

        Raises:
            FileError: the bytes are not those that were announced; they are dropped.
        """
        assert self._file is not None
        assert self._path is not None
        if self._hash.hexdigest() != self.sha256:
            got = self._hash.hexdigest()
            self.drop()
            raise FileError(
                "the bytes were damaged on their way",
                where=self._target,
                got=f"SHA-256 {got[:16]}",
                wanted=self.sha256[:16],
                do="Fetch it again.",
            )
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())
            self._path.replace(self._target)

    def drop(self) -> None:
        """Forgets what is there."""
        if self._file is not None and self._path is not None:
            self._file.close()
            self._path.unlink(missing_ok=True)
        self._file, self._path = None, None
        self._hash, self.size = hashlib.sha256(), 0

    def _open(self, path: Path, sha256: str) -> None:
        self._path, self.sha256 = path, sha256
        with self._writing():
            self._file = path.open("ab+")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.seek(0)
            while chunk := self._file.read(READ_BYTES):
                self._hash.update(chunk)
                self.size += len(chunk)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except BlockingIOError as error:
            raise FileError("it is being fetched already", where=self._target) from error
        except OSError as error:
            raise FileError("cannot be written", where=self._target, got=error.strerror) from error
