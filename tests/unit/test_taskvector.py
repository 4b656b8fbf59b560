"""Is a task vector exactly what the module's rules of rounding say?"""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from fedmerge.common.base import Base
from fedmerge.common.checkpoint import Checkpoint
from fedmerge.common.errors import (
    BaseMismatch,
    DtypeMismatch,
    FileError,
    MissingLayer,
    NonFinite,
    ShapeMismatch,
    UnknownLayer,
)
from fedmerge.common.sources import check_vector, open_update
from fedmerge.common.taskvector import Dense, LowRank, Manifest, TaskVector, add, subtract
from fedmerge.common.vectorfile import save

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


def base_of(**tensors):
    return Base.from_checkpoint({name.replace("_", "."): t for name, t in tensors.items()})


def difference(tuned, origin):
    return subtract(tuned, origin, where="here", layer="w")


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_narrow_types_widen_exactly_and_round_once(dtype):
    torch.manual_seed(0)
    tuned, origin = torch.randn(1000).to(dtype), torch.randn(1000).to(dtype)
    wanted = (tuned.double() - origin.double()).float()
    assert torch.equal(difference(tuned, origin), wanted)


@pytest.mark.parametrize(("tuned_type", "origin_type"), [(DOUBLE, DOUBLE), (DOUBLE, SINGLE), (DOUBLE, BRAIN)])
def test_float64_is_subtracted_in_float64_and_rounded_once(tuned_type, origin_type):
    origin = torch.tensor([1.0, 3.0]).to(origin_type)
    tuned = origin.to(tuned_type) + 1e-12
    wanted = (tuned - origin.double()).float()
    assert wanted.ne(0).all()
    assert torch.equal(difference(tuned, origin), wanted)


@pytest.mark.parametrize(
    ("narrow", "wide"), [(BRAIN, SINGLE), (HALF, SINGLE), (SINGLE, DOUBLE), (HALF, DOUBLE)]
)
def test_an_untouched_weight_stored_narrower_is_exactly_zero(narrow, wide):
    origin = torch.randn(1000, dtype=wide)
    assert not difference(origin.to(narrow), origin).any()


def test_a_float64_difference_beyond_float32_is_refused():
    with pytest.raises(NonFinite, match=r"here, layer 'w'.*1 of 2"):
        difference(torch.tensor([1e39, 1.0], dtype=DOUBLE), torch.zeros(2, dtype=DOUBLE))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value):
    with pytest.raises(NonFinite, match="1 of 3"):
        difference(torch.tensor([1.0, value, 2.0]), torch.zeros(3))


def test_large_finite_values_whose_sum_overflows_float32_pass():
    assert difference(torch.full((4,), 3e38), torch.zeros(4)).isfinite().all()


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, DOUBLE])
def test_adding_rounds_once_to_the_bases_dtype(dtype):
    torch.manual_seed(0)
    origin, update = torch.randn(3, 5).to(dtype), torch.randn(3, 5)
    wide = DOUBLE if dtype is DOUBLE else SINGLE
    wanted = torch.add(origin.to(wide), update.to(wide), alpha=0.3).to(dtype)
    assert torch.equal(add(origin, Dense(update), 0.3), wanted)
    assert add(origin, Dense(update)).dtype is dtype


def test_base_plus_task_vector_is_the_tuned_model():
    origin = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).bfloat16(), "n": torch.tensor(2)}
    tuned = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3).bfloat16(), "n": torch.tensor(5)}
    base = Base.from_checkpoint(origin)
    merged = dict(TaskVector.from_checkpoints(base, tuned).apply(base))
    assert list(merged) == list(origin)
    assert torch.allclose(merged["a.weight"], tuned["a.weight"], rtol=0, atol=1e-6)
    assert torch.equal(merged["a.bias"], tuned["a.bias"])
    assert merged["n"] == 2


def test_low_rank_equals_its_product_in_value_and_norm():
    torch.manual_seed(0)
    left, right = torch.randn(6, 2), torch.randn(2, 20)
    update = LowRank(left, right, (6, 5, 2, 2))
    assert update.to_dense().shape == (6, 5, 2, 2)
    assert update.sum_of_squares() == pytest.approx(Dense(left @ right).sum_of_squares(), rel=1e-6)
    assert torch.equal(update.times(2).to_dense(), update.to_dense() * 2)


