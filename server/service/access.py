"""Who calls, and what they may do: one policy per kind of listener, everything else refused.

Methods ask a policy for the caller and then :func:`require` a role. A role comes from what the policy
can verify, never from what a caller says, except on loopback, where every caller is this machine's user.
"""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote

import grpc
from cryptography import x509
from cryptography.x509.oid import NameOID

from fedmerge.common.errors import FedmergeError, FileError, Forbidden, StoreDamaged, Unauthenticated
from fedmerge.common.names import SITE_KEY, SITE_NAME
from fedmerge.common.tls import read_certificate

logger = logging.getLogger(__name__)

LOCAL = "local"

Context = grpc.aio.ServicerContext[Any, Any]


class Role(StrEnum):
    """What a caller may do; in a certificate, the subject's organizational unit."""

    SITE = "site"  # submits its own updates, fetches versions
    ADMIN = "admin"  # rolls back, removes, approves, rejects
    GATEWAY = "gateway"  # submits on behalf of any site: the Flower side of the same server


@dataclass(frozen=True)
class Caller:
    """Who calls. Without roles, the caller is known and may do nothing."""

    name: str
    roles: frozenset[Role]


class Access(Protocol):
    """Finds out who calls."""

    def caller(self, context: Context) -> Caller:
        """The caller of one request. Raises Unauthenticated."""
        ...


def require(caller: Caller, *roles: Role) -> None:
    """Raises Forbidden unless the caller has one of the roles."""
    if caller.roles.isdisjoint(roles):
        raise Forbidden(
            "not allowed for this caller",
            where=caller.name,
            got=_listed(caller.roles) or "no role",
            wanted=_listed(roles),
        )


def acting_site(caller: Caller, site: str) -> str:
    """The site that a request is made for: the caller's own, which an empty ``site`` also means, or any
    site's through a gateway.

    Raises:
        Forbidden: another site's name, or a caller that is no site.
    """
    require(caller, Role.SITE, Role.GATEWAY)
    site = site or caller.name
    if site != caller.name and Role.GATEWAY not in caller.roles:
        raise Forbidden("a site acts for itself alone", where=caller.name, got=f"site {site!r}")
    return valid_name(site)


def valid_name(name: str) -> str:
    """Raises Unauthenticated for a name that no site can have."""
    if not SITE_NAME.fullmatch(name):
        raise Unauthenticated("not a name of a site", got=ascii(name)[:80], wanted=SITE_NAME.pattern)
    return name


class LoopbackAccess:
    """TCP without TLS, on loopback: callers of this machine name themselves and may do everything."""

    def caller(self, context: Context) -> Caller:
        if not _from_loopback(context.peer()):
            raise Unauthenticated("not a caller of this machine", where=context.peer())
        return Caller(_name_given(context), frozenset(Role))


class SocketAccess:
    """A unix socket in a folder of mode 0700: whoever can open it is the server's own user.

    Several people may be: the name a caller gives is taken down in the records.
    """

    def caller(self, context: Context) -> Caller:
        if not context.peer().startswith("unix:"):
            raise Unauthenticated("not a caller of the socket", where=context.peer())
        return Caller(_name_given(context), frozenset({Role.ADMIN, Role.GATEWAY}))


class CertificateAccess:
    """Mutual TLS: the certificate's common name is the caller, its organizational unit the role.

    That the authority has signed the certificate is checked in the handshake. What can change while a
    connection lasts is checked with every request: its dates, and the revocations.

    Args:
        ca: the authority's certificate, which signs the revocations.
        crl: the list of revoked certificates, PEM. It may be replaced at any time. While it is missing,
            damaged or signed by somebody else, nobody is let in.

    Raises:
        FileError: a file is missing or not in PEM format.
        StoreDamaged: the list is not signed by the authority.
    """

    def __init__(self, ca: Path, crl: Path) -> None:
        self._revocations = _Revocations(read_certificate(ca), crl)
        self._revocations.current()
        self._failing = ""

    def caller(self, context: Context) -> Caller:
        identity = _identity(context.auth_context())
        if not identity.not_before <= datetime.now(UTC) <= identity.not_after:
            raise Unauthenticated("the certificate is out of its dates", where=identity.name)
        if identity.serial in self._trusted_revocations():
            raise Unauthenticated("the certificate is revoked", where=identity.name)
        return Caller(identity.name, identity.roles)

    def _trusted_revocations(self) -> frozenset[int]:
        try:
            serials = self._revocations.current()
        except FedmergeError as error:
            if str(error) != self._failing:
                self._failing = str(error)
                logger.error("nobody is let in: %s", error)
            raise Unauthenticated("nobody is let in: the server cannot read its revocations") from error
        self._failing = ""
        return serials


