"""Does one local run train what it should, and leave everything else as it was?"""

import math
from dataclasses import replace
from itertools import chain, pairwise

import pytest
import torch
from small_tasks import CONFIG, hits, loss, network, run_of, same, task, weights
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedmerge.client.batches import Order
from fedmerge.client.loop import TrainingLoop, optimizer_of, rate_factor
from fedmerge.client.tasks import TrainingConfig
from fedmerge.client.training import fine_tune, score, settled
from fedmerge.common.errors import ConfigError, NonFinite
from fedmerge.common.training import LocalTraining, Loop

NUMBERED = TensorDataset(torch.zeros(10, 4), torch.arange(10))


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

    fine_tune(network(), task(train=NUMBERED, loss=watch), replace(CONFIG, steps=5, batch_size=4), seed=0)
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def batches_seen(config: TrainingConfig, rows: TensorDataset = NUMBERED) -> list[list[int]]:
    seen: list[list[int]] = []

    def watch(model, batch):
        seen.append(batch[1].tolist())
        return model(torch.ones(1, 4)).sum()

    fine_tune(network(), task(train=rows, loss=watch), config, seed=0)
    return seen


def test_every_epoch_sees_every_example_once_and_its_last_batch_may_be_short():
    seen = batches_seen(replace(CONFIG, epochs=3, batch_size=4))
    assert [len(batch) for batch in seen] == [4, 4, 2] * 3
    epochs = [list(chain(*seen[i : i + 3])) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize(
    ("epochs", "batch_size", "accumulate", "steps"),
    [(1, 10, 1, 1), (1, 5, 2, 1), (2, 4, 1, 6), (2, 4, 2, 4), (1, 64, 8, 1), (3, 3, 3, 6)],
)
def test_steps_of_an_epoch_are_counted_by_what_a_step_takes(epochs, batch_size, accumulate, steps):
    config = replace(CONFIG, epochs=epochs, batch_size=batch_size, accumulate=accumulate)
    assert fine_tune(network(), task(rows=10), config, 0).steps == steps


def test_accumulated_batches_are_the_large_batchs_own_parts():
    large = batches_seen(replace(CONFIG, steps=2, batch_size=9))
    parts = batches_seen(replace(CONFIG, steps=2, batch_size=4, accumulate=2))
    assert [len(batch) for batch in parts] == [4, 4] * 2
    assert list(chain(*parts)) == list(chain(*large))[:16]


@pytest.mark.parametrize(("batch_size", "accumulate"), [(16, 2), (8, 4), (5, 7), (31, 2)])
def test_accumulated_gradient_is_that_of_one_large_batch(batch_size, accumulate):
    rows = min(batch_size * accumulate, 50)
    models, losses = [network().double(), network().double()], []
    wide = task(collate=lambda examples: (torch.stack([e[0] for e in examples]).double(), labels(examples)))
    for model, changes in zip(
        models,
        ({"batch_size": rows}, {"batch_size": batch_size, "accumulate": accumulate}),
        strict=True,
    ):
        report = fine_tune(model, wide, replace(CONFIG, optimizer="sgd", steps=4, **changes), seed=0)
        losses.append((report.final_loss, report.mean_loss))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=1e-12, atol=1e-14)


def labels(examples) -> torch.Tensor:
    return torch.stack([example[1] for example in examples])


def test_sgd_with_momentum_by_hand():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ones = TensorDataset(torch.ones(4, 1), torch.zeros(4))
    config = TrainingConfig(
        steps=3, optimizer="sgd", momentum=0.5, learning_rate=0.1, schedule="constant", max_grad_norm=0.0
    )
    fine_tune(model, task(train=ones, loss=lambda model, batch: model(batch[0]).mean()), config, seed=0)
    assert float(model.weight.detach()) == pytest.approx(-0.1 * (1 + 1.5 + 1.75))


