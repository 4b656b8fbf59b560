"""Which rows of a task one of several sites holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch.utils.data import Subset

from fedmerge.client.tasks import Task, length
from fedmerge.common.errors import ConfigError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

SCHEMES = "'iid' or 'dirichlet:ALPHA' with ALPHA above 0, such as 'dirichlet:0.5'"


def share(task: Task, part: int, parts: int, scheme: str = "iid", seed: int = 0) -> Task:
    """The part of ``task`` that one of ``parts`` sites holds; the parts are disjoint and together all of it.

    Training rows are split by ``scheme``, test rows always evenly at random, so that every site is scored
    on the task as a whole. Every part has at least one row of each. One part is the task itself.

    Args:
        part: from 0 to ``parts - 1``.
        scheme: ``iid``, or ``dirichlet:ALPHA``: each label's rows are spread over the sites in proportions
            drawn from a symmetric Dirichlet distribution, so that small ALPHA makes sites differ. It needs
            ``task.labels``.
        seed: of the split; all sites of a task must use the same.

    Raises:
        ConfigError: an unknown scheme, a part out of range, fewer rows than parts, or no labels for
            ``dirichlet``.
    """
    where = f"task {task.name!r}"
    alpha = _alpha(scheme, where)
    if not 0 <= part < parts:
        raise ConfigError(
            "part out of range", where=where, got=f"part {part} of {parts}", wanted="0 <= part < parts"
        )
    if parts == 1:
        return task
    train, test = length(task.train), length(task.test)
    if min(train, test) < parts:
        raise ConfigError(
            "too few rows to share",
            where=where,
            got=f"{train} training, {test} test",
            wanted=f"{parts} of each",
        )
    if alpha is None:
        held = _even(train, part, parts, seed)
    else:
        held = _skewed(_labels(task, where), part, parts, alpha, seed, where)
    return replace(
        task,
        train=Subset(task.train, held),
        test=Subset(task.test, _even(test, part, parts, seed + 1)),
        labels=None if task.labels is None else [task.labels[row] for row in held],
    )


def _alpha(scheme: str, where: str) -> float | None:
    """Concentration of the Dirichlet scheme; None for ``iid``."""
    if scheme == "iid":
        return None
    name, _, number = scheme.partition(":")
    try:
        alpha = float(number) if name == "dirichlet" else math.nan
    except ValueError:
        alpha = math.nan
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError("unknown sharing scheme", where=where, got=repr(scheme), wanted=SCHEMES)
    return alpha


def _labels(task: Task, where: str) -> Sequence[int]:
    if task.labels is None:
        raise ConfigError(
            "sharing by label needs the task's labels",
            where=where,
            do="Set Task.labels, one per training example, or use 'iid'.",
        )
    if len(task.labels) != length(task.train):
        raise ConfigError(
            "not one label per training example",
            where=where,
            got=f"{len(task.labels)} labels",
            wanted=length(task.train),
        )
    return task.labels


def _even(rows: int, part: int, parts: int, seed: int) -> list[int]:
    """One of ``parts`` equal parts of the shuffled row numbers, in ascending order."""
    from flwr_datasets.partitioner import IidPartitioner

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return _rows_of(IidPartitioner(parts), {"row": order}, part)


def _skewed(labels: Sequence[int], part: int, parts: int, alpha: float, seed: int, where: str) -> list[int]:
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        parts, partition_by="label", alpha=alpha, min_partition_size=1, seed=seed
    )
    columns = {"row": list(range(len(labels))), "label": [int(label) for label in labels]}
    try:
        with warnings.catch_warnings():  # it warns before each new draw; the error below says it once
            warnings.filterwarnings("ignore", message="The specified min_partition_size")
            return _rows_of(partitioner, columns, part)
    except ValueError as error:
        raise ConfigError(
            "some site would hold no training rows",
            where=where,
            got=f"dirichlet:{alpha:g} over {parts} sites",
            do="Use a larger ALPHA, fewer sites or another seed.",
        ) from error


def _rows_of(partitioner: Partitioner, columns: dict[str, list[int]], part: int) -> list[int]:
    from datasets import Dataset as Table

    partitioner.dataset = Table.from_dict(columns)
    return sorted(partitioner.load_partition(part)["row"])
