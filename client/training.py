"""Fine-tuning a model on a task, and scoring it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmerge.client.batches import Order, drawn, split, steps_of
from fedmerge.client.loop import TrainingLoop, optimizer_of
from fedmerge.client.options import options_of
from fedmerge.client.options.option import Run
from fedmerge.client.resume import RunCheckpoint
from fedmerge.client.running import batch_of, left_as_found, place_of, seeded
from fedmerge.client.tasks import Task, TrainingConfig, length
from fedmerge.common.errors import ConfigError
from fedmerge.common.layers import matches
from fedmerge.common.score import Score
from fedmerge.common.taskvector import LayerUpdate, require_finite
from fedmerge.common.training import LocalTraining, Stop
from fedmerge.common.training import Loop as LoopSettings

OnStep = Callable[[int, int, float], None]
"""Called after every step with the step (from 1), the number of steps and the step's loss."""
OnFinish = Callable[[Optimizer], None]
"""Called after the last step, when the model is itself again, with the optimizer, whose state is dropped
afterwards."""

CHOICES = {
    "optimizer": ("adamw", "sgd"),
    "schedule": ("linear", "constant"),
    "precision": ("full", "bf16", "fp16"),
}


@dataclass(frozen=True)
class TrainingReport:
    """What one fine-tuning run did.

    Attributes:
        steps: optimizer steps taken; 0 where a task trains with a function of its own.
        examples: distinct training examples that it trained on, however often each was seen.
        final_loss: loss of the last step, before it.
        mean_loss: mean of the losses over all steps.
        seconds: wall-clock time of the steps, those before a restart too.
        kept_step: the step whose weights the model has now; the last one, unless the run was stopped early.
        trained: names in the state dict of what may have changed: parameters that were trained, and buffers.
            All others have the bits they had.
        updates: layers whose update is known in a better form than as a difference of weights.
    """

    steps: int
    examples: int
    final_loss: float
    mean_loss: float
    seconds: float
    kept_step: int = 0
    trained: frozenset[str] = frozenset()
    updates: Mapping[str, LayerUpdate] = field(default_factory=dict)


def fine_tune(
    model: nn.Module,
    task: Task,
    config: TrainingConfig,
    seed: int,
    on_step: OnStep | None = None,
    device: str = "auto",
    on_finish: OnFinish | None = None,
    *,
    training: LocalTraining | None = None,
    private: Iterable[str] = (),
    base: Mapping[str, Tensor] | None = None,
    bases: Mapping[str, Tensor] | None = None,
    memory: dict[str, Tensor] | None = None,
    ends_task: bool = True,
    checkpoint: RunCheckpoint | None = None,
) -> TrainingReport:
    """Trains ``model`` on ``task`` in place.

    The same seed, model, task and settings give the same weights on one machine's CPU with one number of
    threads, also when the run was interrupted and resumed; torch's global generator is left as it was.
    ``requires_grad`` of every parameter, the training mode, the modules and the device of the model are
    restored afterwards, also when an error is raised; the weights are then those of the last completed step.

    Args:
        seed: of the order of the examples, of dropout and of what options draw.
        on_step: progress; see :data:`OnStep`.
        device: ``auto`` (CUDA if there is one, else CPU) or a torch device.
        on_finish: what to keep of the optimizer; see :data:`OnFinish`.
        training: what departs from ``config`` and from the plain loop; nothing if None.
        private: patterns of layers that are the task's own.
        base: the pretrained weights. ``bases``: input directions that the server protects, by layer.
        memory: what the options keep from run to run; changed in place. ``ends_task``: whether the run is the
            last of its task, after which options remember it.
        checkpoint: where the run's state is kept, for a restart. The call must be the same, with the weights
            that the run started from. Numbers that a dataset draws other than from torch are not kept. It
            is the caller's to remove, once the result is safe.

    Raises:
        ConfigError: the task has no training examples, a setting is out of range or does not fit the model,
            or nothing is left to train.
        NonFinite: the loss or the gradients became NaN or infinite.
    """
    training = training or LocalTraining()
    config = settled(config, training.loop)
    place = place_of(device)
    check_training(task, config, place)
    rows, held_out = _rows(task, training.stop, seed)
    with left_as_found(model), seeded(seed, place):
        model.to(place).train()
        trained = freeze(model, config)
        run = Run(
            model=model,
            trained=trained,
            config=config,
            steps=steps_of(config, len(rows)),
            generator=torch.Generator().manual_seed(seed + 1),
            start={name: p.detach().clone() for name, p in trained.items()} if training.options else {},
            private=tuple(private),
            base=base or {},
            bases=bases or {},
            memory={} if memory is None else memory,
            ends_task=ends_task,
            held_out_loss=partial(mean_loss, model, task, held_out, config.eval_batch_size, place),
            gradients=partial(
                mean_gradients, model, task, _some(rows, config, seed), config.batch_size, place
            ),
        )
        options = options_of(training, run)
        with ExitStack() as stack:
            for option in options:
                stack.enter_context(option)
            optimizer = run.optimizer = optimizer_of(run.trained.values(), config)
            loop = TrainingLoop(run, task, options, optimizer, Order(rows, config, seed), place)
            _go(loop, on_step, checkpoint, about=repr((config, training, seed, len(rows))))
        if on_finish is not None:
            on_finish(optimizer)
    return _reported(loop, len(rows), trained)


