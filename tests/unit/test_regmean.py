"""RegMean: the same for task vectors as for weights, worked by hand, and what is measured of nothing."""

from __future__ import annotations

import pytest
import torch
from rule_contract import SEED, Arrival, Fold, RuleContract, gaussian
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.regmean import RIDGE, RegMean
from fedmerge.server.merge.rule import Context, Totals

LAYER = LayerSpec("weight", (3, 5), torch.float32, LayerKind.MATRIX)


def damped(gram: Tensor, off_diagonal: float) -> Tensor:
    return off_diagonal * gram + (1 - off_diagonal) * torch.diag(gram.diagonal())


def merged(rule: RegMean, layer: LayerSpec, pairs: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Of task vectors with a factor of their inputs' Gram each."""
    state = rule.init(layer)
    for vector, factor in pairs:
        context = Context(statistics={} if factor is None else {"input_gram": factor})
        state = rule.absorb(state, None, Dense(vector), context)
    return rule.read(state, Totals(merges=len(pairs)))


def measured(tasks: int, rows: int = 9) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    return [
        (torch.randn(3, 5, generator=generator), torch.randn(rows, 5, generator=generator))
        for _ in range(tasks)
    ]


class TestRegMean(RuleContract):
    rules = (RegMean(), RegMean(off_diagonal=1.0), RegMean(off_diagonal=0.0))

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR:
            return sum(vectors) / len(vectors)
        factors = [context.statistics["input_gram"].double() for context in contexts]
        grams = [damped(factor.T @ factor, rule.off_diagonal) for factor in factors]
        weighted, weights = sum(d @ g for d, g in zip(vectors, grams, strict=True)), sum(grams)
        weights = weights + RIDGE * weights.diagonal().mean() * torch.eye(len(weights), dtype=torch.float64)
        return torch.linalg.solve(weights, weighted.T).T


def test_merging_task_vectors_is_merging_weights() -> None:
    pairs = measured(4)
    base = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grams = [damped(factor.T @ factor, 0.95).double() for _, factor in pairs]
    weights = sum((base + d) @ g for (d, _), g in zip(pairs, grams, strict=True)) @ torch.linalg.inv(
        sum(grams)
    )
    torch.testing.assert_close(base + merged(RegMean(), LAYER, pairs), weights, rtol=1e-5, atol=1e-5)


def test_inputs_of_two_tasks_in_different_directions_keep_both() -> None:
    """Each task's weights survive on the inputs that it has seen."""
    layer = LayerSpec("weight", (1, 2), torch.float32, LayerKind.MATRIX)
    one, other = torch.tensor([[2.0, 7.0]]), torch.tensor([[8.0, 3.0]])
    found = merged(RegMean(), layer, [(one, torch.tensor([[1.0, 0.0]])), (other, torch.tensor([[0.0, 5.0]]))])
    torch.testing.assert_close(found, torch.tensor([[2.0, 3.0]]), rtol=1e-4, atol=0)


def test_inputs_in_one_direction_are_weighed_by_their_squares() -> None:
    layer = LayerSpec("weight", (1, 1), torch.float32, LayerKind.MATRIX)
    pairs = [(torch.tensor([[1.0]]), torch.tensor([[1.0]])), (torch.tensor([[6.0]]), torch.tensor([[2.0]]))]
    torch.testing.assert_close(merged(RegMean(), layer, pairs), torch.tensor([[5.0]]), rtol=1e-5, atol=0)


def test_input_that_is_always_zero_leaves_the_base() -> None:
    pairs = measured(3)
    for _, factor in pairs:
        factor[:, 2] = 0
    found = merged(RegMean(), LAYER, pairs)
    assert not found[:, 2].any()
    assert found[:, 0].all()


def test_inputs_that_are_all_zero_leave_the_base() -> None:
    found = merged(RegMean(), LAYER, [(torch.ones(3, 5), torch.zeros(1, 5))] * 2)
    assert not found.any()


def test_layer_without_measured_inputs_is_averaged() -> None:
    pairs = [(vector, None) for vector, _ in measured(3)]
    mean = sum(vector for vector, _ in pairs) / 3
    torch.testing.assert_close(merged(RegMean(), LAYER, pairs), mean, rtol=1e-5, atol=1e-6)


def test_gram_of_few_inputs_still_merges_to_finite_values() -> None:
    """One sample each, five inputs, three tasks: the published inverse exists by the factor alone."""
    found = merged(RegMean(), LAYER, measured(3, rows=1))
    assert bool(torch.isfinite(found).all())
    assert float(found.abs().max()) < 10


def test_one_task_is_merged_as_it_is() -> None:
    (vector, factor), *_ = measured(1)
    torch.testing.assert_close(merged(RegMean(), LAYER, [(vector, factor)]), vector, rtol=1e-4, atol=1e-4)


def test_statistics_it_needs_are_input_grams() -> None:
    arrival = gaussian(SEED, [LAYER])
    assert isinstance(arrival, Arrival)
    assert set(arrival.context(RegMean(), LAYER, 0).statistics) == {"input_gram"}
    assert Fold(RegMean(), [LAYER]).merge(arrival).read()["weight"].any()


@pytest.mark.parametrize("off_diagonal", [-0.1, 1.1, float("nan")])
def test_factor_outside_its_range_is_refused(off_diagonal: float) -> None:
    with pytest.raises(ValueError, match="off_diagonal"):
        RegMean(off_diagonal=off_diagonal)
