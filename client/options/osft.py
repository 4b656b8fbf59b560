"""OSFT: fine-tuning in the span of the smallest singular directions (arXiv 2504.07097).

Every trained matrix layer is split once, ``W = U_h S_h V_h^T + U_l S_l V_l^T``, the largest directions first.
The paper trains the factors U_l, S_l and V_l, with the gradients of U_l and V_l kept orthogonal to U_h and
V_h. What these factors reach are the displacements D with ``U_h^T D = 0`` and ``D V_h = 0``: between
orthonormal complements of U_h and V_h a core of (M - K) x (N - K), whose rank never exceeds the number of
trained directions. Departure: here W itself is trained, and D is kept in that same set by
``D <- (I - U_h U_h^T) D (I - V_h V_h^T)``, see :mod:`fedmerge.client.options.projected`. So the reachable
weights are the same, and the path to them differs: Adam's moments are those of W's gradient, and weight decay
acts on W's trained part.

Other departures: the frozen share is the same for every layer, rounded down, where the paper's text lets it
depend on the layer; directions whose singular value is lost in rounding are not frozen, because they are
arbitrary (a layer that begins at zero trains freely).

Legend of shape suffixes: M out rows, N in columns, K frozen directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from fedmerge.client.options.matrices import matrices
from fedmerge.client.options.option import Run
from fedmerge.client.options.projected import Projected, Projection
from fedmerge.common.training import Osft


class SmallDirections(Projected):
    """Keeps the largest singular directions of the weights a run starts from, on both sides."""

    def __init__(self, run: Run, config: Osft) -> None:
        super().__init__(run)
        self._config = config

    def projections(self) -> Mapping[str, Projection]:
        found = {}
        for name, weight in matrices(self.run).items():
            left_MK, right_NK = largest(self.run.start[name].flatten(1), self._config.frozen)
            found[name] = partial(_between, left_MK.to(weight), right_NK.to(weight))
        return found


def largest(weight_MN: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """``(left_MK, right_NK)``: this share of the singular directions, the largest; by an SVD in float64."""
    left, values, right = torch.linalg.svd(weight_MN.double(), full_matrices=False)
    lost = max(weight_MN.shape) * torch.finfo(weight_MN.dtype).eps * values.max()
    count = min(int(share * len(values) + 1e-9), int((values > lost).sum()))
    return left[:, :count], right[:count].T


def _between(left_MK: Tensor, right_NK: Tensor, moved_MN: Tensor) -> Tensor:
    moved_MN = moved_MN - left_MK @ (left_MK.T @ moved_MN)
    return moved_MN - (moved_MN @ right_NK) @ right_NK.T
