"""Are adapters what the update says they are, and is the model itself again afterwards?"""

from dataclasses import replace

import pytest
import torch
from small_tasks import CONFIG, network, points, run_of, same, task, weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedmerge.client.options.lora import LowRankAdaptation
from fedmerge.client.training import fine_tune, score
from fedmerge.common.errors import ConfigError, NonFinite
from fedmerge.common.training import LocalTraining, Lora


class Mixed(nn.Module):
    """A convolution, a Hugging Face ``Conv1D`` and a linear layer with a normalisation between."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.patches = nn.Conv2d(1, 3, (2, 1), stride=(2, 1), padding=(1, 0))
            self.norm = nn.BatchNorm1d(12)
            self.inner = Conv1D(5, 12)
            self.head = nn.Linear(5, 2)

    def forward(self, x):
        seen = self.patches(x.reshape(len(x), 1, 2, -1)).flatten(1)
        return self.head(self.inner(self.norm(seen)).tanh())


def lora(**settings) -> LocalTraining:
    return LocalTraining.chosen(["lora"], {"lora": settings})


def adapted(model: nn.Module, **settings) -> LowRankAdaptation:
    return LowRankAdaptation(run_of(model), Lora(**settings))


def randomised(option: LowRankAdaptation) -> None:
    """Factors as after some training: B is no longer zero."""
    with torch.no_grad():
        for parameter in option.run.trained.values():
            parameter.normal_(generator=torch.Generator().manual_seed(7))


def test_training_through_adapters_learns_the_task():
    model = network()
    fine_tune(model, task(), replace(CONFIG, steps=60), seed=0, training=lora(rank=2))
    assert score(model, task()).accuracy > 0.9


def test_start_plus_the_sent_product_is_the_model_that_was_trained():
    model, rows = Mixed(), torch.stack([points(9)[i][0] for i in range(9)])
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with adapted(model, rank=2, alpha=3.0) as option:
        randomised(option)
        model.eval()
        adapters_give = model(rows)
    updates = option.updates()
    assert sorted(updates) == ["head.weight", "inner.weight", "patches.weight"]
    assert [updates[name].shape for name in sorted(updates)] == [(2, 5), (12, 5), (3, 1, 2, 1)]
    for name, update in updates.items():
        merged = model.state_dict()[name]
        assert update.rank == 2
        assert not torch.equal(merged, start[name])
        torch.testing.assert_close(start[name] + update.to_dense(), merged)
        assert all(t.dtype == torch.float32 and not t.requires_grad for t in update.tensors())
    torch.testing.assert_close(model(rows), adapters_give)


def test_product_by_hand():
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model[0].weight)
    with adapted(model, rank=1, alpha=4.0) as option, torch.no_grad():
        factors = option.run.trained
        factors["0.lora_A.fedmerge.weight"].copy_(torch.tensor([[1.0, 2.0]]))
        factors["0.lora_B.fedmerge.weight"].copy_(torch.tensor([[3.0], [5.0]]))
    assert model[0].weight.tolist() == [[12.0, 24.0], [20.0, 40.0]]
    left_MR, right_RN = option.updates()["0.weight"].tensors()
    assert (left_MR.tolist(), right_RN.tolist()) == ([[12.0], [20.0]], [[1.0, 2.0]])


def test_before_the_first_step_the_model_computes_what_it_did():
    model, rows = Mixed().eval(), torch.ones(3, 4)
    before, bits = model(rows), weights(model)
    with adapted(model):
        assert torch.equal(model(rows), before)
    assert same(bits, weights(model))


def test_modules_and_names_are_the_models_own_again():
    model = Mixed()
    modules, names = dict(model.named_modules()), list(model.state_dict())
    attributes = set(vars(model))
    fine_tune(model, task(), CONFIG, seed=0, training=lora(dropout=0.3))
    assert list(model.state_dict()) == names
    assert list(model.named_modules()) == list(modules.items())
    assert set(vars(model)) == attributes
    assert all(p.requires_grad for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_only_adapted_layers_and_those_trained_whole_change():
    model = Mixed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fine_tune(model, task(), CONFIG, 0, training=lora(targets="inner.*", full="head.*, absent.*"))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    buffers = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert moved == {"inner.weight", "head.weight", "head.bias"} | buffers
    assert report.trained == moved
    assert list(report.updates) == ["inner.weight"]


def test_layers_trained_whole_get_no_adapter():
    report = fine_tune(network(), task(), CONFIG, 0, training=lora(full="3.*"))
    assert list(report.updates) == ["0.weight"]
    assert report.trained == {"0.weight", "3.weight", "3.bias"}


def test_frozen_layers_get_no_adapter():
    model = network()
    report = fine_tune(model, task(), replace(CONFIG, frozen=("0.*",)), 0, training=lora())
    assert list(report.updates) == ["3.weight"]


def test_same_seed_gives_the_same_bits_and_another_seed_others():
    models = [network() for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fine_tune(model, task(), CONFIG, seed, training=lora(dropout=0.5))
    assert same(weights(models[0]), weights(models[1]))
    assert not same(weights(models[0]), weights(models[2]))


def test_run_that_raises_leaves_the_weights_of_its_last_step():
    def stop(step, steps, value):
        if step == 4:
            raise KeyboardInterrupt

    counted = iter(range(100))

    def breaks(model, batch):
        return task().loss(model, batch) * (torch.nan if next(counted) == 4 else 1)

    models = [network(), network()]
    with pytest.raises(KeyboardInterrupt):
        fine_tune(models[0], task(), CONFIG, 0, on_step=stop, training=lora())
    with pytest.raises(NonFinite, match="not finite at step 5"):
        fine_tune(models[1], task(loss=breaks), CONFIG, 0, training=lora())
    assert same(weights(models[0]), weights(models[1]))
    assert not same(weights(models[0]), weights(network()))
    assert list(models[0].state_dict()) == list(network().state_dict())


class Odd(nn.Module):
    """Layers whose update would be no product, or would reach further than the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(6, 4)
        self.attention = nn.MultiheadAttention(4, 2)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.dilated = nn.Conv2d(4, 4, 2, dilation=2)
        self.mirrored = nn.Conv2d(4, 4, 2, padding=1, padding_mode="reflect")
        self.twice = nn.Linear(4, 4)
        self.again = self.twice
        self.plain = nn.Linear(4, 4)
        self.scores = nn.Linear(4, 6, bias=False)
        self.scores.weight = self.words.weight


