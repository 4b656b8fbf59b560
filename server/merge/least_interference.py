"""Merging with least interference in the outputs that each task writes to: fedmerge's own rule.

Rows of a task vector D_t span the inputs that task t has learned from, its columns the outputs it has learned
to write to. WUDI (arXiv 2503.08099; module ``wudi``) merges with least interference on the inputs. This rule
does so on the outputs::

    minimise  sum_t ||D_t^T (M - D_t)||_F^2 / ||D_t||_F^2  +  (ridge / rows) ||M - D_t||_F^2
    (sum_t C_t) M = sum_t C_t D_t        C_t = D_t D_t^T / ||D_t||_F^2 + (ridge / rows) I

In an output direction that one task alone writes to, M is that task's vector in full; where several do, it is
their mean, weighted with how much of each task's energy lies there; where none does, the plain mean. For one
task M is its vector; for tasks whose outputs are orthogonal and a small ridge, M is their sum.

No data, no statistics, no order: both sums have one term per task, so the merged matrix is the minimum over
all tasks at every step, the same in any order of arrival, and a task can be taken out again. Vector layers
are averaged. Why outputs, and why this ridge: ``docs/default-rule.md``.

A matrix layer's state takes ``8 M N + 4 M (M + 1)`` bytes. Convolutions are matrices (out, in * kernel).

Legend: M out rows, N in columns, R rank of the update.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank
from fedmerge.server.merge.grams import GramSum, GramTerm
from fedmerge.server.merge.rule import Context, State, Totals
from fedmerge.server.merge.sums import RunningSum
from fedmerge.server.merge.wudi import Wudi


class LeastInterference(Wudi):
    """WUDI's closed form of the transposed task vectors.

    Args:
        ridge: added to every output direction of each task, in mean eigenvalues of its Gram; 1e-6 to 1e6.
    """

    name: ClassVar[str] = "least_interference"

    def init(self, layer: LayerSpec) -> State:
        if layer.kind is not LayerKind.MATRIX:
            return RunningSum.zero(layer)
        rows, columns = layer.matrix_shape
        return GramSum.zero(columns, rows)

    def term(self, update: LayerUpdate, shape: torch.Size, context: Context) -> GramTerm:
        return super().term(transposed(update, shape), shape, context)

    def solve(self, state: GramSum, totals: Totals) -> Tensor:
        return super().solve(state, totals).T


def transposed(update: LayerUpdate, shape: torch.Size) -> LayerUpdate:
    """``D^T`` of ``shape`` (N, M)."""
    columns, rows = shape
    if isinstance(update, LowRank):
        return LowRank(update.right_RN.T, update.left_MR.T, (columns, rows))
    return Dense(update.values.reshape(rows, columns).T)
