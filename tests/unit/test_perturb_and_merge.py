"""P&M's coefficient against the sum over all tasks it stands for, and at its ends."""

from __future__ import annotations

import pytest
import torch
from rule_contract import LAYERS, Arrival, Fold, RuleContract, as_dense, gaussian

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.perturb_and_merge import PerturbAndMerge
from fedmerge.server.merge.rule import ALONE, Context

SEED = 101
RULE = PerturbAndMerge()
LAYER = LayerSpec("weight", (1, 2), torch.float32, LayerKind.MATRIX)


def flat(rule: PerturbAndMerge, arrival: Arrival) -> tuple[torch.Tensor, torch.Tensor]:
    """A whole task vector and its Fisher, float64."""
    vectors = [as_dense(arrival)[layer.name].values.double().flatten() for layer in LAYERS]
    fishers = [arrival.context(rule, x, 0).statistics["fisher"].double().flatten() for x in LAYERS]
    return torch.cat(vectors), torch.cat(fishers)


def batch(tasks: list[tuple[torch.Tensor, torch.Tensor]], unit_trace: bool = False) -> torch.Tensor:
    """The merged vector with every task's vector and Fisher kept."""
    if unit_trace:
        tasks = [(vector, fisher / fisher.sum()) for vector, fisher in tasks]
    merged = torch.zeros_like(tasks[0][0])
    for seen, (vector, _) in enumerate(tasks, 1):
        step = vector - merged
        slope = -sum(((merged - optimum) * fisher) @ step for optimum, fisher in tasks[:seen])
        bend = sum((step * fisher) @ step for _, fisher in tasks[:seen])
        alpha = (slope / bend).clamp(0, 1) if bend > 0 else 1 / seen
        merged = merged + alpha * step
    return merged


class TestPerturbAndMerge(RuleContract):
    rules = (PerturbAndMerge(), PerturbAndMerge(unit_trace=True))

    def reference(self, rule, arrivals):
        parts = batch([flat(rule, arrival) for arrival in arrivals], rule.unit_trace).split(
            [layer.matrix_shape[0] * layer.matrix_shape[1] for layer in LAYERS]
        )
        return {x.name: part.reshape(x.shape) for x, part in zip(LAYERS, parts, strict=True)}


def absorbed(*arrivals: tuple[list[float], list[float]], merges: int = 0, rule: PerturbAndMerge = RULE):
    """The state after vectors and Fishers of one layer of two weights."""
    state = rule.init(LAYER)
    for place, (values, fisher) in enumerate(arrivals, merges):
        update, statistics = Dense(torch.tensor([values])), {"fisher": torch.tensor([fisher])}
        measured = rule.measure(state, update, Context(place, statistics))
        state = rule.absorb(state, None, update, Context(place, statistics, measured=measured))
    return state


def test_worked_by_hand() -> None:
    """From M = (4, 0) with F = (1, 1) the step to (0, 4) is (-4, 4); with F = (3, 1) of the second,
    A = (4, 2), b = (4, 4), b - A M = (-12, 4): alpha = (48 + 16) / (64 + 32) = 2/3."""
    state = absorbed(([4.0, 0.0], [1.0, 1.0]), ([0.0, 4.0], [3.0, 1.0]))
    torch.testing.assert_close(state.merged_MN, torch.tensor([[4 / 3, 8 / 3]]))
    assert state.curvature_MN.tolist() == [[4.0, 2.0]]
    assert state.weighted_MN.tolist() == [[4.0, 4.0]]


def test_first_vector_is_taken_whole() -> None:
    first = gaussian(SEED)
    merged = Fold(RULE, LAYERS).merge(first).read()
    assert all(torch.equal(merged[name], update.values) for name, update in first.items())


def test_equal_fishers_give_the_average() -> None:
    vectors = [[6.0, 1.0], [2.0, -2.0], [1.0, 4.0], [3.0, 1.0]]
    state = absorbed(*[(vector, [0.5, 0.5]) for vector in vectors])
    torch.testing.assert_close(state.merged_MN, torch.tensor([[3.0, 1.0]]))


