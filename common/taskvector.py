"""Task vectors: fine-tuned minus origin weights, layer by layer.

Numbers. Task vectors are float32 whatever they were made from:

- float16, bfloat16 and float32 widen to float32 exactly and are subtracted there, one rounding;
  if either side is float64 both are subtracted in float64 and the difference is rounded once.
- A fine-tuned tensor stored narrower than the base (bfloat16 beside float32) is compared with the
  base rounded to the narrower type, so that an untouched weight gives exactly zero.
- A difference that overflows float32 is refused, as are NaN and infinities.
- :meth:`TaskVector.apply` adds in float32 (float64 for a float64 base) and rounds once to the base's dtype.

Legend of shape suffixes: M out rows, N in columns, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import fsum, sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmerge.common.checkpoint import Checkpoint, open_checkpoint
from fedmerge.common.errors import DtypeMismatch, MissingLayer, NonFinite, ShapeMismatch, UnknownLayer
from fedmerge.common.layers import FLOAT_DTYPES, LayerSpec, describe, matches, short_dtype
from fedmerge.common.statistics import Statistics

if TYPE_CHECKING:
    from fedmerge.common.base import Base


@dataclass(frozen=True)
class Dense:
    """One layer's difference as a tensor of the layer's own shape, float32."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    def to_dense(self) -> Tensor:
        return self.values

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.values,)

    def sum_of_squares(self) -> float:
        """||D||_F^2, summed in float64."""
        return float(torch.linalg.vector_norm(self.values, dtype=torch.float64)) ** 2

    def times(self, factor: float) -> Dense:
        return Dense(self.values * factor)


@dataclass(frozen=True)
class LowRank:
    """One layer's difference as ``left_MR @ right_RN``, float32, for a layer of ``shape``.

    ``M = shape[0]`` and ``N`` is the product of the other dimensions, so a convolution's product is
    reshaped to ``(out, in, *kernel)``.
    """

    left_MR: Tensor
    right_RN: Tensor
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.left_MR.shape[1]

    def to_dense(self) -> Tensor:
        return (self.left_MR @ self.right_RN).reshape(self.shape)

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.left_MR, self.right_RN)

    def sum_of_squares(self) -> float:
        """||left @ right||_F^2 in float64, from the R x R Grams or from the product, whichever is smaller."""
        left, right = self.left_MR.double(), self.right_RN.double()
        if self.rank > min(left.shape[0], right.shape[1]):
            return float((left @ right).square().sum())
        return max(float(((left.T @ left) * (right @ right.T)).sum()), 0.0)

    def times(self, factor: float) -> LowRank:
        return LowRank(self.left_MR * factor, self.right_RN, self.shape)


LayerUpdate = Dense | LowRank


@dataclass(frozen=True)
class Manifest:
    """What a task vector says about itself.

    Attributes:
        base: fingerprint of the base it was measured from, 64 hex digits; empty if unknown.
        origin_version: the version fine-tuning started from; 0 is the base.
        task: the task's name; ``site``: the site's name.
        examples: training examples behind it, at least 1.
        statistics: names of the extra sums that come with it.
    """

    base: str = ""
    origin_version: int = 0
    task: str = ""
    site: str = ""
    examples: int = 1
    statistics: tuple[str, ...] = ()


def no_statistics(layer: str) -> Mapping[str, Tensor]:
    """What a vector without statistics says of any layer."""
    return {}


