"""OPCM: worked by hand, at its boundaries, and how much it keeps in memory."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from rule_contract import LAYERS, Fold, RuleContract, as_dense, factored, gaussian, relative_difference, zero
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LowRank
from fedmerge.deploy.bench.published import Diagonal, PublishedOpcm, published_split
from fedmerge.server.merge.opcm import FactoredSum, Opcm
from fedmerge.server.merge.rule import tensors_of
from fedmerge.server.merge.spectrum import spectrum_of, split_of
from fedmerge.server.merge.sums import MatrixSum

SEED = 41


def matrix(rows: int, columns: int, name: str = "weight") -> LayerSpec:
    return LayerSpec(name, (rows, columns), torch.float32, LayerKind.MATRIX)


def published(
    layers: list[LayerSpec], vectors: list[dict[str, Dense]], diagonal: Diagonal, alpha: float = 0.5
) -> PublishedOpcm:
    """The published run in float64 over vectors given as they are, from a base of zeros."""
    base = {layer.name: torch.zeros(layer.shape) for layer in layers}
    linear = [layer.name for layer in layers if layer.kind is LayerKind.MATRIX]
    model = PublishedOpcm(base, linear, diagonal=diagonal, dtype=torch.float64, alpha=alpha)
    for vector in vectors:
        model.merge({name: update.values for name, update in vector.items()})
    return model


class TestOpcm(RuleContract):
    """The reference is the published step in float64, which is well posed for vectors of full rank only."""

    rules = (Opcm(), Opcm(diagonal="left"), Opcm(alpha=0.0), Opcm(alpha=0.9))
    tolerance = 2e-5

    def reference(self, rule, arrivals):
        """Zero vectors are left out but for their norm, because the published step divides by the first's."""
        vectors = [as_dense(arrival) for arrival in arrivals]
        merged = [v for v in vectors if any(update.values.any() for update in v.values())]
        if not merged:
            return {name: update.values for name, update in vectors[0].items()}
        diagonal = "cleared_within_rank" if rule.diagonal == "cleared" else "left"
        model = published(list(LAYERS), merged, diagonal, rule.alpha)
        share = len(merged) / len(vectors)
        return {name: vector * share for name, vector in model.vector().items()}


class TestWorkedByHand:
    """First vector diag(3, 1), so U = V = I, singular values 3 and 1, shares 0.75 and 1.

    Second vector [[1, 2], [3, 4]].
    With alpha = 0.8 one direction is protected, so C_11 is removed as a block; U^T D V is D itself.

    - cleared: C = [[0, 2], [3, 0]], S = [[3, 2], [3, 1]], ||S||^2 = 9 + 4 + 9 + 1 = 23.
    - left:    C = [[0, 2], [3, 4]], S = [[3, 2], [3, 5]], ||S||^2 = 9 + 4 + 9 + 25 = 47.

    The vectors' norms are sqrt(10) and sqrt(30), their mean n; the merged vector is S * n / ||S||.
    """

    first = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    second = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    mean_norm = (sqrt(10) + sqrt(30)) / 2

    @pytest.mark.parametrize(
        ("diagonal", "total", "square"),
        [("cleared", [[3.0, 2.0], [3.0, 1.0]], 23), ("left", [[3.0, 2.0], [3.0, 5.0]], 47)],
    )
    def test_second_vector_is_merged_as_worked_out(self, diagonal, total, square) -> None:
        fold = Fold(Opcm(alpha=0.8, diagonal=diagonal), [matrix(2, 2)])
        fold.merge({"weight": Dense(self.first)}, {"weight": Dense(self.second)})
        torch.testing.assert_close(fold.states["weight"].sum_MN, torch.tensor(total))
        assert fold.rule.lambda_t(fold.totals) == pytest.approx(sqrt(square) / self.mean_norm, rel=1e-6)
        torch.testing.assert_close(
            fold.read()["weight"], torch.tensor(total) * (self.mean_norm / sqrt(square)), rtol=1e-6, atol=0
        )

    def test_share_below_the_first_direction_protects_no_block(self) -> None:
        fold = Fold(Opcm(alpha=0.7, diagonal="left"), [matrix(2, 2)])
        fold.merge({"weight": Dense(self.first)}, {"weight": Dense(self.second)})
        torch.testing.assert_close(fold.states["weight"].sum_MN, self.first + self.second)


