"""Over real mutual TLS: does nobody get in, or further, with the wrong certificate?

The planted bug: a server that does not ask for certificates lets anybody connect.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from fedmerge.common.errors import AccessError, Unauthenticated
from fedmerge.common.tls import TlsFiles, channel_credentials, server_credentials
from fedmerge.deploy import authority as authority_module
from fedmerge.deploy.authority import Authority, tls_files
from fedmerge.server.service.access import (
    Access,
    Caller,
    CertificateAccess,
    LoopbackAccess,
    Role,
    SocketAccess,
    acting_site,
    require,
)

SECONDS = 20


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.create(tmp_path_factory.mktemp("attacks") / "certs", "lab")
    made.server(["fed.example.org"])
    for name in ("hospital-1", "hospital-2", "localhost"):
        made.site(name)
    made.admin("alice")
    return made


def issued(authority: Authority, name: str) -> TlsFiles:
    return tls_files(authority.folder / name)


@dataclass
class Guarded:
    """A server under attack. ``reached``: what got through to its methods."""

    address: str
    reached: list[tuple[str, Caller]]


class Service:
    """Two methods: ``Submit`` for the site named in the request, ``RollBack`` for admins."""

    def __init__(self, access: Access) -> None:
        self.access, self.reached = access, list[tuple[str, Caller]]()

    async def submit(self, request: bytes, context: Any) -> bytes:
        return await self._answer(context, "Submit", lambda caller: acting_site(caller, request.decode()))

    async def roll_back(self, request: bytes, context: Any) -> bytes:
        return await self._answer(context, "RollBack", lambda caller: require(caller, Role.ADMIN))

    async def _answer(self, context: Any, method: str, check: Callable[[Caller], object]) -> bytes:
        try:
            caller = self.access.caller(context)
            check(caller)
        except AccessError as error:
            code = grpc.StatusCode.PERMISSION_DENIED
            if isinstance(error, Unauthenticated):
                code = grpc.StatusCode.UNAUTHENTICATED
            await context.abort(code, str(error))
        self.reached.append((method, caller))
        return caller.name.encode()

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {"Submit": self.submit, "RollBack": self.roll_back}
        table = {name: grpc.unary_unary_rpc_method_handler(method) for name, method in methods.items()}
        return grpc.method_handlers_generic_handler("attacked", table)


@pytest.fixture
def serve() -> Iterator[Callable[..., Guarded]]:
    """Starts servers on a loop in a thread, and stops them after the test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    servers: list[grpc.aio.Server] = []

    def start(access: Access, credentials: grpc.ServerCredentials | None, address: str) -> Guarded:
        async def started() -> Guarded:
            service, server = Service(access), grpc.aio.server()
            server.add_generic_rpc_handlers((service.handlers(),))
            if credentials is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, credentials)
            await server.start()
            servers.append(server)
            reached = address if address.startswith("unix:") else f"127.0.0.1:{port}"
            return Guarded(reached, service.reached)

        return asyncio.run_coroutine_threadsafe(started(), loop).result(SECONDS)

    async def stop() -> None:
        await asyncio.gather(*(server.stop(None) for server in servers))

    yield start
    asyncio.run_coroutine_threadsafe(stop(), loop).result(SECONDS)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture
def server(serve: Callable[..., Guarded], authority: Authority) -> Guarded:
    access = CertificateAccess(authority.folder / "ca.crt", authority.folder / "crl.pem")
    return serve(access, server_credentials(issued(authority, "server")), "127.0.0.1:0")


def shown(files: TlsFiles, *, ca: Path | None = None) -> grpc.ChannelCredentials:
    """Credentials as an attacker makes them: without any check."""
    trusted = (ca or files.ca).read_bytes()
    return grpc.ssl_channel_credentials(trusted, files.key.read_bytes(), files.cert.read_bytes())


