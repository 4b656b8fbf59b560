"""Does a site's folder keep what it must, and after any crash hold the old or the new and nothing between?"""

import json
from pathlib import Path

import pytest
import torch

from fedmerge.client.config import SiteConfig, site_config
from fedmerge.client.state import HeldVersion, SiteState
from fedmerge.common.errors import FileError, NotFound, StoreFull
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import load, to_bytes

MODEL = "a" * 64


def vector(task: str = "plain", value: float = 1.0) -> TaskVector:
    return TaskVector.of({"w": torch.full((3, 4), value)}, (), Manifest("b" * 64, 0, task, "a", 7))


@pytest.fixture
def state(tmp_path: Path) -> SiteState:
    return SiteState(tmp_path / "site")


def keep(state: SiteState, task: str = "plain", key: str = "key", value: float = 1.0):
    return state.keep(vector(task, value), key=key, metrics={"num-examples": 7, "loss": 0.5}, range_bytes=100)


def install(state: SiteState, number: int, data: bytes = b"model") -> None:
    state.install(state.write_incoming(data), number=number, model=MODEL, dtype="f32")


def files(state: SiteState) -> list[str]:
    return sorted(str(path.relative_to(state.folder)) for path in state.folder.rglob("*") if path.is_file())


# --- the merged version ---


def test_a_new_folder_holds_no_version(state):
    assert state.held == HeldVersion()
    assert (state.held.number, state.merged) == (0, None)


def test_a_version_is_there_for_the_next_process(state):
    install(state, 3)
    again = SiteState(state.folder)
    assert (again.held.number, again.held.model, again.held.dtype) == (3, MODEL, "f32")
    assert again.merged.read_bytes() == b"model"


def test_only_the_newest_version_is_kept(state):
    for number in (1, 2, 3):
        install(state, number, b"model %d" % number)
    assert state.merged.read_bytes() == b"model 3"
    assert len(files(state)) == 2


@pytest.mark.parametrize("step", ["the rename", "the record", "the clean-up"])
def test_a_crash_while_installing_leaves_the_old_or_the_new(state, monkeypatch, step):
    install(state, 1, b"old")

    def crash(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        if step == "the rename":
            killed.setattr(Path, "replace", crash)
        elif step == "the record":
            killed.setattr("fedmerge.client.state._write", crash)
        else:
            killed.setattr(Path, "unlink", crash)
        with pytest.raises(KeyboardInterrupt):
            install(state, 2, b"new")
    again = SiteState(state.folder)
    assert (again.held.number, again.merged.read_bytes()) in [(1, b"old"), (2, b"new")]
    install(again, 2, b"new")
    assert again.merged.read_bytes() == b"new"
    assert len(list(state.folder.glob("merged-*"))) == 1


@pytest.mark.parametrize("damage", ["gone", "shorter", "record", "empty record"])
def test_a_version_that_is_damaged_counts_as_none(state, damage):
    install(state, 1)
    if damage == "gone":
        state.merged.unlink()
    elif damage == "shorter":
        state.merged.write_bytes(b"mod")
    else:
        (state.folder / "version.json").write_text("{" if damage == "record" else "")
    assert state.held.number == 0
    assert state.merged is None


@pytest.mark.parametrize("model", ["../../etc/passwd", "/etc/passwd", "a\0b", ""])
def test_a_servers_word_for_a_version_is_no_path(state, model):
    state.install(state.write_incoming(b"model"), number=1, model=model, dtype="f32")
    assert state.merged.parent == state.folder
    assert state.held.model == model


# --- results ---


def test_a_result_is_there_for_the_next_process(state):
    result = keep(state)
    again = SiteState(state.folder).result("plain", "key")
    assert again == result
    assert (again.metrics, again.manifest.range_bytes) == ({"num-examples": 7, "loss": 0.5}, 100)
    assert state.read(again) == to_bytes(vector())


def test_a_result_of_another_training_does_not_answer(state):
    keep(state, key="seed 0")
    assert state.result("plain", "seed 1") is None
    assert state.result("reversed", "seed 0") is None


def test_a_newer_result_of_a_task_takes_the_place_of_the_older(state):
    keep(state, key="old")
    keep(state, key="new", value=2.0)
    assert state.result("plain", "old") is None
    assert [result.key for result in state.results()] == ["new"]
    assert len(files(state)) == 2


def test_a_result_is_forgotten_by_its_hash_and_no_other(state):
    first, second = keep(state), keep(state, "reversed")
    state.forget(first.manifest.sha256)
    state.forget("0" * 64)
    assert list(state.results()) == [second]
    assert len(files(state)) == 2


def test_a_refused_result_is_written_down_and_removed(state):
    result = keep(state)
    state.refuse(result.manifest.sha256, "layer 'w': NaN")
    state.refuse("0" * 64, "unknown")
    (line,) = (state.folder / "refusals.jsonl").read_text().splitlines()
    assert json.loads(line) | {"at": 0} == {
        "at": 0,
        "task": "plain",
        "sha256": result.manifest.sha256,
        "reason": "layer 'w': NaN",
    }
    assert list(state.results()) == []


def test_ranges_of_a_result_make_up_its_file(state):
    result = keep(state)
    sha256, count = result.manifest.sha256, len(result.manifest.hashes)
    assert b"".join(state.read_range(sha256, index) for index in range(count)) == to_bytes(vector())
    with pytest.raises(NotFound):
        state.read_range("0" * 64, 0)


def test_a_crash_before_a_result_is_complete_leaves_none(state, monkeypatch):
    keep(state, key="old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr("fedmerge.client.state._write", crash)
        with pytest.raises(KeyboardInterrupt):
            keep(state, key="new", value=2.0)
    again = SiteState(state.folder)
    assert list(again.results()) == []
    assert load(state.folder / "outbox" / files(state)[0].removeprefix("outbox/")).manifest.task == "plain"
    assert keep(again, key="new", value=2.0) == again.result("plain", "new")


def test_a_result_whose_file_has_gone_does_not_answer(state):
    result = keep(state)
    (path,) = (state.folder / "outbox").glob("*.safetensors")
    path.unlink()
    assert state.result("plain", "key") is None
    with pytest.raises(FileError):
        state.read(result)


@pytest.mark.parametrize("task", ["../../up", "a/b", "x" * 200, "ärztlich ☂", "."])
def test_a_tasks_name_is_no_path(state, task):
    keep(state, task)
    assert state.result(task, "key").task == task
    assert all(len(Path(name).parts) == 2 for name in files(state))


def test_what_another_version_wrote_is_ignored(state):
    keep(state)
    (path,) = (state.folder / "outbox").glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "colour": "blue"}))
    assert list(state.results()) == []


# --- the base, the folder ---


def test_the_base_is_remembered(state):
    assert state.base == ""
    state.base = "c" * 64
    assert SiteState(state.folder).base == "c" * 64


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreFull, match="cannot be made"):
        SiteState(tmp_path / "file" / "site")


class Context:
    def __init__(self, node: dict, run: dict) -> None:
        self.node_config, self.run_config = node, run


def test_only_the_node_config_names_the_folder():
    run = {"stream": "example", "state": "/the/servers"}
    assert site_config(Context({}, run)).state is None
    mine = site_config(Context({"state": "/mine"}, run))
    assert mine == SiteConfig("example", state=Path("/mine"))
