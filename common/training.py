"""What a server may ask of the way sites train; both sides must agree on it.

A :class:`LocalTraining` names the training options of a run and their settings. A site keeps its own choice
wherever the server makes none. What the options do is in :mod:`fedmerge.client.options`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedmerge.common.config import validated
from fedmerge.common.errors import ConfigError
from fedmerge.common.statistics import WIDEST

Share = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Loop(_Frozen):
    """Settings of the loop itself, in place of the stream's own; None leaves the stream's.

    Fields as in ``fedmerge.client.tasks.TrainingConfig``.
    """

    steps: Count | None = None
    epochs: Count | None = None
    batch_size: Count | None = None
    accumulate: Count | None = None
    optimizer: Literal["adamw", "sgd"] | None = None
    learning_rate: Amount | None = None
    weight_decay: Amount | None = None
    momentum: Amount | None = None
    max_grad_norm: Amount | None = None
    schedule: Literal["linear", "constant"] | None = None
    precision: Literal["full", "bf16", "fp16"] | None = None


class Lora(_Frozen):
    """Low-rank adapters in place of all weights (arXiv 2106.09685), sent as factors.

    Attributes:
        rank: of every adapter. ``alpha``: the product is scaled by alpha / rank; None is the rank.
        init: the input directions that an adapter begins with: the leading ones of the loss's ``gradient``,
            or ``random`` ones.
        targets: comma-separated patterns of the matrix layers that get one; empty means all.
        full: comma-separated patterns of parameters that are trained whole beside them.
    """

    rank: Count = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    init: Literal["gradient", "random"] = "gradient"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str = ""
    full: str = ""


class Perturb(_Frozen):
    """Loss at ``theta`` or at ``theta +- epsilon * (theta - theta_start)``, drawn anew at every step
    (arXiv 2505.22389).

    Attributes:
        unperturbed: probability of theta itself; the other two share the rest.
    """

    epsilon: Annotated[float, Field(gt=0)] = 0.5
    unperturbed: Annotated[float, Field(ge=0, lt=1)] = 1 / 3


class Tangent(_Frozen):
    """Trains, and scores, the model's linearisation at the base's weights (arXiv 2509.23592)."""


class Osft(_Frozen):
    """Trains within the span of each matrix layer's smallest singular directions (arXiv 2504.07097).

    Attributes:
        frozen: share of the singular directions, the largest, that no step touches.
    """

    frozen: Annotated[float, Field(gt=0, lt=1)] = 0.5


class Coso(_Frozen):
    """Steps in subspaces of the gradients, orthogonal to those of its earlier tasks (arXiv 2505.11816).

    Attributes:
        rank: dimensions of the subspace in use. ``every``: steps until it is chosen anew.
        sketch: rows of the frequent-directions sketch of a task's gradients.
        energy: share of the sketch that is kept for later tasks.
    """

    rank: Count = 16
    every: Count = 1
    sketch: Count = 100
    energy: Share = 0.98


class Migu(_Frozen):
    """Updates only the units with the largest outputs (arXiv 2406.17245).

    Attributes:
        quantile: of a layer's units by summed magnitude; those at or above it are trained.
    """

    quantile: Annotated[float, Field(ge=0, lt=1)] = 0.7


class Prox(_Frozen):
    """FedProx's term ``mu / 2 * ||theta - theta_start||^2`` (arXiv 1812.06127)."""

    mu: Annotated[float, Field(gt=0)] = 0.01


class Project(_Frozen):
    """Keeps every local step orthogonal to the subspaces that the server protects (arXiv 2309.01289 projects
    at the server alone)."""


class Stop(_Frozen):
    """Ends a run early: when the loss on examples held out of training has not fallen for a while. The
    weights are then those of the lowest loss.

    Attributes:
        held_out: share of the training examples. ``every``: steps between two looks.
        patience: looks without a new lowest loss.
    """

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    every: Count = 10
    patience: Count = 3


class LocalTraining(_Frozen):
    """The loop's settings and the options in use; those that are None are not."""

    loop: Loop = Loop()
    lora: Lora | None = None
    tangent: Tangent | None = None
    perturb: Perturb | None = None
    migu: Migu | None = None
    prox: Prox | None = None
    coso: Coso | None = None
    osft: Osft | None = None
    project: Project | None = None
    stop: Stop | None = None

    @model_validator(mode="after")
    def _compatible(self) -> Self:
        for name in WITHOUT_ADAPTERS:
            if self.lora is not None and getattr(self, name) is not None:
                raise ValueError(f"{name} trains whole weights and lora does not")
        return self

    @classmethod
    def chosen(
        cls, names: Iterable[str], settings: Mapping[str, Mapping[str, Any]] | None = None
    ) -> LocalTraining:
        """The options of these names with their settings, by option; ``loop`` needs no naming.

        Raises:
            ConfigError: an unknown name, settings of an option that is not chosen, or a value out of range.
        """
        names, settings = tuple(names), dict(settings or {})
        for name in names:
            if name not in OPTIONS:
                raise ConfigError("unknown training option", got=name, wanted=" or ".join(OPTIONS))
        for name in settings:
            if name not in (*names, "loop"):
                raise ConfigError(
                    "settings of a training option that is not in use",
                    got=name,
                    wanted=", ".join(names) or "no options",
                )
        return validated(cls, {name: {} for name in names} | settings)

    @property
    def options(self) -> tuple[str, ...]:
        """Names of those in use."""
        return tuple(name for name in OPTIONS if getattr(self, name) is not None)


WITHOUT_ADAPTERS = ("tangent", "osft", "coso", "project")
"""Options that act on a layer's own weights, which low-rank adapters leave alone."""

PLAIN = LocalTraining()
"""Training as the stream has it."""

OPTIONS = tuple(name for name in LocalTraining.model_fields if name != "loop")
"""Names of the training options, in the order in which they act."""


class Correction(_Frozen):
    """One projection of the merged model fitted to the representation by the model before the last merge
    (arXiv 2509.23592).

    Attributes:
        layers: comma-separated patterns of what is fitted; empty is the last matrix layer that runs.
        loss: between the two representations.
        learning_rate: AdamW's. ``epochs``: passes over the task's training examples.
    """

    layers: str = ""
    loss: Literal["l1", "mse"] = "l1"
    learning_rate: Amount = 1e-7
    epochs: Count = 1
    batch_size: Count = 64


class SketchSpec(_Frozen):
    """How sites sketch the inputs of a layer outside the directions that are protected (arXiv 2309.01289).

    Attributes:
        width: columns of a sketch in multiples of the layer's. ``distribution``: of the random numbers that
            rows are mixed with, standard ``normal`` or ``uniform`` from -1 to 1.
        squared: whether the residual's ratio is one of squared norms.
    """

    width: Annotated[float, Field(gt=0, le=WIDEST)] = 1.0
    distribution: Literal["normal", "uniform"] = "normal"
    squared: bool = False

    def columns(self, inputs: int) -> int:
        """Columns of a sketch of a layer of so many columns, at least 1."""
        return max(1, round(self.width * inputs))
