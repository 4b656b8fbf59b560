"""P&M's perturbed training (arXiv 2505.22389): every step takes the loss at one of three places.

With ``D = theta - theta_start``, a step's place is ``theta``, ``theta + eps D`` or ``theta - eps D``, drawn
with probabilities ``u``, ``(1 - u) / 2`` and ``(1 - u) / 2``; all batches of a step share it. The expected
loss is ``L + (1 - u) * eps^2 / 2 * D^T H D`` up to third order: a penalty on curvature along the task vector.

The gradient is that of the perturbed loss as a function of theta, so it carries the factor ``1 +- eps``. For
an adapter the product is scaled instead, and autograd brings the factor.

The paper perturbs adapters alone; here whole parameters are perturbed too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from fedmerge.client.options.option import Option, Run
from fedmerge.common.training import Perturb


class Perturbation(Option):
    """Moves the weights along the task vector while the loss is taken."""

    def __init__(self, run: Run, config: Perturb) -> None:
        super().__init__(run)
        self._epsilon, self._unperturbed = config.epsilon, config.unperturbed
        self._drawn_for, self.shift = -1, 0.0

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        if self._drawn_for != self.run.step:
            self._drawn_for, self.shift = self.run.step, self._draw()
        if not self.shift:
            yield
            return
        with ExitStack() as stack:
            for adapter in self.run.adapters.values():
                stack.enter_context(adapter.scaled(1 + self.shift))
            stack.enter_context(self._moved())
            yield

    @torch.no_grad()
    def after_backward(self) -> None:
        for parameter in self.run.whole.values() if self.shift else ():
            if parameter.grad is not None:
                parameter.grad.mul_(1 + self.shift)

    def _draw(self) -> float:
        """``0``, ``epsilon`` or ``-epsilon``."""
        draw = float(torch.rand((), generator=self.run.generator))
        if draw < self._unperturbed:
            return 0.0
        return self._epsilon if draw < (1 + self._unperturbed) / 2 else -self._epsilon

    @contextmanager
    def _moved(self) -> Iterator[None]:
        """Whole parameters at their perturbed values; afterwards they have the bits they had."""
        whole = self.run.whole
        kept = {name: parameter.detach().clone() for name, parameter in whole.items()}
        with torch.no_grad():
            for name, parameter in whole.items():
                parameter.add_(parameter - self.run.start[name], alpha=self.shift)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in whole.items():
                    parameter.copy_(kept[name])
