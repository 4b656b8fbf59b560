"""Does a checkpoint read the same from memory, one file and shards, and only what is asked for?"""

import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from fedmerge.common import checkpoint as module
from fedmerge.common.base import Base
from fedmerge.common.checkpoint import Checkpoint, open_checkpoint
from fedmerge.common.errors import FileError, UnsafeFile

BERT = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)


def tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(4).bfloat16(),
        "steps": torch.tensor(3),
        "empty": torch.empty(0, 5),
        "mask": torch.tensor([True, False]),
    }


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype is other.dtype and torch.equal(one, other)


def test_a_checkpoint_is_returned_as_it_is():
    held = Checkpoint.of(tensors())
    assert open_checkpoint(held) is held


def test_file_and_mapping_tell_the_same_layout_and_values(tmp_path):
    save_file(tensors(), tmp_path / "m.safetensors")
    file, memory = open_checkpoint(tmp_path / "m.safetensors"), open_checkpoint(tensors())
    assert dict(file.layout) == dict(memory.layout)
    assert all(same(file.read(name), memory.read(name)) for name in memory)


@pytest.mark.parametrize("max_shard_size", ["1GB", "4KB"])
def test_save_pretrained_reads_back_equal(tmp_path, max_shard_size):
    model = BertModel(BERT)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "4KB")
    held = open_checkpoint(tmp_path)
    assert set(held) == set(Base.from_model(model).layers)
    assert all(same(held.read(name), model.state_dict()[name]) for name in held)


def test_the_index_file_opens_like_its_folder(tmp_path):
    BertModel(BERT).save_pretrained(tmp_path, max_shard_size="4KB")
    by_index = open_checkpoint(tmp_path / "model.safetensors.index.json")
    assert dict(by_index.layout) == dict(open_checkpoint(str(tmp_path)).layout)


def test_tied_weights_are_saved_once_under_the_name_the_base_keeps(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=12))
    model.save_pretrained(tmp_path)
    held = open_checkpoint(model.state_dict())
    assert held.shared == {"lm_head.weight": "transformer.wte.weight"}
    assert set(open_checkpoint(tmp_path)) == set(held) - set(held.shared)


def test_opening_reads_headers_only(tmp_path, monkeypatch):
    BertModel(BERT).save_pretrained(tmp_path, max_shard_size="4KB")
    opened = []
    real = module.safe_open
    monkeypatch.setattr(
        module, "safe_open", lambda path, framework: opened.append(path) or real(path, framework)
    )
    held = open_checkpoint(tmp_path)
    assert opened == []
    held.read("embeddings.LayerNorm.bias")
    held.read("embeddings.LayerNorm.bias")
    assert len(opened) == 1


def test_float8_is_reported_by_the_layout(tmp_path):
    save_file({"w": torch.zeros(2, 2).to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    assert open_checkpoint(tmp_path / "m.safetensors").layout["w"] == ((2, 2), torch.float8_e4m3fn)


def test_a_dictionary_with_more_than_tensors_is_refused_by_name():
    with pytest.raises(FileError, match="layer 'epoch': not a tensor: got int"):
        open_checkpoint({"w": torch.zeros(1), "epoch": 3})


def test_a_file_replaced_by_another_after_opening_is_noticed(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    held = open_checkpoint(path)
    path.unlink()
    with pytest.raises(FileError, match="no such file"):
        held.read("w")


def sharded(folder, weight_map=None, shards=None):
    shards = shards or {"1.safetensors": ["a"], "2.safetensors": ["b"]}
    for shard, names in shards.items():
        save_file({name: torch.ones(2) for name in names}, folder / shard)
    weight_map = weight_map or {"a": "1.safetensors", "b": "2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_a_sound_index_opens(tmp_path):
    assert set(open_checkpoint(sharded(tmp_path))) == {"a", "b"}


@pytest.mark.parametrize(
    ("weight_map", "shards", "error", "message"),
    [
        ({"a": "1.safetensors", "b": "3.safetensors"}, None, FileError, "3.safetensors: no such file"),
        ({"a": "1.safetensors", "b": "1.safetensors"}, None, FileError, "layer 'b': not in the shard"),
        ({"a": "1.safetensors", "b": "../2.safetensors"}, None, UnsafeFile, "outside the index's own folder"),
        ({"a": "1.safetensors", "b": "/etc/passwd"}, None, UnsafeFile, "outside the index's own folder"),
        ({"a": "1.safetensors", "b": ".."}, None, UnsafeFile, "outside the index's own folder"),
        ({"a": "1.safetensors", "b": "x\\2.safetensors"}, None, UnsafeFile, "outside the index's own folder"),
        ({"a": "1.safetensors", "b": 2}, None, FileError, "malformed index"),
        (
            None,
            {"1.safetensors": ["a", "b"], "2.safetensors": ["b"]},
            FileError,
            "layer 'b': in a shard where",
        ),
        (
            None,
            {"1.safetensors": ["a", "c"], "2.safetensors": ["b"]},
            FileError,
            "layer 'c': in a shard where",
        ),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path, weight_map, shards, error, message):
    with pytest.raises(error, match=message.replace("\\", "\\\\")):
        open_checkpoint(sharded(tmp_path, weight_map, shards))


def test_an_index_that_names_a_layer_twice_is_refused(tmp_path):
    text = '{"weight_map": {"a": "1.safetensors", "a": "2.safetensors"}}'
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(FileError, match="unique keys"):
        open_checkpoint(tmp_path)


def test_a_folder_with_pickled_weights_only_is_refused_with_the_way_out(tmp_path):
    torch.save({"w": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsafeFile, match="save_pretrained it again"):
        open_checkpoint(tmp_path)


def test_an_adapter_folder_is_refused_as_a_checkpoint(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match="together with its base"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["missing", "missing.safetensors", "nul\0.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileError, match="no such file"):
        open_checkpoint(tmp_path / name)


def test_an_empty_folder_says_what_it_lacks(tmp_path):
    with pytest.raises(FileError, match=r"wanted model\.safetensors or"):
        open_checkpoint(tmp_path)
