"""SHA-256 of files."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from fedmerge.common.errors import FileError

SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def hash_file(path: Path) -> tuple[str, int]:
    """A file's SHA-256 as 64 hex digits, and its size in bytes. Raises FileError."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest(), file.tell()
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error
