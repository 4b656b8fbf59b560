"""Layers of known models, for benchmarks that need sizes and no weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from fedmerge.common.errors import ConfigError
from fedmerge.common.layers import LayerKind, LayerSpec


def layers_of(shape: str) -> list[LayerSpec]:
    """The layers of a named shape, in the model's order.

    Raises:
        ConfigError: no such shape; the message names those there are.
    """
    if shape not in SHAPES:
        raise ConfigError("no such model shape", got=repr(shape), wanted=" or ".join(SHAPES))
    return list(SHAPES[shape]())


def _vit_b_32() -> Iterator[LayerSpec]:
    """The vision tower of CLIP ViT-B/32: 87.8 million parameters."""
    width = 768
    yield _vector("class_embedding", width)
    yield _matrix("patch_embedding.weight", width, 3, 32, 32)
    yield _vector("position_embedding.weight", 50, width)
    yield from _norm("pre_layernorm", width)
    for block in range(12):
        yield from _block(f"layers.{block}", width, 4 * width)
    yield from _norm("post_layernorm", width)
    yield _matrix("visual_projection.weight", 512, width)


def _minilm() -> Iterator[LayerSpec]:
    """The encoder of MiniLM-L6 without its embeddings: 10.6 million parameters."""
    for block in range(6):
        yield from _block(f"layer.{block}", 384, 1536)


def _tiny() -> Iterator[LayerSpec]:
    """Every kind of layer in 0.03 million parameters."""
    yield _matrix("patch.weight", 32, 3, 4, 4)
    yield from _block("layer.0", 32, 96)
    yield from _block("layer.1", 32, 96)


SHAPES: dict[str, Callable[[], Iterator[LayerSpec]]] = {
    "vit-b-32": _vit_b_32,
    "minilm": _minilm,
    "tiny": _tiny,
}


def _block(path: str, width: int, inner: int) -> Iterator[LayerSpec]:
    """One transformer block: attention, two-layer perceptron and their layer norms."""
    for part in ("q", "k", "v", "out"):
        yield from _linear(f"{path}.attention.{part}", width, width)
    yield from _norm(f"{path}.layer_norm1", width)
    yield from _linear(f"{path}.mlp.fc1", inner, width)
    yield from _linear(f"{path}.mlp.fc2", width, inner)
    yield from _norm(f"{path}.layer_norm2", width)


def _linear(path: str, rows: int, columns: int) -> Iterator[LayerSpec]:
    yield _matrix(f"{path}.weight", rows, columns)
    yield _vector(f"{path}.bias", rows)


def _norm(path: str, width: int) -> Iterator[LayerSpec]:
    yield _vector(f"{path}.weight", width)
    yield _vector(f"{path}.bias", width)


def _matrix(name: str, *shape: int) -> LayerSpec:
    return LayerSpec(name, shape, torch.float32, LayerKind.MATRIX)


def _vector(name: str, *shape: int) -> LayerSpec:
    return LayerSpec(name, shape, torch.float32, LayerKind.VECTOR)
