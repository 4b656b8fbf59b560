"""LoRA (arXiv 2106.09685) through peft: low-rank adapters are trained in place of matrix layers.

Adapters go to linear layers, Hugging Face's ``Conv1D`` and plain two-dimensional convolutions (one group, no
dilation, padding with zeros): those whose update is one product of two factors in peft. Left out are layers
whose weight has several names (tied weights, a module used twice), because the product would change all of
them, and subclasses, such as the output projection inside ``nn.MultiheadAttention``, whose ``forward`` may
never be called.

Everything without an adapter is frozen, but for parameters that ``full`` names, which have none either. Task-
private parameters that a site trains belong there. A pattern of ``full`` may match nothing. After the run the
model has its own modules again, with the products in their weights.

Legend of shape suffixes: M out rows, N in columns, R rank.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
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


class LowRankAdaptation(Option):
    """Trains adapters, and merges them into the weights at the end, also when the run raises."""

    def __init__(self, run: Run, config: Lora) -> None:
        super().__init__(run)
        self._config = config
        self._updates: dict[str, LayerUpdate] = {}

    def __enter__(self) -> Self:
        """Puts the adapters in; B is zero, A is drawn by torch's global generator.

        Raises:
            ConfigError: peft is missing, or a pattern of ``targets`` matches no layer that can have one.
        """
        full = listed(self._config.full)
        whole = {name: p for name, p in self.run.trained.items() if matches(name, full)}
        self._modules = self._chosen(whole)
        try:
            self._inject()
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
