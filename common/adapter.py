"""PEFT LoRA adapters as low-rank task vectors, without importing peft.

What peft 0.21 merges into a layer is ``scale * B @ A`` (transposed for weights stored as (in, out) and for
embeddings), with scale ``alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilised LoRA (2312.03732). The
scale goes into the left factor. Whatever changes the base itself, or is not a plain product, is refused
with the reason.

Legend of shape suffixes: M out rows, N in columns, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, PositiveInt, ValidationError
from torch import Tensor

from fedmerge.common.base import Base
from fedmerge.common.checkpoint import Layout, read_json, tensor_reader
from fedmerge.common.errors import (
    BaseMismatch,
    DtypeMismatch,
    FileError,
    ShapeMismatch,
    UnknownLayer,
    UnsupportedAdapter,
)
from fedmerge.common.header import read_header
from fedmerge.common.layers import FLOAT_DTYPES, LayerSpec, describe, matches, short_dtype
from fedmerge.common.taskvector import (
    Dense,
    LayerUpdate,
    LowRank,
    Manifest,
    TaskVector,
    check_tensor,
    measured_from,
    nearest,
    require_mergeable,
    subtract,
)

Number = TypeVar("Number", int, float)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 10_000_000
MERGE_FIRST = "Merge it with peft (merge_and_unload) and submit the merged checkpoint."

HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""They set A and B only; all others subtract the first product from the base's weights."""

HARMLESS_SETTINGS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "peft_version",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_core",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "modules_to_save",
    }
)
"""They say where and how A and B were trained, not what is done with them."""

REFUSED_SETTINGS = {
    "use_dora": "DoRA rescales the base's weights",
    "lora_bias": "it changes biases",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it adapts bare parameters, such as stacked experts",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "megatron_config": "its layers are split over Megatron ranks",
    "alora_invocation_tokens": "it acts on some tokens only",
    "use_qalora": "it pools its inputs",
    "kasa_config": "it truncates the base's weights",
    "monteclora_config": "its weights are sampled",
    "arrow_config": "it routes between adapters",
    "use_bdlora": "its factors are block-diagonal",
}

LINEAR, EMBEDDING = ("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")
FACTOR = re.compile(rf"(.+)\.({'|'.join(map(re.escape, LINEAR + EMBEDDING))})")


