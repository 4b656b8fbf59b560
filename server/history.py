"""Everything that happened in a run, in order: who, what, how much, how long."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class History:
    """A list of events, each a flat record with ``at`` (seconds since the start) and ``event``.

    Args:
        listener: called with every event as it happens; for progress bars and logs.
    """

    def __init__(self, listener: Callable[[Event], None] = lambda _: None) -> None:
        self._started = time.monotonic()
        self._listener = listener
        self.events: list[Event] = []

    def record(self, event: str, **facts: Any) -> None:
        """Appends one event."""
        entry = {"at": round(time.monotonic() - self._started, 3), "event": event, **facts}
        self.events.append(entry)
        self._listener(entry)

    def of(self, event: str) -> list[Event]:
        """All events of one kind."""
        return [entry for entry in self.events if entry["event"] == event]

    def save(self, path: Path) -> None:
        """Writes one JSON object per line."""
        path.write_text("".join(json.dumps(entry) + "\n" for entry in self.events))
