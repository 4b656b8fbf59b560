"""TSV-M: nested truncation in fixed slots, directions made orthogonal, and more tasks than slots."""

from __future__ import annotations

import pytest
import torch
from rule_contract import SEED, Fold, RuleContract, factored, gaussian, relative_difference
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.rule import tensors_of
from fedmerge.server.merge.spectrum import Spectrum, spectrum_of_update
from fedmerge.server.merge.tsv_m import Triplets, TsvM, orthogonal

LAYER = LayerSpec("weight", (12, 18), torch.float32, LayerKind.MATRIX)


def closest_orthonormal(columns: Tensor) -> Tensor:
    """P Q^T of the SVD P s Q^T, over its rank."""
    left, values, right = torch.linalg.svd(columns, full_matrices=False)
    known = values > 1e-5 * values.square().sum().sqrt()
    return left[:, known] @ right[known]


class TestTsvM(RuleContract):
    """The reference sees all task vectors, truncates each once, and whitens by SVDs."""

    rules = (TsvM(), TsvM(factor=0.7))

    def layer_reference(self, rule, layer, vectors, contexts):
        if layer.kind is LayerKind.VECTOR:
            return rule.factor * sum(vectors) / len(vectors)
        slots = min(layer.matrix_shape)
        triplets = []
        for vector in vectors:
            left, values, right = torch.linalg.svd(vector, full_matrices=False)
            known = int((values > 1e-5 * values[0]).sum())
            share = min(max(slots // len(vectors), 1), known)
            triplets += [(values[k], left[:, k], right[k]) for k in range(share)]
        kept = sorted(triplets, key=lambda triplet: -float(triplet[0]))[:slots]
        if not kept:
            return torch.zeros(layer.matrix_shape, dtype=torch.float64)
        values, left, right = (torch.stack(part) for part in zip(*kept, strict=True))
        return rule.factor * closest_orthonormal(left.T) * values @ closest_orthonormal(right.T).T


def test_worked_by_hand() -> None:
    """Two tasks of one triplet each, with outputs at 60 degrees and inputs at right angles.

    The closest orthonormal pair to unit vectors at +-30 degrees from an axis lies at +-45 degrees.
    """
    layer = LayerSpec("weight", (2, 2), torch.float32, LayerKind.MATRIX)
    left = torch.tensor([[3**0.5 / 2, 3**0.5 / 2], [0.5, -0.5]])
    vectors = [{"weight": Dense(torch.outer(left[:, k], torch.eye(2)[k]) * (2 - k))} for k in range(2)]
    found = Fold(TsvM(), [layer]).merge(*vectors).read()["weight"]
    torch.testing.assert_close(found, 0.5**0.5 * torch.tensor([[2.0, 1.0], [2.0, -1.0]]))


def test_one_task_is_merged_as_it_is() -> None:
    vector = gaussian(SEED, [LAYER])
    found = Fold(TsvM(), [LAYER]).merge(vector).read()
    assert relative_difference(found, {"weight": vector["weight"].values}) < 1e-5


@pytest.mark.parametrize("times", [2, 3, 5])
def test_vector_that_came_more_than_once_counts_once(times: int) -> None:
    vector = factored(SEED, 2, [LAYER])
    found = Fold(TsvM(), [LAYER]).merge(*[vector] * times).read()
    assert relative_difference(found, {"weight": vector["weight"].to_dense()}) < 1e-5


def test_every_task_keeps_its_strongest_triplets_in_equal_number() -> None:
    fold = Fold(TsvM(), [LAYER]).merge(*[gaussian(SEED + task, [LAYER]) for task in range(5)])
    state = fold.states["weight"]
    assert sorted(state.place_K[state.values_K > 0].tolist()) == [0] * 5 + [1] * 5


@pytest.mark.parametrize("tasks", [2, 3, 5, 7])
def test_singular_directions_of_different_tasks_become_orthogonal(tasks: int) -> None:
    vectors = [gaussian(SEED + task, [LAYER]) for task in range(tasks)]
    found = Fold(TsvM(), [LAYER]).merge(*vectors).read()["weight"]
    share = 12 // tasks
    kept = torch.cat([torch.linalg.svdvals(v["weight"].values)[:share] for v in vectors]).sort(
        descending=True
    )
    torch.testing.assert_close(
        torch.linalg.svdvals(found)[: share * tasks], kept.values, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("tasks", [12, 13, 20])
def test_of_more_tasks_than_slots_the_strongest_stay(tasks: int) -> None:
    vectors = [gaussian(SEED + task, [LAYER]) for task in range(tasks)]
    strongest = sorted(
        (float(torch.linalg.matrix_norm(v["weight"].values.double(), 2)) for v in vectors), reverse=True
    )
    state = Fold(TsvM(), [LAYER]).merge(*vectors).states["weight"]
    torch.testing.assert_close(state.values_K, torch.tensor(strongest[:12], dtype=torch.float64))


def test_state_takes_its_slots_from_the_start() -> None:
    fold = Fold(TsvM(), [LAYER])
    before = fold.state_bytes()
    assert before == {"weight": 4 * 12 * (12 + 18 + 4)}
    assert fold.merge(factored(SEED, 1, [LAYER])).state_bytes() == before


def test_layer_absent_from_later_updates_is_truncated_at_read_out() -> None:
    rule = TsvM()
    fold = Fold(rule, [LAYER]).merge(gaussian(SEED, [LAYER]))
    state = fold.states["weight"]
    later = Fold(rule, [LAYER]).merge(gaussian(SEED, [LAYER]), {"weight": Dense(torch.zeros(12, 18))})
    torch.testing.assert_close(rule.read(state, later.totals), later.read()["weight"])


@pytest.mark.parametrize("rank", [1, 4, 12, 30])
def test_triplets_of_factors_are_those_of_their_product(rank: int) -> None:
    update = factored(SEED, rank, [LAYER])["weight"]
    low = spectrum_of_update(update, (12, 18))
    dense = spectrum_of_update(Dense(update.to_dense()), (12, 18))
    assert low.rank == dense.rank == min(rank, 12)
    torch.testing.assert_close(low.values_K, dense.values_K, rtol=1e-5, atol=1e-5)
    product = low.left_MK * low.values_K @ low.right_KN
    torch.testing.assert_close(product.float(), update.to_dense(), rtol=1e-5, atol=1e-5)


def test_triplets_are_joined_on_any_device() -> None:
    state = Triplets.none(LAYER)
    held = Triplets(**{name: tensor.to("meta") for name, tensor in tensors_of(state).items()})
    added = Spectrum(held.left_MK[:, :3], held.values_K[:3], held.right_KN[:3])
    joined = held.joined(added, held.slots)
    assert {tensor.device.type for tensor in tensors_of(joined).values()} == {"meta"}


class TestOrthogonal:
    def test_orthonormal_columns_stay(self) -> None:
        columns = torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(SEED))).Q
        torch.testing.assert_close(orthogonal(columns).float(), columns)

    def test_columns_close_to_each_other_come_apart(self) -> None:
        columns = torch.tensor([[1.0, 1.0], [1e-3, -1e-3]])
        found = orthogonal(columns)
        torch.testing.assert_close(found.T @ found, torch.eye(2, dtype=torch.float64))

    def test_columns_that_coincide_share_one_direction(self) -> None:
        found = orthogonal(torch.tensor([[0.6, 0.6], [0.8, 0.8]]))
        torch.testing.assert_close(found, torch.tensor([[0.6, 0.6], [0.8, 0.8]]).double() / 2**0.5)

    def test_nothing_stays_nothing(self) -> None:
        assert orthogonal(torch.zeros(5, 0)).shape == (5, 0)


@pytest.mark.parametrize("factor", [-0.1, 3.1, float("nan")])
def test_factor_outside_its_range_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="factor"):
        TsvM(factor=factor)
