"""Does an update that was acknowledged become exactly one version, and can every version be had again?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from rule_contract import statistics

from fedmerge.common.base import Base
from fedmerge.common.errors import (
    Busy,
    ConfigError,
    Duplicate,
    FactorisationFailed,
    FedmergeError,
    FileError,
    MismatchError,
    NonFinite,
    NormExceeded,
    NotFound,
    NotKept,
    QuotaExceeded,
    StateError,
    StoreLocked,
    TooLarge,
)
from fedmerge.common.records import Receipt, UpdateState, VersionKind, update_id
from fedmerge.common.statistics import Statistic, Statistics
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import load, save
from fedmerge.server.admission import Limits
from fedmerge.server.aggregator import Aggregator, AggregatorSettings
from fedmerge.server.audit import verify
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.retention import Retention

torch.manual_seed(0)
BASE = Base.from_checkpoint(
    {"a.weight": torch.randn(6, 5), "b.weight": torch.randn(4, 6), "b.bias": torch.zeros(4)}
)

Open = Callable[..., Aggregator]


def vector(seed: int, task: str = "", scale: float = 0.05, origin: int = 0) -> TaskVector:
    """A random vector with the statistics that any rule may need."""
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: scale * torch.randn(layer.shape, generator=generator) for name, layer in BASE.layers.items()
    }
    listed = tuple(sorted(Statistic))
    manifest = Manifest(BASE.fingerprint, origin, task or f"task-{seed}", "whoever", 10, listed)
    measured = {name: statistics(listed, layer, seed) for name, layer in BASE.layers.items()}
    return replace(TaskVector.of(layers, manifest=manifest), statistics=Statistics.of(measured))


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """A task vector's file."""

    def write(seed: int, **settings: Any) -> Path:
        path = tmp_path / f"vector-{seed}.safetensors"
        save(vector(seed, **settings), path)
        return path

    return write


@pytest.fixture
def open_(tmp_path: Path) -> Iterator[Open]:
    """Opens the state folder of this test, with a rule and settings; closed after the test."""
    opened: list[Aggregator] = []

    def open_aggregator(
        rule: str = "opcm",
        *,
        limits: Limits | None = None,
        retention: Retention | None = None,
        make_engine: Callable[[], Engine] | None = None,
        folder: str = "state",
        **options: Any,
    ) -> Aggregator:
        settings = AggregatorSettings(limits=limits or Limits(), retention=retention or Retention())
        chosen = make_rule(rule)
        engine = make_engine or (lambda: LocalEngine(chosen, BASE.layers.values(), workers=1))
        aggregator = Aggregator(tmp_path / folder, BASE, chosen, engine, settings, **options)
        opened.append(aggregator)
        return aggregator

    yield open_aggregator
    for aggregator in opened:
        aggregator.close()


def merged_bits(aggregator: Aggregator, version: int | None = None) -> str:
    with aggregator.open_version(version) as published:
        return hashlib.sha256(published.path.read_bytes()).hexdigest()


def layers_of(aggregator: Aggregator, version: int | None = None) -> dict[str, torch.Tensor]:
    with aggregator.open_version(version) as published:
        return {name: update.to_dense() for name, update in load(published.path).items()}


def submit_all(aggregator: Aggregator, *files: Path, site: str = "ward-1") -> list[Receipt]:
    receipts = [aggregator.submit(each, site=site) for each in files]
    assert aggregator.wait_until_merged(timeout=30)
    return receipts


