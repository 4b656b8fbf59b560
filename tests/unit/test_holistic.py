"""Merging with optimizer state: worked by hand, and where there is no curvature."""

from __future__ import annotations

import pytest
import torch
from rule_contract import RuleContract

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.holistic import Holistic
from fedmerge.server.merge.rule import Context

LAYER = LayerSpec("bias", (1,), torch.float32, LayerKind.VECTOR)


def absorbed(rule: Holistic, *arrivals: tuple[float, float], merges: int = 0):
    """The state after so many values and second moments of one weight."""
    state = rule.init(LAYER)
    for place, (value, moment) in enumerate(arrivals, merges):
        context = Context(place, {"second_moment": torch.tensor([moment])})
        state = rule.absorb(state, None, Dense(torch.tensor([value])), context)
    return state


class TestHolistic(RuleContract):
    rules = (Holistic(), Holistic(share=0.6))

    def layer_reference(self, rule, layer, vectors, contexts):
        a = rule.share
        moments = [c.statistics["second_moment"].double().reshape(layer.matrix_shape) for c in contexts]
        merged, curvature = vectors[0], moments[0]
        for vector, moment in zip(vectors[1:], moments[1:], strict=True):
            both = (1 - a) * curvature + a * moment
            merged = ((1 - a) * curvature * merged + a * moment * vector) / both
            curvature = both
        return merged


def test_worked_by_hand() -> None:
    """0.75 * 4 * 2 + 0.25 * 12 * 6 = 24 over 0.75 * 4 + 0.25 * 12 = 6 gives 4."""
    state = absorbed(Holistic(share=0.25), (2.0, 4.0), (6.0, 12.0))
    assert (state.merged_MN.item(), state.curvature_MN.item()) == (4.0, 6.0)


def test_first_vector_is_taken_as_it_is() -> None:
    state = absorbed(Holistic(), (2.0, 0.0))
    assert (state.merged_MN.item(), state.curvature_MN.item()) == (2.0, 0.0)


def test_equal_curvature_interpolates_by_the_share() -> None:
    assert absorbed(Holistic(), (1.0, 0.5), (2.0, 0.5)).merged_MN.item() == pytest.approx(1.4)


def test_without_any_curvature_it_interpolates_by_the_share() -> None:
    assert absorbed(Holistic(), (1.0, 0.0), (2.0, 0.0)).merged_MN.item() == pytest.approx(1.4)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e30])
def test_only_ratios_of_second_moments_matter(size: float) -> None:
    found = absorbed(Holistic(), (1.0, size), (2.0, 3 * size)).merged_MN.item()
    assert found == pytest.approx(absorbed(Holistic(), (1.0, 1.0), (2.0, 3.0)).merged_MN.item())


@pytest.mark.parametrize(("first", "second", "wanted"), [(0.0, 1e-20, 5.0), (1e-20, 0.0, 1.0)])
def test_side_without_curvature_has_no_say(first: float, second: float, wanted: float) -> None:
    assert absorbed(Holistic(), (1.0, first), (5.0, second)).merged_MN.item() == wanted


def test_layer_that_comes_late_starts_from_the_base() -> None:
    assert absorbed(Holistic(), (5.0, 0.3), merges=4).merged_MN.item() == 5.0
    assert absorbed(Holistic(), (5.0, 0.0), merges=4).merged_MN.item() == pytest.approx(2.0)


def test_merged_value_lies_between_the_vectors() -> None:
    generator = torch.Generator().manual_seed(3)
    arrivals = torch.rand(20, 2, generator=generator).tolist()
    values = [value for value, _ in arrivals]
    assert min(values) <= absorbed(Holistic(), *map(tuple, arrivals)).merged_MN.item() <= max(values)
