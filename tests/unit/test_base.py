"""Is a base the same base wherever its weights are kept?"""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError, DtypeMismatch, UnknownLayer
from fedmerge.common.layers import LayerKind


@pytest.fixture
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12))


def test_fingerprint_is_equal_for_file_shards_state_dict_and_live_model(tmp_path, model):
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="4KB")
    wanted = Base.from_model(model).fingerprint
    assert len(wanted) == 64
    assert Base.from_checkpoint(tmp_path / "one").fingerprint == wanted
    assert Base.from_checkpoint(tmp_path / "many").fingerprint == wanted
    assert Base.from_checkpoint(tmp_path / "one" / "model.safetensors").fingerprint == wanted
    assert Base.from_checkpoint(model.state_dict()).fingerprint == wanted


def test_fingerprint_changes_with_one_bit(model):
    before = Base.from_model(model).fingerprint
    with torch.no_grad():
        model.transformer.ln_f.bias.view(torch.int32)[3] ^= 1
    assert Base.from_model(model).fingerprint != before


@pytest.mark.parametrize(
    "other", [{"v": torch.zeros(4)}, {"w": torch.zeros(2, 2)}, {"w": torch.zeros(4).int()}]
)
def test_fingerprint_changes_with_name_shape_and_dtype(other):
    wanted = Base.from_checkpoint({"w": torch.zeros(4)}).fingerprint
    assert Base.from_checkpoint(other).fingerprint != wanted


def test_fingerprint_does_not_depend_on_order_or_strides():
    a, b = torch.randn(3, 4), torch.randn(2)
    one, other = {"a": a, "b": b}, {"b": b, "a": a.T.contiguous().T}
    assert Base.from_checkpoint(one).fingerprint == Base.from_checkpoint(other).fingerprint


def test_training_after_registration_leaves_the_base_as_it_was():
    model = nn.Linear(2, 2)
    base = Base.from_model(model)
    before = base.read("weight").clone()
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.equal(base.read("weight"), before)


def test_private_and_integer_layers_are_not_merged():
    base = Base.from_checkpoint(
        {"body.weight": torch.zeros(2, 2), "head.weight": torch.zeros(2, 2), "steps": torch.tensor(1)},
        private=["head.*"],
    )
    assert list(base.merged_layers) == ["body.weight"]
    assert base.layers["head.weight"].kind is LayerKind.PRIVATE
    assert base.layers["steps"].kind is LayerKind.CONSTANT


def test_given_kinds_override_the_guess():
    base = Base.from_checkpoint({"embed.weight": torch.zeros(2, 2)}, kinds={"embed.weight": LayerKind.MATRIX})
    assert base.layers["embed.weight"].matrix_shape == (2, 2)


@pytest.mark.parametrize(
    ("tensor", "kind", "error"),
    [
        (torch.zeros(2), LayerKind.MATRIX, ConfigError),
        (torch.zeros(2, 2).int(), LayerKind.MATRIX, ConfigError),
        (torch.zeros(2).int(), LayerKind.VECTOR, ConfigError),
    ],
)
def test_an_impossible_kind_is_refused(tensor, kind, error):
    with pytest.raises(error, match="layer 'w'"):
        Base.from_checkpoint({"w": tensor}, kinds={"w": kind})


def test_a_kind_for_an_unknown_layer_is_refused():
    with pytest.raises(UnknownLayer, match="layer 'v'"):
        Base.from_checkpoint({"w": torch.zeros(2)}, kinds={"v": LayerKind.VECTOR})


def test_float8_layers_are_refused_unless_called_constant(tmp_path):
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(DtypeMismatch, match=r"layer 'w'.*float8_e4m3fn"):
        Base.from_checkpoint(tmp_path / "m.safetensors")
    base = Base.from_checkpoint(tmp_path / "m.safetensors", kinds={"w": LayerKind.CONSTANT})
    assert not base.merged_layers
    assert len(base.fingerprint) == 64
