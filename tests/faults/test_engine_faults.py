"""Fault F5: actors die at every point of a merge, and the model is as if none had.

An actor is killed with SIGKILL from inside a hook the driver passes at a known point: the reading of
the k-th layer, the start of a phase. The last assertion compares totals and every bit with an engine
that nothing happened to.
"""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ray.exceptions import RayActorError

from fedmerge.common.errors import EngineError, NonFinite
from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank, TaskVector
from fedmerge.server.engine import ray_engine as module
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.rule import Totals

pytestmark = pytest.mark.ray

SHAPES = {
    "large.weight": (168, 168),  # its state lies in Ray's object store, not in the reply
    "large.twin.weight": (168, 168),
    "tall.weight": (60, 24),
    "wide.weight": (24, 60),
    "conv.weight": (8, 4, 3, 3),
    "square.weight": (32, 32),
    "norm.bias": (40,),
}
LAYERS = tuple(
    LayerSpec(name, shape, torch.float32, LayerKind.VECTOR if len(shape) == 1 else LayerKind.MATRIX)
    for name, shape in SHAPES.items()
)
NAMES = tuple(SHAPES)

Hook = Callable[[], None]


def vector(seed: int, without: tuple[str, ...] = ()) -> TaskVector:
    """Odd ones bring two layers as factors."""
    generator = torch.Generator().manual_seed(1000 + seed)
    held: dict[str, LayerUpdate] = {n: Dense(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}
    if seed % 2:
        for name in ("tall.weight", "wide.weight"):
            rows, columns = SHAPES[name]
            left, right = (
                torch.randn(rows, 2, generator=generator),
                torch.randn(2, columns, generator=generator),
            )
            held[name] = LowRank(left, right, SHAPES[name])
    return TaskVector.of({n: u for n, u in held.items() if n not in without}, without, label=f"vector {seed}")


STREAM = tuple(map(vector, range(5)))


def at_read(update: TaskVector, hooks: dict[int, Hook]) -> TaskVector:
    """The same vector; before its k-th read, counted from 0, ``hooks[k]`` runs."""
    reads = iter(range(1_000_000))

    def read(name: str) -> LayerUpdate:
        hooks.get(next(reads), lambda: None)()
        return update.read(name)

    return replace(update, read=read)


def at_every_read(update: TaskVector, hook: Hook) -> TaskVector:
    def read(name: str) -> LayerUpdate:
        hook()
        return update.read(name)

    return replace(update, read=read)


def outcome(engine: Engine) -> tuple[Totals, str]:
    """The totals and a SHA-256 over every merged layer."""
    total = hashlib.sha256()
    for name, layer in engine.merged().items():
        total.update(name.encode() + layer.to_dense().contiguous().numpy().tobytes())
    return engine.totals, total.hexdigest()


def unbroken(*stream: TaskVector) -> tuple[Totals, str]:
    with LocalEngine(make_rule("opcm"), LAYERS, workers=1) as engine:
        for update in stream:
            engine.merge(update)
        return outcome(engine)


def kill(engine: Any, shard: int) -> None:
    """SIGKILL to the process that holds a shard now, if any; what it was sent before has been done."""
    with suppress(RayActorError, ProcessLookupError):
        kill_at_once(module.ray.get(engine._places[shard].actor.whereabouts.remote())["pid"])


def kill_at_once(pid: int | str) -> None:
    os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def engine(ray_engine: Callable[..., Any]) -> Any:
    engine = ray_engine(make_rule("opcm"), LAYERS, actors=2)
    engine.whereabouts()
    return engine


@pytest.fixture
def starts(engine: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts replacements of actors."""
    started: list[int] = []
    start = engine._start
    monkeypatch.setattr(engine, "_start", lambda layers: (started.append(len(layers)), start(layers))[1])
    return started


class TestKilledOnce:
    def test_between_merges(self, engine: Any) -> None:
        engine.merge(STREAM[0])
        engine.prepare(wait=True)
        kill_at_once(engine.whereabouts()[0]["pid"])
        engine.merge(STREAM[1])
        assert outcome(engine) == unbroken(*STREAM[:2])

    def test_right_after_a_merge_returned(self, engine: Any) -> None:
        pids = [found["pid"] for found in engine.whereabouts()]
        engine.merge(STREAM[0])
        kill_at_once(pids[0])
        assert outcome(engine) == unbroken(STREAM[0])
        engine.merge(STREAM[1])
        assert outcome(engine) == unbroken(*STREAM[:2])

    @pytest.mark.parametrize(("k", "in_flight"), [(0, 4), (3, 4), (6, 1)], ids=["first", "middle", "last"])
    def test_while_layers_are_being_sent(
        self, engine: Any, k: int, in_flight: int, monkeypatch: pytest.MonkeyPatch, starts: list[int]
    ) -> None:
        monkeypatch.setattr(module, "IN_FLIGHT", in_flight)
        engine.merge(STREAM[0])
        told: list[str] = []
        engine.merge(at_read(STREAM[1], {k: lambda: kill(engine, k % 2)}), told.append)
        assert sorted(told) == sorted(NAMES), "progress is told once per layer"
        assert len(starts) == 1
        assert outcome(engine) == unbroken(*STREAM[:2])

    def test_while_it_factorises(self, engine: Any, starts: list[int]) -> None:
        pids = [found["pid"] for found in engine.whereabouts()]
        engine.merge(STREAM[0])
        engine.prepare()
        kill_at_once(pids[0])
        engine.prepare(wait=True)
        assert len(starts) == 1
        engine.merge(STREAM[1])
        assert outcome(engine) == unbroken(*STREAM[:2])

    def test_while_it_factorises_in_the_background(self, engine: Any) -> None:
        pids = [found["pid"] for found in engine.whereabouts()]
        engine.merge(STREAM[0])
        engine.prepare()
        kill_at_once(pids[1])
        engine.merge(STREAM[1])
        assert outcome(engine) == unbroken(*STREAM[:2])

    def test_after_it_finished_and_before_its_reply(
        self, engine: Any, monkeypatch: pytest.MonkeyPatch, starts: list[int]
    ) -> None:
        """The side effect happened, the caller does not know: it must not happen twice."""
        finish_place = engine._finish_place

        def reply_lost(place: Any) -> None:
            if place is engine._places[0] and not starts:
                module.ray.get(place.actor.finish.remote())
                kill(engine, 0)
            finish_place(place)

        engine.merge(STREAM[0])
        monkeypatch.setattr(engine, "_finish_place", reply_lost)
        engine.merge(STREAM[1])
        assert len(starts) == 1
        assert outcome(engine) == unbroken(*STREAM[:2])

    @pytest.mark.parametrize("victim", [0, 1], ids=["the finished shard", "the unfinished shard"])
    def test_between_finishing_one_shard_and_the_next(
        self, engine: Any, victim: int, monkeypatch: pytest.MonkeyPatch, starts: list[int]
    ) -> None:
        finish_place = engine._finish_place

        def kill_before_the_second(place: Any) -> None:
            if place is engine._places[1] and not starts:
                kill(engine, victim)
            finish_place(place)

        engine.merge(STREAM[0])
        monkeypatch.setattr(engine, "_finish_place", kill_before_the_second)
        engine.merge(STREAM[1])
        monkeypatch.setattr(engine, "_finish_place", finish_place)
        engine.merge(STREAM[2])
        assert len(starts) == 1
        assert outcome(engine) == unbroken(*STREAM[:3])

    def test_with_its_export_lost(
        self, engine: Any, monkeypatch: pytest.MonkeyPatch, starts: list[int]
    ) -> None:
        """Rebuilt from an older export and the vectors since."""
        collect, merges = engine._collect_export, []

        def kill_before_exporting(place: Any) -> None:
            collect(place)
            if place is engine._places[0] and len(merges) == 2 and not starts:
                kill(engine, 0)

        monkeypatch.setattr(engine, "_collect_export", kill_before_exporting)
        for update in STREAM[:4]:
            merges.append(update.label)
            engine.merge(update)
        assert len(starts) == 1
        assert outcome(engine) == unbroken(*STREAM[:4])

    @pytest.mark.parametrize("restored", [False, True], ids=["", "restored"])
    def test_while_an_update_is_pending(self, engine: Any, restored: bool, starts: list[int]) -> None:
        engine.merge(STREAM[0])
        if restored:
            states = {name: engine.state(name) for name in engine.touched}
            engine.restore(states.__getitem__, states, engine.totals)
        engine.absorb(STREAM[1])
        kill(engine, 0)
        pending = {name: update.to_dense() for name, update in engine.pending().items()}
        engine.commit()
        assert len(starts) == 1
        assert outcome(engine) == unbroken(*STREAM[:2])
        assert all(torch.equal(engine.read_layer(name), pending[name]) for name in pending)

    def test_while_the_merged_vector_is_read(self, engine: Any) -> None:
        engine.merge(STREAM[0])
        wanted = outcome(engine)
        pids = [found["pid"] for found in engine.whereabouts()]
        merged = engine.merged()
        kill_at_once(pids[1])
        read = {name: merged.read(name).to_dense() for name in merged.names}
        assert {name: tuple(t.shape) for name, t in read.items()} == SHAPES
        assert outcome(engine) == wanted == unbroken(STREAM[0])


class TestKilledOften:
    def test_two_actors_in_one_merge(self, engine: Any, starts: list[int]) -> None:
        engine.merge(STREAM[0])
        engine.merge(at_read(STREAM[1], {1: lambda: kill(engine, 0), 4: lambda: kill(engine, 1)}))
        assert len(starts) == 2
        assert outcome(engine) == unbroken(*STREAM[:2])

    def test_each_shard_has_its_own_allowance(
        self, engine: Any, monkeypatch: pytest.MonkeyPatch, starts: list[int]
    ) -> None:
        """A host that goes down takes many actors at once; each is lost once."""
        monkeypatch.setattr(module, "REVIVALS", 1)
        engine.merge(STREAM[0])
        engine.merge(at_read(STREAM[1], {6: lambda: (kill(engine, 0), kill(engine, 1))}))
        assert len(starts) == 2
        assert outcome(engine) == unbroken(*STREAM[:2])

    def test_one_at_every_merge_of_a_stream(self, engine: Any, starts: list[int]) -> None:
        for merge, update in enumerate(STREAM):
            engine.merge(at_read(update, {merge: lambda merge=merge: kill(engine, merge % 2)}))
            engine.prepare()
        assert len(starts) >= len(STREAM)
        assert engine.totals.merges == len(STREAM)
        assert outcome(engine) == unbroken(*STREAM)


class TestKilledForever:
    def test_at_every_read_of_a_layer_gives_up_and_changes_nothing(
        self, engine: Any, monkeypatch: pytest.MonkeyPatch, starts: list[int]
    ) -> None:
        monkeypatch.setattr(module, "REVIVALS", 2)
        engine.merge(STREAM[0])
        doomed = at_every_read(STREAM[1], lambda: kill(engine, 0))
        with pytest.raises(EngineError, match="its actor keeps dying"):
            engine.merge(doomed)
        assert 1 <= len(starts) <= module.REVIVALS
        assert outcome(engine) == unbroken(STREAM[0])
        partial = vector(2, without=NAMES[1:])
        engine.merge(partial)
        assert outcome(engine) == unbroken(STREAM[0], partial)

    def test_while_finishing_gives_up_and_takes_the_finished_shard_back(
        self, engine: Any, monkeypatch: pytest.MonkeyPatch, starts: list[int]
    ) -> None:
        """The first shard has finished and the second never will: neither may keep the update."""
        monkeypatch.setattr(module, "REVIVALS", 1)
        finish_place, finishing = engine._finish_place, []

        def die() -> None:
            if finishing:
                kill(engine, 1)

        def finish(place: Any) -> None:
            if place is engine._places[1]:
                finishing.append(1)
                die()
            finish_place(place)

        engine.merge(STREAM[0])
        monkeypatch.setattr(engine, "_finish_place", finish)
        with pytest.raises(EngineError, match="its actor keeps dying"):
            engine.merge(at_every_read(STREAM[1], die))
        finishing.clear()
        monkeypatch.setattr(engine, "_finish_place", finish_place)
        assert 1 <= len(starts) <= module.REVIVALS
        assert outcome(engine) == unbroken(STREAM[0])
        engine.merge(STREAM[2])
        assert outcome(engine) == unbroken(STREAM[0], STREAM[2])

    def test_a_shard_taken_back_measures_the_next_update_as_it_was(
        self, ray_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The first shard has finished an update that never counted, and lives."""

        def with_fisher(update: TaskVector) -> TaskVector:
            return replace(
                update, statistics=lambda name: {"fisher": update.read(name).to_dense().square() + 0.1}
            )

        def fail_on_the_second(place: Any) -> None:
            if place is engine._places[1]:
                raise EngineError("out of order")
            finish_place(place)

        rule, stream = make_rule("perturb_and_merge"), [with_fisher(update) for update in STREAM[:3]]
        engine = ray_engine(rule, LAYERS, actors=2)
        finish_place = engine._finish_place
        engine.merge(stream[0])
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_finish_place", fail_on_the_second)
            with pytest.raises(EngineError, match="out of order"):
                engine.merge(stream[1])
        engine.merge(stream[2])
        with LocalEngine(rule, LAYERS, workers=1) as unbroken:
            unbroken.merge(stream[0])
            unbroken.merge(stream[2])
            assert outcome(engine) == outcome(unbroken)

    def test_when_asked_anything_gives_up(
        self, engine: Any, monkeypatch: pytest.MonkeyPatch, starts: list[int]
    ) -> None:
        engine.merge(STREAM[0])
        start = engine._start

        def stillborn(layers: list[LayerSpec]) -> Any:
            actor = start(layers)
            module.ray.kill(actor)
            return actor

        with monkeypatch.context() as patch:
            patch.setattr(engine, "_start", stillborn)
            kill(engine, 0)
            for ask in (lambda: outcome(engine), lambda: engine.prepare(wait=True), engine.whereabouts):
                with pytest.raises(EngineError, match="its actor keeps dying"):
                    ask()
        assert outcome(engine) == unbroken(STREAM[0])


class TestKilledWhileSomethingElseFails:
    def test_reading_error_is_the_one_that_is_raised(self, engine: Any) -> None:
        """The dead actor's shard must not hide it, nor keep the other shard from forgetting the update."""

        def kill_and_refuse() -> None:
            kill(engine, 0)
            raise NonFinite("no such number", where="vector 1")

        engine.merge(STREAM[0])
        with pytest.raises(NonFinite, match="vector 1: no such number"):
            engine.merge(at_read(STREAM[1], {6: kill_and_refuse}))
        partial = vector(2, without=NAMES[:-1])
        engine.merge(partial)
        assert outcome(engine) == unbroken(STREAM[0], partial)

    def test_half_rebuilt_shard_is_never_used(self, engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A vector that must be read again cannot be, for a while; then everything is there again."""
        gone: list[str] = []

        def missing(at: str) -> Hook:
            def hook() -> None:
                if gone:
                    gone.append(at)
                    raise FileNotFoundError(at)

            return hook

        stored = at_read(STREAM[1], {k: missing(f"read {k}") for k in range(8, 30)})
        collect = engine._collect_export
        engine.merge(STREAM[0])
        monkeypatch.setattr(
            engine, "_collect_export", lambda place: engine._places[0] is place and kill(engine, 0)
        )
        engine.merge(stored)
        monkeypatch.setattr(engine, "_collect_export", collect)
        gone.append("from now on")
        with pytest.raises(FileNotFoundError):
            outcome(engine)
        gone.clear()
        assert outcome(engine) == unbroken(*STREAM[:2])
        engine.merge(STREAM[2])
        assert outcome(engine) == unbroken(*STREAM[:3])

    def test_failed_export_does_not_fail_the_merge(
        self, engine: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An export is a convenience: without it the next one covers more."""
        engine.merge(STREAM[0])
        for place in engine._places:
            broken = place.actor.absorb.remote("no such layer", (), False, (0, {}, 0, None))
            module.ray.wait([broken])
            place.exporting = len(place.since), broken
        engine.merge(STREAM[1])
        kill(engine, 0)
        engine.merge(STREAM[2])
        assert outcome(engine) == unbroken(*STREAM[:3])


def test_local_ray_listens_on_loopback_alone(engine: Any) -> None:
    """Promise P7: every listening TCP socket of Ray's processes and of this one."""
    actors = {int(found["pid"]) for found in engine.whereabouts()}
    family = {os.getpid(), *_descendants(os.getpid())}
    assert actors <= family
    listening = {pid: _listening(pid) for pid in family}
    assert all(listening[pid] for pid in actors), "an actor's server was not found: the check is blind"
    addresses = {address for found in listening.values() for address in found}
    assert {address for address in addresses if not _loopback(address)} == set()


def _descendants(pid: int) -> set[int]:
    children: dict[int, set[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, set()).add(int(stat.parent.name))
    found, open_ends = set(), [pid]
    while open_ends:
        new = children.get(open_ends.pop(), set()) - found
        found |= new
        open_ends += new
    return found


def _listening(pid: int) -> set[str]:
    """Hexadecimal addresses of a process's listening TCP sockets, as the kernel shows them."""
    inodes = set()
    with suppress(OSError):
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(descriptor)
                if target.startswith("socket:["):
                    inodes.add(target[8:-1])
    addresses = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                (
                    _,
                    local,
                    _,
                    state,
                    *_,
                ) = fields = line.split()
                if state == "0A" and fields[9] in inodes:
                    addresses.add(local.partition(":")[0])
    return addresses


def _loopback(address: str) -> bool:
    """127.0.0.0/8, ::1 or 127.0.0.0/8 mapped into IPv6; 32-bit words in the host's little-endian order."""
    mapped = address.startswith("0000000000000000FFFF0000")
    return address == "0" * 24 + "01000000" or (address.endswith("7F") and (len(address) == 8 or mapped))