class TestSplit:
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("alpha", "split"), [(0.0, 0), (0.749999, 0), (0.75, 1), (0.750001, 1), (0.999999, 1), (1.0, 0)]
    )
    def test_counts_directions_whose_share_is_still_at_most_alpha(self, alpha: float, split: int) -> None:
        assert split_of(self.values, alpha) == published_split(self.values, alpha) == split

    def test_tie_is_not_decided_by_rounding(self) -> None:
        tenths = torch.full((10,), 0.1, dtype=torch.float64)
        assert [split_of(tenths, k / 10) for k in range(10)] == list(range(10))

    def test_equals_the_published_split_away_from_ties(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        for _ in range(50):
            values = torch.rand(7, generator=generator, dtype=torch.float64).sort(descending=True).values
            alpha = float(torch.rand((), generator=generator))
            assert split_of(values, alpha) == published_split(values, alpha)

    def test_nothing_known_protects_nothing(self) -> None:
        assert split_of(torch.zeros(0, dtype=torch.float64), 0.5) == 0


class TestAlphaOne:
    """No share exceeds 1, so the published split is 0 in exact arithmetic. In floating point the last share
    may round to just above 1, and the published code then protects all directions but one."""

    def test_protects_no_block(self) -> None:
        layers = [matrix(9, 6)]
        vectors = [gaussian(SEED + task, layers) for task in range(4)]
        one, none = (Fold(Opcm(alpha=alpha), layers).merge(*vectors).read() for alpha in (1.0, 0.0))
        assert torch.equal(one["weight"], none["weight"])

    def test_published_split_depends_on_rounding_there(self) -> None:
        generator = torch.Generator().manual_seed(SEED)
        drawn = torch.rand(50, 40, generator=generator, dtype=torch.float64).sort(1, descending=True).values
        assert {published_split(values, 1.0) for values in drawn} > {0}
        assert {split_of(values, 1.0) for values in drawn} == {0}


class TestSpecialVectors:
    layers = (matrix(9, 6), LayerSpec("bias", (5,), torch.float32, LayerKind.VECTOR))

    def test_one_task_gives_the_task_vector_itself(self) -> None:
        vector = gaussian(SEED, self.layers)
        merged = Fold(Opcm(), self.layers).merge(vector).read()
        assert all(torch.equal(merged[name], update.values) for name, update in vector.items())

    def test_one_low_rank_task_gives_the_product_to_float32(self) -> None:
        vector = factored(SEED, 1, self.layers)
        merged = Fold(Opcm(), self.layers).merge(vector).read()
        assert relative_difference(merged, {n: u.values for n, u in as_dense(vector).items()}) < 1e-7

    def test_zero_vector_first_halves_the_mean_norm(self) -> None:
        vector = gaussian(SEED, self.layers)
        merged = Fold(Opcm(), self.layers).merge(zero(self.layers), vector).read()
        assert relative_difference(merged, {n: u.values / 2 for n, u in vector.items()}) < 1e-7

    def test_zero_vector_in_the_middle_leaves_the_sum_bit_for_bit(self) -> None:
        fold = Fold(Opcm(), self.layers).merge(gaussian(SEED, self.layers), gaussian(SEED + 1, self.layers))
        before = {name: state.sum_MN for name, state in fold.states.items()}
        fold.merge(zero(self.layers))
        assert all(torch.equal(fold.states[name].sum_MN, total) for name, total in before.items())

    def test_only_zero_vectors_read_as_zero(self) -> None:
        fold = Fold(Opcm(), self.layers).merge(zero(self.layers), zero(self.layers))
        assert fold.rule.lambda_t(fold.totals) == 0
        assert all(not t.any() for t in fold.read().values())

    def test_duplicate_matrix_adds_nothing(self) -> None:
        layers = [matrix(9, 6)]
        vector = gaussian(SEED, layers)
        merged = Fold(Opcm(), layers).merge(vector, vector, vector).read()
        assert relative_difference(merged, {n: u.values for n, u in vector.items()}) < 1e-6

    def test_duplicate_with_the_diagonal_left_adds_all_but_the_block(self) -> None:
        """S = D = diag(4, 2, 1, 1) and alpha = 0.75 protect two directions, so diag(0, 0, 1, 1) is added."""
        values = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0]))
        fold = Fold(Opcm(alpha=0.75, diagonal="left"), [matrix(4, 4)])
        fold.merge({"weight": Dense(values)}, {"weight": Dense(values)})
        wanted = torch.diag(torch.tensor([4.0, 2.0, 2.0, 2.0]))
        torch.testing.assert_close(fold.states["weight"].sum_MN, wanted)

    def test_vector_layers_are_summed_and_share_the_scale(self) -> None:
        vectors = [gaussian(SEED + task, self.layers) for task in range(5)]
        fold = Fold(Opcm(), self.layers).merge(*vectors)
        total = sum(vector["bias"].values for vector in vectors)
        lambda_t = fold.rule.lambda_t(fold.totals)
        torch.testing.assert_close(fold.read()["bias"] * lambda_t, total)
        torch.testing.assert_close(fold.read()["weight"] * lambda_t, fold.states["weight"].sum_MN)

    def test_convolution_merges_as_its_matrix(self) -> None:
        conv, flat = LayerSpec("weight", (6, 3, 2, 2), torch.float32, LayerKind.MATRIX), matrix(6, 12)
        vectors = [gaussian(SEED + task, [conv]) for task in range(4)]
        flattened = [{"weight": Dense(v["weight"].values.reshape(6, 12))} for v in vectors]
        merged, wanted = Fold(Opcm(), [conv]).merge(*vectors), Fold(Opcm(), [flat]).merge(*flattened)
        assert merged.read()["weight"].shape == (6, 3, 2, 2)
        assert torch.equal(merged.read()["weight"].reshape(6, 12), wanted.read()["weight"])


