"""The merging coefficient of Perturb-and-Merge, P&M (arXiv 2505.22389), in constant memory.

Every arrival moves the merged vector M by a share alpha of the way to it, one scalar for the whole model.
The share minimises the second-order increase of the loss summed over all tasks so far, with the diagonal
Fisher F_i as the Hessian of task i at its own optimum tau_i::

    step = tau_t - M
    alpha = - sum_i (M - tau_i)^T F_i step / sum_i step^T F_i step
          = step^T (b - A * M) / step^T (A * step)      A = sum_i F_i,  b = sum_i F_i * tau_i,  i = 1..t

The second line needs two sums instead of every task's vector and Fisher. The first vector has alpha 1.

Departures from the paper:

- An update may be the step itself, measured from M as in the paper, or a vector from the base, whose step is
  the way to it from M. The perturbation during training is the client's and no part of this rule.
- alpha is held within 0 and 1, so that M stays a convex combination of task vectors; where the loss has no
  curvature along the step, alpha is 1 / t, as in an average.
- A layer that an update does not bring takes no part in its alpha, because the site has no Fisher of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.statistics import Statistic
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals
from fedmerge.server.merge.steps import arrived
from fedmerge.server.merge.sums import added


@dataclass(frozen=True)
class Quadratic:
    """M, and A and b of the summed losses around it, float32."""

    merged_MN: Tensor
    curvature_MN: Tensor
    weighted_MN: Tensor

    def sum_of_squares(self) -> float:
        return float(torch.linalg.vector_norm(self.merged_MN, dtype=torch.float64)) ** 2


class PerturbAndMerge(Rule):
    """A step of the best length towards every arrival. No options."""

    name: ClassVar[str] = "perturb_and_merge"
    needs: ClassVar[frozenset[str]] = frozenset({Statistic.FISHER})
    measures: ClassVar[bool] = True
    steps: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (Quadratic,)

    def init(self, layer: LayerSpec) -> Quadratic:
        return Quadratic(*(torch.zeros(layer.matrix_shape) for _ in range(3)))

    def measure(self, state: Quadratic, update: LayerUpdate, context: Context = ALONE) -> Tensor:
        """The layer's part of alpha's numerator and denominator, (2,)."""
        coming, step_MN = _arrived(state, update, context)
        slope_MN = coming.weighted_MN - coming.curvature_MN * coming.merged_MN
        return torch.stack([_dot(step_MN, slope_MN), _dot(step_MN, coming.curvature_MN * step_MN)])

    def absorb(
        self, state: Quadratic, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> Quadratic:
        coming, step_MN = _arrived(state, update, context)
        merged_MN = state.merged_MN + _alpha(context) * step_MN
        return Quadratic(merged_MN, coming.curvature_MN, coming.weighted_MN)

    def adjust(self, state: Quadratic, update: LayerUpdate) -> Quadratic:
        return replace(state, merged_MN=added(state.merged_MN, update))

    def read(self, state: Quadratic, totals: Totals) -> Tensor:
        return state.merged_MN.clone()


def _arrived(state: Quadratic, update: LayerUpdate, context: Context) -> tuple[Quadratic, Tensor]:
    """A and b with the arrival's, M still without; and the step from M to it."""
    reached_MN, step_MN = arrived(update, state.merged_MN, context)
    fisher_MN = context.statistics[Statistic.FISHER].reshape(step_MN.shape)
    weighted_MN = state.weighted_MN + fisher_MN * reached_MN
    return Quadratic(state.merged_MN, state.curvature_MN + fisher_MN, weighted_MN), step_MN


def _alpha(context: Context) -> float:
    assert context.measured is not None
    numerator, denominator = map(float, context.measured)
    if denominator <= 0:
        return 1.0 / (context.merges + 1)
    return min(max(numerator / denominator, 0.0), 1.0)


def _dot(a_MN: Tensor, b_MN: Tensor) -> Tensor:
    return (a_MN.double() * b_MN).sum()
