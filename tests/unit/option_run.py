"""A local run with one option, stepped by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.client.options.option import Option, Run
from fedmerge.client.tasks import TrainingConfig


def run_of(model: nn.Module, **fields: Any) -> Run:
    """A run over all of a model's parameters."""
    trained = dict(model.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in trained.items()}
    return Run(model, trained, TrainingConfig(), 100, torch.Generator().manual_seed(0), start, **fields)


def stepped(
    option: Option,
    loss: Callable[[int], Tensor],
    steps: int,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    **settings: Any,
) -> list[dict[str, Tensor]]:
    """The trained weights after each step; the loop without clipping, schedule and precision."""
    run, seen = option.run, []
    with option:
        run.optimizer = optimizer(run.trained.values(), **settings)
        for step in range(steps):
            run.optimizer.zero_grad(set_to_none=True)
            loss(step).backward()
            option.after_backward()
            run.optimizer.step()
            run.step += 1
            option.after_step()
            seen.append({name: p.detach().clone() for name, p in run.whole.items()})
    return seen


class Shapes(nn.Sequential):
    """A convolution (4 x 18) and wide (12 x 36), square (12 x 12), tall (20 x 12) linear layers; float32."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        layers = (nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(36, 12), nn.Linear(12, 12), nn.Linear(12, 20))
        super().__init__(*layers)


MATRICES = ("0.weight", "2.weight", "3.weight", "4.weight")
"""Those of :class:`Shapes`."""


def noisy_loss(model: nn.Module) -> Callable[[int], Tensor]:
    """A loss of new random examples at every step."""
    generator = torch.Generator().manual_seed(8)

    def loss(step: int) -> Tensor:
        inputs, targets = (torch.randn(shape, generator=generator) for shape in ((6, 2, 5, 5), (6, 20)))
        return (model(inputs) - targets).square().mean()

    return loss
