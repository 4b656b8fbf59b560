"""Does an adapter become the difference that peft itself would merge, or is it refused with a reason?"""

import copy
import json
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, GPT2Config, GPT2LMHeadModel

from fedmerge.common import adapter as module
from fedmerge.common.adapter import fit_names, open_adapter
from fedmerge.common.base import Base
from fedmerge.common.errors import (
    BaseMismatch,
    DtypeMismatch,
    FileError,
    NonFinite,
    ShapeMismatch,
    UnknownLayer,
    UnsupportedAdapter,
)
from fedmerge.common.sources import check_vector, open_update
from fedmerge.common.taskvector import Dense, LowRank, Manifest

BERT = BertConfig(
    vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
)
GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=12)

pytestmark = pytest.mark.filterwarnings("ignore")


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 8, 3)
        self.point = nn.Conv2d(8, 4, 1)
        self.line = nn.Conv1d(4, 6, 2)
        self.out = nn.Linear(6, 6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 8)
        self.out = nn.Linear(8, 4)


def adapt(model: nn.Module, folder, **settings):
    """Trains nothing but fills every adapter weight with random numbers; saves and merges with peft."""
    torch.manual_seed(1)
    base = Base.from_model(model, private=["classifier.*"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**settings))
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.copy_(torch.randn_like(parameter))
        adapted.save_pretrained(folder)
        return base, adapted.merge_and_unload().state_dict()


