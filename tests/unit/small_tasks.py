"""A tiny task and network, for tests of training."""

from dataclasses import replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from fedmerge.client.options.option import Run
from fedmerge.client.tasks import Task, TrainingConfig

CONFIG = TrainingConfig(steps=20, batch_size=8, learning_rate=0.05)


def points(rows: int) -> TensorDataset:
    labels = torch.arange(rows) % 2
    noise = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return TensorDataset(noise + 3 * labels[:, None], labels)


def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])


def hits(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float()


def task(rows: int = 50, **changes) -> Task:
    return replace(Task("two blobs", points(rows), points(30), loss, hits), **changes)


def network(dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(dropout), nn.Tanh(), nn.Linear(8, 2))


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def run_of(model: nn.Module, steps: int = 1) -> Run:
    """A run that trains the whole model, for an option by itself."""
    trained = dict(model.named_parameters())
    return Run(
        model=model,
        trained=trained,
        config=CONFIG,
        steps=steps,
        generator=torch.Generator().manual_seed(5),
        start={name: parameter.detach().clone() for name, parameter in trained.items()},
    )
