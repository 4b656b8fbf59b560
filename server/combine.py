"""Vectors of the same task from several sites, combined into one before merging."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank, TaskVector


def combine(vectors: Sequence[TaskVector], weights: Sequence[float]) -> TaskVector:
    """``sum_i (w_i / sum w) tau_i``, layer by layer when a layer is read.

    Dense layers are summed in float64 and rounded once. If all are low-rank the factors are stacked,
    which is exact and gives the sum of the ranks. A layer unchanged at one site counts as zero there.

    Args:
        vectors: at least one, of the same base.
        weights: positive, one per vector.
    """
    if len(vectors) == 1:
        return vectors[0]
    total = sum(weights)
    shares = [weight / total for weight in weights]
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
    )
    return TaskVector(names, read, unchanged, manifest, "+".join(v.label for v in vectors))


def add_vectors(first: TaskVector, second: TaskVector) -> TaskVector:
    """``first + second``: what a task has moved after one more round."""
    whole = combine([first, second], [1.0, 1.0])
    return TaskVector(
        whole.names, lambda name: whole.read(name).times(2.0), whole.unchanged, second.manifest, second.label
    )


def _sum(parts: Sequence[tuple[LayerUpdate, float]]) -> LayerUpdate:
    factors = [(update, share) for update, share in parts if isinstance(update, LowRank)]
    if len(factors) == len(parts):
        left = torch.cat([update.left_MR * share for update, share in factors], dim=1)
        return LowRank(left, torch.cat([update.right_RN for update, _ in factors]), factors[0][0].shape)
    total = sum(update.to_dense().double() * share for update, share in parts)
    assert isinstance(total, torch.Tensor)
    return Dense(total.float())
