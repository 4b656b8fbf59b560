"""DOP in closed form: worked by hand, and against its loss."""

from __future__ import annotations

import pytest
import torch
from rule_contract import Fold, RuleContract, factored, gaussian, relative_difference
from test_null_space import SHAPES, matrix
from torch import Tensor

from fedmerge.common.layers import LayerKind
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge import dop
from fedmerge.server.merge.dop import Dop
from fedmerge.server.merge.spectrum import spectrum_of

SEED = 81
LEAST_RIDGE = 1e-12


def by_kronecker(rule: Dop, old: Tensor, new: Tensor) -> Tensor:
    """The stationary point of the loss as one linear system over all entries of W."""
    a, rows, columns = rule.weight, *old.shape
    left, right = a * old @ old.T + (1 - a) * new @ new.T, a * old.T @ old + (1 - a) * new.T @ new
    rho = rule.ridge * (torch.linalg.matrix_norm(left, 2) + torch.linalg.matrix_norm(right, 2))
    system = torch.kron(left, torch.eye(columns)) + torch.kron(torch.eye(rows), right)
    wanted = 2 * a * old @ old.T @ old + 2 * (1 - a) * new @ new.T @ new + rho * (old + new) / 2
    return torch.linalg.solve(system + rho * torch.eye(old.numel()), wanted.reshape(-1)).reshape(old.shape)


class TestDop(RuleContract):
    rules = (Dop(), Dop(weight=0.5), Dop(ridge=0.1))

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR:
            return sum(vectors) / len(vectors)
        merged = torch.zeros_like(vectors[0])
        for vector in vectors:
            both = merged.any() and vector.any()
            merged = by_kronecker(rule, merged, vector) if both else merged + vector
        return merged


def loss(rule: Dop, old: Tensor, new: Tensor, merged: Tensor) -> float:
    """The published loss at a fixed weight, from plain SVDs."""
    total = 0.0
    for share, known in ((rule.weight, old), (1 - rule.weight, new)):
        left, values, right = torch.linalg.svd(known, full_matrices=False)
        off = merged - known
        total += share * float((values[:, None] * (left.T @ off)).square().sum())
        total += share * float(((off @ right.T) * values).square().sum())
    return total


def test_one_number_is_worked_out_by_hand() -> None:
    """1 x 1: M = 1, D = 2, a = 0.8. Loss 1.6 (W - 1)^2 + 0.4 * 4 (W - 2)^2, least at W = 4.8 / 3.2 = 1.5."""
    fold = Fold(Dop(ridge=LEAST_RIDGE), [matrix(1, 1)])
    fold.merge({"weight": Dense(torch.tensor([[1.0]]))}, {"weight": Dense(torch.tensor([[2.0]]))})
    assert fold.read()["weight"].item() == pytest.approx(1.5, rel=1e-6)


def test_separate_directions_are_worked_out_by_hand() -> None:
    """M = diag(2, 0), D = diag(0, 1): neither minds the other, so both are kept whole."""
    first, second = torch.diag(torch.tensor([2.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
    fold = Fold(Dop(ridge=LEAST_RIDGE), [matrix(2, 2)])
    fold.merge({"weight": Dense(first)}, {"weight": Dense(second)})
    torch.testing.assert_close(fold.read()["weight"], first + second, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
class TestLaws:
    def test_first_task_is_kept_whole_bit_for_bit(self, shape: tuple[int, int]) -> None:
        vector = gaussian(SEED, [matrix(*shape)])
        merged = Fold(Dop(), [matrix(*shape)]).merge(vector).read()["weight"]
        assert torch.equal(merged, vector["weight"].values)

    def test_duplicate_changes_nothing(self, shape: tuple[int, int]) -> None:
        vector = gaussian(SEED, [matrix(*shape)])
        merged = Fold(Dop(), [matrix(*shape)]).merge(vector, vector, vector).read()
        assert relative_difference(merged, {"weight": vector["weight"].values}) < 1e-6

    @pytest.mark.parametrize("weight", [0.2, 0.8])
    def test_no_nearby_matrix_has_less_loss(self, shape: tuple[int, int], weight: float) -> None:
        rule = Dop(weight=weight, ridge=LEAST_RIDGE)
        first, second = (gaussian(SEED + task, [matrix(*shape)]) for task in range(2))
        merged = Fold(rule, [matrix(*shape)]).merge(first, second).read()["weight"].double()
        old, new = (v["weight"].values.double() for v in (first, second))
        best = loss(rule, old, new, merged)
        torch.manual_seed(SEED)
        for size in (1e-2, 1e-1):
            for _ in range(20):
                assert loss(rule, old, new, merged + size * torch.randn(shape, dtype=torch.float64)) > best

    def test_equals_a_long_run_of_gradient_steps_from_the_mean(self, shape: tuple[int, int]) -> None:
        """The published start, and its loss, with the steps that a quadratic allows."""
        first, second = (gaussian(SEED + task, [matrix(*shape)]) for task in range(2))
        old, new = (v["weight"].values.double() for v in (first, second))
        left = 0.8 * old @ old.T + 0.2 * new @ new.T
        right = 0.8 * old.T @ old + 0.2 * new.T @ new
        wanted = 1.6 * old @ old.T @ old + 0.4 * new @ new.T @ new
        step = 1 / (torch.linalg.matrix_norm(left, 2) + torch.linalg.matrix_norm(right, 2))
        moved = (old + new) / 2
        for _ in range(4000):
            moved = moved - step * (left @ moved + moved @ right - wanted)
        merged = Fold(Dop(ridge=1e-9), [matrix(*shape)]).merge(first, second).read()
        assert relative_difference(merged, {"weight": moved}) < 1e-4


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_factors_are_solved_for_in_their_own_rank(shape: tuple[int, int], monkeypatch) -> None:
    """Directions are sought among 12 rows of M and 2 of D, not among 24."""
    seen = []
    monkeypatch.setattr(dop, "spectrum_of", lambda rows: seen.append(tuple(rows.shape)) or spectrum_of(rows))
    Fold(Dop(), [matrix(*shape)]).merge(gaussian(SEED, [matrix(*shape)]), factored(SEED, 2, [matrix(*shape)]))
    assert seen == [(14, 30)]


def test_a_large_ridge_tends_to_the_mean_of_both() -> None:
    first, second = (gaussian(SEED + task, [matrix(9, 7)]) for task in range(2))
    mean = {"weight": (first["weight"].values + second["weight"].values) / 2}
    off = [
        relative_difference(Fold(Dop(ridge=r), [matrix(9, 7)]).merge(first, second).read(), mean)
        for r in (1e-6, 1e-2, 1.0)
    ]
    assert off == sorted(off, reverse=True)


@pytest.mark.parametrize("weight", [0.01, 0.99])
def test_weight_decides_whose_response_wins(weight: float) -> None:
    first, second = (gaussian(SEED + task, [matrix(9, 7)]) for task in range(2))
    merged = Fold(Dop(weight=weight), [matrix(9, 7)]).merge(first, second).read()
    old, new = (relative_difference(merged, {"weight": v["weight"].values}) for v in (first, second))
    assert (old < new) is (weight > 0.5)


@pytest.mark.parametrize("weight", [0.0, 1.0, float("nan")])
def test_weight_of_one_side_alone_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match="weight"):
        Dop(weight=weight)
