"""Blocking calls from the event loop, so that none outlives what it works on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from functools import partial
from types import TracebackType
from typing import TypeVar

Result = TypeVar("Result")


class Threads:
    """A bounded number of threads for blocking calls."""

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="fedmerge-service")

    async def run(self, function: Callable[..., Result], *args: object) -> Result:
        """The function's result. If the caller is cancelled, it goes on once the function has ended."""
        running = asyncio.get_running_loop().run_in_executor(self._pool, function, *args)
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            raise

    @asynccontextmanager
    async def opened(self, opening: Callable[[], AbstractContextManager[Result]]) -> AsyncIterator[Result]:
        """A blocking context manager, opened and left in threads; ``opening`` makes it."""
        inside = ExitStack()
        try:
            yield await self.run(lambda: inside.enter_context(opening()))
        except BaseException as error:
            await self.run(inside.__exit__, type(error), error, error.__traceback__)
            raise
        await self.run(inside.close)

    def close(self) -> None:
        """Waits for what is running."""
        self._pool.shutdown()


class Lane:
    """Blocking calls of one transfer, one after another, the caller always one step ahead."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._running: asyncio.Task[object] | None = None

    async def __aenter__(self) -> Lane:
        return self

    async def start(self, function: Callable[..., object], *args: object) -> None:
        """Starts a call as soon as the one before has ended; raises what that one raised."""
        await self.done()
        self._running = asyncio.create_task(self._threads.run(partial(function, *args)))

    async def done(self) -> object:
        """What the last call returned; raises what it raised."""
        running, self._running = self._running, None
        return await running if running is not None else None

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._running is not None:
            await asyncio.gather(self._running, return_exceptions=True)
