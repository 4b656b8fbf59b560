"""Training with the function that a task brings along, in place of our loop: ``Task.fit``.

For a Hugging Face ``Trainer``, for Lightning, for the training code that a site has anyway. The function gets
the model, the task with the site's share of its data, the settings and a seed; it changes the model's weights
in place and returns nothing. The settings are the stream's with those of the server in their place, for the
function to follow as far as it can.

What acts within our loop cannot act here: training options, AdamW's second moments, several tasks learned at
once, progress, and going on where a restart interrupted. All else is as ever: the update is measured from the
weights, made private and compressed, and statistics that need only the model and the data are measured.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from fedmerge.client.running import left_as_found, place_of, seeded
from fedmerge.client.tasks import Task, TrainingConfig, length
from fedmerge.client.training import TrainingReport, check_training, freeze, mean_loss
from fedmerge.common.errors import ConfigError, MismatchError, NonFinite
from fedmerge.common.layers import matches
from fedmerge.common.statistics import Statistic
from fedmerge.common.training import LocalTraining


def check_fit(tasks: Sequence[Task], training: LocalTraining, needs: Collection[str]) -> None:
    """Refuses what needs our loop for tasks that do without it; passes where none does.

    Raises:
        ConfigError: naming the task, and the option, the statistic or the other tasks.
    """
    own = next((task for task in tasks if task.fit is not None), None)
    if own is None:
        return
    where = f"task {own.name!r}, which trains with a function of its own"
    if training.options:
        raise ConfigError("no training option can be used", where=where, got=", ".join(training.options))
    if Statistic.SECOND_MOMENT in needs:
        raise ConfigError(
            "AdamW's second moments are not known",
            where=where,
            got=Statistic.SECOND_MOMENT.value,
            do="Choose a rule that needs none.",
        )
    if len(tasks) > 1:
        raise ConfigError(
            "it cannot be learned at the same time as others",
            where=where,
            got=", ".join(task.name for task in tasks),
        )


def fit(
    model: nn.Module, task: Task, config: TrainingConfig, seed: int, device: str = "auto"
) -> TrainingReport:
    """Calls ``task.fit`` with the model on ``device``, in training mode and frozen parameters switched off.

    torch's global generator is seeded for the call and then as it was; so are ``requires_grad``, the training
    mode and the device of the model.

    Returns:
        What it did: no steps are known, the losses are the mean of ``task.loss`` over the first
        ``statistics_examples`` training examples, afterwards.

    Raises:
        ConfigError: as for :func:`fedmerge.client.training.fine_tune`, or a frozen parameter was moved.
        MismatchError: the function left other layers, shapes or dtypes than it found.
        NonFinite: the loss is NaN or infinite afterwards.
    """
    assert task.fit is not None, "for tasks that bring a function"
    place = place_of(device)
    check_training(task, config, place)
    rows = range(min(length(task.train), config.statistics_examples))
    with left_as_found(model), seeded(seed, place):
        model.to(place).train()
        freeze(model, config)
        found, held = _layout(model), _frozen(model, config)
        started = time.perf_counter()
        task.fit(model, task, config, seed)
        seconds = time.perf_counter() - started
        _check_layout(found, _layout(model), task)
        _check_frozen(held, model.to(place), task)
        loss = mean_loss(model, task, rows, config.eval_batch_size, place)
    if not math.isfinite(loss):
        raise NonFinite("the loss is not finite after training", where=_where(task))
    return TrainingReport(
        steps=0,
        examples=length(task.train),
        final_loss=loss,
        mean_loss=loss,
        seconds=seconds,
        trained=frozenset(model.state_dict()),
    )


Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _layout(model: nn.Module) -> Layout:
    return {name: (tuple(held.shape), held.dtype) for name, held in model.state_dict().items()}


def _frozen(model: nn.Module, config: TrainingConfig) -> dict[str, Tensor]:
    """Copies of the parameters that are not to move."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if matches(name, config.frozen)
    }


def _check_layout(before: Layout, after: Layout, task: Task) -> None:
    other = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if other:
        raise MismatchError(
            "the training function left another model than it found",
            where=_where(task),
            layer=other[0],
            got=after.get(other[0], "no such layer"),
            wanted=before.get(other[0], "no such layer"),
            do="Merge adapters into the weights, take wrappers off, and keep the dtypes.",
        )


def _check_frozen(held: dict[str, Tensor], model: nn.Module, task: Task) -> None:
    now = dict(model.named_parameters())
    for name, before in held.items():
        if not torch.equal(before, now[name].detach()):
            raise ConfigError(
                "the training function moved a frozen parameter",
                where=_where(task),
                got=name,
                do="Train parameters with requires_grad only, or take it off the frozen patterns.",
            )


def _where(task: Task) -> str:
    return f"task {task.name!r}"
