"""Frequent directions: the column space of a long matrix in little memory (arXiv 1501.01711).

Of a matrix A with M rows whose columns arrive in blocks, a sketch S of at most L columns is kept. When a
block makes them more, the squared singular values are lowered by the largest that has to go, so that::

    0 <= A A^T - S S^T  <=  ||A - A_k||_F^2 / (L + 1 - k)       for every k <= L, as an order of matrices

Sketches are float64. Legend of shape suffixes: M rows, L columns of the sketch, R columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOST = 1e-12
"""Share of the largest squared singular value at and below which a direction is rounding."""


@dataclass(frozen=True)
class FrequentDirections:
    """``columns_ML``: the sketch, its columns orthogonal, longest first. ``limit``: most columns."""

    columns_ML: Tensor
    limit: int

    @classmethod
    def empty(cls, rows: int, limit: int, device: torch.device) -> FrequentDirections:
        return cls(torch.zeros(rows, 0, dtype=torch.float64, device=device), limit)

    def plus(self, block_MR: Tensor) -> FrequentDirections:
        """The sketch of the columns so far and these."""
        both = torch.cat([self.columns_ML, block_MR.double()], dim=1)
        squares, turn = torch.linalg.eigh(both.T @ both)
        squares, turn = squares.flip(0).clamp(min=0), turn.flip(1)
        known = squares[: self.limit] > LOST * squares[:1]
        squares_L, turn = squares[: self.limit][known], turn[:, : self.limit][:, known]
        lowered = squares_L - (squares[self.limit] if len(squares) > self.limit else 0)
        return FrequentDirections(both @ turn * (lowered / squares_L).clamp(min=0).sqrt(), self.limit)

    def directions(self, energy: float) -> Tensor:
        """(M, K): the fewest leading unit columns with this share of the sketch's squared norm.

        None of a sketch that is zero.
        """
        squares_L = self.columns_ML.square().sum(dim=0)
        squares_L = squares_L[squares_L > LOST * squares_L.max()] if squares_L.numel() else squares_L
        short = torch.cumsum(squares_L, 0) < energy * squares_L.sum()
        kept = min(int(short.sum()) + 1, len(squares_L))
        return self.columns_ML[:, :kept] / squares_L[:kept].sqrt()
