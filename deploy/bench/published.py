"""The published OPCM step, faithful and slow, to compare with and never to merge with.

Written from the update rule of "Merging Models on the Fly Without Retraining" (arXiv 2501.09522): a full
singular value decomposition of every linear layer at every arrival, on whole weights, with the merged
model rescaled each time. In float32 this is what is published; in float64 it is the yardstick.

Legend: M out rows, N in columns, K = min(M, N).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import torch
from torch import Tensor

Diagonal = Literal["cleared", "left", "cleared_within_rank"]

RANK_TOLERANCE = 1e-7
"""Share of the largest singular value below which ``cleared_within_rank`` leaves a direction alone."""


class PublishedOpcm:
    """The published recursion over a dict of weights.

    Args:
        base: theta_0.
        linear: names of the layers that are projected, seen as (out, everything else).
        alpha: share of the sum of singular values whose block is cleared.
        diagonal: ``cleared`` over all K entries; ``left`` as in the published runs, whose code clears a
            copy; ``cleared_within_rank`` is ours, well-posed where vectors are low rank.
        dtype: float32 is what is published.

    Attributes:
        merged: theta^(t); ``lambda_t``: lambda_t, 1 after the first task; ``norms``: ||tau_i|| so far.
    """

    def __init__(
        self,
        base: Mapping[str, Tensor],
        linear: Collection[str],
        *,
        alpha: float = 0.5,
        diagonal: Diagonal = "cleared",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.base = {name: weight.to(dtype) for name, weight in base.items()}
        self.merged = dict(self.base)
        self.linear = frozenset(linear)
        self.alpha, self.diagonal, self.dtype = alpha, diagonal, dtype
        self.lambda_t = 1.0
        self.norms: list[float] = []

    def merge(self, tuned: Mapping[str, Tensor]) -> None:
        """One more fine-tuned model, every layer of it."""
        tuned = {name: weight.to(self.dtype) for name, weight in tuned.items()}
        self.norms.append(distance(tuned, self.base))
        if len(self.norms) == 1:
            self.merged = tuned
            return
        raw = {name: self._raw(name, tuned[name]) for name in self.base}
        mean_norm = sum(self.norms) / len(self.norms)
        self.lambda_t = distance(raw, self.base) / mean_norm
        for name, origin in self.base.items():
            self.merged[name] = origin + (raw[name] - origin) / self.lambda_t

    def vector(self) -> dict[str, Tensor]:
        """The merged task vector, theta^(t) - theta_0."""
        return {name: self.merged[name] - origin for name, origin in self.base.items()}

    def _raw(self, name: str, tuned: Tensor) -> Tensor:
        """One layer before rescaling: W_0 + lambda_{t-1} M + what the projection leaves of D."""
        origin = self.base[name]
        merged, difference = self.merged[name] - origin, tuned - origin
        if name in self.linear:
            difference = clean(merged, difference, self.alpha, self.diagonal)
        return origin + self.lambda_t * merged + difference


def clean(merged: Tensor, difference: Tensor, alpha: float, diagonal: Diagonal = "cleared") -> Tensor:
    """``U C V^T``: the difference without the block and diagonal it shares with the merged vector."""
    merged_MN, difference_MN = merged.flatten(1), difference.flatten(1)
    u_MM, s_K, vh_NN = torch.linalg.svd(merged_MN, full_matrices=True)
    split = published_split(s_K, alpha)
    core_MN: Tensor = u_MM.T @ difference_MN @ vh_NN.T
    if diagonal == "cleared":
        core_MN.diagonal().fill_(0)
    elif diagonal == "cleared_within_rank":
        core_MN.diagonal()[s_K > RANK_TOLERANCE * s_K[0]] = 0
    core_MN[:split, :split] = 0
    cleaned_MN: Tensor = u_MM @ core_MN @ vh_NN
    return cleaned_MN.reshape(difference.shape)


def published_split(values_K: Tensor, alpha: float) -> int:
    """First index whose cumulative share exceeds alpha; 0 where none does, so for alpha = 1."""
    return int(torch.argmax((values_K.cumsum(0) / values_K.sum() > alpha).to(torch.uint8)))


def distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """||one - other||_2 over all layers as if concatenated, in their dtype."""
    per_layer = [torch.linalg.vector_norm(one[name] - other[name]) for name in other]
    return float(torch.linalg.vector_norm(torch.stack(per_layer)))
