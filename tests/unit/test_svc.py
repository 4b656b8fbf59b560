"""Calibrated task arithmetic: where pooling changes nothing, its bounds, and worked by hand."""

from __future__ import annotations

import pytest
import torch
from rule_contract import SEED, Fold, RuleContract, gaussian, relative_difference
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.svc import Svc

LAYER = LayerSpec("weight", (6, 8), torch.float32, LayerKind.MATRIX)


def merged(rule: Svc, *vectors: Tensor) -> Tensor:
    layer = LayerSpec("weight", tuple(vectors[0].shape), torch.float32, LayerKind.MATRIX)
    return Fold(rule, [layer]).merge(*[{"weight": Dense(v)} for v in vectors]).read()["weight"]


def published(vectors: list[Tensor], alpha: float) -> Tensor:
    """The paper's calibration of the sum, which sees every task vector again."""
    wide = [v.double() for v in vectors]
    left, values, right = torch.linalg.svd(sum(wide), full_matrices=False)
    responses = [left.T @ v for v in wide]
    whole = sum(responses)
    shares = [(whole * a).sum(1) / a.square().sum(1) for a in responses]
    return left * (values * len(wide) / sum(p.clamp_min(alpha) for p in shares)) @ right


class TestSvc(RuleContract):
    """The reference projects every task vector onto the directions of the sum."""

    rules = (Svc(), Svc(alpha=0.1))

    def layer_reference(self, rule, layer, vectors, contexts):
        total = sum(vectors)
        if layer.kind is LayerKind.VECTOR:
            return total / len(vectors)
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        known = values > 1e-5 * values[0]
        left, values, right = left[:, known], values[known], right[known]
        whole = left.T @ total
        responses = [left.T @ vector for vector in vectors]
        overlap = sum((whole * a).sum(1) for a in responses)
        projection = overlap / sum(a.square().sum(1) for a in responses)
        return left * (values / projection.clamp_min(rule.alpha)) @ right


def test_worked_by_hand() -> None:
    """Shared direction e1 with responses 1 and 3: p = 16 / 10, 4 becomes 2.5; e2 is one task's and stays."""
    found = merged(Svc(), torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    torch.testing.assert_close(found, torch.tensor([[2.5, 0.0], [0.0, 2.0]]))


def test_the_same_vector_many_times_counts_once() -> None:
    vector = gaussian(SEED, [LAYER])["weight"].values
    torch.testing.assert_close(merged(Svc(), *[vector] * 5), vector, rtol=1e-4, atol=1e-5)


def test_vectors_with_different_outputs_are_summed() -> None:
    one, other = torch.zeros(6, 8), torch.zeros(6, 8)
    one[:3], other[3:] = torch.randn(3, 8), torch.randn(3, 8)
    one[:, 4:], other[:, :4] = 0, 0
    torch.testing.assert_close(merged(Svc(alpha=0.1), one, other), one + other, rtol=1e-5, atol=1e-5)


def test_tasks_that_respond_alike_are_calibrated_as_published() -> None:
    """Task vectors U diag(s) Q_t, Q_t of one overlap with all others: equal sizes, equal projections."""
    generator = torch.Generator().manual_seed(SEED)
    left = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(20, 16, generator=generator)).Q.T
    shared, own = right[:4], (right[4:8], right[8:12], right[12:16])
    sizes = torch.diag(torch.tensor([8.0, 4.0, 2.0, 1.0]))
    vectors = [left @ sizes @ (0.6 * shared + 0.8 * mine) for mine in own]
    found = merged(Svc(alpha=0.1), *vectors)
    assert relative_difference({"": found}, {"": published(vectors, 0.1)}) < 1e-5
    assert relative_difference({"": found}, {"": sum(vectors)}) > 0.1


def test_no_singular_value_grows_at_alpha_one() -> None:
    vectors = [gaussian(SEED + task, [LAYER])["weight"].values for task in range(4)]
    before = torch.linalg.svdvals(sum(vectors))
    assert bool((torch.linalg.svdvals(merged(Svc(), *vectors)) <= before * (1 + 1e-5)).all())


def test_directions_in_which_tasks_cancel_grow_at_most_by_one_over_alpha() -> None:
    vector = gaussian(SEED, [LAYER])["weight"].values
    found = merged(Svc(alpha=0.25), vector, -0.99 * vector)
    torch.testing.assert_close(found, 0.01 * vector / 0.25, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.1, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        Svc(alpha=alpha)
