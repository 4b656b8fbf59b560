"""SVC: task arithmetic with its singular values calibrated, in pooled form (arXiv 2602.05536).

Directions of the output that several tasks share are counted once per task in the sum ``S = U diag(s) V^T``
of their vectors. The paper keeps U and V and shrinks each singular value by how far the sum overshoots the
tasks' own responses along u_r. With ``a = u_r^T S`` and ``a_t = u_r^T D_t``::

    s_r <- gamma_r s_r       gamma_r = T / sum_t max(alpha, p_t)       p_t = <a, a_t> / ||a_t||^2

That asks for all task vectors again once S is known, so it cannot run with constant memory. The departure:
the T projections are pooled into one, each weighted with its own ``||a_t||^2``::

    gamma_r = 1 / max(alpha, p)       p = sum_t <a, a_t> / sum_t ||a_t||^2 = s_r^2 / (u_r^T C u_r)

where ``C = sum_t D_t D_t^T`` is a running sum, so the merged matrix is exact after every arrival, the same in
any order, and a task can be taken out again. p is the factor for which ``a = p a_t`` holds best for all
tasks, in least squares: 1 where the responses are orthogonal, T where they are equal. Pooled and published
form agree where all tasks respond alike in size along u_r, or p_t is the same for all and not below alpha.
They differ where the responses differ in size: there the published mean follows the weak tasks, whose p_t are
far from 1 either way, and the pooled one the strong tasks.

Further departures: directions of the numerical rank only; the sum itself is calibrated, as a factor of task
arithmetic cancels above the floor; convolutions are matrices (out, in * kernel); vector layers are averaged.

A matrix layer's state takes ``4 M N + 4 M (M + 1)`` bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.server.merge.packed import packed, packed_zero, unpacked_whole
from fedmerge.server.merge.rule import ALONE, Context, Rule, State, Totals
from fedmerge.server.merge.spectrum import lower_gram, spectrum_of
from fedmerge.server.merge.sums import RunningSum, added


@dataclass(frozen=True)
class ResponseSum:
    """``S = sum_t D_t``, float32, and ``C = sum_t D_t D_t^T``, packed, float64."""

    sum_MN: Tensor
    responses_PQ: Tensor

    @classmethod
    def zero(cls, layer: LayerSpec) -> ResponseSum:
        return cls(torch.zeros(layer.matrix_shape), packed_zero(layer.matrix_shape[0]))

    def sum_of_squares(self) -> float:
        return float(torch.linalg.vector_norm(self.sum_MN, dtype=torch.float64)) ** 2

    def plus(self, update: LayerUpdate) -> ResponseSum:
        responses_PQ = packed(output_gram(update, self.sum_MN.shape))
        return ResponseSum(added(self.sum_MN, update), self.responses_PQ + responses_PQ)

    def minus(self, update: LayerUpdate) -> ResponseSum:
        responses_PQ = packed(output_gram(update, self.sum_MN.shape))
        return ResponseSum(added(self.sum_MN, update.times(-1.0)), self.responses_PQ - responses_PQ)


class Svc(Rule):
    """The sum of all task vectors, each output direction scaled to the size the tasks give it.

    Args:
        alpha: least projection that counts, 0.01 to 1. At 1 singular values only shrink, which the paper
            finds the safest; below, directions in which tasks cancel grow up to 1 / alpha times.
    """

    name: ClassVar[str] = "svc"
    order_free: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    heavy: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (RunningSum, ResponseSum)

    alpha: float = Field(default=1.0, ge=0.01, le=1.0)

    def init(self, layer: LayerSpec) -> State:
        return ResponseSum.zero(layer) if layer.kind is LayerKind.MATRIX else RunningSum.zero(layer)

    def absorb(self, state: Any, prepared: None, update: LayerUpdate, context: Context = ALONE) -> State:
        return state.plus(update)  # type: ignore[no-any-return]

    def remove(self, state: Any, update: LayerUpdate, context: Context = ALONE) -> State:
        return state.minus(update)  # type: ignore[no-any-return]

    def read(self, state: Any, totals: Totals) -> Tensor:
        if isinstance(state, ResponseSum):
            return self.scale(totals) * calibrated(state, self.alpha)
        mean: Tensor = state.read(totals.share)
        return mean


def calibrated(state: ResponseSum, alpha: float) -> Tensor:
    """The sum with every singular value divided by ``max(alpha, p)``, float32."""
    found = spectrum_of(state.sum_MN)
    responses_MM = unpacked_whole(state.responses_PQ)
    squares_K = torch.linalg.vecdot(found.left_MK, responses_MM @ found.left_MK, dim=0)
    projection_K = found.values_K.square() / squares_K
    values_K = found.values_K / projection_K.clamp_min(alpha)
    merged_MN: Tensor = (found.left_MK * values_K).float() @ found.right_KN.float()
    return merged_MN


def output_gram(update: LayerUpdate, shape: torch.Size) -> Tensor:
    """``D D^T`` on and below the diagonal, (M, M) in float64; of factors, without D."""
    if isinstance(update, LowRank) and update.rank < min(shape):
        mix_RR = torch.linalg.qr(update.right_RN.double().T).R
        return lower_gram(update.left_MR.double() @ mix_RR.T)
    return lower_gram(update.to_dense().reshape(shape).double())
