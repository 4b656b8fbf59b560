"""MagMax: in every entry the task vector of largest magnitude (arXiv 2407.06322), times a fixed factor.

Departure from the published code, where the later of two equal magnitudes wins: here the positive one
does, so that the order of arrival does not matter. The paper fine-tunes the tasks one after the other; here
every vector is measured from the base.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.elementwise import values_of
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals


@dataclass(frozen=True)
class Largest:
    """Of every entry the value of largest magnitude so far, float32."""

    largest_MN: Tensor

    def sum_of_squares(self) -> float:
        return float(torch.linalg.vector_norm(self.largest_MN, dtype=torch.float64)) ** 2


class MagMax(Rule):
    """The entries of largest magnitude, times a fixed factor.

    Args:
        factor: what they are multiplied with, 0 to 2.
    """

    name: ClassVar[str] = "magmax"
    order_free: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (Largest,)

    factor: float = Field(default=0.5, ge=0.0, le=2.0)

    def init(self, layer: LayerSpec) -> Largest:
        return Largest(torch.zeros(layer.matrix_shape))

    def absorb(
        self, state: Largest, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> Largest:
        held_MN, values_MN = state.largest_MN, values_of(update, state.largest_MN.shape)
        size_MN, held_size_MN = values_MN.abs(), held_MN.abs()
        wins_MN = (size_MN > held_size_MN) | ((size_MN == held_size_MN) & (values_MN > held_MN))
        return Largest(values_MN.where(wins_MN, held_MN))

    def scale(self, totals: Totals) -> float:
        return self.factor if totals.merges else 0.0

    def read(self, state: Largest, totals: Totals) -> Tensor:
        return state.largest_MN * self.scale(totals)
