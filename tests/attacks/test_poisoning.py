"""How far can an update move the model, whenever it comes and whatever came before it?

Rules with a bound of their own are held to it. For all others, and again for these, the worker measures the
step of every layer before it commits one (``check_step``).

Honest vectors move every layer by a tenth of its reference norm, so ten times as much is within the default
limits and a hundred times is not. The bounds are the ones that ``Limits`` states.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from fedmerge.common.base import Base
from fedmerge.common.errors import NormExceeded, ValueRefused
from fedmerge.common.taskvector import LayerUpdate, LowRank, Manifest, TaskVector
from fedmerge.server import admission
from fedmerge.server.admission import BaseNorms, Limits, admit_update
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.task_arithmetic import TaskArithmetic
from fedmerge.server.model import GlobalModel

Layers = dict[str, Tensor]

RULES = ("average", "opcm", "task_arithmetic")
LIMITS = Limits()
ARRIVALS = 6
ROUNDING = 1e-4

GENERATOR = torch.Generator().manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR)


BASE = Base.from_checkpoint(
    {
        "embed.weight": drawn(40, 16),
        "fc.weight": drawn(24, 16),
        "conv.weight": drawn(8, 3, 2, 2),
        "fc.bias": 0.1 * drawn(24),
        "norm.bias": torch.zeros(16),
    }
)
NORMS = BaseNorms.of(BASE)
SAYS = Manifest(BASE.fingerprint, 0, "task", "a", 1)


def at_ratio(layers: Layers, ratio: float) -> Layers:
    """The same directions, every layer of this share of its reference norm."""
    return {name: t * (ratio * NORMS.layers[name] / float(t.norm())) for name, t in layers.items()}


def directions() -> Layers:
    return at_ratio({name: drawn(*layer.shape) for name, layer in BASE.merged_layers.items()}, 1.0)


def vector(layers: dict[str, Tensor] | dict[str, LayerUpdate]) -> TaskVector:
    """A vector of these layers; the others are unchanged."""
    return TaskVector.of(layers, [name for name in BASE.merged_layers if name not in layers], SAYS)


def times(sent: TaskVector, factor: float) -> TaskVector:
    return vector({name: update.times(factor) for name, update in sent.items()})


def dense_vectors() -> list[TaskVector]:
    """What sites learn points partly the same way."""
    shared = directions()
    return [
        vector(at_ratio({name: t + shared[name] for name, t in directions().items()}, 0.1))
        for _ in range(ARRIVALS)
    ]


def low_rank_vectors() -> list[TaskVector]:
    made = [LowRank(drawn(24, 1), drawn(1, 16), (24, 16)) for _ in range(ARRIVALS)]
    return [
        vector({"fc.weight": u.times(0.1 * NORMS.layers["fc.weight"] / u.sum_of_squares() ** 0.5)})
        for u in made
    ]


HONEST = {"dense": dense_vectors(), "low-rank": low_rank_vectors()}


def bound(rule: str, merges: int, layer: str, limits: Limits) -> float:
    """The most that the update merged as this number may move a layer by."""
    of_layer = limits.layer_ratio * NORMS.layers[layer]
    match rule:
        case "average":
            return of_layer * min(1.0, 2 / merges)
        case "task_arithmetic":
            return of_layer * TaskArithmetic().factor
        case "opcm":
            return of_layer if merges == 1 else 2 * limits.total_ratio * NORMS.total
    raise AssertionError("a rule without a stated bound")


@dataclass
class Trial:
    """What became of vectors that were handed in one after another.

    Attributes:
        refused: the places of those that were refused.
        shares: by place, how far each layer moved, as a share of its bound; ``moved``: the distances.
        weights: the merged vector in the end.
    """

    refused: list[int] = field(default_factory=list)
    shares: dict[int, dict[str, float]] = field(default_factory=dict)
    moved: dict[int, dict[str, float]] = field(default_factory=dict)
    weights: Layers = field(default_factory=dict)


def weights_of(model: GlobalModel) -> Layers:
    held = {name: update.to_dense() for name, update in model.merged().items()}
    return {name: held.get(name, torch.zeros(layer.shape)) for name, layer in BASE.merged_layers.items()}


def hand_in(rule: str, sent: Sequence[TaskVector], limits: Limits = LIMITS) -> Trial:
    """Admits and merges one by one; no step may go beyond its bound."""
    trial = Trial()
    with LocalEngine(make_rule(rule), BASE.layers.values(), workers=1) as engine:
        model = GlobalModel(BASE, engine)
        for place, update in enumerate(sent):
            before, merges = weights_of(model), len(model.versions)
            try:
                admit_update(update, BASE, NORMS, limits, current_version=merges, site="a")
            except ValueRefused:
                trial.refused.append(place)
                continue
            model.merge(update)
            after = weights_of(model)
            moved = {name: float((after[name] - before[name]).double().norm()) for name in after}
            trial.moved[place] = moved
            trial.shares[place] = {
                name: moved[name] / bound(rule, merges + 1, name, limits) for name in moved
            }
            assert max(trial.shares[place].values()) <= 1 + ROUNDING, (rule, place, trial.shares[place])
        trial.weights = weights_of(model)
    return trial


def same_bits(one: Layers, other: Layers) -> bool:
    return all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.parametrize("kind", HONEST)
@pytest.mark.parametrize("position", range(ARRIVALS + 1))
@pytest.mark.parametrize("rule", RULES)
def test_ten_times_an_honest_vector_moves_no_layer_beyond_its_bound(rule, position, kind):
    honest = HONEST[kind]
    attack = times(honest[0], 10)
    trial = hand_in(rule, [*honest[:position], attack, *honest[position:]])
    assert trial.refused == []


@pytest.mark.parametrize("kind", HONEST)
@pytest.mark.parametrize("factor", [100, 1e6])
@pytest.mark.parametrize("position", range(ARRIVALS + 1))
@pytest.mark.parametrize("rule", RULES)
def test_a_hundred_or_a_million_times_is_refused_and_changes_no_bit(rule, position, factor, kind):
    honest = HONEST[kind]
    attack = times(honest[0], factor)
    trial = hand_in(rule, [*honest[:position], attack, *honest[position:]])
    assert trial.refused == [position]
    assert same_bits(trial.weights, hand_in(rule, honest).weights)


@pytest.mark.parametrize("rule", RULES)
def test_a_million_times_one_small_layer_is_refused_by_its_name(rule):
    layers = {name: update.to_dense() for name, update in HONEST["dense"][0].items()}
    attack = vector(layers | {"norm.bias": 1e6 * layers["norm.bias"]})
    with pytest.raises(NormExceeded, match=r"layer 'norm\.bias'"):
        admit_update(attack, BASE, NORMS, LIMITS, current_version=0, site="a")
    assert hand_in(rule, [attack]).refused == [0]


@pytest.mark.parametrize("rule", RULES)
def test_the_bounds_are_reached_by_vectors_at_the_limit_that_turn_around_and_never_passed(rule):
    limits = Limits(layer_ratio=1.0, total_ratio=10.0)
    largest = vector(at_ratio(directions(), 1 - 1e-6))
    trial = hand_in(rule, [times(largest, sign) for sign in (1, -1, 1, -1, -1, 1)], limits)
    assert trial.refused == []
    assert max(trial.shares[0].values()) == pytest.approx(1, rel=ROUNDING)
    if rule != "opcm":
        assert max(trial.shares[1].values()) == pytest.approx(1, rel=ROUNDING)


def test_opcm_moves_a_small_layer_beyond_its_ratio_but_never_beyond_twice_the_total_ratio():
    """Two vectors cancel but for a small layer, which is scaled up to their mean norm; a third turns it."""
    embedding = drawn(40, 16)
    embedding *= 0.99 * LIMITS.total_ratio * NORMS.total / embedding.norm()
    bias = torch.full((16,), 1e-3)
    attack = [
        vector({"embed.weight": embedding, "norm.bias": bias}),
        vector({"embed.weight": -embedding, "norm.bias": bias}),
        vector({"norm.bias": -3 * bias}),
    ]
    trial = hand_in("opcm", attack)
    assert trial.refused == []
    furthest = trial.moved[2]["norm.bias"]
    assert furthest > 5 * LIMITS.layer_ratio * NORMS.layers["norm.bias"]
    assert furthest > 0.8 * 2 * LIMITS.total_ratio * NORMS.total
    assert float(trial.weights["norm.bias"].norm()) <= LIMITS.total_ratio * NORMS.total


@pytest.mark.parametrize("rule", RULES)
def test_many_large_updates_first_do_not_widen_the_bound_for_later_ones(rule):
    honest = HONEST["dense"]
    early = [times(update, 19) for update in honest] * 3
    later = [times(honest[0], 21), times(honest[1], 100), times(honest[2], 1e6), *honest]
    trial = hand_in(rule, [*early, *later])
    assert trial.refused == [len(early), len(early) + 1, len(early) + 2]
    assert same_bits(trial.weights, hand_in(rule, [*early, *honest]).weights)


@pytest.mark.parametrize("rule", RULES)
def test_the_trial_itself_finds_out_that_the_norm_gate_was_left_out(rule, monkeypatch):
    monkeypatch.setattr(admission, "_check_norm", lambda *_: None)
    honest = HONEST["dense"]
    with pytest.raises(AssertionError):
        hand_in(rule, [*honest[:3], times(honest[0], 1e6), *honest[3:]])
