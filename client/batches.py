"""Which training examples each optimizer step sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.client.tasks import TrainingConfig


def split(examples: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Row numbers to train on and row numbers held out, both ascending.

    Args:
        examples: at least 2. ``share``: of them held out, above 0 and below 1, drawn by ``seed``; at least
            one, and at most all but one.
    """
    count = min(max(round(share * examples), 1), examples - 1)
    order = torch.randperm(examples, generator=torch.Generator().manual_seed(seed)).tolist()
    return sorted(order[count:]), sorted(order[:count])


def drawn(rows: int, examples: int, seed: int) -> list[int]:
    """Different row numbers, drawn by seed; all of them if there are no more."""
    order: list[int] = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:examples]


def steps_of(config: TrainingConfig, examples: int) -> int:
    """Optimizer steps of a run over so many examples."""
    if config.epochs is None:
        return config.steps
    return config.epochs * math.ceil(examples / (config.batch_size * config.accumulate))


class Order:
    """Endless steps' worth of row numbers; every row is seen once before any is seen again.

    A step takes ``batch_size * accumulate`` rows, or all if there are fewer. Counted in epochs, the last step
    of an epoch takes what is left of it; otherwise a step may begin one round and end the one before.
    """

    def __init__(self, rows: Sequence[int], config: TrainingConfig, seed: int) -> None:
        self._rows, self._whole_epochs = rows, config.epochs is not None
        self._batch = config.batch_size
        self._size = min(config.batch_size * config.accumulate, len(rows))
        self._generator = torch.Generator().manual_seed(seed)
        self._waiting: list[int] = []

    def next_step(self) -> list[list[int]]:
        """The rows of one step, in batches."""
        while len(self._waiting) < self._size and not (self._whole_epochs and self._waiting):
            self._waiting += torch.randperm(len(self._rows), generator=self._generator).tolist()
        taken, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        taken = [self._rows[i] for i in taken]
        return [taken[start : start + self._batch] for start in range(0, len(taken), self._batch)]

    def state(self) -> dict[str, Tensor]:
        """What it needs to go on after a restart."""
        return {
            "random": self._generator.get_state(),
            "waiting": torch.tensor(self._waiting, dtype=torch.int64),
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._generator.set_state(state["random"])
        self._waiting = state["waiting"].tolist()
