"""Numbers over an accuracy matrix: what a stream of merges reached, kept and lost.

The matrix ``a`` has one row per merge and one column per task, tasks in order of arrival:
``a[i][j]`` is the accuracy of task ``j`` after merge ``i``, a fraction in [0, 1]. ``None`` means not
measured, as for a site that left. M merges, T tasks.

Task ``j`` is learned by merge ``learned[j]`` (row index from 0; ``None``: never). Left away, task
``j`` is learned by merge ``j``, so a plain stream needs no such list.

A mean leaves missing entries out; :func:`left_out` says how many tasks each mean went without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fedmerge.common.errors import MismatchError

Matrix = Sequence[Sequence[float | None]]
Learned = Sequence[int | None]


class LeftOut(NamedTuple):
    """How many tasks could not be counted, for want of a measurement, in each number of a matrix."""

    average_accuracy: int
    backward_transfer: int
    forgetting: int


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of what was measured; ``None`` if nothing was."""
    measured = [v for v in values if v is not None]
    return math.fsum(measured) / len(measured) if measured else None


def learned_by(tasks: Sequence[str], merged: Sequence[str]) -> list[int | None]:
    """For each task the row of the first merge that brought it; ``None`` if none did.

    Args:
        tasks: the columns of the matrix.
        merged: the task of each merge, the rows of the matrix.
    """
    return [next((row for row, name in enumerate(merged) if name == task), None) for task in tasks]


def average_accuracy(matrix: Matrix) -> float | None:
    """ACC = 1/T sum_j a[M][j], the mean of the last row.

    Range [0, 1], a fraction; ``None`` without merges. Every task counts alike, however many test
    examples it has. Lopez-Paz and Ranzato, GEM (arXiv 1706.08840), equation 2.
    """
    return mean(matrix[-1]) if matrix else None


def accuracy_so_far(matrix: Matrix, learned: Learned | None = None) -> list[float | None]:
    """After each merge i, the mean of a[i][j] over the tasks j learned up to and including merge i.

    Range [0, 1], a fraction, one per merge. Each point has its own set of tasks, so a falling curve
    may also mean that a hard task came in. The last point is ACC when every task was learned.
    """
    rows = _learned(matrix, learned)
    return [
        mean(a for a, row in zip(accuracies, rows, strict=True) if row is not None and row <= merge)
        for merge, accuracies in enumerate(matrix)
    ]


def backward_transfer(matrix: Matrix, learned: Learned | None = None) -> float | None:
    """BWT = 1/(T-1) sum_{i<T} (a[T][i] - a[i][i]): the change of old tasks since their own merge.

    Range [-1, 1], a difference of fractions; below 0 old tasks got worse, above 0 later merges helped
    them. ``None`` when no task is old (T = 0 or 1). Lopez-Paz and Ranzato, GEM (arXiv 1706.08840),
    equation 3, as OPCM (arXiv 2501.09522) reports it. Departure: an old task without both
    measurements is left out and T - 1 shrinks with it.
    """
    return mean(backward_transfer_by_task(matrix, learned))


def backward_transfer_by_task(matrix: Matrix, learned: Learned | None = None) -> list[float | None]:
    """a[T][j] - a[j][j] for each task j; ``None`` where it is not old or not measured."""
    return [
        None if row is None or not _old(matrix, row) else _minus(matrix[-1][task], matrix[row][task])
        for task, row in enumerate(_learned(matrix, learned))
    ]


def forgetting(matrix: Matrix, learned: Learned | None = None) -> float | None:
    """F = mean over old tasks j of max_{j <= i < T} a[i][j] - a[T][j]: what was once there and is gone.

    Range [-1, 1], a difference of fractions; above 0 is lost, below 0 means the last merge was the
    best. ``None`` when no task is old. Chaudhry et al., Riemannian Walk (arXiv 1801.10112), section 3.
    At least as large as -BWT when nothing is missing, since the maximum includes a[j][j].
    Departure: as there, but the maximum starts at the task's own merge, so that accuracy of the base
    before the task was learned does not count; unmeasured entries do not take part.
    """
    return mean(forgetting_by_task(matrix, learned))


def forgetting_by_task(matrix: Matrix, learned: Learned | None = None) -> list[float | None]:
    """max_{j <= i < T} a[i][j] - a[T][j] for each task j; ``None`` where not old or not measured."""
    return [
        None if row is None or not _old(matrix, row) else _minus(_best(matrix, row, task), matrix[-1][task])
        for task, row in enumerate(_learned(matrix, learned))
    ]


def left_out(matrix: Matrix, learned: Learned | None = None) -> LeftOut:
    """Counts the tasks each mean went without: last-row entries, and old tasks without both ends."""
    old = sum(row is not None and _old(matrix, row) for row in _learned(matrix, learned))
    return LeftOut(
        average_accuracy=sum(a is None for a in matrix[-1]) if matrix else 0,
        backward_transfer=old - _measured(backward_transfer_by_task(matrix, learned)),
        forgetting=old - _measured(forgetting_by_task(matrix, learned)),
    )


def sampling_error(accuracies: Sequence[float | None], test_examples: Sequence[int]) -> float | None:
    """The standard error of a mean accuracy that comes from finite test sets: sqrt(sum p(1-p)/n) / T.

    Range [0, 0.5], a fraction. Tasks are taken as independent and their examples as drawn at random;
    it says nothing about other seeds, orders or training runs. ``None`` when an accuracy has no
    examples to its name, or nothing was measured.
    """
    pairs = [(p, n) for p, n in zip(accuracies, test_examples, strict=True) if p is not None]
    if not pairs or any(n <= 0 for _, n in pairs):
        return None
    return math.sqrt(math.fsum(p * (1 - p) / n for p, n in pairs)) / len(pairs)


def _learned(matrix: Matrix, learned: Learned | None) -> Learned:
    """``learned``, or the diagonal; refuses a matrix whose rows differ in length from it."""
    if not matrix:
        return [None] * len(learned or ())
    tasks = len(matrix[0])
    if learned is None and len(matrix) > tasks:
        raise MismatchError(
            "accuracy matrix has more merges than tasks",
            got=f"{len(matrix)} merges",
            wanted=f"at most {tasks}",
            do="Say which merge learned which task (learned_by).",
        )
    rows = [j if j < len(matrix) else None for j in range(tasks)] if learned is None else learned
    for merge, accuracies in enumerate(matrix, start=1):
        if len(accuracies) != len(rows):
            raise MismatchError(
                f"accuracy matrix is ragged at merge {merge}",
                got=f"{len(accuracies)} entries",
                wanted=f"{len(rows)}, one per task",
            )
    return rows


def _old(matrix: Matrix, row: int) -> bool:
    return row < len(matrix) - 1


def _best(matrix: Matrix, row: int, task: int) -> float | None:
    """The best accuracy of a task from its own merge to the one before the last."""
    return max((a for a in (r[task] for r in matrix[row:-1]) if a is not None), default=None)


def _minus(left: float | None, right: float | None) -> float | None:
    return None if left is None or right is None else left - right


def _measured(values: Iterable[float | None]) -> int:
    return sum(v is not None for v in values)
