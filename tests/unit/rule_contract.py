"""What every merge rule must do, as one test class; every rule's own test file runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any, ClassVar
from zlib import crc32

import pytest
import torch
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.statistics import OF_INPUTS
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank
from fedmerge.server.merge.rule import Context, LayerSums, Rule, State, Totals, tensors_of

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


class Arrival(dict[str, LayerUpdate]):
    """One update by layer, with what a site would send along and the seed an engine would give it; ``step``
    if it is measured from the merged model."""

    def __init__(self, layers: Mapping[str, LayerUpdate], seed: int = 0, step: bool = False) -> None:
        super().__init__(layers)
        self.seed, self.step = seed, step

    def context(self, rule: Rule, layer: LayerSpec, merges: int, measured: Tensor | None = None) -> Context:
        seed = self.seed * 1009 + crc32(layer.name.encode())
        return Context(merges, statistics(rule.needs, layer, seed), seed, measured, self.step)


def statistics(needs: Iterable[str], layer: LayerSpec, seed: int) -> dict[str, Tensor]:
    """Made-up statistics of one layer: curvatures, and for matrices a Gram's factor of nearly full rank and a
    sketch of rank 2."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in sorted(needs):
        if layer.kind is LayerKind.MATRIX and name in OF_INPUTS:
            found[name] = _of_inputs(name, layer.matrix_shape[1], generator)
        elif name not in OF_INPUTS or (name == "input_gram" and len(layer.shape) == 1):
            found[name] = torch.rand(layer.shape, generator=generator) + 0.1
    return found


def _of_inputs(name: str, columns: int, generator: torch.Generator) -> Tensor:
    if name == "input_gram":
        return torch.randn(max(columns - 1, 1), columns, generator=generator)
    if name == "sketch":
        left = torch.randn(columns, 2, generator=generator)
        return left @ torch.randn(2, columns, generator=generator)
    return 0.4 + 0.6 * torch.rand(1, generator=generator)


@dataclass
class Fold:
    """A rule run over arrivals by hand, without an engine: the states and the global scalars."""

    rule: Rule
    layers: Sequence[LayerSpec]

    def __post_init__(self) -> None:
        self.states: dict[str, State] = {layer.name: self.rule.init(layer) for layer in self.layers}
        self.totals = Totals()

    def merge(self, *arrivals: Mapping[str, LayerUpdate]) -> Fold:
        for arrival in map(as_arrival, arrivals):
            measured = self._measured(arrival)
            sums = [self._absorb(layer, arrival, measured) for layer in self.layers]
            self.totals = self.totals.after(sums)
        return self

    def remove(self, given: Mapping[str, LayerUpdate]) -> Fold:
        arrival = as_arrival(given)
        measured = self._measured(arrival)
        sums = []
        for layer in self.layers:
            context = arrival.context(self.rule, layer, self.totals.merges, measured)
            state = self.rule.remove(self.states[layer.name], arrival[layer.name], context)
            self.states[layer.name] = state
            sums.append(LayerSums(arrival[layer.name].sum_of_squares(), state.sum_of_squares()))
        self.totals = self.totals.before(sums)
        return self

    def read(self) -> dict[str, Tensor]:
        shapes = {layer.name: layer.shape for layer in self.layers}
        return {n: self.rule.read(s, self.totals).reshape(shapes[n]) for n, s in self.states.items()}

    def state_bytes(self) -> dict[str, int]:
        return {
            name: sum(t.nbytes for t in tensors_of(state).values()) for name, state in self.states.items()
        }

    def _measured(self, arrival: Arrival) -> Tensor | None:
        if not self.rule.measures:
            return None
        parts = [
            self.rule.measure(
                self.states[x.name], arrival[x.name], arrival.context(self.rule, x, self.totals.merges)
            )
            for x in self.layers
        ]
        return sum(parts[1:], start=parts[0])

    def _absorb(self, layer: LayerSpec, arrival: Arrival, measured: Tensor | None) -> LayerSums:
        state, update = self.states[layer.name], arrival[layer.name]
        context = arrival.context(self.rule, layer, self.totals.merges, measured)
        state = self.rule.absorb(state, self.rule.prepare(state), update, context)
        self.states[layer.name] = state
        return LayerSums(update.sum_of_squares(), state.sum_of_squares())


def as_arrival(given: Mapping[str, LayerUpdate]) -> Arrival:
    return given if isinstance(given, Arrival) else Arrival(given)


def gaussian(seed: int, layers: Sequence[LayerSpec] = LAYERS, rank: int | None = None) -> Arrival:
    """One dense arrival; with ``rank``, matrices of that rank."""
    generator = torch.Generator().manual_seed(seed)
    return Arrival({layer.name: Dense(_values(layer, rank, generator)) for layer in layers}, seed)


