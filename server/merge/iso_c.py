"""ISO-C: isotropic merging in the common subspace (arXiv 2502.04959).

The sum S of all task vectors keeps its singular directions and gives up its singular values: a few directions
that all tasks share would otherwise drown the rest::

    S = U diag(s) V^T        M = mean(s) U V^T

Only the sum is needed, so the merged matrix is exact after every arrival and the same in any order.

Departures from the published code:

- U V^T runs over the numerical rank of S, and so does the mean. Beyond it singular vectors are arbitrary, and
  the published step gives all of them the same weight as the known ones: noise, where task vectors are of low
  rank. For a sum of full rank nothing changes.
- Convolutions are matrices (out, in * kernel), not averaged.

Vector layers are averaged, as published.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.opcm import MatrixSum
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals
from fedmerge.server.merge.spectrum import spectrum_of
from fedmerge.server.merge.sums import RunningSum, added


class IsoC(Rule):
    """The sum of all task vectors with its spectrum made flat.

    Args:
        factor: what the merged task vector is multiplied with, 0 to 3. The authors' code takes 1.0.
    """

    name: ClassVar[str] = "iso_c"
    order_free: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    heavy: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (RunningSum, MatrixSum)

    factor: float = Field(default=1.0, ge=0.0, le=3.0)

    def init(self, layer: LayerSpec) -> RunningSum:
        return (MatrixSum if layer.kind is LayerKind.MATRIX else RunningSum).zero(layer)

    def absorb(
        self, state: RunningSum, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> RunningSum:
        return replace(state, sum_MN=added(state.sum_MN, update))

    def remove(self, state: RunningSum, update: LayerUpdate, context: Context = ALONE) -> RunningSum:
        return replace(state, sum_MN=added(state.sum_MN, update.times(-1.0)))

    def read(self, state: RunningSum, totals: Totals) -> Tensor:
        if isinstance(state, MatrixSum):
            return self.factor * self.scale(totals) * flattened(state.sum_MN)
        return state.read(self.factor / totals.merges if totals.merges else 0.0)


def flattened(sum_MN: Tensor) -> Tensor:
    """``mean(s) U V^T`` over the numerical rank, float32; zero for the zero matrix."""
    found = spectrum_of(sum_MN)
    if not found.rank:
        return sum_MN.new_zeros(sum_MN.shape)
    return (found.left_MK.float() * found.values_K.mean().float()) @ found.right_KN.float()
