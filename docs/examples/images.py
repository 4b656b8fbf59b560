"""An image classifier, a small ViT from Hugging Face, trained with low-rank adapters.

    fedmerge simulate --stream docs/examples/images.py:stream --sites 2 --train lora --set lora.rank=4
    task = "images.py:stream"                # in a site's client.toml; the server asks for LoRA or not

Images and weights are made up, so that this runs anywhere. In yours, ``build_model`` is

    ViTForImageClassification.from_pretrained("google/vit-base-patch16-224")

and ``Images`` opens files.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import ViTConfig, ViTForImageClassification

from fedmerge.client.tasks import Stream, StreamOptions, Task, TrainingConfig

CAMERAS = {"ward": 0.0, "theatre": 1.0}
SIDE, CLASSES, TRAIN, TEST = 16, 4, 128, 64


def stream(options: StreamOptions) -> Stream:
    return Stream(
        name="cameras",
        tasks=tuple(CAMERAS),
        load=lambda name: load(name, options),
        build_model=build_model,
        training=TrainingConfig(steps=40, batch_size=16, learning_rate=3e-3, frozen=("vit.embeddings.*",)),
    )


def build_model() -> nn.Module:
    """A tiny vision transformer; the same weights at every site."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ViTConfig(
            image_size=SIDE,
            patch_size=4,
            num_channels=1,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=CLASSES,
        )
        return ViTForImageClassification(config)


class Images(Dataset):
    """Stripes in one of four directions, under a camera's light."""

    def __init__(self, count: int, light: float, seed: int) -> None:
        self.count, self.light, self.seed = count, light, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        label = number % CLASSES
        noise = torch.randn(SIDE, SIDE, generator=torch.Generator().manual_seed(self.seed + number))
        rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
        stripes = [rows, columns, rows + columns, rows - columns][label] // 2 % 2
        return (stripes + self.light + 0.3 * noise)[None], label


def load(name: str, options: StreamOptions) -> Task:
    train = Images(options.rows or TRAIN, CAMERAS[name], 1000 * options.seed)
    return Task(
        name,
        train=train,
        test=Images(TEST, CAMERAS[name], 1000 * options.seed + 500),
        loss=lambda model, batch: cross_entropy(model(batch[0]).logits, batch[1]),
        metric=lambda model, batch: (model(batch[0]).logits.argmax(-1) == batch[1]).float(),
        labels=[number % CLASSES for number in range(len(train))],
    )
