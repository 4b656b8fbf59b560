"""NUFILT: null-space projection and a filter that gives back what it cost (arXiv 2509.21413).

With ``M`` the merged task vector of a layer, ``D`` the new one, ``V_p`` the leading right singular directions
of M, ``V_t`` those of D, and ``P = I - V_p V_p^T``::

    M <- M + D (P + X)      X minimises  ||(D - M') V_t||_F^2 + ||(M - M') V_p||_F^2,  M' the right side

The published code writes ``X = B A`` of rank 64 and takes 50 steps of Adam on A and B, from B = 0 and a
random A. In X itself the problem is linear least squares. With ``R = (D V_p V_p^T - M) V_t``::

    min_X  ||D X V_t - R||_F^2 + ||D X V_p||_F^2 + ridge s_1^2 ||X||_F^2      s_1 = ||D||_2

which one SVD on each side of X diagonalises: ``D = U diag(s) W^T`` and ``[V_t, V_p] = Q diag(q) Z^T`` give
``D X = U E Q^T``, ``E_ij = s_i^2 (U^T R V_t^T Q)_ij / (s_i^2 q_j^2 + ridge s_1^2)``. As ridge goes to 0 this
is the exact minimiser of least norm.

In that form only directions that V_t takes part in are used, at most two for each of its 8 (one without a
ridge), so the published bound of 64 on the filter's rank never binds and no truncation is needed.

Departures from the published code:

- The minimiser in closed form, without a random start. The ridge stands for stopping early: where V_t
  nearly lies in V_p, or D is weak, meeting both wishes would take a filter of unbounded size.
- V_p as in module ``null_space``: at most the numerical rank of M, so the first task is kept whole.
- Every matrix layer is merged, as there; vector layers read as their mean.

Legend: M out rows, N in columns, K directions protected, R rank of D, F directions seen.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.sequential import SequentialRule
from fedmerge.server.merge.spectrum import Spectrum, spectrum_of, spectrum_of_update
from fedmerge.server.merge.sums import added


class Nufilt(SequentialRule):
    """Protects what is merged along its leading input directions, and restores the new task along its own.

    Args:
        protected: leading directions of the merged layer that are protected, 1 to 65536.
        restored: leading directions of the new task vector that are restored, 1 to 65536.
        ridge: penalty on the filter, in units of the task vector's largest singular value squared.
    """

    name: ClassVar[str] = "nufilt"

    protected: int = Field(default=128, ge=1, le=65536)
    restored: int = Field(default=8, ge=1, le=65536)
    ridge: float = Field(default=1e-2, ge=1e-8, le=1.0)

    def prepare_matrix(self, merged_MN: Tensor) -> Tensor:
        """V_p^T, (K, N) float64."""
        return spectrum_of(merged_MN).leading(self.protected).right_KN

    def step(self, merged_MN: Tensor, prepared: Tensor, update: LayerUpdate) -> Tensor:
        plain_MN = added(merged_MN, update)
        if not prepared.shape[0]:
            return plain_MN
        task = spectrum_of_update(update, merged_MN.shape)
        hidden_MK = task.left_MK * task.values_K @ (task.right_KN @ prepared.T)
        filtered_MF, seen_FN = self._filtered(merged_MN, prepared, task, hidden_MK)
        left = torch.cat([filtered_MF, -hidden_MK], dim=1).float()
        return plain_MN.addmm_(left, torch.cat([seen_FN, prepared]).float())

    def _filtered(
        self, merged_MN: Tensor, protected_KN: Tensor, task: Spectrum, hidden_MK: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``D X`` as ``U E`` and ``Q^T``; ``hidden_MK`` is ``D V_p``, what the projection takes away."""
        wanted = task.leading(self.restored).right_KN
        missing = hidden_MK @ (protected_KN @ wanted.T) - merged_MN.double() @ wanted.T
        seen = spectrum_of(torch.cat([wanted, protected_KN]))
        pull_RF = task.left_MK.T @ (missing @ (seen.left_MK[: len(wanted)] * seen.values_K))
        strength_R1 = task.values_K.square()[:, None]
        floor = self.ridge * strength_R1[:1]
        share = strength_R1 / (strength_R1 * seen.values_K.square() + floor)
        return task.left_MK @ (share * pull_RF), seen.right_KN
