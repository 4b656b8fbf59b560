"""LoRE: singular values lowered by the threshold, by hand and against an SVD."""

from __future__ import annotations

import pytest
import torch
from rule_contract import LAYERS, Fold, RuleContract, as_dense, factored, gaussian, relative_difference

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LowRank
from fedmerge.server.merge.average import Average
from fedmerge.server.merge.lore import Lore

SEED = 91


def matrix(rows: int, columns: int) -> LayerSpec:
    return LayerSpec("weight", (rows, columns), torch.float32, LayerKind.MATRIX)


class TestLore(RuleContract):
    rules = (Lore(), Lore(unit="absolute", mu=0.9), Lore(mu=0.0), Lore(mu=0.5, merge="sum", factor=0.3))

    def layer_reference(self, rule, layer, vectors, contexts):
        total = sum(self.estimate(rule, layer, vector) for vector in vectors)
        return rule.factor * total / (len(vectors) if rule.merge == "mean" else 1)

    @staticmethod
    def estimate(rule, layer, vector):
        if layer.kind is LayerKind.VECTOR:
            return vector
        u, s, vh = torch.linalg.svd(vector, full_matrices=False)
        return (u * (s - rule.mu * (s[0] if rule.unit == "largest" else 1)).clamp_min(0)) @ vh


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (Lore(mu=0.5), [[2.0, 0.0], [0.0, 1.0]]),
        (Lore(mu=0.75), [[1.0, 0.0], [0.0, 0.0]]),
        (Lore(mu=0.5, unit="absolute"), [[3.5, 0.0], [0.0, 2.5]]),
    ],
)
def test_worked_by_hand(rule: Lore, wanted) -> None:
    """diag(4, 3) at half the largest singular value loses 2 from each; at three quarters, 3; else 0.5."""
    vector = {"weight": Dense(torch.diag(torch.tensor([4.0, 3.0])))}
    merged = Fold(rule, [matrix(2, 2)]).merge(vector).read()["weight"]
    torch.testing.assert_close(merged, torch.tensor(wanted))


def test_sum_of_two_is_twice_their_mean() -> None:
    arrivals = [gaussian(SEED), gaussian(SEED + 1)]
    mean, total = (Fold(Lore(merge=merge), LAYERS).merge(*arrivals).read() for merge in ("mean", "sum"))
    assert relative_difference({name: 2 * vector for name, vector in mean.items()}, total) < 1e-6


def test_without_threshold_it_is_the_average() -> None:
    arrivals = [gaussian(SEED + task) for task in range(3)]
    merged = Fold(Lore(mu=0.0), LAYERS).merge(*arrivals).read()
    assert relative_difference(merged, Fold(Average(), LAYERS).merge(*arrivals).read()) < 1e-6


def test_absolute_threshold_above_every_singular_value_leaves_nothing() -> None:
    vector = {"weight": Dense(0.01 * torch.eye(4))}
    fold = Fold(Lore(mu=0.02, unit="absolute"), [matrix(4, 4)]).merge(vector)
    assert not fold.read()["weight"].any()


def test_relative_threshold_follows_the_vector_s_scale() -> None:
    vector, layer = gaussian(SEED, [matrix(9, 6)]), [matrix(9, 6)]
    scaled = {name: update.times(2.0**-20) for name, update in vector.items()}
    one, other = (Fold(Lore(), layer).merge(v).read()["weight"] for v in (vector, scaled))
    torch.testing.assert_close(other * 2.0**20, one)


@pytest.mark.parametrize("rank", [1, 3, 6, 11])
def test_factors_of_any_rank_are_thresholded_as_their_product(rank: int) -> None:
    arrival = factored(SEED, rank)
    low, dense = (Fold(Lore(mu=0.3), LAYERS).merge(a).read() for a in (arrival, as_dense(arrival)))
    assert relative_difference(low, dense) < 1e-6


def test_factors_of_a_large_layer_are_never_multiplied_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("multiplied out")

    monkeypatch.setattr("fedmerge.server.merge.spectrum.values_of", refuse)
    update = LowRank(torch.ones(50, 2), torch.ones(2, 40), (50, 40))
    Fold(Lore(), [matrix(50, 40)]).merge({"weight": update})
