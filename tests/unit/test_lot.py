"""LOT merging: least drift of features, elementwise scales, and directions no input has."""

from __future__ import annotations

import pytest
import torch
from rule_contract import SEED, RuleContract
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge.lot import Lot
from fedmerge.server.merge.rule import Context, Totals, tensors_of

MATRIX = LayerSpec("weight", (3, 5), torch.float32, LayerKind.MATRIX)
SCALE = LayerSpec("norm.weight", (3,), torch.float32, LayerKind.VECTOR)
WIDE_SCALE = LayerSpec("norm.weight", (64,), torch.float32, LayerKind.VECTOR)


def merged(rule: Lot, layer: LayerSpec, pairs: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Of task vectors with what was measured of their inputs."""
    state = rule.init(layer)
    for vector, measured in pairs:
        context = Context(statistics={} if measured is None else {"input_gram": measured})
        state = rule.absorb(state, None, Dense(vector), context)
    return rule.read(state, Totals(merges=len(pairs)))


def drawn(tasks: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    return [
        (torch.randn(3, 5, generator=generator), torch.randn(rows, 5, generator=generator))
        for _ in range(tasks)
    ]


class TestLot(RuleContract):
    """The reference filters the eigenvalues of the summed Gram by the ridge."""

    rules = (Lot(), Lot(factor=1.5, ridge=0.01))

    def layer_reference(self, rule, layer, vectors, contexts):
        measured = [context.statistics.get("input_gram") for context in contexts]
        if measured[0] is None:
            return rule.factor * sum(vectors) / len(vectors)
        measured = [values.double() for values in measured]
        if layer.kind is LayerKind.VECTOR:
            weighted = sum(g * d for g, d in zip(measured, vectors, strict=True))
            return rule.factor * weighted / sum(measured)
        inputs = torch.cat(measured)
        outputs = torch.cat([x @ d.T for x, d in zip(measured, vectors, strict=True)])
        left, values, right = torch.linalg.svd(inputs, full_matrices=False)
        ridge = rule.ridge * values.square().sum() / inputs.shape[1]
        filtered = values / (values.square() + ridge)
        return rule.factor * (right.T * filtered @ left.T @ outputs).T


def test_features_of_every_task_drift_least() -> None:
    """No random step away from the merged matrix lowers the summed drift on the tasks' own inputs."""
    pairs = drawn(3, rows=8)
    best = merged(Lot(), MATRIX, pairs).double()

    def drift(at: Tensor) -> float:
        return float(sum((x.double() @ (at - d).T).square().sum() for d, x in pairs))

    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = torch.randn(3, 5, generator=generator, dtype=torch.float64)
        assert drift(best) < min(drift(best + 1e-2 * step), drift(best - 1e-2 * step))


def test_few_samples_each_keep_every_task_on_its_own_inputs() -> None:
    """Two tasks of two samples in five dimensions: both sets of features are met exactly."""
    pairs = drawn(2, rows=2)
    found = merged(Lot(), MATRIX, pairs)
    for vector, inputs in pairs:
        torch.testing.assert_close(inputs @ found.T, inputs @ vector.T, rtol=1e-3, atol=1e-3)


def test_directions_no_input_has_are_left_as_in_the_base() -> None:
    pairs = drawn(2, rows=2)
    found = merged(Lot(), MATRIX, pairs)
    unseen = torch.linalg.svd(torch.cat([x for _, x in pairs])).Vh[4]
    assert float((found @ unseen).norm()) < 1e-5 * float(found.norm())


def test_larger_ridge_takes_more_directions_for_unseen() -> None:
    sizes = [float(merged(Lot(ridge=ridge), MATRIX, drawn(2, 9)).norm()) for ridge in (1e-6, 1e-2, 1.0)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_scales_are_weighed_by_their_mean_squared_inputs() -> None:
    pairs = [
        (torch.tensor([1.0, 1.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])),
        (torch.tensor([5.0, 7.0, 9.0]), torch.tensor([3.0, 2.0, 0.0])),
    ]
    assert merged(Lot(), SCALE, pairs).tolist() == [[4.0, 7.0, 0.0]]


def test_shifts_and_layers_without_measured_inputs_are_averaged() -> None:
    pairs = [(torch.tensor([1.0, 2.0, 3.0]), None), (torch.tensor([3.0, 2.0, 5.0]), None)]
    assert merged(Lot(), SCALE, pairs).tolist() == [[2.0, 2.0, 4.0]]
    vectors = [(vector, None) for vector, _ in drawn(2, 1)]
    mean = (vectors[0][0] + vectors[1][0]) / 2
    torch.testing.assert_close(merged(Lot(), MATRIX, vectors), mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", [MATRIX, WIDE_SCALE], ids=lambda layer: layer.name)
def test_layer_whose_tasks_were_all_taken_out_is_the_bases_again(layer: LayerSpec) -> None:
    """Another task, which does not bring the layer, is still there: what is left is rounding alone."""
    rule, generator = Lot(), torch.Generator().manual_seed(SEED)
    inputs = (7, 5) if layer is MATRIX else layer.shape
    updates = [
        (
            Dense(torch.randn(layer.shape, generator=generator)),
            Context(statistics={"input_gram": torch.rand(inputs, generator=generator) * 1e-5**task}),
        )
        for task in range(3)
    ]
    state = rule.init(layer)
    for update, context in updates:
        state = rule.absorb(state, None, update, context)
    for update, context in updates:
        state = rule.remove(state, update, context)
    assert any(float(tensor.abs().max()) > 0 for tensor in tensors_of(state).values())
    assert float(rule.read(state, Totals(merges=1)).abs().max()) < 1e-5


@pytest.mark.parametrize("layer", [MATRIX, SCALE], ids=lambda layer: layer.name)
def test_factor_multiplies_all_layers(layer: LayerSpec) -> None:
    pairs = [(torch.ones(layer.shape), None)]
    twice = merged(Lot(factor=2.0), layer, pairs)
    torch.testing.assert_close(twice, 2 * merged(Lot(), layer, pairs))


@pytest.mark.parametrize("options", [{"factor": -0.1}, {"factor": 2.1}, {"ridge": 0.0}, {"ridge": 1.1}])
def test_options_outside_their_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Lot(**options)