@dataclass(frozen=True)
class TaskVector:
    """Differences by layer name, each read when it is asked for.

    Layers in ``unchanged`` are known to be zero and are not stored: frozen embeddings, or everything
    an adapter does not touch. ``label`` names the source in messages. ``shapes`` tells the layers' shapes
    before any is read; a layer missing there tells its shape when it is read. ``statistics`` gives what else
    the site measured of a layer, by the names in :class:`~fedmerge.common.statistics.Statistic`. ``id`` is
    the update's, once it has one.
    """

    names: tuple[str, ...]
    read: Callable[[str], LayerUpdate]
    unchanged: tuple[str, ...] = ()
    manifest: Manifest = field(default_factory=Manifest)
    label: str = "task vector"
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    statistics: Callable[[str], Mapping[str, Tensor]] = no_statistics
    id: str = ""

    @classmethod
    def of(
        cls,
        layers: Mapping[str, LayerUpdate | Tensor],
        unchanged: Iterable[str] = (),
        manifest: Manifest | None = None,
        label: str = "task vector",
    ) -> TaskVector:
        """A task vector over layers already in memory."""
        held = {name: Dense(u.float()) if isinstance(u, Tensor) else u for name, u in layers.items()}
        shapes = {name: update.shape for name, update in held.items()}
        return cls(tuple(held), held.__getitem__, tuple(unchanged), manifest or Manifest(), label, shapes)

    @classmethod
    def from_checkpoints(
        cls,
        base: Base,
        tuned: Path | str | Mapping[str, Tensor] | Checkpoint,
        *,
        manifest: Manifest | None = None,
        frozen: Iterable[str] = (),
        private: Iterable[str] = (),
    ) -> TaskVector:
        """Fine-tuned minus base, for every merged layer of the base.

        Names, shapes and dtypes are compared at once; tensors are read and subtracted on demand.

        Args:
            base: the registered base.
            tuned: a state dict, file or folder with the base's layers. Private layers may be missing.
            manifest: examples, task and site; the base's fingerprint is filled in if empty there.
            frozen: shell-style patterns of layers known to be untouched; they are not sent.
            private: patterns of extra layers in ``tuned`` to leave out, such as a task's own head.

        Raises:
            MissingLayer, UnknownLayer, ShapeMismatch, DtypeMismatch: naming file, layer, got, wanted.
            NonFinite: when the offending layer is read.
        """
        tuned = open_checkpoint(tuned)
        check_layout(base, tuned, private=tuple(private))
        frozen = tuple(frozen)
        changed = tuple(name for name in base.merged_layers if not matches(name, frozen))
        unchanged = tuple(name for name in base.merged_layers if matches(name, frozen))

        def read(name: str) -> LayerUpdate:
            return Dense(subtract(tuned.read(name), base.read(name), where=tuned.label, layer=name))

        shapes = {name: base.layers[name].shape for name in changed}
        return cls(changed, read, unchanged, measured_from(base, manifest), tuned.label, shapes)

    def items(self) -> Iterator[tuple[str, LayerUpdate]]:
        """Layers in order, one in memory at a time."""
        return ((name, self.read(name)) for name in self.names)

    def apply(self, base: Base, scale: float = 1.0) -> Iterator[tuple[str, Tensor]]:
        """``base + scale * task vector`` for every tensor of the base, in the base's names and dtypes."""
        mine = frozenset(self.names)
        for name in base.layers:
            origin = base.read(name)
            yield name, add(origin, self.read(name), scale) if name in mine else origin

    def norm(self) -> float:
        """||tau||_2 over all layers as if concatenated, in float64."""
        return sqrt(fsum(update.sum_of_squares() for _, update in self.items()))

    def in_memory(self) -> TaskVector:
        """The same vector with every layer and its statistics read."""
        held = TaskVector.of(dict(self.items()), self.unchanged, self.manifest, self.label)
        return replace(held, statistics=Statistics.known(self.statistics, self.names).in_memory(self.names))


def measured_from(base: Base, manifest: Manifest | None) -> Manifest:
    """The manifest with the base's fingerprint filled in where it is empty."""
    manifest = manifest or Manifest()
    return manifest if manifest.base else replace(manifest, base=base.fingerprint)


def subtract(tuned: Tensor, origin: Tensor, *, where: str, layer: str) -> Tensor:
    """``tuned - origin`` by the rules of this module, float32, finite, on the origin's device."""
    tuned = tuned.to(origin.device)
    if _bits(tuned) < _bits(origin):
        origin = origin.to(tuned.dtype)
    wide = torch.float64 if torch.float64 in (tuned.dtype, origin.dtype) else torch.float32
    difference = (tuned.to(wide) - origin.to(wide)).float()
    require_finite(difference, where=where, layer=layer)
    return difference


