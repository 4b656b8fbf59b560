"""Are adapters what the update says they are, and is the model itself again afterwards?"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from small_tasks import CONFIG, hits, loss, network, points, run_of, same, task, weights
from torch import nn
from torch.utils.data import default_collate
from transformers.pytorch_utils import Conv1D

from fedmerge.client.options.lora import LowRankAdaptation
from fedmerge.client.training import fine_tune, mean_gradients, score
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
        return task().loss(model, batch) * (torch.nan if model.training and next(counted) == 4 else 1)

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


WHOLE = replace(CONFIG, steps=1, batch_size=50, schedule="constant", max_grad_norm=0.0)
"""One step on all examples of the task at once."""


def gradient_of(model: nn.Module, name: str) -> torch.Tensor:
    """Of the mean loss over all examples of the task, float64."""
    rows = points(50)
    value = task().loss(model, default_collate([rows[i] for i in range(50)]))
    (gradient,) = torch.autograd.grad(value, [model.get_parameter(name)])
    return gradient.double()


def moved_by(config, training, model: nn.Module, name: str) -> torch.Tensor:
    """What a run adds to one weight, float64."""
    before = model.get_parameter(name).detach().double()
    fine_tune(model, task(), config, seed=0, training=training)
    return model.get_parameter(name).detach().double() - before


@pytest.mark.parametrize("rank", [1, 2])
def test_a_step_of_sgd_is_the_gradients_part_in_its_leading_input_directions(rank):
    gradient_MN = gradient_of(network(), "0.weight")
    left, values, right = torch.linalg.svd(gradient_MN, full_matrices=False)
    expected = -0.05 * (left[:, :rank] * values[:rank]) @ right[:rank]
    moved = moved_by(replace(WHOLE, optimizer="sgd"), lora(rank=rank), network(), "0.weight")
    torch.testing.assert_close(moved, expected, atol=1e-6, rtol=1e-4)
    at_random = moved_by(
        replace(WHOLE, optimizer="sgd"), lora(rank=rank, init="random"), network(), "0.weight"
    )
    assert (at_random - expected).norm() > 0.1 * expected.norm()


@pytest.mark.parametrize("rank", [1, 2])
def test_a_first_step_of_adamw_moves_a_layer_as_far_as_one_on_the_whole_weight(rank):
    whole = moved_by(WHOLE, None, network(), "0.weight")
    factors = moved_by(WHOLE, lora(rank=rank), network(), "0.weight")
    torch.testing.assert_close(factors.norm(dim=1), whole.norm(dim=1), rtol=1e-3, atol=1e-5)


def test_adapters_of_all_kinds_of_layers_begin_with_their_leading_inputs():
    rows = default_collate([points(50)[i] for i in range(50)])
    model = Mixed().eval()
    task().loss(model, rows).backward()
    of_inputs = {
        "patches": model.patches.weight.grad.flatten(1),
        "inner": model.inner.weight.grad.T,
        "head": model.head.weight.grad,  # of rank 1: two classes
    }
    run = run_of(Mixed())
    run.gradients = partial(mean_gradients, run.model, task(), list(range(50)), 16, torch.device("cpu"))
    with LowRankAdaptation(run, Lora(rank=2)) as option:
        for path, gradient_MN in of_inputs.items():
            begun = option.run.trained[f"{path}.lora_A.fedmerge.weight"].detach().flatten(1)
            assert not option.run.trained[f"{path}.lora_B.fedmerge.weight"].any()
            count = 1 if path == "head" else 2
            right = torch.linalg.svd(gradient_MN, full_matrices=False).Vh[:count]
            size = math.sqrt(gradient_MN.shape[1] / 2)
            found = (begun[:count] @ right.T).abs()
            torch.testing.assert_close(found, size * torch.eye(count), atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("share", [None, 0.0])
def test_a_layer_that_the_loss_does_not_depend_on_begins_at_random(share):
    def both(model, batch):
        value = loss(model["used"], batch)
        return value if share is None else value + share * model["spare"](batch[0]).sum()

    model = nn.ModuleDict({"used": network(), "spare": nn.Linear(4, 4)})
    trained = task(loss=both, metric=lambda m, b: hits(m["used"], b))
    report = fine_tune(model, trained, CONFIG, 0, training=lora(rank=1))
    assert report.updates["spare.weight"].right_RN.any()
    assert not report.updates["spare.weight"].to_dense().any()
    assert report.updates["used.0.weight"].to_dense().any()


def test_more_directions_than_a_gradient_has_are_filled_with_random_ones():
    report = fine_tune(network(), task(), replace(CONFIG, steps=3), 0, training=lora(rank=6))
    assert report.updates["3.weight"].right_RN.shape == (6, 8)
    assert int(torch.linalg.matrix_rank(report.updates["3.weight"].right_RN)) == 6


def test_a_gradient_that_is_not_finite_stops_the_run_before_its_first_step():
    def breaks(model, batch):
        return loss(model, batch) * torch.nan

    model = network()
    before = weights(model)
    with pytest.raises(NonFinite, match="gradient at the start of task 'two blobs'"):
        fine_tune(model, task(loss=breaks), CONFIG, 0, training=lora())
    assert same(before, weights(model))


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