def close_to(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> bool:
    return all(torch.allclose(got[name], wanted[name], atol=tolerance) for name in wanted)


class TestUpdates:
    def test_an_update_becomes_a_version_that_says_whose_it_is(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        (receipt,) = submit_all(aggregator, file(1))
        record = aggregator.update(receipt.update)
        version = aggregator.version()
        assert (record.state, record.version, record.site, record.task) == ("merged", 1, "ward-1", "task-1")
        assert (version.number, version.kind, version.parent) == (1, VersionKind.MERGE, 0)
        assert (version.update, version.task, version.site) == (receipt.update, "task-1", "ward-1")
        assert version.examples == 10
        assert version.update_norm == pytest.approx(vector(1).norm())
        assert receipt.update == update_id("ward-1", record.sha256)

    def test_updates_are_merged_in_the_order_of_acknowledgement(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        receipts = submit_all(aggregator, *(file(seed) for seed in (3, 1, 2)))
        assert [aggregator.version(n).update for n in (1, 2, 3)] == [r.update for r in receipts]
        assert [u.seq for u in aggregator.updates()] == [1, 2, 3]
        assert aggregator.status().tasks == ("task-3", "task-1", "task-2")

    def test_the_same_update_again_is_answered_not_merged(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        (first,) = submit_all(aggregator, file(1))
        (again,) = submit_all(aggregator, file(1))
        assert again == Receipt(first.update, UpdateState.MERGED, 1, again=True)
        assert aggregator.version().number == 1

    def test_a_known_update_need_not_be_sent(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1))
        sha256 = hashlib.sha256(file(1).read_bytes()).hexdigest()
        with aggregator.receive("ward-1", size=file(1).stat().st_size, sha256=sha256) as upload:
            assert upload.known is not None
            assert upload.finish() == upload.known

    def test_another_sites_update_is_refused(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1))
        with pytest.raises(Duplicate, match="ward-2"):
            aggregator.submit(file(1), site="ward-2")
        assert aggregator.version().number == 1
        assert aggregator.refusals()[0].error == "Duplicate"

    def test_two_uploads_of_the_same_update_at_once_count_once(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        data = file(1).read_bytes()
        sha256 = hashlib.sha256(data).hexdigest()
        with (
            aggregator.receive("ward-1", size=len(data), sha256=sha256) as one,
            aggregator.receive("ward-1", size=len(data), sha256=sha256) as two,
        ):
            one.write(data)
            two.write(data)
            assert not one.finish().again
            assert two.finish().again
        assert aggregator.wait_until_merged(timeout=30)
        assert aggregator.version().number == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda data: b"\x80\x04" + data,
            lambda data: data[:-1],
            lambda data: data[:-4] + b"\x00\x00\xc0\x7f",
        ],
        ids=["longer", "shorter", "changed"],
    )
    def test_other_bytes_than_announced_are_refused(
        self, open_: Open, file: Any, change: Callable[[bytes], bytes]
    ) -> None:
        aggregator = open_()
        data = file(1).read_bytes()
        sent = change(data)
        with (
            aggregator.receive(
                "ward-1", size=max(len(data), len(sent)), sha256=hashlib.sha256(data).hexdigest()
            ) as upload,
        ):
            upload.write(sent)
            with pytest.raises(MismatchError, match="not what was announced"):
                upload.finish()
        assert aggregator.updates() == []

    def test_more_bytes_than_announced_are_cut_off(self, open_: Open) -> None:
        aggregator = open_()
        with (
            aggregator.receive("ward-1", size=10, sha256="0" * 64) as upload,
            pytest.raises(TooLarge),
        ):
            upload.write(b"x" * 11)

    def test_an_upload_that_is_not_finished_leaves_nothing(
        self, open_: Open, file: Any, tmp_path: Path
    ) -> None:
        aggregator = open_()
        data = file(1).read_bytes()
        with aggregator.receive("ward-1", size=len(data), sha256="0" * 64) as upload:
            upload.write(data[:100])
        assert list((tmp_path / "state" / "incoming").iterdir()) == []
        assert aggregator.updates() == []

    @pytest.mark.parametrize(
        ("settings", "error"),
        [
            ({"scale": float("nan")}, NonFinite),
            ({"scale": 1e3}, NormExceeded),
            ({"origin": 7}, FedmergeError),
        ],
    )
    def test_a_refusal_is_recorded_with_its_reason_and_changes_nothing(
        self, open_: Open, tmp_path: Path, settings: dict[str, float], error: type[FedmergeError]
    ) -> None:
        aggregator = open_()
        path = tmp_path / "bad.safetensors"
        if settings.get("scale") != settings.get("scale"):
            save(vector(1), path)
            data = bytearray(path.read_bytes())
            data[-4:] = b"\x00\x00\xc0\x7f"
            path.write_bytes(data)
        else:
            save(vector(1, **settings), path)
        with pytest.raises(error) as refused:
            aggregator.submit(path, site="ward-1")
        (refusal,) = aggregator.refusals()
        assert (refusal.site, refusal.error) == ("ward-1", type(refused.value).__name__)
        assert refusal.reason == str(refused.value)
        assert aggregator.status().refused == {refusal.error: 1}
        assert aggregator.updates() == []
        assert list((tmp_path / "state" / "blobs").rglob("*.safetensors")) == []

    def test_a_file_that_is_not_there_is_no_refusal(self, open_: Open, tmp_path: Path) -> None:
        aggregator = open_()
        with pytest.raises(FileError):
            aggregator.submit(tmp_path / "none", site="ward-1")
        assert aggregator.refusals() == []

    def test_bytes_over_the_limit_are_refused_before_any_is_sent(self, open_: Open) -> None:
        aggregator = open_(limits=Limits(max_update_bytes=1000))
        with pytest.raises(TooLarge), aggregator.receive("ward-1", size=1001, sha256="0" * 64):
            pytest.fail("no byte should be taken")
        assert aggregator.status().refused == {"TooLarge": 1}

    def test_a_file_of_exactly_the_limit_is_taken_and_one_byte_more_is_not(
        self, open_: Open, file: Any
    ) -> None:
        size = file(1).stat().st_size
        with pytest.raises(TooLarge):
            open_(limits=Limits(max_update_bytes=size - 1), folder="small").submit(file(1), site="ward-1")
        submit_all(aggregator := open_(limits=Limits(max_update_bytes=size)), file(1))
        assert aggregator.version().number == 1

    def test_an_update_that_changes_nothing_takes_a_kilobyte_and_is_merged(
        self, open_: Open, tmp_path: Path
    ) -> None:
        path = tmp_path / "nothing.safetensors"
        manifest = Manifest(BASE.fingerprint, task="idle")
        assert save(TaskVector.of({}, tuple(BASE.layers), manifest), path) < 1024
        submit_all(aggregator := open_(), path)
        assert aggregator.version().merges == 1

    def test_a_site_has_its_share_of_a_day(self, open_: Open, file: Any) -> None:
        now = [1000.0]
        aggregator = open_(limits=Limits(updates_per_day=2), clock=lambda: now[0])
        submit_all(aggregator, file(1), file(2))
        with pytest.raises(QuotaExceeded):
            aggregator.submit(file(3), site="ward-1")
        aggregator.submit(file(3), site="ward-2")
        now[0] += 86_401
        aggregator.submit(file(4), site="ward-1")

    def test_site_names_that_could_forge_a_path_or_a_line_are_refused(self, open_: Open, file: Any) -> None:
        with pytest.raises(ConfigError):
            open_().submit(file(1), site="../ward\n1")


class Gate:
    """An engine whose absorbing waits until it is let go, or fails."""

    def __init__(self, rule: str = "opcm") -> None:
        self.open, self.reached = Event(), Event()
        self.errors: list[Exception] = []
        self.made = 0
        self._rule = rule

    def engine(self) -> Engine:
        gate = self
        self.made += 1

        class Gated(LocalEngine):
            def _absorb(self, step: Any, on_layer: Any) -> Any:
                gate.reached.set()
                assert gate.open.wait(timeout=30)
                if gate.errors:
                    raise gate.errors.pop(0)
                return super()._absorb(step, on_layer)

        return Gated(make_rule(self._rule), BASE.layers.values(), workers=1)


class TestTheQueue:
    def test_a_full_queue_is_no_fault_of_the_update(self, open_: Open, file: Any) -> None:
        gate = Gate()
        aggregator = open_(limits=Limits(max_queue=2), make_engine=gate.engine)
        for seed in (1, 2):
            aggregator.submit(file(seed), site="ward-1")
        with pytest.raises(Busy) as busy:
            aggregator.submit(file(3), site="ward-1")
        assert busy.value.retry_after
        assert aggregator.status().refused == {}
        gate.open.set()
        assert aggregator.wait_until_merged(timeout=30)
        submit_all(aggregator, file(3))
        assert aggregator.version().number == 3

    def test_what_no_engine_can_merge_does_not_hold_up_the_rest(self, open_: Open, file: Any) -> None:
        gate = Gate()
        gate.open.set()
        gate.errors.append(FactorisationFailed("it did not converge", layer="a.weight"))
        aggregator = open_(make_engine=gate.engine)
        first, second = submit_all(aggregator, file(1), file(2))
        failed = aggregator.update(first.update)
        assert (failed.state, failed.kept) == (UpdateState.FAILED, False)
        assert "did not converge" in failed.reason
        assert aggregator.update(second.update).version == 1

    @pytest.mark.parametrize("error", [RuntimeError("the cluster is gone"), FedmergeError("not now")])
    def test_an_engine_that_fails_for_now_is_tried_again(
        self, open_: Open, file: Any, error: Exception
    ) -> None:
        gate = Gate()
        gate.open.set()
        gate.errors.append(error)
        aggregator = open_(make_engine=gate.engine)
        (receipt,) = submit_all(aggregator, file(1))
        assert aggregator.update(receipt.update).version == 1
        assert aggregator.status().failing == ""

    def test_a_staged_update_can_be_rejected_while_merging_stands_still(self, open_: Open, file: Any) -> None:
        gate = Gate()
        aggregator = open_(make_engine=gate.engine)
        aggregator.submit(file(1), site="ward-1")
        second = aggregator.submit(file(2), site="ward-1")
        aggregator.reject(second.update, by="root", reason="poison")
        gate.open.set()
        assert aggregator.wait_until_merged(timeout=30)
        assert aggregator.update(second.update).state is UpdateState.REJECTED
        assert aggregator.version().number == 1


class TestQuarantine:
    def test_a_held_update_waits_for_approval(self, open_: Open, file: Any) -> None:
        aggregator = open_(limits=Limits(quarantine="all"))
        (receipt,) = submit_all(aggregator, file(1))
        assert receipt.state is UpdateState.HELD
        assert (aggregator.version().number, aggregator.status().held) == (0, 1)
        aggregator.approve(receipt.update, by="root")
        assert aggregator.wait_until_merged(timeout=30)
        assert aggregator.update(receipt.update).version == 1

    def test_a_new_site_is_held_until_something_of_it_was_merged(self, open_: Open, file: Any) -> None:
        aggregator = open_(limits=Limits(quarantine="new-sites"))
        (first,) = submit_all(aggregator, file(1))
        assert first.state is UpdateState.HELD
        aggregator.approve(first.update, by="root")
        assert aggregator.wait_until_merged(timeout=30)
        (second,) = submit_all(aggregator, file(2))
        assert second.state is UpdateState.STAGED
        (other,) = submit_all(aggregator, file(3), site="ward-2")
        assert other.state is UpdateState.HELD

    def test_a_rejected_update_is_gone_and_stays_rejected(
        self, open_: Open, file: Any, tmp_path: Path
    ) -> None:
        aggregator = open_(limits=Limits(quarantine="all"))
        (receipt,) = submit_all(aggregator, file(1))
        aggregator.reject(receipt.update, by="root", reason="who is this?")
        assert aggregator.update(receipt.update).reason == "who is this?"
        assert list((tmp_path / "state" / "blobs").rglob("*.safetensors")) == []
        (again,) = submit_all(aggregator, file(1))
        assert (again.state, again.again) == (UpdateState.REJECTED, True)

    def test_an_update_whose_step_would_be_too_large_is_held_whatever_the_quarantine(
        self, open_: Open, tmp_path: Path
    ) -> None:
        """P5: two vectors cancel but for a small layer, which OPCM scales up; a third one turns it round."""
        base = Base.from_checkpoint(
            {"embed.weight": torch.ones(40, 16), "norm.bias": torch.zeros(16), "b.weight": torch.ones(16, 16)}
        )
        large, small = torch.randn(40, 16), torch.full((16,), 1e-3)
        large *= 1.9 * sum(base.read(n).square().sum() for n in base.layers) ** 0.5 / large.norm()
        attack = [
            {"embed.weight": large, "norm.bias": small},
            {"embed.weight": -large, "norm.bias": small},
            {"norm.bias": -3 * small},
        ]
        limits = Limits(layer_ratio=6.0)

        def engine() -> Engine:
            return LocalEngine(rule, base.layers.values(), workers=1)

        rule, settings = make_rule("opcm"), AggregatorSettings(limits=limits)
        with Aggregator(tmp_path / "state", base, rule, engine, settings) as aggregator:
            for number, layers in enumerate(attack):
                path = tmp_path / f"{number}.safetensors"
                unchanged = [name for name in base.layers if name not in layers]
                manifest = Manifest(base.fingerprint, 0, f"task-{number}")
                save(TaskVector.of(layers, unchanged, manifest), path)
                aggregator.submit(path, site="ward-1")
                assert aggregator.wait_until_merged(timeout=30)
            assert aggregator.version().number < 3
            held = [update for update in aggregator.updates() if update.state is UpdateState.HELD]
            assert "the step to the next version, layer 'norm.bias'" in held[-1].reason
            for update in held:
                aggregator.approve(update.id, by="root")
            assert aggregator.wait_until_merged(timeout=30)
            assert aggregator.version().number == 3
            assert aggregator.update(held[-1].id).reason == "approved by root"

    def test_approving_twice_or_nothing_is_refused(self, open_: Open, file: Any) -> None:
        aggregator = open_(limits=Limits(quarantine="all"))
        (receipt,) = submit_all(aggregator, file(1))
        aggregator.approve(receipt.update, by="root")
        with pytest.raises(StateError):
            aggregator.approve(receipt.update, by="root")
        with pytest.raises(NotFound):
            aggregator.approve("0" * 32, by="root")


class TestVersions:
    @pytest.mark.parametrize("rule", RULES)
    def test_every_kept_version_can_be_read(self, open_: Open, file: Any, rule: str) -> None:
        aggregator = open_(rule)
        receipts = submit_all(aggregator, *(file(seed) for seed in (1, 2, 3)))
        engine = LocalEngine(make_rule(rule), BASE.layers.values(), workers=1)
        for number, (seed, receipt) in enumerate(zip((1, 2, 3), receipts, strict=True), start=1):
            manifest = replace(vector(seed).manifest, site="ward-1")
            engine.merge(replace(vector(seed), id=receipt.update, manifest=manifest))
            wanted = {name: update.to_dense() for name, update in engine.merged().items()}
            got = layers_of(aggregator, number)
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        engine.close()

    def test_a_version_is_fetched_whole_and_says_what_it_is(
        self, open_: Open, file: Any, tmp_path: Path
    ) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1))
        record = aggregator.fetch(tmp_path / "out.safetensors")
        fetched = load(tmp_path / "out.safetensors")
        assert record == aggregator.version(1)
        assert (fetched.manifest.base, fetched.manifest.origin_version) == (BASE.fingerprint, 1)

    def test_half_the_bytes_in_bfloat16(self, open_: Open, file: Any, tmp_path: Path) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1))
        aggregator.fetch(tmp_path / "half.safetensors", dtype="bf16")
        whole, half = layers_of(aggregator), load(tmp_path / "half.safetensors")
        for name, update in half.items():
            assert torch.equal(update.to_dense(), whole[name].bfloat16().float())
        with aggregator.open_version(dtype="bf16") as published:
            assert hashlib.sha256(published.path.read_bytes()).hexdigest() == published.sha256
            assert published.size == published.path.stat().st_size

    def test_the_base_is_not_served(self, open_: Open) -> None:
        with pytest.raises(NotFound), open_().open_version():
            pass

    def test_a_version_that_never_was(self, open_: Open) -> None:
        with pytest.raises(NotFound):
            open_().version(1)

    def test_watching_gives_what_is_there_and_what_comes(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        seen: list[int] = []
        two = Event()

        def watch() -> None:
            for version in aggregator.watch(after=0):
                seen.append(version.number)
                if seen[-1] == 2:
                    two.set()

        submit_all(aggregator, file(1))
        watcher = Thread(target=watch)
        watcher.start()
        submit_all(aggregator, file(2))
        assert two.wait(timeout=30)
        aggregator.close()
        watcher.join(timeout=30)
        assert not watcher.is_alive()
        assert seen in ([1, 2], [2])


class TestRollingBack:
    @pytest.mark.parametrize("rule", RULES)
    def test_an_earlier_version_is_served_again_bit_for_bit(self, open_: Open, file: Any, rule: str) -> None:
        aggregator = open_(rule)
        submit_all(aggregator, *(file(seed) for seed in (1, 2, 3)))
        wanted = layers_of(aggregator, 2)
        version = aggregator.roll_back(2, by="root")
        assert (version.number, version.kind, version.parent, version.by) == (4, "rollback", 2, "root")
        got = layers_of(aggregator)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
        assert aggregator.status().tasks == ("task-1", "task-2")

    @pytest.mark.parametrize("rule", RULES)
    def test_merging_goes_on_from_there_as_if_the_rest_had_never_been(
        self, open_: Open, file: Any, rule: str
    ) -> None:
        aggregator, straight = open_(rule), open_(rule, folder="straight")
        submit_all(aggregator, *(file(seed) for seed in (1, 2, 3)))
        aggregator.roll_back(1, by="root")
        submit_all(aggregator, file(4))
        submit_all(straight, file(1), file(4))
        got, wanted = layers_of(aggregator), layers_of(straight)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)

    def test_back_to_the_base(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1))
        aggregator.roll_back(0, by="root")
        assert layers_of(aggregator) == {}
        assert aggregator.version().merges == 0
        submit_all(aggregator, file(2))
        assert aggregator.version().merges == 1

    def test_forward_again_to_what_was_rolled_back(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1), file(2))
        wanted = layers_of(aggregator)
        aggregator.roll_back(1, by="root")
        aggregator.roll_back(2, by="root")
        got = layers_of(aggregator)
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)

    def test_a_version_that_never_was(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1))
        with pytest.raises(NotFound):
            aggregator.roll_back(9, by="root")
        submit_all(aggregator, file(2))
        assert aggregator.version().number == 2


