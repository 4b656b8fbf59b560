"""Does one local run train what it should, and leave everything else as it was?"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedmerge.client.tasks import Task, TrainingConfig
from fedmerge.client.training import fine_tune, rate_factor, score
from fedmerge.common.errors import ConfigError, NonFinite

CONFIG = TrainingConfig(steps=20, batch_size=8, learning_rate=0.05)


def points(rows: int) -> TensorDataset:
    labels = torch.arange(rows) % 2
    noise = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return TensorDataset(noise + 3 * labels[:, None], labels)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def hits(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float()


def task(rows: int = 50, **changes) -> Task:
    return replace(Task("two blobs", points(rows), points(30), loss, hits), **changes)


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 2))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_training_beats_the_untrained_model():
    model = network()
    before = score(model, task()).accuracy
    report = fine_tune(model, task(), CONFIG, seed=0)
    assert score(model, task()).accuracy > max(before, 0.9)
    assert (report.steps, report.examples) == (20, 50)
    assert report.final_loss < report.mean_loss
    assert report.seconds > 0


def test_same_seed_gives_same_bits_and_another_seed_others():
    models = [network(dropout=0.5) for _ in range(3)]
    for model, seed in zip(models, (1, 1, 2), strict=True):
        fine_tune(model, task(), CONFIG, seed)
    assert same(weights(models[0]), weights(models[1]))
    assert not same(weights(models[0]), weights(models[2]))


def test_global_generator_is_left_as_it_was():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2))
    torch.manual_seed(11)
    fine_tune(model, task(), CONFIG, seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_frozen_layers_keep_their_bits_and_their_switches():
    model = network()
    model[3].bias.requires_grad_(False)
    before = weights(model)
    fine_tune(model, task(), replace(CONFIG, frozen=("0.*",)), seed=0)
    after = weights(model)
    assert same(before[:2], after[:2])
    assert not torch.equal(before[2], after[2])
    assert torch.equal(before[3], after[3])
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert all(p.grad is None for p in model.parameters())


def test_every_example_is_seen_once_before_any_is_seen_again():
    seen: list[int] = []

    def watch(model, batch):
        seen.extend(batch[1].tolist())
        return model(torch.ones(1, 4)).sum()

    numbered = TensorDataset(torch.zeros(10, 4), torch.arange(10))
    fine_tune(network(), task(train=numbered, loss=watch), replace(CONFIG, steps=5, batch_size=4), seed=0)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_batch_larger_than_the_data_repeats_nothing_within_it():
    sizes: list[int] = []

    def watch(model, batch):
        sizes.append(len(batch[1]))
        return loss(model, batch)

    fine_tune(network(), task(rows=5, loss=watch), replace(CONFIG, steps=2, batch_size=64), seed=0)
    assert sizes == [5, 5]


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 40, 101])
def test_rate_rises_over_a_tenth_and_then_falls_without_reaching_zero(steps):
    factors = [rate_factor(step, steps) for step in range(steps)]
    top = math.ceil(steps / 10) - 1
    assert factors[top] == 1.0
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert 0 < factors[-1] <= 1


@pytest.mark.parametrize(("bound", "clipped"), [(1e-6, True), (0.0, False)])
def test_clipping_bounds_the_gradient_and_zero_switches_it_off(bound, clipped):
    norms: list[float] = []
    model = nn.Linear(4, 2)

    def watch(step, steps, value):
        norms.append(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))

    fine_tune(model, task(), replace(CONFIG, steps=3, max_grad_norm=bound), seed=0, on_step=watch)
    assert all((norm <= 1.01e-6) is clipped for norm in norms)


def test_progress_is_told_after_every_step():
    told: list[tuple[int, int]] = []
    fine_tune(network(), task(), CONFIG, 0, on_step=lambda step, steps, value: told.append((step, steps)))
    assert told == [(step, 20) for step in range(1, 21)]


def test_the_optimizer_is_handed_out_once_after_the_last_step():
    steps: list[int] = []
    model = network()
    fine_tune(
        model,
        task(),
        CONFIG,
        0,
        on_finish=lambda optimizer: steps.extend(int(s["step"]) for s in optimizer.state.values()),
    )
    assert steps == [20] * len(list(model.parameters()))


def test_gradients_are_handed_back_as_they_were():
    model = network()
    model[0].weight.grad = torch.ones(8, 4)
    fine_tune(model, task(), CONFIG, seed=0)
    assert torch.equal(model[0].weight.grad, torch.ones(8, 4))
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True]


def test_loss_that_is_not_finite_is_refused_and_the_model_handed_back_as_it_was():
    model = network().eval()
    before = weights(model)
    broken = task(loss=lambda model, batch: loss(model, batch) * torch.nan)
    with pytest.raises(NonFinite, match=r"task 'two blobs': the loss is not finite at step 1 of 20"):
        fine_tune(model, broken, replace(CONFIG, frozen=("0.*",)), seed=0)
    assert same(before, weights(model))
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())


def test_gradient_that_is_not_finite_is_refused():
    broken = task(loss=lambda model, batch: (model(batch[0]) * 0).sum().sqrt())
    with pytest.raises(NonFinite, match="the gradient is not finite"):
        fine_tune(network(), broken, CONFIG, seed=0)


def test_gradient_that_is_not_finite_is_refused_without_clipping_too():
    broken = task(loss=lambda model, batch: (model(batch[0]) * 0).sum().sqrt())
    with pytest.raises(NonFinite, match="the gradient is not finite"):
        fine_tune(network(), broken, replace(CONFIG, max_grad_norm=0.0), seed=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"steps": 0}, "steps out of range"),
        ({"batch_size": 0}, "batch_size out of range"),
        ({"learning_rate": math.nan}, "learning_rate out of range"),
        ({"max_grad_norm": -1.0}, "max_grad_norm out of range"),
        ({"frozen": ("*",)}, "nothing left to train"),
    ],
)
def test_config_out_of_range_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        fine_tune(network(), task(), replace(CONFIG, **config), seed=0)


def test_task_without_examples_is_refused():
    empty = TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ConfigError, match="no training examples"):
        fine_tune(network(), task(train=empty), CONFIG, seed=0)
    with pytest.raises(ConfigError, match="no test examples"):
        score(network(), task(test=empty))


def test_score_weighs_every_example_alike_and_restores_the_mode():
    model = network(dropout=0.9).train()
    model[0].eval()
    exact = float(hits(model.eval(), (task().test.tensors[0], task().test.tensors[1])).mean())
    model.train()
    model[0].eval()
    modes = [module.training for module in model.modules()]
    scores = [score(model, task(), batch_size) for batch_size in (1, 7, 64)]
    assert [s.accuracy for s in scores] == pytest.approx([exact] * 3)
    assert {s.examples for s in scores} == {30}
    assert [module.training for module in model.modules()] == modes


def test_nested_batches_reach_the_model():
    def collate(examples):
        inputs = torch.stack([example[0] for example in examples])
        return {"in": [inputs], "out": (torch.stack([example[1] for example in examples]),), "note": "x"}

    nested = task(
        collate=collate,
        loss=lambda model, batch: loss(model, (batch["in"][0], batch["out"][0])),
        metric=lambda model, batch: hits(model, (batch["in"][0], batch["out"][0])),
    )
    plain, other = network(), network()
    fine_tune(plain, task(), CONFIG, seed=0)
    fine_tune(other, nested, CONFIG, seed=0)
    assert same(weights(plain), weights(other))
    assert score(other, nested) == score(plain, task())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_model_comes_back_to_its_device():
    model = network()
    fine_tune(model, task(), CONFIG, seed=0, device="cuda")
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert score(model, task(), device="cuda").accuracy > 0.9
