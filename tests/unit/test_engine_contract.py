"""Both engines keep the contract, and what is special to each."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from engine_contract import LAYERS, EngineContract, MakeEngine, Reference, assert_same, vector

from fedmerge.common.errors import ConfigError, FactorisationFailed
from fedmerge.common.layers import LayerSpec
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.iso_c import IsoC, MatrixSum64
from fedmerge.server.merge.opcm import Opcm
from fedmerge.server.merge.rule import Rule, Totals
from fedmerge.server.merge.spectrum import LinAlgError


class TestLocalEngine(EngineContract):
    """Runs the contract in this process."""

    @pytest.fixture
    def make_engine(self) -> Iterator[MakeEngine]:
        opened: list[Engine] = []

        def make(rule: Rule, layers: tuple[LayerSpec, ...]) -> Engine:
            opened.append(LocalEngine(rule, layers, workers=3))
            return opened[-1]

        yield make
        for engine in opened:
            engine.close()


@pytest.mark.ray
class TestRayEngine(EngineContract):
    """Runs the contract on actors."""

    @pytest.fixture
    def make_engine(self, ray_engine: Callable[..., Any]) -> MakeEngine:
        return lambda rule, layers: ray_engine(rule, layers, actors=2)


class SlowToPrepare(Opcm):
    """OPCM whose first factorisation of a state is held up until it is released."""

    name: ClassVar[str] = "slow"
    held: ClassVar[threading.Event] = threading.Event()
    calls: ClassVar[list[int]] = []

    def prepare(self, state: Any) -> Any:
        removal = super().prepare(state)
        if removal is not None:
            self.calls.append(1)
            if len(self.calls) == 1:
                assert self.held.wait(timeout=30)
        return removal


def test_directions_prepared_late_are_never_used_for_a_later_state() -> None:
    """A factorisation that outlives the merge it was meant for must not serve the next one."""
    layer = LAYERS[1]
    SlowToPrepare.held.clear()
    SlowToPrepare.calls.clear()
    with LocalEngine(SlowToPrepare(), [layer], workers=3) as engine:
        engine.merge(vector(0, [layer]))
        engine.prepare()
        engine.prepare()
        threading.Timer(0.3, SlowToPrepare.held.set).start()
        engine.merge(vector(1, [layer]))
        SlowToPrepare.held.wait()
        time.sleep(0.1)
        engine.merge(vector(2, [layer]))
        assert_same(
            engine, Reference(make_rule("opcm"), [layer]).merge(*[vector(t, [layer]) for t in range(3)])
        )


class FailsToRead(IsoC):
    """The matrix cannot be read out; the vector is, slowly."""

    name: ClassVar[str] = "fails"
    reading: ClassVar[threading.Event] = threading.Event()
    held: ClassVar[threading.Event] = threading.Event()
    done: ClassVar[list[str]] = []

    def read(self, state: Any, totals: Totals) -> torch.Tensor:
        if isinstance(state, MatrixSum64):
            assert self.reading.wait(timeout=30)
            raise LinAlgError("no convergence")
        self.reading.set()
        assert self.held.wait(timeout=30)
        self.done.append("vector")
        return super().read(state, totals)


def test_nothing_is_read_any_more_once_reading_has_failed() -> None:
    """Otherwise a read-out of an update that is dropped next would be kept."""
    with LocalEngine(FailsToRead(), LAYERS[:2], workers=2) as engine:
        engine.absorb(vector(0, LAYERS[:2]))
        threading.Timer(0.3, FailsToRead.held.set).start()
        with pytest.raises(FactorisationFailed):
            engine.pending()
        assert FailsToRead.done == ["vector"]


def test_closing_again_leaves_the_thread_count_of_others_alone() -> None:
    before = torch.get_num_threads()
    engine = LocalEngine(make_rule("average"), LAYERS, workers=1, threads=2)
    assert torch.get_num_threads() == 2
    engine.close()
    assert torch.get_num_threads() == before
    try:
        torch.set_num_threads(before + 2)
        engine.close()
        assert torch.get_num_threads() == before + 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.ray
def test_closing_ends_the_actors_processes_and_may_be_repeated(local_ray: None) -> None:
    from fedmerge.server.engine.ray_engine import RayEngine

    engine = RayEngine(make_rule("average"), LAYERS, actors=1)
    [found] = engine.whereabouts()
    assert found["pid"] != os.getpid()
    assert found["device"] == "cpu"
    engine.close()
    engine.close()
    deadline = time.monotonic() + 20
    while _runs(int(found["pid"])) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(int(found["pid"]))


@pytest.mark.ray
def test_more_actors_than_layers_give_one_layer_to_each(ray_engine: Callable[..., Any]) -> None:
    engine = ray_engine(make_rule("average"), LAYERS[:2], actors=5)
    assert engine.workers == 2
    assert len({found["pid"] for found in engine.whereabouts()}) == 2


@pytest.mark.ray
def test_engine_without_actors_is_refused(local_ray: None) -> None:
    from fedmerge.server.engine.ray_engine import RayEngine

    with pytest.raises(ConfigError, match=r"at least one actor: got 0, wanted >= 1"):
        RayEngine(make_rule("average"), LAYERS, actors=0)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
