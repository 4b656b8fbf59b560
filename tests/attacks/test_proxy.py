"""Does nothing but the Fleet API get through the proxy, however it is written?

The planted bug: a proxy that compares the beginning of the path and leaves the rest to its libraries.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from starlette.types import Scope

from fedmerge.common.errors import ConfigError, FileError
from fedmerge.common.tls import TlsFiles
from fedmerge.deploy.authority import Authority, tls_files
from fedmerge.deploy.launch import proxy as proxy_module
from fedmerge.deploy.launch.proxy import MAX_BODY_BYTES, FleetProxy

SECONDS = 20
FLEET = "/v1/fleet/pull-messages"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.create(tmp_path_factory.mktemp("proxy") / "certs", "lab")
    made.server(["fed.example.org"])
    made.site("hospital-1")
    return made


@pytest.fixture(scope="module")
def tls(authority: Authority) -> TlsFiles:
    return tls_files(authority.folder / "server")


@dataclass
class SuperLink:
    """Stands in for a SuperLink: notes what reaches it and answers everything, the Control API too.

    Attributes:
        seen: method, path and body of each request; ``headers`` of the latest.
        started: set once the first 1,000 bytes of a body are there. ``broken``: once a body broke off.
    """

    port: int = 0
    seen: list[tuple[str, str, int]] = field(default_factory=list)
    headers: dict[str, str] = field(default_factory=dict)
    started: threading.Event = field(default_factory=threading.Event)
    broken: threading.Event = field(default_factory=threading.Event)

    def forget(self) -> None:
        self.seen.clear()
        self.started.clear()
        self.broken.clear()

    def take(self, request: http.server.BaseHTTPRequestHandler) -> bytes:
        self.headers = {key.lower(): value for key, value in request.headers.items()}
        left = int(request.headers.get("content-length", 0))
        size = 0
        while left > size:
            part = request.rfile.read(min(1000, left - size))
            if not part:
                self.broken.set()
                return b""
            self.started.set()
            size += len(part)
        self.seen.append((request.command, request.path, size))
        return b"%d bytes" % size


@pytest.fixture(scope="module")
def standing_superlink(tls: TlsFiles) -> Iterator[SuperLink]:
    found = SuperLink()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            answer = found.take(self)
            self.send_response(200)
            self.send_header("content-type", "application/protobuf")
            self.send_header("flwr-package-version", "1.41.0")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer)

        do_GET = do_HEAD = do_PUT = do_DELETE = do_OPTIONS = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.cert, tls.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def running(upstream: str, tls: TlsFiles | None, ca: Path | None) -> Iterator[FleetProxy]:
    proxy = FleetProxy("127.0.0.1", 0, upstream, tls, ca)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


@pytest.fixture(scope="module")
def standing_proxy(standing_superlink: SuperLink, tls: TlsFiles) -> Iterator[FleetProxy]:
    with running(f"https://127.0.0.1:{standing_superlink.port}", tls, tls.ca) as found:
        yield found


@pytest.fixture
def superlink(standing_superlink: SuperLink) -> SuperLink:
    """The stand-in, to which nothing has come yet."""
    standing_superlink.forget()
    return standing_superlink


@pytest.fixture
def proxy(standing_proxy: FleetProxy, superlink: SuperLink) -> FleetProxy:
    """A proxy in front of it that has counted nothing yet."""
    standing_proxy.counts.clear()
    return standing_proxy


@contextmanager
def connection(proxy: FleetProxy, tls: TlsFiles) -> Iterator[ssl.SSLSocket]:
    context = ssl.create_default_context(cafile=tls.ca)
    with (
        socket.create_connection(("127.0.0.1", proxy.port), timeout=SECONDS) as plain,
        context.wrap_socket(plain, server_hostname="fed.example.org") as secured,
    ):
        yield secured


def received(sock: socket.socket) -> bytes:
    """All that comes until the other side closes."""
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except (ConnectionError, ssl.SSLError):
        pass
    return data


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"^HTTP/1\.1 (\d{3})", answer, re.MULTILINE)]


def send(proxy: FleetProxy, tls: TlsFiles, data: bytes) -> list[int]:
    with connection(proxy, tls) as sock:
        with suppress(ConnectionError, ssl.SSLError):  # it may hang up before it has read everything
            sock.sendall(data)
        return statuses(received(sock))


def head(target: str = FLEET, method: str = "POST", *lines: str, version: str = "1.1") -> bytes:
    """A request's head; the connection is to be closed after it."""
    text = [f"{method} {target} HTTP/{version}", "Host: fed.example.org", "Connection: close", *lines, "", ""]
    return "\r\n".join(text).encode("latin-1")


