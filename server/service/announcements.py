"""The current version, followed in one thread for all who watch."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

from fedmerge.common.errors import FedmergeError, Unreachable
from fedmerge.common.records import AggregationService, VersionRecord

logger = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0
"""Before the aggregator is asked again after an error."""


class Announcements:
    """Tells watchers of one event loop about new versions, however many they are.

    The thread ends with the aggregator's own stream, and begins anew when that fails; it holds nothing up
    when the process ends.
    """

    def __init__(self, aggregator: AggregationService) -> None:
        self._aggregator, self._loop = aggregator, asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self._latest: VersionRecord | None = None
        self._ended = False
        threading.Thread(target=self._follow, name="fedmerge-announcements", daemon=True).start()

    async def above(self, number: int) -> VersionRecord:
        """The current version, as soon as it is above ``number``.

        Raises:
            Unreachable: the server stops.
        """
        while not self._ended:
            if self._latest is not None and self._latest.number > number:
                return self._latest
            await self._changed.wait()
        raise Unreachable("the server stops", do="Watch again once it is back.")

    def end(self) -> None:
        """Sends every watcher away."""
        self._ended = True
        self._changed.set()

    def _follow(self) -> None:
        while not self._follow_to_the_end():
            time.sleep(PAUSE_SECONDS)
        self._call(self.end)

    def _follow_to_the_end(self) -> bool:
        """Announces versions; False if the aggregator could not tell them any more."""
        try:
            for record in self._aggregator.watch(-1):
                if not self._call(self._announce, record):
                    break
        except FedmergeError as error:
            logger.warning("new versions are not announced for now: %s", error)
            return self._ended
        return True

    def _call(self, function: object, *args: object) -> bool:
        """Runs a function in the event loop; False if that is over."""
        try:
            self._loop.call_soon_threadsafe(function, *args)  # type: ignore[arg-type]
        except RuntimeError:
            return False
        return True

    def _announce(self, record: VersionRecord) -> None:
        self._latest = record
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