class AdapterConfig(BaseModel):
    """What of ``adapter_config.json`` decides the product; other settings must be known to be harmless."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    peft_type: str
    r: PositiveInt = 8
    lora_alpha: FiniteFloat = 8.0
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    bias: str = "none"
    init_lora_weights: bool | str | None = True
    rank_pattern: dict[str, PositiveInt] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None

    def ranks(self, module: str) -> set[int]:
        """The ranks that a module may have, named as in the model that was adapted."""
        return _by_pattern(self.rank_pattern or {}, module, self.r)

    def alphas(self, module: str) -> set[float]:
        """The alphas that a module may have."""
        return _by_pattern(self.alpha_pattern or {}, module, self.lora_alpha)

    def scale(self, alpha: float, rank: int) -> float:
        """The factor before ``B @ A``."""
        return alpha / sqrt(rank) if self.use_rslora else alpha / rank


@dataclass(frozen=True)
class Adapter:
    """An adapter folder whose settings and header have passed; names are those of the adapted model.

    Attributes:
        factors: entries of A and B in the file, by module.
        whole: entry in the file of every parameter saved whole (``modules_to_save``).
        copies: entry with a copy of the base's own weights, by parameter; peft adds it for embeddings.
    """

    label: str
    config: AdapterConfig
    layout: Layout
    read: Callable[[str], Tensor]
    factors: Mapping[str, tuple[str, str]]
    whole: Mapping[str, str]
    copies: Mapping[str, str]


def open_adapter(
    folder: Path | str,
    base: Base,
    *,
    manifest: Manifest | None = None,
    private: Iterable[str] = (),
) -> TaskVector:
    """Opens a PEFT LoRA folder (``adapter_config.json`` and ``adapter_model.safetensors``).

    Adapted layers become low-rank, parameters saved whole (``modules_to_save``) become dense differences,
    and every other merged layer of the base is unchanged. Settings, names and shapes are checked at
    once; tensors are read when their layer is asked for.

    Args:
        folder: as written by peft's ``save_pretrained``.
        base: the model that was adapted, with its names or with one prefix more or less (``bert.``).
        manifest: examples, task and site; the base's fingerprint is filled in if empty there.
        private: patterns of parameters in the adapter to leave out, such as a task's own head. Private
            and constant layers of the base are left out in any case.

    Raises:
        UnsupportedAdapter: the weights are not a plain low-rank product, or are pickled.
        UnknownLayer: names that fit the base neither as they are nor with one prefix more or less.
        ShapeMismatch, DtypeMismatch: naming the layer, got and wanted.
        BaseMismatch: when read, if the adapter carries other base weights than the base's.
        FileError, UnsafeFile: unreadable files.
        NonFinite: when the offending layer is read.
    """
    adapter = _open(Path(folder))
    layer_of = _layers_by_name(adapter, base, tuple(private))
    updates = {
        layer.name: update
        for layer, update in (*_low_rank_updates(adapter, layer_of), *_whole_updates(adapter, layer_of, base))
        if layer.merged
    }
    _check_copies(adapter, layer_of, updates)
    names = tuple(name for name in base.merged_layers if name in updates)
    unchanged = tuple(name for name in base.merged_layers if name not in updates)
    shapes = {name: base.layers[name].shape for name in names}
    copy_of = {layer_of[name].name: key for name, key in adapter.copies.items() if name in layer_of}

    def read(name: str) -> LayerUpdate:
        if name in copy_of:
            _require_same_base(adapter, copy_of[name], base, name)
        return updates[name]()

    return TaskVector(names, read, unchanged, measured_from(base, manifest), adapter.label, shapes)


# Settings


def _open(folder: Path) -> Adapter:
    weights = folder / WEIGHTS
    if not weights.is_file() and (folder / "adapter_model.bin").is_file():
        raise UnsupportedAdapter(
            "only pickled weights (adapter_model.bin)",
            where=folder,
            wanted=WEIGHTS,
            do="Load it once with peft in a place you trust and save_pretrained it again.",
        )
    config = _config(folder)
    layout = read_header(weights).layout
    return Adapter(str(folder), config, layout, tensor_reader(weights), *_entries(layout, str(folder)))


def _config(folder: Path) -> AdapterConfig:
    path = folder / CONFIG
    try:
        config = AdapterConfig.model_validate(read_json(path, MAX_CONFIG_BYTES))
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise FileError(f"a malformed setting {key!r}", where=path, wanted=first["msg"]) from error
    for pattern in (*(config.rank_pattern or {}), *(config.alpha_pattern or {})):
        try:
            re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise FileError("not a regular expression", where=path, got=ascii(pattern[:80])) from error
    _refuse_unsupported(config, folder)
    return config


def _refuse_unsupported(config: AdapterConfig, folder: Path) -> None:
    reasons = []
    if config.peft_type != "LORA":
        reasons += [f"peft_type {config.peft_type[:40]!a}, only LORA is a plain product"]
    if config.bias != "none":
        reasons += [f"bias={config.bias[:40]!a}, it changes biases"]
    if config.init_lora_weights and config.init_lora_weights not in HARMLESS_INITS:
        reasons += [
            f"init_lora_weights={ascii(config.init_lora_weights)[:40]}, it is not known to keep the base"
        ]
    for key, value in (config.model_extra or {}).items():
        if value and key not in HARMLESS_SETTINGS:
            reasons += [f"{key[:40]!a}, {REFUSED_SETTINGS.get(key, 'a setting not known here')}"]
    if reasons:
        raise UnsupportedAdapter(
            "not a plain low-rank product", where=folder, got="; ".join(reasons[:4]), do=MERGE_FIRST
        )


def _by_pattern(by_pattern: Mapping[str, Number], module: str, default: Number) -> set[Number]:
    """The values of all patterns that match the end of the module's name, from a dot on, as in peft.

    peft trains with the first match and then saves its patterns sorted, so which was first is lost.
    """
    found = {value for pattern, value in by_pattern.items() if re.match(rf"(.*\.)?({pattern})$", module)}
    return found or {default}


# Names


def _entries(layout: Layout, label: str) -> tuple[dict[str, tuple[str, str]], dict[str, str], dict[str, str]]:
    """The file's entries, sorted into factors, parameters saved whole, and copies of the base's weights."""
    parts: dict[str, dict[str, str]] = {}
    rest: dict[str, str] = {}
    for key in layout:
        name = key.removeprefix("base_model.model.")
        if ".base_layer." in name and ".lora_" in name:
            raise UnsupportedAdapter(
                "an adapted MultiheadAttention, whose output projection peft merges twice",
                where=label,
                layer=key,
                do=MERGE_FIRST,
            )
        if factor := FACTOR.fullmatch(name):
            parts.setdefault(factor[1], {})[factor[2]] = key
        elif ".lora_" in name:
            raise UnsupportedAdapter("a tensor that is no factor", where=label, layer=key, do=MERGE_FIRST)
        else:
            rest[name] = key
    factors = {module: _pair(module, found, label) for module, found in parts.items()}
    copies = {name.replace(".base_layer.", "."): key for name, key in rest.items() if ".base_layer." in name}
    return factors, {name: key for name, key in rest.items() if ".base_layer." not in name}, copies


def _pair(module: str, found: Mapping[str, str], label: str) -> tuple[str, str]:
    for side_a, side_b in (LINEAR, EMBEDDING):
        if set(found) == {side_a, side_b}:
            return found[side_a], found[side_b]
    raise UnsupportedAdapter("not one pair of factors", where=label, layer=module, got=", ".join(found))


def _layers_by_name(adapter: Adapter, base: Base, private: tuple[str, ...]) -> dict[str, LayerSpec]:
    """The base's layer of every module and parameter in the adapter, but for those left out."""
    whole = [name for name in (*adapter.whole, *adapter.copies) if not matches(name, private)]
    parameters = {module: f"{module}.weight" for module in adapter.factors} | {name: name for name in whole}
    found = fit_names(parameters.values(), base.layers)
    if found is None:
        lost = next(parameter for parameter in parameters.values() if parameter not in base.layers)
        raise UnknownLayer(
            "not a layer of the base, nor do all names fit with just one prefix more or less",
            where=adapter.label,
            layer=lost,
            wanted=nearest(lost, base.layers),
            do="Register the model that was adapted as the base, or name it as private if it is a task head.",
        )
    return {name: base.layers[found[parameter]] for name, parameter in parameters.items()}


