"""OPCM: orthogonal projection-based continual merging (arXiv 2501.09522).

A new task vector D is added to the running sum S after removing what would overwrite it. With
``S = U diag(s) V^T`` and ``C = U^T D V``::

    C[:r, :r] = 0          r = leading directions holding a share alpha of the singular values
    C_ii = 0               where ``diagonal="cleared"``
    S <- S + U C V^T       so <D_clean, S> = 0
    theta = theta_0 + c S  c = mean_i ||tau_i|| / ||S||, one scalar for the whole model (1 / lambda_t)

The published update re-scales the merged weights at every step; carrying the un-scaled sum and one
scalar is the same recursion. Vectors (biases, norms, embeddings) are summed and share the scalar.

Departures from the published code:

- Only what is removed is computed, from the thin singular basis: no full-size U, V or C.
- The basis comes from float64 and is then used in float32 (module ``spectrum``).
- The diagonal is cleared over the numerical rank of S only. Beyond it, singular vectors are not
  unique and the published step is ill-posed, always so for low-rank vectors.
- Convolutions are matrices (out, in * kernel); the published code projects linear layers alone.
- A share that equals alpha within 1e-9 counts as reached (``split_of``).

Legend: M out rows, N in columns, K rank of S, R rank of the update, J and L sizes of a core,
F directions found new.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals
from fedmerge.server.merge.spectrum import Spectrum, spectrum_of, split_of
from fedmerge.server.merge.sums import MatrixSum, RunningSum, added

NEGLIGIBLE = 1e-10
"""Share of a factor's norm below which a direction outside the known ones is rounding."""

CANCELLATION = 0.5
"""Where less than this share of a factor is left outside the known directions, it is orthogonalised twice."""

FLOAT64_PER_FLOAT32 = 2
"""Bytes of a factored sum's entry over those of a dense sum's."""


@dataclass(frozen=True)
class FactoredSum:
    """S = left_JM^T @ core_JL @ right_LN, float64, the rows of both sides orthonormal.

    The state of a layer that has seen low-rank updates only, while its tensors take no more bytes than
    the dense sum would; so memory never exceeds a dense layer's.
    """

    left_JM: Tensor
    core_JL: Tensor
    right_LN: Tensor

    @classmethod
    def zero(cls, rows: int, columns: int) -> FactoredSum:
        none = torch.zeros(0, 0, dtype=torch.float64)
        return cls(none.new_zeros(0, rows), none, none.new_zeros(0, columns))

    def sum_of_squares(self) -> float:
        return float(self.core_JL.square().sum())

    def to_dense(self) -> MatrixSum:
        return MatrixSum(self.read(1.0))

    def read(self, scale: float) -> Tensor:
        """The core goes to the shorter side first."""
        core_JL = self.core_JL * scale
        if self.left_JM.shape[1] <= self.right_LN.shape[1]:
            return (self.left_JM.T @ core_JL).float() @ self.right_LN.float()
        return self.left_JM.T.float() @ (core_JL @ self.right_LN).float()


@dataclass(frozen=True)
class Removal:
    """What an arrival needs of S: its directions, and how many leading ones are protected as a block.

    ``within_core`` says that the directions are coordinates in a :class:`FactoredSum`'s core.
    """

    basis: Spectrum
    split: int
    within_core: bool = False


OpcmState = RunningSum | FactoredSum


class Opcm(Rule):
    """OPCM over matrices, plain sums over vectors, one scalar for the whole model.

    Args:
        alpha: share of the sum of singular values whose block is protected, 0 to 1. Larger protects
            more, except that exactly 1 protects no block at all (as in the reference).
        diagonal: ``cleared`` as in the reference today, ``left`` as in the published runs, whose code
            cleared a copy.
    """

    name: ClassVar[str] = "opcm"
    states: ClassVar[tuple[type, ...]] = (RunningSum, MatrixSum, FactoredSum)

    alpha: float = Field(default=0.5, ge=0.0, le=1.0)
    diagonal: Literal["cleared", "left"] = "cleared"

    def init(self, layer: LayerSpec) -> OpcmState:
        if layer.kind is LayerKind.MATRIX:
            return FactoredSum.zero(*layer.matrix_shape)
        return RunningSum.zero(layer)

    def prepare(self, state: OpcmState) -> Removal | None:
        """Directions of S and the split; None for a vector layer or before the first update."""
        if isinstance(state, FactoredSum):
            return self._removal(state.core_JL, within_core=True) if state.core_JL.numel() else None
        return self._removal(state.sum_MN) if isinstance(state, MatrixSum) else None

    def absorb(
        self, state: OpcmState, prepared: Removal | None, update: LayerUpdate, context: Context = ALONE
    ) -> OpcmState:
        if isinstance(state, FactoredSum):
            if isinstance(update, LowRank) and _stays_factored(state, update):
                return _absorb_factored(state, prepared, update)
            prepared, state = _out_of_core(state, prepared), state.to_dense()
        return replace(state, sum_MN=_without(added(state.sum_MN, update), prepared, update))

    def scale(self, totals: Totals) -> float:
        return totals.mean_norm / totals.state_norm if totals.state_norm else 0.0

    def read(self, state: OpcmState, totals: Totals) -> Tensor:
        return state.read(self.scale(totals))

    def _removal(self, matrix: Tensor, within_core: bool = False) -> Removal:
        basis = spectrum_of(matrix)
        split = split_of(basis.values_K, self.alpha)
        if self.diagonal == "left":
            basis = basis.leading(split)
        return Removal(basis if within_core else basis.rounded(), split, within_core)


