"""ISO-C: a flat spectrum in the directions of the sum, and in no other."""

from __future__ import annotations

import pytest
import torch
from rule_contract import SEED, Fold, RuleContract, factored, gaussian, relative_difference

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.iso_c import IsoC

LAYER = LayerSpec("weight", (9, 14), torch.float32, LayerKind.MATRIX)


class TestIsoC(RuleContract):
    """The reference takes the SVD of the sum in float64, and its rank where values fall below 1e-5."""

    rules = (IsoC(), IsoC(factor=1.5))

    def layer_reference(self, rule, layer, vectors, contexts):
        total = sum(vectors)
        if layer.kind is LayerKind.VECTOR:
            return rule.factor * total / len(vectors)
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        known = values > 1e-5 * values[0]
        if not known.any():
            return torch.zeros_like(total)
        return rule.factor * values[known].mean() * left[:, known] @ right[known]


def test_worked_by_hand() -> None:
    """The sum is diag(6, -2): mean 4, and the sign of each direction stays."""
    layer = LayerSpec("weight", (2, 2), torch.float32, LayerKind.MATRIX)
    one, other = torch.tensor([[4.0, 1.0], [0.0, -2.0]]), torch.tensor([[2.0, -1.0], [0.0, 0.0]])
    found = Fold(IsoC(), [layer]).merge({"weight": Dense(one)}, {"weight": Dense(other)}).read()["weight"]
    torch.testing.assert_close(found, torch.tensor([[4.0, 0.0], [0.0, -4.0]]))


def test_all_singular_values_become_their_mean() -> None:
    vectors = [gaussian(SEED + task, [LAYER]) for task in range(5)]
    values = torch.linalg.svdvals(sum(v["weight"].values.double() for v in vectors))
    found = Fold(IsoC(), [LAYER]).merge(*vectors).read()["weight"]
    torch.testing.assert_close(torch.linalg.svdvals(found), values.mean().float().expand(9))


def test_low_rank_vectors_stay_in_their_span() -> None:
    vectors = [factored(SEED + task, 2, [LAYER]) for task in range(2)]
    total = sum(v["weight"].to_dense().double() for v in vectors)
    found = Fold(IsoC(), [LAYER]).merge(*vectors).read()["weight"].double()
    values = torch.linalg.svdvals(found)
    torch.testing.assert_close(values[:4], torch.linalg.svdvals(total)[:4].mean().expand(4))
    assert float(values[4]) < 1e-6 * float(values[0])
    onto = torch.linalg.svd(total).Vh[:4]
    assert relative_difference({"": found @ onto.T @ onto}, {"": found}) < 1e-6


def test_vectors_that_cancel_leave_nothing() -> None:
    vector = gaussian(SEED, [LAYER])
    found = Fold(IsoC(), [LAYER]).merge(vector, {"weight": vector["weight"].times(-1.0)}).read()["weight"]
    assert not found.any()


@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_large_vector_taken_out_leaves_no_directions_behind(size: float) -> None:
    one, other = (factored(SEED + task, 2, [LAYER]) for task in range(2))
    large = {"weight": gaussian(SEED + 2, [LAYER])["weight"].times(size)}
    removed = Fold(IsoC(), [LAYER]).merge(one, large, other).remove(large).read()
    assert relative_difference(removed, Fold(IsoC(), [LAYER]).merge(one, other).read()) < 1e-5


def test_size_of_a_task_vector_scales_the_result_alone() -> None:
    vector = gaussian(SEED, [LAYER])
    once = Fold(IsoC(), [LAYER]).merge(vector).read()["weight"]
    large = Fold(IsoC(), [LAYER]).merge({"weight": vector["weight"].times(1e4)}).read()["weight"]
    assert relative_difference({"": large}, {"": once * 1e4}) < 1e-6


@pytest.mark.parametrize("factor", [-0.1, 3.1, float("nan")])
def test_factor_outside_its_range_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        IsoC(factor=factor)
