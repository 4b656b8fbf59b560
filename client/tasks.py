"""What a site, or an experiment, tells fedmerge about its tasks.

A *stream* is an ordered list of tasks over one pretrained model. It is named as ``text``, as
``package.module:function`` or as ``path/to/file.py:function``; the function takes
:class:`StreamOptions` and returns a :class:`Stream`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = Any
"""Whatever the task's ``collate`` makes of a list of examples."""


@dataclass(frozen=True)
class TrainingConfig:
    """One local fine-tuning run: AdamW by default, warm-up over a tenth of the steps, then linear decay.

    Attributes:
        steps: optimizer steps, at least 1. Data are reshuffled and repeated as needed.
        epochs: passes over the site's training examples, at least 1; takes the place of ``steps``.
        batch_size: examples per forward pass; ``eval_batch_size`` when scoring.
        accumulate: forward passes per optimizer step, at least 1.
        optimizer: ``adamw`` or ``sgd``, with ``momentum``; ``weight_decay``: the optimizer's own.
        learning_rate: peak rate. ``schedule``: ``linear`` as above, or ``constant``.
        precision: ``full``; ``bf16`` and ``fp16`` compute the forward pass in that type where it is safe.
        max_grad_norm: gradient clipping over all parameters as if concatenated; 0 switches it off.
        frozen: shell-style patterns of parameters that are not trained and not sent.
        statistics_examples: training examples that statistics are measured on, where a merge rule needs
            them, and the gradient that LoRA begins with; all if there are fewer. At least 1.
        gram_energy: share of the trace that an input Gram keeps when it is sent as a factor of low rank,
            above 0 and at most 1.
    """

    steps: int = 40
    batch_size: int = 16
    eval_batch_size: int = 64
    learning_rate: float = 5e-5
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: int | None = None
    accumulate: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    momentum: float = 0.0
    schedule: Literal["linear", "constant"] = "linear"
    precision: Literal["full", "bf16", "fp16"] = "full"
    frozen: tuple[str, ...] = ()
    statistics_examples: int = 64
    gram_energy: float = 0.9999


@dataclass(frozen=True)
class Task:
    """One task's data and how to learn and score it.

    Attributes:
        name: as the stream lists it.
        train, test: map-style datasets (``len`` and indexing).
        loss: ``(model, batch) -> scalar`` mean loss over the batch, differentiable.
        metric: ``(model, batch) -> (examples,)`` score of each example in [0, 1]; the mean is reported
            as accuracy. Called without gradients and in evaluation mode.
        collate: examples to a batch; torch's default when None.
        labels: one label per training example, for label-skewed partitions over sites; optional.
        fit: ``(model, task, config, seed)`` trains the model in place, instead of our loop; see
            :mod:`fedmerge.client.fitting`.
    """

    name: str
    train: Dataset[Any]
    test: Dataset[Any]
    loss: Callable[[nn.Module, Batch], Tensor]
    metric: Callable[[nn.Module, Batch], Tensor]
    collate: Callable[[list[Any]], Batch] | None = None
    labels: Sequence[int] | None = None
    fit: Callable[[nn.Module, Task, TrainingConfig, int], None] | None = None


def length(rows: Dataset[Any]) -> int:
    """How many examples a map-style dataset holds."""
    return len(rows)  # type: ignore[arg-type]  # torch's Dataset declares no __len__; Task asks for one


@dataclass(frozen=True)
class StreamOptions:
    """What ``fedmerge simulate`` passes to a stream's function.

    ``rows`` bounds the training examples of each task (None: the stream's own default).
    """

    seed: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class Stream:
    """An ordered list of tasks over one pretrained model.

    Attributes:
        name: shown in reports.
        tasks: task names in the order they arrive.
        load: one task by name; called when it is needed, on the site that learns it.
        build_model: the pretrained model, with the same weights wherever it is called.
        training: defaults of a local run.
        private: shell-style patterns of parameters that never leave a site.
        prepare: fetches whatever must be on disk before sites start; called once, may show progress.
    """

    name: str
    tasks: tuple[str, ...]
    load: Callable[[str], Task]
    build_model: Callable[[], nn.Module]
    training: TrainingConfig = field(default_factory=TrainingConfig)
    private: tuple[str, ...] = ()
    prepare: Callable[[], None] = lambda: None
