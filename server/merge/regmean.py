"""RegMean: the linear layer closest to all tasks' layers on their own inputs (arXiv 2212.09849).

With G_t the Gram of the layer's inputs in task t and W_t its weights there, it minimises
``sum_t E ||(W - W_t) x_t||^2``::

    W (sum_t G_t) = sum_t W_t G_t

All tasks share a base, ``W_t = W_0 + D_t``, hence ``W = W_0 + M`` with ``M (sum_t G_t) = sum_t D_t G_t``:
merging task vectors is the same as merging weights. As published, off-diagonal entries of every G_t are
multiplied with a factor below 1, which keeps the sum positive definite wherever all inputs vary at all.

Departures from the published code:

- G_t is a mean over the input rows a site has measured, not a sum: each task counts the same.
- A ridge of 1e-6 mean eigenvalues of ``sum_t G_t`` leaves the base's weights where an input is always zero;
  there the published inverse does not exist.
- Convolutions are matrices (out, in * kernel), not averaged.
- A matrix layer whose inputs a site could not measure counts as having inputs of unit size.

Vector layers are averaged, as published.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.statistics import Statistic
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.grams import GramRule, GramSum, GramTerm, input_gram_term
from fedmerge.server.merge.rule import Context, Totals

RIDGE = 1e-6
"""In mean eigenvalues of the summed Gram."""


class RegMean(GramRule):
    """Least squares on the inputs of all tasks.

    Args:
        off_diagonal: factor on the Grams' off-diagonal entries, 0 to 1; at 0 each input is merged on its own.
    """

    name: ClassVar[str] = "regmean"
    needs: ClassVar[frozenset[str]] = frozenset({Statistic.INPUT_GRAM})

    off_diagonal: float = Field(default=0.95, ge=0.0, le=1.0)

    def term(self, update: LayerUpdate, shape: torch.Size, context: Context) -> GramTerm:
        return input_gram_term(update, shape, context.statistics.get(Statistic.INPUT_GRAM), self.off_diagonal)

    def solve(self, state: GramSum, totals: Totals) -> Tensor:
        return state.solution(state.ridge(RIDGE))