class TestRemoving:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("position", [0, 1, 2])
    def test_what_is_left_is_what_the_others_give(
        self, open_: Open, file: Any, rule: str, position: int
    ) -> None:
        aggregator, without = open_(rule), open_(rule, folder="without")
        seeds = [1, 2, 3]
        submit_all(aggregator, *(file(seed) for seed in seeds))
        version = aggregator.remove(f"task-{seeds[position]}", by="root")
        assert (version.kind, version.merges, version.task) == ("removal", 2, f"task-{seeds[position]}")
        seeds.pop(position)
        submit_all(without, *(file(seed) for seed in seeds))
        assert close_to(layers_of(aggregator), layers_of(without))
        submit_all(aggregator, file(4))
        submit_all(without, file(4))
        assert close_to(layers_of(aggregator), layers_of(without), 1e-5)

    @pytest.mark.parametrize("rule", RULES)
    def test_the_only_task(self, open_: Open, file: Any, rule: str) -> None:
        aggregator = open_(rule)
        submit_all(aggregator, file(1))
        aggregator.remove("task-1", by="root")
        assert layers_of(aggregator) == {}

    @pytest.mark.parametrize("rule", RULES)
    def test_every_vector_of_the_task_goes_and_a_later_one_may_come(
        self, open_: Open, file: Any, rule: str
    ) -> None:
        aggregator, without = open_(rule), open_(rule, folder="without")
        submit_all(aggregator, file(1, task="ecg"), file(2), file(3, task="ecg"))
        aggregator.remove("ecg", by="root")
        submit_all(aggregator, file(4, task="ecg"))
        submit_all(without, file(2), file(4, task="ecg"))
        assert close_to(layers_of(aggregator), layers_of(without), 1e-5)
        aggregator.remove("task-2", by="root")
        assert aggregator.status().tasks == ("ecg",)
        (again,) = submit_all(aggregator, file(1, task="ecg"))
        assert again.state is UpdateState.REMOVED

    def test_a_task_that_is_not_there_names_those_that_are(self, open_: Open, file: Any) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1))
        with pytest.raises(NotFound, match="task-1"):
            aggregator.remove("ecg", by="root")

    def test_a_removed_task_is_gone_from_a_model_rolled_back_to_before_and_back_again(
        self, open_: Open, file: Any
    ) -> None:
        aggregator = open_()
        submit_all(aggregator, file(1), file(2))
        removal = aggregator.remove("task-1", by="root")
        aggregator.roll_back(2, by="root")
        assert aggregator.status().tasks == ("task-1", "task-2")
        aggregator.roll_back(removal.number, by="root")
        assert aggregator.status().tasks == ("task-2",)


