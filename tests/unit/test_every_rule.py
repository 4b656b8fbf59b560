"""Every rule inside engines: the same bits everywhere, saved and read back, vectors taken out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from engine_contract import LAYERS, NAMES, digest, strided, vector
from rule_contract import relative_difference, statistics
from torch import Tensor

from fedmerge.common.errors import StatisticsMissing
from fedmerge.common.statistics import OF_INPUTS
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.server import snapshot
from fedmerge.server.engine.engine import Act, Engine, seed_of
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.merge.rule import Rule

BASE = "cd" * 32

STEPS: tuple[dict[str, Any], ...] = (
    {},
    {"rank": 2},
    {"without": NAMES[1:3]},
    {"rank": 1, "without": NAMES[4:]},
    {},
)
"""How the vectors of the stream differ: dense, in factors, without some layers."""


def update(seed: int, rule: Rule, **how: Any) -> TaskVector:
    """A random vector of task ``seed`` with the statistics that a rule needs, and some it does not."""
    layers = {layer.name: layer for layer in LAYERS}

    def measured(name: str) -> Mapping[str, Tensor]:
        found = statistics(rule.needs, layers[name], crc32(name.encode()) + seed)
        return {**found, "of_no_use": torch.zeros(1)}

    manifest = Manifest(BASE, 0, f"task {seed}", "site")
    return replace(vector(seed, LAYERS, **how), statistics=measured, manifest=manifest)


def stream(rule: Rule) -> list[TaskVector]:
    return [update(seed, rule, **how) for seed, how in enumerate(STEPS)]


def run(engine: Engine, updates: list[TaskVector]) -> Iterator[str]:
    """Hashes of the merged vector after every update."""
    for each in updates:
        engine.merge(each)
        yield digest(engine)
        engine.prepare()


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Rule:
    return make_rule(request.param)


@pytest.fixture
def wanted(rule: Rule) -> list[str]:
    with LocalEngine(rule, LAYERS, workers=1) as engine:
        return list(run(engine, stream(rule)))


def test_every_merge_changes_the_model(wanted: list[str]) -> None:
    assert len(set(wanted)) == len(STEPS)


def test_threads_give_the_same_bits(rule: Rule, wanted: list[str]) -> None:
    with LocalEngine(rule, LAYERS, workers=3) as engine:
        relaid = [
            replace(strided(each), manifest=each.manifest, statistics=each.statistics)
            for each in stream(rule)
        ]
        assert list(run(engine, relaid)) == wanted


@pytest.mark.ray
def test_ray_actors_give_the_same_bits(rule: Rule, wanted: list[str], ray_engine: Callable[..., Any]) -> None:
    assert list(run(ray_engine(rule, LAYERS, actors=2), stream(rule))) == wanted


def test_saved_and_read_back_it_goes_on_with_the_same_bits(
    rule: Rule, wanted: list[str], tmp_path: Path
) -> None:
    updates = stream(rule)
    with LocalEngine(rule, LAYERS, workers=1) as engine, LocalEngine(rule, LAYERS, workers=1) as again:
        for each in updates[:3]:
            engine.merge(each)
        with (tmp_path / "snapshot").open("wb") as file:
            snapshot.write(engine, BASE, file)
        snapshot.restore(again, BASE, tmp_path / "snapshot")
        assert [digest(again), *run(again, updates[3:])] == wanted[2:]


def test_a_failing_update_changes_nothing(rule: Rule, wanted: list[str]) -> None:
    def unreadable(name: str) -> Any:
        if name == NAMES[-1]:
            raise OSError("gone")
        return updates[2].read(name)

    updates = stream(rule)
    with LocalEngine(rule, LAYERS, workers=2) as engine:
        for each in updates[:2]:
            engine.merge(each)
        with pytest.raises(OSError, match="gone"):
            engine.merge(replace(updates[2], read=unreadable))
        assert digest(engine) == wanted[1]
        assert list(run(engine, updates[2:])) == wanted[2:]


def test_a_vector_taken_out_through_the_engine_was_never_there(rule: Rule) -> None:
    a, b, c = (update(seed, rule) for seed in range(3))
    with LocalEngine(rule, LAYERS) as engine, LocalEngine(rule, LAYERS) as without:
        for each in (a, b, c):
            engine.merge(each)
        for each in (a, c):
            without.merge(each)
        if not rule.additive:
            with pytest.raises(NotImplementedError):
                engine.absorb(b, act=Act.REMOVE)
            return
        engine.absorb(b, act=Act.REMOVE)
        engine.commit()
        assert engine.totals.merges == 2
        found, wanted = ({n: u.to_dense() for n, u in e.merged().items()} for e in (engine, without))
        assert relative_difference(found, wanted) < 1e-5


def test_an_engine_keeps_no_more_after_many_tasks(rule: Rule) -> None:
    with LocalEngine(rule, LAYERS) as engine:
        for seed in range(4):
            engine.merge(update(seed, rule))
        after_4 = engine.state_bytes()
        for seed in range(4, 12):
            engine.merge(update(seed, rule))
        assert engine.state_bytes() == after_4


def test_what_was_read_may_be_changed_by_the_reader(rule: Rule, wanted: list[str]) -> None:
    with LocalEngine(rule, LAYERS, workers=1) as engine:
        engine.merge(stream(rule)[0])
        for name in NAMES:
            engine.read_layer(name).fill_(7.0)
        assert digest(engine) == wanted[0]


def test_what_is_read_lies_in_memory_as_if_it_had_travelled(rule: Rule) -> None:
    """Norms depend on it in the last bits."""
    with LocalEngine(rule, LAYERS, workers=1) as engine:
        for each in stream(rule)[:2]:
            engine.merge(each)
        assert all(engine.read_layer(name).is_contiguous() for name in NAMES)


def test_order_of_an_updates_layers_changes_no_bit(rule: Rule, wanted: list[str]) -> None:
    with LocalEngine(rule, LAYERS, workers=1) as engine:
        turned = [replace(each, names=each.names[::-1]) for each in stream(rule)]
        assert list(run(engine, turned)) == wanted


def test_nothing_read_of_a_vector_taken_out_is_kept(rule: Rule) -> None:
    """The totals of the first vector come back with its opposite; its read-out must not."""
    if not rule.additive:
        return
    first = update(0, rule)
    opposite = replace(first, read=lambda name: first.read(name).times(-1.0))
    with LocalEngine(rule, LAYERS) as engine, LocalEngine(rule, LAYERS) as wanted:
        engine.merge(first)
        before = {name: engine.read_layer(name) for name in NAMES}
        engine.absorb(first, act=Act.REMOVE)
        engine.commit()
        engine.merge(opposite)
        wanted.merge(opposite)
        assert engine.totals == wanted.totals
        found, other = ({name: each.read_layer(name) for name in NAMES} for each in (engine, wanted))
        assert relative_difference(found, other) < 1e-4 < relative_difference(before, other)


def test_update_without_a_layer_gives_no_less_to_every_rule(rule: Rule) -> None:
    nothing = replace(update(0, rule), names=())
    with LocalEngine(rule, LAYERS) as engine:
        assert engine.merge(nothing).merges == 1
        engine.merge(update(1, rule))
        assert engine.merge(nothing).merges == 3
        assert all(bool(engine.read_layer(name).isfinite().all()) for name in NAMES)


def test_lacking_statistic_is_named_and_nothing_is_merged(rule: Rule) -> None:
    missing = sorted(rule.needs - OF_INPUTS)
    bare = replace(update(1, rule), statistics=lambda name: {}, label="site-7")
    with LocalEngine(rule, LAYERS, workers=2) as engine:
        engine.merge(update(0, rule))
        before = digest(engine)
        if not missing:
            assert engine.merge(bare).merges == 2
            return
        with pytest.raises(StatisticsMissing, match=rf"site-7, layer .*: the merge rule needs {missing[0]}"):
            engine.merge(bare)
        assert (engine.totals.merges, digest(engine)) == (1, before)


def test_draws_depend_on_whose_update_it_is_and_on_the_layer_alone() -> None:
    one = update(1, make_rule("dare"))
    other = replace(one, id="another update")
    assert seed_of(one, "a") == seed_of(replace(one, label="elsewhere"), "a")
    assert len({seed_of(one, "a"), seed_of(one, "b"), seed_of(other, "a")}) == 3
    assert all(0 <= seed_of(one, str(n)) < 2**63 for n in range(100))
