"""Merging with least interference on both sides of every layer: fedmerge's own rule.

The rows of a task vector D_t span the inputs that task t has learned from, its columns the outputs it has
learned to write to. WUDI (arXiv 2503.08099; module ``wudi``) merges a layer so that it interferes least with
every task on the inputs. The same on the outputs is a problem of its own::

    minimise  sum_t ||D_t^T (M - D_t)||_F^2 / ||D_t||_F^2 + (ridge / rows) ||M - D_t||_F^2        outputs
    (sum_t C_t) M = sum_t C_t D_t        C_t = D_t D_t^T / ||D_t||_F^2 + (ridge / rows) I

In a direction that one task alone uses, M is that task's vector in full; where several do, their mean,
weighted with how much of each task's energy lies there; where none does, the plain mean. Which side keeps
tasks better apart depends on the tasks: those that read different inputs ask for the one, those that write to
different outputs for the other. The merged matrix is the mean of both solutions, or with ``side = "longer"``
the one on the layer's longer side, where tasks leave each other more room (outputs of square layers).

No data, no statistics, no order: all sums have one term per task, so the merged matrix is the solution over
all tasks at every step, the same in any order of arrival, and a task can be taken out again. Vector layers
are averaged. Why both sides and this ridge: ``docs/default-rule.md``.

A matrix layer's state takes ``16 M N + 4 M (M + 1) + 4 N (N + 1)`` bytes; on the longer side alone, L long,
``8 M N + 4 L (L + 1)``. Convolutions are matrices (out, in * kernel).

Legend: M out rows, N in columns, R rank of the update, P and Q sides of a packed Gram.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank
from fedmerge.server.merge.grams import GramSum, GramTerm
from fedmerge.server.merge.rule import Context, State, Totals
from fedmerge.server.merge.sums import RunningSum
from fedmerge.server.merge.wudi import Wudi


class OutputGramSum(GramSum):
    """The sums of transposed task vectors: the Gram is (M, M), the product (N, M)."""


@dataclass(frozen=True)
class TwoSidedSum:
    """The fields of a :class:`GramSum` and of an :class:`OutputGramSum` of one matrix layer, float64."""

    input_gram_PQ: Tensor
    input_product_MN: Tensor
    output_gram_PQ: Tensor
    output_product_NM: Tensor

    @classmethod
    def of(cls, inputs: GramSum, outputs: GramSum) -> Self:
        return cls(inputs.gram_PQ, inputs.product_MN, outputs.gram_PQ, outputs.product_MN)

    @property
    def inputs(self) -> GramSum:
        return GramSum(self.input_gram_PQ, self.input_product_MN)

    @property
    def outputs(self) -> OutputGramSum:
        return OutputGramSum(self.output_gram_PQ, self.output_product_NM)

    def sum_of_squares(self) -> float:
        return self.inputs.sum_of_squares()

    def plus(self, terms: tuple[GramTerm, GramTerm]) -> TwoSidedSum:
        return self.of(self.inputs.plus(terms[0]), self.outputs.plus(terms[1]))

    def minus(self, terms: tuple[GramTerm, GramTerm]) -> TwoSidedSum:
        return self.of(self.inputs.minus(terms[0]), self.outputs.minus(terms[1]))


class LeastInterference(Wudi):
    """WUDI's closed form on the inputs, and on the outputs, of every matrix layer.

    Args:
        side: ``both`` for the mean of the two solutions, ``longer`` for the one on the longer side.
        ridge: added to every direction of each task, in mean eigenvalues of its Gram; 1e-6 to 1e6.
    """

    name: ClassVar[str] = "least_interference"
    states: ClassVar[tuple[type, ...]] = (RunningSum, TwoSidedSum, GramSum, OutputGramSum)

    side: Literal["both", "longer"] = "both"

    def init(self, layer: LayerSpec) -> State:
        rows, columns = layer.matrix_shape
        if layer.kind is not LayerKind.MATRIX:
            return super().init(layer)
        inputs, outputs = GramSum.zero(rows, columns), OutputGramSum.zero(columns, rows)
        if self.side == "both":
            return TwoSidedSum.of(inputs, outputs)
        return inputs if columns > rows else outputs

    def change(self, state: Any, update: LayerUpdate, context: Context) -> Any:
        if isinstance(state, TwoSidedSum):
            return tuple(self.change(each, update, context) for each in (state.inputs, state.outputs))
        if isinstance(state, OutputGramSum):
            update = transposed(update, *state.product_MN.shape)
        return super().change(state, update, context)

    def read(self, state: Any, totals: Totals) -> Tensor:
        if not isinstance(state, TwoSidedSum):
            return super().read(state, totals)
        inputs_MN, outputs_MN = self.read(state.inputs, totals), self.read(state.outputs, totals)
        return (inputs_MN + outputs_MN.reshape(inputs_MN.shape)) / 2

    def solve(self, state: GramSum, totals: Totals) -> Tensor:
        merged = super().solve(state, totals)
        return merged.T if isinstance(state, OutputGramSum) else merged


def transposed(update: LayerUpdate, columns: int, rows: int) -> LayerUpdate:
    """``D^T``, (N, M), of an update whose matrix is (M, N)."""
    if isinstance(update, LowRank):
        return LowRank(update.right_RN.T, update.left_MR.T, (columns, rows))
    return Dense(update.values.reshape(rows, columns).T)
