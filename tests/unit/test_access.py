"""Does each policy find out who calls, and trust nothing a caller only says?"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import NameOID

from fedmerge.common.errors import FileError, Forbidden, StoreDamaged, Unauthenticated
from fedmerge.common.tls import read_certificate
from fedmerge.deploy import authority as authority_module
from fedmerge.deploy.authority import Authority
from fedmerge.server.service import access as access_module
from fedmerge.server.service.access import (
    Caller,
    CertificateAccess,
    LoopbackAccess,
    Role,
    SocketAccess,
    acting_site,
    require,
)

TCP = "ipv4:127.0.0.1:40000"


class Call:
    """What gRPC tells a service about one call."""

    def __init__(self, peer: str = TCP, pem: bytes | None = None, **metadata: str) -> None:
        self._peer, self._pem, self._metadata = peer, pem, metadata

    def peer(self) -> str:
        return self._peer

    def auth_context(self) -> dict[str, list[bytes]]:
        return {} if self._pem is None else {"x509_pem_cert": [self._pem]}

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple((key.replace("_", "-"), value) for key, value in self._metadata.items())


def caller(access: Any, call: Call) -> Caller:
    return access.caller(call)  # type: ignore[no-any-return]


def test_a_role_that_is_missing_is_told_and_none_is_enough_for_nothing() -> None:
    alice = Caller("alice", frozenset({Role.ADMIN}))
    require(alice, Role.SITE, Role.ADMIN)
    with pytest.raises(Forbidden, match=r"alice: .* got admin, wanted gateway or site"):
        require(alice, Role.SITE, Role.GATEWAY)
    with pytest.raises(Forbidden, match="got no role"):
        require(Caller("x", frozenset()), *Role)
    with pytest.raises(Forbidden):
        require(alice)


def test_a_site_acts_for_itself_and_a_gateway_for_any_site() -> None:
    site, gateway = Caller("a", frozenset({Role.SITE})), Caller("gateway", frozenset({Role.GATEWAY}))
    assert acting_site(site, "") == acting_site(site, "a") == acting_site(gateway, "a") == "a"
    with pytest.raises(Forbidden, match="a site acts for itself alone: got site 'b'"):
        acting_site(site, "b")
    with pytest.raises(Forbidden):
        acting_site(Caller("alice", frozenset({Role.ADMIN})), "alice")
    with pytest.raises(Unauthenticated):
        acting_site(gateway, "../b")


@pytest.mark.parametrize("peer", [TCP, "ipv4:127.9.9.9:1", "ipv6:%5B::1%5D:40000"])
def test_callers_on_loopback_name_themselves(peer: str) -> None:
    found = caller(LoopbackAccess(), Call(peer, fedmerge_site="hospital-1"))
    assert found == Caller("hospital-1", frozenset(Role))
    assert caller(LoopbackAccess(), Call(peer)).name == "local"


@pytest.mark.parametrize(
    "peer", ["ipv4:10.0.0.1:1", "ipv6:%5B2001:db8::1%5D:1", "unix:", "ipv4:127.0.0.1.evil.org:1", "", "ipv4:"]
)
def test_others_are_not_on_loopback(peer: str) -> None:
    with pytest.raises(Unauthenticated, match="not a caller of this machine"):
        caller(LoopbackAccess(), Call(peer, fedmerge_site="a"))


@pytest.mark.parametrize("name", ["", "../a", "a b", "a\n", "-a", "x" * 65, "é"])
def test_a_bad_name_on_loopback_is_refused(name: str) -> None:
    with pytest.raises(Unauthenticated, match="not a name of a site"):
        caller(LoopbackAccess(), Call(fedmerge_site=name))


def test_two_names_on_loopback_are_refused() -> None:
    call = Call()
    call.invocation_metadata = lambda: (("fedmerge-site", "a"), ("fedmerge-site", "b"))  # type: ignore
    with pytest.raises(Unauthenticated, match="more than one name"):
        caller(LoopbackAccess(), call)


def test_the_socket_is_for_admin_and_gateway_and_takes_down_the_name_they_give() -> None:
    found = caller(SocketAccess(), Call("unix:", fedmerge_site="a"))
    assert found == Caller("a", frozenset({Role.ADMIN, Role.GATEWAY}))
    assert caller(SocketAccess(), Call("unix:")).name == "local"
    with pytest.raises(Unauthenticated):
        caller(SocketAccess(), Call(TCP))


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "certs")


def policy(authority: Authority) -> CertificateAccess:
    return CertificateAccess(authority.folder / "ca.crt", authority.folder / "crl.pem")


def test_a_certificate_is_name_and_role_whatever_the_metadata_says(authority: Authority) -> None:
    authority.server(["a"])
    shown = {
        "hospital-1": (authority.site("hospital-1") / "site.crt", {Role.SITE}),
        "alice": (authority.admin("alice") / "admin.crt", {Role.ADMIN}),
        "gateway": (authority.folder / "gateway/gateway.crt", {Role.GATEWAY}),
        "server": (authority.folder / "server/server.crt", set()),
    }
    for name, (path, roles) in shown.items():
        call = Call(pem=path.read_bytes(), fedmerge_site="somebody-else")
        assert caller(policy(authority), call) == Caller(name, frozenset(roles))


def test_without_a_certificate_nobody_gets_in(authority: Authority) -> None:
    for pem in (None, b"", b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"):
        with pytest.raises(Unauthenticated):
            caller(policy(authority), Call(pem=pem))


def signed(authority: Authority, *attributes: tuple[x509.ObjectIdentifier, str]) -> bytes:
    """A certificate with any subject, as a careless authority would sign it."""
    key = load_pem_private_key((authority.folder / "ca.key").read_bytes(), None)
    issuer = read_certificate(authority.folder / "ca.crt")
    subject = x509.Name([x509.NameAttribute(kind, value) for kind, value in attributes])
    public = ec.generate_private_key(ec.SECP256R1()).public_key()
    builder = authority_module._builder(subject, issuer.subject, public, issuer.public_key(), 1)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)


def test_an_unknown_unit_or_several_give_no_role(authority: Authority) -> None:
    name, unit = (NameOID.COMMON_NAME, "a"), NameOID.ORGANIZATIONAL_UNIT_NAME
    for units in ([], [(unit, "root")], [(unit, "Admin")], [(unit, "site"), (unit, "admin")]):
        assert caller(policy(authority), Call(pem=signed(authority, name, *units))).roles == frozenset()


def test_no_name_two_names_or_a_bad_one_is_nobody(authority: Authority) -> None:
    unit = (NameOID.ORGANIZATIONAL_UNIT_NAME, "admin")
    for names in ([], ["a", "b"], ["../a"], ["a\nb"]):
        subject = [(NameOID.COMMON_NAME, name) for name in names]
        with pytest.raises(Unauthenticated):
            caller(policy(authority), Call(pem=signed(authority, unit, *subject)))


def test_a_certificate_that_expires_during_a_connection_opens_nothing_more(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "CLOCK_SKEW", timedelta(days=9))
    expired = (authority.site("old", days=-1) / "site.crt").read_bytes()
    with pytest.raises(Unauthenticated, match="old: the certificate is out of its dates"):
        caller(policy(authority), Call(pem=expired))


def test_a_revocation_holds_from_the_next_call_on(authority: Authority) -> None:
    access = policy(authority)
    first = Call(pem=(authority.site("a") / "site.crt").read_bytes())
    other = Call(pem=(authority.site("b") / "site.crt").read_bytes())
    caller(access, first)
    authority.revoke("a")
    with pytest.raises(Unauthenticated, match="a: the certificate is revoked"):
        caller(access, first)
    assert caller(access, other).name == "b"
    again = Call(pem=(authority.site("a") / "site.crt").read_bytes())
    assert caller(access, again).name == "a"


def _forged(authority: Authority) -> bytes:
    other = Authority.create(authority.folder.parent / "other")
    return (other.folder / "crl.pem").read_bytes()


BAD_LISTS = {
    "missing": None,
    "empty": lambda authority: b"",
    "torn": lambda authority: (authority.folder / "crl.pem").read_bytes()[:100],
    "of another authority": _forged,
    "a certificate": lambda authority: (authority.folder / "ca.crt").read_bytes(),
}


@pytest.mark.parametrize("bad", BAD_LISTS.values(), ids=BAD_LISTS)
def test_with_a_bad_list_of_revocations_nobody_gets_in_until_it_is_mended(
    authority: Authority, bad: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(access_module.logger, "error", lambda text, *facts: logged.append(text % facts))
    access = policy(authority)
    call = Call(pem=(authority.admin("alice") / "admin.crt").read_bytes())
    path = authority.folder / "crl.pem"
    good = path.read_bytes()
    path.unlink() if bad is None else path.write_bytes(bad(authority))
    for _ in range(3):
        with pytest.raises(Unauthenticated, match="nobody is let in") as told:
            caller(access, call)
        assert str(path) not in str(told.value)
    (told_to_admin,) = logged
    assert str(path) in told_to_admin
    with pytest.raises((FileError, StoreDamaged)):
        policy(authority)
    path.write_bytes(good)
    assert caller(access, call).name == "alice"
