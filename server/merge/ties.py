"""TIES: trim, elect signs, merge (arXiv 2306.01708), exact in a stream.

Every task vector is trimmed to its largest entries, one threshold for the whole vector. In each entry the
sign of the trimmed vectors' sum is elected, and those that have it are summed, or averaged::

    P = sum_t max(trimmed_t, 0)     N = sum_t min(trimmed_t, 0)
    tau = factor * (P where P + N > 0, N where P + N < 0)      for "mean" divided by how many there were

P, N and the two counts do not depend on the order of arrival and give the batch result at every step.

Departures from the published code:

- The threshold comes from a histogram of magnitudes over ``BINS`` bins: their float32 patterns without the
  last 15 bits, so each bin is at most 1/256 of its lower edge wide. The threshold is the lower edge of the
  bin in which the wanted share is reached; all of that bin is kept, a few entries more than the share.
- The share is of the layers that the update brings, rounded up to whole entries; the published code keeps
  one entry more where it needs no rounding.
- Where the kept entries cancel, nothing is merged. The published code lets the sign that is more frequent
  in the whole vector win there, which decides between P and N by rounding.

Legend: M out rows, N in columns, B bins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.elementwise import values_of
from fedmerge.server.merge.rule import ALONE, Context, Rule, Totals

DROPPED_BITS = 15
"""Low bits of a float32 pattern that do not tell bins apart; 8 of 23 bits of the mantissa do."""

BINS = 2 ** (31 - DROPPED_BITS)

CANCELLED = 1e-6
"""Below this share of the magnitudes summed, what is left of P + N is rounding."""


@dataclass(frozen=True)
class SignedSums:
    """The sums of what was kept above and below zero, float32."""

    positive_MN: Tensor
    negative_MN: Tensor

    @classmethod
    def zero(cls, layer: LayerSpec) -> SignedSums:
        return cls(torch.zeros(layer.matrix_shape), torch.zeros(layer.matrix_shape))

    def sum_of_squares(self) -> float:
        """Of the sum of all trimmed vectors, before signs are elected."""
        return float(torch.linalg.vector_norm(self.positive_MN + self.negative_MN, dtype=torch.float64)) ** 2

    def plus(self, kept_MN: Tensor, times: int) -> Self:
        return replace(
            self,
            positive_MN=self.positive_MN.add(kept_MN.clamp_min(0), alpha=times),
            negative_MN=self.negative_MN.add(kept_MN.clamp_max(0), alpha=times),
        )

    def elected(self) -> Tensor:
        """The sum of the entries that have the elected sign; 0 where both signs weigh the same."""
        total_MN = self.positive_MN + self.negative_MN
        cancelled_MN = total_MN.abs() <= CANCELLED * (self.positive_MN - self.negative_MN)
        return torch.where(total_MN > 0, self.positive_MN, self.negative_MN).masked_fill(cancelled_MN, 0)


@dataclass(frozen=True)
class CountedSums(SignedSums):
    """The sums and how many entries are in each, float32: exact up to 2^24 updates."""

    positives_MN: Tensor
    negatives_MN: Tensor

    @classmethod
    def zero(cls, layer: LayerSpec) -> CountedSums:
        return cls(*(torch.zeros(layer.matrix_shape) for _ in range(4)))

    def plus(self, kept_MN: Tensor, times: int) -> Self:
        return replace(
            super().plus(kept_MN, times),
            positives_MN=self.positives_MN.add(kept_MN > 0, alpha=times),
            negatives_MN=self.negatives_MN.add(kept_MN < 0, alpha=times),
        )

    def elected(self) -> Tensor:
        """The mean of the entries that have the elected sign."""
        sum_MN = super().elected()
        return sum_MN / torch.where(sum_MN > 0, self.positives_MN, self.negatives_MN).clamp_min(1)


class Ties(Rule):
    """TIES over every layer alike.

    Args:
        density: share of an update's entries that is kept, above 0 to 1.
        merge: ``sum`` or ``mean`` of the entries that agree with the elected sign.
        factor: what the merged vector is multiplied with, 0 to 2.
    """

    name: ClassVar[str] = "ties"
    order_free: ClassVar[bool] = True
    additive: ClassVar[bool] = True
    measures: ClassVar[bool] = True
    states: ClassVar[tuple[type, ...]] = (SignedSums, CountedSums)

    density: float = Field(default=0.2, gt=0.0, le=1.0)
    merge: Literal["sum", "mean"] = "sum"
    factor: float = Field(default=0.3, ge=0.0, le=2.0)

    def init(self, layer: LayerSpec) -> SignedSums:
        return (CountedSums if self.merge == "mean" else SignedSums).zero(layer)

    def measure(self, state: SignedSums, update: LayerUpdate, context: Context = ALONE) -> Tensor:
        """How many entries are in each bin of magnitudes, (BINS,)."""
        bins = bins_of(values_of(update, state.positive_MN.shape))
        return torch.bincount(bins.flatten(), minlength=BINS).double()

    def absorb(
        self, state: SignedSums, prepared: None, update: LayerUpdate, context: Context = ALONE
    ) -> SignedSums:
        return state.plus(self._kept(state, update, context), times=1)

    def remove(self, state: SignedSums, update: LayerUpdate, context: Context = ALONE) -> SignedSums:
        return state.plus(self._kept(state, update, context), times=-1)

    def read(self, state: SignedSums, totals: Totals) -> Tensor:
        return state.elected() * self.factor

    def _kept(self, state: SignedSums, update: LayerUpdate, context: Context) -> Tensor:
        assert context.measured is not None
        values_MN = values_of(update, state.positive_MN.shape)
        return values_MN.where(bins_of(values_MN) >= lowest_kept(context.measured, self.density), 0)


def bins_of(values: Tensor) -> Tensor:
    """The bin of each magnitude, int32; larger magnitudes never lie in a lower bin."""
    return values.float().abs().view(torch.int32) >> DROPPED_BITS


def lowest_kept(counts_B: Tensor, density: float) -> int:
    """The highest bin such that it and those above hold at least a share ``density`` of all entries."""
    above_B = counts_B.flip(0).cumsum(0)
    wanted = ceil(density * float(above_B[-1]))
    return len(counts_B) - 1 - int(torch.searchsorted(above_B, wanted))
