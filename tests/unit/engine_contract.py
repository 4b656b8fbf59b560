"""What every engine must do, as one test class; ``test_engine_contract.py`` runs it for each engine."""

from __future__ import annotations

import gc
import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedmerge.common.errors import EngineError, FedmergeError, NonFinite, UnknownLayer
from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.statistics import Statistic, Statistics
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank, TaskVector
from fedmerge.server.engine.engine import Act, Engine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.rule import LayerSums, Rule, State, Totals

SEED = 20250920

LAYERS = (
    LayerSpec("norm.bias", (24,), torch.float32, LayerKind.VECTOR),
    LayerSpec("square.weight", (24, 24), torch.float32, LayerKind.MATRIX),
    LayerSpec("tall.weight", (40, 12), torch.float32, LayerKind.MATRIX),
    LayerSpec("wide.weight", (12, 40), torch.bfloat16, LayerKind.MATRIX),
    LayerSpec("conv.weight", (8, 3, 3, 3), torch.float32, LayerKind.MATRIX),
    LayerSpec("position.weight", (6, 5), torch.float32, LayerKind.VECTOR),
)
NOT_MERGED = (
    LayerSpec("head.weight", (5, 24), torch.float32, LayerKind.PRIVATE),
    LayerSpec("steps", (1,), torch.int64, LayerKind.CONSTANT),
)
NAMES = tuple(layer.name for layer in LAYERS)

RULES = [("opcm", {}), ("opcm", {"diagonal": "left"}), ("average", {}), ("task_arithmetic", {"factor": 1.0})]

STEPPING = ("fedavg", "fot", "fot_gram", "perturb_and_merge", "holistic")
"""Rules whose merged model can be moved."""

MakeEngine = Callable[..., Engine]


class Reference:
    """The rule run by hand, layer by layer over a dict: what any engine must give, bit for bit."""

    def __init__(self, rule: Rule, layers: Sequence[LayerSpec] = LAYERS) -> None:
        self.rule, self.layers = rule, {layer.name: layer for layer in layers}
        self.states: dict[str, State] = {layer.name: rule.init(layer) for layer in layers}
        self.totals = Totals()

    def merge(self, *updates: TaskVector) -> Reference:
        for update in updates:
            sums = []
            for name, state in self.states.items():
                brought = update.read(name) if name in update.names else None
                if brought is not None:
                    state = self.states[name] = self.rule.absorb(state, self.rule.prepare(state), brought)
                sums.append(LayerSums(brought.sum_of_squares() if brought else 0.0, state.sum_of_squares()))
            self.totals = self.totals.after(sums)
        return self

    def read(self) -> dict[str, Tensor]:
        return {
            name: self.rule.read(state, self.totals).reshape(self.layers[name].shape)
            for name, state in self.states.items()
        }


def vector(
    seed: int,
    layers: Sequence[LayerSpec] = LAYERS,
    *,
    rank: int | None = None,
    without: Sequence[str] = (),
) -> TaskVector:
    """A random task vector; with ``rank`` its matrices are factors."""
    generator = torch.Generator().manual_seed(SEED + seed)
    held: dict[str, LayerUpdate] = {}
    for layer in layers:
        dense = torch.randn(layer.shape, generator=generator)
        rows, columns = layer.matrix_shape
        left = torch.randn(rows, rank or 1, generator=generator)
        right = torch.randn(rank or 1, columns, generator=generator)
        factors = rank is not None and layer.kind is LayerKind.MATRIX
        held[layer.name] = LowRank(left, right, layer.shape) if factors else Dense(dense)
    brought = {name: update for name, update in held.items() if name not in without}
    return TaskVector.of(brought, without, label=f"vector {seed}")


def telling(update: TaskVector, seed: int = 0) -> TaskVector:
    """The same vector with every kind of statistic of every layer that can have it."""
    generator = torch.Generator().manual_seed(SEED + seed)
    held: dict[str, dict[str, Tensor]] = {}
    for name in update.names:
        layer = next(layer for layer in LAYERS if layer.name == name)
        columns = layer.matrix_shape[1]
        held[name] = {
            key: torch.rand(layer.shape, generator=generator) for key in ("fisher", "second_moment")
        }
        if layer.kind is LayerKind.MATRIX:
            sketch = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -3, columns)
            held[name] |= {"sketch": sketch, "residual": torch.ones(1), "input_gram": sketch[:5]}
    manifest = replace(update.manifest, statistics=tuple(sorted(Statistic)))
    return replace(update, manifest=manifest, statistics=Statistics.of(held))


