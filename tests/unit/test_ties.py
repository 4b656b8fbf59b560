"""TIES against the batch algorithm, worked by hand, and where its threshold lies."""

from __future__ import annotations

from itertools import permutations
from math import ceil

import pytest
import torch
from rule_contract import LAYERS, Fold, RuleContract, as_dense, factored, gaussian, relative_difference
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.rule import Context
from fedmerge.server.merge.ties import BINS, SignedSums, Ties, bins_of, lowest_kept

SEED = 61


def trimmed(vector: Tensor, density: float) -> Tensor:
    """The entries of a float64 vector from its k-th largest magnitude on, with that magnitude rounded down
    to 8 binary digits after the first."""
    magnitudes = vector.abs()
    last = magnitudes.sort(descending=True).values[ceil(density * len(vector)) - 1]
    mantissa, exponent = torch.frexp(last)
    edge = torch.ldexp((mantissa * 2**9).floor() / 2**9, exponent)
    return vector.where(magnitudes >= edge, 0.0)


def batch(rule: Ties, vectors: list[Tensor]) -> Tensor:
    """TIES over whole vectors, all at once."""
    kept_TN = torch.stack([trimmed(vector, rule.density) for vector in vectors])
    agree_TN = (kept_TN.sign() == kept_TN.sum(0).sign()) & (kept_TN != 0)
    total_N = kept_TN.where(agree_TN, 0.0).sum(0)
    return rule.factor * (total_N / agree_TN.sum(0).clamp_min(1) if rule.merge == "mean" else total_N)


def flat(arrival) -> Tensor:
    return torch.cat([update.values.double().flatten() for update in as_dense(arrival).values()])


class TestTies(RuleContract):
    rules = (Ties(), Ties(merge="mean"), Ties(density=1.0), Ties(density=0.01, factor=1.0))

    def reference(self, rule, arrivals):
        merged = batch(rule, [flat(arrival) for arrival in arrivals])
        parts = merged.split([layer.matrix_shape[0] * layer.matrix_shape[1] for layer in LAYERS])
        return {x.name: part.reshape(x.shape) for x, part in zip(LAYERS, parts, strict=True)}


class TestWorkedByHand:
    """Half of the entries of two layers is kept: of the first vector 4 and -3, both in the first layer; of
    the second -2 and 8, one in each."""

    layers = (
        LayerSpec("weight", (2, 2), torch.float32, LayerKind.MATRIX),
        LayerSpec("bias", (1,), torch.float32, LayerKind.VECTOR),
    )
    vectors = (
        {"weight": Dense(torch.tensor([[4.0, 1.0], [-3.0, 0.0]])), "bias": Dense(torch.tensor([2.0]))},
        {"weight": Dense(torch.tensor([[-2.0, 1.0], [0.5, 0.0]])), "bias": Dense(torch.tensor([8.0]))},
        {"weight": Dense(torch.tensor([[6.0, 1.0], [-5.0, 0.0]])), "bias": Dense(torch.tensor([4.0]))},
    )

    @pytest.mark.parametrize(
        ("merge", "weight", "bias"),
        [("sum", [[10.0, 0.0], [-8.0, 0.0]], 8.0), ("mean", [[5.0, 0.0], [-4.0, 0.0]], 8.0)],
    )
    def test_entries_of_the_elected_sign_are_merged(self, merge, weight, bias) -> None:
        fold = Fold(Ties(density=0.4, merge=merge, factor=1.0), self.layers).merge(*self.vectors)
        assert fold.read()["weight"].tolist() == weight
        assert fold.read()["bias"].tolist() == [bias]

    def test_threshold_is_that_of_the_whole_vector(self) -> None:
        fold = Fold(Ties(density=0.4, factor=1.0), self.layers).merge(self.vectors[0])
        assert not fold.read()["bias"].any()

    def test_kept_entries_that_cancel_merge_to_nothing(self) -> None:
        vector = self.vectors[0]
        opposite = {name: update.times(-1.0) for name, update in vector.items()}
        assert not any(t.any() for t in Fold(Ties(), self.layers).merge(vector, opposite).read().values())

    def test_sums_that_cancel_but_for_rounding_merge_to_nothing_in_any_order(self) -> None:
        layer = LayerSpec("bias", (1,), torch.float32, LayerKind.VECTOR)
        vectors = [{"bias": Dense(torch.tensor([value]))} for value in (0.1, 0.7, 0.9, -1.7)]
        rest = [Fold(Ties(), [layer]).merge(*order) for order in permutations(vectors)]
        assert all(fold.read()["bias"].item() == 0 for fold in rest)