@pytest.mark.parametrize(
    ("schedule", "wanted"), [("constant", [1.0] * 5), ("linear", [1.0, 0.8, 0.6, 0.4, 0.2])]
)
def test_learning_rate_follows_its_schedule(schedule, wanted):
    model, seen = nn.Linear(1, 1, bias=False), [0.0]
    nn.init.zeros_(model.weight)
    ones = TensorDataset(torch.ones(4, 1), torch.zeros(4))
    config = TrainingConfig(steps=5, optimizer="sgd", learning_rate=1.0, schedule=schedule, max_grad_norm=0.0)
    fine_tune(
        model,
        task(train=ones, loss=lambda model, batch: model(batch[0]).mean()),
        config,
        seed=0,
        on_step=lambda *_: seen.append(-float(model.weight.detach())),
    )
    assert [b - a for a, b in pairwise(seen)] == pytest.approx(wanted, rel=1e-5)


def test_bf16_computes_the_forward_pass_in_bfloat16_and_trains_float32_weights():
    dtypes = set()

    def watch(model, batch):
        output = model(batch[0])
        dtypes.add(output.dtype)
        return cross_entropy(output.float(), batch[1])

    model = network()
    fine_tune(model, task(loss=watch), replace(CONFIG, precision="bf16"), seed=0)
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert score(model, task()).accuracy > 0.9


def test_fp16_is_refused_without_a_cuda_device():
    with pytest.raises(ConfigError, match=r"fp16 needs a CUDA device: got cpu\. Use bf16"):
        fine_tune(network(), task(), replace(CONFIG, precision="fp16"), seed=0, device="cpu")


def scaled_loop(loss, steps: int) -> TrainingLoop:
    """In fp16 on the CPU, where torch's scaler works too."""
    config = replace(CONFIG, precision="fp16")
    run = replace(run_of(network(), steps), config=config)
    optimizer = optimizer_of(run.trained.values(), config)
    return TrainingLoop(run, task(loss=loss), [], optimizer, Order(range(50), config, 0), torch.device("cpu"))


def test_fp16_steps_whose_gradients_overflow_change_nothing_and_lower_the_scale():
    loop = scaled_loop(lambda model, batch: 1000 * cross_entropy(model(batch[0]).float(), batch[1]), steps=60)
    begun, moved = weights(loop.run.model), []
    loop.train(lambda: moved.append(not same(begun, weights(loop.run.model))))
    assert moved == sorted(moved)
    assert not moved[0]
    assert moved[20]
    assert score(loop.run.model, task()).accuracy > 0.9


def test_fp16_gives_up_on_gradients_that_are_never_finite():
    loop = scaled_loop(lambda model, batch: (model(batch[0]) * 0).sum().float().sqrt(), steps=60)
    with pytest.raises(NonFinite, match="the gradient is not finite at step 18 of 60"):
        loop.train(lambda: None)
    assert same(weights(network()), weights(loop.run.model))


@pytest.mark.parametrize(
    ("loop", "changes"),
    [
        (Loop(), {}),
        (Loop(steps=7), {"steps": 7, "epochs": None}),
        (Loop(epochs=3), {"epochs": 3}),
        (Loop(steps=7, epochs=3), {"steps": 7, "epochs": 3}),
        (Loop(learning_rate=0.0, optimizer="sgd"), {"learning_rate": 0.0, "optimizer": "sgd"}),
    ],
)
def test_servers_settings_take_the_place_of_the_streams(loop, changes):
    stream = replace(CONFIG, epochs=2, frozen=("a",))
    assert settled(stream, loop) == replace(stream, **changes)


def test_servers_settings_are_those_of_the_run():
    training = LocalTraining(loop=Loop(steps=3))
    assert fine_tune(network(), task(), replace(CONFIG, epochs=9), 0, training=training).steps == 3


def test_report_names_what_may_have_changed():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    report = fine_tune(model, task(), replace(CONFIG, frozen=("0.*",)), seed=0)
    assert report.trained == {name for name in model.state_dict() if not name.startswith("0.")}
    assert (report.kept_step, report.updates) == (20, {})


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
        ({"epochs": 0}, "epochs out of range"),
        ({"accumulate": 0}, "accumulate out of range"),
        ({"momentum": -0.1}, "momentum out of range"),
        ({"optimizer": "adam"}, "unknown optimizer: got adam, wanted adamw or sgd"),
        ({"schedule": "cosine"}, "unknown schedule"),
        ({"precision": "fp8"}, "unknown precision"),
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_fp16_learns():
    model = network()
    fine_tune(model, task(), replace(CONFIG, precision="fp16"), seed=0, device="cuda")
    assert score(model, task()).accuracy > 0.9
