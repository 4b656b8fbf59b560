"""WUDI merging in closed form: least interference in the span of each task's own rows (arXiv 2503.08099).

The paper lets the merged M of a layer interfere with no task where its task vector acts: the rows of D_t span
the inputs that task t has learned from, so it minimises ``sum_t ||(M - D_t) D_t^T||_F^2 / ||D_t||_F^2``, by
300 to 400 steps of Adam from ``sum_t D_t``. That objective is quadratic, with the solution::

    M (sum_t G_t) = sum_t D_t G_t        G_t = D_t^T D_t / ||D_t||_F^2

Departures from the published code:

- The minimum itself instead of some steps towards it. What stopping early does for directions in which all
  task vectors are weak, a ridge does here: ``G_t + (ridge / N) I`` in place of G_t. As tr G_t = 1, the ridge
  is relative to the mean eigenvalue of G_t, whatever the size of the layer and of the task vectors.
- Each task has the ridge, so it draws M towards the mean task vector, not towards zero. In between lies the
  whole way from the mean (ridge to infinity) to the published minimum (ridge to 0, which is the sum of task
  vectors where their rows are orthogonal).
- Convolutions are matrices (out, in * kernel).

A zero task vector has G_t = 0 and its ridge alone. Vector layers are averaged, as published.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.grams import GramRule, GramSum, GramTerm, gram_and_cube, lifted, reduced
from fedmerge.server.merge.rule import Context, Totals


class Wudi(GramRule):
    """The matrix that interferes least with every task in the span of its task vector's rows.

    Args:
        ridge: added to every direction of each task's Gram, in mean eigenvalues of it; 1e-6 to 1e6.
    """

    name: ClassVar[str] = "wudi"

    ridge: float = Field(default=0.1, ge=1e-6, le=1e6)

    def term(self, update: LayerUpdate, shape: torch.Size, context: Context) -> GramTerm:
        left_MR, rows_RN = reduced(update, shape)
        gram_NN, product_RN = gram_and_cube(rows_RN)
        squares = float(rows_RN.square().sum())
        if squares:
            gram_NN, product_RN = gram_NN / squares, product_RN / squares
        product_RN = product_RN + self.ridge / shape[1] * rows_RN
        return GramTerm(gram_NN, lifted(left_MR, product_RN))

    def solve(self, state: GramSum, totals: Totals) -> Tensor:
        return state.solution(totals.merges * self.ridge / state.product_MN.shape[1])
