"""Task arithmetic: theta_0 + lambda * sum of tau_i (arXiv 2212.04089)."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.rule import Rule, Totals
from fedmerge.server.merge.sums import RunningSum


class TaskArithmetic(Rule):
    """The sum of all task vectors so far, times a fixed factor.

    Args:
        factor: lambda, 0 to 2. The continual-merging papers use 0.3 for 8 tasks, 0.1 for 14 and 20.
    """

    name: ClassVar[str] = "task_arithmetic"
    order_free: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (RunningSum,)

    factor: float = Field(default=0.3, ge=0.0, le=2.0)

    def init(self, layer: LayerSpec) -> RunningSum:
        return RunningSum.zero(layer)

    def absorb(self, state: RunningSum, prepared: None, update: LayerUpdate) -> RunningSum:
        return state.plus(update)

    def remove(self, state: RunningSum, update: LayerUpdate) -> RunningSum:
        return state.minus(update)

    def scale(self, totals: Totals) -> float:
        return self.factor if totals.merges else 0.0

    def read(self, state: RunningSum, totals: Totals) -> Tensor:
        return state.read(self.scale(totals))
