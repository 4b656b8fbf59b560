"""Null-space projection: a new task vector is added where the merged one does not look.

The first half of NUFILT (arXiv 2509.21413), with ``M`` the merged task vector of a layer and ``D`` the new
one::

    M <- M + D (I - V_p V_p^T)      V_p = leading right singular directions of M, N x K

so the layer's response to inputs along V_p stays what it was. The first task is kept whole: M is zero then,
and has no directions.

Departures from the published code:

- K is at most the numerical rank of M. Beyond it directions are arbitrary, and the published first step,
  from M = 0, drops as many directions of the first task.
- Every matrix layer is merged; the published code takes attention and the first feed-forward layer, and
  leaves all others at the base. Vector layers read as their mean.

A layer of at most ``rank`` columns has no directions left once M has full rank, so it keeps the first tasks
and nothing of the later ones: choose ``rank`` well below the width of the model (128 of 768 as published).

Legend: M out rows, N in columns, K protected directions.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.server.merge.sequential import SequentialRule
from fedmerge.server.merge.spectrum import spectrum_of
from fedmerge.server.merge.sums import added


class NullSpace(SequentialRule):
    """Adds each task vector outside the leading input directions of what is merged already.

    Args:
        rank: how many directions are protected, 1 to 65536.
    """

    name: ClassVar[str] = "null_space"

    rank: int = Field(default=128, ge=1, le=65536)

    def prepare_matrix(self, merged_MN: Tensor) -> Tensor:
        """The protected directions as rows, (K, N) float32."""
        return spectrum_of(merged_MN).leading(self.rank).right_KN.float()

    def step(self, merged_MN: Tensor, prepared: Tensor, update: LayerUpdate) -> Tensor:
        response_MK = _response(update, prepared, merged_MN)
        return added(merged_MN, update).addmm_(response_MK, prepared, alpha=-1)


def _response(update: LayerUpdate, directions_KN: Tensor, like_MN: Tensor) -> Tensor:
    """``D V``: what a task vector makes of input directions, (M, K)."""
    if isinstance(update, LowRank):
        return update.left_MR @ (update.right_RN @ directions_KN.T)
    return update.values.reshape(like_MN.shape) @ directions_KN.T
