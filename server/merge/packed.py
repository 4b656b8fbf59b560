"""Symmetric matrices in half the space: the lower triangle of (N, N) as a rectangle of N(N + 1)/2 entries.

The first ceil(N/2) columns of the triangle leave room above them for the rest of it, transposed
("rectangular full packed format" of LAPACK), so packing copies blocks and needs no index.

Legend: N order of the matrix, P and Q sides of the rectangle.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_zero(order: int) -> Tensor:
    """The zero matrix of an order, at least 1, packed; float64."""
    return torch.zeros(order + (order + 1) % 2, (order + 1) // 2, dtype=torch.float64)


def packed(lower_NN: Tensor) -> Tensor:
    """Packs the triangle on and below the diagonal; what lies above it is not looked at."""
    order = lower_NN.shape[0]
    half, even = (order + 1) // 2, (order + 1) % 2
    rectangle_PQ = lower_NN.new_zeros(order + even, half)
    rectangle_PQ[even:] = lower_NN[:, :half].tril()
    rectangle_PQ[: order - half, 1 - even :] += lower_NN[half:, half:].tril().T
    return rectangle_PQ


def unpacked(rectangle_PQ: Tensor) -> Tensor:
    """The lower triangle as (N, N), zero above the diagonal: what Cholesky factorisations read."""
    order, half, even = _sizes(rectangle_PQ)
    lower_NN = rectangle_PQ.new_zeros(order, order)
    lower_NN[:, :half] = rectangle_PQ[even:].tril()
    lower_NN[half:, half:] = rectangle_PQ[: order - half, 1 - even :].triu().T
    return lower_NN


def unpacked_whole(rectangle_PQ: Tensor) -> Tensor:
    """The symmetric matrix itself, (N, N)."""
    lower_NN = unpacked(rectangle_PQ)
    return lower_NN + lower_NN.tril(-1).T


def packed_trace(rectangle_PQ: Tensor) -> float:
    _, _, even = _sizes(rectangle_PQ)
    return float(rectangle_PQ.diagonal(-even).sum() + rectangle_PQ.diagonal(1 - even).sum())


def _sizes(rectangle_PQ: Tensor) -> tuple[int, int, int]:
    """Order of the matrix, columns of the rectangle, and 1 for an even order."""
    rows, half = rectangle_PQ.shape
    even = int(rows > 2 * half)
    return rows - even, half, even
