"""Least interference on both sides: against its objective, worked by hand, and between its two ends."""

from __future__ import annotations

import pytest
import torch
from rule_contract import LAYERS, SEED, Fold, RuleContract, factored, gaussian, relative_difference
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.least_interference import LeastInterference
from fedmerge.server.merge.rule import tensors_of
from fedmerge.server.merge.wudi import Wudi

SQUARE = LayerSpec("weight", (2, 2), torch.float32, LayerKind.MATRIX)
TALL = LayerSpec("weight", (6, 4), torch.float32, LayerKind.MATRIX)
WIDE = LayerSpec("weight", (4, 6), torch.float32, LayerKind.MATRIX)


def merged(rule: LeastInterference, *vectors: list[list[float]]) -> Tensor:
    return Fold(rule, [SQUARE]).merge(*[{"weight": Dense(torch.tensor(v))} for v in vectors]).read()["weight"]


def on_outputs(ridge: float, vectors: list[Tensor]) -> Tensor:
    rows = vectors[0].shape[0]
    drift = (ridge / rows) ** 0.5 * torch.eye(rows, dtype=torch.float64)
    seen = [torch.cat([vector.T / (vector.norm() or 1.0), drift]) for vector in vectors]
    wanted = [each @ vector for each, vector in zip(seen, vectors, strict=True)]
    return torch.linalg.lstsq(torch.cat(seen), torch.cat(wanted), driver="gelsd").solution


class TestLeastInterference(RuleContract):
    """The reference solves the stacked least-squares problem by an SVD."""

    rules = (LeastInterference(), LeastInterference(ridge=10.0), LeastInterference(side="longer"))

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR:
            return sum(vectors) / len(vectors)
        rows, columns = layer.matrix_shape
        outputs = on_outputs(rule.ridge, vectors)
        inputs = on_outputs(rule.ridge, [vector.T for vector in vectors]).T
        if rule.side == "both":
            return (inputs + outputs) / 2
        return inputs if columns > rows else outputs


def test_tasks_that_write_to_different_outputs_are_summed() -> None:
    """C_1 = diag(1, 0) and C_2 = diag(0, 1); with ridge / M = 0.05, D_1 keeps (1 + 0.05) / (1 + 0.1)."""
    found = merged(
        LeastInterference(ridge=0.1, side="longer"), [[2.0, 5.0], [0.0, 0.0]], [[0.0, 0.0], [4.0, 3.0]]
    )
    kept = 1.05 / 1.1
    torch.testing.assert_close(found, torch.tensor([[2 * kept, 5 * kept], [4 * kept, 3 * kept]]))


def test_an_output_two_tasks_write_to_is_averaged_by_their_share_of_it() -> None:
    """C_1 = diag(1, 0); D_2 = [[3, 0], [0, 4]] has C_2 = diag(9, 16) / 25: (1 * 1 + 0.36 * 3) / 1.36."""
    rule = LeastInterference(ridge=1e-6, side="longer")
    found = merged(rule, [[1.0, 0.0], [0.0, 0.0]], [[3.0, 0.0], [0.0, 4.0]])
    wanted = torch.tensor([[(1 + 0.36 * 3) / 1.36, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_tasks_that_read_different_inputs_and_write_to_one_output_share_it_on_one_side() -> None:
    """Inputs give their sum [[2, 3], [0, 0]], as WUDI does, outputs half of it; both sides three quarters."""
    vectors = [[2.0, 0.0], [0.0, 0.0]], [[0.0, 3.0], [0.0, 0.0]]
    outputs = merged(LeastInterference(ridge=1e-6, side="longer"), *vectors)
    torch.testing.assert_close(outputs, torch.tensor([[1.0, 1.5], [0.0, 0.0]]), rtol=1e-5, atol=1e-5)
    both = merged(LeastInterference(ridge=1e-6), *vectors)
    torch.testing.assert_close(both, torch.tensor([[1.5, 2.25], [0.0, 0.0]]), rtol=1e-5, atol=1e-5)


def test_transposed_vectors_give_the_transposed_model() -> None:
    vectors = [gaussian(SEED + task, [TALL]) for task in range(3)]
    turned = [{"weight": Dense(v["weight"].values.T.contiguous())} for v in vectors]
    there = Fold(LeastInterference(), [TALL]).merge(*vectors).read()["weight"]
    back = Fold(LeastInterference(), [WIDE]).merge(*turned).read()["weight"]
    torch.testing.assert_close(back.T, there)


def test_no_change_of_the_merged_matrix_lowers_the_objective() -> None:
    vectors = [gaussian(SEED + task, [TALL]) for task in range(5)]
    matrices = [v["weight"].values.double() for v in vectors]

    def gradient(at: Tensor) -> float:
        return float(sum(d @ d.T @ (at - d) / d.square().sum() for d in matrices).norm())

    best = (
        Fold(LeastInterference(ridge=1e-6, side="longer"), [TALL]).merge(*vectors).read()["weight"].double()
    )
    assert gradient(best) < 1e-5 * gradient(sum(matrices))


def test_one_task_is_merged_as_it_is_at_any_ridge() -> None:
    vector = gaussian(SEED, [TALL])
    for ridge in (1e-6, 0.1, 1e6):
        found = Fold(LeastInterference(ridge=ridge), [TALL]).merge(vector).read()
        assert relative_difference(found, {"weight": vector["weight"].values}) < 1e-6


def test_large_ridge_gives_the_mean() -> None:
    vectors = [gaussian(SEED + task) for task in range(3)]
    found = Fold(LeastInterference(ridge=1e6), LAYERS).merge(*vectors).read()
    mean = {x.name: sum(v[x.name].to_dense() for v in vectors) / 3 for x in LAYERS}
    assert relative_difference(found, mean) < 1e-5


def test_the_longer_side_of_a_wide_layer_is_its_inputs() -> None:
    vectors = [gaussian(SEED + task, [WIDE]) for task in range(3)]
    rules = LeastInterference(side="longer"), Wudi()
    ours, theirs = (Fold(rule, [WIDE]).merge(*vectors).read() for rule in rules)
    assert torch.equal(ours["weight"], theirs["weight"])


@pytest.mark.parametrize("layer", [TALL, WIDE, SQUARE])
def test_state_of_a_matrix_layer_has_the_documented_size(layer: LayerSpec) -> None:
    rows, columns = layer.shape
    for arrival in (gaussian(SEED, [layer]), factored(SEED, 1, [layer])):
        longer, both = (
            sum(tensor.nbytes for tensor in tensors_of(state).values())
            for side in ("longer", "both")
            for state in [Fold(LeastInterference(side=side), [layer]).merge(arrival).states["weight"]]
        )
        long = max(rows, columns)
        assert longer == 8 * rows * columns + 4 * long * (long + 1)
        assert both == 16 * rows * columns + 4 * rows * (rows + 1) + 4 * columns * (columns + 1)


@pytest.mark.parametrize("ridge", [0.0, -1.0, 1e7, float("nan")])
def test_ridge_outside_its_range_is_refused(ridge: float) -> None:
    with pytest.raises(ValueError, match="ridge"):
        LeastInterference(ridge=ridge)
