"""One plain training loop, and the scoring that goes with it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from fedmerge.client.running import batch_of, left_as_found, place_of, seeded
from fedmerge.client.tasks import Task, TrainingConfig, length
from fedmerge.common.errors import ConfigError, NonFinite
from fedmerge.common.layers import matches
from fedmerge.common.score import Score

OnStep = Callable[[int, int, float], None]
"""Called after every step with the step (from 1), the number of steps and the step's loss."""
OnFinish = Callable[[AdamW], None]
"""Called after the last step with the optimizer, whose state is dropped afterwards."""


@dataclass(frozen=True)
class TrainingReport:
    """What one fine-tuning run did.

    Attributes:
        steps: optimizer steps taken.
        examples: distinct training examples held, however often each was seen.
        final_loss: loss of the last batch, before its step.
        mean_loss: mean of the batch losses over all steps.
        seconds: wall-clock time of the loop.
    """

    steps: int
    examples: int
    final_loss: float
    mean_loss: float
    seconds: float


def fine_tune(
    model: nn.Module,
    task: Task,
    config: TrainingConfig,
    seed: int,
    on_step: OnStep | None = None,
    device: str = "auto",
    on_finish: OnFinish | None = None,
) -> TrainingReport:
    """Trains ``model`` on ``task`` in place.

    The same seed, model, task and config give the same weights on one machine's CPU with one number of
    threads; torch's global generator is left as it was. ``requires_grad`` of every parameter, the
    training mode and the device of the model are restored afterwards, also when an error is raised; the
    weights are then those of the last completed step.

    Args:
        seed: of the order of the examples and of dropout.
        on_step: progress; see :data:`OnStep`.
        device: ``auto`` (CUDA if there is one, else CPU) or a torch device.
        on_finish: what to keep of the optimizer; see :data:`OnFinish`.

    Raises:
        ConfigError: the task has no training examples, a number in ``config`` is out of range, or
            ``config.frozen`` leaves nothing to train.
        NonFinite: the loss or the gradients became NaN or infinite.
    """
    _check_training(task, config)
    place = place_of(device)
    with left_as_found(model), seeded(seed, place):
        model.to(place).train()
        optimizer = AdamW(_freeze(model, config), lr=config.learning_rate, weight_decay=config.weight_decay)
        started = time.perf_counter()
        losses = _train(model, optimizer, task, config, seed, on_step, place)
        seconds = time.perf_counter() - started
        if on_finish is not None:
            on_finish(optimizer)
    return TrainingReport(
        len(losses), length(task.train), losses[-1], math.fsum(losses) / len(losses), seconds
    )


@torch.no_grad()
def score(model: nn.Module, task: Task, batch_size: int = 64, device: str = "auto") -> Score:
    """Mean of ``task.metric`` over the task's test examples, in evaluation mode and without gradients.

    The test set is read in its own order, so a set sorted by length pads little. The training mode and
    the device of the model are restored afterwards.

    Raises:
        ConfigError: the task has no test examples, or ``batch_size`` is below 1.
    """
    examples = length(task.test)
    if not examples:
        raise ConfigError("no test examples", where=f"task {task.name!r}", wanted="at least 1")
    if batch_size < 1:
        raise ConfigError("batch_size out of range", got=batch_size, wanted="at least 1")
    place = place_of(device)
    with left_as_found(model):
        model.to(place).eval()
        total = 0.0
        for start in range(0, examples, batch_size):
            batch = batch_of(task, task.test, range(start, min(start + batch_size, examples)), place)
            total += float(task.metric(model, batch).double().sum())
    return Score(total / examples, examples)


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate in ``(0, 1]`` at ``step`` (from 0): up over a tenth, then down."""
    warm_up = max(1, math.ceil(steps / 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return max(steps - step, 1) / (steps - warm_up + 1)


def _train(
    model: nn.Module,
    optimizer: AdamW,
    task: Task,
    config: TrainingConfig,
    seed: int,
    on_step: OnStep | None,
    place: torch.device,
) -> list[float]:
    trained = optimizer.param_groups[0]["params"]
    schedule = LambdaLR(optimizer, lambda step: rate_factor(step, config.steps))
    batches = _shuffled_batches(length(task.train), config.batch_size, seed)
    losses: list[float] = []
    for step in range(1, config.steps + 1):
        loss = task.loss(model, batch_of(task, task.train, next(batches), place))
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise _diverged("loss", task, step, config)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = clip_grad_norm_(trained, config.max_grad_norm or math.inf)
        if not torch.isfinite(norm):
            raise _diverged("gradient", task, step, config)
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step, config.steps, losses[-1])
    return losses


def _shuffled_batches(examples: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Endless batches of row numbers; every row is seen once before any is seen again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, examples)
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(examples, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]


def _freeze(model: nn.Module, config: TrainingConfig) -> list[nn.Parameter]:
    """Switches gradients off for frozen parameters; returns those still trained."""
    for name, parameter in model.named_parameters():
        if matches(name, config.frozen):
            parameter.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("nothing left to train", got=f"frozen = {config.frozen}", do="Freeze less.")
    return trained


def _check_training(task: Task, config: TrainingConfig) -> None:
    where = f"task {task.name!r}"
    if not length(task.train):
        raise ConfigError("no training examples", where=where, wanted="at least 1")
    for key in ("steps", "batch_size"):
        if getattr(config, key) < 1:
            raise ConfigError(
                f"{key} out of range", where=where, got=getattr(config, key), wanted="at least 1"
            )
    for key in ("learning_rate", "weight_decay", "max_grad_norm"):
        value = getattr(config, key)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{key} out of range", where=where, got=value, wanted="a finite number from 0")


def _diverged(what: str, task: Task, step: int, config: TrainingConfig) -> NonFinite:
    return NonFinite(
        f"the {what} is not finite at step {step} of {config.steps}",
        where=f"task {task.name!r}",
        got=f"learning_rate {config.learning_rate:g}",
        do="Lower the learning rate, or look for empty or broken examples.",
    )
