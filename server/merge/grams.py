"""Sums of Gram matrices: the state of rules that solve ``M (sum_t G_t) = sum_t D_t G_t`` for M.

G_t (N, N), symmetric and positive semidefinite, says how much task t cares about each direction of the
layer's input, and the merged matrix M is the least-squares solution: it minimises
``sum_t tr (M - D_t) G_t (M - D_t)^T``. Both sums have one term per task. So the merged matrix is exact after
every arrival, the same in any order, and a task can be taken out again.

A matrix layer's state takes ``8 (M N + N (N + 1) / 2)`` bytes. Everything is float64: the solution divides by
the weak directions of the summed Gram, which float32 rounding would drown. A vector layer's state is its
running sum, read as the mean.

Legend: M out rows, N in columns, R rows of an update once reduced, S rows of a Gram's factor.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.server.merge.packed import packed, packed_trace, packed_zero, unpacked
from fedmerge.server.merge.rule import ALONE, Context, Rule, State, Totals
from fedmerge.server.merge.spectrum import lower_gram
from fedmerge.server.merge.sums import RunningSum

UNSEEN = 1e-9
"""Summed mean square of inputs at or below which a direction counts as never seen. Where all tasks that
brought a layer are taken out again, what is left is rounding, far below this for inputs of order 1."""


@dataclass(frozen=True)
class GramTerm:
    """What one task adds: ``gram_NN``, of which the lower triangle counts, and ``product_MN = D G``."""

    gram_NN: Tensor
    product_MN: Tensor


@dataclass(frozen=True)
class GramSum:
    """``sum_t G_t``, packed, and ``sum_t D_t G_t`` of one matrix layer, float64."""

    gram_PQ: Tensor
    product_MN: Tensor

    @classmethod
    def zero(cls, rows: int, columns: int) -> Self:
        return cls(packed_zero(columns), torch.zeros(rows, columns, dtype=torch.float64))

    def sum_of_squares(self) -> float:
        """Of the weighted sum, sum_t D_t G_t."""
        return float(self.product_MN.square().sum())

    def plus(self, term: GramTerm) -> Self:
        return replace(
            self, gram_PQ=self.gram_PQ + packed(term.gram_NN), product_MN=self.product_MN + term.product_MN
        )

    def minus(self, term: GramTerm) -> Self:
        return replace(
            self, gram_PQ=self.gram_PQ - packed(term.gram_NN), product_MN=self.product_MN - term.product_MN
        )

    def ridge(self, share: float) -> float:
        """A share of the mean eigenvalue of ``sum_t G_t``, at least ``UNSEEN``."""
        return max(share * packed_trace(self.gram_PQ) / self.product_MN.shape[1], UNSEEN)

    def factor(self, ridge: float) -> Tensor:
        """Cholesky factor of ``sum_t G_t + ridge I``, which ``ridge > 0`` keeps positive definite."""
        gram_NN = unpacked(self.gram_PQ)
        gram_NN.diagonal().add_(ridge)
        lower_NN: Tensor = torch.linalg.cholesky(gram_NN)
        return lower_NN

    def solution(self, ridge: float) -> Tensor:
        """``(sum_t D_t G_t) (sum_t G_t + ridge I)^-1``, (M, N)."""
        return torch.cholesky_solve(self.product_MN.T, self.factor(ridge)).T


class GramRule(Rule):
    """Matrix layers by Gram matrices, vector layers by their mean; a subclass says by which Grams."""

    order_free: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    heavy: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (RunningSum, GramSum)

    def init(self, layer: LayerSpec) -> State:
        return GramSum.zero(*layer.matrix_shape) if layer.kind is LayerKind.MATRIX else RunningSum.zero(layer)

    def absorb(self, state: Any, prepared: None, update: LayerUpdate, context: Context = ALONE) -> State:
        return state.plus(self.change(state, update, context))  # type: ignore[no-any-return]

    def remove(self, state: Any, update: LayerUpdate, context: Context = ALONE) -> State:
        return state.minus(self.change(state, update, context))  # type: ignore[no-any-return]

    def change(self, state: Any, update: LayerUpdate, context: Context) -> Any:
        """What an update adds to a state of this kind."""
        return self.term(update, state.product_MN.shape, context) if isinstance(state, GramSum) else update

    def read(self, state: Any, totals: Totals) -> Tensor:
        if isinstance(state, GramSum):
            merged_MN = self.solve(state, totals) if totals.merges else torch.zeros_like(state.product_MN)
            return merged_MN.float()
        return self.read_vector(state, totals)

    def read_vector(self, state: Any, totals: Totals) -> Tensor:
        mean: Tensor = state.read(totals.share)
        return mean

    @abstractmethod
    def term(self, update: LayerUpdate, shape: torch.Size, context: Context) -> GramTerm:
        """What one task adds to a matrix layer of ``shape`` (M, N)."""

    @abstractmethod
    def solve(self, state: GramSum, totals: Totals) -> Tensor:
        """The merged matrix (M, N), once there is something to merge."""


def reduced(update: LayerUpdate, shape: torch.Size) -> tuple[Tensor | None, Tensor]:
    """``D = left_MR @ rows_RN`` with orthonormal columns on the left, or no left and D itself; float64.

    So ``D^T D = rows^T rows``, and all products with D on the right cost R rows instead of M.
    """
    if not isinstance(update, LowRank):
        return None, update.values.reshape(shape).double()
    left_MR, right_RN = update.left_MR.double(), update.right_RN.double()
    if update.rank >= min(shape):
        return None, left_MR @ right_RN
    basis_MR, mix_RR = torch.linalg.qr(left_MR)
    return basis_MR, mix_RR @ right_RN


def lifted(left_MR: Tensor | None, rows_RN: Tensor) -> Tensor:
    """Back from reduced rows to (M, N)."""
    return rows_RN if left_MR is None else left_MR @ rows_RN


def gram_and_cube(rows_RN: Tensor) -> tuple[Tensor, Tensor]:
    """``D^T D`` on and below the diagonal and ``D D^T D``, the latter by its shorter side."""
    if rows_RN.shape[0] > rows_RN.shape[1]:
        gram_NN = rows_RN.T @ rows_RN
        return gram_NN, rows_RN @ gram_NN
    return lower_gram(rows_RN.T), (rows_RN @ rows_RN.T) @ rows_RN


def input_gram_term(
    update: LayerUpdate, shape: torch.Size, factor_SN: Tensor | None, off_diagonal: float = 1.0
) -> GramTerm:
    """The term whose Gram is that of the layer's inputs, ``factor^T factor``.

    Args:
        factor_SN: None for a layer whose inputs were not measured. It counts as having inputs of unit size in
            every direction, so that a layer no task has measured is averaged.
        off_diagonal: what the Gram's off-diagonal entries are multiplied with, 0 to 1.
    """
    left_MR, rows_RN = reduced(update, shape)
    if factor_SN is None:
        gram_NN = torch.eye(shape[1], dtype=torch.float64, device=rows_RN.device)
        return GramTerm(gram_NN, lifted(left_MR, rows_RN))
    factor_SN = factor_SN.double()
    gram_NN = lower_gram(factor_SN.T)
    product_RN = (rows_RN @ factor_SN.T) @ factor_SN
    if off_diagonal < 1:
        own_N = gram_NN.diagonal() * (1 - off_diagonal)
        product_RN = torch.addcmul(product_RN * off_diagonal, rows_RN, own_N)
        gram_NN = torch.diagonal_scatter(gram_NN * off_diagonal, gram_NN.diagonal())
    return GramTerm(gram_NN, lifted(left_MR, product_RN))