def test_fleet_requests_and_health_pass(proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles) -> None:
    assert send(proxy, tls, head(FLEET, "POST", "Content-Length: 5") + b"hello") == [200]
    assert send(proxy, tls, head("/health", "GET")) == [200]
    assert send(proxy, tls, head("/health", "HEAD")) == [200]
    assert superlink.seen == [("POST", FLEET, 5), ("GET", "/health", 0), ("HEAD", "/health", 0)]
    assert proxy.counts == {"passed": 3}


PATHS = [
    "/v1/control/start-run",
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/docs",
    "/openapi.json",
    "/",
    "*",
    "/v1/fleet",
    "/v1/fleet/",
    "/v1/fleet/.",
    "/v1/fleet/..",
    "//v1/control/start-run",
    "///v1/control/start-run",
    "//v1/fleet/pull-messages",
    "/v1//fleet/pull-messages",
    "/v1/fleet//pull-messages",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/./../control/start-run",
    "/v1/fleet/x/../../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "/v1/fleet/%2E%2E/control/start-run",
    "/v1/fleet/.%2e/control/start-run",
    "/v1/fleet/..%2fcontrol%2fstart-run",
    "/v1/fleet%2f..%2fcontrol/start-run",
    "/v1/fleet/%252e%252e/control/start-run",
    "/v1/fleet/..\\control\\start-run",
    "/v1/fleet/..%5ccontrol%5cstart-run",
    "/v1/fleet/..;/control/start-run",
    "/v1/fleet/;/../../control/start-run",
    "/v1/fleet/%00/../control/start-run",
    "/v1/fleet/pull-messages/",
    "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2fstart-run",
    "/v1/fleet/pull-messages;x=/../../control",
    "/v1/fleet/pull-messages?next=/v1/control/start-run",
    "/v1/fleet/pull-messages?",
    "/v1/fleet/pull-messages#/../../control/start-run",
    "/v1/fleet/pull%2dmessages",
    "/V1/FLEET/pull-messages",
    "/v1/fleet/PULL-MESSAGES",
    "/v1/fleet/\xff\xfe",
    "/v1/fleet/\xef\xbc\x8e\xef\xbc\x8e/control/start-run",
    "http://127.0.0.1:8000/v1/control/start-run",
    "http://127.0.0.1:8000/v1/fleet/pull-messages",
    "https://fed.example.org/v1/fleet/../control/start-run",
    "127.0.0.1:8000/v1/control/start-run",
    "v1/fleet/pull-messages",
    "@127.0.0.1:8000/v1/control/start-run",
    "/health/../v1/control/start-run",
    "/health/",
    "/healthx",
]


def test_no_other_path_passes_however_it_is_written(
    proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles
) -> None:
    passed = {
        target: found
        for target in PATHS
        for found in [send(proxy, tls, head(target, "POST", "Content-Length: 2") + b"{}")]
        if found not in ([403], [400])
    }
    # An empty query is no query: nothing is passed on but the path.
    assert passed == {"/v1/fleet/pull-messages?": [200]}
    assert superlink.seen == [("POST", FLEET, 2)]
    assert proxy.counts["not the Fleet API"] > 40


