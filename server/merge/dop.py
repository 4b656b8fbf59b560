"""DOP, dual orthogonal projection, with a fixed weight and in closed form.

Paper: "Continual Model Merging without Data: Dual Projections for Balancing Stability and Plasticity",
NeurIPS 2025, openreview.net/forum?id=zD5cUX67b9.

``M`` is the merged task vector of a layer, ``D`` the new one; the next merged one is the W that changes
neither much along its own singular directions, weighted by its own singular values::

    min_W  a loss(W; M) + (1 - a) loss(W; D) + rho ||W - (M + D) / 2||_F^2
    loss(W; Q) = ||S U^T (W - Q)||_F^2 + ||(W - Q) V S||_F^2,   Q = U S V^T

Since ``U S^2 U^T = Q Q^T`` and ``V S^2 V^T = Q^T Q``, the minimum solves a Sylvester equation::

    (L + rho I) W + W G = 2 a M M^T M + 2 (1 - a) D D^T D + rho (M + D) / 2
    L = a M M^T + (1 - a) D D^T,   G = a M^T M + (1 - a) D^T D

which the eigenvectors of L and G diagonalise: entries divided by ``l_i + g_j + rho``. Both depend on D, so
nothing can be prepared. G's eigenvectors come from the right singular directions of ``[M; D]``, weighted,
so that no more than min(2M, N) of them are sought, and of a D of rank R no more than M + R.

Departures from the published code, which takes 200 steps of Adam at 1e-4 from (M + D) / 2:

- The weight ``a`` stays at 0.8, where the published one starts and which it leaves by little.
- The minimum itself, with the term in ``rho`` for what so few steps leave near their start: directions that
  both M and D hardly use, where the rest is flat. ``rho = ridge (l_1 + g_1)``.
- All singular values above rounding count; the published code drops the weakest 0.001 % of their sum.
- Vector layers read as their mean; the published average of two halves the old tasks at every step.
- A zero M or D leaves the other as it is, so the first task vector is kept whole.

Legend: M out rows, N in columns, K directions that M or D uses, R rank of D, J rows D is
given in.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.server.merge.elementwise import values_of
from fedmerge.server.merge.sequential import SequentialRule
from fedmerge.server.merge.spectrum import spectrum_of
from fedmerge.server.merge.sums import added


class Dop(SequentialRule):
    """Balances old and new along the singular directions of both.

    Args:
        weight: a, of what is merged already, above 0 and below 1.
        ridge: pull towards the mean of both, as a share of the largest curvature, 1e-12 to 1.
    """

    name: ClassVar[str] = "dop"

    weight: float = Field(default=0.8, gt=0.0, lt=1.0)
    ridge: float = Field(default=1e-6, ge=1e-12, le=1.0)

    def step(self, merged_MN: Tensor, prepared: None, update: LayerUpdate) -> Tensor:
        if not merged_MN.any() or not update.sum_of_squares():
            return added(merged_MN, update)
        tall = merged_MN.shape[0] > merged_MN.shape[1]
        frame_MJ, rows_JN = _framed(update, merged_MN.shape, tall)
        if tall:
            return self._balanced(merged_MN.T.double(), frame_MJ, rows_JN).T.float().contiguous()
        return self._balanced(merged_MN.double(), frame_MJ, rows_JN).float()

    def _balanced(self, old_MN: Tensor, frame_MJ: Tensor, rows_JN: Tensor) -> Tensor:
        """The minimum for ``D = frame @ rows``, float64, solved in the K input directions M or D uses."""
        roots = sqrt(self.weight), sqrt(1 - self.weight)
        used = spectrum_of(torch.cat([roots[0] * old_MN, roots[1] * rows_JN]))
        both = used.left_MK * used.values_K
        old_MK, new_JK = both[: len(old_MN)] / roots[0], both[len(old_MN) :] / roots[1]
        return self._solved(old_MK, frame_MJ @ new_JK, used.values_K.square()) @ used.right_KN

    def _solved(self, old_MK: Tensor, new_MK: Tensor, curvature_K: Tensor) -> Tensor:
        """The minimum in coordinates that make G diagonal, with ``curvature_K`` on its diagonal."""
        old_MM = self.weight * (old_MK @ old_MK.T)
        new_MM = (1 - self.weight) * (new_MK @ new_MK.T)
        curvature_M, left_MM = torch.linalg.eigh(old_MM + new_MM)
        rho = self.ridge * (curvature_M[-1] + curvature_K[0])
        wanted_MK = 2 * (old_MM @ old_MK + new_MM @ new_MK) + rho * (old_MK + new_MK) / 2
        sums_MK = curvature_M.clamp_min(0)[:, None] + curvature_K + rho
        solved_MK: Tensor = left_MM @ ((left_MM.T @ wanted_MK) / sums_MK)
        return solved_MK


def _framed(update: LayerUpdate, shape: torch.Size, tall: bool) -> tuple[Tensor, Tensor]:
    """D, or D^T of a ``tall`` layer, as orthonormal columns times J rows; J is the rank of factors."""
    if isinstance(update, LowRank) and update.rank < min(shape):
        left_MR, right_RN = (t.double() for t in update.tensors())
        frame, upper = torch.linalg.qr(right_RN.T if tall else left_MR)
        return frame, upper @ (left_MR.T if tall else right_RN)
    wide = values_of(update, shape).double()
    return torch.eye(min(shape), dtype=wide.dtype, device=wide.device), wide.T if tall else wide
