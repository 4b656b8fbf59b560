"""Does every layer get the kind that decides how it is merged?"""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedmerge.common.layers import LayerKind, LayerSpec, kinds_from_model, kinds_from_shapes, shared_names

BERT = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12)
LLAMA = LlamaConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.ConvTranspose2d(4, 3, 2)
        self.norm = nn.BatchNorm2d(4)
        self.tokens = nn.Embedding(5, 6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.classifier = nn.Linear(6, 2)


def test_modules_decide_the_kind_of_a_models_layers():
    kinds = kinds_from_model(Mixed(), private=["classifier.*"])
    matrices = {name for name, kind in kinds.items() if kind is LayerKind.MATRIX}
    assert matrices == {"conv.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    assert kinds["tokens.weight"] is LayerKind.VECTOR
    assert kinds["norm.running_mean"] is LayerKind.VECTOR
    assert kinds["norm.num_batches_tracked"] is LayerKind.CONSTANT
    assert kinds["classifier.weight"] is kinds["classifier.bias"] is LayerKind.PRIVATE


def test_conv1d_of_gpt2_is_a_matrix_and_its_embeddings_are_not():
    kinds = kinds_from_model(GPT2LMHeadModel(GPT2))
    assert kinds["transformer.h.0.attn.c_attn.weight"] is LayerKind.MATRIX
    assert kinds["transformer.wte.weight"] is kinds["transformer.wpe.weight"] is LayerKind.VECTOR


@pytest.mark.parametrize(
    "model",
    [GPT2LMHeadModel(GPT2), BertForMaskedLM(BERT), LlamaForCausalLM(LLAMA)],
    ids=["gpt2", "bert", "llama"],
)
def test_names_and_shapes_give_the_same_kinds_as_the_modules(model):
    kinds = kinds_from_model(model)
    held = model.state_dict()
    assert kinds_from_shapes({name: (tuple(held[name].shape), held[name].dtype) for name in kinds}) == kinds


def test_a_shared_expert_is_no_embedding():
    layout = {
        "mlp.shared_expert.up_proj.weight": ((4, 3), torch.float32),
        "shared.weight": ((4, 3), torch.float32),
    }
    assert list(kinds_from_shapes(layout).values()) == [LayerKind.MATRIX, LayerKind.VECTOR]


def test_tied_weights_keep_their_first_name():
    kinds = kinds_from_model(GPT2LMHeadModel(GPT2))
    assert "lm_head.weight" not in kinds
    assert "transformer.wte.weight" in kinds


def test_views_of_one_storage_with_other_shapes_are_not_shared():
    whole = torch.zeros(4, 2)
    assert shared_names({"whole": whole, "rows": whole[:2], "again": whole}) == {"again": "whole"}
    assert shared_names({"a": torch.empty(0), "b": torch.empty(0)}) == {}


@pytest.mark.parametrize(
    ("shape", "kind", "wanted"),
    [
        ((4, 3), LayerKind.MATRIX, (4, 3)),
        ((4, 3, 2, 2), LayerKind.MATRIX, (4, 12)),
        ((4, 3), LayerKind.VECTOR, (1, 12)),
        ((), LayerKind.VECTOR, (1, 1)),
    ],
)
def test_rules_see_a_layer_as_a_matrix_of_this_shape(shape, kind, wanted):
    assert LayerSpec("layer", shape, torch.float32, kind).matrix_shape == wanted