CASES = {
    "plain": (
        lambda: BertModel(BERT),
        {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value", "dense"]},
    ),
    "rank-stabilised": (
        lambda: BertModel(BERT),
        {"r": 5, "lora_alpha": 3, "use_rslora": True, "target_modules": ["query", "dense"]},
    ),
    "patterns": (
        lambda: BertModel(BERT),
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": ["query", "value", "dense"],
            "rank_pattern": {r"layer.0.*.query": 2, "^encoder.layer.1.attention.self.value": 3, "query": 7},
            "alpha_pattern": {"attention.output.dense": 11, "value": 2},
        },
    ),
    "rank-stabilised patterns": (
        lambda: BertModel(BERT),
        {
            "use_rslora": True,
            "target_modules": ["query", "key"],
            "rank_pattern": {"query": 3},
            "alpha_pattern": {"key": 5},
        },
    ),
    "every square of gpt2": (
        lambda: GPT2LMHeadModel(GPT2),
        {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "gpt2 with the flag left to peft": (
        lambda: GPT2LMHeadModel(GPT2),
        {"target_modules": ["c_attn", "c_proj", "c_fc"]},
    ),
    "convolutions": (Picture, {"r": 2, "lora_alpha": 5, "target_modules": ["wide", "point", "line", "out"]}),
    "embedding": (Tokens, {"r": 3, "lora_alpha": 5, "target_modules": ["tokens", "out"]}),
    "embedding of a transformer": (
        lambda: GPT2LMHeadModel(GPT2),
        {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True},
    ),
    "modules to save": (
        lambda: BertModel(BERT),
        {"target_modules": ["query"], "modules_to_save": ["pooler"]},
    ),
    "orthogonal": (lambda: BertModel(BERT), {"target_modules": ["query"], "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize(("make", "settings"), CASES.values(), ids=CASES)
def test_one_adapter_with_weight_one_equals_peft_merge_and_unload(tmp_path, make, settings):
    base, wanted = adapt(make(), tmp_path, **settings)
    vector = open_adapter(tmp_path, base)
    check_vector(vector, base)
    assert vector.names
    for name, merged in vector.apply(base):
        torch.testing.assert_close(merged, wanted[name], rtol=1e-5, atol=1e-5)
    changed = [name for name in base.merged_layers if not torch.equal(base.read(name), wanted[name])]
    assert list(vector.names) == changed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_stored_narrow_are_merged_in_float32(tmp_path, dtype):
    base, _ = adapt(Tokens(), tmp_path, r=3, lora_alpha=5, target_modules=["out"])
    path = tmp_path / "adapter_model.safetensors"
    held = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(held, path)
    a, b = (
        held["base_model.model.out.lora_A.weight"].float(),
        held["base_model.model.out.lora_B.weight"].float(),
    )
    update = open_adapter(tmp_path, base).read("out.weight")
    torch.testing.assert_close(update.to_dense(), b @ a * (5 / 3))


def test_adapted_layers_are_low_rank_with_the_scale_on_the_left(tmp_path):
    base, _ = adapt(Tokens(), tmp_path, r=3, lora_alpha=6, target_modules=["out"])
    vector = open_adapter(tmp_path, base, manifest=Manifest(task="text", examples=9))
    held = load_file(tmp_path / "adapter_model.safetensors")
    update = vector.read("out.weight")
    assert isinstance(update, LowRank)
    assert torch.equal(update.right_RN, held["base_model.model.out.lora_A.weight"])
    assert torch.equal(update.left_MR, held["base_model.model.out.lora_B.weight"] * 2)
    assert vector.unchanged == ("tokens.weight", "out.bias")
    assert vector.manifest == Manifest(base=base.fingerprint, task="text", examples=9)


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    base, _ = adapt(Tokens(), tmp_path, target_modules=["out"])
    reads = []
    monkeypatch.setattr(module, "tensor_reader", lambda path: reads.append)
    check_vector(open_adapter(tmp_path, base), base)
    assert reads == []


def test_a_private_head_saved_whole_is_left_out(tmp_path):
    base, _ = adapt(
        BertForSequenceClassification(BERT),
        tmp_path,
        target_modules=["query"],
        modules_to_save=["classifier"],
    )
    vector = open_adapter(tmp_path, base)
    assert not [name for name in vector.names if "classifier" in name]
    check_vector(vector, base)


def test_a_module_saved_whole_is_a_dense_difference(tmp_path):
    base, wanted = adapt(BertModel(BERT), tmp_path, target_modules=["query"], modules_to_save=["pooler"])
    update = open_adapter(tmp_path, base).read("pooler.dense.weight")
    assert isinstance(update, Dense)
    assert torch.equal(update.values, wanted["pooler.dense.weight"] - base.read("pooler.dense.weight"))


def test_a_base_without_the_prefix_takes_the_adapter_of_the_model_with_it(tmp_path):
    model = BertForSequenceClassification(BERT)
    _, wanted = adapt(model, tmp_path, target_modules=["query"], modules_to_save=["classifier"])
    base = Base.from_model(model.bert)
    with pytest.raises(UnknownLayer, match="name it as private if it is a task head"):
        open_adapter(tmp_path, base)
    vector = open_adapter(tmp_path, base, private=["classifier.*"])
    for name, merged in vector.apply(base):
        torch.testing.assert_close(merged, wanted[f"bert.{name}"], rtol=1e-5, atol=1e-5)


def test_a_base_with_the_prefix_takes_the_adapter_of_the_model_without_it(tmp_path):
    model = BertForSequenceClassification(BERT)
    adapt(model.bert, tmp_path, target_modules=["query"])
    assert all(name.startswith("bert.") for name in open_adapter(tmp_path, Base.from_model(model)).names)


@pytest.mark.parametrize(
    ("known", "fits"),
    [
        (["a.q", "b.a.q"], {"a.q": "a.q"}),
        (["x.a.q"], {"a.q": "x.a.q"}),
        (["q"], {"a.q": "q"}),
        (["x.a.q", "y.a.q"], None),
        (["other"], None),
    ],
)
def test_names_are_resolved_only_by_a_single_prefix(known, fits):
    assert fit_names(["a.q"], known) == fits


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path):
    adapt(BertModel(BERT), tmp_path, target_modules=["query"])
    with pytest.raises(UnknownLayer, match=r"encoder\.layer\.0\.attention\.self\.query"):
        open_adapter(tmp_path, Base.from_model(GPT2LMHeadModel(GPT2)))


def test_an_adapter_of_a_wider_base_is_refused_by_shape(tmp_path):
    adapt(nn.Sequential(nn.Linear(6, 4)), tmp_path, target_modules=["0"])
    with pytest.raises(ShapeMismatch, match=r"layer '0.weight'.*wanted \(4, 5\)"):
        open_adapter(tmp_path, Base.from_model(nn.Sequential(nn.Linear(5, 4))))


def test_update_sources_recognise_an_adapter_folder(tmp_path):
    base, _ = adapt(Tokens(), tmp_path, target_modules=["out"])
    assert open_update(tmp_path, base).names == ("out.weight",)


@pytest.fixture
def folder(tmp_path):
    adapt(Tokens(), tmp_path, r=3, target_modules=["out", "tokens"])
    return tmp_path


def base_of_tokens():
    torch.manual_seed(0)
    return Base.from_model(Tokens())


def change_settings(folder, **settings):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def change_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    held = load_file(path)
    change(held)
    save_file(held, path)


REFUSED = {
    "peft_type": "IA3",
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "layer_replication": [[0, 1]],
    "target_parameters": ["experts.up"],
    "trainable_token_indices": [1],
    "megatron_config": {"a": 1},
    "alora_invocation_tokens": [3],
    "kasa_config": {"beta": 1},
    "use_qalora": True,
    "a_setting_of_tomorrow": True,
}


@pytest.mark.parametrize("setting", REFUSED)
def test_settings_that_are_no_plain_product_are_refused_with_the_reason(folder, setting):
    change_settings(folder, **{setting: REFUSED[setting]})
    with pytest.raises(UnsupportedAdapter, match=f"{setting}.*merge_and_unload"):
        open_adapter(folder, base_of_tokens())


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unheard_of"]
)
def test_initialisations_that_change_the_base_are_refused(folder, init):
    change_settings(folder, init_lora_weights=init)
    with pytest.raises(UnsupportedAdapter, match=f"init_lora_weights='{init}'"):
        open_adapter(folder, base_of_tokens())


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_keep_the_base_are_taken(folder, init):
    change_settings(folder, init_lora_weights=init, eva_config={"rho": 2.0})
    assert open_adapter(folder, base_of_tokens()).names == ("tokens.weight", "out.weight")


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": "3"},
        {"r": True},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"rank_pattern": {"out": -1}},
        {"rank_pattern": {"(": 1}},
        {"alpha_pattern": {"a{99999999999}": 1}},
        {"fan_in_fan_out": "yes"},
        {"peft_type": None},
    ],
)
def test_malformed_settings_are_refused(folder, settings):
    change_settings(folder, **settings)
    with pytest.raises(FileError, match=r"adapter_config.json"):
        open_adapter(folder, base_of_tokens())


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}', "[" * 100_000])
def test_settings_that_are_no_json_object_are_refused(folder, text):
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(FileError, match=r"adapter_config.json"):
        open_adapter(folder, base_of_tokens())