class TestRankDeficient:
    @pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)])
    @pytest.mark.parametrize("diagonal", ["cleared", "left"])
    def test_float32_and_float64_agree(self, shape: tuple[int, int], diagonal: Diagonal) -> None:
        layers = [matrix(*shape)]
        vectors = [gaussian(SEED + task, layers, rank=2) for task in range(5)]
        exact = published(layers, vectors, "left" if diagonal == "left" else "cleared_within_rank")
        fold = Fold(Opcm(diagonal=diagonal), layers).merge(*vectors)
        assert relative_difference(fold.read(), exact.vector()) < 1e-6
        assert fold.rule.lambda_t(fold.totals) == pytest.approx(exact.lambda_t, rel=1e-6)

    def test_directions_of_rounding_size_are_left_out(self) -> None:
        total = gaussian(SEED, [matrix(30, 20)], rank=3)["weight"].values
        assert Opcm().prepare(MatrixSum(total)).basis.rank == 3


class TestSpectrum:
    @pytest.mark.parametrize("shape", [(40, 40), (40, 70), (70, 40)])
    def test_weak_directions_are_as_orthonormal_as_strong_ones(self, shape: tuple[int, int]) -> None:
        """Singular values from 1 to 3e-7, which squaring in a Gram matrix would blur."""
        generator = torch.Generator().manual_seed(SEED)
        left, right = (
            torch.linalg.qr(torch.randn(size, 40, generator=generator, dtype=torch.float64)).Q
            for size in shape
        )
        total = left @ torch.diag(torch.logspace(0, -6.5, 40, dtype=torch.float64)) @ right.T
        found, identity = spectrum_of(total), torch.eye(40, dtype=torch.float64)
        assert found.rank == 40
        torch.testing.assert_close(found.left_MK.T @ found.left_MK, identity, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.right_KN @ found.right_KN.T, identity, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.left_MK * found.values_K @ found.right_KN, total, rtol=0, atol=1e-12)

    def test_zero_matrix_has_no_directions(self) -> None:
        assert spectrum_of(torch.zeros(5, 4)).rank == 0


