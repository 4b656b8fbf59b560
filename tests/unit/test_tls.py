"""Is every fault of a certificate or key told, with the file and the way out?"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from fedmerge.common.errors import ConfigError, FedmergeError, FileError
from fedmerge.common.tls import (
    TlsFiles,
    channel_credentials,
    check,
    check_dates,
    check_host,
    check_supernode_key,
    describe,
    is_loopback,
    problems,
    read_certificate,
    require_tls,
    server_credentials,
)
from fedmerge.deploy.authority import Authority, tls_files


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.create(tmp_path_factory.mktemp("authority") / "certs", "lab")
    made.server(["fed.example.org", "10.0.0.7", "*.sites.example.org"])
    made.site("hospital-1")
    return made


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> TlsFiles:
    """A copy of the server's files, to be damaged."""
    source = tls_files(authority.folder / "server")
    for path in (source.ca, source.cert, source.key):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "server.key").chmod(0o600)
    return tls_files(tmp_path)


def test_sound_files_have_no_problems_and_become_credentials(files: TlsFiles) -> None:
    assert problems(files, "fed.example.org") == []
    server_credentials(files)
    channel_credentials(files)


def test_a_certificate_in_words(files: TlsFiles) -> None:
    found = describe(read_certificate(files.cert))
    assert (found.subject, found.unit, found.issuer, found.key) == ("server", "server", "lab", "ECDSA P-384")
    assert {"fed.example.org", "*.sites.example.org", "10.0.0.7", "localhost"} < set(found.hosts)
    assert found.left.days in (396, 397)


def _other_key(files: TlsFiles) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


def _encrypted_key(files: TlsFiles) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    form = BestAvailableEncryption(b"secret")
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, form))


def _other_authority(files: TlsFiles) -> None:
    other = Authority.create(files.ca.parent / "other", "elsewhere")
    files.ca.write_bytes((other.folder / "ca.crt").read_bytes())


DAMAGE: dict[str, tuple[Callable[[TlsFiles], object], type[FedmergeError], str, str]] = {
    "no authority": (lambda f: f.ca.unlink(), FileError, "ca.crt", "No such file"),
    "no certificate": (lambda f: f.cert.unlink(), FileError, "server.crt", "No such file"),
    "no key": (lambda f: f.key.unlink(), FileError, "server.key", "No such file"),
    "a folder for a key": (lambda f: (f.key.unlink(), f.key.mkdir()), FileError, "server.key", "directory"),
    "empty certificate": (lambda f: f.cert.write_bytes(b""), FileError, "server.crt", "not a certificate"),
    "a key for a certificate": (
        lambda f: f.cert.write_bytes(f.key.read_bytes()),
        FileError,
        "server.crt",
        "not a certificate",
    ),
    "a certificate for a key": (
        lambda f: f.key.write_bytes(f.cert.read_bytes()),
        FileError,
        "server.key",
        "not a private key",
    ),
    "encrypted key": (_encrypted_key, FileError, "server.key", "encrypted"),
    "another key": (_other_key, ConfigError, "server.key", "belongs to another certificate"),
    "key for all": (lambda f: f.key.chmod(0o644), ConfigError, "server.key", "got mode 644. chmod 600"),
    "key for a group": (lambda f: f.key.chmod(0o640), ConfigError, "server.key", "mode 640"),
    "another authority": (_other_authority, ConfigError, "server.crt", "not signed by the authority"),
    "no authority at all": (
        lambda f: f.ca.write_bytes(f.cert.read_bytes()),
        ConfigError,
        "server.crt",
        "not signed by the authority",
    ),
}


@pytest.mark.parametrize(("damage", "kind", "file", "why"), DAMAGE.values(), ids=DAMAGE)
def test_one_fault_is_one_problem_that_names_the_file(
    files: TlsFiles, damage: Callable[[TlsFiles], object], kind: type[FedmergeError], file: str, why: str
) -> None:
    damage(files)
    (problem,) = problems(files)
    assert type(problem) is kind
    assert str(problem.where).endswith(file)
    assert why in str(problem)
    assert "PRIVATE" not in str(problem)
    for refuses in (check, server_credentials, channel_credentials):
        with pytest.raises(kind):
            refuses(files)


