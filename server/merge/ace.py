"""ACE-Merging: task vectors weighted by covariances estimated from themselves (arXiv 2603.02945).

With D~_t the task vector less its mean row and G_t = D~_t^T D~_t an estimate of the covariance of task t's
inputs, up to a factor, the merged matrix is::

    M = B (A + 1 c)^-1       A = sum_t (G_t + eps I)
                             B = sum_t D~_t (G_t + eps I)
                             c = the mean row of sum_t G_t, for every row: a prior shared by all tasks

This is the published code's branch for tasks of similar size. Its other branch, for layers where the log
traces of D_t^T D_t vary by more than 0.3 of their squared mean, is left out; it normalises each Gram and adds
a second, spectral term. Like the code, M merges the centred D~_t: what all rows of D_t share is not merged.

``A + 1 c`` is a positive definite matrix plus one of rank 1, so its inverse comes from the Cholesky factor of
A (Sherman-Morrison). It always exists: ``c A^-1 1 = 1^T G A^-1 1 / N >= 0``, as the summed Gram G and A^-1
commute.

Departures from the published code:

- Float64 in place of float32, where eps is below the rounding of G_t.
- Convolutions are matrices (out, in * kernel), not averaged.
- Matrices of one row, which centring would erase, are averaged.

Vector layers are averaged, as published.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank
from fedmerge.server.merge.grams import GramRule, GramSum, GramTerm, gram_and_cube, lifted, reduced
from fedmerge.server.merge.rule import Context, State, Totals
from fedmerge.server.merge.sums import RunningSum


class Ace(GramRule):
    """The published closed form, for tasks of similar size.

    Args:
        eps: added to every direction of each task's Gram, in squared units of the weights; 1e-9 to 1e6. The
            authors take 1e-5 for vision transformers, 2e-4 for RoBERTa-base and 4e-2 for GPT-2.
    """

    name: ClassVar[str] = "ace"

    eps: float = Field(default=1e-5, ge=1e-9, le=1e6)

    def init(self, layer: LayerSpec) -> State:
        return super().init(layer) if layer.matrix_shape[0] > 1 else RunningSum.zero(layer)

    def term(self, update: LayerUpdate, shape: torch.Size, context: Context) -> GramTerm:
        left_MR, rows_RN = reduced(centred(update, shape), shape)
        gram_NN, product_RN = gram_and_cube(rows_RN)
        return GramTerm(gram_NN, lifted(left_MR, product_RN + self.eps * rows_RN))

    def solve(self, state: GramSum, totals: Totals) -> Tensor:
        """``B (A + 1 c)^-1 = X - (X 1) y / (1 + y 1)`` with ``X = B A^-1`` and ``y = c A^-1``."""
        ridge = totals.merges * self.eps
        factor_NN, columns = state.factor(ridge), state.product_MN.shape[1]
        ones_N1 = factor_NN.new_ones(columns, 1)
        solution_MN = torch.cholesky_solve(state.product_MN.T, factor_NN).T
        prior_1N = (ones_N1 - ridge * torch.cholesky_solve(ones_N1, factor_NN)).T / columns
        return solution_MN - (solution_MN @ ones_N1) @ prior_1N / (1 + prior_1N.sum())


def centred(update: LayerUpdate, shape: torch.Size) -> LayerUpdate:
    """The update less its mean row, float64."""
    if isinstance(update, LowRank):
        left_MR = update.left_MR.double()
        return LowRank(left_MR - left_MR.mean(0), update.right_RN, update.shape)
    values_MN = update.values.reshape(shape).double()
    return Dense(values_MN - values_MN.mean(0))
