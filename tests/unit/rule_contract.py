"""What every merge rule must do, as one test class; ``test_rule_contract.py`` runs it for each rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod

import pytest
import torch
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank
from fedmerge.server.merge.rule import LayerSums, Rule, State, Totals, tensors_of

SEED = 20250919

LAYERS = (
    LayerSpec("square.weight", (12, 12), torch.float32, LayerKind.MATRIX),
    LayerSpec("tall.weight", (20, 8), torch.float32, LayerKind.MATRIX),
    LayerSpec("wide.weight", (8, 20), torch.float32, LayerKind.MATRIX),
    LayerSpec("conv.weight", (6, 3, 2, 2), torch.float32, LayerKind.MATRIX),
    LayerSpec("row.weight", (1, 9), torch.float32, LayerKind.MATRIX),
    LayerSpec("norm.bias", (12,), torch.float32, LayerKind.VECTOR),
    LayerSpec("position.weight", (4, 5), torch.float32, LayerKind.VECTOR),
)

Arrival = Mapping[str, LayerUpdate]


@dataclass
class Fold:
    """A rule run over arrivals by hand, without an engine: the states and the global scalars."""

    rule: Rule
    layers: Sequence[LayerSpec]

    def __post_init__(self) -> None:
        self.states: dict[str, State] = {layer.name: self.rule.init(layer) for layer in self.layers}
        self.totals = Totals()

    def merge(self, *arrivals: Arrival) -> Fold:
        for arrival in arrivals:
            sums = [self._absorb(layer.name, arrival) for layer in self.layers]
            self.totals = self.totals.after(sums)
        return self

    def read(self) -> dict[str, Tensor]:
        shapes = {layer.name: layer.shape for layer in self.layers}
        return {n: self.rule.read(s, self.totals).reshape(shapes[n]) for n, s in self.states.items()}

    def state_bytes(self) -> dict[str, int]:
        return {
            name: sum(t.nbytes for t in tensors_of(state).values()) for name, state in self.states.items()
        }

    def _absorb(self, name: str, arrival: Arrival) -> LayerSums:
        state = self.states[name]
        state = self.states[name] = self.rule.absorb(state, self.rule.prepare(state), arrival[name])
        return LayerSums(arrival[name].sum_of_squares(), state.sum_of_squares())


def gaussian(seed: int, layers: Sequence[LayerSpec] = LAYERS, rank: int | None = None) -> dict[str, Dense]:
    """One dense arrival; with ``rank``, matrices of that rank."""
    generator = torch.Generator().manual_seed(seed)
    return {layer.name: Dense(_values(layer, rank, generator)) for layer in layers}


def factored(seed: int, rank: int, layers: Sequence[LayerSpec] = LAYERS) -> dict[str, LayerUpdate]:
    """One arrival whose layers of two and more dimensions are factors; embeddings too, as with peft."""
    generator = torch.Generator().manual_seed(seed)
    arrival: dict[str, LayerUpdate] = {}
    for layer in layers:
        rows, columns = layer.shape[0], prod(layer.shape[1:])
        left = torch.randn(rows, rank, generator=generator)
        update = LowRank(left, torch.randn(rank, columns, generator=generator), layer.shape)
        arrival[layer.name] = update if len(layer.shape) > 1 else Dense(update.to_dense())
    return arrival


def as_dense(arrival: Arrival) -> dict[str, Dense]:
    """The same arrival multiplied out, in float64 and rounded once."""
    return {name: Dense(_product(update)) for name, update in arrival.items()}


def zero(layers: Sequence[LayerSpec] = LAYERS) -> dict[str, Dense]:
    return {layer.name: Dense(torch.zeros(layer.shape)) for layer in layers}


def relative_difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Over all layers as if concatenated; absolute where the wanted one is zero."""
    off = sum(float((got[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    size = sum(float(wanted[name].double().square().sum()) for name in wanted)
    return (off / (size or 1.0)) ** 0.5


def copies(holder: object) -> list[Tensor]:
    """Copies of all tensors in a dataclass, nested ones included."""
    if isinstance(holder, Tensor):
        return [holder.clone()]
    return (
        [t for f in fields(holder) for t in copies(getattr(holder, f.name))] if _is_dataclass(holder) else []
    )


class RuleContract:
    """Subclass with a ``rule`` fixture."""

    @pytest.fixture
    def arrivals(self) -> list[dict[str, Dense]]:
        return [gaussian(SEED + task) for task in range(4)]

    def test_nothing_merged_reads_as_zero(self, rule: Rule) -> None:
        assert all(not vector.any() for vector in Fold(rule, LAYERS).read().values())

    def test_one_task_reads_as_a_multiple_of_itself(self, rule: Rule, arrivals: list[Arrival]) -> None:
        fold = Fold(rule, LAYERS).merge(arrivals[0])
        factor = rule.scale(fold.totals)
        assert factor > 0
        wanted = {name: update.to_dense() * factor for name, update in arrivals[0].items()}
        assert relative_difference(fold.read(), wanted) < 1e-6

    def test_vectors_are_float32_in_every_layer_shape(self, rule: Rule, arrivals: list[Arrival]) -> None:
        merged = Fold(rule, LAYERS).merge(*arrivals).read()
        assert {name: tuple(t.shape) for name, t in merged.items()} == {x.name: x.shape for x in LAYERS}
        assert {t.dtype for t in merged.values()} == {torch.float32}
        assert all(bool(torch.isfinite(t).all()) for t in merged.values())

    @pytest.mark.parametrize("place", [0, 2, 4])
    def test_zero_vector_changes_the_scale_alone(
        self, rule: Rule, arrivals: list[Arrival], place: int
    ) -> None:
        fold = Fold(rule, LAYERS).merge(*arrivals[:place], zero(), *arrivals[place:])
        without = Fold(rule, LAYERS).merge(*arrivals)
        ratio = rule.scale(fold.totals) / rule.scale(without.totals)
        wanted = {name: vector * ratio for name, vector in without.read().items()}
        assert relative_difference(fold.read(), wanted) < 1e-5

    def test_duplicate_vector_keeps_the_direction_finite(self, rule: Rule, arrivals: list[Arrival]) -> None:
        merged = Fold(rule, LAYERS).merge(arrivals[0], arrivals[0]).read()
        assert all(bool(torch.isfinite(t).all()) for t in merged.values())
        one = torch.cat([update.values.flatten() for update in arrivals[0].values()])
        two = torch.cat([merged[name].flatten() for name in arrivals[0]])
        assert float(torch.nn.functional.cosine_similarity(one, two, dim=0)) > 0.8

    def test_order_does_not_matter_where_the_rule_says_so(self, rule: Rule, arrivals: list[Arrival]) -> None:
        there = Fold(rule, LAYERS).merge(*arrivals).read()
        back = Fold(rule, LAYERS).merge(*reversed(arrivals)).read()
        assert (relative_difference(there, back) < 1e-6) is rule.order_free

    def test_rank_deficient_vectors_merge_the_same_when_recomputed(self, rule: Rule) -> None:
        deficient = [gaussian(SEED + task, rank=2) for task in range(4)]
        merged = Fold(rule, LAYERS).merge(*deficient).read()
        torch.manual_seed(SEED)
        nudged = [
            {n: Dense(u.values * (1 + 1e-7 * torch.randn(u.values.shape))) for n, u in a.items()}
            for a in deficient
        ]
        assert relative_difference(Fold(rule, LAYERS).merge(*nudged).read(), merged) < 1e-4

    @pytest.mark.parametrize("tasks", [1, 2, 4, 8])
    def test_low_rank_input_equals_dense_input(self, rule: Rule, tasks: int) -> None:
        arrivals = [factored(SEED + task, rank=1) for task in range(tasks)]
        merged = Fold(rule, LAYERS).merge(*arrivals).read()
        dense = Fold(rule, LAYERS).merge(*map(as_dense, arrivals)).read()
        assert relative_difference(merged, dense) < 1e-5

    @pytest.mark.parametrize("make", [lambda seed: gaussian(seed), lambda seed: factored(seed, rank=1)])
    def test_absorb_and_read_leave_their_arguments_unchanged(self, rule: Rule, make) -> None:
        fold = Fold(rule, LAYERS).merge(make(SEED), make(SEED + 1))
        arrival = make(SEED + 2)
        for name, state in fold.states.items():
            prepared = rule.prepare(state)
            held = (state, prepared, arrival[name])
            before = [copies(x) for x in held]
            rule.absorb(*held)
            rule.read(state, fold.totals)
            for was, now in zip(before, [copies(x) for x in held], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(was, now, strict=True)), name

    def test_state_is_as_large_after_32_tasks_as_after_4(self, rule: Rule) -> None:
        fold = Fold(rule, LAYERS).merge(*[gaussian(SEED + task) for task in range(4)])
        at_4 = fold.state_bytes()
        assert fold.merge(*[gaussian(SEED + task) for task in range(4, 32)]).state_bytes() == at_4

    def test_low_rank_state_never_outgrows_the_dense_one(self, rule: Rule) -> None:
        dense = Fold(rule, LAYERS).merge(gaussian(SEED)).state_bytes()
        fold = Fold(rule, LAYERS)
        for task in range(12):
            held = fold.merge(factored(SEED + task, rank=1)).state_bytes()
            assert all(held[name] <= dense[name] for name in held), (task, held)

    @pytest.mark.parametrize("make", [lambda seed: gaussian(seed), lambda seed: factored(seed, rank=1)])
    def test_state_rebuilt_from_its_tensors_merges_to_the_same_bits(self, rule: Rule, make) -> None:
        fold = Fold(rule, LAYERS).merge(make(SEED), make(SEED + 1))
        again = Fold(rule, LAYERS)
        again.totals = fold.totals
        for name, state in fold.states.items():
            saved = {field: tensor.clone() for field, tensor in tensors_of(state).items()}
            again.states[name] = type(state)(**saved)
        one, two = fold.merge(make(SEED + 2)).read(), again.merge(make(SEED + 2)).read()
        assert all(torch.equal(one[name], two[name]) for name in one)

    def test_options_round_trip_and_unknown_ones_are_refused(self, rule: Rule) -> None:
        assert type(rule).model_validate(rule.model_dump()) == rule
        with pytest.raises(ValueError, match="no_such_option"):
            type(rule).model_validate({"no_such_option": 1})


def _values(layer: LayerSpec, rank: int | None, generator: torch.Generator) -> Tensor:
    if rank is None or layer.kind is not LayerKind.MATRIX:
        return torch.randn(layer.shape, generator=generator)
    rows, columns = layer.matrix_shape
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    return (left @ right).float().reshape(layer.shape)


def _product(update: LayerUpdate) -> Tensor:
    if isinstance(update, Dense):
        return update.values
    return (update.left_MR.double() @ update.right_RN.double()).float().reshape(update.shape)


def _is_dataclass(holder: object) -> bool:
    return hasattr(holder, "__dataclass_fields__")
