"""Large files in pieces: what a file consists of, and putting it together again on the other side.

A file travels as byte ranges of one size, the last one shorter. Its manifest holds the hash of the whole
and of every range. Ranges may arrive in any order and more than once; what has arrived survives a crash,
so that only the rest need be sent again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedmerge.common.errors import FileError, MismatchError, NotFound, StoreDamaged, StoreFull
from fedmerge.common.writing import replacing

MAX_MESSAGE_BYTES = 512_000_000
"""What one message, and so one range, may hold. Flower needs about three times as much memory for it."""

RANGE_BYTES = 128_000_000
"""A SuperLink forgets a message in one database transaction, and whoever writes meanwhile gives up after 5 s:
too short a time for 256 MB on a busy disk."""

BLOCK_BYTES = 1 << 20
HASH = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class RangeManifest:
    """What a file consists of.

    Attributes:
        size: bytes in all, at least 1. ``sha256``: of all of them.
        range_bytes: bytes per range, but for the last. ``hashes``: SHA-256 of every range, in order.

    Raises:
        MismatchError: numbers that contradict each other, or a range above ``MAX_MESSAGE_BYTES``.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    size: int
    sha256: str
    range_bytes: int
    hashes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.range_bytes <= MAX_MESSAGE_BYTES:
            raise MismatchError(
                "impossible sizes in a manifest",
                got=f"{self.size} bytes in ranges of {self.range_bytes}",
                wanted=f"at least 1 byte in ranges of 1 to {MAX_MESSAGE_BYTES}",
            )
        if len(self.hashes) != -(-self.size // self.range_bytes):
            raise MismatchError(
                "a manifest with another number of ranges than its sizes give", got=len(self.hashes)
            )
        if not all(HASH.fullmatch(found) for found in (self.sha256, *self.hashes)):
            raise MismatchError("a malformed hash in a manifest", wanted="64 hex digits")

    @classmethod
    def of(cls, path: Path, range_bytes: int = RANGE_BYTES) -> RangeManifest:
        """The manifest of a file that is not empty. Raises FileError."""
        size, whole, hashes = _hashed(path, range_bytes)
        return cls(size, whole, range_bytes, hashes)

    def span(self, index: int) -> tuple[int, int]:
        """First byte of a range and the one after its last. Raises MismatchError for a range it lacks."""
        if not 0 <= index < len(self.hashes):
            raise MismatchError("no such range", got=index, wanted=f"0 to {len(self.hashes) - 1}")
        begin = index * self.range_bytes
        return begin, min(begin + self.range_bytes, self.size)

    def read(self, path: Path, index: int) -> bytes:
        """One range of the file. Raises FileError if the file has gone or has become shorter."""
        begin, end = self.span(index)
        data = read_file(path, begin, end - begin)
        if len(data) != end - begin:
            raise FileError("the file has become shorter", where=path)
        return data


class RangeFile:
    """A file that is being put together at ``path``, which appears when it is complete and verified.

    Until then ``PATH.part`` holds the bytes and ``PATH.ranges`` the manifest and the ranges that are on
    disk. Opened again with the same manifest, it goes on; with another one, it begins anew.
    """

    def __init__(self, path: Path, manifest: RangeManifest) -> None:
        self.path, self.manifest = path, manifest
        self._part, self._record = part_of(path), record_of(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _read_record(self._record)
        if found is None or found[0] != manifest:
            self.discard()
        self._done = found[1] if found is not None and found[0] == manifest and self._part.exists() else set()
        self._write_record()

    @classmethod
    def resume(cls, path: Path, sha256: str) -> RangeFile:
        """Goes on with the file of that hash. Raises NotFound if another one, or none, is under way."""
        found = _read_record(record_of(path))
        if found is None or found[0].sha256 != sha256:
            raise NotFound("no transfer of this file is under way", where=path, got=sha256[:12])
        return cls(path, found[0])

    @property
    def missing(self) -> tuple[int, ...]:
        """Ranges that are not here yet, in order."""
        return tuple(index for index in range(len(self.manifest.hashes)) if index not in self._done)

    def write(self, index: int, data: bytes) -> None:
        """Puts one range in its place and onto the disk; once it is there, again does nothing.

        Raises:
            MismatchError: no such range, or other bytes than the manifest says.
            StoreFull: the disk did not take it; what was there before still is.
        """
        begin, end = self.manifest.span(index)
        if len(data) != end - begin or hashlib.sha256(data).hexdigest() != self.manifest.hashes[index]:
            raise MismatchError(
                "other bytes than the manifest says",
                where=f"range {index} of {self.path.name}",
                got=f"{len(data)} bytes",
                wanted=f"{end - begin} bytes with hash {self.manifest.hashes[index][:12]}",
            )
        if index in self._done:
            return
        try:
            _pwrite(self._part, data, begin)
            with self._record.open("a") as file:
                file.write(self._line(index))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StoreFull("a range cannot be written", where=self.path, got=error.strerror) from error
        self._done.add(index)

    def finish(self) -> Path:
        """Verifies the whole and gives it its name.

        Raises:
            MismatchError: ranges are missing.
            StoreDamaged: what is on disk is not what was written, or the manifest contradicts itself. The
                wrong ranges are missing from then on; all of them if none can be told.
        """
        if self.missing:
            raise MismatchError("ranges are missing", where=self.path, got=f"{len(self.missing)} missing")
        _, whole, hashes = _hashed(self._part, self.manifest.range_bytes)
        if (whole, hashes) != (self.manifest.sha256, self.manifest.hashes):
            wanted = enumerate(self.manifest.hashes)
            wrong = {index for index, range_hash in wanted if hashes[index : index + 1] != (range_hash,)}
            self._done = self._done - wrong if wrong else set()
            self._write_record()
            raise StoreDamaged(
                "what arrived is not what the manifest says",
                where=self.path,
                got=f"hash {whole[:12]}",
                wanted=self.manifest.sha256[:12],
            )
        self._part.replace(self.path)
        self._record.unlink()
        return self.path

    def discard(self) -> None:
        """Removes what has arrived."""
        self._part.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def _line(self, index: int) -> str:
        return f"{index} {self.manifest.hashes[index]}\n"

    def _write_record(self) -> None:
        lines = [json.dumps(asdict(self.manifest)) + "\n", *map(self._line, sorted(self._done))]
        with replacing(self._record) as file:
            file.write("".join(lines).encode())


def read_file(path: Path, begin: int = 0, size: int = -1) -> bytes:
    """Bytes of a file, all by default. Raises FileError."""
    try:
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(size)
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error


def _hashed(path: Path, range_bytes: int) -> tuple[int, str, tuple[str, ...]]:
    """Size, hash of the whole and of every range of a file, a block in memory at a time. Raises FileError."""
    whole, hashes, size = hashlib.sha256(), [], 0
    try:
        with path.open("rb") as file:
            while block := file.read(min(BLOCK_BYTES, range_bytes)):
                part, left = hashlib.sha256(), range_bytes
                while block:
                    part.update(block)
                    whole.update(block)
                    size, left = size + len(block), left - len(block)
                    block = file.read(min(BLOCK_BYTES, left))
                hashes.append(part.hexdigest())
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error
    return size, whole.hexdigest(), tuple(hashes)


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def record_of(path: Path) -> Path:
    return path.with_name(path.name + ".ranges")


def _read_record(path: Path) -> tuple[RangeManifest, set[int]] | None:
    """The manifest and the ranges written down there; None if there is nothing usable."""
    try:
        first, *rest = path.read_text().splitlines() or [""]
        manifest = TypeAdapter(RangeManifest).validate_json(first)
    except (OSError, UnicodeDecodeError, ValidationError, MismatchError):
        return None
    return manifest, set(_written(rest, manifest))


def _written(lines: Iterable[str], manifest: RangeManifest) -> Iterable[int]:
    """A line that a crash cut short does not end in the right hash and does not count."""
    for line in lines:
        number, _, found = line.partition(" ")
        if (
            number.isdecimal()
            and int(number) < len(manifest.hashes)
            and manifest.hashes[int(number)] == found
        ):
            yield int(number)


def _pwrite(path: Path, data: bytes, offset: int) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        left = memoryview(data)
        while left:
            written = os.pwrite(handle, left, offset)
            left, offset = left[written:], offset + written
        os.fsync(handle)
    finally:
        os.close(handle)
