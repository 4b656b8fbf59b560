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
- ``unit_trace`` divides each F_i by its sum over the whole model. The empirical Fisher vanishes as a task's
  loss does, by orders of magnitude, and the task that was fitted worst then decides alpha for all.
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
    """A step of the best length towards every arrival.

    Args:
        unit_trace: every task's Fisher is scaled to a trace of 1, so that all tasks count alike.
    """

    name: ClassVar[str] = "perturb_and_merge"
    needs: ClassVar[frozenset[str]] = frozenset({Statistic.FISHER})
    measures: ClassVar[bool] = True
    steps: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (Quadratic,)

    unit_trace: bool = False

    def init(self, layer: LayerSpec) -> Quadratic:
        return Quadratic(*(torch.zeros(layer.matrix_shape) for _ in range(3)))

    def measure(self, state: Quadratic, update: LayerUpdate, context: Context = ALONE) -> Tensor:
        """The layer's part of the step's slope and curvature over earlier tasks, of its curvature over
        its own, and of its Fisher's trace, (4,)."""
        _, step_MN = arrived(update, state.merged_MN, context)
        fisher_MN = _fisher(step_MN, context)
        slope_MN = state.weighted_MN - state.curvature_MN * state.merged_MN
        known = _dot(step_MN, slope_MN), _dot(step_MN, state.curvature_MN * step_MN)
        return torch.stack([*known, _dot(step_MN, fisher_MN * step_MN), fisher_MN.double().sum()])

    def absorb(
        self, state: Quadratic, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> Quadratic:
        assert context.measured is not None
        slope, bend, own, trace = map(float, context.measured)
        scale = 1.0 / trace if self.unit_trace and trace > 0 else 1.0
        # along the step to its own optimum, a task's slope is its curvature
        alpha = _alpha(slope + scale * own, bend + scale * own, context.merges)
        reached_MN, step_MN = arrived(update, state.merged_MN, context)
        fisher_MN = (scale * _fisher(step_MN, context).double()).float()  # 1 / trace may be beyond float32
        return Quadratic(
            state.merged_MN + alpha * step_MN,
            state.curvature_MN + fisher_MN,
            state.weighted_MN + fisher_MN * reached_MN,
        )

    def adjust(self, state: Quadratic, update: LayerUpdate) -> Quadratic:
        return replace(state, merged_MN=added(state.merged_MN, update))

    def read(self, state: Quadratic, totals: Totals) -> Tensor:
        return state.merged_MN.clone()


def _fisher(step_MN: Tensor, context: Context) -> Tensor:
    return context.statistics[Statistic.FISHER].reshape(step_MN.shape)


def _alpha(slope: float, bend: float, merges: int) -> float:
    return min(max(slope / bend, 0.0), 1.0) if bend > 0 else 1.0 / (merges + 1)


def _dot(a_MN: Tensor, b_MN: Tensor) -> Tensor:
    return (a_MN.double() * b_MN).sum()
