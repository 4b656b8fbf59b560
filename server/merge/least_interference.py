"""Merging with least interference on the longer side of every layer: fedmerge's own rule.

The rows of a task vector D_t span the inputs that task t has learned from, its columns the outputs it has
learned to write to. WUDI (arXiv 2503.08099; module ``wudi``) merges a layer so that it interferes least with
every task on the inputs, whatever the layer's shape. Interference can be avoided where there is room: D_t has
rank min(M, N) at most, so on the longer side tasks leave directions to each other. A wide layer (N > M) is
merged on its inputs, every other one on its outputs::

    minimise  sum_t ||D_t^T (M - D_t)||_F^2 / ||D_t||_F^2 + (ridge / rows) ||M - D_t||_F^2        outputs
    (sum_t C_t) M = sum_t C_t D_t        C_t = D_t D_t^T / ||D_t||_F^2 + (ridge / rows) I

and WUDI's closed form on the inputs, which is the same for transposed vectors. In a direction that one task
alone uses, M is that task's vector in full; where several do, their mean, weighted with how much of each
task's energy lies there; where none does, the plain mean.

No data, no statistics, no order: both sums have one term per task, so the merged matrix is the minimum over
all tasks at every step, the same in any order of arrival, and a task can be taken out again. Vector layers
are averaged. Why this side and this ridge: ``docs/default-rule.md``.

With L the longer side, a matrix layer's state takes ``8 M N + 4 L (L + 1)`` bytes. Convolutions are matrices
(out, in * kernel).

Legend: M out rows, N in columns, R rank of the update.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank
from fedmerge.server.merge.grams import GramSum
from fedmerge.server.merge.rule import Context, State, Totals
from fedmerge.server.merge.sums import RunningSum
from fedmerge.server.merge.wudi import Wudi


class OutputGramSum(GramSum):
    """The sums of transposed task vectors: the Gram is (M, M), the product (N, M)."""


class LeastInterference(Wudi):
    """WUDI's closed form on the longer side of every matrix layer; on the outputs of square ones.

    Args:
        ridge: added to every direction of each task, in mean eigenvalues of its Gram; 1e-6 to 1e6.
    """

    name: ClassVar[str] = "least_interference"
    states: ClassVar[tuple[type, ...]] = (RunningSum, GramSum, OutputGramSum)

    def init(self, layer: LayerSpec) -> State:
        rows, columns = layer.matrix_shape
        if layer.kind is not LayerKind.MATRIX or columns > rows:
            return super().init(layer)
        return OutputGramSum.zero(columns, rows)

    def change(self, state: Any, update: LayerUpdate, context: Context) -> Any:
        if isinstance(state, OutputGramSum):
            update = transposed(update, *state.product_MN.shape)
        return super().change(state, update, context)

    def solve(self, state: GramSum, totals: Totals) -> Tensor:
        merged = super().solve(state, totals)
        return merged.T if isinstance(state, OutputGramSum) else merged


def transposed(update: LayerUpdate, columns: int, rows: int) -> LayerUpdate:
    """``D^T``, (N, M), of an update whose matrix is (M, N)."""
    if isinstance(update, LowRank):
        return LowRank(update.right_RN.T, update.left_MR.T, (columns, rows))
    return Dense(update.values.reshape(rows, columns).T)