def fit_names(names: Iterable[str], known: Collection[str]) -> dict[str, str] | None:
    """The known name of every name.

    All names are taken as they are or, if that does not fit, with the one prefix (``bert.``) removed or
    added that makes all of them fit. None if there is no such prefix, or more than one.
    """
    names = tuple(names)
    if all(name in known for name in names):
        return {name: name for name in names}
    some = names[0]
    removed = {some[: i + 1] for i, char in enumerate(some) if char == "."}
    added = {name.removesuffix(some) for name in known if name.endswith("." + some)}
    tries = [{name: name.removeprefix(prefix) for name in names} for prefix in removed]
    tries += [{name: prefix + name for name in names} for prefix in added]
    fits = [found for found in tries if all(new != old and new in known for old, new in found.items())]
    return fits[0] if len(fits) == 1 else None


# Tensors


def _low_rank_updates(
    adapter: Adapter, layer_of: Mapping[str, LayerSpec]
) -> list[tuple[LayerSpec, Callable[[], LayerUpdate]]]:
    for module in adapter.factors:
        _check_factors(adapter, module, layer_of[module])
    turned = _transposed_modules(adapter, layer_of)
    return [
        (layer_of[module], partial(_read_low_rank, adapter, module, layer_of[module], module in turned))
        for module in adapter.factors
    ]


def _read_low_rank(adapter: Adapter, module: str, layer: LayerSpec, transposed: bool) -> LayerUpdate:
    a, b = (adapter.read(key).float() for key in adapter.factors[module])
    (alpha,) = adapter.config.alphas(module)
    scale = adapter.config.scale(alpha, rank=a.shape[0])
    a_RI, b_OR = a.flatten(1), b.flatten(1)
    left_MR, right_RN = (a_RI.T, b_OR.T) if transposed else (b_OR, a_RI)
    update = LowRank(left_MR * scale, right_RN.contiguous(), layer.shape)
    require_mergeable(update, where=adapter.label, layer=layer.name)
    return update


def _transposed_modules(adapter: Adapter, layer_of: Mapping[str, LayerSpec]) -> set[str]:
    """Modules whose base weight is stored as (in, out), the transpose of ``B @ A``.

    Embeddings always are. Other shapes tell by themselves, except squares: those follow
    ``fan_in_fan_out``, unless another layer's shape contradicts it (peft turns each layer by its class).
    """
    ways = {module: _ways(adapter, module, layer_of[module]) for module in adapter.factors}
    linear = {module for module in ways if not _is_embedding(adapter, module)}
    turned = adapter.config.fan_in_fan_out
    shown = {way for module in linear for way in ways[module] if len(ways[module]) == 1}
    for module in linear:
        if len(ways[module]) == 2 and (not turned) in shown:
            raise UnsupportedAdapter(
                "a square layer that may be stored either way",
                where=adapter.label,
                layer=layer_of[module].name,
                got=f"fan_in_fan_out={turned} beside layers stored the other way",
                do=MERGE_FIRST,
            )
    return {
        module for module, possible in ways.items() if possible == {True} or (len(possible) == 2 and turned)
    }


