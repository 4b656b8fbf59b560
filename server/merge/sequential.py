"""Rules that take one task vector after another into a merged matrix, with no sum that would undo the order.

Legend: M out rows, N in columns.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals
from fedmerge.server.merge.sums import RunningSum


@dataclass(frozen=True)
class MergedMatrix:
    """The merged task vector of one matrix layer as it stands, float32."""

    merged_MN: Tensor

    def sum_of_squares(self) -> float:
        return float(torch.linalg.vector_norm(self.merged_MN, dtype=torch.float64)) ** 2


SequentialState = RunningSum | MergedMatrix


class SequentialRule(Rule):
    """Steps from one merged matrix to the next; a subclass says how. Vector layers read as their mean.

    What is read of a matrix layer is its state, without rescaling.
    """

    states: ClassVar[tuple[type, ...]] = (RunningSum, MergedMatrix)

    def init(self, layer: LayerSpec) -> SequentialState:
        if layer.kind is LayerKind.MATRIX:
            return MergedMatrix(torch.zeros(layer.matrix_shape))
        return RunningSum.zero(layer)

    def prepare(self, state: SequentialState) -> Any:
        return self.prepare_matrix(state.merged_MN) if isinstance(state, MergedMatrix) else None

    def absorb(
        self, state: SequentialState, prepared: Any, update: LayerUpdate, context: Context = ALONE
    ) -> SequentialState:
        if isinstance(state, MergedMatrix):
            return MergedMatrix(self.step(state.merged_MN, prepared, update))
        return state.plus(update)

    def read(self, state: SequentialState, totals: Totals) -> Tensor:
        if isinstance(state, MergedMatrix):
            return state.merged_MN.clone()
        return state.read(totals.share)

    def prepare_matrix(self, merged_MN: Tensor) -> Any:
        """What a step needs that depends on the merged matrix alone; None when nothing does."""
        return None

    @abstractmethod
    def step(self, merged_MN: Tensor, prepared: Any, update: LayerUpdate) -> Tensor:
        """The merged matrix with one more task vector in it, as a new float32 tensor."""
