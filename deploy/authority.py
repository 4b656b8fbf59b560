"""A certificate authority in a folder, for one federation.

    ca.crt, ca.key     the authority; its key signs everything and stays where certificates are made
    crl.pem            signed list of revoked certificates, for the aggregation server
    index.jsonl        what was issued and revoked, one JSON object per line
    server/            server.crt, server.key: the SuperLink, its proxy and the aggregation server
    gateway/           gateway.crt, gateway.key: the Flower side of the server, at the aggregation server
    sites/NAME/        site.crt, site.key: a site at the aggregation server; supernode.key, supernode.pub:
                       the same site at the SuperLink
    admins/NAME/       admin.crt, admin.key: who rolls back, removes, approves
    revoked/           folders of revoked certificates

Each of these folders also holds ca.crt and is what is handed over. Folders have mode 0700, keys 0600.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Literal, get_args

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import BaseModel, ConfigDict, ValidationError

from fedmerge.common.errors import ConfigError, Duplicate, FedmergeError, FileError, NotFound, StoreDamaged
from fedmerge.common.names import SITE_NAME
from fedmerge.common.tls import TlsFiles, check_dates, check_pair, check_private, hosts_of, read_certificate
from fedmerge.common.writing import replacing, sync_folder
from fedmerge.server.service.access import LOCAL, Role

SERVER, GATEWAY = "server", "gateway"
RESERVED = frozenset({SERVER, GATEWAY, LOCAL})
CA_DAYS, DAYS = 3650, 397
CLOCK_SKEW = timedelta(minutes=5)
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
"""Every server certificate stands for these too: the proxy reaches the SuperLink on loopback."""

SITE_README = """\
# Keys of site {name}

Made for this site alone: whoever holds the keys acts as {name}. Keep this folder at mode 0700, and the
keys at 0600. If a key may have leaked, ask for `fedmerge certs revoke {name}`.

| file | use |
|---|---|
| `ca.crt` | the federation's authority, by which the server is recognized |
| `site.crt`, `site.key` | this site at the aggregation server (gRPC, mutual TLS) |
| `supernode.key` | this site at the server's SuperLink, as `[tls] supernode_key` in client.toml |
| `supernode.pub` | its public half; the server has a copy |

    fedmerge client --config client.toml --check
    fedmerge client --config client.toml

The server lets the site in once `supernode.pub` lies in its `[flower] sites` folder as `{name}.pub`.
"""

Kind = Literal["server", "gateway", "site", "admin"]


class Issued(BaseModel):
    """One line of the index: one certificate.

    Attributes:
        serial: hexadecimal. ``folder``: where its files are, relative to the authority's.
        revoked: when, or None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: Kind
    serial: str
    folder: str
    not_after: datetime
    revoked: datetime | None = None


def tls_files(folder: Path) -> TlsFiles:
    """The TLS files of an issued folder, as it was handed over. Raises NotFound."""
    for kind in get_args(Kind):
        if (folder / f"{kind}.crt").exists():
            return TlsFiles(ca=folder / "ca.crt", cert=folder / f"{kind}.crt", key=folder / f"{kind}.key")
    raise NotFound("no certificate in this folder", where=folder)


