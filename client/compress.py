"""Makes a task vector smaller before it is sent, and remembers what was left out.

With error feedback (arXiv 1901.09847) what one round left out is added to the vector of the next, so that
over the rounds of a task nothing is lost but what the last one left out: what was sent and the memory sum up
to the true vectors, but for the rounding of float32. Departure from the paper, which compresses the steps of
an optimizer: here the steps are the task vectors of a task's rounds, and the memory ends with the task.

A low-rank update with a memory added would be a dense one, so of the sum no more singular directions are sent
than it came with. Statistics are left as they are; a file stores them in bfloat16 where it stores the layers
so, else in float32.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from math import fsum, sqrt

import torch
from torch import Tensor

from fedmerge.common.compression import Compression
from fedmerge.common.errors import ShapeMismatch
from fedmerge.common.int8 import decoder
from fedmerge.common.lowrank import truncated
from fedmerge.common.stored import tensors_of, update_from
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank, TaskVector, require_mergeable

MEMORY = "compress/"
"""Begins the keys of what was not sent, followed by the layer's name."""


@dataclass(frozen=True)
class CompressionReport:
    """What compression saved, and what it left out.

    Attributes:
        bytes_before: of the layers' numbers as they came, in float32. ``bytes_after``: as they are sent, with
            scales. Headers and statistics are not counted.
        residual: norm of what was not sent over the norm of what was to be sent, memory included; 0 where
            that is zero. ``cut``: the same of the singular directions left out alone.
    """

    bytes_before: int
    bytes_after: int
    residual: float
    cut: float


@dataclass(frozen=True)
class Compressed:
    """A task vector to be written with ``dtype``, with the values that a reader will get."""

    vector: TaskVector
    dtype: torch.dtype
    report: CompressionReport


def compress(
    vector: TaskVector, compression: Compression, memory: MutableMapping[str, Tensor] | None = None
) -> Compressed:
    """Compresses a vector layer by layer; the result is in memory.

    Args:
        memory: of one task's rounds at this site, by keys that begin with ``compress/``; others are left
            alone. What it holds is added, and it then holds what was not sent this time: float32, in the
            layers' shapes, on the CPU. :func:`forget` ends a task. Without one, what is left out is lost.

    Raises:
        NonFinite: a layer with NaN or infinities, or one that rounds to them. The memory is unchanged.
        ShapeMismatch: a memory of another shape.
    """
    layers = []
    for name, update in vector.items():
        require_mergeable(update, where=vector.label, layer=name)
        layers.append(_compressed(name, update, compression, memory or {}, vector.label))
    if memory is not None:
        for layer in layers:
            memory.pop(MEMORY + layer.name, None)
            if bool(layer.left_out.any()):
                memory[MEMORY + layer.name] = layer.left_out
    held = TaskVector.of({layer.name: layer.sent for layer in layers}, vector.unchanged, vector.manifest)
    held = replace(held, label=vector.label, statistics=vector.statistics, id=vector.id)
    return Compressed(held, compression.dtype, _report(layers))


def forget(memory: MutableMapping[str, Tensor]) -> None:
    """Ends a task: what was not sent of it is dropped."""
    for key in [key for key in memory if key.startswith(MEMORY)]:
        del memory[key]


@dataclass(frozen=True)
class _Layer:
    """One layer as it is sent, and what that cost; ``square`` and ``cut`` are squared norms."""

    name: str
    sent: LayerUpdate
    left_out: Tensor
    bytes_before: int
    bytes_after: int
    square: float
    cut: float


def _compressed(
    name: str, update: LayerUpdate, compression: Compression, memory: Mapping[str, Tensor], label: str
) -> _Layer:
    whole = _with_memory(update, memory.get(MEMORY + name), label, name)
    kept, cut = _kept(whole, update, compression.energy)
    tensors = tensors_of(name, kept, compression.dtype)
    shapes = {name: kept.shape} if isinstance(kept, LowRank) else {}
    sent = update_from(name, shapes, decoder(tensors.__getitem__, label))
    require_mergeable(sent, where=label, layer=name)
    return _Layer(
        name,
        sent,
        left_out=whole.to_dense() - sent.to_dense(),
        bytes_before=sum(tensor.nbytes for tensor in update.tensors()),
        bytes_after=sum(tensor.nbytes for tensor in tensors.values()),
        square=whole.sum_of_squares(),
        cut=cut,
    )


def _with_memory(update: LayerUpdate, held: Tensor | None, label: str, name: str) -> LayerUpdate:
    if held is None:
        return update
    if tuple(held.shape) != update.shape:
        raise ShapeMismatch(
            "a memory of another shape", where=label, layer=name, got=tuple(held.shape), wanted=update.shape
        )
    return Dense(update.to_dense() + held)


def _kept(whole: LayerUpdate, came: LayerUpdate, energy: float | None) -> tuple[LayerUpdate, float]:
    """What is left of a layer before rounding, and the squared norm cut off."""
    if isinstance(came, LowRank) and whole is not came:
        return truncated(whole, rank=came.rank, energy=energy)
    if energy is None or len(whole.shape) < 2:
        return whole, 0.0
    return truncated(whole, energy=energy)


def _report(layers: list[_Layer]) -> CompressionReport:
    total = sqrt(fsum(layer.square for layer in layers))
    left_out = sqrt(fsum(Dense(layer.left_out).sum_of_squares() for layer in layers))
    cut = sqrt(fsum(layer.cut for layer in layers))
    return CompressionReport(
        sum(layer.bytes_before for layer in layers),
        sum(layer.bytes_after for layer in layers),
        residual=left_out / total if total else 0.0,
        cut=cut / total if total else 0.0,
    )
