"""LOT merging: layer-wise least feature drift, for task vectors (arXiv 2505.23859).

Per layer it minimises the drift of the features, ``sum_t E ||(M - D_t) x_t||^2`` over inputs x_t of task t,
which is solved in closed form for each kind of layer::

    linear            M = (sum_t D_t G_t) (sum_t G_t)^+       G_t = E x_t x_t^T
    scale (norms)     M = sum_t g_t D_t / sum_t g_t           g_t = E x_t^2, elementwise
    shift (biases)    M = mean of D_t

and merges ``W_0 + factor * M``. Merging task vectors, not weights, leaves the base where no input has been
seen, so that 16 to 64 samples per task suffice.

Departures from the paper:

- The pseudo-inverse jumps where an eigenvalue of the summed Gram reaches zero, so rounding would decide. A
  ridge takes its place: eigenvalues g are inverted as ``1 / (g + ridge * mean eigenvalue)``, which is the
  pseudo-inverse for directions well above the ridge, and zero, as in the pseudo-inverse, for unseen ones.
- Statistics are means over the input rows a site has measured: each task counts the same, in biases too.
- Convolutions are matrices (out, in * kernel).
- A layer whose inputs a site could not measure counts as having inputs of unit size, so such layers are
  averaged.

Embeddings are averaged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.statistics import Statistic
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.grams import UNSEEN, GramRule, GramSum, GramTerm, input_gram_term
from fedmerge.server.merge.rule import Context, State, Totals
from fedmerge.server.merge.sums import RunningSum


@dataclass(frozen=True)
class ScaleSum:
    """``sum_t g_t`` and ``sum_t g_t D_t`` of an elementwise scale or shift, float64 (1, N)."""

    weight_1N: Tensor
    product_1N: Tensor

    @classmethod
    def zero(cls, layer: LayerSpec) -> ScaleSum:
        none_1N = torch.zeros(layer.matrix_shape, dtype=torch.float64)
        return cls(none_1N, none_1N.clone())

    def sum_of_squares(self) -> float:
        """Of the weighted sum, sum_t g_t D_t."""
        return float(self.product_1N.square().sum())

    def plus(self, term: ScaleSum) -> ScaleSum:
        return ScaleSum(self.weight_1N + term.weight_1N, self.product_1N + term.product_1N)

    def minus(self, term: ScaleSum) -> ScaleSum:
        return ScaleSum(self.weight_1N - term.weight_1N, self.product_1N - term.product_1N)

    def solution(self) -> Tensor:
        """The weighted mean, zero where no input was ever seen."""
        seen_1N = self.weight_1N > UNSEEN
        return torch.where(seen_1N, self.product_1N / self.weight_1N.where(seen_1N, 1.0), 0.0)


class Lot(GramRule):
    """Least feature drift on the inputs of all tasks.

    Args:
        factor: what the merged task vector is multiplied with, 0 to 2. The paper takes 1.2 for ViT-B/32 and
            1.5 for ViT-L/14, and finds 1.0 fine already.
        ridge: below how many mean eigenvalues of the summed Gram a direction counts as unseen; 1e-8 to 1.
    """

    name: ClassVar[str] = "lot"
    needs: ClassVar[frozenset[str]] = frozenset({Statistic.INPUT_GRAM})
    states: ClassVar[tuple[type, ...]] = (RunningSum, GramSum, ScaleSum)

    factor: float = Field(default=1.0, ge=0.0, le=2.0)
    ridge: float = Field(default=1e-6, ge=1e-8, le=1.0)

    def init(self, layer: LayerSpec) -> State:
        elementwise = layer.kind is LayerKind.VECTOR and len(layer.shape) == 1
        return ScaleSum.zero(layer) if elementwise else super().init(layer)

    def change(self, state: Any, update: LayerUpdate, context: Context) -> Any:
        if not isinstance(state, ScaleSum):
            return super().change(state, update, context)
        values_1N = update.to_dense().double().reshape(state.weight_1N.shape)
        measured = context.statistics.get(Statistic.INPUT_GRAM)
        weight_1N = torch.ones_like(values_1N) if measured is None else measured.double().reshape(1, -1)
        return ScaleSum(weight_1N, weight_1N * values_1N)

    def term(self, update: LayerUpdate, shape: torch.Size, context: Context) -> GramTerm:
        return input_gram_term(update, shape, context.statistics.get(Statistic.INPUT_GRAM))

    def solve(self, state: GramSum, totals: Totals) -> Tensor:
        return self.factor * state.solution(state.ridge(self.ridge))

    def read_vector(self, state: Any, totals: Totals) -> Tensor:
        merged = state.solution() if isinstance(state, ScaleSum) else super().read_vector(state, totals)
        return (self.factor * merged).float()
