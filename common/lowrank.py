"""The strongest singular directions of a layer, as factors.

From an eigendecomposition of the smaller Gram matrix in float64, several times cheaper than a singular
value decomposition. What squaring loses are directions below some 1e-8 of the strongest, which float32 does
not hold.

Legend of shape suffixes: M out rows, N in columns, R rank of an update, K kept rank.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from fedmerge.common.taskvector import LayerUpdate, LowRank

TIE = 1e-12
"""Shares of the squared norm this close to each other count as equal, so that rounding decides no tie."""


def truncated(
    update: LayerUpdate, *, rank: int | None = None, energy: float | None = None
) -> tuple[LayerUpdate, float]:
    """The strongest singular directions of a layer of two and more dimensions, and the squared norm left out.

    Args:
        rank: how many at most. ``energy``: the fewest that hold this share of the squared norm. At least one
            direction is kept, and with both no more than either allows.

    Returns:
        The layer unchanged, with nothing left out, where factors would not have fewer numbers.
    """
    matrix, left, right = _core(update)
    gram, rows_first = _smaller_gram(matrix)
    values, vectors = torch.linalg.eigh(gram)
    squares, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    kept = _kept(squares, rank, energy)
    if kept * (update.shape[0] + prod(update.shape[1:])) >= sum(t.numel() for t in update.tensors()):
        return update, 0.0
    basis = vectors[:, :kept]
    left_K, right_K = (basis, basis.T @ matrix) if rows_first else (matrix @ basis, basis.T)
    left_MK = left_K if left is None else left @ left_K
    right_KN = right_K if right is None else right_K @ right
    return LowRank(left_MK.float(), right_KN.float(), update.shape), float(squares[kept:].sum())


def balanced(update: LowRank) -> LowRank:
    """The same product by the factors ``U sqrt(S)`` and ``sqrt(S) V^T`` of its singular value decomposition.

    No factors of that product have a smaller sum of squares. Their rank is that of the update, or the layer's
    shorter side where that is less.
    """
    matrix, left, right = _core(update)
    basis_MK, values_K, basis_KN = torch.linalg.svd(matrix, full_matrices=False)
    left_MK, right_KN = basis_MK * values_K.sqrt(), values_K.sqrt()[:, None] * basis_KN
    if left is not None and right is not None:
        left_MK, right_KN = left @ left_MK, right_KN @ right
    return LowRank(left_MK.float(), right_KN.float(), update.shape)


def _core(update: LayerUpdate) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A small matrix of the same singular values, and what it is to be multiplied with on either side."""
    if isinstance(update, LowRank) and update.rank < min(update.left_MR.shape[0], update.right_RN.shape[1]):
        left_MR, upper_RR = torch.linalg.qr(update.left_MR.double())
        right_NR, lower_RR = torch.linalg.qr(update.right_RN.double().T)
        return upper_RR @ lower_RR.T, left_MR, right_NR.T
    if isinstance(update, LowRank):
        return update.left_MR.double() @ update.right_RN.double(), None, None
    return update.values.double().reshape(update.shape[0], prod(update.shape[1:])), None, None


def _smaller_gram(matrix: Tensor) -> tuple[Tensor, bool]:
    """Of the rows, or of the columns where these are fewer; and which."""
    rows_first = matrix.shape[0] <= matrix.shape[1]
    return (matrix @ matrix.T if rows_first else matrix.T @ matrix), rows_first


def _kept(squares: Tensor, rank: int | None, energy: float | None) -> int:
    kept = len(squares)
    if energy is not None:
        shares = squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
        kept = int((shares < energy - TIE).sum()) + 1 if bool(squares.any()) else 1
    return max(1, min(kept, len(squares), kept if rank is None else rank))
