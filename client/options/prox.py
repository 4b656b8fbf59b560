"""FedProx (arXiv 1812.06127): the loss plus ``mu / 2 * ||theta - theta_start||^2``.

The norm is over all trained weights as if concatenated. For a layer with an adapter, ``theta - theta_start``
is the adapter's product, so the term holds the layer, not its factors, near the start. The term is added to
the gradients alone; the loss that is reported is without it.
"""

from __future__ import annotations

import torch

from fedmerge.client.options.option import Option, Run
from fedmerge.common.training import Prox


class Proximal(Option):
    """Adds the term's gradient to that of the loss."""

    def __init__(self, run: Run, config: Prox) -> None:
        super().__init__(run)
        self._mu = config.mu

    @torch.no_grad()
    def after_backward(self) -> None:
        for name, parameter in self.run.whole.items():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - self.run.start[name], alpha=self._mu)
        with torch.enable_grad():
            for adapter in self.run.adapters.values():
                (0.5 * self._mu * adapter.squared_norm()).backward()  # type: ignore[no-untyped-call]
