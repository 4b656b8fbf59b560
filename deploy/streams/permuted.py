"""The built-in stream ``permuted-mnist``: the same numerals, their pixels in ten different orders.

The first task shows the images as they are, each later one under a random permutation of its own. All share
the model, a perceptron with three hidden layers, and its only head. Model, settings and normalisation are
those of Federated Orthogonal Training (arXiv 2309.01289, by its authors' code): dropout follows the hidden
layers, lighter after the first. Departure: the permutations, and the weights training starts from, come from
torch's generator.

Shapes: R rows, F pixels.
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

TASKS = tuple(f"permutation-{number}" for number in range(10))
PIXELS, HIDDEN, CLASSES = 28 * 28, 400, 10


def permuted_mnist(options: StreamOptions) -> Stream:
    """The stream named ``permuted-mnist``.

    ``options.seed`` decides the permutations, the weights at the start and which rows a bound leaves.
    """
    check_rows(options, "permuted-mnist")
    return Stream(
        name="permuted-mnist",
        tasks=TASKS,
        load=partial(load_task, options=options),
        build_model=partial(build_model, options.seed),
        training=replace(LOCAL_SGD, batch_size=64, eval_batch_size=500),
        prepare=partial(prepare, "mnist"),
    )


def build_model(seed: int) -> nn.Module:
    """784-400-400-400-10 with random weights, the same for one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Dropout(0.2)),
            *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(0.5)),
            *(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(HIDDEN, CLASSES),
        )


@lru_cache(maxsize=32)
def load_task(name: str, options: StreamOptions) -> Task:
    """One task of the stream; cached, because the workers of a simulation live long.

    Raises:
        ConfigError: the stream has no such task.
        FileError: the images are not in the cache and could not be downloaded.
    """
    if name not in TASKS:
        raise ConfigError(
            "unknown task", where="stream 'permuted-mnist'", got=repr(name), wanted=", ".join(TASKS)
        )
    order_F = orders(options.seed)[TASKS.index(name)]
    return image_task(name, image_set("mnist"), partial(permuted, order_F=order_F), options)


def permuted(pixels: Tensor, order_F: Tensor) -> Tensor:
    """``(R, F)``: normalised, in the task's order."""
    return SOURCES["mnist"].normalised(pixels).flatten(1)[:, order_F]


def orders(seed: int) -> list[Tensor]:
    """The order of the pixels in every task, ``(F,)``; the first is their own."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.arange(PIXELS), *(torch.randperm(PIXELS, generator=generator) for _ in TASKS[1:])]
