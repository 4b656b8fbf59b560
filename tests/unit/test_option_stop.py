"""Does a run end when the held-out loss no longer falls, with the weights of its lowest?"""

from dataclasses import replace

import pytest
import torch
from small_tasks import CONFIG, loss, network, run_of, same, task, weights
from torch import nn
from torch.utils.data import TensorDataset

from fedmerge.client.options.stop import EarlyStopping
from fedmerge.client.training import fine_tune
from fedmerge.common.errors import ConfigError
from fedmerge.common.training import LocalTraining, Stop

NUMBERED = TensorDataset(torch.zeros(20, 4), torch.arange(20))


def stopping(**settings) -> LocalTraining:
    return LocalTraining.chosen(["stop"], {"stop": settings})


def followed(losses: list[float], **settings) -> tuple[EarlyStopping, list[torch.Tensor]]:
    """The option after a run whose looks gave these losses, and the weights after every step."""
    model, left = nn.Linear(2, 1), iter(losses)
    run = run_of(model, steps=len(losses))
    run.held_out_loss = lambda: next(left)
    seen = []
    with EarlyStopping(run, Stop(**{"every": 1, **settings})) as option:
        while run.step < run.steps and not run.over:
            with torch.no_grad():
                model.weight.add_(1.0)
            run.step += 1
            option.after_step()
            seen.append(model.weight.detach().clone())
    return option, seen


@pytest.mark.parametrize(
    ("losses", "steps", "kept"),
    [
        ([5.0, 4.0, 3.0, 2.0], 4, 4),
        ([5.0, 3.0, 4.0, 4.0, 2.0], 4, 2),
        ([5.0, 3.0, 4.0, 2.0, 3.0], 5, 4),
        ([3.0, 3.0, 3.0, 1.0], 3, 1),
        ([float("nan"), 3.0, 4.0], 3, 2),
    ],
)
def test_run_ends_after_two_looks_without_a_new_lowest_loss(losses, steps, kept):
    option, seen = followed(losses, patience=2)
    assert (option.run.step, option.run.kept) == (steps, kept)
    assert torch.equal(option.run.model.weight, seen[kept - 1])


def test_looks_are_taken_every_few_steps_and_after_the_last():
    taken = []
    run = run_of(nn.Linear(2, 1), steps=7)
    run.held_out_loss = lambda: taken.append(run.step) or 1.0 / run.step
    with EarlyStopping(run, Stop(every=3)) as option:
        for run.step in range(1, 8):
            option.after_step()
    assert taken == [3, 6, 7]


def test_run_that_raises_keeps_its_last_weights():
    model = nn.Linear(2, 1)
    run = run_of(model, steps=9)
    run.held_out_loss, run.step = lambda: 1.0, 1

    def interrupted():
        with EarlyStopping(run, Stop(every=1)) as option, torch.no_grad():
            option.after_step()
            model.weight.fill_(7.0)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert model.weight.tolist() == [[7.0, 7.0]]
    assert run.kept is None


def test_held_out_examples_are_never_trained_on_and_looked_at_whole():
    trained, held_out = set(), []

    def watch(model, batch):
        if model.training:
            trained.update(batch[1].tolist())
        else:
            assert not torch.is_grad_enabled()
            held_out.append(batch[1].tolist())
        return model(batch[0]).sum()

    config = replace(CONFIG, batch_size=4, eval_batch_size=3, steps=20)
    model = network()
    report = fine_tune(
        model, task(train=NUMBERED, loss=watch), config, 0, training=stopping(held_out=0.25, every=20)
    )
    assert [len(batch) for batch in held_out] == [3, 2]
    rows = {row for batch in held_out for row in batch}
    assert trained | rows == set(range(20))
    assert not trained & rows
    assert report.examples == 15
    assert model.training


def test_held_out_loss_weighs_every_example_alike(monkeypatch):
    model = nn.Linear(4, 2)
    data = TensorDataset(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)), torch.arange(7) % 2)
    rows, looks = [], []

    def watch(model, batch):
        if not model.training:
            rows.append(batch)
        return loss(model, batch)

    monkeypatch.setattr(EarlyStopping, "after_step", lambda self: looks.append(self.run.held_out_loss()))
    config = replace(CONFIG, steps=1, learning_rate=0.0, eval_batch_size=4)
    fine_tune(model, task(train=data, loss=watch), config, 3, training=stopping(held_out=0.75))
    assert [len(batch[1]) for batch in rows] == [4, 1]
    together = [torch.cat(parts) for parts in zip(*rows, strict=True)]
    assert looks == [pytest.approx(float(loss(model, together).detach()), rel=1e-6)]


def test_a_single_example_cannot_be_held_out():
    with pytest.raises(ConfigError, match="too few training examples to hold some out"):
        fine_tune(network(), task(rows=1), CONFIG, 0, training=stopping())


@pytest.mark.parametrize(("share", "examples"), [(0.01, 19), (0.99, 1)])
def test_at_least_one_example_is_held_out_and_one_trained_on(share, examples):
    model = network()
    data = TensorDataset(torch.zeros(20, 4), torch.arange(20) % 2)
    report = fine_tune(model, task(train=data), CONFIG, 0, training=stopping(held_out=share, every=100))
    assert report.examples == examples


@pytest.mark.parametrize("names", [["stop"], ["lora", "stop"]])
def test_model_ends_with_the_weights_of_the_step_that_is_told(names):
    training = LocalTraining.chosen(names, {"stop": {"every": 1, "patience": 2, "held_out": 0.3}})
    noise = TensorDataset(
        torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 2
    )
    model, told = network(), []
    report = fine_tune(
        model, task(train=noise), CONFIG, 0, on_step=lambda step, *_: told.append(step), training=training
    )
    assert report.kept_step == report.steps - 2 == len(told) - 2 < 18

    def halt(step, steps, value):
        if step == report.kept_step:
            raise KeyboardInterrupt

    again = network()
    with pytest.raises(KeyboardInterrupt):
        fine_tune(again, task(train=noise), CONFIG, 0, on_step=halt, training=training)
    assert same(weights(model), weights(again))