def factored(seed: int, rank: int, layers: Sequence[LayerSpec] = LAYERS) -> Arrival:
    """One arrival whose layers of two and more dimensions are factors; embeddings too, as with peft."""
    generator = torch.Generator().manual_seed(seed)
    arrival: dict[str, LayerUpdate] = {}
    for layer in layers:
        rows, columns = layer.shape[0], prod(layer.shape[1:])
        left = torch.randn(rows, rank, generator=generator)
        update = LowRank(left, torch.randn(rank, columns, generator=generator), layer.shape)
        arrival[layer.name] = update if len(layer.shape) > 1 else Dense(update.to_dense())
    return Arrival(arrival, seed)


def as_dense(given: Mapping[str, LayerUpdate]) -> Arrival:
    """The same arrival multiplied out, in float64 and rounded once."""
    arrival = as_arrival(given)
    return Arrival({name: Dense(_product(update)) for name, update in arrival.items()}, arrival.seed)


def in_float64(arrival: Arrival) -> Arrival:
    return Arrival({n: Dense(u.to_dense().double()) for n, u in arrival.items()}, arrival.seed)


def zero(layers: Sequence[LayerSpec] = LAYERS) -> Arrival:
    return Arrival({layer.name: Dense(torch.zeros(layer.shape)) for layer in layers})


