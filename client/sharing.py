"""Which rows of a task one of several sites holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.utils.data import Subset

from fedmerge.client.tasks import Task, length
from fedmerge.common.errors import ConfigError

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

SCHEMES = "'iid' or 'dirichlet:ALPHA' or 'shards:K', such as 'dirichlet:0.5' or 'shards:2'"

KEPT = 32
"""Splits of each kind that a process remembers: a few megabytes each at 60 000 rows."""

Split = tuple[tuple[int, ...], ...]
"""Row numbers in ascending order, by part."""


def share(task: Task, part: int, parts: int, scheme: str = "iid", seed: int = 0) -> Task:
    """The part of ``task`` that one of ``parts`` sites holds; the parts are disjoint and together all of it.

    Training rows are split by ``scheme``, test rows always evenly at random, so that every site is scored
    on the task as a whole. Every part has at least one row of each. One part is the task itself. A process
    remembers its latest splits, so that asking for another part of the same task is cheap.

    Args:
        part: from 0 to ``parts - 1``.
        scheme: how training rows are split. The last two need ``task.labels``.

            - ``iid``: evenly at random.
            - ``dirichlet:ALPHA``: each label's rows are spread over the sites in proportions drawn from a
              symmetric Dirichlet distribution, so that small ALPHA makes sites differ.
            - ``shards:K``: rows sorted by label are cut into ``K * parts`` shards of one size, of which each
              site gets K at random, so that it knows few labels (arXiv 1602.05629). Rows that do not
              fill a shard, fewer than ``K * parts``, are left out.
        seed: of the split; all sites of a task must use the same.

    Raises:
        ConfigError: an unknown scheme, a part out of range, fewer rows than parts or shards, or no labels
            for a scheme that needs them.
    """
    where = f"task {task.name!r}"
    kind = _kind(scheme, where)
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
    if kind.name == "iid":
        held = _even(train, parts, seed)[part]
    else:
        held = _skewed(_labels(task, where), parts, kind, seed, where)[part]
    return replace(
        task,
        train=Subset(task.train, held),
        test=Subset(task.test, _even(test, parts, seed + 1)[part]),
        labels=None if task.labels is None else [task.labels[row] for row in held],
    )


class _Kind(NamedTuple):
    """A scheme as it is meant; ``number`` is ALPHA or K."""

    name: str
    number: float = math.nan


def _kind(scheme: str, where: str) -> _Kind:
    name, _, number = scheme.partition(":")
    try:
        if scheme == "iid":
            return _Kind("iid")
        if name == "dirichlet" and 0 < float(number) < math.inf:
            return _Kind(name, float(number))
        if name == "shards" and int(number) > 0:
            return _Kind(name, int(number))
    except ValueError:
        pass
    raise ConfigError("unknown sharing scheme", where=where, got=repr(scheme), wanted=SCHEMES)


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


@lru_cache(KEPT)
def _even(rows: int, parts: int, seed: int) -> Split:
    """Equal parts of the shuffled row numbers."""
    from flwr_datasets.partitioner import IidPartitioner

    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return _rows_of(IidPartitioner(parts), {"row": order}, parts)


def _skewed(labels: Sequence[int], parts: int, kind: _Kind, seed: int, where: str) -> Split:
    if kind.name == "shards" and len(labels) < kind.number * parts:
        raise ConfigError(
            "too few rows to share",
            where=where,
            got=f"{len(labels)} training",
            wanted=f"{kind.number} for each of {parts} sites",
        )
    try:
        return _by_label(tuple(labels), parts, kind, seed)
    except ValueError as error:
        raise ConfigError(
            "some site would hold no training rows",
            where=where,
            got=f"{kind.name}:{kind.number:g} over {parts} sites",
            do="Use a larger ALPHA, fewer sites or another seed.",
        ) from error


@lru_cache(KEPT)
def _by_label(labels: tuple[int, ...], parts: int, kind: _Kind, seed: int) -> Split:
    from flwr_datasets.partitioner import DirichletPartitioner, ShardPartitioner

    partitioner: Partitioner
    if kind.name == "shards":
        partitioner = ShardPartitioner(parts, "label", num_shards_per_partition=int(kind.number), seed=seed)
    else:
        partitioner = DirichletPartitioner(parts, "label", kind.number, min_partition_size=1, seed=seed)
    columns = {"row": list(range(len(labels))), "label": [int(label) for label in labels]}
    with warnings.catch_warnings():
        # One before each new draw, of which the caller's error tells; one about how datasets calls pyarrow.
        warnings.filterwarnings("ignore", message="The specified min_partition_size")
        warnings.filterwarnings("ignore", message="Specifying null_placement")
        return _rows_of(partitioner, columns, parts)


def _rows_of(partitioner: Partitioner, columns: dict[str, list[int]], parts: int) -> Split:
    from datasets import Dataset as Table

    partitioner.dataset = Table.from_dict(columns)
    return tuple(tuple(sorted(partitioner.load_partition(part)[:]["row"])) for part in range(parts))
