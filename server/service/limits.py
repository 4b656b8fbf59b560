"""Who must wait, who is turned away, who is cut off."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

from fedmerge.common.errors import Busy, TooSlow
from fedmerge.server.service.settings import ServiceSettings


class Slots:
    """At most ``most`` at a time of each name; who comes when all are taken is refused. Of one event loop."""

    def __init__(self, what: str, most: int) -> None:
        self._what, self._most = what, most
        self._taken: Counter[str] = Counter()

    @contextmanager
    def taken(self, name: str = "") -> Iterator[None]:
        """Takes a slot while inside. Raises Busy."""
        if self._taken[name] >= self._most:
            raise Busy(
                f"too many {self._what} at a time",
                where=name or None,
                wanted=f"at most {self._most}",
                do=f"Try again in {Busy.retry_after:.0f} seconds.",
            )
        self._taken[name] += 1
        try:
            yield
        finally:
            self._taken[name] -= 1
            if not self._taken[name]:
                del self._taken[name]


class Pace:
    """How long one transfer may keep us waiting.

    Only waiting for the other side counts, so that a slow disk of ours cuts nobody off.
    """

    def __init__(self, who: str, settings: ServiceSettings) -> None:
        self._who, self._settings = who, settings
        self._moved_bytes, self._waited_seconds = 0, 0.0

    def moved(self, size: int) -> None:
        """Payload bytes came or went."""
        self._moved_bytes += size

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Waits for the other side inside. Raises TooSlow."""
        clock = asyncio.get_running_loop().time
        started = clock()
        try:
            async with asyncio.timeout(self._left_seconds()):
                yield
        except TimeoutError:
            raise self._too_slow() from None
        finally:
            self._waited_seconds += clock() - started

    def _left_seconds(self) -> float:
        earned = self._settings.grace_seconds + self._moved_bytes / self._settings.min_bytes_per_second
        return max(0.0, min(self._settings.idle_seconds, earned - self._waited_seconds))

    def _too_slow(self) -> TooSlow:
        return TooSlow(
            "the transfer is too slow and was cut off",
            where=self._who,
            got=f"{self._moved_bytes} bytes in {self._waited_seconds:.0f} seconds",
            wanted=f"{self._settings.min_bytes_per_second} bytes per second, no pause over "
            f"{self._settings.idle_seconds:g} seconds",
            do="Try again over a better connection, or have the server's limits lowered.",
        )
