"""MagMax: which vector wins an entry, and that no order decides it."""

from __future__ import annotations

from itertools import permutations

import torch
from rule_contract import LAYERS, Fold, RuleContract, gaussian, zero

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.magmax import MagMax

SEED = 81
LAYER = LayerSpec("weight", (2, 2), torch.float32, LayerKind.MATRIX)


def merged(*vectors: list[list[float]]) -> list[list[float]]:
    arrivals = [{"weight": Dense(torch.tensor(vector))} for vector in vectors]
    return Fold(MagMax(factor=1.0), [LAYER]).merge(*arrivals).read()["weight"].tolist()


class TestMagMax(RuleContract):
    rules = (MagMax(), MagMax(factor=1.0))

    def layer_reference(self, rule, layer, vectors, contexts):
        stacked_TMN = torch.stack(vectors)
        largest_MN = stacked_TMN.abs().amax(0)
        return rule.factor * torch.where((stacked_TMN == largest_MN).any(0), largest_MN, -largest_MN)


def test_every_entry_is_the_largest_magnitude_with_its_sign() -> None:
    assert merged([[1.0, -4.0], [0.0, 2.0]], [[-3.0, 2.0], [0.5, 1.0]]) == [[-3.0, -4.0], [0.5, 2.0]]


def test_positive_one_wins_a_tie_in_any_order() -> None:
    vectors = ([[2.0, 1.0], [1.0, 1.0]], [[-2.0, -3.0], [0.0, 1.0]], [[1.0, 3.0], [-1.0, 0.0]])
    assert all(merged(*order) == [[2.0, 3.0], [1.0, 1.0]] for order in permutations(vectors))


def test_any_order_gives_the_same_bits() -> None:
    arrivals = [gaussian(SEED + task) for task in range(4)]
    wanted = Fold(MagMax(), LAYERS).merge(*arrivals).read()
    for order in permutations(arrivals):
        found = Fold(MagMax(), LAYERS).merge(*order).read()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_merging_a_vector_again_or_a_zero_one_changes_nothing() -> None:
    a, b = gaussian(SEED), gaussian(SEED + 1)
    once, again = (Fold(MagMax(), LAYERS).merge(*v).read() for v in ([a, b], [a, b, zero(), a]))
    assert all(torch.equal(once[name], again[name]) for name in once)
