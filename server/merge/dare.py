"""DARE: drop and rescale (arXiv 2311.03099), then task arithmetic.

Every entry of a task vector is dropped with probability p, the others are divided by 1 - p, which keeps
the expectation; the results are summed and multiplied with a fixed factor.

What is dropped is drawn by ``torch.rand`` over the layer's matrix, row by row, from torch's CPU generator
(MT19937) seeded with the lower 32 bits of :attr:`Context.seed`: the same for the same update and layer, on
any device, dense or as factors. So a vector can be taken out again, and the order of arrival is free.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from fedmerge.common.taskvector import Dense, LayerUpdate
from fedmerge.server.merge.elementwise import values_of
from fedmerge.server.merge.rule import ALONE, Context, Totals
from fedmerge.server.merge.sums import RunningSum, SumRule


class Dare(SumRule):
    """The sum of all thinned task vectors, times a fixed factor.

    Args:
        drop: p, the probability of an entry to be dropped, 0 to below 1.
        factor: what the sum is multiplied with, 0 to 2.
    """

    name: ClassVar[str] = "dare"

    drop: float = Field(default=0.5, ge=0.0, lt=1.0)
    factor: float = Field(default=0.3, ge=0.0, le=2.0)

    def absorb(
        self, state: RunningSum, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> RunningSum:
        return state.plus(self._thinned(state, update, context.seed))

    def remove(self, state: RunningSum, update: LayerUpdate, context: Context = ALONE) -> RunningSum:
        return state.minus(self._thinned(state, update, context.seed))

    def scale(self, totals: Totals) -> float:
        return self.factor if totals.merges else 0.0

    def _thinned(self, state: RunningSum, update: LayerUpdate, seed: int) -> Dense:
        values_MN = values_of(update, state.sum_MN.shape)
        drawn_MN = torch.rand(values_MN.shape, generator=torch.Generator().manual_seed(seed))
        kept_MN = (drawn_MN >= self.drop).to(values_MN.device)
        return Dense((values_MN / (1 - self.drop)).where(kept_MN, 0))
