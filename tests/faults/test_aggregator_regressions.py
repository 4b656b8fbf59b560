"""An aggregator whose worker, engine, disk or admin does the wrong thing at the wrong moment goes on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from fedmerge.common.base import Base
from fedmerge.common.errors import EngineError, FactorisationFailed, StoreFull, StoreLocked, TooLarge
from fedmerge.common.records import UpdateState
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import save
from fedmerge.server.admission import Limits
from fedmerge.server.aggregator import Aggregator, AggregatorSettings
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.library import Library
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.opcm import Opcm
from fedmerge.server.merging import Merging
from fedmerge.server.retention import Retention
from fedmerge.server.store.disk import Disk
from fedmerge.server.store.ledger import Ledger

SITE = "ward-1"
WAIT_SECONDS = 5
BASE = Base.from_checkpoint({"a.weight": torch.ones(6, 5), "a.bias": torch.zeros(6)})

Open = Callable[..., Aggregator]
File = Callable[..., Path]


def local() -> Engine:
    return LocalEngine(make_rule("opcm"), BASE.layers.values(), workers=1)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.server.aggregator.LONGEST_PAUSE", 0.01)


@pytest.fixture
def file(tmp_path: Path) -> File:
    """A task vector's file."""

    def write(seed: int, layers: dict[str, torch.Tensor] | None = None) -> Path:
        generator = torch.Generator().manual_seed(seed)
        held = layers or {
            name: 0.05 * torch.randn(layer.shape, generator=generator) for name, layer in BASE.layers.items()
        }
        unchanged = [name for name in BASE.layers if name not in held]
        path = tmp_path / f"{seed}.safetensors"
        save(TaskVector.of(held, unchanged, Manifest(BASE.fingerprint, 0, f"task-{seed}", SITE)), path)
        return path

    return write


@pytest.fixture
def open_(tmp_path: Path) -> Iterator[Open]:
    """Opens a state folder of this test; closed after the test."""
    opened: list[Aggregator] = []

    def open_aggregator(
        make_engine: Callable[[], Engine] = local,
        *,
        limits: Limits | None = None,
        retention: Retention | None = None,
        folder: str = "state",
        disk: Disk | None = None,
    ) -> Aggregator:
        settings = AggregatorSettings(limits=limits or Limits(), retention=retention or Retention())
        rule = make_rule("opcm")
        opened.append(Aggregator(tmp_path / folder, BASE, rule, make_engine, settings, disk=disk))
        return opened[-1]

    yield open_aggregator
    for aggregator in opened:
        aggregator.close()


def merged(aggregator: Aggregator, *files: Path) -> None:
    for each in files:
        aggregator.submit(each, site=SITE)
        assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)


def served(aggregator: Aggregator) -> list[str]:
    """Tasks, number of vectors and norm of the model as the engine has it."""
    version = aggregator.version()
    return [*aggregator.status().tasks, str(version.merges), f"{version.state_norm:.5f}"]


def blobs(folder: Path) -> set[str]:
    return {path.stem for path in (folder / "blobs").rglob("*.safetensors")}


def blob(folder: Path, sha256: str) -> Path:
    return folder / "blobs" / sha256[:2] / f"{sha256}.safetensors"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


