"""Does the SuperLink know the sites whose keys are in the folder, and no others, and does its run stay up?"""

from __future__ import annotations

import logging
import socket
import stat
import tomllib
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedmerge.common.errors import ConfigError, Duplicate, FileError, Unreachable
from fedmerge.common.tls import TlsFiles
from fedmerge.deploy.launch.processes import Patience, Restarts
from fedmerge.deploy.launch.superlink import (
    UNREGISTERED,
    Control,
    Node,
    Place,
    ServingRun,
    Sites,
    Value,
    bundle,
    key_files,
    read_public_key,
)


def public_key() -> bytes:
    key = ec.generate_private_key(ec.SECP384R1()).public_key()
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


class FakeControl:
    """A SuperLink's memory. Like Flower's, it keeps the keys of SuperNodes that were taken out."""

    def __init__(self) -> None:
        self.known: dict[int, Node] = {}
        self.runs: dict[int, tuple[str, str]] = {}
        self.away = False

    def nodes(self) -> list[Node]:
        return list(self.known.values())

    def register(self, name: str, key: bytes) -> None:
        if key in {node.key for node in self.known.values()}:
            raise Duplicate("the key was registered before", where=name)
        number = len(self.known) + 1
        self.known[number] = Node(number, name, key, "registered")

    def unregister(self, node: int) -> None:
        found = self.known[node]
        self.known[node] = Node(node, found.name, found.key, UNREGISTERED)

    def start(self, fab: bytes, digest: str) -> int:
        self.answer()
        self.runs[len(self.runs) + 1] = ("running", "")
        return len(self.runs)

    def state(self, run: int) -> tuple[str, str]:
        self.answer()
        return self.runs[run]

    def unfinished(self) -> list[int]:
        self.answer()
        return [run for run, (status, _) in self.runs.items() if not status.startswith("finished")]

    def stop(self, run: int) -> None:
        self.answer()
        self.runs[run] = ("finished:stopped", "")

    def answer(self) -> None:
        if self.away:
            raise Unreachable("the SuperLink does not answer")

    def names(self) -> list[str]:
        return sorted(node.name for node in self.known.values() if node.status != UNREGISTERED)


@pytest.fixture
def control() -> FakeControl:
    return FakeControl()


@pytest.fixture
def errors(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(logging.getLogger("fedmerge"), "propagate", True)
    caplog.set_level(logging.ERROR, "fedmerge")
    return caplog


def test_both_layouts_of_keys_are_found_by_site(tmp_path: Path) -> None:
    (tmp_path / "a.pub").write_bytes(public_key())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "supernode.pub").write_bytes(public_key())
    (tmp_path / ".hidden.pub").write_bytes(public_key())
    (tmp_path / "notes.txt").write_text("x")
    assert [name for name, _ in key_files(tmp_path)] == ["a", "b"]