def call(
    address: str,
    credentials: grpc.ChannelCredentials | None,
    method: str = "Submit",
    site: str = "",
    **more: Any,
) -> tuple[grpc.StatusCode, str]:
    """The answer to one call on a connection of its own."""
    make = grpc.insecure_channel if credentials is None else grpc.secure_channel
    arguments = (address,) if credentials is None else (address, credentials)
    with make(*arguments, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        return ask(channel, method, site, **more)


def ask(channel: grpc.Channel, method: str = "Submit", site: str = "", **more: Any) -> tuple[Any, str]:
    try:
        answer = channel.unary_unary(f"/attacked/{method}")(site.encode(), timeout=SECONDS, **more)
        return grpc.StatusCode.OK, answer.decode()
    except grpc.RpcError as error:
        return error.code(), error.details()  # type: ignore[attr-defined]


OK, DENIED = grpc.StatusCode.OK, grpc.StatusCode.PERMISSION_DENIED
UNKNOWN, NO_CONNECTION = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNAVAILABLE


def test_the_right_certificates_open_what_they_are_for(server: Guarded, authority: Authority) -> None:
    site = channel_credentials(issued(authority, "sites/hospital-1"))
    gateway = channel_credentials(issued(authority, "gateway"))
    admin = channel_credentials(issued(authority, "admins/alice"))
    assert call(server.address, site) == (OK, "hospital-1")
    assert call(server.address, site, site="hospital-1") == (OK, "hospital-1")
    assert call(server.address, gateway, site="hospital-2") == (OK, "gateway")
    assert call(server.address, admin, "RollBack") == (OK, "alice")


@pytest.mark.parametrize(
    ("who", "method", "site"),
    [
        ("sites/hospital-1", "RollBack", ""),
        ("sites/hospital-1", "Submit", "hospital-2"),
        ("gateway", "RollBack", ""),
        ("admins/alice", "Submit", "hospital-1"),
        ("admins/alice", "Submit", ""),
    ],
)
def test_a_certificate_opens_nothing_else(
    server: Guarded, authority: Authority, who: str, method: str, site: str
) -> None:
    metadata = (("fedmerge-site", site or "alice"), ("x509_common_name", "alice"))
    found, _ = call(server.address, shown(issued(authority, who)), method, site, metadata=metadata)
    assert found is DENIED
    assert server.reached == []


def self_signed(folder: Path, name: str, unit: str) -> TlsFiles:
    key = ec.generate_private_key(ec.SECP384R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
        ]
    )
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject)
    builder = builder.public_key(key.public_key()).serial_number(1)
    builder = builder.not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
    (folder / "own.crt").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM))
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "own.key").write_bytes(private)
    return TlsFiles(ca=folder / "own.crt", cert=folder / "own.crt", key=folder / "own.key")


def _self_signed(authority: Authority, folder: Path, _: pytest.MonkeyPatch) -> TlsFiles:
    return self_signed(folder, "alice", "admin")


def _signed_by_a_site(authority: Authority, folder: Path, _: pytest.MonkeyPatch) -> TlsFiles:
    """A site's certificate used as if it were an authority, and shown as part of the chain."""
    site = issued(authority, "sites/hospital-1")
    look_alike = Authority.__new__(Authority)
    look_alike.folder = folder
    look_alike._cert = x509.load_pem_x509_certificate(site.cert.read_bytes())
    look_alike._key = authority_module._authority_key(site.key)
    look_alike._write_index([])
    made = tls_files(look_alike.admin("alice"))
    made.cert.write_bytes(made.cert.read_bytes() + site.cert.read_bytes())
    return made


def _other_authority(authority: Authority, folder: Path, _: pytest.MonkeyPatch) -> TlsFiles:
    return tls_files(Authority.create(folder / "other", "lab").admin("alice"))


def _expired(authority: Authority, _: Path, monkeypatch: pytest.MonkeyPatch) -> TlsFiles:
    monkeypatch.setattr(authority_module, "CLOCK_SKEW", timedelta(days=9))
    return tls_files(authority.admin("expired", days=-1))


def _not_yet_valid(authority: Authority, _: Path, monkeypatch: pytest.MonkeyPatch) -> TlsFiles:
    monkeypatch.setattr(authority_module, "CLOCK_SKEW", timedelta(days=-9))
    return tls_files(authority.admin("early"))


def _swapped_key(authority: Authority, _: Path, __: pytest.MonkeyPatch) -> TlsFiles:
    site, admin = issued(authority, "sites/hospital-1"), issued(authority, "admins/alice")
    return TlsFiles(ca=site.ca, cert=admin.cert, key=site.key)


def _server_s_own(authority: Authority, _: Path, __: pytest.MonkeyPatch) -> TlsFiles:
    return issued(authority, "server")


