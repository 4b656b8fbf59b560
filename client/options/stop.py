"""Early stopping by the loss on examples that are held out of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType

import torch
from torch import Tensor

from fedmerge.client.options.option import Option, Run
from fedmerge.common.training import Stop

WEIGHTS = "weights/"


class EarlyStopping(Option):
    """Looks at the held-out loss every few steps and after the last one.

    A run that ends well ends with the weights, and buffers, of its lowest held-out loss, the first of equals.
    The weights it starts from are not among them. One that raises keeps those of its last step.
    """

    def __init__(self, run: Run, config: Stop) -> None:
        super().__init__(run)
        self._config = config
        self._lowest, self._waited, self._step = math.inf, 0, 0
        self._kept: dict[str, Tensor] = {}

    def after_step(self) -> None:
        step = self.run.step
        if step % self._config.every and step < self.run.steps:
            return
        loss = self.run.held_out_loss()
        if loss < self._lowest:
            self._lowest, self._waited, self._step = loss, 0, step
            self._kept = {name: tensor.detach().clone() for name, tensor in self._tensors().items()}
        else:
            self._waited += 1
            self.run.over = self._waited >= self._config.patience

    @torch.no_grad()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._kept:
            self.run.kept = self._step
            for name, tensor in self._tensors().items():
                tensor.copy_(self._kept[name])

    def state(self) -> dict[str, Tensor]:
        counts = {
            "lowest": torch.tensor(self._lowest, dtype=torch.float64),
            "waited": torch.tensor(self._waited),
            "step": torch.tensor(self._step),
        }
        return counts | {WEIGHTS + name: tensor for name, tensor in self._kept.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._lowest = float(state["lowest"])
        self._waited, self._step = int(state["waited"]), int(state["step"])
        self.run.over = self._waited >= self._config.patience
        here = self._tensors()
        names = [name.removeprefix(WEIGHTS) for name in state if name.startswith(WEIGHTS)]
        self._kept = {name: state[WEIGHTS + name].to(here[name].device) for name in names}

    def _tensors(self) -> dict[str, Tensor]:
        return {**self.run.trained, **dict(self.run.model.named_buffers())}