def test_sites_are_registered_once_and_a_removed_key_is_taken_out(
    control: FakeControl, tmp_path: Path
) -> None:
    sites = Sites(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.pub").write_bytes(public_key())
    sites.apply(control)
    sites.apply(control)
    assert control.names() == ["a", "b"]
    (tmp_path / "a.pub").unlink()
    sites.apply(control)
    assert control.names() == ["b"]


def test_a_site_added_while_running_is_noticed(control: FakeControl, tmp_path: Path) -> None:
    sites = Sites(tmp_path)
    sites.apply(control)
    assert not sites.changed()
    (tmp_path / "late.pub").write_bytes(public_key())
    assert sites.changed()
    sites.apply(control)
    assert not sites.changed()
    assert control.names() == ["late"]


def test_a_key_that_was_taken_out_cannot_come_back(
    control: FakeControl, tmp_path: Path, errors: pytest.LogCaptureFixture
) -> None:
    sites, key = Sites(tmp_path), public_key()
    (tmp_path / "a.pub").write_bytes(key)
    sites.apply(control)
    (tmp_path / "a.pub").unlink()
    sites.apply(control)
    (tmp_path / "a.pub").write_bytes(key)
    sites.apply(control)
    assert control.names() == []
    assert "make it a new one" in errors.text


def test_a_key_under_another_name_keeps_the_first(
    control: FakeControl, tmp_path: Path, errors: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.pub").write_bytes(public_key())
    Sites(tmp_path).apply(control)
    (tmp_path / "a.pub").rename(tmp_path / "b.pub")
    Sites(tmp_path).apply(control)
    assert control.names() == ["a"]
    assert "registered as a" in errors.text


def test_one_site_s_bad_file_stops_no_other(
    control: FakeControl, tmp_path: Path, errors: pytest.LogCaptureFixture
) -> None:
    good = public_key()
    (tmp_path / "a.pub").write_text("no key")
    (tmp_path / "b.pub").write_bytes(good)
    (tmp_path / "c.pub").write_bytes(good)
    Sites(tmp_path).apply(control)
    assert control.names() == ["b"]
    assert "a.pub: not a public key" in errors.text
    assert "c.pub: the same key as another site's" in errors.text


def test_only_ecdsa_keys_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pub"
    path.write_bytes(public_key())
    assert read_public_key(path).startswith(b"-----BEGIN PUBLIC KEY-----")
    other = ed25519.Ed25519PrivateKey.generate().public_key()
    path.write_bytes(other.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    with pytest.raises(ConfigError, match="Ed25519"):
        read_public_key(path)
    with pytest.raises(FileError):
        read_public_key(tmp_path / "absent.pub")


def test_the_bundle_holds_no_code_and_is_the_same_every_time() -> None:
    config: dict[str, Value] = {
        "mode": "serve",
        "out": 'a "quoted" \\ path',
        "seed": 1,
        "retry": 0.5,
        "a.b": True,
    }
    fab, digest = bundle(config)
    assert bundle(config) == (fab, digest)
    with ZipFile(BytesIO(fab)) as files:
        assert set(files.namelist()) == {"pyproject.toml", "README.md", ".info/CONTENT"}
        project = tomllib.loads(files.read("pyproject.toml").decode())
    assert project["tool"]["flwr"]["app"]["config"] == config


def test_the_secret_is_fresh_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    place = Place(tmp_path / "flower", 1, None)
    place.prepare()
    first = place.secret.read_bytes()
    place.prepare()
    assert place.secret.read_bytes() != first
    assert len(first) == 32
    assert stat.S_IMODE(place.secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(place.folder.stat().st_mode) == 0o700


def test_no_secret_is_an_argument_and_supernodes_authenticate_wherever_there_is_tls(tmp_path: Path) -> None:
    tls = TlsFiles(ca=tmp_path / "ca", cert=tmp_path / "cert", key=tmp_path / "key")
    place = Place(tmp_path / "flower", 1, tls)
    place.prepare()
    argv = place.superlink().argv
    assert "--enable-supernode-auth" in argv
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert argv[argv.index("--isolation") + 1] == "process"
    secret = place.secret.read_bytes()
    for command in (place.superlink(), place.superexec({})):
        assert str(place.secret) in command.argv
        shown = "\0".join([*command.argv, *command.environment.values()]).encode()
        assert secret not in shown
        assert secret.hex().encode() not in shown
    bare = Place(tmp_path / "flower", 1, None).superlink().argv
    assert "--insecure" in bare
    assert "--enable-supernode-auth" not in bare


class Clock:
    """Seconds that pass when told."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(control: FakeControl, clock: Clock) -> ServingRun:
    patience = Patience("the serving run", Restarts(most=1), clock)
    return ServingRun(control, {"mode": "serve"}, patience, clock)


def later(run: ServingRun, clock: Clock) -> None:
    clock.now += 10
    run.look()


def test_runs_of_an_earlier_server_are_ended(control: FakeControl, run: ServingRun) -> None:
    control.runs[1] = ("running", "")
    run.start()
    assert control.runs == {1: ("finished:stopped", ""), 2: ("running", "")}


def test_a_run_that_ends_is_started_again_and_given_up_with_its_reason(
    control: FakeControl, run: ServingRun, clock: Clock
) -> None:
    run.start()
    later(run, clock)
    assert len(control.runs) == 1
    control.runs[1] = ("finished:failed", "No module named 'x'")
    later(run, clock)
    later(run, clock)
    assert control.unfinished() == [2]
    control.runs[2] = ("finished:failed", "No module named 'x'")
    with pytest.raises(Unreachable, match=r"serving run.*finished:failed.*No module named 'x'"):
        later(run, clock)


def test_a_superlink_that_is_away_is_no_end_of_the_run(
    control: FakeControl, run: ServingRun, clock: Clock
) -> None:
    run.start()
    control.away = True
    for _ in range(10):
        later(run, clock)
    control.away = False
    later(run, clock)
    assert control.runs == {1: ("running", "")}


def test_stopping_ends_the_run_even_when_nobody_answers(control: FakeControl, run: ServingRun) -> None:
    run.start()
    control.away = True
    run.stop()
    control.away = False
    assert control.runs == {1: ("running", "")}
    run.start()
    run.stop()
    assert control.unfinished() == []


def refusing(code: int) -> Control:
    """A control whose SuperLink refuses everything with one of Flower's codes."""

    class Client:
        def __getattr__(self, _: str) -> object:
            def refuse(request: object) -> None:
                answer = httpx.Response(412, json={"code": code, "detail": "no"})
                raise httpx.HTTPStatusError("no", request=httpx.Request("POST", "http://x"), response=answer)

            return refuse

    control = Control(Place(Path(), 1, None))
    control.close()
    control._client = Client()  # type: ignore[assignment]
    return control


def test_stopping_a_run_that_has_just_ended_is_no_error() -> None:
    refusing(18).stop(1)
    with pytest.raises(Unreachable, match=r"code 16"):
        refusing(16).stop(1)


def test_a_key_that_was_registered_before_is_a_duplicate() -> None:
    with pytest.raises(Duplicate):
        refusing(23).register("a", b"key")
    with pytest.raises(Unreachable, match=r"code 22"):
        refusing(22).register("a", b"key")


def test_a_superlink_that_is_away_is_unreachable() -> None:
    control = Control(Place(Path(), 1, None))
    with pytest.raises(Unreachable, match="does not answer"):
        control.nodes()
    control.close()


def test_a_key_that_cannot_be_read_for_a_moment_takes_nobody_out(
    control: FakeControl, tmp_path: Path, errors: pytest.LogCaptureFixture
) -> None:
    """Being taken out is for good."""
    sites, key = Sites(tmp_path), public_key()
    (tmp_path / "a.pub").write_bytes(key)
    sites.apply(control)
    (tmp_path / "a.pub").write_bytes(b"")  # as a copy over it begins
    sites.apply(control)
    assert control.names() == ["a"]
    assert "a.pub: not a public key" in errors.text
    (tmp_path / "a.pub").write_bytes(key)
    assert sites.changed()
    sites.apply(control)
    assert control.names() == ["a"]


def test_a_folder_that_is_missing_takes_nobody_out(
    control: FakeControl, tmp_path: Path, errors: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "sites"
    folder.mkdir()
    sites = Sites(folder)
    (folder / "a.pub").write_bytes(public_key())
    sites.apply(control)
    folder.rename(tmp_path / "elsewhere")
    assert sites.changed()
    sites.apply(control)
    assert control.names() == ["a"]
    assert "is missing" in errors.text
    (tmp_path / "elsewhere").rename(folder)
    (folder / "a.pub").unlink()
    sites.apply(control)
    assert control.names() == []


def test_a_folder_that_is_empty_all_at_once_takes_nobody_out(
    control: FakeControl, tmp_path: Path, errors: pytest.LogCaptureFixture
) -> None:
    sites = Sites(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.pub").write_bytes(public_key())
    sites.apply(control)
    for name in ("a", "b"):
        (tmp_path / f"{name}.pub").unlink()
    sites.apply(control)
    assert control.names() == ["a", "b"]
    assert "is empty" in errors.text


def test_an_authority_that_is_replaced_at_the_moment_is_no_error_of_the_server(tmp_path: Path) -> None:
    files = TlsFiles(ca=tmp_path / "ca.crt", cert=tmp_path / "server.crt", key=tmp_path / "server.key")
    place = Place(tmp_path, 1, files)
    assert not place.healthy()
    files.ca.write_text("half a cert")
    assert not place.healthy()


def test_a_superlink_that_hangs_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.deploy.launch.superlink.ANSWER_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        control = Control(Place(Path(), hanging.getsockname()[1], None))
        with pytest.raises(Unreachable, match="timed out"):
            control.nodes()
        control.close()