def relative_difference(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> float:
    """Over all layers as if concatenated; absolute where the wanted one is zero."""
    off = sum(float((got[name].double() - wanted[name].double()).square().sum()) for name in wanted)
    size = sum(float(wanted[name].double().square().sum()) for name in wanted)
    return (off / (size or 1.0)) ** 0.5


def copies(holder: object) -> list[Tensor]:
    """Copies of all tensors in a dataclass, nested ones included."""
    if isinstance(holder, Tensor):
        return [holder.clone()]
    if isinstance(holder, Mapping):
        return [t for held in holder.values() for t in copies(held)]
    return (
        [t for f in fields(holder) for t in copies(getattr(holder, f.name))] if _is_dataclass(holder) else []
    )


STREAMS: dict[str, Callable[[], list[Arrival]]] = {
    "one task": lambda: [gaussian(SEED)],
    "two tasks": lambda: [gaussian(SEED), gaussian(SEED + 1)],
    "six tasks": lambda: [gaussian(SEED + task) for task in range(6)],
    "more tasks than rank": lambda: [gaussian(SEED + task) for task in range(11)],
    "the same twice": lambda: [gaussian(SEED), gaussian(SEED), gaussian(SEED + 1)],
    "zero first": lambda: [zero(), gaussian(SEED), gaussian(SEED + 1)],
    "zero in between": lambda: [gaussian(SEED), zero(), gaussian(SEED + 1)],
    "zero last": lambda: [gaussian(SEED), gaussian(SEED + 1), zero()],
    "only zeros": lambda: [zero(), zero()],
    "rank deficient": lambda: [gaussian(SEED + task, rank=2) for task in range(4)],
    "factors": lambda: [factored(SEED + task, rank=2) for task in range(3)],
}


class RuleContract:
    """Subclass once per rule, with the ``rules`` to run (the defaults, and options that change the path),
    and a slow reference in float64 that sees all vectors at once.

    ``tolerance`` bounds the distance to the reference, relative to its size over all layers;
    ``nudged`` the change of the result when inputs of deficient rank move by 1e-7 of themselves.
    """

    rules: ClassVar[Sequence[Rule]]
    tolerance: ClassVar[float] = 1e-5
    nudged: ClassVar[float] = 1e-4

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "rule" in metafunc.fixturenames:
            metafunc.parametrize("rule", self.rules, ids=repr)

    def layer_reference(
        self, rule: Any, layer: LayerSpec, vectors: Sequence[Tensor], contexts: Sequence[Context]
    ) -> Tensor:
        """The merged vector of one layer from all its vectors, (M, N) in float64 as
        :attr:`LayerSpec.matrix_shape` says."""
        raise NotImplementedError

    def reference(self, rule: Any, arrivals: Sequence[Arrival]) -> dict[str, Tensor]:
        """The merged model; override where layers depend on each other."""
        found = {}
        for layer in LAYERS:
            vectors = [_product(a[layer.name]).double().reshape(layer.matrix_shape) for a in arrivals]
            contexts = [arrival.context(rule, layer, place) for place, arrival in enumerate(arrivals)]
            merged = self.layer_reference(rule, layer, vectors, contexts)
            found[layer.name] = merged.reshape(layer.shape)
        return found

    @pytest.fixture
    def arrivals(self) -> list[Arrival]:
        return [gaussian(SEED + task) for task in range(4)]

    def test_nothing_merged_reads_as_zero(self, rule: Rule) -> None:
        assert all(not vector.any() for vector in Fold(rule, LAYERS).read().values())

    @pytest.mark.parametrize("stream", STREAMS)
    def test_equals_the_reference_in_float64(self, rule: Rule, stream: str) -> None:
        arrivals = STREAMS[stream]()
        merged = Fold(rule, LAYERS).merge(*arrivals).read()
        assert relative_difference(merged, self.reference(rule, arrivals)) < self.tolerance

    def test_vectors_are_float32_in_every_layer_shape(self, rule: Rule, arrivals: list[Arrival]) -> None:
        merged = Fold(rule, LAYERS).merge(*arrivals).read()
        assert {name: tuple(t.shape) for name, t in merged.items()} == {x.name: x.shape for x in LAYERS}
        assert {t.dtype for t in merged.values()} == {torch.float32}
        assert all(bool(torch.isfinite(t).all()) for t in merged.values())

    def test_order_does_not_matter_where_the_rule_says_so(self, rule: Rule, arrivals: list[Arrival]) -> None:
        there = Fold(rule, LAYERS).merge(*arrivals).read()
        back = Fold(rule, LAYERS).merge(*reversed(arrivals)).read()
        turned = Fold(rule, LAYERS).merge(*arrivals[2:], *arrivals[:2]).read()
        off = max(relative_difference(there, back), relative_difference(there, turned))
        assert (off < self.tolerance) is rule.order_free

    def test_only_rules_free_of_order_are_sums(self, rule: Rule) -> None:
        assert rule.order_free or not rule.additive

    def test_what_is_taken_out_was_never_there(self, rule: Rule, arrivals: list[Arrival]) -> None:
        a, b, c, _ = arrivals
        if not rule.additive:
            with pytest.raises(NotImplementedError, match=rule.name):
                Fold(rule, LAYERS).merge(a, b).remove(b)
            return
        removed = Fold(rule, LAYERS).merge(a, b, c).remove(b).read()
        assert relative_difference(removed, Fold(rule, LAYERS).merge(a, c).read()) < self.tolerance

    def test_what_is_taken_out_leaves_nothing_in_float64(self, rule: Rule, arrivals: list[Arrival]) -> None:
        if rule.additive:
            a, b, c = map(in_float64, arrivals[:3])
            removed = Fold(rule, LAYERS).merge(a, b, c).remove(b)
            wanted = Fold(rule, LAYERS).merge(a, c)
            for name, state in wanted.states.items():
                for field, tensor in tensors_of(state).items():
                    found = tensors_of(removed.states[name])[field]
                    torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-9, msg=f"{name}.{field}")

    def test_the_step_to_a_vector_merges_like_the_vector(self, rule: Rule, arrivals: list[Arrival]) -> None:
        if not rule.steps:
            return
        vectors, steps = Fold(rule, LAYERS), Fold(rule, LAYERS)
        for arrival in arrivals:
            merged = steps.read()
            way = {name: Dense(update.to_dense() - merged[name]) for name, update in arrival.items()}
            steps.merge(Arrival(way, arrival.seed, step=True))
        assert relative_difference(steps.read(), vectors.merge(*arrivals).read()) < self.tolerance

    def test_adjusting_moves_the_merged_model_and_nothing_else(
        self, rule: Rule, arrivals: list[Arrival]
    ) -> None:
        a, b, c, change = arrivals
        if not rule.steps:
            with pytest.raises(NotImplementedError, match=rule.name):
                rule.adjust(rule.init(LAYERS[0]), a[LAYERS[0].name])
            return
        fold = Fold(rule, LAYERS).merge(a, b)
        before = fold.read()
        fold.states = {name: rule.adjust(state, change[name]) for name, state in fold.states.items()}
        wanted = {name: before[name] + change[name].to_dense() for name in before}
        assert relative_difference(fold.read(), wanted) < 1e-6
        back = {n: rule.adjust(s, change[n].times(-1.0)) for n, s in fold.states.items()}
        fold.states = back
        assert relative_difference(fold.merge(c).read(), Fold(rule, LAYERS).merge(a, b, c).read()) < 1e-4

    def test_rank_deficient_vectors_merge_the_same_when_recomputed(self, rule: Rule) -> None:
        deficient = [gaussian(SEED + task, rank=2) for task in range(4)]
        merged = Fold(rule, LAYERS).merge(*deficient).read()
        torch.manual_seed(SEED)
        nudged = [
            Arrival(
                {n: Dense(u.to_dense() * (1 + 1e-7 * torch.randn(u.shape))) for n, u in a.items()}, a.seed
            )
            for a in deficient
        ]
        assert relative_difference(Fold(rule, LAYERS).merge(*nudged).read(), merged) < self.nudged

    @pytest.mark.parametrize("tasks", [1, 2, 4, 8])
    def test_low_rank_input_equals_dense_input(self, rule: Rule, tasks: int) -> None:
        arrivals = [factored(SEED + task, rank=1) for task in range(tasks)]
        merged = Fold(rule, LAYERS).merge(*arrivals).read()
        dense = Fold(rule, LAYERS).merge(*map(as_dense, arrivals)).read()
        assert relative_difference(merged, dense) < self.tolerance

    @pytest.mark.parametrize("make", [lambda seed: gaussian(seed), lambda seed: factored(seed, rank=1)])
    def test_absorb_and_read_leave_their_arguments_unchanged(self, rule: Rule, make) -> None:
        fold = Fold(rule, LAYERS).merge(make(SEED), make(SEED + 1))
        arrival = make(SEED + 2)
        measured = fold._measured(arrival)
        for layer in LAYERS:
            name, state = layer.name, fold.states[layer.name]
            prepared = rule.prepare(state)
            held = (state, prepared, arrival[name], arrival.context(rule, layer, 2, measured))
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