def add(origin: Tensor, update: LayerUpdate, scale: float = 1.0) -> Tensor:
    """``origin + scale * update`` in float32 (float64 for a float64 origin), rounded once."""
    wide = torch.float64 if origin.dtype is torch.float64 else torch.float32
    dense = update.to_dense().reshape(origin.shape)
    return torch.add(origin.to(wide), dense.to(wide), alpha=scale).to(origin.dtype)


def require_finite(values: Tensor, *, where: str, layer: str) -> None:
    """Refuses NaN and infinities; one pass, no copy of the tensor."""
    if values.numel() and not bool(torch.isfinite(values.sum(dtype=torch.float64)).item()):
        count = int((~torch.isfinite(values)).sum())
        if count:
            raise NonFinite(
                "values that are not finite in float32",
                where=where,
                layer=layer,
                got=f"{count} of {values.numel()}",
                wanted="none",
                do="Look for a diverged loss or a float16 overflow in the training run.",
            )


def require_mergeable(update: LayerUpdate, *, where: str, layer: str) -> None:
    """Refuses NaN and infinities, and factors whose product could overflow float32 on the way.

    Every partial sum of ``left @ right`` is at most ``||left||_F * ||right||_F`` in absolute value.
    """
    for tensor in update.tensors():
        require_finite(tensor, where=where, layer=layer)
    if isinstance(update, LowRank):
        left, right = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in update.tensors())
        if float(left) * float(right) > torch.finfo(torch.float32).max:
            raise NonFinite(
                "factors whose product may overflow float32",
                where=where,
                layer=layer,
                wanted="a product of norms within float32",
            )


def check_layout(base: Base, tuned: Checkpoint, *, private: tuple[str, ...] = ()) -> None:
    """Compares names, shapes and dtypes of a checkpoint with the base; reads no tensor.

    A further name of a tied tensor passes if any of its names is the base's.
    """
    known = {tuned.shared.get(name, name) for name in base.layers}
    for name in tuned.layout:
        if tuned.shared.get(name, name) not in known and not matches(name, private):
            raise UnknownLayer(
                "not a layer of the base",
                where=tuned.label,
                layer=name,
                got=describe(*tuned.layout[name]),
                wanted=nearest(name, base.layers),
                do="Rename it, or name it as private if it is a task head.",
            )
    for name, layer in base.merged_layers.items():
        if name not in tuned.layout:
            raise MissingLayer(
                "a layer of the base is missing",
                where=tuned.label,
                layer=name,
                wanted=describe(layer.shape, layer.dtype),
            )
        check_tensor(layer, *tuned.layout[name], where=tuned.label)


def check_tensor(layer: LayerSpec, shape: tuple[int, ...], dtype: torch.dtype, *, where: str) -> None:
    """Refuses a shape other than the layer's and a dtype that cannot be merged."""
    got, wanted = describe(shape, dtype), describe(layer.shape, layer.dtype)
    if tuple(shape) != layer.shape:
        hint = "It looks transposed." if tuple(shape) == layer.shape[::-1] else None
        raise ShapeMismatch(
            "another shape than the base's", where=where, layer=layer.name, got=got, wanted=wanted, do=hint
        )
    if dtype not in FLOAT_DTYPES:
        raise DtypeMismatch(
            "a dtype that cannot be merged",
            where=where,
            layer=layer.name,
            got=got,
            wanted=" or ".join(short_dtype(d) for d in FLOAT_DTYPES),
        )


def nearest(name: str, known: Iterable[str]) -> str | None:
    """``perhaps 'encoder.bias'``: the known name most like this one, for messages."""
    from difflib import get_close_matches

    near = get_close_matches(name, list(known), n=1)
    return f"perhaps {near[0]!r}" if near else None


def _bits(tensor: Tensor) -> int:
    return torch.finfo(tensor.dtype).bits
