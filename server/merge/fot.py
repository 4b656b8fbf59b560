"""Federated Orthogonal Training, FOT (arXiv 2309.01289): no step touches what earlier tasks look at.

U (N, K) has orthonormal columns: input directions of earlier tasks to a layer. In every round the sites start
from the merged model, and the mean D of their steps is added where it says nothing to those directions::

    M <- M + D - D U U^T

In the last round of a task, sites also tell where their inputs A_i lie, after training, outside of U: the sum
over sites of ``(A_i - U U^T A_i) G_i``, with random G_i of their own, and the mean r of
``||A_i - U U^T A_i|| / ||A_i||``. The leading left singular vectors of that sum extend U, as many as it takes
for the share eps of the inputs to be protected (:meth:`Protected.seeing`).

``fot_gram`` is told the input Gram ``mean of A A^T`` instead, as a factor of low rank. That has the residual
and its ratio in it, both exact, so no site needs U.

Departures from the published code:

- The sum of sketches is projected against U again. For sites that had U that changes nothing but rounding. A
  sketch of whole inputs, from a site that had not, then tells the same subspace and an estimate of r.
- A residual that is rounding alone adds no direction; the published code adds an arbitrary one.
- eps grows with the tasks that have brought something of the layer itself.
- U may be bounded. Then the directions with the largest share of the tasks' input energy stay. Of an old
  direction, later tasks' shares are known from whole inputs alone, so with sketches of residuals early
  directions have an advantage.
- Columns of U that are there stay as they are; new ones are made orthogonal to them.

Biases, norms and embeddings take every step whole, as published. A layer of which nothing is told keeps U.

Legend: M out rows, N in columns, K directions.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.statistics import WIDEST, Statistic
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.common.training import SketchSpec
from fedmerge.server.merge.protected import Protected, Sample
from fedmerge.server.merge.rule import ALONE, Cadence, Context, Rule, Totals
from fedmerge.server.merge.steps import arrived
from fedmerge.server.merge.sums import RunningSum, added

FotState = RunningSum | Protected


class Orthogonal(Rule):
    """Steps outside of protected input directions; a subclass says how these are told.

    Args:
        eps: share of a task's inputs that is protected after it, above 0 to 1; published 0.94 or 0.96 for
            Permuted-MNIST, 0.87 to 0.95 for images of classes in turn.
        eps_inc: what eps grows by with every task, at least 0; published 0, and 0.001 for the latter.
        budget: most directions as a share of the layer's columns, above 0 to 1; 1 is no bound.
        squared: compare squared norms with eps, as in GPM (arXiv 2103.09762), which protects fewer
            directions.
    """

    steps: ClassVar[bool] = True
    cadence: ClassVar[Cadence] = Cadence.ROUND
    states: ClassVar[tuple[type, ...]] = (RunningSum, Protected)

    eps: float = Field(default=0.94, gt=0.0, le=1.0)
    eps_inc: float = Field(default=0.0, ge=0.0, le=1.0)
    budget: float = Field(default=1.0, gt=0.0, le=1.0)
    squared: bool = False

    def init(self, layer: LayerSpec) -> FotState:
        if layer.kind is LayerKind.MATRIX:
            return Protected.zero(layer, max(1, round(self.budget * layer.matrix_shape[1])))
        return RunningSum.zero(layer)

    def absorb(
        self, state: FotState, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> FotState:
        if isinstance(state, RunningSum):
            return RunningSum(arrived(update, state.sum_MN, context)[0].clone())
        _, step_MN = arrived(update, state.merged_MN, context)
        after = replace(state, merged_MN=state.merged_MN + state.outside(step_MN))
        sample = self.sample(context)
        eps = self.eps + self.eps_inc * float(state.tasks)
        return after if sample is None else after.seeing(sample, eps, self.squared)

    def adjust(self, state: FotState, update: LayerUpdate) -> FotState:
        if isinstance(state, RunningSum):
            return state.plus(update)
        return replace(state, merged_MN=added(state.merged_MN, update))

    def shown(self, state: FotState) -> Tensor | None:
        if isinstance(state, RunningSum) or not state.basis_NK.numel():
            return None
        return state.basis_NK.contiguous()

    def read(self, state: FotState, totals: Totals) -> Tensor:
        return (state.sum_MN if isinstance(state, RunningSum) else state.merged_MN).clone()

    @abstractmethod
    def sample(self, context: Context) -> Sample | None:
        """What was told of a matrix layer's inputs; None for nothing."""


class Fot(Orthogonal):
    """Directions from sketches of the sites' residual inputs.

    Args:
        width: columns of a sketch in multiples of the layer's, above 0 to 8; published 1 or 5.
        distribution: of a sketch's random numbers: ``normal``, or ``uniform`` from -1 to 1 as published for
            Permuted-MNIST.
    """

    name: ClassVar[str] = "fot"
    needs: ClassVar[frozenset[str]] = frozenset({Statistic.SKETCH, Statistic.RESIDUAL})

    width: float = Field(default=1.0, gt=0.0, le=WIDEST)
    distribution: Literal["normal", "uniform"] = "normal"

    def asks(self) -> SketchSpec:
        return SketchSpec(width=self.width, distribution=self.distribution, squared=self.squared)

    def sample(self, context: Context) -> Sample | None:
        sketch_NR = context.statistics.get(Statistic.SKETCH)
        if sketch_NR is None:
            return None
        return Sample(sketch_NR, float(context.statistics[Statistic.RESIDUAL]))


class FotGram(Orthogonal):
    """Directions from the sites' input Grams."""

    name: ClassVar[str] = "fot_gram"
    needs: ClassVar[frozenset[str]] = frozenset({Statistic.INPUT_GRAM})

    def sample(self, context: Context) -> Sample | None:
        factor_RN = context.statistics.get(Statistic.INPUT_GRAM)
        return None if factor_RN is None else Sample(factor_RN.T, 1.0)
