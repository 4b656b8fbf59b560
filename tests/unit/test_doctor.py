"""Does the doctor see what is wrong, say what to do about it, and leave alone what is right?"""

from __future__ import annotations

import shutil
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from rich.console import Console

from fedmerge.common.errors import ConfigError
from fedmerge.deploy import doctor
from fedmerge.deploy.authority import Authority
from fedmerge.deploy.doctor import Check, Checks
from fedmerge.deploy.launch.config import ClientConfig, HostPort, ServerConfig, read_config
from fedmerge.deploy.launch.explain import CAUSES, cause_of, explain


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority's folder with a server and two sites."""
    authority = Authority.create(tmp_path_factory.mktemp("certs") / "certs")
    authority.server(["localhost"])
    authority.site("hospital-1")
    authority.site("hospital-2")
    return authority.folder


def server_config(folder: Path, certs: Path, more: str = "") -> ServerConfig:
    path = folder / "server.toml"
    path.write_text(f"""
[model]
base = "fedmerge.deploy.streams.example:build_model"
[engine]
ray_address = "none"
[tls]
ca = "{certs}/ca.crt"
cert = "{certs}/server/server.crt"
key = "{certs}/server/server.key"
crl = "{certs}/crl.pem"
[flower]
sites = "{certs}/sites"
{more}
""")
    return read_config(ServerConfig, path)


def client_config(folder: Path, certs: Path, more: str = "") -> ClientConfig:
    path = folder / "client.toml"
    path.write_text(f"""
[site]
name = "hospital-1"
task = "example"
{more}
[server]
address = "localhost:1"
[tls]
ca = "{certs}/ca.crt"
key = "{certs}/sites/hospital-1/supernode.key"
""")
    return read_config(ClientConfig, path)


def seen(checks: Checks) -> dict[str, str]:
    """Verdicts by name of the check."""
    return {check.name: check.verdict for check in checks}


def failures(checks: Checks) -> list[str]:
    return [str(check) for check in checks if check.verdict == "FAIL"]


@pytest.fixture
def copied(certs: Path, tmp_path: Path) -> Path:
    """The authority's folder, to damage."""
    return Path(shutil.copytree(certs, tmp_path / "certs"))


def test_right_certificates_pass(certs: Path, tmp_path: Path) -> None:
    found = seen(doctor.server_certificates(server_config(tmp_path, certs)))
    assert set(found.values()) == {"ok"}
    assert {"certificate", "authority", "certificate, on loopback", "revocations"} <= set(found)


def other_authority(folder: Path) -> None:
    other = Authority.create(folder / "other")
    shutil.copy(other.folder / "ca.crt", folder / "ca.crt")


DAMAGE: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "server/server.key").unlink(), "cannot be read"),
    (lambda folder: (folder / "server/server.key").chmod(0o644), "others can read"),
    (lambda folder: shutil.copy(folder / "ca.key", folder / "server/server.key"), "another certificate"),
    (lambda folder: (folder / "server/server.crt").write_text("no"), "not a certificate"),
    (lambda folder: (folder / "crl.pem").unlink(), "revocations"),
    (other_authority, "not signed by the authority"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGE)
def test_every_fault_of_the_certificates_is_a_failure(
    damage: Callable[[Path], object], said: str, copied: Path, tmp_path: Path
) -> None:
    damage(copied)
    found = failures(doctor.server_certificates(server_config(tmp_path, copied)))
    assert any(said in text for text in found), found


def test_a_certificate_for_another_host_is_a_failure(certs: Path, tmp_path: Path) -> None:
    config = server_config(tmp_path, certs, 'listen = "10.1.2.3:1"')
    assert any("10.1.2.3" in text for text in failures(doctor.server_certificates(config)))


def test_a_certificate_that_ends_soon_is_a_warning(tmp_path: Path) -> None:
    authority = Authority.create(tmp_path / "short")
    authority.server(["localhost"], days=10)
    found = seen(doctor.server_certificates(server_config(tmp_path, authority.folder)))
    assert found["certificate"] == "warn"