def _without(target_MN: Tensor, removal: Removal | None, update: LayerUpdate) -> Tensor:
    """``target - U C V^T`` in place on ``target``, C the removed part of the update's core.

    The update is projected onto the longer side, so that only two products are as large as the layer.
    """
    if removal is None or not removal.basis.rank:
        return target_MN
    left_MK, right_KN = removal.basis.left_MK, removal.basis.right_KN
    rows, columns = target_MN.shape
    if rows > columns:
        projected_KN = _times(left_MK.T, update, target_MN.shape)
        return target_MN.addmm_(left_MK, _removed(projected_KN, right_KN, removal.split), alpha=-1)
    projected_KM = _times_transposed(right_KN, update, target_MN.shape)
    return target_MN.addmm_(_removed(projected_KM, left_MK.T, removal.split).T, right_KN, alpha=-1)


def _times(left_KM: Tensor, update: LayerUpdate, shape: torch.Size) -> Tensor:
    """``left @ D``, (K, N)."""
    if isinstance(update, LowRank):
        return (left_KM @ update.left_MR) @ update.right_RN
    return left_KM @ update.values.reshape(shape)


def _times_transposed(right_KN: Tensor, update: LayerUpdate, shape: torch.Size) -> Tensor:
    """``right @ D^T``, (K, M)."""
    if isinstance(update, LowRank):
        return (right_KN @ update.right_RN.T) @ update.left_MR.T
    return right_KN @ update.values.reshape(shape).T


def _removed(projected_KN: Tensor, right_KN: Tensor, split: int) -> Tensor:
    """``C V^T`` from ``U^T D``, for C that is ``U^T D V`` on its leading block and diagonal, else zero.

    With the sides exchanged, ``V^T D^T`` and ``U^T``, it gives ``(U C)^T``.
    """
    diagonal_K = torch.linalg.vecdot(projected_KN, right_KN)
    removed_KN: Tensor = right_KN * diagonal_K[:, None]
    lead = right_KN[:split]
    removed_KN[:split] = (projected_KN[:split] @ lead.T) @ lead
    return removed_KN


def _stays_factored(state: FactoredSum, update: LowRank) -> bool:
    rows, columns = state.left_JM.shape[1], state.right_LN.shape[1]
    size = max(state.core_JL.shape) + update.rank
    return FLOAT64_PER_FLOAT32 * size * (rows + size + columns) <= rows * columns


def _absorb_factored(state: FactoredSum, removal: Removal | None, update: LowRank) -> FactoredSum:
    """OPCM in the core's coordinates: O((M + N)(K + R)^2), never M x N."""
    left_JM, coordinates_RJ = _extended(state.left_JM, update.left_MR.T.double())
    right_LN, coordinates_RL = _extended(state.right_LN, update.right_RN.double())
    core_JL = coordinates_RJ.T @ coordinates_RL
    known = tuple(slice(size) for size in state.core_JL.shape)
    if removal is not None and removal.basis.rank:
        left, right = removal.basis.left_MK, removal.basis.right_KN
        core_JL[known] -= left @ _removed(left.T @ core_JL[known], right, removal.split)
    core_JL[known] += state.core_JL
    return FactoredSum(left_JM, core_JL, right_LN)


def _extended(known_KM: Tensor, added_RM: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal rows spanning both, the known ones first and unchanged; and the added rows' coordinates.

    Directions of rounding size are dropped, so that adding a vector whose span is known adds nothing.
    """
    inside_RK = added_RM @ known_KM.T
    outside_RM = added_RM - inside_RK @ known_KM
    size = torch.linalg.vector_norm(added_RM)
    if torch.linalg.vector_norm(outside_RM) < CANCELLATION * size:
        again_RK = outside_RM @ known_KM.T
        inside_RK, outside_RM = inside_RK + again_RK, outside_RM - again_RK @ known_KM
    columns_MR, upper_RR = torch.linalg.qr(outside_RM.T)
    turn_RR, values, _ = torch.linalg.svd(upper_RR)
    turn_RF = turn_RR[:, values > NEGLIGIBLE * size]
    extended = torch.cat([known_KM, turn_RF.T @ columns_MR.T])
    return extended, torch.cat([inside_RK, upper_RR.T @ turn_RF], dim=1)


def _out_of_core(state: FactoredSum, removal: Removal | None) -> Removal | None:
    """The same directions in the layer's own coordinates, for a sum that turns dense."""
    if removal is None:
        return None
    basis = removal.basis
    whole = Spectrum(state.left_JM.T @ basis.left_MK, basis.values_K, basis.right_KN @ state.right_LN)
    return Removal(whole.rounded(), removal.split)
