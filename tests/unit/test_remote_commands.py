"""Do the commands say what the server says?"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_aggregator import FakeAggregator
from typer.testing import CliRunner, Result

from fedmerge.common import vectorfile
from fedmerge.common.errors import ConfigError, FileError, NotFound
from fedmerge.common.records import UpdateState
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.deploy.remote import app
from fedmerge.server.service.access import LoopbackAccess
from fedmerge.server.service.server import Listener, Service
from fedmerge.server.service.settings import ServiceSettings

Run = Callable[..., Result]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAggregator]:
    fake = FakeAggregator(tmp_path / "state")
    yield fake
    fake.close()


@pytest.fixture
def run(fake: FakeAggregator) -> Iterator[Run]:
    listener = Listener("127.0.0.1:0", LoopbackAccess())
    with Service(fake, [listener], ServiceSettings(stop_seconds=0)) as service:
        environment = {"FEDMERGE_SERVER": service.addresses[0], "COLUMNS": "200"}

        def invoke(*arguments: object, ok: bool = True) -> Result:
            result = CliRunner().invoke(app, [str(each) for each in arguments], env=environment)
            assert (result.exception is None) == ok, result.exception
            return result

        yield invoke


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    path = tmp_path / "vector.safetensors"
    manifest = Manifest(site="site-1", task="birds")
    vectorfile.save(replace(TaskVector.of({"w": torch.ones(64, 64)}), manifest=manifest), path)
    return path


def told(result: Result) -> Any:
    return json.loads(result.stdout)


def test_what_is_pushed_is_pulled(run: Run, vector: Path, tmp_path: Path) -> None:
    assert "merged as version 1" in run("push", vector).stdout
    assert "known before" in run("push", vector).stdout
    assert "version 1" in run("pull", tmp_path / "out.safetensors").stdout
    assert (tmp_path / "out.safetensors").read_bytes() == vector.read_bytes()


def test_a_vector_can_be_rounded_on_its_way(run: Run, fake: FakeAggregator, vector: Path) -> None:
    run("push", vector, "--dtype", "bf16")
    record = fake.version()
    sent = vectorfile.load(fake.folder / record.sha256)
    assert record.size < vector.stat().st_size
    assert torch.equal(sent.read("w").to_dense(), torch.ones(64, 64))
    assert sent.manifest.task == "birds"


def test_a_site_can_be_named_and_must_be_known(run: Run, fake: FakeAggregator, tmp_path: Path) -> None:
    path = tmp_path / "nameless.safetensors"
    vectorfile.save(TaskVector.of({"w": torch.ones(2)}), path)
    assert isinstance(run("push", path, ok=False).exception, ConfigError)
    assert told(run("push", path, "--site", "site-9", "--json"))["state"] == "merged"
    assert fake.updates()[0].site == "site-9"


def test_only_task_vectors_are_pushed(run: Run, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no vector")
    assert isinstance(run("push", tmp_path / "notes.txt", ok=False).exception, FileError)


def test_push_waits_until_the_update_is_decided(tmp_path: Path, vector: Path) -> None:
    fake = FakeAggregator(tmp_path / "held", held=True)
    asked = fake.update

    def approve_once_asked(update: str) -> Any:
        record = asked(update)
        if record.state is UpdateState.HELD:
            fake.update = asked  # type: ignore[method-assign]
            fake.approve(update, by="alice")
        return record

    fake.update = approve_once_asked  # type: ignore[method-assign]
    listener = Listener("127.0.0.1:0", LoopbackAccess())
    with Service(fake, [listener], ServiceSettings(stop_seconds=0)) as service:
        arguments = ["push", str(vector), "--wait", "--json", "--server", service.addresses[0]]
        result = CliRunner().invoke(app, arguments)
    assert told(result)["state"] == "merged"
    fake.close()


def test_status_and_history_show_the_records(run: Run, vector: Path) -> None:
    run("push", vector)
    status = run("status").stdout
    assert all(word in status for word in ("opcm", "alpha 0.5", "task-1", "1 NonFinite"))
    assert told(run("status", "--json"))["options"] == {"alpha": 0.5, "diagonal": "cleared"}
    assert [record["number"] for record in told(run("history", "--json"))] == [0, 1]
    assert [record["seq"] for record in told(run("history", "updates", "--json"))] == [1]
    assert "NaN in a layer" in run("history", "refusals").stdout
    assert "merge" in run("history").stdout


def test_admins_decide(run: Run, fake: FakeAggregator, vector: Path) -> None:
    run("push", vector)
    assert "version 2 serves version 0 again" in run("rollback", 0, "--by", "alice").stdout
    assert "without task-1" in run("remove", "task-1", "--by", "bob").stdout
    assert fake.said_by == ["alice", "bob"]
    assert isinstance(run("approve", "none", ok=False).exception, NotFound)
    assert isinstance(run("reject", "none", ok=False).exception, NotFound)


def test_versions_are_printed_as_they_come(run: Run, vector: Path) -> None:
    run("push", vector)
    assert run("watch", "--after", 0, "--count", 1).stdout.startswith("version 1  merge  task-1  site-1")
    assert told(run("watch", "--after", -1, "--count", 1, "--json"))["number"] == 1


def test_names_are_shown_as_they_are_not_as_markup(run: Run, fake: FakeAggregator, vector: Path) -> None:
    run("push", vector)
    status = fake.status()
    fake.status = lambda: replace(status, tasks=("[red]x[/red]",))  # type: ignore[method-assign]
    assert "[red]x[/red]" in run("status").stdout


def test_tls_needs_all_three_files(run: Run, tmp_path: Path) -> None:
    assert isinstance(run("status", "--ca", tmp_path / "ca.crt", ok=False).exception, ConfigError)
