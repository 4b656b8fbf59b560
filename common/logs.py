"""What fedmerge says while it runs as somebody else's process: one line per record, text or JSON."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]
Form = Literal["text", "json"]

CONTROL = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0), 0x2028, 0x2029)}
"""Characters that could end a line or drive a terminal, to what is written for them."""


class OneLine(logging.Formatter):
    """Time, level, logger and message in one line; whatever a message holds cannot start another one."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).translate(CONTROL)


class JsonLine(logging.Formatter):
    """One JSON object per line: ``time`` (UTC), ``level``, ``logger``, ``message``, and ``error`` if any."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def log_to_stderr(level: Level = "info", form: Form = "text") -> None:
    """Sends fedmerge's own messages to standard error; the first call decides how.

    Others' records stay as they are, but for those that nobody handles: Python prints them, in the same form.
    """
    logger = logging.getLogger("fedmerge")
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLine() if form == "json" else OneLine())
    if logging.lastResort is not None:
        logging.lastResort.setFormatter(handler.formatter)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False
