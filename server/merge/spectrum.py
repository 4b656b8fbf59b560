"""Singular directions of a running sum, computed once between arrivals.

Everything is float64 inside, because the directions of close singular values turn into each other
under float32 rounding. The route is an eigendecomposition of the smaller Gram matrix, several times
cheaper than an SVD; what squaring loses, the weak directions, is recovered by a second, small
eigendecomposition in their own span.

Legend: M out rows, N in columns, K numerical rank, R rank of an update.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.server.merge.elementwise import values_of

logger = logging.getLogger("fedmerge.server")

LinAlgError = torch.linalg.LinAlgError  # type: ignore[attr-defined]
"""What torch raises when a factorisation does not converge."""

WEAK = 1e-3
"""Below this share of the largest singular value, directions are refined in their own span."""

GRAM_BLOCK = 128
"""Rows of a Gram matrix computed at a time; half of it is enough, so nearly half is never computed."""


@dataclass(frozen=True)
class Spectrum:
    """``S = left_MK @ diag(values_K) @ right_KN``, values decreasing, zero directions left out."""

    left_MK: Tensor
    values_K: Tensor
    right_KN: Tensor

    @property
    def rank(self) -> int:
        return self.values_K.shape[0]

    def leading(self, count: int) -> Spectrum:
        """The ``count`` strongest directions."""
        return Spectrum(self.left_MK[:, :count], self.values_K[:count], self.right_KN[:count])

    def above(self, floor: float) -> Spectrum:
        """The directions whose singular value is above a floor."""
        return self.leading(int((self.values_K > floor).sum()))

    def rounded(self) -> Spectrum:
        """The same directions in float32: harmless once they are known, and what arrivals multiply with."""
        return Spectrum(self.left_MK.float(), self.values_K, self.right_KN.float())


def spectrum_of(matrix_MN: Tensor) -> Spectrum:
    """Singular directions of a matrix whose entries carry float32 rounding, in float64.

    Directions at or below :func:`rounding_floor` are rounding noise, not unique, and are left out;
    so a matrix of rank K gives K directions, and the zero matrix none.
    """
    rows, columns = matrix_MN.shape
    wide = matrix_MN.double()
    if rows > columns:
        right_NN, values, left_NM = _rows_first(wide.T)
        left, right = left_NM.T, right_NN.T
    else:
        left, values, right = _rows_first(wide)
    rank = int((values > rounding_floor(matrix_MN)).sum())
    return Spectrum(left[:, :rank], values[:rank], right[:rank])


def spectrum_of_update(update: LayerUpdate, shape: Sequence[int]) -> Spectrum:
    """Singular directions of a task vector as an (M, N) matrix; of factors by way of their R x R core."""
    if not isinstance(update, LowRank) or update.rank >= min(shape):
        return spectrum_of(values_of(update, shape))
    left_MR, upper_RR = torch.linalg.qr(update.left_MR.double())
    right_NR, lower_RR = torch.linalg.qr(update.right_RN.double().T)
    core = spectrum_of(upper_RR @ lower_RR.T)
    return Spectrum(left_MR @ core.left_MK, core.values_K, core.right_KN @ right_NR.T)


def rounding_floor(matrix_MN: Tensor) -> float:
    """Largest singular value that float32 rounding of the entries alone may produce.

    Rounding S entrywise adds noise of standard deviation about eps/sqrt(12) * |s_ij|, whose spectral
    norm is near eps/sqrt(12) * ||S||_F * (1/sqrt(M) + 1/sqrt(N)); this is seven times that, so that sums
    over many updates stay below it too. The usual bound max(M, N) * eps * s_1 assumes the worst case and
    would also discard true directions of full-rank matrices.
    """
    rows, columns = matrix_MN.shape
    norm = float(torch.linalg.vector_norm(matrix_MN, dtype=torch.float64))
    return 2 * torch.finfo(torch.float32).eps * norm * (1 / sqrt(rows) + 1 / sqrt(columns))


def split_of(values_K: Tensor, alpha: float) -> int:
    """How many leading directions carry at most a share ``alpha`` of the sum of singular values.

    Shares within 1e-9 of alpha count as at it, so that rounding does not decide a tie. At ``alpha >= 1``
    nothing is protected (0), as in the reference, where no share exceeds 1.
    """
    if alpha >= 1 or not values_K.numel():
        return 0
    share = values_K.cumsum(0) / values_K.sum()
    return int((share <= alpha + 1e-9).sum())


def _rows_first(wide_MN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (M x M), s, V^T (M x N) of a float64 matrix with M <= N; rows of V^T at s = 0 are zero."""
    left = _eigenvectors(lower_gram(wide_MN))
    projected = left.T @ wide_MN
    values = torch.linalg.vector_norm(projected, dim=1)
    weak = values < WEAK * values.max().clamp_min(torch.finfo(torch.float64).tiny)
    if bool(weak.any()) and bool(values.max() > 0):
        rows = projected[weak]
        turn = _eigenvectors(rows @ rows.T)
        projected[weak] = turn.T @ rows
        left[:, weak] = left[:, weak] @ turn
        values = torch.linalg.vector_norm(projected, dim=1)
    values, order = values.sort(descending=True, stable=True)
    right = projected[order] / values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return left[:, order], values, right


def lower_gram(wide_MN: Tensor) -> Tensor:
    """``S S^T`` on and below the diagonal blocks; above them zeros, which ``eigh`` does not read."""
    gram_MM = wide_MN.new_zeros(wide_MN.shape[0], wide_MN.shape[0])
    for start in range(0, wide_MN.shape[0], GRAM_BLOCK):
        stop = start + GRAM_BLOCK
        torch.mm(wide_MN[start:stop], wide_MN[:stop].T, out=gram_MM[start:stop, :stop])
    return gram_MM


def _eigenvectors(gram: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix, of which the lower triangle is read; strongest first.

    Where the eigenvalue solver does not converge, the slower SVD of the same matrix takes its place.
    """
    try:
        weakest_first: Tensor = torch.linalg.eigh(gram).eigenvectors
    except LinAlgError as error:
        logger.warning("%s; falling back to an SVD", error)
        strongest_first: Tensor = torch.linalg.svd(gram.tril() + gram.tril(-1).T).U
        return strongest_first
    return weakest_first.flip(1).contiguous()
