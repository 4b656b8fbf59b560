"""A shard: pending until finished, forgotten when abandoned, rebuilt from saved states."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from engine_contract import LAYERS, NAMES, RULES, vector
from torch import Tensor

from fedmerge.common.errors import EngineError, FactorisationFailed
from fedmerge.common.taskvector import LowRank, TaskVector
from fedmerge.server.engine.shard import Shard, as_update
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.iso_c import IsoC
from fedmerge.server.merge.rule import LayerSums, Rule, State, Totals, tensors_of
from fedmerge.server.merge.spectrum import LinAlgError

TOTALS = Totals(merges=2, norm_sum=3.0, update_norm=1.5, state_norm=2.5)


@pytest.fixture(params=RULES, ids=lambda p: "-".join([p[0], *(f"{k}={v}" for k, v in p[1].items())]))
def rule(request: pytest.FixtureRequest) -> Rule:
    return make_rule(*request.param)


@pytest.fixture
def shard(rule: Rule) -> Shard:
    return Shard(rule, LAYERS)


def absorb(shard: Shard, update: TaskVector) -> dict[str, LayerSums]:
    return {name: shard.absorb(name, layer) for name, layer in update.items()}


def merged(rule: Rule, *updates: TaskVector) -> Shard:
    shard = Shard(rule, LAYERS)
    for update in updates:
        absorb(shard, update)
        shard.finish()
    return shard


def read(shard: Shard) -> dict[str, Tensor]:
    return {name: shard.read(name, TOTALS) for name in shard.layers}


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return list(one) == list(two) and all(torch.equal(one[name], two[name]) for name in one)


def saved(shard: Shard) -> dict[str, State]:
    """Every state as if it had travelled: new memory, contiguous."""

    def copied(state: State) -> State:
        fields = {field: torch.tensor(tensor.numpy()) for field, tensor in tensors_of(state).items()}
        return type(state)(**fields)

    return {name: copied(shard.state(name)) for name in shard.states}


def restore(shard: Shard, states: Mapping[str, State]) -> Shard:
    shard.clear()
    for name, state in states.items():
        shard.put(name, state)
    return shard


def test_absorbed_layers_are_pending_until_finished(rule: Rule) -> None:
    shard = merged(rule, vector(0))
    before = read(shard)
    absorb(shard, vector(1))
    assert same(read(shard), before)
    shard.finish()
    assert not same(read(shard), before)
    assert same(read(shard), read(merged(rule, vector(0), vector(1))))


def test_abandoned_layers_leave_nothing(rule: Rule) -> None:
    shard = merged(rule, vector(0))
    before = read(shard)
    absorb(shard, vector(1))
    shard.abandon()
    shard.abandon()
    shard.finish()
    assert same(read(shard), before)
    absorb(shard, vector(2))
    shard.finish()
    assert same(read(shard), read(merged(rule, vector(0), vector(2))))


def test_finishing_twice_counts_once(rule: Rule) -> None:
    shard = merged(rule, vector(0), vector(1))
    before = read(shard)
    shard.finish()
    assert same(read(shard), before)


def test_layer_absorbed_again_before_finishing_counts_once(rule: Rule) -> None:
    shard = merged(rule, vector(0))
    first = absorb(shard, vector(1))
    assert absorb(shard, vector(1)) == first
    shard.finish()
    assert same(read(shard), read(merged(rule, vector(0), vector(1))))


def test_sums_of_a_layer_left_alone_are_those_of_its_last_change(shard: Shard) -> None:
    assert shard.untouched(NAMES[1]) == LayerSums(0.0, 0.0)
    sums = absorb(shard, vector(0))
    assert shard.untouched(NAMES[1]) == LayerSums(0.0, 0.0)
    shard.finish()
    assert {shard.untouched(name).state_sq for name in NAMES} == {s.state_sq for s in sums.values()}


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_restored_shard_merges_the_next_vector_to_the_same_bits(
    rule: Rule, rank: int | None, prepared: bool
) -> None:
    first, second = vector(0, rank=rank), vector(1, rank=rank, without=NAMES[:2])
    shard = merged(rule, first, second)
    again = restore(Shard(rule, LAYERS), saved(shard))
    assert same(read(again), read(shard))
    for name in NAMES if prepared else ():
        again.prepare(name)
    assert absorb(again, vector(2)) == absorb(shard, vector(2))
    shard.finish()
    again.finish()
    assert same(read(again), read(shard))
    assert [again.untouched(name) for name in NAMES] == [shard.untouched(name) for name in NAMES]


def test_restored_shard_knows_the_same_sums(rule: Rule) -> None:
    shard = merged(rule, vector(0, rank=1), vector(1, rank=1))
    again = restore(Shard(rule, LAYERS), saved(shard))
    assert [again.untouched(name) for name in NAMES] == [shard.untouched(name) for name in NAMES]


def test_layer_of_rank_zero_survives_a_round_trip(rule: Rule) -> None:
    layer = LAYERS[1]
    rows, columns = layer.matrix_shape
    nothing = LowRank(torch.zeros(rows, 1), torch.zeros(1, columns), layer.shape)
    shard = merged(rule, TaskVector.of({layer.name: nothing}))
    again = restore(Shard(rule, LAYERS), saved(shard))
    assert not again.read(layer.name, TOTALS).any()
    assert absorb(again, vector(1)) == absorb(shard, vector(1))


def test_restoring_forgets_what_was_pending_and_prepared(rule: Rule) -> None:
    shard = merged(rule, vector(0))
    before = saved(shard)
    absorb(shard, vector(1))
    shard.finish()
    for name in NAMES:
        shard.prepare(name)
    absorb(shard, vector(2, without=NAMES[3:]))
    restore(shard, before)
    shard.finish()
    assert same(read(shard), read(merged(rule, vector(0))))
    absorb(shard, vector(3))
    shard.finish()
    assert same(read(shard), read(merged(rule, vector(0), vector(3))))


def test_untouched_layers_hold_no_state(shard: Shard) -> None:
    absorb(shard, vector(0, without=["tall.weight"]))
    for name in NAMES:
        shard.prepare(name)
        shard.read(name, TOTALS)
    shard.finish()
    assert "tall.weight" not in shard.states
    assert not shard.read("tall.weight", TOTALS).any()


def test_saved_states_are_the_current_ones(rule: Rule) -> None:
    shard = merged(rule, vector(0))
    absorb(shard, vector(1))
    for name in NAMES:
        assert same(tensors_of(shard.state(name)), tensors_of(shard.states[name]))
        assert type(shard.state(name)) in rule.states


def test_pending_states_can_be_read_before_they_are_current(rule: Rule) -> None:
    shard = merged(rule, vector(0))
    absorb(shard, vector(1, without=["tall.weight"]))
    coming = {name: shard.read(name, TOTALS, pending=True) for name in shard.layers}
    assert not same(read(shard), coming)
    shard.finish()
    assert same(read(shard), coming)


class Unreadable(IsoC):
    """A rule of which no read-out converges."""

    def read(self, state: State, totals: Totals) -> Tensor:
        raise LinAlgError("no convergence")


def test_read_out_that_fails_is_the_fault_of_the_update_while_that_is_pending() -> None:
    shard = Shard(Unreadable(), LAYERS)
    absorb(shard, vector(0, without=NAMES[:1]))
    with pytest.raises(FactorisationFailed, match=r"no convergence"):
        shard.read(NAMES[1], TOTALS, pending=True)
    shard.finish()
    with pytest.raises(EngineError, match=r"roll back") as caught:
        shard.read(NAMES[1], TOTALS, pending=True)
    assert not isinstance(caught.value, FactorisationFailed)


def test_read_outs_of_former_versions_are_let_go() -> None:
    shard = Shard(IsoC(), LAYERS)
    for seed in range(3):
        absorb(shard, vector(seed))
        shard.finish()
        assert not shard._read_out
        read(shard)


def test_update_comes_back_from_its_tensors() -> None:
    for name, layer in [*vector(0).items(), *vector(0, rank=2).items()]:
        again = as_update(layer.tensors(), layer.shape)
        assert type(again) is type(layer)
        assert again.shape == layer.shape, name
        assert torch.equal(again.to_dense(), layer.to_dense())