def test_no_other_step_raises_the_summed_quadratic_losses_less() -> None:
    tasks = [flat(RULE, gaussian(SEED + task)) for task in range(3)]
    before, after = batch(tasks[:2]), batch(tasks)

    def loss(merged: torch.Tensor) -> float:
        return float(sum(((merged - vector) * fisher) @ (merged - vector) for vector, fisher in tasks))

    step = tasks[2][0] - before
    taken = float((after - before) @ step / (step @ step))
    for other in (taken - 0.01, taken + 0.01):
        assert loss(before + other * step) > loss(after)


@pytest.mark.parametrize("merges", [0, 1, 3])
def test_without_curvature_along_the_step_it_is_an_average(merges: int) -> None:
    state = absorbed(([4.0, 8.0], [0.0, 0.0]), merges=merges)
    torch.testing.assert_close(state.merged_MN, torch.tensor([[4.0, 8.0]]) / (merges + 1))


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-30, 1.0, 2.0**20])
def test_with_unit_traces_a_fishers_size_says_nothing(scale: float) -> None:
    """F = (1/2, 1/2) and then (3/4, 1/4): A = (5/4, 3/4), b = (2, 1), b - A M = (-3, 1), so that
    alpha = (12 + 4) / (20 + 12) = 1/2, however large the second Fisher is."""
    rule = PerturbAndMerge(unit_trace=True)
    second = [3.0 * scale, 1.0 * scale]
    state = absorbed(([4.0, 0.0], [1.0, 1.0]), ([0.0, 4.0], second), rule=rule)
    torch.testing.assert_close(state.merged_MN, torch.tensor([[2.0, 2.0]]))
    assert state.curvature_MN.tolist() == [[1.25, 0.75]]
    assert state.weighted_MN.tolist() == [[2.0, 1.0]]


def test_with_unit_traces_a_task_without_curvature_is_averaged_in() -> None:
    rule = PerturbAndMerge(unit_trace=True)
    state = absorbed(([4.0, 8.0], [0.0, 0.0]), merges=3, rule=rule)
    assert state.merged_MN.tolist() == [[1.0, 2.0]]
    assert not state.curvature_MN.any()


def test_same_vector_again_stays_where_it_is() -> None:
    state = absorbed(*[([4.0, -3.0], [1.0, 2.0])] * 3)
    assert state.merged_MN.tolist() == [[4.0, -3.0]]


def test_tasks_that_pull_back_stop_the_step_at_its_start() -> None:
    """M = (0, 2) after two tasks; the third would move along a step on which both lose more."""
    quadratic = RULE.init(LAYER)
    update = Dense(torch.tensor([[1.0, 0.0]]))
    for slope, wanted in ((-4.0, 0.0), (4.0, 1.0), (0.0, 0.5)):
        measured = torch.tensor([slope, 1.0, 1.0, 2.0])
        context = Context(2, {"fisher": torch.ones(1, 2)}, measured=measured)
        assert RULE.absorb(quadratic, None, update, context).merged_MN.tolist() == [[wanted, 0.0]]


def test_one_alpha_holds_for_the_whole_model() -> None:
    arrivals = [gaussian(SEED), gaussian(SEED + 1)]
    fold = Fold(RULE, LAYERS).merge(arrivals[0])
    before = fold.read()
    after = fold.merge(arrivals[1]).read()
    shares = torch.cat(
        [((after[n] - before[n]) / (arrivals[1][n].values - before[n])).flatten() for n in before]
    )
    torch.testing.assert_close(shares, shares[:1].expand_as(shares), rtol=1e-3, atol=1e-3)


def test_its_fisher_must_be_there() -> None:
    with pytest.raises(KeyError, match="fisher"):
        RULE.measure(RULE.init(LAYER), Dense(torch.zeros(1, 2)), ALONE)


def test_the_largest_statistics_and_weights_that_are_let_in_stay_finite() -> None:
    state = absorbed(([2.0**40, 0.0], [2.0**59, 1.0]), ([0.0, -(2.0**40)], [1.0, 2.0**59]))
    assert state.merged_MN.tolist() == [[2.0**39, -(2.0**39)]]
