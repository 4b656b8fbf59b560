"""A reverse proxy that lets sites reach the SuperLink's Fleet API, and nothing else of it.

A SuperLink serves its Fleet, Control and Runtime APIs on one port, and the Control API asks for no
identity: whoever reaches it can run code on every site. So the SuperLink listens on loopback, and sites
talk to this proxy. A request passes if its method and path are on the list as they were sent; nothing is
decoded or normalized before the comparison, so there is no second way of writing a path.

Bodies are passed on as they come, so memory does not grow with their size.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import ssl
import threading
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, cast
from urllib.parse import urlsplit

import h11
import httpx
import typer
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedmerge.common.errors import ConfigError, FedmergeError
from fedmerge.common.logs import log_to_stderr
from fedmerge.common.tls import TlsFiles, check, is_loopback, read_certificate, require_tls
from fedmerge.deploy.launch.config import Address, FilePath, Section, read_config

logger = logging.getLogger("fedmerge.launch.proxy")

FLEET = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
HEALTH = b"/health"

MAX_BODY_BYTES = 16 << 20
"""Flower cuts arrays into chunks of 5 MiB and sends each in a request of its own."""

MAX_CONNECTIONS = 1024

HEAD_SECONDS = 10.0
"""From a connection's start, or a request's first byte, to the end of its head."""

IDLE_SECONDS = 30.0
"""Between two parts of a body."""

REQUEST_SECONDS = 300.0
"""From a request's head to the end of its answer."""

KEEP_SECONDS = 15
"""An open connection waits so long for the next request: longer than SuperNodes keep theirs."""

REUSE_SECONDS = 2.0
"""A connection to the SuperLink is used again within this: sooner than the SuperLink closes it."""

STOP_SECONDS = 5

HEADERS = (b"content-type", b"content-length", b"accept", b"accept-encoding", b"user-agent")
FLOWER_HEADERS = (b"flwr-", b"x-flwr-")
NOT_PASSED_BACK = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"upgrade", b"trailer", b"server", b"date"}
)


class _ClientGone(Exception):
    """The client closed its connection in the middle of a body."""


