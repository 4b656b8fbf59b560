"""A task over some classes of an image set.

The task keeps the set's own bytes and row numbers into them; a batch becomes what a model is fed when it is
collated. So tasks of one set cost no memory of their own.

Shapes: R rows of a batch, C classes, N images.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Subset, TensorDataset

from fedmerge.client.tasks import StreamOptions, Task, TrainingConfig
from fedmerge.common.errors import ConfigError
from fedmerge.deploy.streams.images import Images
from fedmerge.deploy.streams.imagesets import ImageSet

Batch = Sequence[Tensor]
"""What the model is fed, R rows, and classes (R,)."""
Shown = Callable[[Tensor], Tensor]
"""Bytes (R, channels, height, width) to what the model is fed."""
Scores = Callable[[nn.Module, Tensor], Tensor]
"""The model and what it is fed to class scores (R, C)."""

LOCAL_SGD = TrainingConfig(
    epochs=1,
    optimizer="sgd",
    learning_rate=0.01,
    weight_decay=1e-5,
    max_grad_norm=0.0,
    schedule="constant",
)
"""Local training of federated orthogonal training's experiments (arXiv 2309.01289)."""


def image_task(
    name: str,
    images: ImageSet,
    shown: Shown,
    options: StreamOptions,
    *,
    classes: range = range(10),
    scores: Scores = operator.call,
) -> Task:
    """Classification of the images of some classes, which count from 0; all of them are used for testing.

    Args:
        options: ``rows`` bounds the training images, drawn by ``seed``.
    """
    train, labels = _rows(images.train, classes, options)
    test, _ = _rows(images.test, classes, StreamOptions())
    return Task(
        name=name,
        train=train,
        test=test,
        loss=partial(loss, scores=scores),
        metric=partial(metric, scores=scores),
        collate=partial(collate, shown=shown),
        labels=labels,
    )


def check_rows(options: StreamOptions, stream: str) -> None:
    """Refuses a bound that leaves nothing to train on."""
    if options.rows is not None and options.rows < 1:
        raise ConfigError(
            "rows out of range", where=f"stream {stream!r}", got=options.rows, wanted="at least 1"
        )


def loss(model: nn.Module, batch: Batch, scores: Scores) -> Tensor:
    """Mean cross-entropy over the batch."""
    return cross_entropy(scores(model, batch[0]), batch[1])


def metric(model: nn.Module, batch: Batch, scores: Scores) -> Tensor:
    """``(R,)``: 1 where the right class scores highest, else 0."""
    return (scores(model, batch[0]).argmax(dim=1) == batch[1]).float()


def collate(examples: Sequence[tuple[Tensor, Tensor]], shown: Shown) -> Batch:
    """Pairs of an image's bytes and its class to a batch."""
    pixels, labels = zip(*examples, strict=True)
    return shown(torch.stack(pixels)), torch.stack(labels)


def _rows(images: Images, classes: range, options: StreamOptions) -> tuple[Subset[Any], list[int]]:
    """The rows of these classes, and their classes counted from 0."""
    held = ((images.labels_N >= classes.start) & (images.labels_N < classes.stop)).nonzero().flatten()
    order = torch.randperm(len(held), generator=torch.Generator().manual_seed(options.seed))
    chosen = held[order[: options.rows]].sort().values
    labels_N = images.labels_N - classes.start
    return Subset(TensorDataset(images.pixels, labels_N), chosen.tolist()), labels_N[chosen].tolist()
