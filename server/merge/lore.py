"""LoRE: singular values of every task vector thresholded, then averaged (LoRE-Merging, arXiv 2502.10749).

With ``D = U diag(s) V^T`` the low-rank estimate of a task vector is ``U diag(max(s - mu, 0)) V^T``; the
merged vector is a multiple of the estimates' mean, or of their sum.

Departures from the paper:

- The paper also estimates a base that it does not know, by coordinate descent over all models. Here the
  base is known, so every vector is thresholded once, on its own, when it arrives.
- ``mu`` is by default a share of the vector's largest singular value, layer by layer, so that it means
  the same for layers and tasks of any size.
- Vectors (biases, norms, embeddings) are merged as they are.

Legend: M out rows, N in columns, K rank.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.server.merge.rule import ALONE, Context, Totals
from fedmerge.server.merge.spectrum import spectrum_of_update
from fedmerge.server.merge.sums import MatrixSum, RunningSum, SumRule


class Lore(SumRule):
    """Sums of thresholded matrices and of plain vectors, times a fixed factor.

    Args:
        mu: what is taken off every singular value, 0 to below 1.
        unit: what ``mu`` is a multiple of: the ``largest`` singular value, or 1 as in the paper
            (``absolute``).
        merge: ``mean`` over all updates, or ``sum``.
        factor: what that is multiplied with, 0 to 2.
    """

    name: ClassVar[str] = "lore"
    states: ClassVar[tuple[type, ...]] = (RunningSum, MatrixSum)

    mu: float = Field(default=0.1, ge=0.0, lt=1.0)
    unit: Literal["largest", "absolute"] = "largest"
    merge: Literal["mean", "sum"] = "mean"
    factor: float = Field(default=1.0, ge=0.0, le=2.0)

    def init(self, layer: LayerSpec) -> RunningSum:
        return (MatrixSum if layer.kind is LayerKind.MATRIX else RunningSum).zero(layer)

    def absorb(
        self, state: RunningSum, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> RunningSum:
        return state.plus(self._estimate(state, update))

    def remove(self, state: RunningSum, update: LayerUpdate, context: Context = ALONE) -> RunningSum:
        return state.minus(self._estimate(state, update))

    def scale(self, totals: Totals) -> float:
        if not totals.merges:
            return 0.0
        return self.factor / totals.merges if self.merge == "mean" else self.factor

    def _estimate(self, state: RunningSum, update: LayerUpdate) -> LayerUpdate:
        """The update with every singular value lowered by the threshold, as factors."""
        if not isinstance(state, MatrixSum):
            return update
        shape = tuple(state.sum_MN.shape)
        found = spectrum_of_update(update, shape)
        threshold = self.mu * float(found.values_K[:1].sum()) if self.unit == "largest" else self.mu
        kept = found.leading(int((found.values_K > threshold).sum()))
        left_MK = kept.left_MK * (kept.values_K - threshold)
        dtype = update.tensors()[0].dtype
        return LowRank(left_MK.to(dtype), kept.right_KN.to(dtype), shape)