class Once:
    """A method that fails when it is next called after :meth:`arm`, and works otherwise."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: type, name: str, error: Exception) -> None:
        whole, self.failed, self._armed = getattr(owner, name), Event(), False

        def method(*arguments: Any, **named: Any) -> Any:
            if self._armed:
                self._armed = False
                self.failed.set()
                raise error
            return whole(*arguments, **named)

        patch.setattr(owner, name, method)

    def arm(self) -> None:
        self._armed = True


class TestTakingTasksOut:
    def test_a_task_that_came_back_with_a_rollback_can_be_taken_out_again(
        self, open_: Open, file: File
    ) -> None:
        aggregator = open_()
        merged(aggregator, file(1), file(2))
        removal = aggregator.remove("task-1", by="root")
        aggregator.roll_back(2, by="root")
        again = aggregator.remove("task-1", by="root")
        assert aggregator.status().tasks == ("task-2",)
        assert again.state_norm == removal.state_norm

    def test_taking_out_one_task_does_not_bring_back_another(self, open_: Open, file: File) -> None:
        aggregator, without = open_(), open_(folder="without")
        merged(aggregator, *(file(seed) for seed in (1, 2, 3, 4)))
        aggregator.remove("task-2", by="root")
        merged(aggregator, file(5))
        aggregator.remove("task-3", by="root")
        merged(without, *(file(seed) for seed in (1, 4, 5)))
        assert served(aggregator) == served(without)


class TestWhatIsAcknowledgedIsNotLost:
    def test_while_the_model_cannot_be_rebuilt(self, open_: Open, file: File, tmp_path: Path) -> None:
        aggregator = open_()
        merged(aggregator, file(1), file(2))
        damaged = blob(tmp_path / "state", aggregator.updates()[1].sha256)
        aggregator.close()
        whole = damaged.read_bytes()
        flip(damaged)
        again = open_()
        receipt = again.submit(file(3), site=SITE)
        assert not again.wait_until_merged(timeout=0.2)
        assert again.update(receipt.update).state is UpdateState.STAGED
        assert damaged.name in again.status().failing
        damaged.write_bytes(whole)
        assert again.wait_until_merged(timeout=WAIT_SECONDS)
        assert again.update(receipt.update).version == 3
        assert again.status().failing == ""

    def test_when_no_file_can_be_opened_for_now(
        self, open_: Open, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aggregator = open_()
        whole, failures = Path.open, [OSError(errno.EMFILE, "Too many open files")]

        def failing(path: Path, *arguments: Any, **named: Any) -> Any:
            if failures and path.parent.parent.name == "blobs":
                raise failures.pop()
            return whole(path, *arguments, **named)

        monkeypatch.setattr(Path, "open", failing)
        merged(aggregator, file(1))
        assert not failures
        assert aggregator.version().number == 1

    def test_while_the_model_itself_cannot_be_factorised(
        self, open_: Open, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aggregator = open_()
        merged(aggregator, file(1))
        with monkeypatch.context() as patch:

            def diverging(*_: object) -> None:
                raise torch.linalg.LinAlgError("did not converge")  # type: ignore[attr-defined]

            patch.setattr(Opcm, "prepare", diverging)
            aggregator._merging.behind = True
            receipt = aggregator.submit(file(2), site=SITE)
            assert not aggregator.wait_until_merged(timeout=0.2)
            assert aggregator.update(receipt.update).state is UpdateState.STAGED
            assert "roll back" in aggregator.status().failing
        assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
        assert aggregator.update(receipt.update).version == 2

    def test_an_update_that_overflows_the_model_does_not_hold_up_the_rest(
        self, open_: Open, file: File
    ) -> None:
        """Two biases that cancel but for a subnormal, which OPCM would scale up beyond float32."""
        aggregator = open_()
        one, other = torch.zeros(6), torch.zeros(6)
        one[0], other[0], other[1] = 0.1, -0.1, 1e-42
        merged(aggregator, file(1, {"a.bias": one}), file(2, {"a.bias": other}), file(3))
        assert [update.state for update in aggregator.updates()] == ["merged", "failed", "merged"]
        assert "not finite" in aggregator.updates()[1].reason
        assert aggregator.status().failing == ""


class TestTheWorkerLivesOn:
    @pytest.mark.parametrize(
        ("owner", "name", "error"),
        [
            (Ledger, "next_staged", StoreLocked("another program writes to the ledger")),
            (Merging, "after_merge", EngineError("an actor is gone")),
            (Merging, "after_merge", RuntimeError("out of memory")),
            (Merging, "_make_current", RuntimeError("out of memory")),
            (Merging, "catch_up", MemoryError()),
        ],
    )
    def test_when_something_fails_once(
        self, open_: Open, file: File, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, error: Any
    ) -> None:
        once = Once(monkeypatch, owner, name, error)
        aggregator = open_()
        if name == "next_staged":
            _fail_in_worker(monkeypatch, aggregator, once)
        else:
            once.arm()
        aggregator.submit(file(1), site=SITE)
        assert once.failed.wait(WAIT_SECONDS)
        merged(aggregator, file(2))
        assert [update.version for update in aggregator.updates()] == [1, 2]
        assert aggregator.status().failing == ""
        assert aggregator._worker.is_alive()

    def test_when_what_failed_cannot_be_written_down(
        self, open_: Open, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        merging = Once(monkeypatch, Merging, "merge", FactorisationFailed("it did not converge"))
        writing = Once(monkeypatch, Ledger, "set_state", StoreFull("no space"))
        aggregator = open_()
        merging.arm()
        writing.arm()
        merged(aggregator, file(1), file(2))
        assert writing.failed.is_set()
        assert [update.version for update in aggregator.updates()] == [1, 2]

    @pytest.mark.parametrize("fails", [True, False])
    def test_when_an_update_is_rejected_while_it_is_merged(
        self, open_: Open, file: File, fails: bool, tmp_path: Path
    ) -> None:
        reached, go_on = Event(), Event()

        class Waiting(LocalEngine):
            def _absorb(self, step: Any, on_layer: Any) -> Any:
                reached.set()
                assert go_on.wait(WAIT_SECONDS)
                if fails:
                    raise FactorisationFailed("it did not converge")
                return super()._absorb(step, on_layer)

        aggregator = open_(lambda: Waiting(make_rule("opcm"), BASE.layers.values(), workers=1))
        receipt = aggregator.submit(file(1), site=SITE)
        assert reached.wait(WAIT_SECONDS)
        aggregator.reject(receipt.update, by="root")
        go_on.set()
        assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
        assert aggregator.update(receipt.update).state is UpdateState.REJECTED
        assert aggregator.version().number == 0
        assert aggregator.status().failing == ""

    def test_when_a_version_is_committed_and_the_engine_fails_it_is_in_the_log(
        self, open_: Open, file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aggregator = open_()
        Once(monkeypatch, LocalEngine, "commit", RuntimeError("out of memory")).arm()
        merged(aggregator, file(1))
        assert aggregator.status().failing == ""
        assert '"merged"' in (tmp_path / "state" / "audit.jsonl").read_text()
        merged(aggregator, file(2))
        assert aggregator.version().merges == 2

    def test_when_no_new_engine_can_be_made_at_first(
        self, open_: Open, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An engine whose workers are gone must not be asked again, even where it would not notice."""
        problems: list[Exception] = []

        class Hollow(LocalEngine):
            hollow = False

            def close(self) -> None:
                super().close()
                self.hollow = True

            def _restore(self, read: Any, names: Any) -> None:
                if problems and not self.hollow:
                    raise problems.pop(0)
                if not self.hollow:
                    super()._restore(read, names)

        def make() -> Engine:
            if problems:
                raise problems.pop(0)
            return Hollow(make_rule("opcm"), BASE.layers.values(), workers=1)

        aggregator = open_(make, retention=Retention(snapshot_every=1))
        merged(aggregator, file(1))
        problems += [RuntimeError("the cluster is gone"), EngineError("no cluster there")]
        Once(monkeypatch, Merging, "merge", RuntimeError("the cluster is gone")).arm()
        merged(aggregator, file(2))
        assert aggregator.version().merges == 2


