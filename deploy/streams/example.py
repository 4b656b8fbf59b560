"""A small stream of your own, to copy from: three synthetic tasks and a tiny model; runs in seconds.

Every task is the same classification problem with its features in another order, so what helps one task
harms another. It is named ``example``; a copy of this file is named ``path/to/copy.py:example``.

Shapes: R rows, F features, C classes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedmerge.client.tasks import Stream, StreamOptions, Task, TrainingConfig

FEATURES, CLASSES, HIDDEN = 24, 4, 48
TRAIN_ROWS, TEST_ROWS = 256, 128
TASKS = ("plain", "shuffled", "reversed")


def example(options: StreamOptions) -> Stream:
    """The entry point: takes the options of the command line, returns the stream.

    It does no work itself; ``load`` and ``build_model`` are called where and when they are needed.
    """
    rows = TRAIN_ROWS if options.rows is None else options.rows
    return Stream(
        name="example",
        tasks=TASKS,
        load=partial(load_task, seed=options.seed, rows=rows),
        build_model=build_model,
        training=TrainingConfig(steps=60, batch_size=32, eval_batch_size=128, learning_rate=1e-2),
    )


def build_model() -> nn.Module:
    """A network of two layers. Its weights stand in for a pretrained model's: the same at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


def load_task(name: str, seed: int, rows: int) -> Task:
    """Noisy points around one centre per class, their features in the task's own order."""
    generator = torch.Generator().manual_seed(seed)
    centres_CF = 1.5 * torch.randn(CLASSES, FEATURES, generator=generator)
    labels_R = torch.arange(rows + TEST_ROWS) % CLASSES
    points_RF = centres_CF[labels_R] + torch.randn(len(labels_R), FEATURES, generator=generator)
    points_RF = points_RF[:, _order(name)]
    return Task(
        name=name,
        train=TensorDataset(points_RF[TEST_ROWS:], labels_R[TEST_ROWS:]),
        test=TensorDataset(points_RF[:TEST_ROWS], labels_R[:TEST_ROWS]),
        loss=loss,
        metric=metric,
        labels=labels_R[TEST_ROWS:].tolist(),
    )


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """Mean cross-entropy; a batch is what torch's default collate makes of (point, label) pairs."""
    points_RF, labels_R = batch
    return cross_entropy(model(points_RF), labels_R)


def metric(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """``(R,)``: 1 where the class is right, else 0."""
    points_RF, labels_R = batch
    scores_RC: Tensor = model(points_RF)
    return (scores_RC.argmax(dim=1) == labels_R).float()


def _order(name: str) -> Tensor:
    if name == "plain":
        return torch.arange(FEATURES)
    if name == "reversed":
        return torch.arange(FEATURES).flip(0)
    return torch.randperm(FEATURES, generator=torch.Generator().manual_seed(1))
