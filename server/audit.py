"""The audit log: one JSON object per line for everything that was let in, refused or decided.

    {"at": "2026-01-31T09:30:00.000Z", "event": "merged", "who": "hospital-1", ..., "prev": "9c1e..."}

``prev`` is the SHA-256 of the line before, over rotated files too, so that a line changed, removed or
put in is noticed. What the log alone cannot show is that its newest lines or its oldest file are gone,
or that everything from one line on was written anew; for that, compare :attr:`Audit.head` with a copy
kept elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from fedmerge.common.errors import StoreDamaged, StoreFull

logger = logging.getLogger("fedmerge.server")

Fact = str | int | float | bool | None

START = "0" * 64
"""What the first line of all names as the line before."""

OWN_FIELDS = frozenset({"at", "event", "who", "prev"})
LONGEST_TEXT = 1000
MOST_FACTS = 32
LONGEST_LINE = 1 << 20
"""More bytes than texts and facts of those lengths can make."""


@dataclass(frozen=True)
class Chain:
    """What was verified: so many lines, up to the one with the hash ``head``."""

    lines: int
    head: str


class Audit:
    """Appends to an audit log; safe for threads, not for two processes.

    Args:
        path: the newest file; older ones are ``path.1``, ``path.2``, ..., readable by the owner alone.
        max_bytes: a file that reaches this is rotated. ``keep``: how many older files stay, at least 1.
        sync: whether a line is on disk before :meth:`record` returns.
    """

    def __init__(self, path: Path, *, max_bytes: int = 64 << 20, keep: int = 10, sync: bool = True) -> None:
        self._path, self._max_bytes, self._keep, self._sync = path, max_bytes, keep, sync
        self._lock = threading.Lock()
        self._file = _opened(path)
        torn = self._drop_torn_line()
        self._head = self._last_hash()
        if torn:
            self.record("torn", "audit", bytes=torn)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def head(self) -> str:
        """Hash of the newest line."""
        return self._head

    def record(self, event: str, who: str, **facts: Fact) -> None:
        """Appends one line. Texts are cut at 1,000 characters, and a private key among them is left out.

        Raises:
            StoreFull: it cannot be written; the log is as it was before.
        """
        assert not facts.keys() & OWN_FIELDS
        assert len(facts) <= MOST_FACTS
        entry = {"at": _now(), "event": event, "who": who, **facts}
        plain = {key: _plain(value) for key, value in entry.items()}
        with self._lock:
            line = json.dumps({**plain, "prev": self._head}).encode()
            try:
                if os.fstat(self._file).st_size >= self._max_bytes:
                    self._rotate()
                self._append(line + b"\n")
            except OSError as error:
                raise StoreFull("cannot be written", where=self._path, got=error.strerror) from error
            self._head = _digest(line)

    def note(self, event: str, who: str, **facts: Fact) -> None:
        """As :meth:`record`, for what has happened already and stands whether or not it can be written."""
        try:
            self.record(event, who, **facts)
        except StoreFull as error:
            logger.error("audit: %s", error)

    def close(self) -> None:
        """Further records raise StoreFull."""
        with self._lock:
            os.close(self._file)
            self._file = -1

    def _append(self, data: bytes) -> None:
        size = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, data)
            if written < len(data):
                raise OSError(None, "no space for a whole line")
            if self._sync:
                os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size)
            raise

    def _rotate(self) -> None:
        """At every step, the newest lines are under a name that :func:`verify` reads."""
        for number in range(self._keep, 0, -1):
            older = _numbered(self._path, number)
            if older.exists():
                older.replace(_numbered(self._path, number + 1))
        _numbered(self._path, self._keep + 1).unlink(missing_ok=True)
        self._path.replace(_numbered(self._path, 1))
        file = _opened(self._path)
        os.close(self._file)
        self._file = file

    def _drop_torn_line(self) -> int:
        """Cuts off what a kill left of a line that was never acknowledged; returns how many bytes."""
        tail = _tail(self._path)
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn:
            os.ftruncate(self._file, os.fstat(self._file).st_size - torn)
        return torn

    def _last_hash(self) -> str:
        for path in (self._path, _numbered(self._path, 1)):
            lines = _tail(path).splitlines()
            if lines:
                return _digest(lines[-1])
        return START


def verify(path: Path) -> Chain:
    """Checks that every line names the hash of the one before, from the oldest file kept to the newest.

    Raises:
        StoreDamaged: names the file and the line at which the chain breaks.
    """
    head = None if _numbered(path, 1).exists() else START
    count = 0
    for file, number, line in _lines(path):
        prev = _prev(line)
        if prev is None or prev != (head or prev):
            what = "not a whole line of the log" if prev is None else "the line before was changed or removed"
            raise StoreDamaged(what, where=f"{file}, line {number}")
        head, count = _digest(line), count + 1
    return Chain(count, head or START)


def _lines(path: Path) -> Iterator[tuple[Path, int, bytes]]:
    older = [file for file in path.parent.glob(f"{path.name}.*") if file.suffix[1:].isdecimal()]
    files = [*sorted(older, key=lambda file: -int(file.suffix[1:])), path]
    if len(files) == 1 and not path.exists():
        raise StoreDamaged("no audit log", where=path)
    for file in files:
        if file.exists():
            with file.open("rb") as stream:
                for number, line in enumerate(stream, start=1):
                    yield file, number, line.removesuffix(b"\n") if line.endswith(b"\n") else b""


def _prev(line: bytes) -> str | None:
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry.get("prev") if isinstance(entry, dict) else None


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise StoreFull("cannot be opened", where=path, got=error.strerror) from error


def _tail(path: Path) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LONGEST_LINE))
        return file.read()


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _digest(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _plain(value: Fact) -> Fact:
    if isinstance(value, str):
        return "(left out)" if "PRIVATE KEY" in value else value[:LONGEST_TEXT]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    assert value is None or isinstance(value, (int, float)), "facts are texts and numbers"
    return value
