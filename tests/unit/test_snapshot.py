"""Is an engine restored from a file the engine that wrote it, bit for bit?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from engine_contract import LAYERS, NAMES, RULES, STEPPING, digest, telling, vector

from fedmerge.common.errors import MismatchError, StoreDamaged
from fedmerge.common.header import read_header
from fedmerge.common.writing import write_checkpoint
from fedmerge.server import snapshot
from fedmerge.server.engine.engine import Act
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.rule import Rule, tensors_of

BASE = "ab" * 32


@pytest.fixture(params=RULES, ids=lambda p: "-".join([p[0], *(f"{k}={v}" for k, v in p[1].items())]))
def rule(request: pytest.FixtureRequest) -> Rule:
    return make_rule(*request.param)


def engine_of(rule: Rule) -> LocalEngine:
    return LocalEngine(rule, LAYERS, workers=1)


def written(engine: LocalEngine, path: Path, base: str = BASE) -> Path:
    with path.open("wb") as file:
        snapshot.write(engine, base, file)
    return path


@pytest.mark.parametrize("rank", [None, 1])
def test_it_goes_on_with_the_same_bits(rule: Rule, rank: int | None, tmp_path: Path) -> None:
    with engine_of(rule) as engine, engine_of(rule) as again:
        for seed in (0, 1):
            engine.merge(vector(seed, rank=rank, without=["norm.bias"]))
        again.merge(vector(9))
        snapshot.restore(again, BASE, written(engine, tmp_path / "s"))
        assert (again.totals, again.touched) == (engine.totals, engine.touched)
        for name in engine.touched:
            assert type(again.state(name)) is type(engine.state(name))
            mine, theirs = tensors_of(engine.state(name)), tensors_of(again.state(name))
            assert all(torch.equal(mine[field], theirs[field]) for field in mine)
        for each in (engine, again):
            each.merge(vector(2, rank=rank))
        assert digest(again) == digest(engine)


@pytest.mark.parametrize("name", STEPPING)
def test_rules_that_take_steps_go_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    made = make_rule(name, {"budget": 0.4} if name.startswith("fot") else {})
    with engine_of(made) as engine, engine_of(made) as again:
        for seed in (0, 1, 2):
            engine.absorb(telling(vector(seed), seed), relative=True)
            engine.commit()
        snapshot.restore(again, BASE, written(engine, tmp_path / "s"))
        for each in (engine, again):
            each.absorb(vector(3, rank=1), act=Act.ADJUST)
            each.commit()
            each.absorb(telling(vector(4), 4), relative=True)
            each.commit()
        assert again.totals == engine.totals
        assert digest(again) == digest(engine)
        assert written(again, tmp_path / "2").read_bytes() == written(engine, tmp_path / "1").read_bytes()


def test_the_same_state_gives_the_same_bytes(rule: Rule, tmp_path: Path) -> None:
    with engine_of(rule) as engine, engine_of(rule) as again:
        engine.merge(vector(0))
        one = written(engine, tmp_path / "one")
        snapshot.restore(again, BASE, one)
        assert written(again, tmp_path / "two").read_bytes() == one.read_bytes()


def test_an_engine_that_has_merged_nothing(rule: Rule, tmp_path: Path) -> None:
    with engine_of(rule) as engine, engine_of(rule) as again:
        again.merge(vector(0))
        snapshot.restore(again, BASE, written(engine, tmp_path / "s"))
        assert again.totals.merges == 0
        assert again.merged().names == ()


def test_it_outlives_its_file(rule: Rule, tmp_path: Path) -> None:
    with engine_of(rule) as engine, engine_of(rule) as again:
        engine.merge(vector(0))
        path = written(engine, tmp_path / "s")
        snapshot.restore(again, BASE, path)
        path.write_bytes(bytes(path.stat().st_size))
        assert digest(again) == digest(engine)


@pytest.mark.parametrize("other", ["base", "rule", "option"])
def test_of_another_base_rule_or_option_is_refused(other: str, tmp_path: Path) -> None:
    opcm = make_rule("opcm")
    wanted = {"rule": make_rule("average"), "option": make_rule("opcm", {"alpha": 0.4})}.get(other, opcm)
    with engine_of(opcm) as engine, engine_of(wanted) as again:
        engine.merge(vector(0))
        path = written(engine, tmp_path / "s", base="cd" * 32 if other == "base" else BASE)
        with pytest.raises(MismatchError):
            snapshot.restore(again, BASE, path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("states", "{}x"),
        ("states", json.dumps({"no.such.layer": "FactoredSum"})),
        ("states", json.dumps({NAMES[1]: "NoSuchState"})),
        ("totals", "{}x"),
        ("totals", json.dumps({"no_such_total": 1})),
    ],
)
def test_what_is_not_a_snapshot_is_a_typed_error(key: str, value: str, tmp_path: Path) -> None:
    with engine_of(make_rule("opcm")) as engine:
        metadata = dict(read_header(written(engine, tmp_path / "s")).metadata) | {key: value}
        metadata.pop("format")
        path = tmp_path / "t.safetensors"
        write_checkpoint(path, {}, lambda _: torch.zeros(0), {**metadata, "format": snapshot.FORMAT})
        with pytest.raises(StoreDamaged, match="not a snapshot"):
            snapshot.restore(engine, BASE, path)
