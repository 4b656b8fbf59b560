"""A table of a site's own: numbers and categories, a small network, and a layer that never leaves the site.

    fedmerge simulate --stream docs/examples/tabular.py:stream --sites 2
    task = "tabular.py:stream"               # in a site's client.toml

The rows of ``patients.csv`` are made up. In yours, the file is where the site keeps it.
"""

from __future__ import annotations

import csv
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.data import TensorDataset

from fedmerge.client.tasks import Stream, StreamOptions, Task, TrainingConfig

TABLE = Path(__file__).with_name("patients.csv")
NUMBERS = ("age", "pressure", "nights")
CATEGORIES = {"ward": ("surgery", "medicine", "children"), "arrival": ("planned", "emergency")}
TASKS = ("returned", "infected")  # two columns with yes and no, each a task
HELD_OUT = 0.25


def stream(options: StreamOptions) -> Stream:
    return Stream(
        name="patients",
        tasks=TASKS,
        load=load,
        build_model=build_model,
        training=TrainingConfig(steps=60, batch_size=32, learning_rate=1e-2),
        private=("scale.*",),
    )


class Scale(nn.Module):
    """Numbers less this site's mean, over its standard deviation."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", rows.mean(0))
        self.register_buffer("deviation", rows.std(0))

    def forward(self, numbers: Tensor) -> Tensor:
        return (numbers - self.mean) / self.deviation


class Network(nn.Module):
    """``scale`` is the site's own and private; all else is shared and starts the same everywhere."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.scale = Scale(rows)
        self.embed = nn.ModuleList(nn.Embedding(1 + len(known), 4) for known in CATEGORIES.values())
        self.layers = nn.Sequential(
            nn.Linear(len(NUMBERS) + 4 * len(CATEGORIES), 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        codes = [embed(column) for embed, column in zip(self.embed, categories.T, strict=True)]
        return self.layers(torch.cat([self.scale(numbers), *codes], 1)).squeeze(1)


def build_model() -> nn.Module:
    numbers, _, _ = columns()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network(numbers[: training_rows()])


@lru_cache
def columns() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Numbers, category codes (0 for one that is not known) and labels by task."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    numbers = torch.tensor([[float(row[name]) for name in NUMBERS] for row in rows])
    codes = [
        [1 + known.index(row[name]) if row[name] in known else 0 for name, known in CATEGORIES.items()]
        for row in rows
    ]
    labels = {task: torch.tensor([float(row[task] == "yes") for row in rows]) for task in TASKS}
    return numbers, torch.tensor(codes), labels


def training_rows() -> int:
    return round((1 - HELD_OUT) * len(columns()[0]))


def load(name: str) -> Task:
    numbers, codes, labels = columns()
    split = training_rows()
    return Task(
        name,
        train=TensorDataset(numbers[:split], codes[:split], labels[name][:split]),
        test=TensorDataset(numbers[split:], codes[split:], labels[name][split:]),
        loss=lambda model, batch: binary_cross_entropy_with_logits(model(*batch[:2]), batch[2]),
        metric=lambda model, batch: ((model(*batch[:2]) > 0) == batch[2].bool()).float(),
        labels=labels[name][:split].int().tolist(),
    )
