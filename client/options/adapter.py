"""A low-rank adapter within a model that is being trained.

Legend of shape suffixes: M out rows, N in columns, R rank; M is the first dimension of the weight as stored,
but for ``begin_with``, whose N are inputs however the weight is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.common.layers import stores_in_by_out

NAME = "fedmerge"
"""peft's name for the adapters of a run."""


class Adapter:
    """One layer's adapter: peft's module around the model's own.

    Attributes:
        layer: the model's own module.
    """

    def __init__(self, wrapper: Any) -> None:
        self._wrapper = wrapper
        self.layer: nn.Module = wrapper.get_base_layer()

    def begin_with(self, inputs_RN: Tensor) -> None:
        """Puts these, no more than its rank, in place of its first input directions."""
        weight = self._wrapper.lora_A[NAME].weight
        count = len(inputs_RN)
        with torch.no_grad():
            weight[:count] = inputs_RN.reshape(count, *weight.shape[1:])

    def factors(self) -> tuple[Tensor, Tensor]:
        """``left_MR, right_RN`` whose product is added to the weight; the scale is in the left one."""
        left_MR = self._wrapper.lora_B[NAME].weight.flatten(1)
        right_RN = self._wrapper.lora_A[NAME].weight.flatten(1)
        if stores_in_by_out(self.layer):
            left_MR, right_RN = right_RN.T, left_MR.T
        return left_MR * self._wrapper.scaling[NAME], right_RN

    def squared_norm(self) -> Tensor:
        """``||left @ right||_F^2``, from R x R Grams; differentiable."""
        left_MR, right_RN = self.factors()
        return ((left_MR.T @ left_MR) * (right_RN @ right_RN.T)).sum()

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """The product times ``factor`` meanwhile."""
        scale = self._wrapper.scaling[NAME]
        self._wrapper.scaling[NAME] = scale * factor
        try:
            yield
        finally:
            self._wrapper.scaling[NAME] = scale