class Authority:
    """Issues and revokes certificates.

    Args:
        folder: as laid out above, made by :meth:`create`.

    Raises:
        FileError, ConfigError: the authority's certificate or key cannot be used.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "ca.key").exists():
            raise ConfigError("no certificate authority here", where=folder, do="fedmerge certs init")
        self._cert = read_certificate(folder / "ca.crt")
        check_private(folder / "ca.key")
        self._key = _authority_key(folder / "ca.key")
        check_pair(self._cert, self._key, folder / "ca.key")
        check_dates(self._cert, folder / "ca.crt")

    @classmethod
    def create(cls, folder: Path, name: str = "fedmerge", days: int = CA_DAYS) -> Authority:
        """A new authority in a new or empty folder.

        Raises:
            ConfigError: there is something in the folder already.
        """
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError("not an empty folder", where=folder, do="Choose another with --dir.")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        key = ec.generate_private_key(ec.SECP384R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = (
            _builder(subject, subject, key.public_key(), key.public_key(), days)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs=True), critical=True)
        )
        _write_key(folder / "ca.key", key)
        _write(folder / "ca.crt", builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM), 0o644)
        authority = cls(folder)
        with authority._locked():
            authority._write_index([])
            authority._write_revocations([])
        return authority

    def server(self, hosts: Sequence[str], days: int = DAYS) -> Path:
        """The server's certificate for these names and addresses, and a gateway's unless there is one.

        Raises:
            Duplicate: there is one that is not revoked. ConfigError: no host, or not the name of one.
        """
        if not hosts:
            raise ConfigError("name at least one host that sites reach the server by")
        names = [_host(host) for host in dict.fromkeys([*hosts, *LOCAL_HOSTS])]
        folder = self._issue(SERVER, "server", days, x509.SubjectAlternativeName(names))
        if all(entry.name != GATEWAY or entry.revoked for entry in self.issued()):
            self._issue(GATEWAY, "gateway", days)
        return folder

    def site(self, name: str, days: int = DAYS) -> Path:
        """A site's folder: certificate, SuperNode key pair, and what to do with them.

        Raises:
            Duplicate: the name is in use. ConfigError: not a site's name.
        """

        def add_supernode(folder: Path) -> None:
            key = ec.generate_private_key(ec.SECP384R1())
            _write_key(folder / "supernode.key", key, PrivateFormat.OpenSSH)
            public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
            _write(folder / "supernode.pub", public + f" {name}\n".encode(), 0o644)
            _write(folder / "README.md", SITE_README.format(name=name).encode(), 0o644)

        return self._issue(_person(name), "site", days, add=add_supernode)

    def admin(self, name: str, days: int = DAYS) -> Path:
        """An admin's folder. Raises as :meth:`site`."""
        return self._issue(_person(name), "admin", days)

    def issued(self) -> list[Issued]:
        """Every certificate ever issued, in order. Raises StoreDamaged."""
        path = self.folder / "index.jsonl"
        try:
            return [Issued.model_validate_json(line) for line in path.read_text().splitlines()]
        except (OSError, ValueError) as error:
            what = "invalid line" if isinstance(error, ValidationError) else "cannot be read"
            raise StoreDamaged(what, where=path) from error

    def revoke(self, name: str) -> list[Issued]:
        """Revokes all certificates of a name and writes crl.pem; once more for a revoked name is harmless.

        Raises:
            NotFound: nothing was ever issued under that name.
        """
        with self._locked():
            before = self.issued()
            if all(entry.name != name for entry in before):
                raise NotFound("no certificate of that name", got=repr(name))
            now = datetime.now(UTC).replace(microsecond=0)
            after = [
                entry.model_copy(update={"revoked": entry.revoked or now}) if entry.name == name else entry
                for entry in before
            ]
            self._write_index(after)
            self._write_revocations(after)
            self._put_away([entry for entry in before if entry.name == name and not entry.revoked])
            return [entry for entry in after if entry.name == name]

    def renew(self, name: str, days: int = DAYS) -> Path:
        """A new certificate for the same key, name and hosts, in place of the old file.

        The old certificate stays valid until it expires, so that nothing stops while the new one travels.

        Raises:
            NotFound: nothing unrevoked under that name.
        """
        with self._locked():
            entries = self.issued()
            last = next(
                (entry for entry in reversed(entries) if entry.name == name and not entry.revoked), None
            )
            if last is None:
                raise NotFound("no certificate of that name", got=repr(name))
            path = self.folder / last.folder / f"{last.kind}.crt"
            old = read_certificate(path)
            key = old.public_key()
            assert isinstance(key, ec.EllipticCurvePublicKey), "as it was issued"
            hosts = x509.SubjectAlternativeName([_host(host) for host in hosts_of(old)])
            cert = self._sign(old.subject, last.kind, key, days, hosts if hosts_of(old) else None)
            self._write_index([*entries, _entry(name, last.kind, cert, last.folder)])
            with replacing(path) as file:
                file.write(cert.public_bytes(Encoding.PEM))
            return path

    def _issue(
        self,
        name: str,
        kind: Kind,
        days: int,
        hosts: x509.SubjectAlternativeName | None = None,
        add: Callable[[Path], None] = lambda folder: None,
    ) -> Path:
        """A new folder with a certificate, its key, the authority's certificate and what ``add`` puts there.

        The index is written before them: a certificate that is not in it could not be revoked.
        """
        place = kind if kind in (SERVER, GATEWAY) else f"{kind}s/{name}"
        with self._locked():
            entries = self.issued()
            if any(entry.name == name and not entry.revoked for entry in entries):
                raise Duplicate("the name is in use", got=repr(name), do=f"fedmerge certs revoke {name}")
            key = ec.generate_private_key(ec.SECP384R1())
            cert = self._sign(_subject(name, kind), kind, key.public_key(), days, hosts)
            with _new_folder(self.folder / place) as folder:
                self._write_index([*entries, _entry(name, kind, cert, place)])
                _write_key(folder / f"{kind}.key", key)
                _write(folder / f"{kind}.crt", cert.public_bytes(Encoding.PEM), 0o644)
                _write(folder / "ca.crt", self._cert.public_bytes(Encoding.PEM), 0o644)
                add(folder)
        return self.folder / place

    def _sign(
        self,
        subject: x509.Name,
        kind: Kind,
        key: ec.EllipticCurvePublicKey,
        days: int,
        hosts: x509.SubjectAlternativeName | None,
    ) -> x509.Certificate:
        """A server's certificate cannot be shown by a client, nor a client's by a server."""
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if kind == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
        issuer_key = self._key.public_key()
        builder = (
            _builder(subject, self._cert.subject, key, issuer_key, days, self._cert.not_valid_after_utc)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=True)
        )
        if hosts is not None:
            builder = builder.add_extension(hosts, critical=False)
        return builder.sign(self._key, hashes.SHA384())

    def _write_index(self, entries: Sequence[Issued]) -> None:
        with replacing(self.folder / "index.jsonl") as file:
            file.writelines(f"{entry.model_dump_json()}\n".encode() for entry in entries)

    def _write_revocations(self, entries: Sequence[Issued]) -> None:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self._cert.subject)
            .last_update(now)
            .next_update(self._cert.not_valid_after_utc)
        )
        for entry in entries:
            if entry.revoked:
                revoked = x509.RevokedCertificateBuilder().serial_number(int(entry.serial, 16))
                builder = builder.add_revoked_certificate(revoked.revocation_date(entry.revoked).build())
        with replacing(self.folder / "crl.pem") as file:
            file.write(builder.sign(self._key, hashes.SHA384()).public_bytes(Encoding.PEM))

    def _put_away(self, entries: Sequence[Issued]) -> None:
        """Frees the folders of revoked certificates; their keys are kept, and open nothing any more."""
        for entry in entries:
            folder = self.folder / entry.folder
            if folder.exists():
                kept = self.folder / "revoked"
                kept.mkdir(mode=0o700, exist_ok=True)
                folder.rename(kept / f"{entry.name}-{entry.serial[:16]}")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    days: int,
    latest: datetime | None = None,
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    end = now + timedelta(days=days)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(min(end, latest or end))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _key_usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _subject(name: str, kind: Kind) -> x509.Name:
    unit = kind if kind == "server" else Role(kind).value
    return x509.Name(
        [
            x509.NameAttribute(NameOID.COMMON_NAME, name),
            x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit),
        ]
    )


