"""Updates as steps from the merged model, for rules that take one after another.

Legend: M out rows, N in columns.
"""

from __future__ import annotations

from torch import Tensor

from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.merge.elementwise import values_of
from fedmerge.server.merge.rule import Context


def arrived(update: LayerUpdate, merged_MN: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """What a site has reached, as a vector from the base, and the step to it from the merged vector.

    One of them is the update itself, whichever way it was measured; both are (M, N), to be left unchanged.
    """
    values_MN = values_of(update, merged_MN.shape)
    if context.step:
        return merged_MN + values_MN, values_MN
    return values_MN, values_MN - merged_MN