class TestStartingAgain:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("snapshot_every", [1, 2, 100])
    def test_it_goes_on_where_it_was_left_bit_for_bit(
        self, open_: Open, file: Any, rule: str, snapshot_every: int
    ) -> None:
        retention = Retention(snapshot_every=snapshot_every)
        unbroken = open_(rule, retention=retention, folder="unbroken")
        submit_all(unbroken, *(file(seed) for seed in range(5)))
        for seed in range(5):
            aggregator = open_(rule, retention=retention)
            submit_all(aggregator, file(seed))
            aggregator.close()
        again = open_(rule, retention=retention)
        assert again.version(5).sha256 == unbroken.version(5).sha256
        assert merged_bits(again) == merged_bits(unbroken)

    def test_staged_updates_are_merged_after_the_restart(self, open_: Open, file: Any) -> None:
        gate = Gate()
        aggregator = open_(make_engine=gate.engine)
        receipts = [aggregator.submit(file(seed), site="ward-1") for seed in (1, 2, 3)]
        closing = Thread(target=aggregator.close)
        closing.start()
        gate.open.set()
        closing.join(timeout=30)
        again = open_()
        assert again.wait_until_merged(timeout=30)
        assert [again.update(receipt.update).version for receipt in receipts] == [1, 2, 3]

    @pytest.mark.parametrize("rule", RULES)
    def test_after_a_rollback_and_a_removal(self, open_: Open, file: Any, rule: str) -> None:
        aggregator = open_(rule)
        submit_all(aggregator, *(file(seed) for seed in range(4)))
        aggregator.roll_back(3, by="root")
        aggregator.remove("task-1", by="root")
        submit_all(aggregator, file(5))
        wanted = merged_bits(aggregator)
        aggregator.close()
        again = open_(rule)
        assert merged_bits(again) == wanted
        assert again.status().tasks == ("task-0", "task-2", "task-5")
        again.roll_back(3, by="root")
        assert again.status().tasks == ("task-0", "task-1", "task-2")

    def test_two_servers_on_one_folder(self, open_: Open) -> None:
        open_()
        with pytest.raises(StoreLocked):
            open_()

    def test_a_folder_of_another_rule(self, open_: Open) -> None:
        open_("opcm").close()
        with pytest.raises(ConfigError, match="opcm"):
            open_("average")


