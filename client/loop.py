"""The loop of a training run, and its state for a restart."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer

from fedmerge.client.batches import Order
from fedmerge.client.options.option import Option, Run
from fedmerge.client.running import batch_of
from fedmerge.client.tasks import Task, TrainingConfig
from fedmerge.common.errors import NonFinite

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def optimizer_of(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> Optimizer:
    """The configured optimizer over these parameters."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return SGD(list(parameters), lr=rate, momentum=config.momentum, weight_decay=decay)
    return AdamW(list(parameters), lr=rate, weight_decay=decay)


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate in ``(0, 1]`` at ``step`` (from 0): up over a tenth, then down."""
    warm_up = max(1, math.ceil(steps / 10))
    if step < warm_up:
        return (step + 1) / warm_up
    return max(steps - step, 1) / (steps - warm_up + 1)


@dataclass
class TrainingLoop:
    """Optimizer steps over a task's examples.

    A step's gradient is that of the mean loss over all its examples, in however many batches they come. With
    ``fp16`` the loss is scaled up for the backward pass; a step whose gradients overflow lowers the scale and
    changes nothing else.

    Attributes:
        losses: of every step done, before it was taken. ``seconds``: spent on them.
    """

    run: Run
    task: Task
    options: Sequence[Option]
    optimizer: Optimizer
    order: Order
    place: torch.device
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._scaler = GradScaler(self.place.type, enabled=self.run.config.precision == "fp16")

    def train(self, after_step: Callable[[], None]) -> None:
        """Takes the steps that are left, or fewer if an option ends the run.

        Raises:
            NonFinite: the loss or the gradients became NaN or infinite.
        """
        while self.run.step < self.run.steps and not self.run.over:
            started = time.perf_counter()
            self._step()
            self.seconds += time.perf_counter() - started
            after_step()

    def _step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        batches = self.order.next_step()
        rows = sum(map(len, batches))
        self.losses.append(math.fsum(self._backward(batch, len(batch) / rows) for batch in batches))
        self._scaler.unscale_(self.optimizer)
        if self._gradients_are_usable():
            for option in self.options:
                option.after_backward()
            if not self._clip(self.run.config.max_grad_norm or math.inf):
                raise self._diverged("gradient")
        self._set_rate()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.run.step += 1
        for option in self.options:
            option.after_step()

    def _backward(self, rows: Sequence[int], share: float) -> float:
        """Adds this batch's part of the gradient; returns its part of the loss."""
        batch = batch_of(self.task, self.task.train, rows, self.place)
        with ExitStack() as stack:
            for option in self.options:
                stack.enter_context(option.perturbed())
            with self._autocast():
                loss = self.task.loss(self.run.model, batch)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise self._diverged("loss")
            self._scaler.scale(loss * share).backward()  # type: ignore[no-untyped-call]
        return value * share

    def _autocast(self) -> torch.autocast:
        dtype = AUTOCAST.get(self.run.config.precision)
        return torch.autocast(self.place.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)

    def _gradients_are_usable(self) -> bool:
        """Whether they are finite, where that matters before they are clipped."""
        if not (self.options or self._scaler.is_enabled()):
            return True
        finite = self._clip(math.inf)
        if not finite and (not self._scaler.is_enabled() or self._scaler.get_scale() < 1):
            raise self._diverged("gradient")
        return finite

    def _clip(self, bound: float) -> bool:
        """Clips the gradients as if concatenated; whether their norm was finite."""
        return bool(torch.isfinite(clip_grad_norm_(self._parameters(), bound)))

    def _set_rate(self) -> None:
        config, run = self.run.config, self.run
        factor = rate_factor(run.step, run.steps) if config.schedule == "linear" else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * factor

    def _parameters(self) -> list[nn.Parameter]:
        parameters: list[nn.Parameter] = self.optimizer.param_groups[0]["params"]
        return parameters

    def _diverged(self, what: str) -> NonFinite:
        return NonFinite(
            f"the {what} is not finite at step {self.run.step + 1} of {self.run.steps}",
            where=f"task {self.task.name!r}",
            got=f"learning_rate {self.run.config.learning_rate:g}",
            do="Lower the learning rate, or look for empty or broken examples.",
        )

    # --- going on after a restart ---

    def state(self) -> dict[str, Tensor]:
        """All that the steps to come depend on: weights, optimizer, options, data order, generators."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "loop": {
                "step": torch.tensor(self.run.step),
                "losses": torch.tensor(self.losses, dtype=torch.float64),
                "seconds": torch.tensor(self.seconds, dtype=torch.float64),
            },
            "weights": self._weights(),
            "order": self.order.state(),
            "random": self._generators(),
            "scaler": {name: torch.tensor(value) for name, value in self._scaler.state_dict().items()},
        }
        parts |= {f"option{i}": option.state() for i, option in enumerate(self.options)}
        for i, moments in self.optimizer.state_dict()["state"].items():
            parts[f"optimizer{i}"] = {k: v for k, v in moments.items() if isinstance(v, Tensor)}
        return {f"{part}/{name}": tensor for part, held in parts.items() for name, tensor in held.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a state; the options have been entered, with the weights that the run started from."""

        def part(name: str) -> dict[str, Tensor]:
            prefix = f"{name}/"
            return {key.removeprefix(prefix): held for key, held in state.items() if key.startswith(prefix)}

        self.run.step, self.losses = int(state["loop/step"]), state["loop/losses"].tolist()
        self.seconds = float(state["loop/seconds"])
        for name, tensor in self._weights().items():
            tensor.copy_(state[f"weights/{name}"])
        moments = {i: part(f"optimizer{i}") for i in range(len(self._parameters()))}
        settings = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict(
            {"state": {i: held for i, held in moments.items() if held}, "param_groups": settings}
        )
        for i, option in enumerate(self.options):
            option.load(part(f"option{i}"))
        self.order.load(part("order"))
        if scaler := part("scaler"):
            self._scaler.load_state_dict({name: held.item() for name, held in scaler.items()})
        self._set_generators(part("random"))

    def _weights(self) -> dict[str, Tensor]:
        return {**self.run.trained, **dict(self.run.model.named_buffers())}

    def _generators(self) -> dict[str, Tensor]:
        states = {"torch": torch.get_rng_state(), "run": self.run.generator.get_state()}
        if self.place.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.place)
        return states

    def _set_generators(self, states: Mapping[str, Tensor]) -> None:
        torch.set_rng_state(states["torch"])
        self.run.generator.set_state(states["run"])
        if self.place.type == "cuda":
            torch.cuda.set_rng_state(states["cuda"], self.place)