BAD = {
    "self-signed admin look-alike": _self_signed,
    "signed by a site": _signed_by_a_site,
    "another authority of the same name": _other_authority,
    "expired": _expired,
    "not yet valid": _not_yet_valid,
    "key of another certificate": _swapped_key,
    "the server's own": _server_s_own,
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("method", ["Submit", "RollBack"])
def test_a_bad_certificate_gets_no_connection(
    server: Guarded,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: Callable[[Authority, Path, pytest.MonkeyPatch], TlsFiles],
    method: str,
) -> None:
    files = bad(authority, tmp_path, monkeypatch)
    try:
        found, _ = call(server.address, shown(files, ca=authority.folder / "ca.crt"), method)
        assert found is NO_CONNECTION
        assert server.reached == []
    finally:
        for entry in authority.issued():
            if entry.name in ("expired", "early"):
                authority.revoke(entry.name)


def test_without_a_certificate_or_without_tls_there_is_no_connection(
    server: Guarded, authority: Authority
) -> None:
    anonymous = grpc.ssl_channel_credentials((authority.folder / "ca.crt").read_bytes())
    assert call(server.address, anonymous)[0] is NO_CONNECTION
    assert call(server.address, None)[0] is NO_CONNECTION
    assert server.reached == []


def test_a_server_that_asks_for_no_certificate_is_still_not_open(
    serve: Callable[..., Guarded], authority: Authority
) -> None:
    """With TLS set up wrongly, the handshake lets everybody in; the policy does not."""
    files = issued(authority, "server")
    careless = grpc.ssl_server_credentials([(files.key.read_bytes(), files.cert.read_bytes())])
    anonymous = grpc.ssl_channel_credentials((authority.folder / "ca.crt").read_bytes())
    access = CertificateAccess(authority.folder / "ca.crt", authority.folder / "crl.pem")
    server = serve(access, careless, "127.0.0.1:0")
    assert call(server.address, anonymous)[0] is UNKNOWN
    planted = serve(LoopbackAccess(), careless, "127.0.0.1:0")
    assert call(planted.address, anonymous, "RollBack") == (OK, "local")


def test_a_revocation_takes_effect_on_an_open_connection(server: Guarded, authority: Authority) -> None:
    files = tls_files(authority.site("leaving"))
    with grpc.secure_channel(server.address, shown(files)) as channel:
        assert ask(channel) == (OK, "leaving")
        authority.revoke("leaving")
        files_again = tls_files(authority.site("leaving"))
        found, why = ask(channel)
        assert (found, why) == (UNKNOWN, "leaving: the certificate is revoked")
    assert call(server.address, shown(files_again)) == (OK, "leaving")
    authority.revoke("leaving")


@pytest.mark.parametrize("who", ["sites/localhost", "gateway", "admins/alice"])
def test_a_client_s_certificate_cannot_pose_as_the_server(
    serve: Callable[..., Guarded], authority: Authority, who: str
) -> None:
    """Even of a site that is named like the server's host."""
    false = serve(LoopbackAccess(), server_credentials(issued(authority, who)), "127.0.0.1:0")
    port = false.address.rpartition(":")[2]
    victim = channel_credentials(issued(authority, "sites/hospital-1"))
    for host in ("localhost", "127.0.0.1"):
        assert call(f"{host}:{port}", victim)[0] is NO_CONNECTION
    assert false.reached == []


def test_a_server_of_another_authority_or_for_another_host_is_not_trusted(
    serve: Callable[..., Guarded], authority: Authority, tmp_path: Path
) -> None:
    other = Authority.create(tmp_path / "other", "lab")
    stranger = serve(LoopbackAccess(), server_credentials(tls_files(other.server(["a"]))), "127.0.0.1:0")
    victim = channel_credentials(issued(authority, "sites/hospital-1"))
    assert call(stranger.address, victim)[0] is NO_CONNECTION
    assert stranger.reached == []


def test_a_socket_s_callers_are_local_and_a_tcp_caller_is_none(
    serve: Callable[..., Guarded], tmp_path: Path
) -> None:
    server = serve(SocketAccess(), None, f"unix:{tmp_path}/s")
    assert call(server.address, None, site="hospital-1") == (OK, "local")
    assert call(server.address, None, "RollBack") == (OK, "local")
    misplaced = serve(SocketAccess(), None, "127.0.0.1:0")
    assert call(misplaced.address, None, "RollBack")[0] is UNKNOWN
    assert misplaced.reached == []


def test_on_loopback_a_caller_names_itself(serve: Callable[..., Guarded]) -> None:
    server = serve(LoopbackAccess(), None, "127.0.0.1:0")
    assert call(server.address, None, metadata=(("fedmerge-site", "hospital-1"),)) == (OK, "hospital-1")
    assert call(server.address, None) == (OK, "local")
    assert call(server.address, None, metadata=(("fedmerge-site", "../x"),))[0] is UNKNOWN
