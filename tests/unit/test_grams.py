"""Packed symmetric matrices, and the sums that rules on Gram matrices share."""

from __future__ import annotations

import pytest
import torch
from rule_contract import SEED, Fold, factored, gaussian
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LowRank
from fedmerge.server.merge.grams import GramSum, gram_and_cube, input_gram_term, lifted, reduced
from fedmerge.server.merge.iso_c import IsoC
from fedmerge.server.merge.packed import packed, packed_trace, packed_zero, unpacked, unpacked_whole
from fedmerge.server.merge.rule import Rule
from fedmerge.server.merge.svc import Svc
from fedmerge.server.merge.wudi import Wudi

ORDERS = (1, 2, 3, 4, 7, 8, 33)


def symmetric(order: int) -> Tensor:
    half = torch.randn(order, order, generator=torch.Generator().manual_seed(order), dtype=torch.float64)
    return half + half.T


class TestPacked:
    @pytest.mark.parametrize("order", ORDERS)
    def test_comes_back_whole(self, order: int) -> None:
        whole = symmetric(order)
        assert torch.equal(unpacked_whole(packed(whole)), whole)

    @pytest.mark.parametrize("order", ORDERS)
    def test_takes_one_entry_per_entry_of_the_triangle(self, order: int) -> None:
        assert packed(symmetric(order)).numel() == order * (order + 1) // 2
        assert packed_zero(order).shape == packed(symmetric(order)).shape

    @pytest.mark.parametrize("order", ORDERS)
    def test_does_not_look_above_the_diagonal(self, order: int) -> None:
        whole = symmetric(order)
        assert torch.equal(packed(whole.tril()), packed(whole))
        assert torch.equal(unpacked(packed(whole)), whole.tril())

    @pytest.mark.parametrize("order", ORDERS)
    def test_knows_its_trace(self, order: int) -> None:
        whole = symmetric(order)
        assert packed_trace(packed(whole)) == pytest.approx(float(whole.trace()))


def test_inputs_that_were_not_measured_are_of_unit_size_on_any_device() -> None:
    update = Dense(torch.zeros(4, 5, device="meta"))
    term = input_gram_term(update, torch.Size([4, 5]), None)
    assert term.gram_NN.device == term.product_MN.device == update.values.device


class TestReduced:
    shape = torch.Size([9, 14])

    @pytest.mark.parametrize("rank", [1, 3, 8])
    def test_factors_keep_as_many_rows_as_their_rank(self, rank: int) -> None:
        layer = LayerSpec("weight", tuple(self.shape), torch.float32, LayerKind.MATRIX)
        update = factored(SEED, rank, [layer])["weight"]
        left, rows = reduced(update, self.shape)
        assert rows.shape == (rank, 14)
        torch.testing.assert_close(left.T @ left, torch.eye(rank, dtype=torch.float64))
        torch.testing.assert_close(lifted(left, rows).float(), update.to_dense(), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("rank", [9, 20])
    def test_factors_as_large_as_the_layer_are_multiplied_out(self, rank: int) -> None:
        update = LowRank(torch.randn(9, rank), torch.randn(rank, 14), tuple(self.shape))
        left, rows = reduced(update, self.shape)
        assert left is None
        torch.testing.assert_close(rows.float(), update.to_dense(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("shape", [(5, 9), (9, 5), (140, 300)])
    def test_gram_and_cube_are_those_of_the_matrix(self, shape: tuple[int, int]) -> None:
        rows = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
        gram, cube = gram_and_cube(rows)
        torch.testing.assert_close(gram.tril(), (rows.T @ rows).tril())
        torch.testing.assert_close(cube, rows @ rows.T @ rows)


@pytest.mark.parametrize("columns", [6, 7])
def test_state_takes_a_triangle_and_a_matrix_in_float64(columns: int) -> None:
    layer = LayerSpec("weight", (4, columns), torch.float32, LayerKind.MATRIX)
    fold = Fold(Wudi(), [layer]).merge(gaussian(SEED, [layer]))
    assert fold.state_bytes() == {"weight": 8 * (4 * columns + columns * (columns + 1) // 2)}


def test_an_indefinite_sum_is_refused_not_inverted() -> None:
    state = GramSum(packed(torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))), torch.zeros(3, 2))
    with pytest.raises(torch.linalg.LinAlgError):
        state.solution(0.5)


def test_layer_no_update_brought_reads_as_zero() -> None:
    layers = [LayerSpec(name, (3, 4), torch.float32, LayerKind.MATRIX) for name in ("one", "other")]
    rule = Wudi()
    fold = Fold(rule, layers[:1]).merge({"one": Dense(torch.ones(3, 4))})
    assert not rule.read(rule.init(layers[1]), fold.totals).any()


@pytest.mark.parametrize("rule", [Wudi(), IsoC(), Svc()], ids=lambda rule: rule.name)
def test_when_all_are_taken_out_nothing_is_left_of_rounding(rule: Rule) -> None:
    layer = LayerSpec("weight", (5, 8), torch.float32, LayerKind.MATRIX)
    one, other = gaussian(SEED, [layer]), gaussian(SEED + 1, [layer])
    assert not Fold(rule, [layer]).merge(one, other).remove(one).remove(other).read()["weight"].any()
