"""The base: the pretrained weights everything is measured from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from fedmerge.common.checkpoint import Checkpoint, open_checkpoint, tensor_bytes
from fedmerge.common.errors import ConfigError, DtypeMismatch, UnknownLayer
from fedmerge.common.layers import (
    FLOAT_DTYPES,
    LayerKind,
    LayerSpec,
    kinds_from_model,
    kinds_from_shapes,
    short_dtype,
)


@dataclass(frozen=True)
class Base:
    """A registered base: its tensors, read lazily, and the kind of every layer.

    Kinds are decided when the base is registered and never change: from a model with
    :meth:`from_model`, from names and shapes with :meth:`from_checkpoint`.
    """

    checkpoint: Checkpoint
    layers: Mapping[str, LayerSpec]

    @classmethod
    def from_model(cls, model: nn.Module, private: Iterable[str] = ()) -> Base:
        """Registers a live model; its weights are copied, so later training does not touch the base.

        Args:
            model: the pretrained model.
            private: shell-style patterns of names that never leave a site (``classifier.*``).
        """
        kinds = kinds_from_model(model, private)
        tensors = {name: t.clone() for name, t in model.state_dict().items() if name in kinds}
        return cls._with_kinds(Checkpoint.of(tensors, type(model).__name__), kinds)

    @classmethod
    def from_checkpoint(
        cls,
        source: Path | str | Mapping[str, Tensor] | Checkpoint,
        kinds: Mapping[str, LayerKind] | None = None,
        private: Iterable[str] = (),
    ) -> Base:
        """Registers a checkpoint without its model class.

        Args:
            source: whatever :func:`open_checkpoint` opens. Of tied weights in a state dict the first
                name is kept, as :meth:`from_model` and ``save_pretrained`` do.
            kinds: overrides by layer name; the rest follows from names and shapes.
            private: shell-style patterns of private layers.

        Raises:
            UnknownLayer: ``kinds`` names a layer the checkpoint does not have.
            ConfigError: ``kinds`` calls a one-dimensional or integer tensor a matrix.
            DtypeMismatch: a layer is stored in a float type that cannot be merged, such as float8.
        """
        checkpoint = open_checkpoint(source)
        own = {name: held for name, held in checkpoint.layout.items() if name not in checkpoint.shared}
        decided = kinds_from_shapes(own, private)
        for name, kind in (kinds or {}).items():
            if name not in decided:
                raise UnknownLayer("no such layer to give a kind to", where=checkpoint.label, layer=name)
            shape, dtype = checkpoint.layout[name]
            if kind is LayerKind.MATRIX and len(shape) < 2:
                raise ConfigError(
                    "only tensors of two or more dimensions are matrices",
                    where=checkpoint.label,
                    layer=name,
                    got=shape,
                    do="Call it a vector.",
                )
            if kind in (LayerKind.MATRIX, LayerKind.VECTOR) and not dtype.is_floating_point:
                raise ConfigError(
                    "an integer tensor cannot be merged",
                    where=checkpoint.label,
                    layer=name,
                    got=short_dtype(dtype),
                    do="Call it constant.",
                )
            decided[name] = kind
        return cls._with_kinds(checkpoint, decided)

    @classmethod
    def _with_kinds(cls, checkpoint: Checkpoint, kinds: Mapping[str, LayerKind]) -> Base:
        layers = {name: LayerSpec(name, *checkpoint.layout[name], kind=kind) for name, kind in kinds.items()}
        for name, layer in layers.items():
            if layer.merged and layer.dtype not in FLOAT_DTYPES:
                raise DtypeMismatch(
                    "a float type that cannot be merged",
                    where=checkpoint.label,
                    layer=name,
                    got=short_dtype(layer.dtype),
                    wanted=" or ".join(short_dtype(d) for d in FLOAT_DTYPES),
                    do="Convert the checkpoint, or give the layer the kind constant to leave it as it is.",
                )
        return cls(checkpoint, layers)

    @cached_property
    def merged_layers(self) -> dict[str, LayerSpec]:
        """The layers that task vectors carry, in the base's order."""
        return {name: layer for name, layer in self.layers.items() if layer.merged}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over sorted names, shapes, dtypes and bytes of every merged layer, as 64 hex digits.

        Private layers and integer buffers do not count: heads differ between sites, and checkpoints
        keep buffers that live models do not have.

        The bytes are the little-endian values as stored, so one file, a sharded folder and a live
        model with the same weights have the same fingerprint. One tensor is in memory at a time.
        """
        digest = hashlib.sha256()
        for name in sorted(self.merged_layers):
            layer = self.layers[name]
            digest.update(json.dumps([name, list(layer.shape), short_dtype(layer.dtype)]).encode())
            digest.update(tensor_bytes(self.read(name)))
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """One tensor of the base, as stored."""
        return self.checkpoint.read(name)
