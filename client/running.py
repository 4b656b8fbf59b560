"""Running a model over a task's examples, and handing it back as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from fedmerge.client.tasks import Batch, Task


def place_of(device: str) -> torch.device:
    """Where to compute: ``auto`` (CUDA if there is one, else CPU) or a torch device."""
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def batch_of(task: Task, rows: Dataset[Any], indices: Iterable[int], place: torch.device) -> Batch:
    """The rows with these numbers as the task collates them, on ``place``."""
    collate = task.collate or default_collate
    return _moved(collate([rows[i] for i in indices]), place)


def _moved(batch: Batch, place: torch.device) -> Batch:
    """The batch with every tensor in it on ``place``; other leaves as they are."""
    if isinstance(batch, Tensor):
        return batch.to(place)
    if isinstance(batch, Mapping):
        return {key: _moved(value, place) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        moved = [_moved(value, place) for value in batch]
        return type(batch)(*moved) if hasattr(batch, "_fields") else type(batch)(moved)
    return batch


@contextmanager
def left_as_found(model: nn.Module) -> Iterator[None]:
    """Restores gradient switches, gradients, training modes and the device."""
    switches = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    place = switches[0][0].device if switches else torch.device("cpu")
    try:
        yield
    finally:
        for parameter, wanted, gradient in switches:
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        for module, training in modes:
            module.training = training
        model.to(place)


@contextmanager
def seeded(seed: int, place: torch.device) -> Iterator[None]:
    """torch's global generators seeded inside, and as they were outside."""
    cuda = [place.index or 0] if place.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        yield