def failing(update: TaskVector, at: str, error: BaseException) -> TaskVector:
    """The same vector, except that reading one layer raises."""

    def read(name: str) -> LayerUpdate:
        if name == at:
            raise error
        return update.read(name)

    return replace(update, read=read, label="failing vector")


def strided(update: TaskVector) -> TaskVector:
    """The same values in memory that is not contiguous, as slices and transposes of tensors are."""

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]

    def relaid(layer: LayerUpdate) -> LayerUpdate:
        if isinstance(layer, LowRank):
            return LowRank(layer.left_MR.T.contiguous().T, spread(layer.right_RN), layer.shape)
        values = layer.values
        return Dense(values.T.contiguous().T if values.dim() == 2 else spread(values))

    return TaskVector.of({name: relaid(layer) for name, layer in update.items()}, label="strided vector")


def digest(engine: Engine) -> str:
    """SHA-256 over the merged layers' names, shapes and bits."""
    total = hashlib.sha256()
    for name, layer in engine.merged().items():
        values = layer.to_dense().contiguous()
        total.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        total.update(values.numpy().tobytes())
    return total.hexdigest()


def assert_same(engine: Engine, reference: Reference) -> None:
    """Totals and every merged bit."""
    assert engine.totals == reference.totals
    assert_same_bits({name: engine.read_layer(name) for name in engine.layers}, reference.read())


