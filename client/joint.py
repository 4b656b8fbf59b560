"""Several tasks as one, for learning them at the same time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from fedmerge.client.tasks import Batch, Task, length

Example = tuple[int, Any]
"""The number of a task, and one of its examples."""
Parts = list[tuple[int, int, Batch]]
"""Of every task in a batch: its number, how many examples are of it, and the task's own batch of them."""


class _Rows(Dataset[Example]):
    """The examples of all tasks, one task after another."""

    def __init__(self, parts: Sequence[Dataset[Any]]) -> None:
        self._parts, self._ends = parts, list(accumulate(map(length, parts)))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, row: int) -> Example:
        number = bisect_right(self._ends, row)
        return number, self._parts[number][row - (self._ends[number - 1] if number else 0)]


def joined(tasks: Sequence[Task]) -> Task:
    """One task of all examples, whose loss is the mean over them, each by its own task's loss.

    Args:
        tasks: at least one; it goes by the name of the first.
    """

    def collate(examples: list[Example]) -> Parts:
        found: Parts = []
        for number in sorted({number for number, _ in examples}):
            own = [example for other, example in examples if other == number]
            found.append((number, len(own), (tasks[number].collate or default_collate)(own)))
        return found

    def each(model: nn.Module, parts: Parts, measure: Callable[[Task], Any]) -> list[tuple[int, Tensor]]:
        return [(count, measure(tasks[number])(model, batch)) for number, count, batch in parts]

    def loss(model: nn.Module, parts: Parts) -> Tensor:
        losses = each(model, parts, lambda task: task.loss)
        examples = sum(count for count, _ in losses)
        return torch.stack([value * (count / examples) for count, value in losses]).sum()

    def metric(model: nn.Module, parts: Parts) -> Tensor:
        return torch.cat([values for _, values in each(model, parts, lambda task: task.metric)])

    if len(tasks) == 1:
        return tasks[0]
    train, test = _Rows([task.train for task in tasks]), _Rows([task.test for task in tasks])
    return Task(tasks[0].name, train, test, loss, metric, collate)