class TestWhatIsKept:
    def test_versions_beyond_the_settings_cannot_be_had(self, open_: Open, file: Any) -> None:
        aggregator = open_(retention=Retention(versions=2, vectors=0, snapshot_every=2))
        submit_all(aggregator, *(file(seed) for seed in range(7)))
        assert [v.kept for v in aggregator.versions()] == [False] * 5 + [True] * 2
        with pytest.raises(NotKept):
            aggregator.roll_back(3, by="root")
        with pytest.raises(NotKept), aggregator.open_version(3):
            pass
        with pytest.raises(NotKept, match="its task vector was not kept"):
            aggregator.remove("task-0", by="root")
        aggregator.roll_back(6, by="root")
        assert aggregator.version().merges == 6

    @pytest.mark.parametrize("rule", RULES)
    def test_every_kept_version_can_be_rolled_back_to(self, open_: Open, file: Any, rule: str) -> None:
        aggregator = open_(rule, retention=Retention(versions=3, vectors=0, snapshot_every=2))
        for seed in range(6):
            submit_all(aggregator, file(seed))
            if seed == 3:
                aggregator.roll_back(2, by="root")
        for number in [v.number for v in aggregator.versions() if v.kept]:
            wanted = layers_of(aggregator, number)
            version = aggregator.roll_back(number, by="root")
            got = layers_of(aggregator, version.number)
            assert all(torch.equal(got[name], wanted[name]) for name in wanted)

    def test_disk_is_bounded_however_many_come(self, open_: Open, file: Any, tmp_path: Path) -> None:
        aggregator = open_(retention=Retention(versions=2, vectors=2, snapshot_every=2))
        blobs = tmp_path / "state" / "blobs"
        counts = []
        for seed in range(16):
            submit_all(aggregator, file(seed))
            counts.append(len(list(blobs.rglob("*.safetensors"))))
        assert max(counts[8:]) <= max(counts[:8])

    def test_a_version_being_read_stays_until_it_is_read(self, open_: Open, file: Any) -> None:
        aggregator = open_(retention=Retention(versions=1, vectors=0, snapshot_every=1))
        submit_all(aggregator, file(1))
        with aggregator.open_version(1, "bf16") as half, aggregator.open_version(1) as published:
            submit_all(aggregator, file(2))
            assert hashlib.sha256(published.path.read_bytes()).hexdigest() == published.sha256
            assert half.path.exists()
        assert not published.path.exists()
        assert not half.path.exists()


def test_everything_that_happened_is_in_the_audit_log(open_: Open, file: Any, tmp_path: Path) -> None:
    aggregator = open_()
    submit_all(aggregator, file(1), file(2))
    with pytest.raises(Duplicate):
        aggregator.submit(file(1), site="ward-2")
    aggregator.roll_back(1, by="root")
    aggregator.remove("task-1", by="root")
    aggregator.close()
    log = tmp_path / "state" / "audit.jsonl"
    events = [line.split('"event": "')[1].split('"')[0] for line in log.read_text().splitlines()]
    assert sorted(events) == sorted(
        ["opened", "admitted", "merged", "admitted", "merged", "refused", "rollback", "removal"]
    )
    assert verify(log).lines == len(events)
