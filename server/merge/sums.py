"""Running sums: the state of every rule that only adds.

Sums are float32 like the vectors themselves unless a rule says otherwise; their squares are summed in
float64.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals


@dataclass(frozen=True)
class RunningSum:
    """S_T = sum_i D_i of one layer as a matrix, float32."""

    sum_MN: Tensor

    @classmethod
    def zero(cls, layer: LayerSpec) -> Self:
        return cls(torch.zeros(layer.matrix_shape))

    def sum_of_squares(self) -> float:
        return float(torch.linalg.vector_norm(self.sum_MN, dtype=torch.float64)) ** 2

    def plus(self, update: LayerUpdate) -> Self:
        return replace(self, sum_MN=added(self.sum_MN, update))

    def minus(self, update: LayerUpdate) -> Self:
        return self.plus(update.times(-1.0))

    def read(self, scale: float) -> Tensor:
        return self.sum_MN * scale


@dataclass(frozen=True)
class MatrixSum(RunningSum):
    """The sum of a matrix layer, for rules that read it otherwise than a vector layer's."""


class SumRule(Rule):
    """Reads out a multiple of the sum of all task vectors; a subclass says which multiple."""

    order_free: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (RunningSum,)

    def init(self, layer: LayerSpec) -> RunningSum:
        return RunningSum.zero(layer)

    def absorb(
        self, state: RunningSum, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> RunningSum:
        return state.plus(update)

    def remove(self, state: RunningSum, update: LayerUpdate, context: Context = ALONE) -> RunningSum:
        return state.minus(update)

    @abstractmethod
    def scale(self, totals: Totals) -> float: ...

    def read(self, state: RunningSum, totals: Totals) -> Tensor:
        return state.read(self.scale(totals))


def added(sum_MN: Tensor, update: LayerUpdate) -> Tensor:
    """``S + D`` as a new tensor, in the wider dtype of both; a low-rank D is never built on its own.

    A vector layer's sum is one row; factors, as of an adapted embedding, have the layer's own shape.
    """
    if isinstance(update, LowRank):
        left_MR, right_RN = update.tensors()
        dtype = torch.promote_types(sum_MN.dtype, left_MR.dtype)
        sum_own = sum_MN.to(dtype).reshape(left_MR.shape[0], right_RN.shape[1])
        return torch.addmm(sum_own, left_MR.to(dtype), right_RN.to(dtype)).reshape(sum_MN.shape)
    return sum_MN + update.values.reshape(sum_MN.shape)
