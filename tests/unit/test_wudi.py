"""WUDI in closed form: against its objective, worked by hand, and between its two ends."""

from __future__ import annotations

import pytest
import torch
from rule_contract import SEED, Fold, RuleContract, gaussian, relative_difference
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.wudi import Wudi

SQUARE = LayerSpec("weight", (2, 2), torch.float32, LayerKind.MATRIX)
WIDE = LayerSpec("weight", (4, 6), torch.float32, LayerKind.MATRIX)


def merged(rule: Wudi, *vectors: list[list[float]]) -> Tensor:
    return Fold(rule, [SQUARE]).merge(*[{"weight": Dense(torch.tensor(v))} for v in vectors]).read()["weight"]


class TestWudi(RuleContract):
    """The reference solves the normal equations of the stacked least-squares problem by an SVD."""

    rules = (Wudi(), Wudi(ridge=10.0))

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR:
            return sum(vectors) / len(vectors)
        columns = layer.matrix_shape[1]
        drift = (rule.ridge / columns) ** 0.5 * torch.eye(columns, dtype=torch.float64)
        rows, wanted = [], []
        for vector in vectors:
            seen = torch.cat([vector / (vector.norm() or 1.0), drift])
            rows.append(seen)
            wanted.append(seen @ vector.T)
        return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted), driver="gelsd").solution.T


def test_tasks_with_rows_in_different_directions_are_summed() -> None:
    """G_1 = diag(1, 0) and G_2 = diag(0, 1); with ridge / N = 0.05, D_1 keeps (1 + 0.05) / (1 + 0.1)."""
    found = merged(Wudi(ridge=0.1), [[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 3.0]])
    kept = 1.05 / 1.1
    torch.testing.assert_close(found, torch.tensor([[2 * kept, 0.0], [0.0, 3 * kept]]))


def test_direction_two_tasks_disagree_on_is_averaged_by_their_share_of_it() -> None:
    """Rows along one axis both: G = diag(1, 0) twice, so the mean of 1 and 4 in proportion 1 to 1."""
    found = merged(Wudi(ridge=1e-6), [[1.0, 0.0], [0.0, 0.0]], [[4.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(found, torch.tensor([[2.5, 0.0], [0.0, 0.0]]))


def test_no_change_of_the_merged_matrix_lowers_the_published_objective() -> None:
    """At a tiny ridge its gradient, sum_t (M - D_t) G_t, vanishes beside that at the sum of task vectors."""
    vectors = [gaussian(SEED + task, [WIDE]) for task in range(5)]
    matrices = [v["weight"].values.double() for v in vectors]

    def gradient(at: Tensor) -> float:
        return float(sum((at - d) @ d.T @ d / d.square().sum() for d in matrices).norm())

    best = Fold(Wudi(ridge=1e-6), [WIDE]).merge(*vectors).read()["weight"].double()
    assert gradient(best) < 1e-5 * gradient(sum(matrices))


def test_one_task_is_merged_as_it_is_at_any_ridge() -> None:
    vector = gaussian(SEED, [WIDE])
    for ridge in (1e-6, 0.1, 1e6):
        found = Fold(Wudi(ridge=ridge), [WIDE]).merge(vector).read()
        assert relative_difference(found, {"weight": vector["weight"].values}) < 1e-6


def test_large_ridge_gives_the_mean() -> None:
    vectors = [gaussian(SEED + task, [WIDE]) for task in range(3)]
    found = Fold(Wudi(ridge=1e6), [WIDE]).merge(*vectors).read()
    mean = sum(v["weight"].values for v in vectors) / 3
    assert relative_difference(found, {"weight": mean}) < 1e-5


def test_size_of_a_task_vector_scales_the_result_alone() -> None:
    vectors = [gaussian(SEED + task, [WIDE]) for task in range(3)]
    large = [{"weight": v["weight"].times(1000.0)} for v in vectors]
    once = Fold(Wudi(), [WIDE]).merge(*vectors).read()
    found = Fold(Wudi(), [WIDE]).merge(*large).read()
    assert relative_difference(found, {"weight": once["weight"] * 1000}) < 1e-6


@pytest.mark.parametrize("ridge", [0.0, -1.0, 1e7, float("nan")])
def test_ridge_outside_its_range_is_refused(ridge: float) -> None:
    with pytest.raises(ValueError, match="ridge"):
        Wudi(ridge=ridge)