def test_all_faults_are_found_at_once(files: TlsFiles) -> None:
    files.ca.unlink()
    files.cert.unlink()
    files.key.chmod(0o666)
    assert [Path(str(problem.where)).name for problem in problems(files)] == [
        "ca.crt",
        "server.crt",
        "server.key",
    ]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_told(files: TlsFiles) -> None:
    files.cert.chmod(0)
    (problem,) = problems(files)
    assert "Permission denied" in str(problem)


def test_a_certificate_is_valid_from_its_first_second_to_its_last(files: TlsFiles) -> None:
    cert = read_certificate(files.cert)
    second = timedelta(seconds=1)
    check_dates(cert, now=cert.not_valid_before_utc)
    check_dates(cert, now=cert.not_valid_after_utc)
    with pytest.raises(ConfigError, match=r"certs renew"):
        check_dates(cert, now=cert.not_valid_after_utc + second)
    with pytest.raises(ConfigError, match=r"not valid yet.*clock"):
        check_dates(cert, now=cert.not_valid_before_utc - second)


@pytest.mark.parametrize(
    "host", ["fed.example.org", "FED.example.ORG", "10.0.0.7", "127.0.0.1", "::1", "a.sites.example.org"]
)
def test_a_host_of_the_certificate_fits(files: TlsFiles, host: str) -> None:
    check_host(read_certificate(files.cert), host)


@pytest.mark.parametrize(
    "host",
    ["example.org", "xfed.example.org", "10.0.0.8", "sites.example.org", "a.b.sites.example.org", "", "."],
)
def test_another_host_does_not_fit(files: TlsFiles, host: str) -> None:
    with pytest.raises(ConfigError, match="for other hosts"):
        check_host(read_certificate(files.cert), host)


def test_a_client_s_certificate_fits_no_host(authority: Authority) -> None:
    with pytest.raises(ConfigError, match="got no host"):
        check_host(read_certificate(authority.folder / "sites/hospital-1/site.crt"), "hospital-1")


def ssh_key(path: Path, *arguments: str) -> Path:
    subprocess.run(["ssh-keygen", "-q", *arguments, "-f", str(path)], check=True)
    return path


@pytest.mark.parametrize("bits", ["256", "384"])
def test_supernodes_take_ecdsa_keys_of_ssh_keygen(tmp_path: Path, bits: str) -> None:
    check_supernode_key(ssh_key(tmp_path / "key", "-t", "ecdsa", "-b", bits, "-N", ""))


def test_supernodes_take_the_key_of_a_site_s_folder(authority: Authority) -> None:
    check_supernode_key(authority.folder / "sites/hospital-1/supernode.key")


def test_what_supernodes_do_not_take_is_told(tmp_path: Path, files: TlsFiles) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    path = tmp_path / "ed25519"
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="got Ed25519, wanted ECDSA P-256 or P-384"):
        check_supernode_key(path)
    with pytest.raises(FileError, match="not a private key in OpenSSH format"):
        check_supernode_key(files.key)
    with pytest.raises(FileError, match="No such file"):
        check_supernode_key(tmp_path / "none")
    with pytest.raises(FileError, match="encrypted"):
        check_supernode_key(ssh_key(tmp_path / "locked", "-t", "ecdsa", "-N", "secret"))
    path.chmod(0o604)
    with pytest.raises(ConfigError, match="chmod 600"):
        check_supernode_key(path)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.10", "::1", "[::1]", "localhost", "unix:/run/x.sock"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    require_tls(host, None)


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "127.0.0.1.example.org", "localhost.example.org", "", "127.1", "*"]
)
def test_elsewhere_there_is_nothing_without_tls(host: str, files: TlsFiles) -> None:
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="needs TLS"):
        require_tls(host, None)
    require_tls(host, files)
