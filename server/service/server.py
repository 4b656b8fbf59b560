"""The gRPC service: one aggregator behind any number of listeners."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from fedmerge.common.address import UNIX, host_of
from fedmerge.common.buffers import GRPC_WINDOW, recycle_buffers
from fedmerge.common.errors import ConfigError
from fedmerge.common.messages import CHUNK_BYTES, FRAME_BYTES
from fedmerge.common.tls import is_loopback
from fedmerge.protos.fedmerge.v1 import aggregator_pb2_grpc
from fedmerge.server.metrics import Metrics
from fedmerge.server.service.access import Access
from fedmerge.server.service.announcements import Announcements
from fedmerge.server.service.guard import Guard
from fedmerge.server.service.servicer import ROLES, SERVICE, AggregatorServicer, Backend
from fedmerge.server.service.settings import ServiceSettings
from fedmerge.server.service.threads import Threads

HEALTH_SECONDS = 1.0
"""For telling those who watch our health that we stop; one that does not read must not hold us up."""

SPARE_CALLS = 64
"""Calls beyond the settings' that are taken on to be refused in words; gRPC drops further ones."""


@dataclass(frozen=True)
class Listener:
    """Where to listen, and what decides who calls.

    Attributes:
        address: ``host:port``, port 0 for any free one, or ``unix:/path/to/socket``.
        credentials: None for no TLS, which only loopback addresses and unix sockets may do without.
    """

    address: str
    access: Access
    credentials: grpc.ServerCredentials | None = None


async def serve(
    aggregator: Backend,
    listeners: Sequence[Listener],
    settings: ServiceSettings,
    stop: asyncio.Event,
    started: Callable[[tuple[str, ...]], None],
    metrics: Metrics | None = None,
) -> None:
    """Serves until ``stop`` is set, then lets calls under way end. Leaves the aggregator open.

    Args:
        started: called with the addresses, in the order of the listeners, once all of them answer.

    Raises:
        ConfigError: an address that cannot be used; nothing is left listening.
    """
    recycle_buffers()
    threads = Threads(settings.uploads + settings.pulls + settings.calls)
    announcements = Announcements(aggregator)
    servicer = AggregatorServicer(aggregator, settings, threads, announcements, metrics or Metrics())
    doors = [_Door(listener, servicer, settings) for listener in listeners]
    try:
        started(tuple([await door.open() for door in doors]))
        await stop.wait()
    finally:
        announcements.end()
        await asyncio.gather(*(door.close(settings.stop_seconds) for door in doors))
        threads.close()


class _Door:
    """One listener at work."""

    def __init__(self, listener: Listener, servicer: AggregatorServicer, settings: ServiceSettings) -> None:
        self._listener = listener
        self._guard = Guard(listener.access, SERVICE, ROLES, settings)
        self._server = grpc.aio.server(
            interceptors=[self._guard],
            options=_options(settings),
            maximum_concurrent_rpcs=_most_calls(settings),
        )
        self._health = health_aio.HealthServicer()
        aggregator_pb2_grpc.add_AggregatorServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection([SERVICE, reflection.SERVICE_NAME], self._server)

    async def open(self) -> str:
        """Listens and says where."""
        address = self._bind()
        await self._server.start()
        for name in ("", SERVICE):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return address

    async def close(self, grace_seconds: float) -> None:
        """Says that it does not serve any more, and ends what takes longer than it may."""
        with suppress(TimeoutError):
            async with asyncio.timeout(HEALTH_SECONDS):
                await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_seconds)
        await self._guard.ended()

    def _bind(self) -> str:
        address, credentials = self._listener.address, self._listener.credentials
        host = host_of(address)
        if credentials is None and not is_loopback(host):
            raise ConfigError(
                "an address that others can reach needs TLS",
                where=address,
                do="Give it a certificate, or listen on 127.0.0.1.",
            )
        try:
            if credentials is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                "cannot listen", where=address, do="Is another server running, or the path too long?"
            ) from error
        return address if address.startswith(UNIX) else f"{host}:{port}"


class Service:
    """The service in a thread of its own, for a process whose main thread does something else.

    Serves from entering to leaving the context. ``addresses`` are those of the listeners, in order.
    """

    def __init__(
        self,
        aggregator: Backend,
        listeners: Sequence[Listener],
        settings: ServiceSettings | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self._aggregator, self._listeners = aggregator, tuple(listeners)
        self._settings, self._metrics = settings or ServiceSettings(), metrics
        self._started: Future[tuple[str, ...]] = Future()
        self._thread = threading.Thread(target=self._run, name="fedmerge-service", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._stop: asyncio.Event
        self.addresses: tuple[str, ...] = ()

    def __enter__(self) -> Service:
        """Raises ConfigError if a listener's address cannot be used."""
        self._thread.start()
        self.addresses = self._started.result()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Returns once calls under way have ended or have been cut off; harmless when it has stopped."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._started.done():
                raise
            self._started.set_exception(error)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await serve(
            self._aggregator,
            self._listeners,
            self._settings,
            self._stop,
            self._started.set_result,
            self._metrics,
        )


def _options(settings: ServiceSettings) -> list[tuple[str, int]]:
    keepalive = round(settings.keepalive_seconds * 1000)
    return [
        *GRPC_WINDOW,
        ("grpc.max_receive_message_length", CHUNK_BYTES + FRAME_BYTES),
        ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a partner
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", round(settings.keepalive_timeout * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
    ]


def _most_calls(settings: ServiceSettings) -> int:
    return settings.uploads + settings.pulls + settings.watchers + settings.calls + SPARE_CALLS