def settled(config: TrainingConfig, loop: LoopSettings) -> TrainingConfig:
    """A stream's settings with those of the server in their place; its steps replace epochs, too."""
    asked = loop.model_dump(exclude_none=True)
    if "steps" in asked:
        asked.setdefault("epochs", None)
    return replace(config, **asked)


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


def _some(rows: Sequence[int], config: TrainingConfig, seed: int) -> list[int]:
    """As many of these examples as statistics are measured on."""
    return [rows[i] for i in drawn(len(rows), config.statistics_examples, seed)]


def _rows(task: Task, stop: Stop | None, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the examples to train on, and of those held out."""
    examples = length(task.train)
    if stop is None:
        return list(range(examples)), []
    if examples < 2:
        raise ConfigError("too few training examples to hold some out", where=f"task {task.name!r}", wanted=2)
    return split(examples, stop.held_out, seed)


def _reported(loop: TrainingLoop, examples: int, trained: Collection[str]) -> TrainingReport:
    run = loop.run
    updates = {name: update for option in loop.options for name, update in option.updates().items()}
    moved = {name for name in run.trained if name in trained} | updates.keys()
    moved |= dict(run.model.named_buffers()).keys() & run.model.state_dict().keys()
    return TrainingReport(
        steps=run.step,
        examples=examples,
        final_loss=loop.losses[-1],
        mean_loss=math.fsum(loop.losses) / len(loop.losses),
        seconds=loop.seconds,
        kept_step=run.step if run.kept is None else run.kept,
        trained=frozenset(moved),
        updates=updates,
    )


def _go(loop: TrainingLoop, on_step: OnStep | None, checkpoint: RunCheckpoint | None, about: str) -> None:
    """Runs the loop from where the checkpoint says, or from its start."""
    saved = checkpoint.read(about) if checkpoint is not None else None
    if saved is not None:
        loop.load(saved)

    def after_step() -> None:
        if checkpoint is not None and checkpoint.due(loop.run.step):
            checkpoint.write(loop.state(), about)
        if on_step is not None:
            on_step(loop.run.step, loop.run.steps, loop.losses[-1])

    loop.train(after_step)


@torch.no_grad()
def mean_loss(
    model: nn.Module, task: Task, rows: Sequence[int], batch_size: int, place: torch.device
) -> float:
    """Mean of ``task.loss`` over these training examples, in evaluation mode; the modes are restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    total = 0.0
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        total += len(batch) * float(task.loss(model, batch_of(task, task.train, batch, place)))
    for module, training in modes:
        module.training = training
    return total / len(rows)


def mean_gradients(
    model: nn.Module,
    task: Task,
    rows: Sequence[int],
    batch_size: int,
    place: torch.device,
    names: Iterable[str],
) -> dict[str, Tensor]:
    """Gradients of the mean of ``task.loss`` over these training examples, in evaluation mode, for those of
    these parameters that it depends on. The model is left as it was.

    Raises:
        NonFinite: the loss or a gradient is NaN or infinite.
    """
    found: dict[str, Tensor] = {}
    with left_as_found(model), torch.enable_grad():
        model.eval()
        own = dict(model.named_parameters())
        wanted = {name: own[name].requires_grad_() for name in names}
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            loss = task.loss(model, batch_of(task, task.train, batch, place)) * (len(batch) / len(rows))
            if not loss.requires_grad:
                continue
            gradients = torch.autograd.grad(loss, tuple(wanted.values()), allow_unused=True)
            for name, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    found[name] = found.get(name, 0.0) + gradient.float()
    for name, gradient in found.items():
        require_finite(gradient, where=f"gradient at the start of task {task.name!r}", layer=name)
    return found


def freeze(model: nn.Module, config: TrainingConfig) -> dict[str, nn.Parameter]:
    """Switches gradients off for frozen parameters; returns those still trained, by name.

    Raises:
        ConfigError: nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        if matches(name, config.frozen):
            parameter.requires_grad_(False)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigError("nothing left to train", got=f"frozen = {config.frozen}", do="Freeze less.")
    return trained


def check_training(task: Task, config: TrainingConfig, place: torch.device) -> None:
    """Refuses a task without training examples, and settings out of range.

    Raises:
        ConfigError: naming the setting.
    """
    where = f"task {task.name!r}"
    if not length(task.train):
        raise ConfigError("no training examples", where=where, wanted="at least 1")
    for key in ("steps", "epochs", "batch_size", "accumulate", "statistics_examples"):
        count = getattr(config, key)
        if count is not None and count < 1:
            raise ConfigError(f"{key} out of range", where=where, got=count, wanted="at least 1")
    for key in ("learning_rate", "weight_decay", "max_grad_norm", "momentum"):
        value = getattr(config, key)
        if not (math.isfinite(value) and value >= 0):
            raise ConfigError(f"{key} out of range", where=where, got=value, wanted="a finite number from 0")
    for key, known in CHOICES.items():
        if getattr(config, key) not in known:
            raise ConfigError(
                f"unknown {key}", where=where, got=getattr(config, key), wanted=" or ".join(known)
            )
    if config.precision == "fp16" and place.type != "cuda":
        raise ConfigError("fp16 needs a CUDA device", where=where, got=place.type, do="Use bf16.")
