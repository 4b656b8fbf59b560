"""ACE-Merging: against the published formula with an explicit inverse, and worked by hand."""

from __future__ import annotations

import pytest
import torch
from rule_contract import SEED, Fold, RuleContract, gaussian, relative_difference

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.ace import Ace

TALL = LayerSpec("weight", (6, 4), torch.float32, LayerKind.MATRIX)


class TestAce(RuleContract):
    rules = (Ace(eps=1e-2), Ace(eps=4.0))

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR or layer.matrix_shape[0] == 1:
            return sum(vectors) / len(vectors)
        eye = torch.eye(layer.matrix_shape[1], dtype=torch.float64)
        centred = [vector - vector.mean(0, keepdim=True) for vector in vectors]
        grams = [vector.T @ vector for vector in centred]
        weighted = sum(d @ (g + rule.eps * eye) for d, g in zip(centred, grams, strict=True))
        weights = sum(g + rule.eps * eye for g in grams) + sum(grams).mean(0, keepdim=True)
        return weighted @ torch.linalg.inv(weights)


def test_one_task_worked_by_hand() -> None:
    """D = [[1, 0], [-1, 0]] has mean row 0, G = diag(2, 0), c = (1, 0); with eps = 1::

    A + 1 c = [[3 + 1, 0], [1, 1]],   B = D diag(3, 1) = [[3, 0], [-3, 0]],   M = B [[1/4, 0], [-1/4, 1]]
    """
    layer = LayerSpec("weight", (2, 2), torch.float32, LayerKind.MATRIX)
    vector = {"weight": Dense(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))}
    found = Fold(Ace(eps=1.0), [layer]).merge(vector).read()["weight"]
    torch.testing.assert_close(found, torch.tensor([[0.75, 0.0], [-0.75, 0.0]]))


def test_what_all_rows_share_is_not_merged() -> None:
    vectors = [gaussian(SEED + task, [TALL]) for task in range(3)]
    shifted = [{"weight": Dense(v["weight"].values + 5.0 * torch.arange(4))} for v in vectors]
    found = Fold(Ace(), [TALL]).merge(*shifted).read()
    assert relative_difference(found, Fold(Ace(), [TALL]).merge(*vectors).read()) < 1e-4


def test_large_eps_gives_the_mean_of_the_centred_vectors() -> None:
    vectors = [gaussian(SEED + task, [TALL]) for task in range(3)]
    mean = sum(v["weight"].values for v in vectors) / 3
    found = Fold(Ace(eps=1e6), [TALL]).merge(*vectors).read()
    assert relative_difference(found, {"weight": mean - mean.mean(0)}) < 1e-4


def test_matrix_of_one_row_is_averaged_not_erased() -> None:
    layer = LayerSpec("weight", (1, 4), torch.float32, LayerKind.MATRIX)
    vectors = [gaussian(SEED + task, [layer]) for task in range(2)]
    found = Fold(Ace(), [layer]).merge(*vectors).read()["weight"]
    torch.testing.assert_close(found, (vectors[0]["weight"].values + vectors[1]["weight"].values) / 2)


@pytest.mark.parametrize("eps", [0.0, -1e-5, 1e7, float("nan")])
def test_eps_outside_its_range_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="eps"):
        Ace(eps=eps)
