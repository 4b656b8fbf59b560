"""Faults F1, F2 and F4 against a whole aggregator: killed, lied to by its disk, its files damaged."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from killing import GENEROUS, VECTORS, Killing, base, opened, outcome, vector

from fedmerge.common.errors import FedmergeError, StoreDamaged, StoreFull
from fedmerge.common.vectorfile import save
from fedmerge.server.aggregator import Aggregator
from fedmerge.server.merge import make_rule
from fedmerge.server.merging import Merging
from fedmerge.server.store.disk import Disk

HARNESS = Path(__file__).with_name("killing.py")


def killed_everywhere(scenario: str, folder: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(HARNESS), scenario, str(folder), *more],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{scenario}: {found['kills']} kills, {len(found['torn'])} torn")
    return found


class TestKilledBeforeEveryStepThatWrites:
    """F1: whatever was acknowledged is merged once, and the end is that of an unbroken run, bit for bit."""

    def test_while_merging(self, tmp_path: Path) -> None:
        found = killed_everywhere("merges", tmp_path / "run")
        assert found["torn"] == []
        assert found["kills"] > 100

    def test_while_rolling_back_and_removing(self, tmp_path: Path) -> None:
        found = killed_everywhere("acts", tmp_path / "run")
        assert found["torn"] == []
        assert found["kills"] > 100

    def test_after_the_commit_and_before_the_reply_a_hundred_times(self, tmp_path: Path) -> None:
        """F3: every retry is answered as already there, and each update is merged once."""
        found = killed_everywhere("replies", tmp_path / "run")
        assert (found["kills"], found["merged"], found["versions"]) == (100, 100, 100)
        assert found["torn"] == []

    @pytest.mark.parametrize("bug", ["two-transactions", "acknowledged-too-early"])
    def test_a_planted_bug_is_found(self, tmp_path: Path, bug: str) -> None:
        assert killed_everywhere("merges", tmp_path / "run", "--bug", bug)["torn"]


@pytest.mark.ray
@pytest.mark.parametrize("count", [4, pytest.param(100, marks=pytest.mark.slow)])
def test_an_actor_killed_at_every_merge_after_it_was_done_merges_each_once(
    tmp_path: Path, ray_engine: Callable[..., Any], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F5: the side effect has happened, its reply is lost, the actor's memory is gone."""
    from fedmerge.server.engine import ray_engine as module

    kills = []
    finish_place = module.RayEngine._finish_place

    def reply_lost(self: Any, place: Any) -> None:
        if place is self._places[len(kills) % 2] and len(kills) < self.totals.merges + 1:
            module.ray.get(place.actor.finish.remote())
            module.ray.kill(place.actor)
            kills.append(1)
        finish_place(self, place)

    monkeypatch.setattr(module.RayEngine, "_finish_place", reply_lost)
    rule = make_rule("opcm")
    for seed in range(count):
        save(vector(seed), tmp_path / f"{seed}.safetensors")
    make_engine = partial(ray_engine, rule, base().layers.values(), actors=2)
    with Aggregator(tmp_path / "state", base(), rule, make_engine, GENEROUS) as aggregator:
        for seed in range(count):
            aggregator.submit(tmp_path / f"{seed}.safetensors", site="ward-1")
            assert aggregator.wait_until_merged(timeout=60)
        got = [version.sha256 for version in aggregator.versions(0, count + 1)]
    assert len(kills) == count
    with opened(tmp_path / "unbroken", Disk(), GENEROUS) as aggregator:
        for seed in range(count):
            aggregator.submit(tmp_path / f"{seed}.safetensors", site="ward-1")
            assert aggregator.wait_until_merged(timeout=60)
        assert got == [version.sha256 for version in aggregator.versions(0, count + 1)]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for seed in range(VECTORS):
        save(vector(seed), folder / f"{seed}.safetensors")
    return folder


class Failing(Disk):
    """Fails once, at the ``at``-th step after :meth:`arm`, or at every step from there until mended."""

    def __init__(self, code: int, at: int, lasting: bool) -> None:
        self.code, self.at, self.lasting = code, at, lasting
        self.steps, self.failed, self.mended = 0, False, False

    def step(self, name: str) -> None:
        self.steps += 1
        due = self.steps >= self.at if self.lasting else self.steps == self.at
        if due and not self.mended:
            self.failed = True
            raise OSError(self.code, "injected")


