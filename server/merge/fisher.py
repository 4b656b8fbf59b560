"""Fisher merging with the diagonal of the empirical Fisher information (arXiv 2111.09832)::

    tau = sum_t F_t * tau_t / sum_t F_t        entry by entry

Both sums are kept, so the result is the batch one at every step and in any order. They are float64: what
a large Fisher leaves behind when it is taken out again must be small beside the others.

Every F_t is raised by a floor, as in public implementations, so that entries without curvature are
averaged. Departures: a layer that an update does not bring takes part in neither sum, because the site has
no Fisher of it; Fishers are not scaled to a common norm, an option of those implementations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.statistics import Statistic
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.elementwise import values_of
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals


@dataclass(frozen=True)
class FisherSums:
    """sum F_t * tau_t and sum F_t, float64."""

    weighted_MN: Tensor
    fisher_MN: Tensor

    @classmethod
    def zero(cls, layer: LayerSpec) -> FisherSums:
        none_MN = torch.zeros(layer.matrix_shape, dtype=torch.float64)
        return cls(none_MN, none_MN.clone())

    def sum_of_squares(self) -> float:
        """Of sum F_t * tau_t."""
        return float(torch.linalg.vector_norm(self.weighted_MN)) ** 2


class Fisher(Rule):
    """The mean of all task vectors, every entry weighted by its Fisher information.

    Args:
        floor: added to every Fisher, above 0 to 1.
    """

    name: ClassVar[str] = "fisher"
    needs: ClassVar[frozenset[str]] = frozenset({Statistic.FISHER})
    order_free: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (FisherSums,)

    floor: float = Field(default=1e-6, gt=0.0, le=1.0)

    def init(self, layer: LayerSpec) -> FisherSums:
        return FisherSums.zero(layer)

    def absorb(
        self, state: FisherSums, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> FisherSums:
        return self._plus(state, update, context, 1)

    def remove(self, state: FisherSums, update: LayerUpdate, context: Context = ALONE) -> FisherSums:
        return self._plus(state, update, context, -1)

    def read(self, state: FisherSums, totals: Totals) -> Tensor:
        """Zero where less than a floor is left: rounding, once everyone who was there is taken out."""
        mean_MN = state.weighted_MN / state.fisher_MN
        return mean_MN.where(state.fisher_MN > self.floor / 2, 0.0).float()

    def _plus(self, state: FisherSums, update: LayerUpdate, context: Context, times: int) -> FisherSums:
        shape = state.fisher_MN.shape
        fisher_MN = context.statistics[Statistic.FISHER].reshape(shape).double() + self.floor
        weighted_MN = fisher_MN * values_of(update, shape)
        return FisherSums(
            state.weighted_MN.add(weighted_MN, alpha=times),
            state.fisher_MN.add(fisher_MN, alpha=times),
        )
