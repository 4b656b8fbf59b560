"""Which updates are let in, and is every refusal typed, reasoned and free of tensor values?"""

import math
from dataclasses import replace

import pytest
import torch

from fedmerge.common.base import Base
from fedmerge.common.errors import (
    BadWeight,
    BaseMismatch,
    MismatchError,
    MissingLayer,
    NonFinite,
    ShapeMismatch,
    UnknownLayer,
    VersionMismatch,
)
from fedmerge.common.layers import LayerKind
from fedmerge.common.taskvector import LowRank, Manifest, TaskVector
from fedmerge.common.vectorfile import from_bytes, to_bytes
from fedmerge.server.admission import FLOAT32_MAX, MAX_EXAMPLES, MOST_MERGES, admit, weight

BASE = Base.from_checkpoint(
    {"w": torch.zeros(4, 3), "b": torch.zeros(4), "head": torch.zeros(2, 4)}, {"head": LayerKind.PRIVATE}
)
SAYS = Manifest(BASE.fingerprint, 0, "plain", "ward 7", 12)


def vector(manifest: Manifest = SAYS, unchanged=(), **layers) -> TaskVector:
    held = {"w": torch.ones(4, 3), "b": torch.ones(4)} | layers
    return TaskVector.of({k: v for k, v in held.items() if v is not None}, unchanged, manifest, "update of a")


def spiked(layer: str, place: int, value: float) -> TaskVector:
    values = torch.ones(BASE.layers[layer].shape)
    values.view(-1)[place] = value
    return vector(**{layer: values})


def test_a_fitting_vector_is_let_in():
    admit(vector(), BASE, task="plain")
    admit(from_bytes(to_bytes(vector())), BASE, task="plain")
    admit(vector(b=None, unchanged=["b"]), BASE, task="plain")
    admit(vector(w=LowRank(torch.ones(4, 1), torch.ones(1, 3), (4, 3))), BASE, task="plain")
    admit(vector(w=torch.zeros(4, 3), b=torch.zeros(4)), BASE, task="plain")


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"base": "0" * 64}, BaseMismatch, "made from another base: got 000000000000, wanted"),
        ({"base": ""}, BaseMismatch, "got none"),
        ({"origin_version": 1}, VersionMismatch, "another origin version: got 1, wanted 0"),
        ({"task": "plane"}, MismatchError, "a vector for another task: got 'plane', wanted 'plain'"),
    ],
    ids=["another base", "no base", "a later origin", "another task"],
)
def test_a_vector_of_something_else_is_refused(changed, error, says):
    with pytest.raises(error, match=says) as caught:
        admit(vector(replace(SAYS, **changed)), BASE, task="plain")
    assert str(caught.value).startswith("update of a: ")


@pytest.mark.parametrize(
    ("made", "error", "layer"),
    [
        (vector(b=None), MissingLayer, "b"),
        (vector(extra=torch.ones(2)), UnknownLayer, "extra"),
        (vector(unchanged=["extra"]), UnknownLayer, "extra"),
        (vector(head=torch.ones(2, 4)), UnknownLayer, "head"),
        (vector(w=torch.ones(3, 4)), ShapeMismatch, "w"),
        (vector(b=torch.ones(1)), ShapeMismatch, "b"),
        (vector(b=torch.ones(4, 1)), ShapeMismatch, "b"),
        (vector(w=LowRank(torch.ones(3, 1), torch.ones(1, 4), (3, 4))), ShapeMismatch, "w"),
    ],
    ids=["missing", "extra", "extra unchanged", "private", "transposed", "(1,)", "(4, 1)", "factors"],
)
def test_layers_that_are_not_the_bases_are_refused_by_name(made, error, layer):
    with pytest.raises(error) as caught:
        admit(made, BASE, task="plain")
    assert (caught.value.layer, caught.value.where) == (layer, "update of a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("layer", "place"), [("w", 0), ("w", 11), ("b", 0), ("b", 3)])
def test_one_value_that_is_not_finite_anywhere_is_refused(layer, place, value):
    with pytest.raises(NonFinite, match="update of a"):
        admit(spiked(layer, place, value), BASE, task="plain")


@pytest.mark.parametrize(
    "made",
    [
        vector(w=torch.full((4, 3), 3e38)),
        spiked("b", 3, 3e38),
        vector(w=LowRank(torch.full((4, 1), 1e30), torch.full((1, 3), 1e30), (4, 3))),
    ],
    ids=["all", "one", "product of factors"],
)
def test_finite_values_whose_norm_overflows_are_refused(made):
    assert all(bool(torch.isfinite(t).all()) for _, u in made.items() for t in u.tensors())
    with pytest.raises(NonFinite, match="overflows float32"):
        admit(made, BASE, task="plain")


def test_the_bound_of_the_norm_leaves_room_for_a_million_sums():
    bound = FLOAT32_MAX / MOST_MERGES
    admit(vector(w=torch.zeros(4, 3), b=torch.tensor([0, 0, 0, bound * 0.999])), BASE, task="plain")
    with pytest.raises(NonFinite):
        admit(vector(w=torch.zeros(4, 3), b=torch.tensor([0, 0, 0, bound * 1.001])), BASE, task="plain")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (1, 1),
        (64, 64),
        (64.0, 64),
        (MAX_EXAMPLES, MAX_EXAMPLES),
        (MAX_EXAMPLES + 1, MAX_EXAMPLES),
        (1e18, MAX_EXAMPLES),
        (10**400, MAX_EXAMPLES),
    ],
)
def test_a_count_weighs_as_much_as_it_says_up_to_the_cap(given, wanted):
    assert weight(given, where="a") == wanted
    assert type(weight(given, where="a")) is int


def test_the_cap_can_be_set():
    assert weight(10**18, where="a", cap=7) == 7


@pytest.mark.parametrize(
    "given", [0, -1, 0.0, -0.5, 0.5, 1.5, math.nan, math.inf, -math.inf, True, False, "64", None, [64], b"64"]
)
def test_anything_else_than_a_whole_number_from_1_is_refused(given):
    with pytest.raises(BadWeight, match=r"^update of a: the example count") as caught:
        weight(given, where="update of a")
    assert caught.value.got == repr(given)