def _fail_in_worker(patch: pytest.MonkeyPatch, aggregator: Aggregator, once: Once) -> None:
    """Arms a failure for the worker's next look at the queue."""
    whole = Aggregator._has_work

    def looking(self: Aggregator) -> bool:
        once.arm()
        return whole(self)

    with patch.context() as looked:
        looked.setattr(Aggregator, "_has_work", looking)
        aggregator._notify()
        assert once.failed.wait(WAIT_SECONDS)


class TestDecisions:
    def test_what_is_turned_away_goes_even_if_the_server_is_killed_on_the_way(
        self, open_: Open, file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aggregator = open_(limits=Limits(quarantine="all"))
        receipt = aggregator.submit(file(1), site=SITE)
        with monkeypatch.context() as patch:
            patch.setattr(Library, "discard", lambda *_: None)
            patch.setattr(Library, "forget", lambda *_: None, raising=False)
            aggregator.reject(receipt.update, by="root")
        aggregator.close()
        assert blobs(tmp_path / "state")
        open_()
        assert blobs(tmp_path / "state") == set()

    def test_an_approval_whose_note_fails_is_whole_or_not_at_all(
        self, open_: Open, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Full(Disk):
            full = False

            def step(self, name: str) -> None:
                if self.full and "INSERT INTO acts" in name:
                    raise OSError(errno.ENOSPC, "No space left on device")

        disk = Full()
        aggregator = open_(limits=Limits(quarantine="all"), disk=disk)
        receipt = aggregator.submit(file(1), site=SITE)
        disk.full = True
        with pytest.raises(StoreFull):
            aggregator.approve(receipt.update, by="root")
        assert aggregator.update(receipt.update).state is UpdateState.HELD
        disk.full = False
        aggregator.approve(receipt.update, by="root")
        assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
        assert aggregator.version().number == 1

    def test_a_size_beyond_every_integer_is_too_large(self, open_: Open) -> None:
        aggregator = open_()
        with pytest.raises(TooLarge), aggregator.receive(SITE, size=2**63, sha256="0" * 64):
            pytest.fail("no byte should be taken")
        assert aggregator.status().refused == {"TooLarge": 1}

    def test_an_act_that_fails_for_lack_of_space_leaves_nothing(
        self, open_: Open, file: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aggregator = open_()
        merged(aggregator, file(1), file(2))
        before = blobs(tmp_path / "state")
        Once(monkeypatch, Merging, "_snapshot", StoreFull("no space")).arm()
        with pytest.raises(StoreFull):
            aggregator.roll_back(1, by="root")
        assert blobs(tmp_path / "state") == before

    def test_after_a_rollback_nothing_is_said_to_fail(self, open_: Open, file: File, tmp_path: Path) -> None:
        aggregator = open_()
        merged(aggregator, file(1), file(2))
        damaged = blob(tmp_path / "state", aggregator.updates()[1].sha256)
        aggregator.close()
        flip(damaged)
        again = open_()
        assert again.status().failing
        again.roll_back(1, by="root")
        assert again.status().failing == ""


class TestReading:
    def test_the_current_version_is_served_while_the_next_one_replaces_it(
        self, open_: Open, file: File, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aggregator = open_(retention=Retention(versions=1, vectors=0, snapshot_every=1))
        merged(aggregator, file(1))
        whole, pending = Library.open, [file(2)]

        def late(self: Library, *arguments: Any) -> Any:
            if pending:
                merged(aggregator, pending.pop())
            return whole(self, *arguments)

        monkeypatch.setattr(Library, "open", late)
        with aggregator.open_version() as published:
            assert published.record.number == 2
        assert aggregator.status().failing == ""

    def test_a_file_that_is_read_while_the_server_stops_is_read_to_its_end(
        self, open_: Open, file: File
    ) -> None:
        aggregator = open_()
        merged(aggregator, file(1))
        with aggregator.open_version() as published:
            aggregator.close()
            assert published.path.read_bytes()

    def test_a_damaged_snapshot_is_named_where_nothing_can_make_up_for_it(
        self, open_: Open, file: File, tmp_path: Path
    ) -> None:
        retention = Retention(versions=1, vectors=0, snapshot_every=1)
        aggregator = open_(retention=retention)
        merged(aggregator, file(1), file(2))
        damaged = blob(tmp_path / "state", aggregator.version().snapshot)
        aggregator.close()
        flip(damaged)
        again = open_(retention=retention)
        assert damaged.name in again.status().failing
        with again.open_version() as published:
            assert published.record.number == 2
