"""ISO-C: isotropic merging in the common subspace (arXiv 2502.04959).

The sum S of all task vectors keeps its singular directions and gives up its singular values: a few directions
that all tasks share would otherwise drown the rest::

    S = U diag(s) V^T        M = mean(s) U V^T

Only the sum is needed, so the merged matrix is exact after every arrival and the same in any order.

Departures from the published code:

- U V^T runs over the numerical rank of S, and so does the mean. Beyond it singular vectors are arbitrary, and
  the published step gives all of them the same weight as the known ones: noise, where task vectors are of low
  rank. For a sum of full rank nothing changes.
- The sum is float64 (``8 M N`` bytes): what rounding leaves behind where a large task vector is taken out
  again would count as directions of their own, with the same weight as the others.
- Convolutions are matrices (out, in * kernel), not averaged.

Vector layers are averaged, as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals
from fedmerge.server.merge.spectrum import spectrum_of
from fedmerge.server.merge.sums import RunningSum


@dataclass(frozen=True)
class MatrixSum64(RunningSum):
    """The sum of a matrix layer, float64."""

    @classmethod
    def zero(cls, layer: LayerSpec) -> Self:
        return cls(torch.zeros(layer.matrix_shape, dtype=torch.float64))


class IsoC(Rule):
    """The sum of all task vectors with its spectrum made flat.

    Args:
        factor: what the merged task vector is multiplied with, 0 to 3. The authors' code takes 1.0.
    """

    name: ClassVar[str] = "iso_c"
    order_free: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    heavy: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (RunningSum, MatrixSum64)

    factor: float = Field(default=1.0, ge=0.0, le=3.0)

    def init(self, layer: LayerSpec) -> RunningSum:
        return (MatrixSum64 if layer.kind is LayerKind.MATRIX else RunningSum).zero(layer)

    def absorb(
        self, state: RunningSum, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> RunningSum:
        return state.plus(update)

    def remove(self, state: RunningSum, update: LayerUpdate, context: Context = ALONE) -> RunningSum:
        return state.minus(update)

    def read(self, state: RunningSum, totals: Totals) -> Tensor:
        if isinstance(state, MatrixSum64):
            return self.factor * self.scale(totals) * flattened(state.sum_MN)
        return state.read(self.factor / totals.merges if totals.merges else 0.0)


def flattened(sum_MN: Tensor) -> Tensor:
    """``mean(s) U V^T`` over the numerical rank, float32; zero for the zero matrix."""
    found = spectrum_of(sum_MN)
    if not found.rank:
        return torch.zeros_like(sum_MN, dtype=torch.float32)
    return (found.left_MK.float() * found.values_K.mean().float()) @ found.right_KN.float()