def test_a_rank_other_than_the_settings_say_is_refused(folder):
    change_settings(folder, rank_pattern={"out": 4})
    with pytest.raises(ShapeMismatch, match=r"layer 'out.weight'.*wanted rank 4"):
        open_adapter(folder, base_of_tokens())


OUT = "base_model.model.out."


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(OUT + "lora_A.weight"), UnsupportedAdapter, "not one pair"),
        (lambda t: t.update({OUT + "lora_magnitude_vector": torch.ones(4)}), UnsupportedAdapter, "no factor"),
        (lambda t: t.update({OUT + "lora_B.bias": torch.ones(4)}), UnsupportedAdapter, "no factor"),
        (
            lambda t: t.update({OUT + "weight": torch.ones(4, 8)}),
            UnsupportedAdapter,
            "both adapted and saved",
        ),
        (lambda t: t.update({OUT + "bias": torch.ones(5)}), ShapeMismatch, "layer 'out.bias'"),
        (lambda t: t.update({OUT + "lora_A.weight": torch.ones(3, 9)}), ShapeMismatch, "layer 'out.weight'"),
        (
            lambda t: t.update({OUT + "lora_A.weight": torch.ones(3, 8).int()}),
            DtypeMismatch,
            "layer 'out.weight'",
        ),
        (lambda t: t.update({"base_model.model.head.weight": torch.ones(1)}), UnknownLayer, "'head.weight'"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder, change, error, message):
    change_tensors(folder, change)
    with pytest.raises(error, match=message):
        open_adapter(folder, base_of_tokens())


def test_a_factor_that_is_not_finite_is_refused_when_read(folder):
    change_tensors(folder, lambda t: t[OUT + "lora_A.weight"].fill_(float("nan")))
    vector = open_adapter(folder, base_of_tokens())
    with pytest.raises(NonFinite, match=r"layer 'out.weight'"):
        vector.read("out.weight")


def test_a_copy_of_the_bases_weights_must_be_the_bases(folder):
    base = base_of_tokens()
    key = "base_model.model.tokens.base_layer.weight"
    change_tensors(folder, lambda t: t.update({key: base.read("tokens.weight")}))
    assert isinstance(open_adapter(folder, base).read("tokens.weight"), LowRank)
    change_tensors(folder, lambda t: t[key][0].add_(1))
    with pytest.raises(BaseMismatch, match=r"layer 'tokens.weight'"):
        open_adapter(folder, base).read("tokens.weight")
    change_tensors(folder, lambda t: t.update({key: torch.ones(31, 8)}))
    with pytest.raises(ShapeMismatch, match=r"layer 'tokens.weight'"):
        open_adapter(folder, base)


def test_a_square_layer_beside_layers_stored_the_other_way_is_refused(tmp_path):
    model = GPT2LMHeadModel(GPT2)
    base, _ = adapt(model, tmp_path, target_modules=["c_attn", "attn.c_proj"], fan_in_fan_out=True)
    change_settings(tmp_path, fan_in_fan_out=False)
    with pytest.raises(UnsupportedAdapter, match=r"c_proj.weight.*may be stored either way"):
        open_adapter(tmp_path, base)


def test_an_adapted_attention_of_torch_is_refused(tmp_path):
    base, _ = adapt(Attention(), tmp_path, target_modules=["attention"])
    with pytest.raises(UnsupportedAdapter, match="merges twice"):
        open_adapter(tmp_path, base)


def test_patterns_that_give_one_layer_two_alphas_are_refused(tmp_path):
    patterns = {"output.dense": 11, "dense": 2}
    base, _ = adapt(BertModel(BERT), tmp_path, target_modules=["dense"], alpha_pattern=patterns)
    with pytest.raises(UnsupportedAdapter, match=r"output.dense.weight.*which came first is lost: got 2, 11"):
        open_adapter(tmp_path, base)


def test_grouped_convolutions_are_refused(tmp_path):
    model = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2))
    base, _ = base_and_grouped(model, tmp_path)
    with pytest.raises(ShapeMismatch, match="Grouped convolutions"):
        open_adapter(tmp_path, base)


def base_and_grouped(model, folder):
    base = Base.from_model(model)
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["0"]))
    adapted.save_pretrained(folder)
    return base, adapted


def test_pickled_adapter_weights_are_refused_with_the_way_out(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(UnsupportedAdapter, match="save_pretrained it again"):
        open_adapter(folder, base_of_tokens())


def test_an_adapter_without_weights_is_refused(folder):
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(FileError, match="no such file"):
        open_adapter(folder, base_of_tokens())
