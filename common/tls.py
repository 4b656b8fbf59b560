"""Certificates and keys: reading them, saying what is wrong with them, and handing them to gRPC.

Every check is a function of its own that raises one error naming the file and the way out;
:func:`problems` runs them all and collects what they raise.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import grpc
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import NameOID
from pydantic import BaseModel, ConfigDict

from fedmerge.common.errors import ConfigError, FedmergeError, FileError

READABLE_BY_OTHERS = 0o077

Result = TypeVar("Result")


class TlsFiles(BaseModel):
    """One side's TLS material, as PEM files.

    Attributes:
        ca: the authority that must have signed the other side's certificate.
        cert: this side's certificate. ``key``: its private key, readable by its owner alone.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ca: Path
    cert: Path
    key: Path


class PrivateKey(Protocol):
    """A private key of any kind: all that is asked of it here is its public half."""

    def public_key(self) -> PublicKeyTypes: ...


@dataclass(frozen=True)
class Description:
    """A certificate in words.

    Attributes:
        subject: its common name; ``unit`` the organizational unit, which is the role of a client.
        hosts: DNS names and addresses it stands for. ``serial``: hexadecimal.
        left: until ``not_after``, negative once it is past. ``key``: kind and size of its key.
    """

    subject: str
    unit: str
    hosts: tuple[str, ...]
    issuer: str
    serial: str
    not_after: datetime
    left: timedelta
    key: str


def describe(cert: x509.Certificate, now: datetime | None = None) -> Description:
    """What a certificate says, as seen at ``now``, which is this moment by default."""
    return Description(
        subject=_attribute(cert.subject, NameOID.COMMON_NAME),
        unit=_attribute(cert.subject, NameOID.ORGANIZATIONAL_UNIT_NAME),
        hosts=hosts_of(cert),
        issuer=_attribute(cert.issuer, NameOID.COMMON_NAME),
        serial=f"{cert.serial_number:x}",
        not_after=cert.not_valid_after_utc,
        left=cert.not_valid_after_utc - (now or datetime.now(UTC)),
        key=_kind(cert.public_key()),
    )


def hosts_of(cert: x509.Certificate) -> tuple[str, ...]:
    """DNS names and addresses that a certificate stands for; empty for a client's."""
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return (
        *names.get_values_for_type(x509.DNSName),
        *(str(address) for address in names.get_values_for_type(x509.IPAddress)),
    )


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file. Raises FileError."""
    try:
        return x509.load_pem_x509_certificate(_read(path))
    except ValueError as error:
        raise FileError("not a certificate in PEM format", where=path) from error


def read_key(path: Path) -> PrivateKey:
    """A private key from a PEM file without a passphrase. Raises FileError."""
    try:
        return load_pem_private_key(_read(path), password=None)
    except TypeError as error:
        raise FileError(
            "the key is encrypted", where=path, do="Servers start unattended: give it without a passphrase."
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FileError("not a private key in PEM format", where=path) from error


def check_private(path: Path) -> None:
    """Raises ConfigError if others than its owner may read a key; FileError if it is missing."""
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error
    if mode & READABLE_BY_OTHERS:
        raise ConfigError(
            "a private key that others can read", where=path, got=f"mode {mode:o}", do=f"chmod 600 {path}"
        )


def check_pair(cert: x509.Certificate, key: PrivateKey, where: object = None) -> None:
    """Raises ConfigError if the key is not the certificate's."""
    if _encoded(cert.public_key()) != _encoded(key.public_key()):
        raise ConfigError("the key belongs to another certificate", where=where)


def check_dates(cert: x509.Certificate, where: object = None, now: datetime | None = None) -> None:
    """Raises ConfigError before a certificate's first second and after its last."""
    now = now or datetime.now(UTC)
    if now > cert.not_valid_after_utc:
        raise ConfigError(
            "the certificate has expired",
            where=where,
            got=f"valid until {cert.not_valid_after_utc:%Y-%m-%d %H:%M} UTC",
            do="Renew it with: fedmerge certs renew",
        )
    if now < cert.not_valid_before_utc:
        raise ConfigError(
            "the certificate is not valid yet",
            where=where,
            got=f"valid from {cert.not_valid_before_utc:%Y-%m-%d %H:%M} UTC",
            do="Check this machine's clock.",
        )


def check_issuer(cert: x509.Certificate, ca: x509.Certificate, where: object = None) -> None:
    """Raises ConfigError unless ``ca`` is an authority and has signed ``cert``."""
    try:
        constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints).value
        if not constraints.ca:
            raise ValueError("not an authority")
        cert.verify_directly_issued_by(ca)
    except (x509.ExtensionNotFound, ValueError, TypeError, InvalidSignature) as error:
        raise ConfigError(
            "not signed by the authority",
            where=where,
            got=f"issuer {describe(cert).issuer!r}",
            wanted=repr(describe(ca).subject),
        ) from error


