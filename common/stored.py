"""One layer as the tensors that store it, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fedmerge.common.int8 import encoded
from fedmerge.common.parts import LEFT, RIGHT
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank


def tensors_of(name: str, update: LayerUpdate, dtype: torch.dtype) -> dict[str, Tensor]:
    """By name, in the order they are written.

    Args:
        dtype: float32; bfloat16, to which values are rounded to nearest even; or int8, with scales.
    """
    parts = (name + LEFT, name + RIGHT) if isinstance(update, LowRank) else (name,)
    tensors = dict(zip(parts, update.tensors(), strict=True))
    if dtype is not torch.int8:
        return {part: tensor.to(dtype) for part, tensor in tensors.items()}
    return {stored: tensor for part in parts for stored, tensor in encoded(part, tensors[part]).items()}


def update_from(
    name: str, low_rank: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor]
) -> LayerUpdate:
    """A layer from its tensors.

    Args:
        low_rank: shapes of the low-rank layers. ``read``: a tensor in float32 by its name.
    """
    if name in low_rank:
        return LowRank(read(name + LEFT), read(name + RIGHT), low_rank[name])
    return Dense(read(name))
