"""DARE: what is dropped, and that it is the same whenever the same update comes."""

from __future__ import annotations

import pytest
import torch
from rule_contract import LAYERS, Fold, RuleContract, as_dense, factored, gaussian, relative_difference

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.dare import Dare
from fedmerge.server.merge.rule import Context, Totals
from fedmerge.server.merge.task_arithmetic import TaskArithmetic

SEED = 71
LAYER = LayerSpec("weight", (400, 500), torch.float32, LayerKind.MATRIX)


def thinned(rule: Dare, update, seed: int) -> torch.Tensor:
    return rule.absorb(rule.init(LAYER), None, update, Context(seed=seed)).sum_MN


class TestDare(RuleContract):
    rules = (Dare(), Dare(drop=0.9), Dare(drop=0.0, factor=1.0))

    def layer_reference(self, rule, layer, vectors, contexts):
        drawn = [
            torch.rand(layer.matrix_shape, generator=torch.Generator().manual_seed(context.seed))
            for context in contexts
        ]
        kept = [v * (u >= rule.drop) / (1 - rule.drop) for v, u in zip(vectors, drawn, strict=True)]
        return rule.factor * sum(kept)


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_share_p_is_dropped_and_the_rest_rescaled(drop: float) -> None:
    found = thinned(Dare(drop=drop), Dense(torch.ones(LAYER.shape)), SEED)
    kept = found != 0
    assert float(kept.double().mean()) == pytest.approx(1 - drop, abs=0.005)
    torch.testing.assert_close(found[kept], torch.full_like(found[kept], 1 / (1 - drop)))


def test_expectation_over_seeds_is_the_vector_itself() -> None:
    vector = torch.randn(LAYER.shape, generator=torch.Generator().manual_seed(SEED))
    mean = sum(thinned(Dare(), Dense(vector), seed) for seed in range(100)) / 100
    assert float((mean - vector).norm() / vector.norm()) == pytest.approx(0.1, rel=0.05)


def test_seeds_draw_independent_entries() -> None:
    one, other = (thinned(Dare(), Dense(torch.ones(LAYER.shape)), seed) != 0 for seed in (SEED, SEED + 1))
    assert float((one & other).double().mean()) == pytest.approx(0.25, abs=0.005)


def test_factors_have_the_same_entries_dropped_to_the_bit() -> None:
    arrival = factored(SEED, rank=3)
    low, dense = (Fold(Dare(), LAYERS).merge(a).read() for a in (arrival, as_dense(arrival)))
    assert all(torch.equal(low[name], dense[name]) for name in low)


def test_torch_s_own_generator_is_neither_used_nor_moved() -> None:
    before = torch.get_rng_state()
    thinned(Dare(), Dense(torch.ones(LAYER.shape)), SEED)
    assert torch.equal(torch.get_rng_state(), before)


def test_worked_by_hand() -> None:
    """At p = 0.5 the kept entries double: 4 becomes 8, times the factor 0.25 gives 2."""
    layer = LayerSpec("bias", (8,), torch.float32, LayerKind.VECTOR)
    rule = Dare(drop=0.5, factor=0.25)
    state = rule.absorb(rule.init(layer), None, Dense(torch.full((8,), 4.0)), Context(seed=SEED))
    assert set(rule.read(state, Totals(merges=1)).flatten().tolist()) == {0.0, 2.0}


def test_dropping_nothing_is_task_arithmetic() -> None:
    arrivals = [gaussian(SEED + task) for task in range(3)]
    merged = Fold(Dare(drop=0.0), LAYERS).merge(*arrivals).read()
    assert relative_difference(merged, Fold(TaskArithmetic(), LAYERS).merge(*arrivals).read()) == 0


def test_dropping_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="less than 1"):
        Dare(drop=1.0)
