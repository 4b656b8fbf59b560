"""Where layers go: balanced, complete, the same every time."""

from __future__ import annotations

from itertools import permutations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.server.engine.placement import cost, place


def matrix(name: str, *shape: int) -> LayerSpec:
    return LayerSpec(name, shape, torch.float32, LayerKind.MATRIX)


def bias(name: str, *shape: int) -> LayerSpec:
    return LayerSpec(name, shape, torch.float32, LayerKind.VECTOR)


def names(groups: list[list[LayerSpec]]) -> list[list[str]]:
    return [[layer.name for layer in group] for group in groups]


def load(group: list[LayerSpec]) -> float:
    return sum(map(cost, group))


def least_possible_load(costs: list[float], shards: int) -> float:
    """The lowest maximum over all placements, by trying them all."""
    loads = {(0.0,) * shards}
    for one in costs:
        loads = {tuple(sorted((*x[:i], x[i] + one, *x[i + 1 :]))) for x in loads for i in range(shards)}
    return min(x[-1] for x in loads)


kinds = st.sampled_from([LayerKind.MATRIX, LayerKind.VECTOR])
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@st.composite
def layers(draw: st.DrawFn, most: int = 30) -> list[LayerSpec]:
    drawn = draw(st.lists(st.tuples(shapes, kinds), min_size=1, max_size=most))
    return [LayerSpec(f"layer.{i}", shape, torch.float32, kind) for i, (shape, kind) in enumerate(drawn)]


def test_cost_of_a_matrix_is_its_size_times_its_shorter_side() -> None:
    assert cost(matrix("tall", 40, 12)) == 40 * 12 * 12
    assert cost(matrix("wide", 12, 40)) == 40 * 12 * 12
    assert cost(matrix("conv", 8, 3, 5, 5)) == 8 * 75 * 8


def test_cost_of_a_vector_is_its_size() -> None:
    assert cost(bias("bias", 24)) == 24
    assert cost(bias("embedding", 100, 24)) == 2400


def test_costliest_goes_first_and_each_next_to_the_least_loaded() -> None:
    """Worked by hand: costs 1000, 512, 343, 216, 100 on two shards."""
    given_layers = [
        matrix("d", 6, 6),
        matrix("a", 10, 10),
        bias("e", 100),
        matrix("c", 7, 7),
        matrix("b", 8, 8),
    ]
    assert names(place(given_layers, 2)) == [["a", "e"], ["b", "c", "d"]]


def test_equal_layers_are_dealt_by_name() -> None:
    equal = [matrix(name, 4, 4) for name in "cabd"]
    assert names(place(equal, 2)) == [["a", "c"], ["b", "d"]]


def test_more_shards_than_layers_give_one_layer_each() -> None:
    assert names(place([matrix("a", 3, 3), matrix("b", 2, 2)], 7)) == [["a"], ["b"]]


def test_one_shard_holds_everything() -> None:
    assert names(place([bias("b", 3), matrix("a", 3, 3)], 1)) == [["a", "b"]]


@given(layers(), st.integers(1, 12))
@settings(deadline=None)
def test_every_layer_is_placed_once_and_no_group_is_empty(given_layers: list[LayerSpec], shards: int) -> None:
    groups = place(given_layers, shards)
    assert all(groups)
    assert len(groups) == min(shards, len(given_layers))
    placed = sorted(layer.name for group in groups for layer in group)
    assert placed == sorted(layer.name for layer in given_layers)


@given(layers(), st.integers(1, 12))
@settings(deadline=None)
def test_costliest_comes_first_within_every_group(given_layers: list[LayerSpec], shards: int) -> None:
    for group in place(given_layers, shards):
        costs = [cost(layer) for layer in group]
        assert costs == sorted(costs, reverse=True)


@given(layers(), st.integers(1, 12), st.randoms(use_true_random=False))
@settings(deadline=None)
def test_placement_does_not_depend_on_the_order_given(
    given_layers: list[LayerSpec], shards: int, random
) -> None:
    shuffled = random.sample(given_layers, len(given_layers))
    assert place(shuffled, shards) == place(given_layers, shards)


def test_placement_is_the_same_for_every_order_of_four_layers() -> None:
    four = [matrix("a", 5, 5), matrix("b", 4, 4), bias("c", 64), bias("d", 7)]
    assert len({str(names(place(order, 2))) for order in permutations(four)}) == 1


@given(layers(most=8), st.integers(1, 4))
@settings(deadline=None)
def test_heaviest_group_is_within_four_thirds_of_the_best(given_layers: list[LayerSpec], shards: int) -> None:
    """Graham's bound for longest processing time first: 4/3 - 1/(3 m)."""
    best = least_possible_load([cost(layer) for layer in given_layers], shards)
    assert max(map(load, place(given_layers, shards))) <= best * (4 / 3 - 1 / (3 * shards)) + 1e-9