class Fleet:
    """The ASGI application: decides on every request, and passes it on or refuses it.

    Attributes:
        counts: requests passed on, and refused by reason.
    """

    def __init__(self, upstream: str, trust: ssl.SSLContext | bool) -> None:
        self.counts: Counter[str] = Counter()
        self._upstream, self._trust = upstream, trust
        self._client: httpx.AsyncClient

    async def serve(self, server: uvicorn.Server, listener: socket.socket) -> None:
        """Serves on an open socket until the server is told to stop."""
        async with httpx.AsyncClient(
            base_url=self._upstream,
            verify=self._trust,
            trust_env=False,
            timeout=httpx.Timeout(IDLE_SECONDS, read=REQUEST_SECONDS),
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS, keepalive_expiry=REUSE_SECONDS),
        ) as self._client:
            await server.serve(sockets=[listener])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope)
        if refusal is not None:
            await self._refuse(scope, send, *refusal)
            return
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                response = await self._client.send(self._request(scope, receive), stream=True)
        except _ClientGone:
            self.counts["client gone"] += 1
        except TimeoutError:
            await self._refuse(scope, send, 504, "too slow")
        except httpx.HTTPError as error:
            await self._refuse(scope, send, 502, f"no answer from the SuperLink ({type(error).__name__})")
        else:
            await self._answer(scope, response, send)

    def refused(self, reason: str, **facts: object) -> None:
        """Counts a refusal, and tells it in one line of JSON."""
        self.counts[reason] += 1
        logger.warning("%s", json.dumps({"event": "refused", "reason": reason, **facts}))

    async def _refuse(self, scope: Scope, send: Send, status: int, reason: str) -> None:
        """Closes the connection: the rest of a body is not read. SuperNodes try again after 502 and 504."""
        target = scope["raw_path"][:200].decode("latin-1")
        peer = ":".join(map(str, scope["client"] or ()))
        self.refused(reason, status=status, peer=peer, method=scope["method"][:20], path=target)
        text = f"{reason}\n".encode()
        headers = [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", b"%d" % len(text)),
            (b"connection", b"close"),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    def _request(self, scope: Scope, receive: Receive) -> httpx.Request:
        passed = [
            (key, value)
            for key, value in scope["headers"]
            if key in HEADERS or key.startswith(FLOWER_HEADERS)
        ]
        return self._client.build_request(
            scope["method"],
            scope["raw_path"].decode("ascii"),
            headers=passed,
            content=_body(receive) if scope["method"] == "POST" else None,
        )

    async def _answer(self, scope: Scope, response: httpx.Response, send: Send) -> None:
        headers = [(key.lower(), value) for key, value in response.headers.raw]
        headers = [pair for pair in headers if pair[0] not in NOT_PASSED_BACK]
        try:
            async with asyncio.timeout(REQUEST_SECONDS):
                start = {"type": "http.response.start", "status": response.status_code, "headers": headers}
                await send(start)
                async for chunk in response.aiter_raw():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body"})
            self.counts["passed"] += 1
        except (TimeoutError, httpx.HTTPError) as error:  # uvicorn closes the unfinished connection
            self.refused("answer broken off", path=scope["path"], error=type(error).__name__)
        finally:
            await response.aclose()


def _refusal(scope: Scope) -> tuple[int, str] | None:
    """Status and reason, or None for a request that may pass. Heads are well-formed: h11 has parsed them."""
    headers = dict(scope["headers"])
    path, method = scope["raw_path"], scope["method"]
    health = path == HEALTH and method in ("GET", "HEAD")
    if not health and not (FLEET.fullmatch(path) and method == "POST"):
        return 403, "not the Fleet API"
    if scope["query_string"] or scope["http_version"] != "1.1" or b"upgrade" in headers:
        return 403, "a query, an upgrade, or not HTTP/1.1"
    if b"transfer-encoding" in headers or (b"content-length" in headers) == health:
        return 403 if health else 411, "a body without a length, or where none belongs"
    if int(headers.get(b"content-length", b"0")) > MAX_BODY_BYTES:
        return 413, "too large"
    return None


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        async with asyncio.timeout(IDLE_SECONDS):
            message = await receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        more = message.get("more_body", False)
        yield message.get("body", b"")


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with bounds on what it leaves open: connections, and the time for a head."""

    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._fleet.refused("too many connections")
            transport.abort()
        else:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_slow)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()
        elif self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._close_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        self._fleet.refused("not HTTP", peer=":".join(map(str, self.client or ())))
        super().send_400_response(msg)

    @property
    def _fleet(self) -> Fleet:
        return cast(Fleet, self.config.app)

    def _close_slow(self) -> None:
        self._fleet.refused("head too slow", peer=":".join(map(str, self.client or ())))
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class ProxyTls(TlsFiles):
    """The proxy's own certificate; clients need none, their SuperNode keys identify them."""

    ca: FilePath
    cert: FilePath
    key: FilePath


class ProxyConfig(Section):
    """A proxy's settings, as in its TOML file.

    Attributes:
        listen: where sites reach it; without ``tls`` on loopback alone.
        upstream: the SuperLink: ``https://127.0.0.1:8000``, or ``http`` on loopback.
        upstream_ca: who signed the SuperLink's certificate.
    """

    listen: Address
    upstream: str
    tls: ProxyTls | None = None
    upstream_ca: FilePath | None = None


class FleetProxy:
    """A proxy in a thread of its own, or in this one.

    Raises:
        ConfigError: TLS is missing where it is needed, or files do not fit together.
        FileError: a certificate or key cannot be read.
    """

    def __init__(
        self,
        host: str,
        port: int,
        upstream: str,
        tls: TlsFiles | None,
        upstream_ca: Path | None,
    ) -> None:
        require_tls(host, tls)
        if tls is not None:
            check(tls)
        self._address = (host, port)
        self._fleet = Fleet(upstream, _trust(upstream, upstream_ca))
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._fleet,
                interface="asgi3",
                http=BoundedProtocol,
                ws="none",
                lifespan="off",
                proxy_headers=False,
                server_header=False,
                access_log=False,
                log_config=None,
                timeout_keep_alive=KEEP_SECONDS,
                timeout_graceful_shutdown=STOP_SECONDS,
                ssl_certfile=tls.cert if tls else None,
                ssl_keyfile=tls.key if tls else None,
            )
        )
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None

    @property
    def counts(self) -> Counter[str]:
        """Requests passed on, under ``passed``, and refused, by reason."""
        return self._fleet.counts

    @property
    def port(self) -> int:
        """The port it listens on, once it has been started."""
        assert self._listener is not None, "started"
        return cast(int, self._listener.getsockname()[1])

    def start(self) -> None:
        """Serves in a thread; when this returns, connections are taken.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        listener = self._listener = self._listen()
        serve = self._fleet.serve(self._server, listener)
        self._thread = threading.Thread(target=asyncio.run, args=(serve,), name="fleet-proxy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Lets requests under way finish, for a few seconds, and returns when all is closed."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    def run(self) -> None:
        """Serves in this thread, until SIGINT or SIGTERM in a main thread. Raises as :meth:`start`."""
        self._listener = self._listen()
        asyncio.run(self._fleet.serve(self._server, self._listener))

    def _listen(self) -> socket.socket:
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        where = "{}:{}".format(*self._address)
        try:
            listener = socket.create_server(self._address, family=family, backlog=MAX_CONNECTIONS)
        except OSError as error:
            raise ConfigError("cannot listen", where=where, got=error.strerror) from error
        logger.info("sites reach the SuperLink's Fleet API at %s", where)
        return listener


def _trust(upstream: str, ca: Path | None) -> ssl.SSLContext | bool:
    """Whose certificate the SuperLink must show; False for plain HTTP."""
    address = urlsplit(upstream)
    if address.scheme == "https" and ca is not None:
        read_certificate(ca)
        return ssl.create_default_context(cafile=ca)
    if address.scheme == "http" and ca is None and is_loopback(address.hostname or ""):
        return False
    raise ConfigError(
        "not a SuperLink to pass requests on to",
        got=upstream,
        wanted="https:// with upstream_ca, or http:// on loopback without",
    )


def main(config: Annotated[Path, typer.Option(help="A TOML file of the proxy's settings.")]) -> None:
    """Let sites reach the SuperLink's Fleet API, and nothing else of it."""
    log_to_stderr()
    try:
        chosen = read_config(ProxyConfig, config)
        listen = chosen.listen
        FleetProxy(listen.host, listen.port, chosen.upstream, chosen.tls, chosen.upstream_ca).run()
    except FedmergeError as error:
        typer.echo(f"error ({type(error).__name__}): {error}", err=True)
        raise SystemExit(2) from error


if __name__ == "__main__":
    typer.run(main)