@pytest.mark.parametrize(("code", "lasting"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_a_disk_that_fails_at_any_step_loses_nothing(
    tmp_path: Path, files: Path, code: int, lasting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """F4: a site is told, an operator is told, and it goes on by itself when the disk does."""
    monkeypatch.setattr("fedmerge.server.aggregator.LONGEST_PAUSE", 0.01)
    with opened(tmp_path / "unbroken", Disk(), GENEROUS) as aggregator:
        for seed in range(2):
            aggregator.submit(files / f"{seed}.safetensors", site="ward-1")
            assert aggregator.wait_until_merged(timeout=10)
        wanted = outcome(aggregator)
    counting = Killing(None)
    opened(tmp_path / "counted", counting, GENEROUS).close()
    first = counting.steps + 1
    for at in range(first, first + 60, 2):
        disk = Failing(code, at, lasting)
        folder = tmp_path / f"state-{at}"
        with opened(folder, disk, GENEROUS) as aggregator:
            for seed in range(2):
                path = files / f"{seed}.safetensors"
                try:
                    aggregator.submit(path, site="ward-1")
                except StoreFull:
                    disk.mended = True
                    aggregator.submit(path, site="ward-1")
                while not aggregator.wait_until_merged(timeout=0.05):
                    disk.mended = disk.mended or disk.failed
            assert disk.failed or at > disk.steps
            assert outcome(aggregator) == wanted, f"failed at step {at}"


def damages() -> list[tuple[str, Callable[[Path], object]]]:
    def edit(change: Callable[[bytearray], object]) -> Callable[[Path], object]:
        def damage(path: Path) -> None:
            data = bytearray(path.read_bytes())
            change(data)
            path.chmod(0o600)
            path.write_bytes(data)

        return damage

    def flip(data: bytearray) -> None:
        data[len(data) // 2] ^= 1

    def cut(data: bytearray) -> None:
        del data[len(data) // 2 :]

    def zero(data: bytearray) -> None:
        data[:] = bytes(len(data))

    return [("truncated", edit(cut)), ("zeroed", edit(zero)), ("flipped", edit(flip)), ("gone", Path.unlink)]


@pytest.fixture(params=damages(), ids=lambda param: param[0])
def damage(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    found: Callable[[Path], object] = request.param[1]
    return found


class TestDamagedFiles:
    """F2: the error names the file, and what is intact is served."""

    @pytest.fixture
    def folder(self, tmp_path: Path, files: Path) -> Path:
        folder = tmp_path / "state"
        merges_of_three(folder, files)
        return folder

    def test_of_an_earlier_version(self, folder: Path, damage: Callable[[Path], object]) -> None:
        with opened(folder, Disk(), GENEROUS) as aggregator:
            path = blob(folder, aggregator.version(2).sha256)
            aggregator._library._intact.clear()
            damage(path)
            with pytest.raises(StoreDamaged, match=path.name), aggregator.open_version(2):
                pass
            with aggregator.open_version() as current:
                assert current.record.number == 3

    def test_of_the_current_version_while_running(
        self, folder: Path, damage: Callable[[Path], object]
    ) -> None:
        with opened(folder, Disk(), GENEROUS) as aggregator:
            path = blob(folder, aggregator.version().sha256)
            aggregator._library._intact.clear()
            damage(path)
            with aggregator.open_version() as served:
                assert served.record.number == 2
            assert path.name in aggregator.status().failing

    def test_of_the_current_version_is_mended_at_the_next_start(
        self, folder: Path, damage: Callable[[Path], object]
    ) -> None:
        with opened(folder, Disk(), GENEROUS) as aggregator:
            path = blob(folder, aggregator.version().sha256)
        before = path.read_bytes()
        damage(path)
        with opened(folder, Disk(), GENEROUS) as aggregator:
            assert path.read_bytes() == before
            assert aggregator.status().failing == ""
            with aggregator.open_version() as served:
                assert served.record.number == 3

    def test_of_a_snapshot_is_made_up_for_by_replaying(
        self, folder: Path, files: Path, damage: Callable[[Path], object]
    ) -> None:
        with opened(folder, Disk(), GENEROUS) as aggregator:
            (snapshot,) = [v.snapshot for v in aggregator.versions() if v.snapshot]
        damage(blob(folder, snapshot))
        with opened(folder, Disk(), GENEROUS) as aggregator:
            aggregator.submit(files / "3.safetensors", site="ward-1")
            assert aggregator.wait_until_merged(timeout=10)
            got = outcome(aggregator)["versions"]
        with opened(folder.with_name("unbroken"), Disk(), GENEROUS) as aggregator:
            for seed in range(VECTORS):
                aggregator.submit(files / f"{seed}.safetensors", site="ward-1")
            assert aggregator.wait_until_merged(timeout=10)
            assert got == outcome(aggregator)["versions"]

    def test_of_a_vector_that_the_model_needs_keeps_the_rest_served(
        self, folder: Path, files: Path, damage: Callable[[Path], object]
    ) -> None:
        with opened(folder, Disk(), GENEROUS) as aggregator:
            path = blob(folder, aggregator.updates()[2].sha256)
        damage(path)
        with opened(folder, Disk(), GENEROUS) as aggregator:
            assert path.name in aggregator.status().failing
            with aggregator.open_version() as served:
                assert served.record.number == 3
            aggregator.roll_back(2, by="root")
            aggregator.submit(files / "3.safetensors", site="ward-1")
            assert aggregator.wait_until_merged(timeout=10)
            assert aggregator.version().merges == 3
            assert aggregator.status().failing == ""

    def test_of_a_vector_that_waits_does_not_hold_up_the_rest(
        self, tmp_path: Path, files: Path, damage: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tmp_path / "state"
        with monkeypatch.context() as patch:
            patch.setattr(Merging, "merge", _never)
            with opened(folder, Disk(), GENEROUS) as aggregator:
                for seed in range(2):
                    aggregator.submit(files / f"{seed}.safetensors", site="ward-1")
                path = blob(folder, aggregator.updates()[0].sha256)
        damage(path)
        with opened(folder, Disk(), GENEROUS) as aggregator:
            assert aggregator.wait_until_merged(timeout=10)
            first, second = aggregator.updates()
            assert (first.state, second.version) == ("failed", 1)
            assert path.name in first.reason
            again = aggregator.submit(files / "0.safetensors", site="ward-1")
            assert (again.update, again.state) == (first.id, "staged")
            assert aggregator.wait_until_merged(timeout=10)
            assert aggregator.update(first.id).version == 2


def _never(self: Merging, update: object) -> None:
    raise FedmergeError("not now")


def merges_of_three(folder: Path, files: Path) -> None:
    with opened(folder, Disk(), GENEROUS) as aggregator:
        for seed in range(3):
            aggregator.submit(files / f"{seed}.safetensors", site="ward-1")
            assert aggregator.wait_until_merged(timeout=10)


def blob(folder: Path, sha256: str) -> Path:
    return folder / "blobs" / sha256[:2] / f"{sha256}.safetensors"
