"""NUFILT in closed form: worked by hand, and against the published optimiser."""

from __future__ import annotations

import pytest
import torch
from rule_contract import Fold, RuleContract, gaussian, relative_difference
from test_null_space import SHAPES, leading, matrix
from torch import Tensor

from fedmerge.common.layers import LayerKind
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.nufilt import Nufilt
from fedmerge.server.merge.null_space import NullSpace

SEED = 71
LEAST_RIDGE = 1e-8


def filter_by_normal_equations(rule: Nufilt, merged: Tensor, task: Tensor) -> Tensor:
    """``M + D (P + X)`` with X from the normal equations of the least-squares problem, entry by entry."""
    protected, wanted = leading(merged, rule.protected), leading(task, rule.restored)
    columns = task.shape[1]
    outside = torch.eye(columns) - protected @ protected.T
    known = wanted @ wanted.T + protected @ protected.T
    pull = task.T @ (task @ wanted - (merged + task @ outside) @ wanted) @ wanted.T
    floor = rule.ridge * torch.linalg.matrix_norm(task, 2) ** 2
    system = torch.kron(task.T @ task, known) + floor * torch.eye(columns**2)
    found = torch.linalg.solve(system, pull.reshape(-1)).reshape(columns, columns)
    return merged + task @ (outside + found)


class TestNufilt(RuleContract):
    rules = (Nufilt(), Nufilt(protected=3, restored=2), Nufilt(ridge=1.0))

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR:
            return sum(vectors) / len(vectors)
        merged = torch.zeros_like(vectors[0])
        for vector in vectors:
            merged = filter_by_normal_equations(rule, merged, vector) if vector.any() else merged
        return merged


def objective(merged: Tensor, task: Tensor, after: Tensor, protected: int, restored: int) -> float:
    """What the paper minimises, of the merged matrix after the step."""
    old, new = leading(merged, protected), leading(task, restored)
    return float(((task - after) @ new).square().sum() + ((merged - after) @ old).square().sum())


def by_adam(merged: Tensor, task: Tensor, protected: int, restored: int, steps: int = 50) -> Tensor:
    """The published optimiser: rank 64, A from N(0, 0.02), B zero, Adam at 1e-3."""
    old, new = leading(merged, protected), leading(task, restored)
    columns = task.shape[1]
    outside = torch.eye(columns, dtype=torch.float64) - old @ old.T
    b_NK = torch.zeros(columns, 64, dtype=torch.float64, requires_grad=True)
    a_KN = (0.02 * torch.randn(64, columns, dtype=torch.float64)).requires_grad_()
    adam = torch.optim.Adam([a_KN, b_NK], lr=1e-3)
    for _ in range(steps):
        adam.zero_grad()
        after = merged + task @ (outside + b_NK @ a_KN)
        (((task - after) @ new).square().sum() + ((merged - after) @ old).square().sum()).backward()
        adam.step()
    return (merged + task @ (outside + b_NK @ a_KN)).detach()


class TestWorkedByHand:
    """M = diag(2, 0) and D = [[3, 3], [0, 0]] / sqrt 2, one direction of each.

    So V_p = e_1 and V_t = (1, 1) / sqrt 2. D's response to V_t is (3, 0), M's to V_p (2, 0). Without a ridge
    both can be had: M' e_1 = (2, 0) and M' V_t = (3, 0) give M' = [[2, 3 sqrt 2 - 2], [0, 0]].
    """

    def test_both_responses_are_as_wished(self) -> None:
        task = 3 * torch.tensor([[1.0, 1.0], [0.0, 0.0]]) / 2**0.5
        fold = Fold(Nufilt(protected=1, restored=1, ridge=LEAST_RIDGE), [matrix(2, 2)])
        fold.merge({"weight": Dense(torch.diag(torch.tensor([2.0, 0.0])))}, {"weight": Dense(task)})
        wanted = torch.tensor([[2.0, 3 * 2**0.5 - 2], [0.0, 0.0]])
        torch.testing.assert_close(fold.read()["weight"], wanted, rtol=0, atol=1e-5)


