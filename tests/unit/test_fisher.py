"""Fisher merging: worked by hand, its floor, and what is left when vectors are taken out."""

from __future__ import annotations

import pytest
import torch
from rule_contract import RuleContract

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.fisher import Fisher
from fedmerge.server.merge.rule import Context, Totals

LAYER = LayerSpec("weight", (2, 2), torch.float32, LayerKind.MATRIX)


def context(fisher) -> Context:
    return Context(statistics={"fisher": torch.as_tensor(fisher, dtype=torch.float32).expand(2, 2)})


def vector(values) -> Dense:
    return Dense(torch.as_tensor(values, dtype=torch.float32).expand(2, 2))


def absorbed(rule: Fisher, *arrivals: tuple[object, object]):
    state = rule.init(LAYER)
    for values, fisher in arrivals:
        state = rule.absorb(state, None, vector(values), context(fisher))
    return state


def read(rule: Fisher, state) -> torch.Tensor:
    return rule.read(state, Totals(merges=1))


class TestFisher(RuleContract):
    rules = (Fisher(), Fisher(floor=0.5))

    def layer_reference(self, rule, layer, vectors, contexts):
        fishers = [c.statistics["fisher"].double().reshape(layer.matrix_shape) + rule.floor for c in contexts]
        return sum(f * v for f, v in zip(fishers, vectors, strict=True)) / sum(fishers)


def test_worked_by_hand() -> None:
    """(1 * 2 + 3 * 6) / 4 = 5, (1 * 0 + 1 * 4) / 2 = 2, (0 + 8 * 1) / 8 = 1 and -3 beside no weight."""
    rule = Fisher(floor=1e-12)
    first = ([[2.0, 0.0], [7.0, -3.0]], [[1.0, 1.0], [0.0, 5.0]])
    second = ([[6.0, 4.0], [1.0, 9.0]], [[3.0, 1.0], [8.0, 0.0]])
    wanted = torch.tensor([[5.0, 2.0], [1.0, -3.0]])
    torch.testing.assert_close(read(rule, absorbed(rule, first, second)), wanted)


def test_entries_without_curvature_are_averaged() -> None:
    rule = Fisher()
    assert read(rule, absorbed(rule, (1.0, 0.0), (2.0, 0.0), (6.0, 0.0))).tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_floor_far_above_the_fishers_gives_the_average() -> None:
    rule = Fisher(floor=1.0)
    torch.testing.assert_close(read(rule, absorbed(rule, (1.0, 1e-9), (3.0, 1e-8))), torch.full((2, 2), 2.0))


def test_scaling_all_fishers_and_the_floor_changes_nothing() -> None:
    one, other = Fisher(floor=1e-3), Fisher(floor=1e-5)
    there = read(one, absorbed(one, (1.0, 0.2), (3.0, 0.5)))
    torch.testing.assert_close(read(other, absorbed(other, (1.0, 0.002), (3.0, 0.005))), there)


def test_layer_that_an_update_leaves_alone_keeps_its_mean() -> None:
    """Counted as a zero with weight it would be less."""
    rule = Fisher()
    state = absorbed(rule, (1.0, 0.5), (3.0, 0.5))
    assert torch.equal(rule.read(state, Totals(merges=2)), rule.read(state, Totals(merges=10)))


def test_small_fisher_survives_a_large_one_that_came_and_went() -> None:
    rule = Fisher()
    state = rule.remove(absorbed(rule, (2.0, 1e-6), (9.0, 1e6)), vector(9.0), context(1e6))
    torch.testing.assert_close(read(rule, state), torch.full((2, 2), 2.0), rtol=1e-3, atol=0)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_nothing_is_left_when_everyone_is_taken_out(order: tuple[int, ...]) -> None:
    rule = Fisher()
    arrivals = [(0.1, 1e8 / 7), (0.3, 1 / 3), (0.7, 1e-4 / 11)]
    state = absorbed(rule, *arrivals)
    for which in order:
        values, fisher = arrivals[which]
        state = rule.remove(state, vector(values), context(fisher))
    assert not read(rule, state).any()
