"""Federated averaging across tasks: sequential federated fine-tuning (FedAvg, arXiv 1602.05629).

In every round the sites start from the merged model, and the mean D of their steps is added to it::

    M <- M + D

So the model is whatever was learned last, started from what was learned before: the baseline of everything
that guards against forgetting. A vector that is measured from the base takes the place of the merged one.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.rule import ALONE, Cadence, Context, Rule, Totals
from fedmerge.server.merge.steps import arrived
from fedmerge.server.merge.sums import RunningSum


class FedAvg(Rule):
    """Adds every round's mean step. No options."""

    name: ClassVar[str] = "fedavg"
    steps: ClassVar[bool] = True
    cadence: ClassVar[Cadence] = Cadence.ROUND
    states: ClassVar[tuple[type, ...]] = (RunningSum,)

    def init(self, layer: LayerSpec) -> RunningSum:
        return RunningSum.zero(layer)

    def absorb(
        self, state: RunningSum, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> RunningSum:
        reached_MN, _ = arrived(update, state.sum_MN, context)
        return RunningSum(reached_MN.clone())

    def adjust(self, state: RunningSum, update: LayerUpdate) -> RunningSum:
        return state.plus(update)

    def read(self, state: RunningSum, totals: Totals) -> Tensor:
        return state.sum_MN.clone()
