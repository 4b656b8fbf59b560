"""Training within a subspace: what the options ``osft`` and ``project`` share.

Of each layer, the displacement ``D = theta - theta_start`` is kept in the range of P, linear and idempotent::

    gradient <- P(gradient)                     before every step
    theta <- theta_start + P(theta - theta_start)   after every step

The second line is needed: AdamW divides every element by a scale of its own and decays weights towards zero,
and both lead out of the subspace, however well the gradient lies in it. What is left outside is the rounding
of theta itself, which does not grow with the number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor

from fedmerge.client.options.option import Option, Run

Projection = Callable[[Tensor], Tensor]
"""A linear, idempotent map of matrices (M, N)."""


class Projected(Option):
    """Keeps the displacement of some matrix layers in a subspace; all other parameters train freely."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self._projections: Mapping[str, Projection] = {}

    def projections(self) -> Mapping[str, Projection]:
        """By trained matrix layer; asked for once, when the run begins."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._projections = self.projections()
        return self

    @torch.no_grad()
    def after_backward(self) -> None:
        for name, project in self._projections.items():
            gradient = self.run.trained[name].grad
            if gradient is not None:
                gradient.copy_(project(gradient.flatten(1)).reshape(gradient.shape))

    @torch.no_grad()
    def after_step(self) -> None:
        for name, project in self._projections.items():
            weight, start = self.run.trained[name], self.run.start[name]
            moved_MN = project((weight - start).flatten(1))
            weight.copy_(start + moved_MN.reshape(weight.shape))
