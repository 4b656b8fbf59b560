"""What a training option is: a small piece that changes one thing about the plain loop.

The loop of :mod:`fedmerge.client.loop` calls its options at four places, in the order of ``OPTIONS``::

    with option:                                # once around the run: before the optimizer is made, and after
        for every optimizer step:
            for every micro-batch:
                with option.perturbed():        # where the loss is taken
                    loss.backward()
            option.after_backward()             # gradients may be changed, before they are clipped
            optimizer.step()                    # counted in ``run.step`` from here on
            option.after_step()                 # weights may be changed

All of them do nothing by default. An option belongs to one run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from fedmerge.client.tasks import TrainingConfig
from fedmerge.common.taskvector import LayerUpdate

if TYPE_CHECKING:
    from fedmerge.client.options.adapter import Adapter


@dataclass
class Run:
    """One local run as its options see it.

    Attributes:
        model: on its device, with the weights the run starts from, in training mode.
        trained: the parameters to be trained, by name; an option may put others in their place before the
            optimizer is made.
        config: the loop's settings. ``steps``: optimizer steps to come; ``step``: those done.
        generator: on the CPU, for draws; seeded for this run.
        start: copies of the weights that the run starts from, by the names in ``trained``, on the device;
            nothing for parameters that an option has put there.
        adapters: by matrix layer, those that are trained in its place.
        private: patterns of layers that are the task's own. ``base``: the pretrained weights, on the CPU.
        bases: by matrix layer, orthonormal columns (N, K) of input directions that the server protects.
        memory: what this site keeps from run to run, by keys that begin with the option's name; float32, CPU.
        ends_task: whether no further run of the same task follows.
        optimizer: of everything in ``trained``; made once the options are entered.
        held_out_loss: mean loss, now, over the examples that ``stop`` holds out of training.
        gradients: of the mean loss over some training examples, now, without dropout: by name, for those of
            these parameters that the loss depends on.
        over: set by an option to end the run after this step.
        kept: the step whose weights the model ends with, if it is not the last.
    """

    model: nn.Module
    trained: dict[str, nn.Parameter]
    config: TrainingConfig
    steps: int
    generator: torch.Generator
    start: Mapping[str, Tensor]
    private: tuple[str, ...] = ()
    base: Mapping[str, Tensor] = field(default_factory=dict)
    bases: Mapping[str, Tensor] = field(default_factory=dict)
    memory: dict[str, Tensor] = field(default_factory=dict)
    ends_task: bool = True
    adapters: dict[str, Adapter] = field(default_factory=dict)
    optimizer: torch.optim.Optimizer | None = None
    held_out_loss: Callable[[], float] = lambda: math.nan
    gradients: Callable[[Iterable[str]], Mapping[str, Tensor]] = lambda names: {}
    step: int = 0
    over: bool = False
    kept: int | None = None

    @property
    def whole(self) -> dict[str, nn.Parameter]:
        """The parameters of the model that are trained as they are."""
        return {name: self.trained[name] for name in self.start if name in self.trained}


class Option:
    """One departure from plain fine-tuning."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def __enter__(self) -> Self:
        """Changes the model for the run, if it must."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Gives the model its own structure back; what was learned is then in its weights."""

    def perturbed(self) -> AbstractContextManager[None]:
        """Around the loss of one micro-batch and its backward pass."""
        return nullcontext()

    def after_backward(self) -> None:
        """Gradients are complete; they may be changed in place."""

    def after_step(self) -> None:
        """The optimizer has stepped; weights may be changed in place."""

    def updates(self) -> Mapping[str, LayerUpdate]:
        """Layers whose update this option knows better than as a difference of weights; after the run."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """What it needs to go on after a restart; on any device."""
        return {}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a saved state."""