HEADS = {
    "GET": (head(FLEET, "GET"), 403),
    "PUT": (head(FLEET, "PUT", "Content-Length: 0"), 403),
    "DELETE": (head(FLEET, "DELETE"), 403),
    "OPTIONS": (head(FLEET, "OPTIONS"), 403),
    "TRACE": (head(FLEET, "TRACE"), 403),
    "CONNECT": (head("127.0.0.1:8000", "CONNECT"), 403),
    "PRI": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 403),
    "small letters": (head(FLEET, "post", "Content-Length: 0"), 403),
    "POST to health": (head("/health", "POST", "Content-Length: 0"), 403),
    "body with health": (head("/health", "GET", "Content-Length: 3") + b"abc", 403),
    "chunks with health": (head("/health", "GET", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 403),
    "websocket": (
        head(
            FLEET,
            "POST",
            "Content-Length: 0",
            "Connection: upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
            "Sec-WebSocket-Version: 13",
        ),
        403,
    ),
    "h2c": (head(FLEET, "POST", "Content-Length: 0", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk"), 403),
    "HTTP/1.0": (head(FLEET, "POST", "Content-Length: 0", version="1.0"), 403),
    "HTTP/1.2": (head(FLEET, "POST", "Content-Length: 0", version="1.2"), 403),
    "HTTP/0.9": (b"GET /v1/control/list-runs\r\n\r\n", 400),
    "no length": (head(FLEET), 411),
    "chunked": (head(FLEET, "POST", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 411),
    "both framings": (
        head(FLEET, "POST", "Content-Length: 4", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
        411,
    ),
    "both framings, other order": (
        head(FLEET, "POST", "Transfer-Encoding: chunked", "Content-Length: 4") + b"0\r\n\r\n",
        411,
    ),
    "two lengths": (head(FLEET, "POST", "Content-Length: 4", "Content-Length: 5") + b"12345", 400),
    "a list of lengths": (head(FLEET, "POST", "Content-Length: 4, 5") + b"12345", 400),
    "negative length": (head(FLEET, "POST", "Content-Length: -1"), 400),
    "signed length": (head(FLEET, "POST", "Content-Length: +4") + b"1234", 400),
    "length in words": (head(FLEET, "POST", "Content-Length: four") + b"1234", 400),
    "unknown coding": (head(FLEET, "POST", "Transfer-Encoding: xchunked") + b"0\r\n\r\n", 400),
    "space before colon": (head(FLEET, "POST", "Content-Length : 4") + b"1234", 400),
    "folded header": (head(FLEET, "POST", "X-A: b", " Content-Length: 4", "Content-Length: 0"), 200),
    "NUL in a header": (head(FLEET, "POST", "Content-Length: 0", "X-A: a\0b"), 400),
    "bare line feeds": (b"POST /v1/control/x HTTP/1.1\nHost: a\nContent-Length: 0\n\n", 403),
    "two hosts": (head(FLEET, "POST", "Content-Length: 0", "Host: 127.0.0.1:8000"), 400),
    "no host": (b"POST /v1/fleet/x HTTP/1.1\r\nContent-Length: 0\r\n\r\n", 400),
    "too large": (head(FLEET, "POST", f"Content-Length: {MAX_BODY_BYTES + 1}"), 413),
    "far too large": (head(FLEET, "POST", "Content-Length: " + "9" * 19), 413),
    "head of 100 kB": (head(FLEET, "POST", "Content-Length: 0", "X-A: " + "a" * 100_000), 400),
    "10,000 headers": (head(FLEET, "POST", "Content-Length: 0", *["X-A: b"] * 10_000), 400),
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400),
}


@pytest.mark.parametrize(("data", "status"), HEADS.values(), ids=HEADS)
def test_a_request_written_strangely_is_refused_or_harmless(
    proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles, data: bytes, status: int
) -> None:
    found = send(proxy, tls, data)
    cut_off_while_sending = len(data) > 65536 and found == []
    assert found == [status] or cut_off_while_sending
    if status == 200:
        assert superlink.seen == [("POST", FLEET, 0)]
        assert "x-a" not in superlink.headers
    else:
        assert superlink.seen == []


SMUGGLED = b"POST /v1/control/start-run HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"


@pytest.mark.parametrize(
    "data",
    [
        head(FLEET, "POST", f"Content-Length: {len(SMUGGLED)}") + SMUGGLED,
        head(FLEET, "POST", "Content-Length: 0").replace(b"Connection: close\r\n", b"") + SMUGGLED,
        head(FLEET, "POST", "Content-Length: 0", "Transfer-Encoding: chunked") + b"0\r\n\r\n" + SMUGGLED,
        head(FLEET, "POST", "Content-Length: 6", "Transfer-Encoding:\x0bchunked") + b"0\r\n\r\n" + SMUGGLED,
        head(FLEET, "POST", "Content-Length: 0", "Transfer-Encoding: chunked, identity") + SMUGGLED,
        head(FLEET, "POST", "X: a\rTransfer-Encoding: chunked", "Content-Length: 0") + SMUGGLED,
        head("/health", "GET").replace(b"Connection: close\r\n", b"") + SMUGGLED,
        head("/health", "GET", f"Content-Length: {len(SMUGGLED)}") + SMUGGLED,
        head(FLEET + " HTTP/1.1\r\nHost: a\r\n\r\nPOST /v1/control/start-run", "POST", "Content-Length: 0"),
    ],
    ids=[
        "body",
        "pipelined",
        "TE.CL",
        "TE tab",
        "TE list",
        "bare CR",
        "after health",
        "in health",
        "in target",
    ],
)
def test_a_request_inside_another_reaches_nothing(
    proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles, data: bytes
) -> None:
    send(proxy, tls, data)
    assert not [path for _, path, _ in superlink.seen if "control" in path]


def test_only_flower_s_headers_pass(proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles) -> None:
    lines = [
        "Content-Length: 0",
        "Content-Type: application/protobuf",
        "flwr-public-key: abc",
        "Flwr-Signature: def",
        "X-Forwarded-For: 127.0.0.1",
        "X-Forwarded-Host: localhost",
        "X-Original-URL: /v1/control/start-run",
        "X-HTTP-Method-Override: GET",
        "Authorization: Bearer x",
        "Cookie: a=b",
        "Proxy: http://evil",
        "Expect: 100-continue",
    ]
    assert send(proxy, tls, head(FLEET, "POST", *lines))[-1] == 200
    passed = set(superlink.headers) - {"host", "connection", "accept", "accept-encoding", "user-agent"}
    assert passed == {"content-length", "content-type", "flwr-public-key", "flwr-signature"}
    assert superlink.headers["host"] == f"127.0.0.1:{superlink.port}"


def test_a_body_is_passed_on_as_it_comes(proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles) -> None:
    size = 4 << 20
    with connection(proxy, tls) as sock:
        sock.sendall(head(FLEET, "POST", f"Content-Length: {size}") + bytes(100_000))
        assert superlink.started.wait(SECONDS)
        assert superlink.seen == []
        sock.sendall(bytes(size - 100_000))
        assert received(sock).endswith(b"%d bytes" % size)


def test_a_body_of_the_limit_passes(proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles) -> None:
    data = head(FLEET, "POST", f"Content-Length: {MAX_BODY_BYTES}") + bytes(MAX_BODY_BYTES)
    assert send(proxy, tls, data) == [200]
    assert superlink.seen == [("POST", FLEET, MAX_BODY_BYTES)]


def test_a_site_that_goes_away_in_a_body_leaves_nothing(
    proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles
) -> None:
    with connection(proxy, tls) as sock:
        sock.sendall(head(FLEET, "POST", "Content-Length: 1000000") + bytes(100_000))
        assert superlink.started.wait(SECONDS)
    assert superlink.broken.wait(SECONDS)
    assert superlink.seen == []
    assert send(proxy, tls, head("/health", "GET")) == [200]


@pytest.mark.parametrize("start", [b"", b"POST /v1/fle", head(FLEET, "POST", "Content-Length: 0")[:-2]])
def test_a_head_that_does_not_end_is_cut_off(
    proxy: FleetProxy, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(proxy_module, "HEAD_SECONDS", 0.2)
    with connection(proxy, tls) as sock:
        sock.sendall(start)
        assert received(sock) == b""
    assert proxy.counts["head too slow"] == 1


def test_a_body_that_stops_is_cut_off(
    proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_module, "IDLE_SECONDS", 0.2)
    with connection(proxy, tls) as sock:
        sock.sendall(head(FLEET, "POST", "Content-Length: 1000000") + bytes(1000))
        assert statuses(received(sock)) == [504]
    assert superlink.broken.wait(SECONDS)
    assert proxy.counts["too slow"] == 1


def test_connections_are_bounded(proxy: FleetProxy, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_module, "MAX_CONNECTIONS", 1)
    with connection(proxy, tls) as first:
        first.sendall(b"POST")
        with connection(proxy, tls) as second:
            assert received(second) == b""
        first.sendall(head(FLEET, "POST", "Content-Length: 0")[4:])
        assert statuses(received(first)) == [200]
    assert proxy.counts["too many connections"] == 1


def test_a_refusal_is_one_line_of_json_whatever_was_asked(
    proxy: FleetProxy, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(proxy_module.logger, "warning", lambda text, *facts: told.append(text % facts))
    send(proxy, tls, head("/v1/control/" + "x%0a\x7e" * 200, "POST", "Content-Length: 0"))
    (line,) = told
    entry = json.loads(line)
    assert (entry["event"], entry["status"], entry["method"]) == ("refused", 403, "POST")
    assert entry["path"].startswith("/v1/control/x%0a")
    assert len(line) < 500
    assert "\n" not in line


def test_a_superlink_that_is_gone_is_told_so_that_sites_try_again(
    proxy: FleetProxy, tls: TlsFiles, authority: Authority, tmp_path: Path, superlink: SuperLink
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        gone = taken.getsockname()[1]
    other = Authority.create(tmp_path / "other", "lab")
    for upstream, ca in ((gone, tls.ca), (superlink.port, other.folder / "ca.crt")):
        with running(f"https://127.0.0.1:{upstream}", tls, ca) as found:
            assert send(found, tls, head(FLEET, "POST", "Content-Length: 3") + b"abc") == [502]
    assert superlink.seen == []


@pytest.mark.parametrize(
    ("host", "upstream", "secured", "with_ca", "why"),
    [
        ("0.0.0.0", "https://127.0.0.1:8000", False, True, "needs TLS"),
        ("::", "https://127.0.0.1:8000", False, True, "needs TLS"),
        ("127.0.0.1", "http://10.0.0.1:8000", True, False, "not a SuperLink"),
        ("127.0.0.1", "https://127.0.0.1:8000", True, False, "not a SuperLink"),
        ("127.0.0.1", "http://127.0.0.1:8000", True, True, "not a SuperLink"),
        ("127.0.0.1", "ftp://127.0.0.1", True, False, "not a SuperLink"),
    ],
)
def test_it_starts_closed_or_not_at_all(
    tls: TlsFiles, host: str, upstream: str, secured: bool, with_ca: bool, why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        FleetProxy(host, 0, upstream, tls if secured else None, tls.ca if with_ca else None)


def test_a_taken_port_or_a_missing_certificate_is_told_before_it_starts(
    tls: TlsFiles, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        proxy = FleetProxy("127.0.0.1", taken.getsockname()[1], "http://127.0.0.1:1", None, None)
        with pytest.raises(ConfigError, match="cannot listen"):
            proxy.start()
    with pytest.raises(FileError, match="none"):
        FleetProxy("127.0.0.1", 0, "https://127.0.0.1:1", tls, tmp_path / "none")
    missing = tls.model_copy(update={"cert": tmp_path / "none"})
    with pytest.raises(FileError, match="none"):
        FleetProxy("127.0.0.1", 0, "http://127.0.0.1:1", missing, None)


def test_stopping_closes_the_port(superlink: SuperLink, tls: TlsFiles) -> None:
    with running(f"https://127.0.0.1:{superlink.port}", tls, tls.ca) as proxy:
        port = proxy.port
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=SECONDS)


def test_a_proxy_that_compares_prefixes_lets_tricks_through(
    proxy: FleetProxy, superlink: SuperLink, tls: TlsFiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted bug: it shows that the tests above can fail."""

    def prefix_only(scope: Scope) -> tuple[int, str] | None:
        return None if scope["path"].startswith(("/v1/fleet/", "/health")) else (403, "not the Fleet API")

    monkeypatch.setattr(proxy_module, "_refusal", prefix_only)
    trick = head("/v1/fleet/../control/start-run", "POST", "Content-Length: 2") + b"{}"
    assert send(proxy, tls, trick) == [200]
    assert superlink.seen == [("POST", "/v1/control/start-run", 2)]


def test_as_a_command_it_reads_its_settings_and_ends_when_told(
    superlink: SuperLink, tls: TlsFiles, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    config = tmp_path / "proxy.toml"
    config.write_text(
        f'listen = "127.0.0.1:{port}"\nupstream = "https://127.0.0.1:{superlink.port}"\n'
        f'upstream_ca = "{tls.ca}"\n[tls]\nca = "{tls.ca}"\ncert = "{tls.cert}"\nkey = "{tls.key}"\n'
    )
    command = [sys.executable, "-m", "fedmerge.deploy.launch.proxy", "--config", str(config)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    limit = threading.Timer(60, child.kill)
    limit.start()
    try:
        assert child.stderr is not None
        assert f"127.0.0.1:{port}" in child.stderr.readline()
        context = ssl.create_default_context(cafile=tls.ca)
        url = f"https://127.0.0.1:{port}"
        assert httpx.get(f"{url}/health", verify=context, trust_env=False).status_code == 200
        refused = httpx.post(f"{url}/v1/control/start-run", verify=context, trust_env=False)
        assert refused.status_code == 403
        child.terminate()
        child.communicate()
        assert child.returncode == -signal.SIGTERM
    finally:
        limit.cancel()
        child.kill()
        child.wait()


def test_as_a_command_it_tells_in_one_line_why_it_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(proxy_module, "log_to_stderr", lambda: None)
    config = tmp_path / "proxy.toml"
    config.write_text('listen = "0.0.0.0:1"\nupstream = "http://127.0.0.1:1"\n')
    with pytest.raises(SystemExit, match="2"):
        proxy_module.main(config)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error (ConfigError): 0.0.0.0: an address that others can reach needs TLS")


FLOWER = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}

APP = """\
[project]
name = "attack"
version = "1.0.0"
[tool.flwr.app]
publisher = "attacker"
[tool.flwr.app.components]
serverapp = "attack:app"
clientapp = "attack:app"
"""


@pytest.fixture
def real_superlink(tls: TlsFiles, tmp_path: Path) -> Iterator[int]:
    """The port of a ``flower-superlink`` that authenticates SuperNodes."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("flower-superlink")), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--isolation", "process", "--enable-supernode-auth"]
    command += ["--ssl-ca-certfile", str(tls.ca)]
    command += ["--ssl-certfile", str(tls.cert), "--ssl-keyfile", str(tls.key)]
    child = subprocess.Popen(
        command,
        env={**os.environ, **FLOWER, "FLWR_HOME": str(tmp_path / "superlink")},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    limit = threading.Timer(60, os.killpg, (child.pid, signal.SIGKILL))
    limit.start()
    try:
        assert child.stdout is not None
        assert any("Uvicorn running" in line for line in child.stdout)
        drain = threading.Thread(target=child.stdout.read)
        drain.start()
        yield port
    finally:
        limit.cancel()
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    drain.join()


@pytest.mark.deployment
def test_in_front_of_a_real_superlink_sites_work_and_nobody_else(
    authority: Authority, tls: TlsFiles, tmp_path: Path, real_superlink: int
) -> None:
    from flwr.cli.supernode.register import try_load_public_key
    from flwr.proto.control_pb2 import ListRunsRequest, RegisterNodeRequest
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
    from flwr.proto.node_pb2 import Node
    from flwr.supercore.control import ControlHttpClient
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

    site = authority.folder / "sites" / "hospital-1"
    public = try_load_public_key(site / "supernode.pub")
    key = load_ssh_private_key((site / "supernode.key").read_bytes(), None)
    inside = f"127.0.0.1:{real_superlink}"
    with (
        running(f"https://{inside}", tls, tls.ca) as proxy,
        ControlHttpClient.from_server_address(inside, False, str(tls.ca), ()) as admin,
    ):
        outside = f"127.0.0.1:{proxy.port}"
        admin.RegisterNode(RegisterNodeRequest(public_key=public, name="hospital-1"))
        signing = [NodeAuthHttpInterceptor(key, key.public_key())]
        with FleetHttpClient.from_server_address(outside, False, str(tls.ca), signing) as supernode:
            activate = ActivateNodeRequest(public_key=public, heartbeat_interval=30)
            node = Node(node_id=supernode.ActivateNode(activate).node_id)
            assert node.node_id
            assert list(supernode.PullMessages(PullMessagesRequest(node=node)).messages_list) == []
        with (
            FleetHttpClient.from_server_address(outside, False, str(tls.ca), ()) as nobody,
            pytest.raises(httpx.HTTPStatusError, match="401"),
        ):
            nobody.PullMessages(PullMessagesRequest(node=node))
        assert proxy.counts == {"passed": 3}
        for output in flower_cli(tmp_path, f"127.0.0.1:{proxy.port}", tls.ca):
            assert "403 Forbidden" in output, output
        assert proxy.counts["not the Fleet API"] >= 2
        assert not admin.ListRuns(ListRunsRequest()).run_dict


def flower_cli(folder: Path, address: str, ca: Path) -> list[str]:
    """What ``flwr run`` and ``flwr list`` say against an address."""
    home = folder / "cli"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink.target]\naddress = "{address}"\nroot-certificates = "{ca}"\n'
    )
    attack = folder / "attack"
    attack.mkdir()
    (attack / "pyproject.toml").write_text(APP)
    (attack / "attack.py").write_text("from flwr.serverapp import ServerApp\napp = ServerApp()\n")
    flwr = str(Path(sys.executable).with_name("flwr"))
    environment = {**os.environ, **FLOWER, "FLWR_HOME": str(home)}

    def said(arguments: list[str]) -> str:
        done = subprocess.run(
            [flwr, *arguments], env=environment, cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0
        return done.stdout + done.stderr

    with ThreadPoolExecutor() as pool:
        return list(pool.map(said, [["run", str(attack), "target"], ["list", "target"]]))
