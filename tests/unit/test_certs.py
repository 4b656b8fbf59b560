"""Does the authority make what servers, sites and admins need, once, and take it back?"""

from __future__ import annotations

import os
import re
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from flwr.cli.supernode.register import try_load_public_key
from typer.testing import CliRunner

from fedmerge.common.errors import ConfigError, Duplicate, FedmergeError, NotFound, StoreDamaged
from fedmerge.common.tls import check_supernode_key, describe, problems, read_certificate
from fedmerge.deploy import authority as authority_module
from fedmerge.deploy.authority import Authority, tls_files
from fedmerge.deploy.certs import app


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path / "certs", "lab")


def revoked_serials(authority: Authority) -> set[str]:
    crl = x509.load_pem_x509_crl((authority.folder / "crl.pem").read_bytes())
    return {f"{entry.serial_number:x}" for entry in crl}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_authority_is_for_its_owner_alone_and_has_revoked_nothing(authority: Authority) -> None:
    assert authority.folder.stat().st_mode & 0o777 == 0o700
    assert (authority.folder / "ca.key").stat().st_mode & 0o777 == 0o600
    assert describe(read_certificate(authority.folder / "ca.crt")).subject == "lab"
    assert authority.issued() == []
    assert revoked_serials(authority) == set()


def test_folders_are_for_the_owner_alone_and_fit_together(authority: Authority) -> None:
    folders = {
        "server": authority.server(["fed.example.org"]),
        "gateway": authority.folder / "gateway",
        "site": authority.site("hospital-1"),
        "admin": authority.admin("alice"),
    }
    names = {"server": "server", "gateway": "gateway", "site": "hospital-1", "admin": "alice"}
    for kind, folder in folders.items():
        assert folder.stat().st_mode & 0o777 == 0o700
        assert all(key.stat().st_mode & 0o777 == 0o600 for key in folder.glob("*.key"))
        assert problems(tls_files(folder)) == []
        found = describe(read_certificate(folder / f"{kind}.crt"))
        assert (found.unit, found.subject) == (kind, names[kind])
    assert [entry.name for entry in authority.issued()] == list(names.values())


def test_a_server_is_reached_by_its_names_and_on_loopback(authority: Authority) -> None:
    cert = read_certificate(authority.server(["fed.example.org", "10.0.0.7", "::1"]) / "server.crt")
    assert sorted(describe(cert).hosts) == ["10.0.0.7", "127.0.0.1", "::1", "fed.example.org", "localhost"]


@pytest.mark.parametrize("purpose", ["sslserver", "sslclient"])
def test_openssl_lets_no_client_be_a_server_nor_a_server_a_client(authority: Authority, purpose: str) -> None:
    right = {
        "sslserver": authority.server(["a"]) / "server.crt",
        "sslclient": authority.site("b") / "site.crt",
    }
    for kind, cert in right.items():
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile"]
        done = subprocess.run([*command, authority.folder / "ca.crt", cert], capture_output=True, check=False)
        assert (done.returncode == 0) == (kind == purpose)


def test_a_site_s_supernode_key_is_what_flower_and_ssh_take(authority: Authority) -> None:
    folder = authority.site("hospital-1")
    check_supernode_key(folder / "supernode.key")
    assert b"BEGIN PUBLIC KEY" in try_load_public_key(folder / "supernode.pub")
    derived = subprocess.run(
        ["ssh-keygen", "-y", "-f", folder / "supernode.key"], capture_output=True, text=True, check=True
    )
    assert derived.stdout.split()[:2] == (folder / "supernode.pub").read_text().split()[:2]
    assert "hospital-1" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "-x", ".x", "a b", "a\n", "ä", "x" * 65, "server", "gateway", "local"],
)
@pytest.mark.parametrize("kind", ["site", "admin"])
def test_a_bad_name_changes_nothing(authority: Authority, kind: str, name: str) -> None:
    before = everything(authority.folder)
    with pytest.raises(ConfigError, match="not a name"):
        getattr(authority, kind)(name)
    assert everything(authority.folder) == before


@pytest.mark.parametrize("host", ["", "a b", "a_b", "http://a", "a:80", "*", "a..b", "x" * 254, "ä.org"])
def test_a_bad_host_changes_nothing(authority: Authority, host: str) -> None:
    before = everything(authority.folder)
    with pytest.raises(ConfigError, match="not the name or address of a host"):
        authority.server([host])
    with pytest.raises(ConfigError, match="at least one host"):
        authority.server([])
    assert everything(authority.folder) == before


def test_a_name_is_given_once_whatever_it_is_for(authority: Authority) -> None:
    authority.site("alice")
    authority.server(["a"])
    before = everything(authority.folder)
    for again in (lambda: authority.site("alice"), lambda: authority.admin("alice")):
        with pytest.raises(Duplicate, match="certs revoke alice"):
            again()
    with pytest.raises(Duplicate):
        authority.server(["b"])
    assert everything(authority.folder) == before


