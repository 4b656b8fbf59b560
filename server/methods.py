"""Methods: what goes by one name in the literature, as a rule, a way to train and a place to start from.

A rule alone is a method as well: sites fine-tune from the base as the stream says, and all rules of that
kind share the same task vectors.

==============  ====================================================================================
``fot``         federated orthogonal training (arXiv 2309.01289): rounds from the merged model, sites
                count alike, each round's mean is projected, the subspace is extended after each task
``fot_gram``    the same with input Grams in place of sketches
``fedavg``      rounds from the merged model and nothing that protects earlier tasks (arXiv 1602.05629)
``fedprox``     the same with a proximal term in the local loss (arXiv 1812.06127)
``sequential``  one site after another fine-tunes the model whole, each with all data of its task
``joint``       one site learns all tasks at once: what data in one place would give
``pm``          P&M (arXiv 2505.22389): start from the merged model, train with perturbation, merge with
                the closed-form share
``pm_plain``    the same without perturbation: merging only
``holistic``    Holistic CMM (arXiv 2509.23592): tangent-space training from the merged model, merging by
                AdamW's second moments, correction of one projection afterwards
==============  ====================================================================================

Departure from P&M: the paper trains LoRA alone; here that is a choice, ``train = "lora"``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

from fedmerge.common.config import validated
from fedmerge.common.errors import ConfigError
from fedmerge.common.training import OPTIONS, PLAIN, Correction, LocalTraining
from fedmerge.server.layout import FederationConfig
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.merge.rule import Rule

Settings = Mapping[str, Mapping[str, Any]]
"""Options by owner: a rule, a training option, ``loop`` or ``correction``."""


@dataclass(frozen=True)
class Preset:
    """What a method's name stands for; fields as in :class:`Method`."""

    rule: str
    start: Literal["base", "merged"] = "merged"
    options: tuple[str, ...] = ()
    weights: Literal["examples", "uniform"] = "examples"
    corrected: bool = False
    alone: bool = False
    joint: bool = False


PRESETS: Mapping[str, Preset] = {
    "fot": Preset("fot", weights="uniform"),
    "fot_gram": Preset("fot_gram", weights="uniform"),
    "fedavg": Preset("fedavg"),
    "fedprox": Preset("fedavg", options=("prox",)),
    "sequential": Preset("fedavg", alone=True),
    "joint": Preset("average", start="base", alone=True, joint=True),
    "pm": Preset("perturb_and_merge", options=("perturb",)),
    "pm_plain": Preset("perturb_and_merge"),
    "holistic": Preset("holistic", options=("tangent",), corrected=True),
}


@dataclass(frozen=True)
class Method:
    """One way to learn a stream.

    Attributes:
        name: what it goes by in results.
        rule: how vectors are merged. ``start``: where sites start each task.
        training: what sites are asked of their training. ``weights``: of the sites of a task.
        correction: what sites fit after each merge, if anything.
        alone: one site learns each task, with all of its data, for as many passes over it as the sites of a
            shared task would make together.
        joint: all tasks are learned at once.
        compress: how sites make their updates smaller.
    """

    name: str
    rule: Rule
    start: Literal["base", "merged"] = "base"
    training: LocalTraining = PLAIN
    weights: Literal["examples", "uniform"] = "examples"
    correction: Correction | None = None
    alone: bool = False
    joint: bool = False
    compress: str = "none"

    @property
    def learning(self) -> tuple[Any, ...] | None:
        """Equal for methods whose sites learn the same task vectors; None where no others do."""
        if self.start == "merged" or self.alone:
            return None
        return self.training, self.weights, self.compress

    @property
    def resumable(self) -> bool:
        """Whether a run can go on midway: what sites remember of earlier tasks is lost with their process."""
        return self.start == "merged" and self.training.coso is None

    def laid_out(self, layout: FederationConfig) -> FederationConfig:
        """The layout of a run by this method."""
        chosen: dict[str, Any] = {
            name: getattr(self, name)
            for name in ("start", "training", "weights", "correction", "joint", "compress")
        }
        if self.alone:
            passes = ceil(layout.rounds * layout.sites_asked / layout.sites_per_task)
            chosen |= {"sites_per_task": 1, "sites_per_round": None, "rounds": passes}
        return layout.model_copy(update=chosen)


def make_method(
    name: str, settings: Settings | None = None, train: Iterable[str] = (), compress: str = "none"
) -> Method:
    """The method, or the rule, of this name.

    Args:
        settings: options by owner; those of owners that the method does not have are left alone.
        train: training options beside the method's own.

    Raises:
        ConfigError: an unknown name or option, or a value out of range.
    """
    settings = settings or {}
    if name not in PRESETS and name not in RULES:
        raise ConfigError("unknown method", got=name, wanted=" or ".join((*PRESETS, *RULES)))
    preset = PRESETS.get(name) or Preset(name, start="base")
    options = tuple(dict.fromkeys((*preset.options, *train)))
    asked = {owner: found for owner, found in settings.items() if owner in (*options, "loop")}
    correction = validated(Correction, settings.get("correction", {})) if preset.corrected else None
    return Method(
        name,
        make_rule(preset.rule, settings.get(preset.rule)),
        preset.start,
        LocalTraining.chosen(options, asked),
        preset.weights,
        correction,
        preset.alone,
        preset.joint,
        compress,
    )


def grouped(methods: Iterable[Method]) -> list[list[Method]]:
    """Methods that share their task vectors together, in the order in which they are first named."""
    groups: list[list[Method]] = []
    for method in methods:
        alike = next((group for group in groups if method.learning == group[0].learning is not None), None)
        if alike is None:
            groups.append([method])
        else:
            alike.append(method)
    return groups


def owners(method: Method) -> frozenset[str]:
    """Whose options a method heeds."""
    own = {method.rule.name, "loop", *method.training.options}
    return frozenset(own | ({"correction"} if method.correction is not None else set()))


def check_owners(settings: Settings, methods: Iterable[Method]) -> None:
    """Refuses options that none of the methods heeds.

    Raises:
        ConfigError: naming the owner, and those there are.
    """
    known = frozenset().union(*(owners(method) for method in methods))
    for owner in settings:
        if owner not in known:
            hint = f"Add it with train = {owner!r}." if owner in OPTIONS else None
            raise ConfigError(
                "options of something that is not in use",
                got=f"{owner}.{next(iter(settings[owner]), '')}",
                wanted=" or ".join(f"{name}.OPTION" for name in sorted(known)),
                do=hint,
            )