def _ways(adapter: Adapter, module: str, layer: LayerSpec) -> set[bool]:
    """Whether the product fits the layer as it is (False), transposed (True), or both."""
    shape_a, shape_b = (adapter.layout[key][0] for key in adapter.factors[module])
    as_it_is = not _is_embedding(adapter, module) and (shape_b[0], *shape_a[1:]) == layer.shape
    turned = len(shape_a) == 2 and (shape_a[1], shape_b[0]) == layer.shape
    if not (as_it_is or turned):
        raise ShapeMismatch(
            "factors that do not multiply to the layer's shape",
            where=adapter.label,
            layer=layer.name,
            got=f"A {shape_a} and B {shape_b}",
            wanted=layer.shape,
            do="It was adapted from another base, or is a grouped convolution, which cannot be merged.",
        )
    return {way for way, fits in ((False, as_it_is), (True, turned)) if fits}


def _check_factors(adapter: Adapter, module: str, layer: LayerSpec) -> None:
    """Refuses factors of dtypes that cannot be merged, of ranks other than told, or without one alpha."""
    (shape_a, dtype_a), (shape_b, dtype_b) = (adapter.layout[key] for key in adapter.factors[module])
    for shape, dtype in ((shape_a, dtype_a), (shape_b, dtype_b)):
        if dtype not in FLOAT_DTYPES:
            raise DtypeMismatch(
                "a dtype that cannot be merged",
                where=adapter.label,
                layer=layer.name,
                got=describe(shape, dtype),
                wanted=" or ".join(short_dtype(d) for d in FLOAT_DTYPES),
            )
    ranks, alphas = adapter.config.ranks(module), adapter.config.alphas(module)
    pointwise = (1,) * (len(shape_b) - 2)
    if len(shape_a) < 2 or shape_a[0] not in ranks or shape_b[1:] != (shape_a[0], *pointwise):
        raise ShapeMismatch(
            "factors of another rank than the settings say",
            where=adapter.label,
            layer=layer.name,
            got=f"A {shape_a} and B {shape_b}",
            wanted="rank " + " or ".join(map(str, sorted(ranks))),
            do="Grouped convolutions cannot be merged.",
        )
    if len(alphas) > 1:
        raise UnsupportedAdapter(
            "several patterns give this layer different alphas, and which came first is lost",
            where=adapter.label,
            layer=layer.name,
            got=", ".join(f"{alpha:g}" for alpha in sorted(alphas)),
            do=MERGE_FIRST,
        )


def _is_embedding(adapter: Adapter, module: str) -> bool:
    return adapter.factors[module][0].endswith(EMBEDDING[0])


def _whole_updates(
    adapter: Adapter, layer_of: Mapping[str, LayerSpec], base: Base
) -> list[tuple[LayerSpec, Callable[[], LayerUpdate]]]:
    updates: list[tuple[LayerSpec, Callable[[], LayerUpdate]]] = []
    adapted = {layer_of[module].name for module in adapter.factors}
    for name, key in adapter.whole.items():
        if name not in layer_of or not layer_of[name].merged:
            continue
        layer = layer_of[name]
        if layer.name in adapted:
            raise UnsupportedAdapter("both adapted and saved whole", where=adapter.label, layer=layer.name)
        check_tensor(layer, *adapter.layout[key], where=adapter.label)
        updates.append((layer, partial(_read_whole, adapter, key, base, layer.name)))
    return updates


def _read_whole(adapter: Adapter, key: str, base: Base, name: str) -> LayerUpdate:
    return Dense(subtract(adapter.read(key), base.read(name), where=adapter.label, layer=name))


def _check_copies(adapter: Adapter, layer_of: Mapping[str, LayerSpec], updates: Collection[str]) -> None:
    for name, key in adapter.copies.items():
        if name in layer_of and layer_of[name].merged:
            check_tensor(layer_of[name], *adapter.layout[key], where=adapter.label)
            if layer_of[name].name not in updates:
                raise UnsupportedAdapter(
                    "base weights of a layer not adapted", where=adapter.label, layer=key
                )


def _require_same_base(adapter: Adapter, key: str, base: Base, name: str) -> None:
    if subtract(adapter.read(key), base.read(name), where=adapter.label, layer=name).any():
        raise BaseMismatch(
            "the adapter carries other base weights than the base's",
            where=adapter.label,
            layer=name,
            do="Register the model that was adapted as the base.",
        )
