"""TSV-M: merging singular vectors of the task matrices (arXiv 2412.00081).

Of each of T task vectors the strongest ``floor(r / T)`` singular triplets are kept, r = min(M, N). Side by
side they make U, s and V; the directions of different tasks are then made orthogonal, changing them as little
as possible::

    M = U_perp diag(s) V_perp^T
    U_perp = U (U^T U)^(-1/2)        the orthonormal matrix closest to U; V_perp alike

Truncations are nested: what is kept at T + 1 tasks was kept at T. So r slots for triplets hold all that a
later read-out can ask for, and the merged matrix is exact after every arrival and the same in any order. The
slots take ``4 r (M + N + 4)`` bytes from the start. A truncated vector cannot be taken out again.

Departures from the published code:

- With more tasks than r the published count is zero triplets each. Here the r strongest of all tasks' first
  triplets stay.
- Triplets are those of the numerical rank; a zero vector has none.
- Where directions coincide, as those of a vector that came twice, the orthonormal matrix closest to U is not
  unique. ``(U^T U)^(-1/2)`` is then the pseudo-inverse's, over eigenvalues above 1e-10 of the trace, and a
  vector that came twice counts once: s, not 2 s.
- Convolutions are matrices (out, in * kernel), not averaged.

Where singular values tie at the cut, rounding decides which stays, as in the published code. Vector layers
are averaged, as published.

Legend: M out rows, N in columns, K triplets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.rule import ALONE, Context, Rule, State, Totals
from fedmerge.server.merge.spectrum import Spectrum, spectrum_of_update
from fedmerge.server.merge.sums import RunningSum

COINCIDENT = 1e-10
"""Share of the trace at or below which an eigenvalue of a Gram of unit vectors says that some coincide."""


@dataclass(frozen=True)
class Triplets:
    """Slots for min(M, N) singular triplets of task vectors, strongest first; empty slots have value 0.

    Directions are float32 and values float64. ``place_K`` is a triplet's place among those of its own task
    vector, 0 for the strongest; int64.
    """

    left_MK: Tensor
    values_K: Tensor
    right_KN: Tensor
    place_K: Tensor

    @classmethod
    def none(cls, layer: LayerSpec) -> Triplets:
        rows, columns = layer.matrix_shape
        slots = min(rows, columns)
        return cls(
            torch.zeros(rows, slots),
            torch.zeros(slots, dtype=torch.float64),
            torch.zeros(slots, columns),
            torch.zeros(slots, dtype=torch.int64),
        )

    @property
    def slots(self) -> int:
        return self.values_K.shape[0]

    def sum_of_squares(self) -> float:
        """Of the kept triplets' values."""
        return float(self.values_K.square().sum())

    def within(self, share: int) -> Triplets:
        """The first ``share`` of every task, without empty slots."""
        kept = (self.values_K > 0) & (self.place_K < share)
        return Triplets(self.left_MK[:, kept], self.values_K[kept], self.right_KN[kept], self.place_K[kept])

    def joined(self, own: Spectrum, slots: int) -> Triplets:
        """With another task's, in ``slots`` slots; where they do not suffice the strongest stay."""
        values_K = torch.cat([self.values_K, own.values_K])
        order = values_K.argsort(descending=True, stable=True)[:slots]
        place_K = torch.cat([self.place_K, torch.arange(own.rank, device=self.place_K.device)])
        empty = (0, slots - len(order))
        return Triplets(
            pad(torch.cat([self.left_MK, own.left_MK], 1)[:, order], empty),
            pad(values_K[order], empty),
            pad(torch.cat([self.right_KN, own.right_KN])[order], (0, 0, *empty)),
            pad(place_K[order], empty),
        )


class TsvM(Rule):
    """Truncated task vectors with their singular directions made orthogonal.

    Args:
        factor: what the merged task vector is multiplied with, 0 to 3. The paper takes 1.0.
    """

    name: ClassVar[str] = "tsv_m"
    order_free: ClassVar[bool] = True
    heavy: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (RunningSum, Triplets)

    factor: float = Field(default=1.0, ge=0.0, le=3.0)

    def init(self, layer: LayerSpec) -> State:
        return Triplets.none(layer) if layer.kind is LayerKind.MATRIX else RunningSum.zero(layer)

    def absorb(self, state: Any, prepared: None, update: LayerUpdate, context: Context = ALONE) -> State:
        if not isinstance(state, Triplets):
            return state.plus(update)  # type: ignore[no-any-return]
        share = share_of(state.slots, context.merges + 1)
        own = spectrum_of_update(update, (state.left_MK.shape[0], state.right_KN.shape[1]))
        return state.within(share).joined(own.leading(share).rounded(), state.slots)

    def read(self, state: Any, totals: Totals) -> Tensor:
        tasks = max(totals.merges, 1)
        if isinstance(state, Triplets):
            return _merged(state.within(share_of(state.slots, tasks))) * self.factor
        mean: Tensor = state.read(self.factor / tasks)
        return mean


def share_of(slots: int, tasks: int) -> int:
    """How many triplets each of so many tasks keeps."""
    return max(slots // tasks, 1)


def _merged(kept: Triplets) -> Tensor:
    """``U_perp diag(s) V_perp^T``, float32."""
    left_MK, right_NK = orthogonal(kept.left_MK), orthogonal(kept.right_KN.T)
    merged_MN: Tensor = (left_MK * kept.values_K).float() @ right_NK.T.float()
    return merged_MN


def orthogonal(unit_MK: Tensor) -> Tensor:
    """``U (U^T U)^(-1/2)`` of unit columns, the pseudo-inverse's where some coincide; float64."""
    wide_MK = unit_MK.double()
    values_K, vectors_KK = torch.linalg.eigh(wide_MK.T @ wide_MK)
    kept = values_K > COINCIDENT * values_K.sum()
    vectors_KK = vectors_KK[:, kept]
    orthogonal_MK: Tensor = wide_MK @ (vectors_KK / values_K[kept].sqrt()) @ vectors_KK.T
    return orthogonal_MK