def _entry(name: str, kind: Kind, cert: x509.Certificate, place: str) -> Issued:
    return Issued(
        name=name,
        kind=kind,
        serial=f"{cert.serial_number:x}",
        folder=place,
        not_after=cert.not_valid_after_utc,
    )


def _person(name: str) -> str:
    """The name of a site or an admin. Raises ConfigError."""
    if not SITE_NAME.fullmatch(name) or name in RESERVED:
        raise ConfigError("not a name for a site or an admin", got=ascii(name)[:80], wanted=SITE_NAME.pattern)
    return name


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        pass
    labels = host.removeprefix("*.").split(".")
    if len(host) > 253 or not all(label.replace("-", "").isalnum() and label.isascii() for label in labels):
        raise ConfigError("not the name or address of a host", got=ascii(host)[:80])
    return x509.DNSName(host)


def _authority_key(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise FileError("not a private key in PEM format", where=path) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise FileError("not an ECDSA key", where=path)
    return key


def _write(path: Path, data: bytes, mode: int) -> None:
    """A new file, on disk. Raises ConfigError rather than write over one."""
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as error:
        raise ConfigError("is there already and is not written over", where=path) from error
    except OSError as error:
        raise FileError("cannot be written", where=path, got=error.strerror) from error


def _write_key(
    path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat = PrivateFormat.PKCS8
) -> None:
    _write(path, key.private_bytes(Encoding.PEM, form, NoEncryption()), 0o600)


@contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name once it is complete. Raises ConfigError if the name is taken."""
    if path.exists():
        raise ConfigError("is there already and is not written over", where=path)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    sync_folder(path.parent.parent)
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(mode=0o700)
    try:
        yield part
        sync_folder(part)
        part.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        raise FileError("cannot be written", where=path, got=error.strerror) from error
    except FedmergeError:
        shutil.rmtree(part)
        raise
