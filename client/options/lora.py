"""LoRA (arXiv 2106.09685) through peft: low-rank adapters are trained in place of matrix layers.

Adapters go to linear layers, Hugging Face's ``Conv1D`` and plain two-dimensional convolutions (one group, no
dilation, padding with zeros): those whose update is one product of two factors in peft. Left out are layers
whose weight has several names (tied weights, a module used twice), because the product would change all of
them, and subclasses, such as the output projection inside ``nn.MultiheadAttention``, whose ``forward`` may
never be called.

Everything without an adapter is frozen, but for parameters that ``full`` names, which have none either. Task-
private parameters that a site trains belong there. A pattern of ``full`` may match nothing. After the run the
model has its own modules again, with the products in their weights.

Where an adapter begins: B is zero, so the model starts as it is, and steps move the layer within the rows
of A. Random rows, as published, look at random directions of the input. The task vector then says nothing of
the inputs that its task has, and any two of them are nearly orthogonal, which merge rules take for tasks that
have nothing to do with each other. So by default A has the leading right singular vectors of the loss's
gradient for the whole weight, as in LoRA-GA (arXiv 2407.05000), over some of the task's examples.

Departures from LoRA-GA: B stays zero, where it has the left singular vectors and subtracts the product from
the weight, which here stays the base's. And A is scaled so that a step on B moves the layer as far as one on
the whole weight would at the same rate. AdamW's first steps have the size of the rate in every number, so its
rows have norm sqrt(N / R); steps of SGD are proportional to the gradient, so their rows have norm 1.

Legend of shape suffixes: M out rows, N in columns, R rank, Q directions that are looked for.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from math import sqrt
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedmerge.client.options.adapter import NAME, Adapter
from fedmerge.client.options.option import Option, Run
from fedmerge.common.config import listed
from fedmerge.common.errors import ConfigError
from fedmerge.common.layers import matches, stores_in_by_out
from fedmerge.common.taskvector import LayerUpdate, LowRank
from fedmerge.common.training import Lora

SPARE = 8
"""Directions that a randomised decomposition looks for beyond those that are wanted."""

ROUNDING = 1e-6
"""Singular values of a float32 matrix at or below this share of the largest are rounding."""


class LowRankAdaptation(Option):
    """Trains adapters, and merges them into the weights at the end, also when the run raises."""

    def __init__(self, run: Run, config: Lora) -> None:
        super().__init__(run)
        self._config = config
        self._updates: dict[str, LayerUpdate] = {}

    def __enter__(self) -> Self:
        """Puts the adapters in; B is zero, and torch's global generator is used for A.

        Raises:
            ConfigError: peft is missing, or a pattern of ``targets`` matches no layer that can have one.
            NonFinite: the loss or its gradient is NaN or infinite.
        """
        full = listed(self._config.full)
        whole = {name: p for name, p in self.run.trained.items() if matches(name, full)}
        self._modules = self._chosen(whole)
        begins = self._leading_inputs() if self._config.init == "gradient" else {}
        try:
            self._inject()
            for name, inputs_RN in begins.items():
                self.run.adapters[name].begin_with(inputs_RN)
        except BaseException:
            self._take_out()
            raise
        self._train_only(whole)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._take_out()
        with torch.no_grad():
            for name, adapter in self.run.adapters.items():
                left_MR, right_RN = adapter.factors()
                weight: Any = adapter.layer.weight
                weight.add_((left_MR @ right_RN).reshape(weight.shape))
                self._updates[name] = LowRank(_sent(left_MR), _sent(right_RN), tuple(weight.shape))

    def updates(self) -> Mapping[str, LayerUpdate]:
        """The products, as factors; float32, on the CPU."""
        return self._updates

    def _chosen(self, whole: Collection[str]) -> dict[str, nn.Module]:
        """The modules that get an adapter, by path."""
        possible = {
            name: module
            for name, module in _adaptable(self.run.model).items()
            if name in self.run.trained and name not in whole
        }
        patterns = listed(self._config.targets) or ("*",)
        for pattern in patterns:
            if not any(matches(name, (pattern,)) for name in possible):
                raise ConfigError(
                    "no layer can have a LoRA adapter",
                    got=f"targets {pattern!r}",
                    wanted="patterns of trained linear layers' weights, such as '*.query.weight'",
                )
        return {
            name.removesuffix(".weight"): module
            for name, module in possible.items()
            if matches(name, patterns)
        }

    def _leading_inputs(self) -> dict[str, Tensor]:
        """By layer, the input directions (R, N) along which a step on the whole weight would lower the loss
        most; fewer, or none, where the loss does not depend on so many."""
        layers = {f"{path}.weight": module for path, module in self._modules.items()}
        rank, adaptive = self._config.rank, self.run.config.optimizer == "adamw"
        found = {}
        for name, gradient in self.run.gradients(layers).items():
            gradient_MN = gradient.T if stores_in_by_out(layers[name]) else gradient.flatten(1)
            inputs_RN = _leading(gradient_MN, rank)
            found[name] = inputs_RN * (sqrt(inputs_RN.shape[1] / rank) if adaptive else 1.0)
        return found

    def _inject(self) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ConfigError("LoRA needs peft", do="pip install peft") from error
        settings = LoraConfig(
            r=self._config.rank,
            lora_alpha=self._config.alpha or self._config.rank,  # type: ignore[arg-type]  # any float works
            lora_dropout=self._config.dropout,
            target_modules="|".join(map(re.escape, self._modules)),
        )
        with warnings.catch_warnings():  # it sets fan_in_fan_out layer by layer, and says so every time
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            inject_adapter_in_model(settings, self.run.model, adapter_name=NAME)
        for path in self._modules:
            self.run.adapters[f"{path}.weight"] = Adapter(self.run.model.get_submodule(path))

    def _train_only(self, whole: Mapping[str, nn.Parameter]) -> None:
        """Freezes everything but the adapters and these parameters, which keep their names."""
        run = self.run
        adapters = {name: p for name, p in run.model.named_parameters() if f".{NAME}." in name}
        run.model.requires_grad_(False)
        run.trained = {**whole, **adapters}
        for parameter in run.trained.values():
            parameter.requires_grad_()
        run.start = {name: run.start[name] for name in whole}

    def _take_out(self) -> None:
        """The model's own modules again, in their places."""
        for path, module in self._modules.items():
            parent, _, leaf = path.rpartition(".")
            setattr(self.run.model.get_submodule(parent), leaf, module)
        vars(self.run.model).pop("peft_config", None)


def _leading(gradient_MN: Tensor, rank: int) -> Tensor:
    """The leading right singular vectors as rows, at most ``rank``, and none that rounding has made."""
    most = min(gradient_MN.shape)
    _, values_Q, right_NQ = torch.svd_lowrank(gradient_MN.float(), q=min(rank + SPARE, most), niter=4)
    count = int((values_Q[:rank] > ROUNDING * values_Q[0]).sum())
    return right_NQ[:, :count].T


def _sent(factor: Tensor) -> Tensor:
    return factor.detach().float().cpu().contiguous()


def _adaptable(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may have an adapter, by their weight's name."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if path and _supported(module) and uses[id(module.weight)] == 1
    }


def _supported(module: nn.Module) -> bool:
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros" and set(module.dilation) == {1}
    return type(module) is nn.Linear or stores_in_by_out(module)