def check_host(cert: x509.Certificate, host: str, where: object = None) -> None:
    """Raises ConfigError if a server's certificate is not for the name or address it is reached by."""
    hosts = hosts_of(cert)
    try:
        fits = str(ipaddress.ip_address(host)) in hosts
    except ValueError:
        fits = any(_matches(pattern.lower(), host.lower()) for pattern in hosts)
    if not fits:
        raise ConfigError(
            "the certificate is for other hosts",
            where=where,
            got=", ".join(hosts) or "no host",
            wanted=host,
            do=f"Make one with: fedmerge certs server --host {host}",
        )


def check_supernode_key(path: Path) -> None:
    """Raises unless a file is a key that SuperNodes take: ECDSA, OpenSSH format, readable by its owner alone.

    Raises:
        FileError: missing, encrypted, or in another format. ConfigError: another kind of key, or its mode.
    """
    check_private(path)
    try:
        key = load_ssh_private_key(_read(path), password=None)
    except TypeError as error:
        raise FileError("the key is encrypted", where=path) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FileError("not a private key in OpenSSH format", where=path) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(
            "SuperNodes cannot use this kind of key",
            where=path,
            got=_kind(key.public_key()),
            wanted="ECDSA P-256 or P-384",
            do="Make one with: ssh-keygen -t ecdsa -b 384",
        )


def problems(files: TlsFiles, host: str | None = None) -> list[FedmergeError]:
    """All that is wrong with one side's files; for a server, also with ``host`` as its name or address."""
    found: list[FedmergeError] = []

    def attempt(check: Callable[[], Result]) -> Result | None:
        try:
            return check()
        except FedmergeError as error:
            found.append(error)
            return None

    ca = attempt(partial(read_certificate, files.ca))
    cert = attempt(partial(read_certificate, files.cert))
    key = attempt(partial(read_key, files.key))
    if key is not None:
        attempt(partial(check_private, files.key))
    if ca is not None:
        attempt(partial(check_dates, ca, files.ca))
    if cert is not None:
        attempt(partial(check_dates, cert, files.cert))
    if cert is not None and key is not None:
        attempt(partial(check_pair, cert, key, files.key))
    if cert is not None and ca is not None:
        attempt(partial(check_issuer, cert, ca, files.cert))
    if cert is not None and host is not None:
        attempt(partial(check_host, cert, host, files.cert))
    return found


def check(files: TlsFiles, host: str | None = None) -> None:
    """Raises the first of :func:`problems`: FileError or ConfigError."""
    for problem in problems(files, host):
        raise problem


def server_credentials(files: TlsFiles) -> grpc.ServerCredentials:
    """For a gRPC server that talks only to clients with a certificate of ``files.ca``. Raises as check()."""
    check(files)
    pair = (files.key.read_bytes(), files.cert.read_bytes())
    return grpc.ssl_server_credentials(
        [pair], root_certificates=files.ca.read_bytes(), require_client_auth=True
    )


def channel_credentials(files: TlsFiles) -> grpc.ChannelCredentials:
    """For a gRPC client that shows its certificate and trusts only ``files.ca``. Raises as check()."""
    check(files)
    return grpc.ssl_channel_credentials(
        files.ca.read_bytes(), files.key.read_bytes(), files.cert.read_bytes()
    )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone: 127.0.0.0/8, ::1, localhost, a unix socket."""
    if host == "localhost" or host.startswith("unix:"):
        return True
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return False


def require_tls(host: str, tls: TlsFiles | None) -> None:
    """Raises ConfigError for an address that others can reach without TLS."""
    if tls is None and not is_loopback(host):
        raise ConfigError(
            "an address that others can reach needs TLS",
            where=host,
            do="Name ca, cert and key (fedmerge certs makes them), or listen on 127.0.0.1.",
        )


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error


def _attribute(name: x509.Name, kind: x509.ObjectIdentifier) -> str:
    return ", ".join(str(attribute.value) for attribute in name.get_attributes_for_oid(kind))


def _encoded(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _kind(key: object) -> str:
    if isinstance(key, ec.EllipticCurvePublicKey):
        return f"ECDSA P-{key.key_size}"
    if isinstance(key, rsa.RSAPublicKey):
        return f"RSA {key.key_size}"
    return type(key).__name__.removesuffix("PublicKey")


def _matches(pattern: str, host: str) -> bool:
    """A wildcard stands for one leftmost label."""
    return pattern == host or (pattern.startswith("*.") and pattern[1:] == host[host.find(".") :])