class TestLowRank:
    layers = (matrix(40, 60),)

    @pytest.mark.parametrize("diagonal", ["cleared", "left"])
    @pytest.mark.parametrize("alpha", [0.3, 0.8])
    def test_equals_its_product_factored_and_once_dense(self, diagonal: Diagonal, alpha: float) -> None:
        rule = Opcm(diagonal=diagonal, alpha=alpha)
        low, dense = Fold(rule, self.layers), Fold(rule, self.layers)
        kinds = []
        for task in range(9):
            vector = factored(SEED + task, 2, self.layers)
            low.merge(vector)
            dense.merge(as_dense(vector))
            kinds.append(type(low.states["weight"]))
            assert relative_difference(low.read(), dense.read()) < 2e-6, f"after task {task + 1}"
        assert kinds == [FactoredSum] * kinds.count(FactoredSum) + [MatrixSum] * kinds.count(MatrixSum)
        assert FactoredSum in kinds
        assert MatrixSum in kinds

    def test_low_rank_onto_a_dense_sum_equals_its_product(self) -> None:
        first, second = gaussian(SEED, self.layers), factored(SEED, 3, self.layers)
        merged = Fold(Opcm(), self.layers).merge(first, second).read()
        dense = Fold(Opcm(), self.layers).merge(first, as_dense(second)).read()
        assert relative_difference(merged, dense) < 1e-6

    def test_vector_within_the_known_span_adds_no_direction(self) -> None:
        vector = factored(SEED, 3, self.layers)
        fold = Fold(Opcm(), self.layers).merge(vector, vector)
        assert fold.states["weight"].core_JL.shape == (3, 3)

    def test_layer_too_large_to_exist_is_absorbed_factored(self) -> None:
        """200000 x 100000 in float32 is 80 GB; four tasks of rank 4 take 16 columns and rows."""
        layer = matrix(200_000, 100_000)
        fold = Fold(Opcm(), [layer])
        for task in range(4):
            fold.merge(factored(SEED + task, 4, [layer]))
        shapes = {name: tuple(t.shape) for name, t in tensors_of(fold.states["weight"]).items()}
        assert shapes == {"left_JM": (16, 200_000), "core_JL": (16, 16), "right_LN": (16, 100_000)}

    def test_no_matrix_of_the_layers_size_is_built_before_read_out(self) -> None:
        layer = matrix(300, 200)
        fold, watch = Fold(Opcm(), [layer]), LargestTensor()
        vectors = [factored(SEED + task, 2, [layer]) for task in range(6)]
        with watch:
            fold.merge(*vectors)
        assert 300 * 12 <= watch.numel < 300 * 200 / 4
        with watch:
            fold.read()
        assert watch.numel == 300 * 200


class TestMemory:
    def test_dense_state_is_one_float32_matrix_at_4_and_32_tasks(self) -> None:
        layers = [matrix(16, 24)]
        fold = Fold(Opcm(), layers)
        for task in range(32):
            fold.merge(gaussian(SEED + task, layers))
            if task + 1 in (4, 32):
                assert fold.state_bytes() == {"weight": 16 * 24 * 4}

    @pytest.mark.parametrize("shape", [(64, 64), (64, 16), (16, 64)])
    def test_factored_state_never_outgrows_a_dense_one(self, shape: tuple[int, int]) -> None:
        layers = [matrix(*shape)]
        fold = Fold(Opcm(), layers)
        for task in range(32):
            held = fold.merge(factored(SEED + task, 2, layers)).state_bytes()["weight"]
            assert held <= shape[0] * shape[1] * 4, f"after task {task + 1}"

    @pytest.mark.parametrize("update", [gaussian(SEED, [matrix(9, 7)]), factored(SEED, 1, [matrix(9, 7)])])
    def test_prepared_directions_survive_being_used(self, update) -> None:
        rule = Opcm()
        fold = Fold(rule, [matrix(9, 7)]).merge(gaussian(SEED + 1, [matrix(9, 7)]))
        state = fold.states["weight"]
        prepared = rule.prepare(state)
        once = rule.absorb(state, prepared, update["weight"])
        twice = rule.absorb(state, prepared, update["weight"])
        assert torch.equal(once.sum_MN, twice.sum_MN)


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements any operation returns while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return made


def test_alpha_outside_its_range_is_refused() -> None:
    for alpha in (-0.01, 1.01, float("nan")):
        with pytest.raises(ValueError, match="alpha"):
            Opcm(alpha=alpha)


def test_diagonal_left_is_the_published_variant_that_cleared_a_copy() -> None:
    layers = [matrix(14, 10)]
    vectors = [gaussian(SEED + task, layers) for task in range(5)]
    left = Fold(Opcm(diagonal="left"), layers).merge(*vectors).read()
    assert relative_difference(left, published(layers, vectors, "left").vector()) < 1e-6
    assert relative_difference(left, published(layers, vectors, "cleared").vector()) > 1e-2


def test_low_rank_update_of_a_convolution_keeps_its_shape() -> None:
    conv = LayerSpec("weight", (12, 3, 3, 3), torch.float32, LayerKind.MATRIX)
    vector = factored(SEED, 1, [conv])
    assert isinstance(vector["weight"], LowRank)
    merged = Fold(Opcm(), [conv]).merge(vector, factored(SEED + 1, 1, [conv])).read()["weight"]
    assert merged.shape == (12, 3, 3, 3)


def test_an_eigensolver_that_gives_up_is_replaced_by_an_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(12, 20, generator=torch.Generator().manual_seed(3))
    wanted = spectrum_of(matrix)

    def gives_up(*_: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    found = spectrum_of(matrix)
    torch.testing.assert_close(found.values_K, wanted.values_K)
    rebuilt = found.left_MK * found.values_K @ found.right_KN
    torch.testing.assert_close(rebuilt, matrix.double(), atol=1e-10, rtol=0)