def assert_same_bits(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    different = [name for name in wanted if not torch.equal(got[name], wanted[name])]
    assert not different, f"other bits in {different}"


class EngineContract:
    """Subclass with a ``make_engine`` fixture: ``make_engine(rule, layers) -> Engine``."""

    @pytest.fixture(params=RULES, ids=lambda p: "-".join([p[0], *(f"{k}={v}" for k, v in p[1].items())]))
    def rule(self, request: pytest.FixtureRequest) -> Rule:
        return make_rule(*request.param)

    @pytest.fixture
    def engine(self, make_engine: MakeEngine) -> Engine:
        return make_engine(make_rule("opcm"), LAYERS)

    @pytest.fixture
    def reference(self) -> Reference:
        return Reference(make_rule("opcm"))

    def test_nothing_merged_lists_every_layer_as_unchanged(self, engine: Engine) -> None:
        merged = engine.merged()
        assert (merged.names, merged.unchanged) == ((), NAMES)
        assert engine.totals == Totals()
        assert all(not engine.read_layer(name).any() for name in NAMES)

    def test_merging_gives_the_rules_own_bits(self, make_engine: MakeEngine, rule: Rule) -> None:
        engine, reference = make_engine(rule, LAYERS), Reference(rule)
        for seed in range(4):
            returned = engine.merge(vector(seed))
            assert returned == engine.totals
            assert_same(engine, reference.merge(vector(seed)))

    def test_low_rank_updates_give_the_rules_own_bits(self, make_engine: MakeEngine, rule: Rule) -> None:
        engine, reference = make_engine(rule, LAYERS), Reference(rule)
        for update in (vector(0, rank=1), vector(1, rank=1), vector(2), vector(3, rank=3)):
            engine.merge(update)
            assert_same(engine, reference.merge(update))

    @pytest.mark.parametrize("rank", [None, 1])
    def test_memory_layout_of_an_update_does_not_change_the_bits(
        self, engine: Engine, reference: Reference, rank: int | None
    ) -> None:
        for seed in range(3):
            engine.merge(strided(vector(seed, rank=rank)))
        assert_same(engine, reference.merge(*[vector(seed, rank=rank) for seed in range(3)]))

    def test_merged_layers_come_in_the_bases_order_shape_and_float32(self, engine: Engine) -> None:
        shuffled = vector(0)
        engine.merge(replace(shuffled, names=shuffled.names[::-1]))
        merged = engine.merged()
        assert merged.names == NAMES
        read = {name: layer.to_dense() for name, layer in merged.items()}
        assert {name: tuple(t.shape) for name, t in read.items()} == {x.name: x.shape for x in LAYERS}
        assert {t.dtype for t in read.values()} == {torch.float32}

    def test_private_and_constant_layers_are_not_held(self, make_engine: MakeEngine) -> None:
        engine = make_engine(make_rule("average"), (*LAYERS, *NOT_MERGED))
        assert tuple(engine.layers) == NAMES
        with pytest.raises(UnknownLayer, match=r"'head\.weight'"):
            engine.merge(vector(0, NOT_MERGED[:1]))

    def test_layers_missing_from_an_update_stay_but_count_for_the_norm(self, make_engine: MakeEngine) -> None:
        rule = make_rule("task_arithmetic", {"factor": 1.0})
        engine, reference = make_engine(rule, LAYERS), Reference(rule)
        engine.merge(vector(0))
        kept = engine.read_layer("tall.weight")
        partial = vector(1, without=["tall.weight", "norm.bias"])
        totals = engine.merge(partial)
        assert torch.equal(engine.read_layer("tall.weight"), kept)
        assert totals == reference.merge(vector(0), partial).totals
        assert engine.totals.state_norm > float(torch.linalg.vector_norm(kept)) > 0
        assert_same(engine, reference)

    def test_untouched_layers_are_listed_as_unchanged(self, engine: Engine) -> None:
        engine.merge(vector(0, without=["tall.weight", "norm.bias"]))
        assert engine.merged().unchanged == ("norm.bias", "tall.weight")
        assert engine.merged().names == tuple(n for n in NAMES if n not in engine.merged().unchanged)
        engine.merge(vector(1, without=["norm.bias"]))
        assert engine.merged().unchanged == ("norm.bias",)

    def test_update_that_brings_no_layer_counts_as_one_merge(
        self, engine: Engine, reference: Reference
    ) -> None:
        nothing = TaskVector.of({}, NAMES)
        engine.merge(vector(0))
        engine.merge(nothing)
        assert engine.totals.merges == 2
        assert_same(engine, reference.merge(vector(0), nothing))

    def test_unknown_layer_is_refused_and_changes_nothing(self, engine: Engine, reference: Reference) -> None:
        engine.merge(vector(0))
        stranger = TaskVector.of(
            {**dict(vector(1).items()), "decoder.weight": torch.ones(2, 2)}, label="site-7"
        )
        with pytest.raises(UnknownLayer, match=r"site-7, layer 'decoder\.weight'"):
            engine.merge(stranger)
        assert_same(engine, reference.merge(vector(0)))

    @pytest.mark.parametrize("at", NAMES)
    def test_update_that_fails_half_way_changes_nothing(
        self, engine: Engine, reference: Reference, at: str
    ) -> None:
        engine.merge(vector(0))
        with pytest.raises(NonFinite) as caught:
            engine.merge(failing(vector(1), at, error := NonFinite("no such number", layer=at)))
        assert caught.value is error
        assert engine.merged().unchanged == ()
        assert_same(engine, reference.merge(vector(0)))
        engine.merge(vector(2))
        assert_same(engine, reference.merge(vector(2)))

    @pytest.mark.parametrize("at", [NAMES[1], NAMES[-1]])
    def test_nothing_of_a_failed_update_enters_with_a_later_partial_one(
        self, engine: Engine, reference: Reference, at: str
    ) -> None:
        engine.merge(vector(0))
        with pytest.raises(FedmergeError):
            engine.merge(failing(vector(1), at, NonFinite("no such number")))
        partial = vector(2, without=[name for name in NAMES if name != "wide.weight"])
        engine.merge(partial)
        assert_same(engine, reference.merge(vector(0), partial))

    @pytest.mark.parametrize(
        "error", [OSError(5, "input/output error"), KeyboardInterrupt()], ids=["io", "ctrl-c"]
    )
    def test_error_that_is_not_ours_changes_nothing_either(
        self, engine: Engine, reference: Reference, error: BaseException
    ) -> None:
        engine.merge(vector(0))
        with pytest.raises(type(error)):
            engine.merge(failing(vector(1), "conv.weight", error))
        assert_same(engine, reference.merge(vector(0)))

    def test_failing_progress_callback_changes_nothing(self, engine: Engine, reference: Reference) -> None:
        def refuse(name: str) -> None:
            raise RuntimeError(f"the progress bar broke at {name}")

        engine.merge(vector(0))
        with pytest.raises(RuntimeError, match="progress bar"):
            engine.merge(vector(1), refuse)
        engine.merge(vector(2, without=NAMES[:3]))
        assert_same(engine, reference.merge(vector(0), vector(2, without=NAMES[:3])))

    def test_failed_factorisation_is_a_typed_error_and_changes_nothing(self, engine: Engine) -> None:
        """Sums that overflow float32 stand for any matrix that linear algebra gives up on."""
        huge = TaskVector.of({layer.name: torch.full(layer.shape, 3e38) for layer in LAYERS})
        engine.merge(huge)
        engine.merge(replace(huge, names=("square.weight",)))
        before = engine.totals, digest(engine)
        with pytest.raises(EngineError, match=r"'square\.weight': the factorisation failed"):
            engine.prepare(wait=True)
        with pytest.raises(EngineError, match=r"'square\.weight': the factorisation failed"):
            engine.merge(vector(2))
        engine.prepare()
        with pytest.raises(EngineError, match=r"'square\.weight': the factorisation failed"):
            engine.merge(vector(2))
        assert (engine.totals, digest(engine)) == before
        assert engine.merge(vector(3, without=["square.weight"])).merges == 3

    @pytest.mark.parametrize("rank", [None, 1])
    @pytest.mark.parametrize(
        "prepare", [{"wait": True}, {"wait": False}], ids=["waiting", "in the background"]
    )
    def test_preparing_gives_the_same_bits_as_not_preparing(
        self, engine: Engine, reference: Reference, prepare: dict[str, bool], rank: int | None
    ) -> None:
        for seed in range(4):
            engine.merge(vector(seed, rank=rank))
            engine.prepare(**prepare)
        assert_same(engine, reference.merge(*[vector(seed, rank=rank) for seed in range(4)]))

    def test_preparing_again_and_again_is_harmless(self, engine: Engine, reference: Reference) -> None:
        engine.prepare(wait=True)
        for seed in range(3):
            engine.prepare()
            engine.prepare()
            engine.prepare(wait=True)
            engine.prepare()
            engine.merge(vector(seed))
        assert_same(engine, reference.merge(*map(vector, range(3))))

    def test_what_was_prepared_before_a_failed_update_still_fits(
        self, engine: Engine, reference: Reference
    ) -> None:
        engine.merge(vector(0))
        engine.prepare(wait=True)
        with pytest.raises(FedmergeError):
            engine.merge(failing(vector(1), NAMES[3], NonFinite("no such number")))
        engine.prepare()
        engine.merge(vector(2, without=NAMES[:2]))
        engine.merge(vector(3))
        assert_same(engine, reference.merge(vector(0), vector(2, without=NAMES[:2]), vector(3)))

    def test_progress_is_told_once_per_brought_layer(self, engine: Engine) -> None:
        told: list[str] = []
        engine.merge(vector(0, without=["tall.weight"]), told.append)
        assert sorted(told) == sorted(set(NAMES) - {"tall.weight"})

    def test_vectors_of_long_ago_are_let_go(self, engine: Engine) -> None:
        """Memory must not grow with the number of vectors merged."""
        merged = []
        for seed in range(6):
            update = vector(seed)
            merged.append(weakref.ref(update))
            engine.merge(update)
            del update
        gc.collect()
        assert [ref() for ref in merged[:3]] == [None, None, None]

    def test_failed_vector_is_let_go(self, engine: Engine) -> None:
        update = failing(vector(0), NAMES[0], NonFinite("no such number"))
        held = weakref.ref(update)
        with pytest.raises(NonFinite):
            engine.merge(update)
        del update
        gc.collect()
        assert held() is None

    def test_pending_is_the_model_as_it_will_be(self, make_engine: MakeEngine, rule: Rule) -> None:
        engine = make_engine(rule, LAYERS)
        engine.merge(vector(0, without=["tall.weight"]))
        before = Reference(rule).merge(vector(0, without=["tall.weight"]))
        totals = engine.absorb(vector(1))
        after = Reference(rule).merge(vector(0, without=["tall.weight"]), vector(1))
        assert totals == after.totals
        assert_same_bits({n: u.to_dense() for n, u in engine.pending().items()}, after.read())
        assert engine.totals == before.totals
        assert_same(engine, before)
        engine.commit()
        engine.commit()
        assert_same(engine, after)

    def test_abandoned_update_leaves_nothing(self, engine: Engine, reference: Reference) -> None:
        engine.merge(vector(0))
        engine.absorb(vector(1))
        engine.abandon()
        engine.abandon()
        engine.commit()
        assert_same(engine, reference.merge(vector(0)))
        engine.merge(vector(2))
        assert_same(engine, reference.merge(vector(2)))

    def test_absorbing_again_replaces_what_was_pending(self, engine: Engine, reference: Reference) -> None:
        engine.absorb(vector(1))
        engine.absorb(vector(2, without=NAMES[:3]))
        engine.commit()
        assert_same(engine, reference.merge(vector(2, without=NAMES[:3])))

    @pytest.mark.parametrize("rank", [None, 1])
    def test_restored_engine_goes_on_with_the_same_bits(
        self, make_engine: MakeEngine, rule: Rule, rank: int | None
    ) -> None:
        engine, again = make_engine(rule, LAYERS), make_engine(rule, LAYERS)
        for seed in (0, 1):
            engine.merge(vector(seed, rank=rank, without=["norm.bias"]))
        again.merge(vector(7))
        again.absorb(vector(8))
        again.restore(engine.state, engine.touched, engine.totals)
        assert digest(again) == digest(engine)
        assert again.merged().unchanged == ("norm.bias",)
        for each in (engine, again):
            each.merge(vector(2, rank=rank))
        assert again.totals == engine.totals
        assert digest(again) == digest(engine)

    def test_restoring_nothing_is_a_new_engine(self, engine: Engine, reference: Reference) -> None:
        engine.merge(vector(0))
        engine.prepare()
        engine.restore(engine.state, (), Totals())
        assert engine.merged().names == ()
        engine.merge(vector(1))
        assert_same(engine, reference.merge(vector(1)))

    @pytest.mark.parametrize("name", ["average", "task_arithmetic"])
    @pytest.mark.parametrize("rank", [None, 2])
    def test_removing_leaves_what_the_others_give(
        self, make_engine: MakeEngine, name: str, rank: int | None
    ) -> None:
        rule = make_rule(name)
        engine, without = make_engine(rule, LAYERS), make_engine(rule, LAYERS)
        for seed in (0, 1, 2):
            engine.merge(vector(seed, rank=rank))
            if seed != 1:
                without.merge(vector(seed, rank=rank))
        engine.absorb(vector(1, rank=rank), act=Act.REMOVE)
        engine.commit()
        assert engine.totals.merges == 2
        for layer in NAMES:
            torch.testing.assert_close(
                engine.read_layer(layer), without.read_layer(layer), rtol=1e-5, atol=1e-5
            )
        engine.absorb(vector(0, rank=rank), act=Act.REMOVE)
        engine.commit()
        engine.absorb(vector(2, rank=rank), act=Act.REMOVE)
        engine.commit()
        assert engine.totals.merges == 0
        assert not any(engine.read_layer(layer).any() for layer in NAMES)

    @pytest.mark.parametrize("rank", [None, 2])
    def test_a_step_is_added_to_the_model_it_is_measured_from(
        self, make_engine: MakeEngine, rank: int | None
    ) -> None:
        engine = make_engine(make_rule("fedavg"), LAYERS)
        engine.merge(vector(0))
        engine.absorb(vector(1, rank=rank), relative=True)
        engine.commit()
        for name in NAMES:
            wanted = vector(0).read(name).to_dense() + vector(1, rank=rank).read(name).to_dense()
            torch.testing.assert_close(engine.read_layer(name), wanted)
        engine.merge(vector(2))
        assert torch.equal(engine.read_layer("norm.bias"), vector(2).read("norm.bias").to_dense())

    @pytest.mark.parametrize("name", STEPPING)
    @pytest.mark.parametrize("rank", [None, 2])
    def test_an_adjustment_moves_the_model_and_counts_as_no_merge(
        self, make_engine: MakeEngine, name: str, rank: int | None
    ) -> None:
        engine = make_engine(make_rule(name), LAYERS)
        engine.merge(telling(vector(0)))
        before, told = {layer: engine.read_layer(layer) for layer in NAMES}, engine.totals
        engine.prepare()
        change = vector(1, rank=rank, without=NAMES[:3])
        engine.absorb(change, act=Act.ADJUST)
        assert_same_bits({layer: engine.read_layer(layer) for layer in NAMES}, before)
        engine.commit()
        assert engine.totals == replace(told, state_norm=engine.totals.state_norm)
        for layer in NAMES:
            moved = change.read(layer).to_dense() if layer in change.names else 0
            torch.testing.assert_close(engine.read_layer(layer), before[layer] + moved)

    @pytest.mark.parametrize("name", STEPPING)
    def test_an_adjustment_that_fails_half_way_changes_nothing(
        self, make_engine: MakeEngine, name: str
    ) -> None:
        engine, unbroken = make_engine(make_rule(name), LAYERS), make_engine(make_rule(name), LAYERS)
        for each in (engine, unbroken):
            each.merge(telling(vector(0)))
        with pytest.raises(NonFinite):
            engine.absorb(failing(vector(1), NAMES[3], NonFinite("no number")), act=Act.ADJUST)
        engine.commit()
        for each in (engine, unbroken):
            each.merge(telling(vector(2)))
        assert engine.totals == unbroken.totals
        assert digest(engine) == digest(unbroken)

    def test_closing_twice_is_harmless(self, engine: Engine) -> None:
        with engine:
            engine.merge(vector(0))
            engine.close()
        engine.close()
