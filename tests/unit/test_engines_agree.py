"""Promise P4: the same bits from every engine with any number of workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_contract import RULES, Reference, assert_same, digest, vector

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import TaskVector
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.rule import Rule, Totals

SHAPES = {
    "block.0.attention.weight": (96, 96),
    "block.0.up.weight": (160, 48),
    "block.0.down.weight": (48, 160),
    "block.0.norm.bias": (96,),
    "block.1.conv.weight": (16, 8, 3, 3),
    "block.1.square.weight": (64, 64),
    "embeddings.weight": (30, 8),
}
LAYERS = tuple(
    LayerSpec(
        name,
        shape,
        torch.float32,
        LayerKind.VECTOR if name[-4:] == "bias" or "emb" in name else LayerKind.MATRIX,
    )
    for name, shape in SHAPES.items()
)
NAMES = tuple(SHAPES)
STREAM = (
    vector(0, LAYERS, rank=2),
    vector(1, LAYERS, rank=3, without=NAMES[:2]),
    vector(2, LAYERS),
    vector(3, LAYERS, rank=4, without=NAMES[4:]),
    vector(4, LAYERS, without=NAMES[1:3]),
)


@pytest.fixture(params=RULES[::2], ids=lambda p: p[0])
def rule(request: pytest.FixtureRequest) -> Rule:
    return make_rule(*request.param)


def run(engine: Engine, stream: tuple[TaskVector, ...] = STREAM) -> list[tuple[Totals, str]]:
    """Totals and hash after every merge, factorising in between as a server does."""
    after = []
    with engine:
        for update in stream:
            after.append((engine.merge(update), digest(engine)))
            engine.prepare()
    return after


@pytest.fixture
def one_worker(rule: Rule) -> list[tuple[Totals, str]]:
    return run(LocalEngine(rule, LAYERS, workers=1))


def test_one_local_worker_gives_the_rules_own_bits(rule: Rule) -> None:
    with LocalEngine(rule, LAYERS, workers=1) as engine:
        for update in STREAM:
            engine.merge(update)
        assert_same(engine, Reference(rule, LAYERS).merge(*STREAM))


def test_every_merge_of_the_stream_changes_the_hash(one_worker: list[tuple[Totals, str]]) -> None:
    """A hash that cannot differ would make this file pass for nothing."""
    assert len({found for _, found in one_worker}) == len(STREAM)


@pytest.mark.parametrize("workers", [2, 3, 8])
def test_local_threads_give_the_same_bits(
    rule: Rule, one_worker: list[tuple[Totals, str]], workers: int
) -> None:
    assert run(LocalEngine(rule, LAYERS, workers=workers)) == one_worker


@pytest.mark.ray
@pytest.mark.parametrize("actors", [1, 2, 5])
def test_ray_actors_give_the_same_bits(
    rule: Rule, one_worker: list[tuple[Totals, str]], actors: int, ray_engine: Callable[..., Any]
) -> None:
    engine = ray_engine(rule, LAYERS, actors=actors)
    assert engine.workers == actors
    assert run(engine) == one_worker


def test_order_in_which_layers_are_listed_does_not_matter(
    one_worker: list[tuple[Totals, str]], rule: Rule
) -> None:
    with LocalEngine(rule, LAYERS[::-1], workers=2) as engine:
        for update in STREAM:
            engine.merge(update)
        assert engine.totals == one_worker[-1][0]
