"""Averaging task vectors: theta_0 + mean of tau_i (model soups, arXiv 2203.05482, for a shared base)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.rule import Rule, Totals
from fedmerge.server.merge.sums import RunningSum


class Average(Rule):
    """The mean of all task vectors so far: a running sum read out at 1/T. No options."""

    name: ClassVar[str] = "average"
    order_free: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (RunningSum,)

    def init(self, layer: LayerSpec) -> RunningSum:
        return RunningSum.zero(layer)

    def absorb(self, state: RunningSum, prepared: None, update: LayerUpdate) -> RunningSum:
        return state.plus(update)

    def remove(self, state: RunningSum, update: LayerUpdate) -> RunningSum:
        return state.minus(update)

    def scale(self, totals: Totals) -> float:
        return 1.0 / totals.merges if totals.merges else 0.0

    def read(self, state: RunningSum, totals: Totals) -> Tensor:
        return state.read(self.scale(totals))
