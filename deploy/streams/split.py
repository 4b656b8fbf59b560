"""The built-in streams ``split-cifar``, ``split-fashion`` and ``split-mnist``: two classes of ten at a time.

Task t is about classes 2t and 2t + 1, in label order, and has a head of its own in the model that all share:
its loss and its scores are of that head, and the other heads get no gradient. The data set is whole.

The model is the convolutional network without biases of Federated Orthogonal Training (arXiv 2309.01289, by
its authors' code), with half of its channels and a quarter of its hidden units: 0.58 instead of 6.5 million
weights below the heads, so that many sites fit one machine. Departures of the setting: CIFAR-10 in five tasks
instead of CIFAR-100 in ten.

Shapes: R rows.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from fedmerge.client.tasks import Stream, StreamOptions, Task
from fedmerge.common.errors import ConfigError
from fedmerge.deploy.streams.imagesets import SOURCES, image_set, prepare
from fedmerge.deploy.streams.imagetask import LOCAL_SGD, check_rows, image_task

CLASSES = 2
"""Of one task."""
TASKS = tuple(f"classes-{first}-{first + CLASSES - 1}" for first in range(0, 10, CLASSES))
HIDDEN = 512


def split_cifar(options: StreamOptions) -> Stream:
    """The stream named ``split-cifar``: photos, 32 x 32 pixels in three channels."""
    return _split("cifar", options)


def split_fashion(options: StreamOptions) -> Stream:
    """The stream named ``split-fashion``: garments, 28 x 28 pixels in grey."""
    return _split("fashion", options)


def split_mnist(options: StreamOptions) -> Stream:
    """The stream named ``split-mnist``: numerals, 28 x 28 pixels in grey."""
    return _split("mnist", options)


def _split(images: str, options: StreamOptions) -> Stream:
    """``options.seed`` decides the weights at the start and which rows a bound leaves."""
    check_rows(options, f"split-{images}")
    return Stream(
        name=f"split-{images}",
        tasks=TASKS,
        load=partial(load_task, images=images, options=options),
        build_model=partial(build_model, len(SOURCES[images].mean), options.seed),
        training=replace(LOCAL_SGD, batch_size=16, eval_batch_size=200),
        prepare=partial(prepare, images),
    )


class ManyHeads(nn.Module):
    """Convolutions and hidden layers that all tasks share, and a head per task.

    Images of 28 and of 32 pixels per side both come down to 2 x 2.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 32, 4, bias=False), nn.ReLU(), nn.Dropout(0.2), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, bias=False), nn.ReLU(), nn.Dropout(0.2), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 128, 2, bias=False), nn.ReLU(), nn.Dropout(0.5), nn.MaxPool2d(2)),
            nn.Flatten(),
            *(nn.Linear(128 * 2 * 2, HIDDEN, bias=False), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(HIDDEN, HIDDEN, bias=False), nn.ReLU(), nn.Dropout(0.5)),
        )
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, CLASSES, bias=False) for _ in TASKS)

    def forward(self, pixels: Tensor, head: int) -> Tensor:
        """``(R, CLASSES)`` scores by one head."""
        scores: Tensor = self.heads[head](self.features(pixels))
        return scores


def build_model(channels: int, seed: int) -> nn.Module:
    """Random weights, the same for one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ManyHeads(channels)


@lru_cache(maxsize=32)
def load_task(name: str, images: str, options: StreamOptions) -> Task:
    """One task of a stream; cached, because the workers of a simulation live long.

    Raises:
        ConfigError: the stream has no such task.
        FileError: the images are not in the cache and could not be downloaded.
    """
    if name not in TASKS:
        raise ConfigError(
            "unknown task", where=f"stream 'split-{images}'", got=repr(name), wanted=", ".join(TASKS)
        )
    head = TASKS.index(name)
    return image_task(
        name,
        image_set(images),
        SOURCES[images].normalised,
        options,
        classes=range(head * CLASSES, (head + 1) * CLASSES),
        scores=partial(scores_of, head=head),
    )


def scores_of(model: nn.Module, pixels: Tensor, head: int) -> Tensor:
    """``(R, CLASSES)`` by the head of one task."""
    scores: Tensor = model(pixels, head)
    return scores
