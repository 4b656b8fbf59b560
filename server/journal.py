"""A history for a server that never ends: on disk as it happens, not in memory."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from fedmerge.server.history import Event, History

FILE_BYTES = 64_000_000
FILES = 4
"""Older events than fit into so many files of that size, and the one being written, are dropped."""


class Journal(History):
    """Events as lines of JSON in a file; ``at`` is seconds since the epoch.

    Args:
        path: of the newest events; ``PATH.1`` to ``PATH.4`` hold older ones.
        listener: called with every event as it happens.
    """

    def __init__(self, path: Path, listener: Callable[[Event], None] = lambda _: None) -> None:
        super().__init__(listener)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = RotatingFileHandler(path, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8")

    def record(self, event: str, **facts: Any) -> None:
        """Writes one event down."""
        entry = {"at": round(time.time(), 3), "event": event, **facts}
        line = json.dumps(entry)
        self._file.emit(logging.LogRecord("journal", logging.INFO, "", 0, line, None, None))
        self._listener(entry)

    def close(self) -> None:
        self._file.close()