class TestThreshold:
    @pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
    def test_kept_share_is_the_density_within_a_hundredth_of_it(self, density: float) -> None:
        values = torch.randn(400_000, generator=torch.Generator().manual_seed(SEED))
        counts = torch.bincount(bins_of(values), minlength=BINS).double()
        share = float((bins_of(values) >= lowest_kept(counts, density)).double().mean())
        assert density <= share <= 1.01 * density

    def test_bin_is_no_wider_than_a_256th_of_its_lower_edge(self) -> None:
        edge = torch.tensor(3.0)
        assert bins_of(edge) == bins_of(edge * (1 + 1 / 400)) == bins_of(-edge)
        assert bins_of(torch.nextafter(edge, torch.tensor(0.0))) == bins_of(edge) - 1
        assert bins_of(edge * (1 + 1 / 256)) == bins_of(edge) + 1

    def test_largest_float32_is_within_the_bins_and_zero_in_the_first(self) -> None:
        values = torch.tensor([torch.finfo(torch.float32).max, 0.0, -0.0])
        assert (bins_of(values) < BINS).all()
        assert bins_of(values)[1:].tolist() == [0, 0]

    def test_equal_magnitudes_are_kept_together(self) -> None:
        layer = LayerSpec("bias", (6,), torch.float32, LayerKind.VECTOR)
        vector = torch.tensor([1.0, -1.0, 1.0, 0.5, 0.5, 0.0])
        merged = Fold(Ties(density=0.2, factor=1.0), [layer]).merge({"bias": Dense(vector)}).read()
        assert merged["bias"].tolist() == [1.0, -1.0, 1.0, 0.0, 0.0, 0.0]

    def test_scaling_a_vector_by_a_power_of_two_keeps_the_same_entries(self) -> None:
        vector = gaussian(SEED)
        scaled = {name: update.times(2.0**-30) for name, update in vector.items()}
        one, other = (Fold(Ties(), LAYERS).merge(v).read() for v in (vector, scaled))
        assert all(torch.equal(one[name] * 2.0**-30, other[name]) for name in one)

    def test_what_others_merged_does_not_move_it(self) -> None:
        rule, layer = Ties(), LAYERS[0]
        update = gaussian(SEED)[layer.name]
        empty, full = rule.init(layer), SignedSums(torch.ones(12, 12), -torch.ones(12, 12))
        assert torch.equal(rule.measure(empty, update, Context()), rule.measure(full, update, Context()))


def test_factors_are_trimmed_exactly_as_their_product() -> None:
    arrival = factored(SEED, rank=3)
    low, dense = (Fold(Ties(), LAYERS).merge(a).states for a in (arrival, as_dense(arrival)))
    assert all(torch.equal(low[name].positive_MN, dense[name].positive_MN) for name in low)


def test_only_the_mean_keeps_counts() -> None:
    sums, counted = (Fold(Ties(merge=m), LAYERS).merge(gaussian(SEED)).state_bytes() for m in ("sum", "mean"))
    assert all(counted[name] == 2 * sums[name] for name in sums)


def test_batch_result_is_the_same_after_every_arrival() -> None:
    arrivals = [gaussian(SEED + task) for task in range(5)]
    fold = Fold(Ties(), LAYERS)
    for seen in range(1, 6):
        merged = fold.merge(arrivals[seen - 1]).read()
        found = torch.cat([merged[layer.name].double().flatten() for layer in LAYERS])
        wanted = batch(Ties(), [flat(arrival) for arrival in arrivals[:seen]])
        assert relative_difference({"all": found}, {"all": wanted}) < 1e-6
