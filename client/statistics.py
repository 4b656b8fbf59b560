"""What a site measures of its fine-tuned model because a merge rule needs it.

Input Grams and Fisher information come from one pass over a few training examples, in evaluation mode, one
example at a time. So no padding between examples of different length is counted (padding to a fixed length
is), and gradients are those of single examples. A pass costs one forward step per example, and for Fisher
information a backward step as well: with 64 examples about what four training steps of 16 cost, or twice
that where small batches are slow. The Grams are then factorised, see :mod:`fedmerge.client.grams`.

Sketches come from one pass over all training examples, in evaluation mode too, in batches of
``eval_batch_size`` and without gradients; see :mod:`fedmerge.client.sketches`. Whatever the task's
``collate`` pads examples with is counted there like any other input.

AdamW's second moments cost nothing: they are what its state holds after the last step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from fedmerge.client.batches import drawn
from fedmerge.client.grams import InputGrams, Watcher
from fedmerge.client.running import batch_of, left_as_found, place_of, seeded
from fedmerge.client.sketches import InputSketches
from fedmerge.client.tasks import Task, TrainingConfig, length
from fedmerge.common.errors import ConfigError, NonFinite
from fedmerge.common.layers import LayerSpec
from fedmerge.common.statistics import Statistic
from fedmerge.common.taskvector import require_finite
from fedmerge.common.training import SketchSpec

Measured = dict[str, dict[str, Tensor]]
"""Statistics by layer, then by name; float32, on the CPU."""


def check_needs(needs: Iterable[str]) -> None:
    """Refuses a statistic that no site knows how to measure.

    Raises:
        ConfigError: naming it, and those there are.
    """
    unknown = sorted(set(needs) - set(Statistic))
    if unknown:
        raise ConfigError(
            "a statistic that this site cannot measure", got=", ".join(unknown), wanted=" or ".join(Statistic)
        )


def measure(
    model: nn.Module,
    task: Task,
    wanted: Iterable[str],
    layers: Mapping[str, LayerSpec],
    config: TrainingConfig,
    *,
    seed: int,
    device: str = "auto",
    sketch: SketchSpec | None = None,
    bases: Mapping[str, Tensor] | None = None,
    private_seed: int | None = None,
) -> Measured:
    """Input Grams, Fisher information and sketches at the weights that ``model`` has.

    - ``input_gram``: of the layers that have one, see :mod:`fedmerge.client.grams`; layers with one input
      share one tensor. The mean is over input rows: over tokens or positions, not over examples.
    - ``fisher``: of every layer, the mean over examples of the squared gradient of that example's loss;
      zeros where the loss does not depend on a layer, and for buffers.
    - ``sketch`` and ``residual``: of the matrix layers that have an input Gram, over all examples.

    The model is left as it was: hooks, gradients, switches, modes, device and torch's generators.

    Args:
        wanted: which of them.
        layers: those to measure, by name.
        config: its ``statistics_examples`` and ``gram_energy``, and for sketches ``eval_batch_size``.
            ``seed``: of the draw of examples.
        device: ``auto`` (CUDA if there is one, else CPU) or a torch device.
        sketch: how to sketch; None as a :class:`SketchSpec` has it. ``bases``: by layer, the orthonormal
            columns (N, K) that are protected.
        private_seed: of a sketch's random numbers, for experiments that are to be repeated; it must differ
            from site to site. Whoever knows it can undo the mixing, so by default nobody does.

    Raises:
        ConfigError: the task has no training examples, or a number in ``config`` is out of range.
        NonFinite: an input, a loss or a squared gradient is NaN or infinite.
        ShapeMismatch: protected directions that do not fit their layer.
    """
    _check(task, config)
    wanted, where, place = frozenset(wanted), _where(task), place_of(device)
    parts: list[Measured] = []
    with left_as_found(model), seeded(seed, place):
        model.to(place).eval()
        if wanted & {Statistic.INPUT_GRAM, Statistic.FISHER}:
            parts.append(_of_single_examples(model, task, wanted, layers, config, seed, place))
        if wanted & {Statistic.SKETCH, Statistic.RESIDUAL}:
            sketches = InputSketches(model, layers, sketch or SketchSpec(), bases or {}, private_seed, where)
            _feed_all(model, task, config.eval_batch_size, place, sketches)
            parts.append(sketches.found())
    return {
        name: {key: values for part in parts for key, values in part.get(name, {}).items() if key in wanted}
        for name in layers
    }


def _of_single_examples(
    model: nn.Module,
    task: Task,
    wanted: frozenset[str],
    layers: Mapping[str, LayerSpec],
    config: TrainingConfig,
    seed: int,
    place: torch.device,
) -> Measured:
    """Grams and Fisher information from a few examples, one at a time."""
    where = _where(task)
    grams = InputGrams(model, layers, where)
    fisher = _Fisher(model, layers, where) if Statistic.FISHER in wanted else None
    with grams.watching() if Statistic.INPUT_GRAM in wanted else nullcontext():
        for row in drawn(length(task.train), config.statistics_examples, seed):
            with torch.set_grad_enabled(fisher is not None):
                loss = task.loss(model, batch_of(task, task.train, [row], place))
            if not math.isfinite(float(loss.detach())):
                raise NonFinite("the loss of an example is not finite", where=where)
            if fisher is not None:
                fisher.add(loss)
            grams.end_of_pass()
    found: Measured = {name: {} for name in layers}
    for name, factor in grams.means(config.gram_energy).items():
        found[name][Statistic.INPUT_GRAM] = factor
    for name, values in fisher.means().items() if fisher is not None else ():
        found[name][Statistic.FISHER] = values
    return found


@torch.no_grad()
def _feed_all(model: nn.Module, task: Task, batch_size: int, place: torch.device, watcher: Watcher) -> None:
    """Shows a watcher what the model sees of all training examples."""
    rows = range(length(task.train))
    with watcher.watching():
        for start in range(0, len(rows), batch_size):
            task.loss(model, batch_of(task, task.train, rows[start : start + batch_size], place))
            watcher.end_of_pass()


def second_moments(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """AdamW's ``exp_avg_sq`` by parameter's name: of the gradients as they were clipped, without bias
    correction. Parameters that were not trained have none.

    Raises:
        ConfigError: another optimizer, or one that trained other parameters than the model's own.
    """
    if not isinstance(optimizer, AdamW) or optimizer.state.keys() - set(model.parameters()):
        raise ConfigError(
            "second moments are those of AdamW over a model's own weights",
            got=type(optimizer).__name__,
            do="Train all weights with AdamW, or choose a rule that needs no second moments.",
        )
    return {
        name: optimizer.state[parameter]["exp_avg_sq"].detach().float().cpu()
        for name, parameter in model.named_parameters()
        if optimizer.state.get(parameter)
    }


class _Fisher:
    """Sums squared gradients of single examples' losses; the other parameters get no gradients."""

    def __init__(self, model: nn.Module, layers: Mapping[str, LayerSpec], where: str) -> None:
        self._layers, self._where, self._examples = layers, where, 0
        self._parameters = {name: p for name, p in model.named_parameters() if name in layers}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in layers)
        self._totals = {
            name: torch.zeros_like(p, dtype=torch.float32, requires_grad=False)
            for name, p in self._parameters.items()
        }

    def add(self, loss: Tensor) -> None:
        self._examples += 1
        if loss.requires_grad:
            gradients = torch.autograd.grad(loss, tuple(self._parameters.values()), allow_unused=True)
            for total, gradient in zip(self._totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()

    def means(self) -> dict[str, Tensor]:
        found = {}
        for name, layer in self._layers.items():
            total = self._totals.get(name, torch.zeros(layer.shape))
            found[name] = (total / self._examples).cpu()
            require_finite(found[name], where=self._where, layer=name)
        return found


def _where(task: Task) -> str:
    return f"statistics of task {task.name!r}"


def _check(task: Task, config: TrainingConfig) -> None:
    where = f"task {task.name!r}"
    if not length(task.train):
        raise ConfigError("no training examples", where=where, wanted="at least 1")
    if config.statistics_examples < 1:
        raise ConfigError(
            "statistics_examples out of range",
            where=where,
            got=config.statistics_examples,
            wanted="at least 1",
        )
    if not 0 < config.gram_energy <= 1:
        raise ConfigError(
            "gram_energy out of range", where=where, got=config.gram_energy, wanted="above 0 and at most 1"
        )