def test_layers_that_no_product_fits_are_left_out():
    with adapted(Odd()) as option:
        assert list(option.run.adapters) == ["plain.weight"]


@pytest.mark.parametrize("targets", ["*.query.weight", "0.weight, nothing", "0.bias"])
def test_pattern_that_matches_no_such_layer_is_refused_and_changes_nothing(targets):
    model = network()
    before = weights(model)
    with pytest.raises(ConfigError, match="no layer can have a LoRA adapter"):
        fine_tune(model, task(), CONFIG, 0, training=lora(targets=targets))
    assert same(before, weights(model))


def test_adapter_that_peft_refuses_leaves_the_model_as_it_was(monkeypatch):
    model = network()
    modules = list(model.modules())

    def fails(*args, **settings):
        nn.Sequential.__setattr__(model, "0", nn.Identity())
        raise ValueError("refused")

    monkeypatch.setattr("peft.inject_adapter_in_model", fails)
    with pytest.raises(ValueError, match="refused"):
        adapted(model).__enter__()
    assert list(model.modules()) == modules


def test_update_is_small():
    model = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 2))
    report = fine_tune(model, task(), replace(CONFIG, steps=2), 0, training=lora(rank=1))
    sent = sum(tensor.numel() for update in report.updates.values() for tensor in update.tensors())
    assert sent == (4 + 300) + (300 + 300) + (300 + 2)


def test_a_bias_beside_an_adapter_is_trained_whole_where_it_is_named():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = fine_tune(model, task(), CONFIG, 0, training=lora(full="*.bias"))
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"0.weight", "0.bias", "3.weight", "3.bias"} == report.trained
    assert list(report.updates) == ["0.weight", "3.weight"]