def test_keys_of_sites_are_counted_and_a_bad_one_is_named(copied: Path, tmp_path: Path) -> None:
    (copied / "sites" / "hospital-1" / "supernode.pub").write_bytes(
        ed25519.Ed25519PrivateKey.generate().public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    )
    found = list(doctor.site_keys(server_config(tmp_path, copied)))
    assert seen(iter(found)) == {"key of site hospital-1": "FAIL", "keys of sites": "ok"}
    assert "Ed25519" in found[0].found
    assert found[1].found == "1: hospital-2"


def test_no_registered_site_is_a_warning(certs: Path, tmp_path: Path) -> None:
    config = server_config(tmp_path, certs).model_copy()
    empty = config.model_copy(update={"flower": config.flower.model_copy(update={"sites": tmp_path})})
    assert seen(doctor.site_keys(empty)) == {"keys of sites": "warn"}


def test_a_site_s_key_must_be_ecdsa_and_its_own(copied: Path, tmp_path: Path) -> None:
    config, key = client_config(tmp_path, copied), copied / "sites" / "hospital-1" / "supernode.key"
    assert seen(doctor.client_keys(config)) == {"key": "ok", "authority": "ok"}
    key.chmod(0o640)
    assert any("chmod 600" in text for text in failures(doctor.client_keys(config)))
    other = ed25519.Ed25519PrivateKey.generate()
    key.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    key.chmod(0o600)
    assert any("Ed25519" in text and "ECDSA" in text for text in failures(doctor.client_keys(config)))


def test_a_folder_is_written_to_and_measured(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    assert seen(doctor.folder("state folder", tmp_path / "later")) == {
        "state folder": "ok",
        "state folder, write and sync": "ok",
    }
    tmp_path.chmod(0o755)
    assert "warn" in [check.verdict for check in doctor.folder("state folder", tmp_path)]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("free", "verdict"), [(100 << 30, "ok"), (1 << 30, "warn"), (1 << 20, "FAIL")])
def test_little_space_is_a_warning_and_hardly_any_a_failure(
    free: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert seen(doctor.folder("disk", tmp_path / "later"))["disk"] == verdict


def test_a_damaged_ledger_is_a_failure(certs: Path, tmp_path: Path) -> None:
    config = server_config(tmp_path, certs)
    assert seen(doctor.ledger(config)) == {"ledger": "ok"}
    config.state.folder.mkdir()
    (config.state.folder / "ledger.sqlite").write_bytes(b"no database" * 1000)
    assert seen(doctor.ledger(config))["ledger"] == "FAIL"


def test_tasks_that_cannot_be_loaded_are_named_with_the_reason(certs: Path, tmp_path: Path) -> None:
    good = list(doctor.tasks(client_config(tmp_path, certs)))
    assert [check.verdict for check in good] == ["ok", "ok"]
    unknown = client_config(tmp_path, certs, 'held = ["nothing"]')
    assert any("'nothing'" in text and "'plain'" in text for text in failures(doctor.tasks(unknown)))
    missing = client_config(tmp_path, certs).model_copy(
        update={"site": unknown.site.model_copy(update={"task": "no_such_module:stream"})}
    )
    assert any("no_such_module" in text for text in failures(doctor.tasks(missing)))


@contextmanager
def answering(
    certs: Path | None, date: datetime | None = None, host: str = "localhost"
) -> Iterator[HostPort]:
    """A server that answers /health, over TLS with the certificates in a folder."""

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", format_datetime(date or datetime.now(UTC), usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    class Quiet(HTTPServer):
        def handle_error(self, *_: object) -> None:
            pass

    server = Quiet((host, 0), Health)
    if certs is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certs / "server/server.crt", certs / "server/server.key")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield HostPort(host=host, port=server.server_port)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_right_server_is_reached_trusted_and_in_time(certs: Path) -> None:
    with answering(certs) as address:
        found = seen(doctor.handshake("server", address, certs / "ca.crt"))
    assert found == {"server, TLS": "ok", "server, health": "ok", "clocks": "ok"}