def test_nothing_is_written_over(authority: Authority) -> None:
    before = everything(authority.folder)
    with pytest.raises(ConfigError, match="not an empty folder"):
        Authority.create(authority.folder)
    assert everything(authority.folder) == before
    stray = authority.folder / "sites" / "hospital-1"
    stray.mkdir(parents=True)
    (stray / "site.key").write_text("precious")
    with pytest.raises(ConfigError, match="not written over"):
        authority.site("hospital-1")
    assert (stray / "site.key").read_text() == "precious"


def test_revoking_lists_the_serial_and_frees_the_name(authority: Authority) -> None:
    authority.site("other")
    first = describe(read_certificate(authority.site("hospital-1") / "site.crt")).serial
    authority.revoke("hospital-1")
    assert revoked_serials(authority) == {first}
    assert not (authority.folder / "sites/hospital-1").exists()
    second = describe(read_certificate(authority.site("hospital-1") / "site.crt")).serial
    authority.revoke("hospital-1")
    assert revoked_serials(authority) == {first, second}
    assert [bool(entry.revoked) for entry in authority.issued()] == [False, True, True]


def test_revoking_again_mends_a_list_that_a_crash_left_old(authority: Authority) -> None:
    authority.site("hospital-1")
    old = (authority.folder / "crl.pem").read_bytes()
    (entry,) = authority.revoke("hospital-1")
    (authority.folder / "crl.pem").write_bytes(old)
    assert authority.revoke("hospital-1") == [entry]
    assert revoked_serials(authority) == {entry.serial}


def test_who_never_had_a_certificate_cannot_be_revoked(authority: Authority) -> None:
    with pytest.raises(NotFound, match="'nobody'"):
        authority.revoke("nobody")


def test_renewing_keeps_key_and_hosts_and_revoking_takes_both(authority: Authority) -> None:
    folder = authority.server(["fed.example.org"])
    key, old = (folder / "server.key").read_bytes(), describe(read_certificate(folder / "server.crt"))
    authority.renew("server", days=500)
    new = describe(read_certificate(folder / "server.crt"))
    assert problems(tls_files(folder), "fed.example.org") == []
    assert (folder / "server.key").read_bytes() == key
    assert new.hosts == old.hosts
    assert new.left > old.left
    authority.revoke("server")
    assert revoked_serials(authority) == {old.serial, new.serial}
    with pytest.raises(NotFound):
        authority.renew("server")


def test_a_certificate_does_not_outlive_its_authority(tmp_path: Path) -> None:
    short = Authority.create(tmp_path / "certs", days=10)
    cert = read_certificate(short.site("a") / "site.crt")
    assert cert.not_valid_after_utc == read_certificate(short.folder / "ca.crt").not_valid_after_utc


def test_a_crash_while_a_folder_is_made_leaves_no_folder_and_no_unlisted_certificate(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = authority_module._write

    def crash(path: Path, data: bytes, mode: int) -> None:
        if path.name == "ca.crt":
            raise KeyboardInterrupt
        write(path, data, mode)

    with monkeypatch.context() as patch:
        patch.setattr(authority_module, "_write", crash)
        with pytest.raises(KeyboardInterrupt):
            authority.site("hospital-1")
    assert not (authority.folder / "sites/hospital-1").exists()
    (entry,) = authority.issued()
    authority.revoke("hospital-1")
    assert revoked_serials(authority) == {entry.serial}
    authority.site("hospital-1")


def test_a_damaged_index_or_a_readable_key_stops_everything(authority: Authority) -> None:
    (authority.folder / "index.jsonl").write_text("{}\n")
    with pytest.raises(StoreDamaged, match=r"index.jsonl"):
        authority.site("a")
    (authority.folder / "ca.key").chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        Authority(authority.folder)


def run(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, [arguments[0], "--dir", str(folder), *arguments[1:]])
    if isinstance(result.exception, FedmergeError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_make_list_and_revoke_and_show_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "certs"
    output = run(folder, "init", "--name", "lab")
    output += run(folder, "server", "--host", "fed.example.org", "--host", "10.0.0.7")
    output += run(folder, "site", "hospital-1")
    output += run(folder, "admin", "alice", "--days", "20")
    output += run(folder, "revoke", "hospital-1")
    output += run(folder, "renew", "server")
    monkeypatch.setattr(authority_module, "CLOCK_SKEW", timedelta(days=9))
    Authority(folder).site("old", days=-1)
    listed = run(folder, "list")
    rows = {line.split()[0]: line for line in listed.splitlines()}
    assert re.search(r"alice +admin .* expires in (19|20) days", rows["alice"])
    assert f"revoked {datetime.now(UTC):%Y}" in rows["hospital-1"]
    assert rows["server"].split()[-1] == "valid"
    assert "expired" in rows["old"]
    assert "PRIVATE" not in output + listed


def test_a_folder_without_an_authority_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fedmerge certs init"):
        run(tmp_path / "none", "site", "a")


def test_what_is_handed_over_is_on_disk_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = os.fsync

    def noted(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    authority = Authority.create(tmp_path / "certs")
    monkeypatch.setattr(os, "fsync", noted)
    folder = authority.site("hospital-1")
    files = {str(path.name) for path in folder.iterdir()}
    assert files <= {Path(path).name for path in synced}
    assert synced[-1] == str(folder.parent)
    assert str(authority.folder) in synced
