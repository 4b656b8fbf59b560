"""Correcting a merged model's representation (arXiv 2509.23592), a follow-up job where a task was learned.

One projection of the merged model is fitted so that its output, on the task's training examples, is again
that of the model before the last merge::

    min over W   mean | phi_merged(x; W) - phi_previous(x) |     or the mean of squares

with phi the output of the module that owns W. By default that is the last matrix layer that runs; where
several are chosen, their losses are added. Everything else stays. AdamW, constant rate, no weight decay,
evaluation mode. What is fitted leaves the site as a change of weights.

Departure: the paper fits the projection that closes an image encoder. Which layer that is differs between
models, so it is found by running the task's loss; the loss itself is not used, nor are labels.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from fedmerge.client.linearised import first_order, linearised
from fedmerge.client.running import batch_of, place_of, seeded
from fedmerge.client.tasks import Batch, Task, length
from fedmerge.common.config import listed
from fedmerge.common.errors import ConfigError, NonFinite
from fedmerge.common.layers import matches
from fedmerge.common.training import Correction

LOSSES = {"l1": F.l1_loss, "mse": F.mse_loss}


@dataclass(frozen=True)
class CorrectionReport:
    """What one correction did.

    Attributes:
        layers: those that were fitted.
        steps: optimizer steps taken. ``examples``: training examples held.
        first_loss, final_loss: between the representations, over the first and the last batch, each before
            its step.
    """

    layers: tuple[str, ...]
    steps: int
    examples: int
    first_loss: float
    final_loss: float


def correct(
    model: nn.Module,
    task: Task,
    merged: Mapping[str, Tensor],
    previous: Mapping[str, Tensor],
    settings: Correction,
    *,
    layers: Collection[str],
    seed: int,
    device: str = "auto",
    base: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], CorrectionReport]:
    """Fits the merged model's representation of a task to that of the previous merged model.

    The model itself is not touched; two copies of it are run.

    Args:
        merged, previous: weights by name; what they lack is the model's own, such as a private head.
        layers: names of the matrix layers that may change.
        seed: of the order of the examples.
        base: theta_0 of a model that is trained and scored as its linearisation, see
            :mod:`fedmerge.client.linearised`; its representations are then those of the linearised model.

    Returns:
        By fitted layer, what is to be added to ``merged``, float32 on the CPU; and a report.

    Raises:
        ConfigError: the task has no training examples, or no layer that may change and runs is chosen.
        NonFinite: a representation is NaN or infinite.
    """
    if not length(task.train):
        raise ConfigError("no training examples", where=f"task {task.name!r}", wanted="at least 1")
    place = place_of(device)
    with ExitStack() as stack:
        stack.enter_context(seeded(seed, place))
        target, fitted = (_copy(model, weights, place) for weights in (previous, merged))
        for copy in (target, fitted) if base is not None else ():
            stack.enter_context(linearised(copy, base or {}))
        chosen = _chosen(fitted, task, layers, settings.layers, place)
        weights = {name: fitted.get_parameter(name).requires_grad_() for name in chosen}
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        losses = _fit(fitted, target, chosen, task, settings, seed, place)
    changes = {name: (weight.detach() - before[name]).float().cpu() for name, weight in weights.items()}
    return changes, CorrectionReport(chosen, len(losses), length(task.train), losses[0], losses[-1])


def _copy(model: nn.Module, weights: Mapping[str, Tensor], place: torch.device) -> nn.Module:
    """The model with other weights, in evaluation mode, no parameter trained."""
    copy = deepcopy(model).to(place).eval().requires_grad_(False)
    copy.load_state_dict({**copy.state_dict(), **weights})
    return copy


def _fit(
    fitted: nn.Module,
    target: nn.Module,
    chosen: Sequence[str],
    task: Task,
    settings: Correction,
    seed: int,
    place: torch.device,
) -> list[float]:
    """The loss of every batch, in order."""
    loss_of, losses = LOSSES[settings.loss], list[float]()
    trained = [fitted.get_parameter(name) for name in chosen]
    optimizer = AdamW(trained, lr=settings.learning_rate, weight_decay=0.0)
    for batch in _batches(task, settings, seed, place):
        with torch.no_grad():
            wanted = _representations(target, chosen, task, batch)
        found = _representations(fitted, chosen, task, batch)
        loss = torch.stack([loss_of(a, b) for a, b in zip(found, wanted, strict=True)]).sum()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise NonFinite("a representation is not finite", where=f"correction of task {task.name!r}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return losses


def _batches(task: Task, settings: Correction, seed: int, place: torch.device) -> Iterator[Batch]:
    """All training examples once per epoch, in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        order = torch.randperm(length(task.train), generator=generator)
        for rows in torch.split(order, settings.batch_size):
            yield batch_of(task, task.train, rows.tolist(), place)


def _chosen(
    model: nn.Module, task: Task, layers: Collection[str], patterns: str, place: torch.device
) -> tuple[str, ...]:
    """Layers that match a pattern and run; without patterns the last one that does."""
    batch = batch_of(task, task.train, [0], place)
    with torch.no_grad(), _watched(model, layers) as seen:
        task.loss(model, batch)
    ran = tuple(dict.fromkeys(name for name, _ in reversed(seen)))
    wanted = listed(patterns)
    chosen = tuple(name for name in ran if matches(name, wanted)) if wanted else ran[:1]
    if not chosen:
        raise ConfigError(
            "no layer to correct",
            where=f"task {task.name!r}",
            got=f"layers {patterns!r}",
            wanted="patterns of trained matrix layers that run in a forward pass",
        )
    return chosen


def _representations(model: nn.Module, chosen: Collection[str], task: Task, batch: Batch) -> list[Tensor]:
    """Outputs of the modules that own these layers, in the order in which they run."""
    with _watched(model, chosen) as seen:
        task.loss(model, batch)
    return [output for _, output in seen]


@contextmanager
def _watched(model: nn.Module, layers: Collection[str]) -> Iterator[list[tuple[str, Tensor]]]:
    """Collects what the modules that own these layers give out, as long as it is open."""
    seen: list[tuple[str, Tensor]] = []

    def watch(name: str, module: nn.Module) -> Any:
        def see(_: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            seen.append((name, first_order(first)))

        return module.register_forward_hook(see)

    with ExitStack() as stack:
        for name in layers:
            stack.callback(watch(name, model.get_submodule(name.rpartition(".")[0])).remove)
        yield seen