def test_another_authority_is_told_from_another_host(certs: Path, tmp_path: Path) -> None:
    stranger = Authority.create(tmp_path / "stranger").folder
    with answering(certs) as address:
        (wrong_ca,) = doctor.handshake("server", address, stranger / "ca.crt")
    assert wrong_ca.verdict == "FAIL"
    assert "another authority" in wrong_ca.do
    with answering(certs, host="127.0.0.2") as address:
        (wrong_host,) = doctor.handshake("server", address, certs / "ca.crt")
    assert wrong_host.verdict == "FAIL"
    assert "another host" in wrong_host.do


def test_a_server_without_tls_and_a_site_with_it_do_not_fit(certs: Path) -> None:
    with answering(None) as address:
        (with_tls,) = doctor.handshake("server", address, certs / "ca.crt")
    assert (with_tls.verdict, "does not speak TLS" in with_tls.do) == ("FAIL", True)
    with answering(certs) as address:
        (without,) = doctor.handshake("server", address, None)
    assert (without.verdict, "name [tls]" in without.do) == ("FAIL", True)


def test_nobody_listening_is_a_failure_with_the_address(certs: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    (check,) = doctor.handshake("server", HostPort(host="127.0.0.1", port=port), certs / "ca.crt")
    assert check.verdict == "FAIL"
    assert f"127.0.0.1:{port}" in check.found


@pytest.mark.parametrize(
    ("minutes", "verdict"), [(0, "ok"), (2, "warn"), (-2, "warn"), (6, "FAIL"), (-6, "FAIL")]
)
def test_clocks_apart_are_told_before_signatures_fail(minutes: int, verdict: str, certs: Path) -> None:
    with answering(certs, datetime.now(UTC) + timedelta(minutes=minutes)) as address:
        assert seen(doctor.handshake("server", address, certs / "ca.crt"))["clocks"] == verdict


def test_a_port_in_use_is_told(certs: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = server_config(tmp_path, certs, f"superlink_port = {port}")
        found = {check.name: check for check in doctor.server_ports(config)}
    assert found["flower.superlink_port"].verdict == "warn"
    assert "in use" in found["flower.superlink_port"].found


def test_ray_that_does_not_listen_is_a_failure(certs: Path, tmp_path: Path) -> None:
    config = server_config(tmp_path, certs)
    assert seen(doctor.ray(config)) == {"Ray": "ok"}
    absent = config.model_copy(
        update={"engine": config.engine.model_copy(update={"ray_address": "127.0.0.1:1"})}
    )
    assert seen(doctor.ray(absent)) == {"Ray": "FAIL"}


def test_the_last_lines_of_a_process_are_explained(tmp_path: Path) -> None:
    (tmp_path / "supernode.log").write_text("ERROR :     Exit Code: 305\n[code: 2004] Failed to activate\n")
    (check,) = doctor.last_words(tmp_path, "supernode", "absent")
    assert check.verdict == "warn"
    assert "not registered" in check.found


def test_failures_stop_a_start_and_warnings_do_not() -> None:
    doctor.require([Check("a", "ok", "fine"), Check("b", "warn", "slow")])
    with pytest.raises(ConfigError, match=r"c: broken\. Mend it\."):
        doctor.require([Check("b", "warn", "slow"), Check("c", "FAIL", "broken", "Mend it.")])


@pytest.mark.parametrize(("verdict", "code"), [("ok", 0), ("warn", 0), ("FAIL", 1)])
def test_the_exit_code_says_whether_anything_failed(verdict: doctor.Verdict, code: int) -> None:
    out = StringIO()
    assert doctor.report([Check("[tls]", verdict, "[found]", "[do]")], Console(file=out, width=120)) == code
    for text in ("[tls]", "[found]", "[do]", verdict):
        assert text in out.getvalue()
    *_, last = out.getvalue().splitlines()
    assert last == ("not ready: 1 of 1 checks failed" if code else "ready")


SAID = {
    "another authority": "ERROR :     Exit Code: 305\nFailed to initialize the connection to the SuperLink.\n"
    "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: unable to get local issuer certificate",
    "another host": "Exit Code: 305\n[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
    "IP address mismatch, certificate is not valid for '127.0.0.2'.",
    "clock": "Exit Code: 305\n[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: "
    "certificate has expired",
    "another process uses it": "Exit Code: 305\n[code: 2004] Failed to activate SuperNode.",
    "shows none": "Exit Code: 305\n[code: 2001] SuperNode authentication is enabled. All SuperNodes must be",
    "not an ECDSA key": "ERROR :     Exit Code: 302\nUnable to parse the private key file.",
    "a key without TLS": "Exit Code: 303\nInsecure connection is enabled, but the SuperNode's private key is",
    "without TLS": "Exit Code: 104\nThe `--enable-supernode-auth` flag requires encrypted TLS.",
    "port is taken": "ERROR:    [Errno 98] error while attempting to bind on address: address already in use",
    "registered before": "Error: [code 23] Public key already in use",
    "speaks TLS": "WARNING :   Option `--insecure` was set. Starting insecure channel to 127.0.0.1:1.\n"
    "INFO : x\nWARNING :   Connection attempt failed, retrying in 0.74 seconds",
    "does not answer": "WARNING :   Connection attempt failed, retrying in 0.33 seconds",
}


@pytest.mark.parametrize(("why", "said"), SAID.items())
def test_the_causes_behind_one_exit_code_are_told_apart(why: str, said: str) -> None:
    found = cause_of(said.splitlines())
    assert found is not None
    assert why in found.why
    assert found.do in explain(said.splitlines())


def test_every_cause_is_found_for_some_output_and_first_matches_win() -> None:
    assert len({cause_of(said.splitlines()) for said in SAID.values()}) == len(SAID)
    assert {cause.code for cause in CAUSES} >= {305, 302, 303, 104, 0}


def test_ordinary_output_has_no_cause() -> None:
    assert explain(["INFO :      Starting Flower SuperNode", "INFO :      SuperNode ID: 7"]) == ""


def test_an_exit_code_is_explained_and_an_unknown_one_is_not() -> None:
    out = StringIO()
    console = Console(file=out, width=200)
    assert doctor.print_causes(305, console) == 0
    assert out.getvalue().count("305: ") >= 5
    assert doctor.print_causes(999, console) == 1
    assert "known are 104" in out.getvalue()


def test_revocations_of_another_authority_are_a_failure(copied: Path, tmp_path: Path) -> None:
    """The server would let nobody in."""
    other = Authority.create(tmp_path / "other")
    shutil.copy(other.folder / "crl.pem", copied / "crl.pem")
    found = seen(doctor.server_certificates(server_config(tmp_path, copied)))
    assert found["revocations"] == "FAIL"


def test_a_ledger_that_is_gone_from_its_blobs_is_a_failure(certs: Path, tmp_path: Path) -> None:
    config = server_config(tmp_path, certs)
    blob = config.state.folder / "blobs" / "ab" / f"{'ab' * 32}.safetensors"
    blob.parent.mkdir(parents=True)
    blob.touch()
    assert seen(doctor.ledger(config)) == {"ledger": "FAIL"}


@pytest.mark.parametrize(
    ("given", "verdict"),
    [("", "ok"), ('name = "opcn"', "FAIL"), ("options = { beta = 1 }", "FAIL")],
)
def test_a_rule_that_there_is_not_is_a_failure(given: str, verdict: str, certs: Path, tmp_path: Path) -> None:
    config = server_config(tmp_path, certs, f"[rule]\n{given}")
    assert seen(doctor.rule(config)) == {"rule": verdict}
