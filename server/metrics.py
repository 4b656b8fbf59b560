"""What a server measures of itself, for Prometheus.

Labels come from closed lists, so that no site, task or peer can add a time series.

The aggregator and the service tell what happens (``received``, ``acknowledged``, ``refused``, ``merged``,
``took``, ...); what can be looked up at any time (version, queues, disk) is read from ``Status`` when
somebody asks.
"""

from __future__ import annotations

import shutil
import ssl
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from fedmerge.common import errors
from fedmerge.common.errors import ConfigError, FedmergeError
from fedmerge.common.records import Status
from fedmerge.common.tls import TlsFiles, is_loopback, require_tls

Step = Literal["admit", "absorb", "commit", "snapshot"]
"""Timed parts of an update's way: checks, the engine, the ledger, the engine's state to disk."""

SECONDS = (0.005, 0.02, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)

IDLE_SECONDS = 10.0
"""For what whoever connects to the endpoint has to send next."""

REASONS = frozenset(
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.FedmergeError)
)


class Metrics:
    """Counters, gauges and histograms of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter, gauge = self._counter, self._gauge
        self._updates = counter("updates", "Submissions by what became of them", "outcome")
        self._refusals = counter("refusals", "Refused submissions by error class", "reason")
        self._bytes = counter("bytes", "Payload bytes of updates in, of versions out", "direction")
        self._merge_seconds = self._histogram("merge_seconds", "From an update's turn to its commit")
        self._step_seconds = self._histogram("step_seconds", "Parts of an update's way", "step")
        self._uploads = gauge("uploads_active", "Uploads under way")
        self._watchers = gauge("watchers", "Open watch streams")
        self._sites = gauge("sites_connected", "SuperNodes that are online")

    def received(self, size: int) -> None:
        """Payload bytes came in, whether or not they are kept."""
        self._bytes.labels("in").inc(size)

    def sent(self, size: int) -> None:
        """Payload bytes of a version went out."""
        self._bytes.labels("out").inc(size)

    def acknowledged(self, *, again: bool = False, held: bool = False) -> None:
        """A submission was answered with a receipt; ``again``: it was known already."""
        self._updates.labels("again" if again else "held" if held else "acknowledged").inc()

    def refused(self, error: FedmergeError) -> None:
        """A submission was not let in."""
        name = type(error).__name__
        self._updates.labels("refused").inc()
        self._refusals.labels(name if name in REASONS else "other").inc()

    def failed(self) -> None:
        """The engine could not merge an acknowledged update."""
        self._updates.labels("failed").inc()

    def merged(self, seconds: float) -> None:
        """An update became part of a committed version, ``seconds`` after its turn came."""
        self._updates.labels("merged").inc()
        self._merge_seconds.observe(seconds)

    def took(self, step: Step, seconds: float) -> None:
        """One part of an update's way is done."""
        self._step_seconds.labels(step).observe(seconds)

    @contextmanager
    def upload(self) -> Iterator[None]:
        """An upload is under way while inside."""
        with self._uploads.track_inprogress():
            yield

    @contextmanager
    def watcher(self) -> Iterator[None]:
        """A watch stream is open while inside."""
        with self._watchers.track_inprogress():
            yield

    def sites_connected(self, count: int) -> None:
        """How many SuperNodes are online now."""
        self._sites.set(count)

    def follow(self, status: Callable[[], Status], folder: Path) -> None:
        """Also reports a server's status and its disk, read at every scrape."""
        self.registry.register(_StatusCollector(status, folder))

    @contextmanager
    def serve(self, host: str, port: int, tls: TlsFiles | None = None) -> Iterator[int]:
        """Answers ``GET /metrics`` while inside, to anybody who reaches the address; yields the port.

        Args:
            port: 0 for any free one.
            tls: for an address that others can reach; on loopback it is plain HTTP all the same.

        Raises:
            ConfigError: the address cannot be used.
        """
        require_tls(host, tls)
        secured = tls is not None and not is_loopback(host)
        cert, key = (str(tls.cert), str(tls.key)) if tls is not None and secured else (None, None)
        try:
            server, thread = start_http_server(port, host, self.registry, cert, key)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                "the metrics endpoint cannot listen",
                where=f"{host}:{port}",
                got=str(error),
                do="Choose another address in [metrics] listen, or leave it empty for none.",
            ) from error
        _bound(server)
        try:
            yield server.server_port
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"fedmerge_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"fedmerge_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str) -> Histogram:
        return Histogram(f"fedmerge_{name}", text, labels, registry=self.registry, buckets=SECONDS)


def _bound(server: WSGIServer) -> None:
    """Nobody who connects and then says nothing keeps others waiting: a handshake is its thread's affair."""
    if isinstance(server.socket, ssl.SSLSocket):
        server.socket.do_handshake_on_connect = False  # type: ignore[attr-defined]  # typeshed's gap
    handler = cast(type[WSGIRequestHandler], server.RequestHandlerClass)
    server.RequestHandlerClass = type(handler.__name__, (handler,), {"timeout": IDLE_SECONDS})


class _StatusCollector(Collector):
    """Gauges from one call of ``status``; a server that cannot answer is ``fedmerge_up 0``."""

    def __init__(self, status: Callable[[], Status], folder: Path) -> None:
        self._status, self._folder = status, folder

    def describe(self) -> Iterable[GaugeMetricFamily]:
        return []  # registering must not ask the server

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield _reading("state_free_bytes", "Space left for the state folder", self._free())
        try:
            now = self._status()
        except FedmergeError:
            yield _reading("up", "Whether the aggregator answers", 0)
            return
        yield _reading("up", "Whether the aggregator answers", 1)
        yield _reading("version", "The current version", now.version)
        yield _reading("queue", "Updates that wait for their turn", now.staged)
        yield _reading("held", "Updates that wait for approval", now.held)
        yield _reading("tasks", "Tasks in the current model", len(now.tasks))
        yield _reading("model_merges", "Vectors in the current model", now.merged)
        yield _reading("failing", "Whether merging stands still", bool(now.failing))
        yield _reading("state_bytes", "Bytes in the state folder", now.disk)
        yield _reading("start_time_seconds", "When the server started", now.started)

    def _free(self) -> int:
        try:
            return shutil.disk_usage(self._folder).free
        except OSError:
            return 0


def _reading(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"fedmerge_{name}", text, value=float(value))
