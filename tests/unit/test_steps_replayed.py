"""Fault F5 for steps and adjustments: an actor dies in one or after it, and nothing is lost or done twice.

Exports never arrive here, so a new actor is rebuilt from everything that was ever absorbed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
import ray
from engine_contract import LAYERS, digest, telling, vector
from ray.exceptions import RayActorError

from fedmerge.common.base import Base
from fedmerge.common.taskvector import LayerUpdate, TaskVector
from fedmerge.deploy.streams.example import build_model
from fedmerge.server.engine.engine import Act, Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.engine.ray_engine import RayEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.model import GlobalModel

pytestmark = pytest.mark.ray

Hook = Callable[[], None]

ACTS: Sequence[tuple[int, Act]] = ((0, Act.ABSORB), (1, Act.ABSORB), (2, Act.ADJUST), (3, Act.ABSORB))


@pytest.fixture(autouse=True)
def no_exports(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RayEngine, "_collect_export", lambda self, place: None)


def kill(engine: RayEngine, shard: int) -> None:
    with suppress(RayActorError, ProcessLookupError):
        os.kill(int(ray.get(engine._places[shard].actor.whereabouts.remote())["pid"]), signal.SIGKILL)


def do(engine: Engine, seed: int, act: Act, at_third_read: Hook = lambda: None) -> None:
    reads = iter(range(100))
    update = telling(vector(seed), seed)

    def read(name: str) -> LayerUpdate:
        if next(reads) == 2:
            at_third_read()
        return update.read(name)

    engine.absorb(replace(update, read=read), act=act, relative=act is Act.ABSORB)
    engine.commit()


@pytest.mark.parametrize(("name", "during"), [("fot", 1), ("fot", 2), ("perturb_and_merge", 3)])
def test_an_actor_that_dies_during_an_act_changes_no_bit(
    ray_engine: Callable[..., Any], name: str, during: int
) -> None:
    engine = ray_engine(make_rule(name), LAYERS, actors=2)
    with LocalEngine(make_rule(name), LAYERS, workers=1) as unbroken:
        for place, (seed, act) in enumerate(ACTS):
            do(unbroken, seed, act)
            do(engine, seed, act, (lambda: kill(engine, 0)) if place == during else (lambda: None))
        assert engine.totals == unbroken.totals
        assert digest(engine) == digest(unbroken)


@pytest.mark.parametrize("name", ["fot_gram", "holistic"])
def test_an_actor_that_dies_afterwards_is_rebuilt_with_all_of_it(
    ray_engine: Callable[..., Any], name: str
) -> None:
    engine = ray_engine(make_rule(name), LAYERS, actors=2)
    with LocalEngine(make_rule(name), LAYERS, workers=1) as unbroken:
        for seed, act in ACTS:
            for each in (engine, unbroken):
                do(each, seed, act)
        kill(engine, 1)
        assert digest(engine) == digest(unbroken)


def test_a_step_merged_as_a_vector_from_the_base_is_replayed_as_it_was(
    ray_engine: Callable[..., Any],
) -> None:
    base = Base.from_model(build_model())
    steps = [
        TaskVector.of({name: 0.1 * seed + layer for name, layer in build_model().state_dict().items()})
        for seed in range(3)
    ]
    engine = ray_engine(make_rule("average"), base.layers.values(), actors=2)
    with LocalEngine(make_rule("average"), base.layers.values(), workers=1) as unbroken:
        for each in (engine, unbroken):
            for step in steps:
                GlobalModel(base, each).merge(step, step=True)
        kill(engine, 0)
        assert digest(engine) == digest(unbroken)