@dataclass(frozen=True)
class _Identity:
    name: str
    roles: frozenset[Role]
    serial: int
    not_before: datetime
    not_after: datetime


class _Revocations:
    """The serials in a file of revocations, read again whenever the file changes."""

    def __init__(self, ca: x509.Certificate, path: Path) -> None:
        self._ca, self._path = ca, path
        self._seen: tuple[int, int, int] | None = None
        self._serials: frozenset[int] = frozenset()

    def current(self) -> frozenset[int]:
        """Raises FileError, StoreDamaged, again with every call until the file can be used."""
        found = self._fingerprint()
        if found is None or found != self._seen:
            self._seen = None
            self._serials = self._read()
            self._seen = found
            logger.info("%s: %d certificates are revoked", self._path, len(self._serials))
        return self._serials

    def _fingerprint(self) -> tuple[int, int, int] | None:
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def _read(self) -> frozenset[int]:
        try:
            listed = x509.load_pem_x509_crl(self._path.read_bytes())
        except OSError as error:
            raise FileError("cannot be read", where=self._path, got=error.strerror) from error
        except ValueError as error:
            raise FileError("not a list of revocations in PEM format", where=self._path) from error
        if listed.issuer != self._ca.subject or not _signed_by(listed, self._ca):
            raise StoreDamaged("revocations that the authority has not signed", where=self._path)
        return frozenset(entry.serial_number for entry in listed)


def _signed_by(crl: x509.CertificateRevocationList, ca: x509.Certificate) -> bool:
    try:
        return crl.is_signature_valid(ca.public_key())  # type: ignore[arg-type]  # a type error is caught
    except TypeError:
        return False


def _identity(auth: Mapping[str, Iterable[bytes]]) -> _Identity:
    shown = list(auth.get("x509_pem_cert", ()))
    if len(shown) != 1:
        raise Unauthenticated("no certificate was shown")
    return _parsed(shown[0])


@lru_cache(maxsize=1024)
def _parsed(pem: bytes) -> _Identity:
    try:
        cert = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise Unauthenticated("the certificate cannot be read") from error
    names = cert.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    units = cert.subject.get_attributes_for_oid(NameOID.ORGANIZATIONAL_UNIT_NAME)
    if len(names) != 1:
        raise Unauthenticated("a certificate with one common name is wanted", got=f"{len(names)} names")
    return _Identity(
        name=valid_name(str(names[0].value)),
        roles=frozenset(role for role in Role if [unit.value for unit in units] == [role.value]),
        serial=cert.serial_number,
        not_before=cert.not_valid_before_utc,
        not_after=cert.not_valid_after_utc,
    )


def _name_given(context: Context) -> str:
    """The name a caller gives itself, where that is all there is."""
    names = [value for key, value in context.invocation_metadata() or () if key == SITE_KEY]
    if len(names) > 1:
        raise Unauthenticated("more than one name", where=SITE_KEY)
    return valid_name(str(names[0])) if names else LOCAL


def _from_loopback(peer: str) -> bool:
    """Whether gRPC's name of a peer, as ``ipv4:127.0.0.1:5`` or ``ipv6:%5B::1%5D:5``, is this machine."""
    kind, _, address = unquote(peer).partition(":")
    host = address.rpartition(":")[0].strip("[]")
    try:
        return kind in ("ipv4", "ipv6") and ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listed(roles: Iterable[Role]) -> str:
    return " or ".join(sorted(roles))
