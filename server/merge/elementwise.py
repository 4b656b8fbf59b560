"""An update's entries, whichever way it was sent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedmerge.common.taskvector import LayerUpdate, LowRank


def values_of(update: LayerUpdate, shape: Sequence[int]) -> Tensor:
    """Every entry of an update as a matrix of a layer's :attr:`LayerSpec.matrix_shape`.

    Factors are multiplied in float64 and rounded once, so that the product has the same bits as one sent
    dense, and a threshold or a comparison decides the same of both.
    """
    if isinstance(update, LowRank):
        product = update.left_MR.double() @ update.right_RN.double()
        return product.to(update.left_MR.dtype).reshape(tuple(shape))
    return update.values.reshape(tuple(shape))
