"""Merging with optimizer state, from Holistic Continual Model Merging (arXiv 2509.23592).

AdamW's second moments V_t at the end of training stand for curvature. One running model and one running
curvature are kept, entry by entry, a the share of what arrives::

    V = (1 - a) V + a V_t
    M = ((1 - a) V_old * M + a V_t * tau_t) / V

Later updates weigh more than they would in a mean, so the order of arrival matters. The paper's tangent-space
fine-tuning before and its representation correction after merging need data and are not part of this rule.

Departures from the published code: where neither side has curvature (0 / 0), M moves by the share a towards
tau_t, as in the authors' plain interpolation; an update may be measured from M instead of the base.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.statistics import Statistic
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals
from fedmerge.server.merge.steps import arrived
from fedmerge.server.merge.sums import added


@dataclass(frozen=True)
class Curved:
    """The merged vector and its curvature, float32."""

    merged_MN: Tensor
    curvature_MN: Tensor

    def sum_of_squares(self) -> float:
        return float(torch.linalg.vector_norm(self.merged_MN, dtype=torch.float64)) ** 2


class Holistic(Rule):
    """Interpolation towards every arrival, weighted by AdamW's second moments.

    Args:
        share: a, the weight of what arrives beside what is there, above 0 to below 1.
    """

    name: ClassVar[str] = "holistic"
    needs: ClassVar[frozenset[str]] = frozenset({Statistic.SECOND_MOMENT})
    steps: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (Curved,)

    share: float = Field(default=0.4, gt=0.0, lt=1.0)

    def init(self, layer: LayerSpec) -> Curved:
        return Curved(torch.zeros(layer.matrix_shape), torch.zeros(layer.matrix_shape))

    def absorb(self, state: Curved, prepared: None, update: LayerUpdate, context: Context = ALONE) -> Curved:
        _, step_MN = arrived(update, state.merged_MN, context)
        moments_MN = context.statistics[Statistic.SECOND_MOMENT].reshape(step_MN.shape)
        if not context.merges:
            return Curved(state.merged_MN + step_MN, state.curvature_MN + moments_MN)
        arriving_MN = self.share * moments_MN
        curvature_MN = (1 - self.share) * state.curvature_MN + arriving_MN
        weight_MN = (arriving_MN / curvature_MN).where(curvature_MN > 0, self.share)
        return Curved(state.merged_MN + weight_MN * step_MN, curvature_MN)

    def adjust(self, state: Curved, update: LayerUpdate) -> Curved:
        return replace(state, merged_MN=added(state.merged_MN, update))

    def read(self, state: Curved, totals: Totals) -> Tensor:
        return state.merged_MN.clone()