def test_the_norm_is_over_all_layers_as_if_concatenated():
    vector = TaskVector.of({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    assert vector.norm() == 5.0


def counting(tensors, label="tuned"):
    reads = []
    held = Checkpoint.of(tensors, label)
    return Checkpoint(label, held.layout, lambda name: reads.append(name) or held.read(name)), reads


def test_opening_and_checking_read_no_tensor():
    tensors = {"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}
    origin, origin_reads = counting(tensors, "base")
    tuned, tuned_reads = counting(tensors)
    base = Base.from_checkpoint(origin)
    vector = TaskVector.from_checkpoints(base, tuned, manifest=Manifest(base="0" * 64))
    assert vector.shapes == {"a.weight": (2, 2), "a.bias": (2,)}
    assert origin_reads == tuned_reads == []
    vector.read("a.bias")
    assert origin_reads == tuned_reads == ["a.bias"]


def test_the_fingerprint_is_filled_in_where_the_manifest_lacks_it():
    base = base_of(w=torch.ones(2))
    vector = TaskVector.from_checkpoints(
        base, {"w": torch.zeros(2)}, manifest=Manifest(task="text", examples=7)
    )
    assert vector.manifest == Manifest(base=base.fingerprint, task="text", examples=7)


def test_frozen_layers_are_called_unchanged():
    base = base_of(embed_weight=torch.ones(2), a_bias=torch.ones(2))
    vector = TaskVector.from_checkpoints(
        base, {"embed.weight": torch.zeros(2), "a.bias": torch.zeros(2)}, frozen=["embed.*"]
    )
    assert (vector.names, vector.unchanged) == (("a.bias",), ("embed.weight",))


def test_tied_names_of_a_live_model_are_accepted():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12))
    vector = TaskVector.from_checkpoints(Base.from_model(model), model.state_dict())
    assert "lm_head.weight" not in vector.names
    assert vector.norm() == 0


@pytest.mark.parametrize(
    ("tuned", "error", "message"),
    [
        ({"a.weight": torch.ones(2, 3)}, MissingLayer, "layer 'a.bias'"),
        (
            {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2), "a.bais": torch.ones(2)},
            UnknownLayer,
            r"layer 'a.bais'.*perhaps 'a\.bias'",
        ),
        ({"a.weight": torch.ones(3, 2), "a.bias": torch.ones(2)}, ShapeMismatch, "looks transposed"),
        (
            {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(1)},
            ShapeMismatch,
            r"got \(1,\) float32, wanted \(2,\)",
        ),
        ({"a.weight": torch.ones(2, 3).int(), "a.bias": torch.ones(2)}, DtypeMismatch, "int32"),
        (
            {"a.weight": torch.ones(2, 3).to(torch.float8_e5m2), "a.bias": torch.ones(2)},
            DtypeMismatch,
            "float8",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_base_is_refused_by_layer(tuned, error, message):
    base = base_of(a_weight=torch.ones(2, 3), a_bias=torch.ones(2))
    with pytest.raises(error, match=message):
        TaskVector.from_checkpoints(base, tuned)


def test_extra_private_layers_are_left_out():
    base = base_of(w=torch.ones(2))
    tuned = {"w": torch.ones(2), "head.weight": torch.ones(3, 2)}
    assert TaskVector.from_checkpoints(base, tuned, private=["head.*"]).names == ("w",)


BASE = base_of(a_weight=torch.ones(2, 3), a_bias=torch.ones(2), steps=torch.tensor(1))
GOOD = {"a.weight": torch.ones(2, 3), "a.bias": torch.ones(2)}


@pytest.mark.parametrize(
    "vector",
    [
        TaskVector.of(GOOD),
        TaskVector.of(GOOD, manifest=Manifest(base=BASE.fingerprint)),
        TaskVector.of({"a.bias": torch.ones(2)}, unchanged=["a.weight"]),
        TaskVector.of(
            {"a.weight": LowRank(torch.ones(2, 1), torch.ones(1, 3), (2, 3))}, unchanged=["a.bias"]
        ),
    ],
)
def test_a_vector_that_covers_the_base_passes(vector):
    check_vector(vector, BASE)


@pytest.mark.parametrize(
    ("vector", "error", "message"),
    [
        (
            TaskVector.of(GOOD, manifest=Manifest(base="f" * 64)),
            BaseMismatch,
            "another base: got ffffffffffff",
        ),
        (TaskVector.of({"a.weight": torch.ones(2, 3)}), MissingLayer, "layer 'a.bias'"),
        (TaskVector.of({**GOOD, "b": torch.ones(1)}), UnknownLayer, "layer 'b'"),
        (TaskVector.of(GOOD, unchanged=["steps"]), UnknownLayer, "a constant layer, which is never merged"),
        (TaskVector.of({**GOOD, "a.bias": torch.ones(1)}), ShapeMismatch, r"got \(1,\), wanted \(2,\)"),
    ],
)
def test_a_vector_that_does_not_fit_the_base_is_refused(vector, error, message):
    with pytest.raises(error, match=message):
        check_vector(vector, BASE)


def test_a_shape_the_vector_does_not_tell_is_checked_by_reading():
    vector = TaskVector(("a.weight",), lambda name: Dense(torch.ones(3, 3)), unchanged=("a.bias",))
    with pytest.raises(ShapeMismatch):
        check_vector(vector, BASE)


def test_update_sources_give_the_same_vector(tmp_path):
    tuned = {**GOOD, "steps": torch.tensor(9), "a.bias": torch.tensor([2.0, 4.0])}
    direct = open_update(tuned, BASE, manifest=Manifest(task="text"))
    save(direct, tmp_path / "update.safetensors")
    loaded = open_update(tmp_path / "update.safetensors", BASE)
    assert loaded.manifest == direct.manifest
    for name in direct.names:
        assert torch.equal(loaded.read(name).to_dense(), direct.read(name).to_dense())


def test_a_task_vector_file_of_another_base_is_refused(tmp_path):
    save(TaskVector.of(GOOD, manifest=Manifest(base="f" * 64)), tmp_path / "u.safetensors")
    with pytest.raises(BaseMismatch, match=r"u.safetensors"):
        open_update(tmp_path / "u.safetensors", BASE)


def test_a_task_vector_file_takes_no_second_manifest(tmp_path):
    save(TaskVector.of(GOOD), tmp_path / "u.safetensors")
    with pytest.raises(FileError, match="already says"):
        open_update(tmp_path / "u.safetensors", BASE, manifest=Manifest(task="other"))
