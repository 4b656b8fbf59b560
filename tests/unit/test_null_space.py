"""Null-space projection: worked by hand, what it protects, and what is left to say."""

from __future__ import annotations

import pytest
import torch
from rule_contract import Fold, RuleContract, as_dense, factored, gaussian, relative_difference
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.null_space import NullSpace

SEED = 61
SHAPES = [(12, 30), (30, 12), (20, 20)]


def matrix(rows: int, columns: int) -> LayerSpec:
    return LayerSpec("weight", (rows, columns), torch.float32, LayerKind.MATRIX)


def leading(matrix_MN: Tensor, count: int) -> Tensor:
    """Right singular directions as columns, (N, K), by a plain SVD; none that float32 rounding made."""
    _, values, right = torch.linalg.svd(matrix_MN.double(), full_matrices=False)
    return right[values > 1e-5 * values.max().clamp_min(1e-30)][:count].T


class TestNullSpace(RuleContract):
    rules = (NullSpace(), NullSpace(rank=3), NullSpace(rank=1))

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR:
            return sum(vectors) / len(vectors)
        merged = torch.zeros_like(vectors[0])
        for vector in vectors:
            protected = leading(merged, rule.rank)
            merged = merged + vector @ (torch.eye(vector.shape[1]) - protected @ protected.T)
        return merged


class TestWorkedByHand:
    """First vector diag(3, 1), whose input directions are the two axes, the stronger one first.

    Second vector [[1, 2], [3, 4]]. With one direction protected its first column is dropped; with two,
    all of it.
    """

    @pytest.mark.parametrize(
        ("rank", "merged"),
        [(1, [[3.0, 2.0], [0.0, 5.0]]), (2, [[3.0, 0.0], [0.0, 1.0]])],
    )
    def test_protected_columns_stay_as_they_were(self, rank: int, merged: list[list[float]]) -> None:
        first, second = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        fold = Fold(NullSpace(rank=rank), [matrix(2, 2)])
        fold.merge({"weight": Dense(first)}, {"weight": Dense(second)})
        torch.testing.assert_close(fold.read()["weight"], torch.tensor(merged))


@pytest.mark.parametrize("shape", SHAPES)
class TestLaws:
    def test_first_task_is_kept_whole_bit_for_bit(self, shape: tuple[int, int]) -> None:
        vector = gaussian(SEED, [matrix(*shape)])
        merged = Fold(NullSpace(), [matrix(*shape)]).merge(vector).read()["weight"]
        assert torch.equal(merged, vector["weight"].values)

    def test_response_along_protected_directions_is_unchanged(self, shape: tuple[int, int]) -> None:
        fold = Fold(NullSpace(rank=5), [matrix(*shape)]).merge(gaussian(SEED, [matrix(*shape)]))
        before = fold.read()["weight"].double()
        after = fold.merge(gaussian(SEED + 1, [matrix(*shape)])).read()["weight"].double()
        protected = leading(before, 5)
        torch.testing.assert_close(after @ protected, before @ protected, rtol=0, atol=1e-5)

    def test_new_task_acts_in_full_outside_them(self, shape: tuple[int, int]) -> None:
        vector = gaussian(SEED + 1, [matrix(*shape)])
        fold = Fold(NullSpace(rank=5), [matrix(*shape)]).merge(gaussian(SEED, [matrix(*shape)]))
        before = fold.read()["weight"].double()
        after = fold.merge(vector).read()["weight"].double()
        free = torch.linalg.svd(before).Vh[5:].T
        new = vector["weight"].values.double() @ free
        torch.testing.assert_close(after @ free, before @ free + new, rtol=0, atol=1e-5)


def test_tasks_on_separate_inputs_are_all_kept() -> None:
    """Three tasks that use four columns each: nothing of any of them is removed."""
    vectors = []
    for task in range(3):
        values = torch.zeros(12, 12)
        values[:, 4 * task : 4 * task + 4] = gaussian(SEED + task, [matrix(12, 4)])["weight"].values
        vectors.append({"weight": Dense(values)})
    merged = Fold(NullSpace(), [matrix(12, 12)]).merge(*vectors).read()
    assert relative_difference(merged, {"weight": sum(v["weight"].values for v in vectors)}) < 1e-6


def test_layer_without_free_directions_keeps_the_first_task_alone() -> None:
    vectors = [gaussian(SEED + task, [matrix(20, 8)]) for task in range(3)]
    merged = Fold(NullSpace(rank=8), [matrix(20, 8)]).merge(*vectors).read()
    assert relative_difference(merged, {"weight": vectors[0]["weight"].values}) < 1e-6


def test_low_rank_tasks_are_protected_within_their_own_rank_only() -> None:
    layers = [matrix(16, 24)]
    first, second = factored(SEED, 2, layers), factored(SEED + 1, 2, layers)
    merged = Fold(NullSpace(), layers).merge(first, second).read()["weight"].double()
    one, two = (as_dense(v)["weight"].values.double() for v in (first, second))
    protected = torch.linalg.svd(one).Vh[:2].T
    torch.testing.assert_close(merged, one + two - two @ protected @ protected.T, rtol=0, atol=1e-5)
