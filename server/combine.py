"""Vectors of the same task from several sites, combined into one before merging.

Sketches are sums over a site's samples, so that of all sites together is the sum of theirs. The other
statistics are means, so those of all sites together are the weighted means of theirs. Of an input Gram
G = R^T R that is done on the factors: stacked as ``sqrt(share) R`` they are a factor of the mean, and only
the triangle of its QR decomposition is kept where they have more rows than columns.

Legend of shape suffixes: R rank, N in columns.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

from fedmerge.common.errors import ShapeMismatch, StatisticsMissing
from fedmerge.common.statistics import Shape, Statistic, Statistics, is_factor, statistics_of
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank, TaskVector


def combine(
    vectors: Sequence[TaskVector],
    weights: Sequence[float],
    needs: Collection[str] = (),
    *,
    examples: Sequence[float] | None = None,
) -> TaskVector:
    """``sum_i (w_i / sum w) tau_i``, layer by layer when a layer is read.

    Dense layers are summed in float64 and rounded once. If all are low-rank the factors are stacked,
    which is exact and gives the sum of the ranks, unless that is more than a matrix of the layer's size can
    have. A layer unchanged at one site counts as zero there.

    Args:
        vectors: at least one, of the same base.
        weights: positive, one per vector.
        needs: the statistics to combine, which every vector must bring; others are left behind. A site where
            a layer is unchanged tells nothing of that layer, whose statistics are those of the others.
        examples: what statistics are weighted with, positive, one per vector; None takes ``weights``.

    Raises:
        StatisticsMissing: naming the site's vector, the statistic and, if others bring it, the layer.
        ShapeMismatch: sketches of different widths.
    """
    if len(vectors) == 1 and set(vectors[0].manifest.statistics) == set(needs):
        return vectors[0]
    shares = _shares(weights)
    brought = [frozenset(vector.names) for vector in vectors]
    names = tuple(dict.fromkeys(name for vector in vectors for name in vector.names))
    unchanged = tuple(name for name in vectors[0].unchanged if name not in names)

    def read(name: str) -> LayerUpdate:
        parts = [
            (v.read(name), share)
            for v, share, has in zip(vectors, shares, brought, strict=True)
            if name in has
        ]
        return _sum(parts)

    manifest = replace(
        vectors[0].manifest,
        examples=sum(v.manifest.examples for v in vectors),
        site="+".join(v.manifest.site for v in vectors),
        statistics=tuple(sorted(needs)),
    )
    statistics = _whole_statistics(vectors, _shares(examples or weights), names, needs)
    label = "+".join(v.label for v in vectors)
    return TaskVector(names, read, unchanged, manifest, label, statistics=statistics)


def add_vectors(first: TaskVector, second: TaskVector) -> TaskVector:
    """``first + second``: what a task has moved after one more round, with that round's statistics."""
    whole = combine([first, second], [1.0, 1.0])
    return TaskVector(
        whole.names,
        lambda name: whole.read(name).times(2.0),
        whole.unchanged,
        second.manifest,
        second.label,
        statistics=second.statistics,
    )


def _shares(weights: Sequence[float]) -> list[float]:
    total = sum(weights)
    return [weight / total for weight in weights]


def _sum(parts: Sequence[tuple[LayerUpdate, float]]) -> LayerUpdate:
    factors = [(update, share) for update, share in parts if isinstance(update, LowRank)]
    if len(factors) == len(parts) and _may_stack([update for update, _ in factors]):
        left = torch.cat([update.left_MR * share for update, share in factors], dim=1)
        return LowRank(left, torch.cat([update.right_RN for update, _ in factors]), factors[0][0].shape)
    total = sum(update.to_dense().double() * share for update, share in parts)
    assert isinstance(total, torch.Tensor)
    return Dense(total.float())


def _may_stack(updates: Sequence[LowRank]) -> bool:
    """Whether all factors together are of a rank that the layer can have; beyond it they only take room."""
    left_MR, right_RN = updates[0].tensors()
    return sum(update.rank for update in updates) <= min(left_MR.shape[0], right_RN.shape[1])


def _whole_statistics(
    vectors: Sequence[TaskVector], shares: Sequence[float], layers: Sequence[str], needs: Collection[str]
) -> Statistics:
    _require_listed(vectors, needs)
    told = [statistics_of(vector) for vector in vectors]
    stored = [frozenset(vector.names) for vector in vectors]
    at = {layer: [i for i, names in enumerate(stored) if layer in names] for layer in layers}
    shapes = {
        layer: _whole_shapes(layer, [(vectors[i].label, told[i]) for i in at[layer]], needs)
        for layer in layers
    }

    def read(layer: str) -> Mapping[str, Tensor]:
        parts = [(told[i](layer), shares[i]) for i in at[layer]]
        total = sum(share for _, share in parts)
        return {
            name: _whole(name, [(found[name], share / total) for found, share in parts])
            for name in shapes[layer]
        }

    return Statistics.described(read, shapes, {})


def _require_listed(vectors: Sequence[TaskVector], needs: Collection[str]) -> None:
    for vector in vectors:
        for name in sorted(set(needs) - set(vector.manifest.statistics)):
            raise StatisticsMissing(
                f"no {name} among its statistics",
                where=vector.label,
                got=", ".join(vector.manifest.statistics) or "no statistics",
                do="Let the client measure it when it trains.",
            )


def _whole_shapes(
    layer: str, told: Sequence[tuple[str, Statistics]], needs: Collection[str]
) -> dict[str, Shape]:
    """Shapes of all sites' statistics of one layer; a statistic that no site has of it is left out."""
    found: dict[str, Shape] = {}
    for name in sorted(needs):
        shapes = [statistics.shapes.get(layer, {}).get(name) for _, statistics in told]
        if None in shapes and set(shapes) != {None}:
            where, _ = told[shapes.index(None)]
            raise StatisticsMissing(
                f"no {name} of a layer of which other sites bring it", where=where, layer=layer
            )
        brought = [shape for shape in shapes if shape is not None]
        if brought:
            shape = brought[0]
            found[name] = _stacked_shape(brought) if is_factor(name, shape) else shape
            if name == Statistic.SKETCH and set(brought) != {shape}:
                raise ShapeMismatch("sketches of different widths", layer=layer, got=brought)
    return found


def _stacked_shape(shapes: Sequence[Shape]) -> Shape:
    columns = shapes[0][1]
    return min(sum(rows for rows, _ in shapes), columns), columns


def _whole(name: str, parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """One statistic of all sites, computed in float64; the shares add up to 1."""
    if name == Statistic.SKETCH:
        return torch.stack([values.double() for values, _ in parts]).sum(dim=0).float()
    if not is_factor(name, parts[0][0].shape):
        return torch.stack([values.double() * share for values, share in parts]).sum(dim=0).float()
    stacked_RN = torch.cat([factor_RN.double() * sqrt(share) for factor_RN, share in parts])
    if len(stacked_RN) > stacked_RN.shape[1]:
        stacked_RN = torch.linalg.qr(stacked_RN, mode="r").R
    return stacked_RN.float()