class TestLaws:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_first_task_is_kept_whole_bit_for_bit(self, shape: tuple[int, int]) -> None:
        vector = gaussian(SEED, [matrix(*shape)])
        merged = Fold(Nufilt(), [matrix(*shape)]).merge(vector).read()["weight"]
        assert torch.equal(merged, vector["weight"].values)

    @pytest.mark.parametrize("shape", [(12, 30), (20, 20)])
    def test_without_a_ridge_old_and_new_responses_are_both_met(self, shape: tuple[int, int]) -> None:
        """Where there are free directions, and D reaches every output."""
        first, second = (gaussian(SEED + task, [matrix(*shape)]) for task in range(2))
        rule = Nufilt(protected=5, restored=3, ridge=LEAST_RIDGE)
        merged = Fold(rule, [matrix(*shape)]).merge(first, second).read()["weight"].double()
        old, new = (v["weight"].values.double() for v in (first, second))
        assert objective(old, new, merged, 5, 3) < 1e-6 * objective(old, new, old + new, 5, 3)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_no_nearby_filter_does_better(self, shape: tuple[int, int]) -> None:
        """Even of any rank: the minimiser is global."""
        first, second = (gaussian(SEED + task, [matrix(*shape)]) for task in range(2))
        rule = Nufilt(protected=12, restored=4, ridge=LEAST_RIDGE)
        merged = Fold(rule, [matrix(*shape)]).merge(first, second).read()["weight"].double()
        old, new = (v["weight"].values.double() for v in (first, second))
        best = objective(old, new, merged, 12, 4)
        torch.manual_seed(SEED)
        for size in (1e-2, 1e-1):
            for _ in range(20):
                filtered = merged + size * new @ torch.randn(shape[1], shape[1], dtype=torch.float64)
                assert objective(old, new, filtered, 12, 4) > best

    @pytest.mark.parametrize(("ridge", "most"), [(LEAST_RIDGE, 4), (1e-2, 8)])
    def test_filter_uses_few_directions(self, ridge: float, most: int) -> None:
        """One for each that is restored, two with a ridge: the published bound of 64 for 8 never binds."""
        layers = [matrix(30, 30)]
        first, second = (gaussian(SEED + task, layers) for task in range(2))
        rule = Nufilt(protected=10, restored=4, ridge=ridge)
        filtered = Fold(rule, layers).merge(first, second).read()["weight"]
        projected = Fold(NullSpace(rank=10), layers).merge(first, second).read()["weight"]
        values = torch.linalg.svdvals((filtered - projected).double())
        assert int((values > 1e-3 * values[0]).sum()) == most

    def test_a_large_ridge_tends_to_the_projection_alone(self) -> None:
        layers = [matrix(30, 30)]
        vectors = [gaussian(SEED + task, layers) for task in range(2)]
        projected = Fold(NullSpace(rank=10), layers).merge(*vectors).read()
        off = [
            relative_difference(
                Fold(Nufilt(protected=10, restored=4, ridge=r), layers).merge(*vectors).read(), projected
            )
            for r in (1e-3, 1e-1, 1.0)
        ]
        assert off == sorted(off, reverse=True)
        assert off[0] > 2 * off[2]


@pytest.mark.parametrize("shape", [(48, 96), (96, 48), (64, 64)])
@pytest.mark.parametrize("size", [1e-2, 1.0])
def test_closed_form_is_below_fifty_published_steps(shape: tuple[int, int], size: float) -> None:
    torch.manual_seed(SEED)
    first, second = (gaussian(SEED + task, [matrix(*shape)])["weight"].values * size for task in range(2))
    merged = Fold(Nufilt(protected=24), [matrix(*shape)]).merge(
        {"weight": Dense(first)}, {"weight": Dense(second)}
    )
    old, new = first.double(), second.double()
    ours = objective(old, new, merged.read()["weight"].double(), 24, 8)
    theirs = objective(old, new, by_adam(old, new, 24, 8), 24, 8)
    assert ours <= theirs < objective(old, new, old + new, 24, 8)
