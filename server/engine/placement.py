"""Which worker owns which layer."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from fedmerge.common.layers import LayerKind, LayerSpec


def cost(layer: LayerSpec) -> float:
    """Relative work of merging a layer: M * N * min(M, N) for a matrix, its size for a vector."""
    rows, columns = layer.matrix_shape
    return (
        float(rows * columns * min(rows, columns))
        if layer.kind is LayerKind.MATRIX
        else float(prod(layer.shape))
    )


def place(layers: Iterable[LayerSpec], shards: int) -> list[list[LayerSpec]]:
    """Splits layers into at most ``shards`` groups of similar cost, longest layer first.

    Each layer goes to the group with the least work so far; ties go to the first, so the placement
    depends on the layers alone. Within a group the costliest comes first. No group is empty.
    """
    ordered = sorted(layers, key=lambda layer: (-cost(layer), layer.name))
    groups: list[list[LayerSpec]] = [[] for _ in range(max(1, min(shards, len(ordered))))]
    load = [0.0] * len(groups)
    for layer in ordered:
        lightest = load.index(min(load))
        groups[lightest].append(layer)
        load[lightest] += cost(layer)
    return groups
