"""MIGU: only the units with the largest outputs are updated (arXiv 2406.17245).

Over the batches of a step, the magnitudes of every unit's outputs are summed: of a linear layer's output
features over all rows (tokens, padding too), of a convolution's channels over all positions. After the
backward pass the gradients of a layer's weight rows and bias entries stay where the unit's sum is at or above
the quantile of the layer's sums, and are zero elsewhere. So units of equal sums are treated alike, one unit
at least is trained, and all of them are where all outputs are equal. Sums begin anew with every step.

The gradients alone are masked, as in the paper: an optimizer's momentum and weight decay still move units
whose gradient is zero. Layers that do not run as a module of their own (the projections inside
``nn.MultiheadAttention``), transposed convolutions and everything that is no such layer train freely.
"""

from __future__ import annotations

from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedmerge.client.linearised import first_order
from fedmerge.client.options.option import Option, Run
from fedmerge.common.layers import stores_in_by_out
from fedmerge.common.training import Migu


class LargestUnits(Option):
    """Masks gradients by the magnitudes that forward hooks see."""

    def __init__(self, run: Run, config: Migu) -> None:
        super().__init__(run)
        self._quantile = config.quantile
        self._sums: dict[nn.Module, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for module in self.run.model.modules():
            dim = _unit_dim(module)
            if dim is not None and any(p.requires_grad for p in module.parameters(recurse=False)):
                self._hooks.append(module.register_forward_hook(partial(self._add, dim)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def after_backward(self) -> None:
        for module, sums in self._sums.items():
            kept = sums >= torch.quantile(sums, self._quantile)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.grad is not None:
                    shape = [1] * parameter.dim()
                    shape[_weight_dim(module) if name == "weight" else 0] = -1
                    parameter.grad.mul_(kept.reshape(shape))

    def after_step(self) -> None:
        self._sums.clear()

    def _add(self, dim: int, module: nn.Module, args: Any, output: Tensor) -> None:
        """Adds a forward pass; one without gradients, such as a look at held-out examples, is no step's."""
        if torch.is_grad_enabled():
            magnitudes = first_order(output).detach().float().abs().movedim(dim, -1).flatten(0, -2).sum(dim=0)
            self._sums[module] = self._sums.get(module, 0) + magnitudes


def _unit_dim(module: nn.Module) -> int | None:
    """The output's dimension of units, from the end; None if it is no linear layer or convolution."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return -1 - len(module.kernel_size)
    return -1 if isinstance(module, nn.Linear) or stores_in_by_out(module) else None


def _weight_dim(module: nn.Module) -> int:
    return 1 if stores_in_by_out(module) else 0
