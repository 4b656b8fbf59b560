"""Layers of a base model: their names, shapes, dtypes and how each one takes part in merging.

A layer is one named parameter. Its kind is decided once, when the base is registered:

- *matrix*: weights of linear and convolution layers, projected by rules that project. Seen as
  ``(out, in * kernel)``.
- *vector*: biases, norms, embeddings and everything else that is trained; summed or averaged.
- *private*: task heads, named by pattern; they never leave the site.
- *constant*: integer and boolean buffers; copied from the base, never merged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor, nn

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

EMBEDDING_NAME = re.compile(r"(^|[._])(embed|wte|wpe|shared\.weight$|class_embedding|positional)")


class LayerKind(StrEnum):
    MATRIX = "matrix"
    VECTOR = "vector"
    PRIVATE = "private"
    CONSTANT = "constant"


@dataclass(frozen=True)
class LayerSpec:
    """One named parameter of the base: shape and dtype as stored there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: LayerKind

    @property
    def merged(self) -> bool:
        """Whether task vectors carry this layer."""
        return self.kind in (LayerKind.MATRIX, LayerKind.VECTOR)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(M, N)`` as rules see it: ``(out, in * kernel)`` of a matrix, ``(1, numel)`` of a vector."""
        if self.kind is LayerKind.MATRIX:
            return self.shape[0], prod(self.shape[1:])
        return 1, prod(self.shape)


def short_dtype(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def describe(shape: Iterable[int], dtype: torch.dtype) -> str:
    """``(768, 512) float16``: how errors show a tensor."""
    return f"{tuple(shape)} {short_dtype(dtype)}"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a layer's name matches one of the shell-style patterns (``classifier.*``)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def kinds_from_model(model: nn.Module, private: Iterable[str] = ()) -> dict[str, LayerKind]:
    """Kind of every entry of ``model.state_dict()``, read off the modules that own them.

    Linear, convolution (also transposed), attention input projections and Hugging Face's ``Conv1D``
    weights are matrices. A tensor shared by several names keeps the kind of its first name; the other
    names are left out, as ``save_pretrained`` leaves them out.
    """
    private = tuple(private)
    matrices = {
        f"{path}.{leaf}" if path else leaf
        for path, module in model.named_modules()
        for leaf in _matrix_leaves(module)
    }
    tensors = model.state_dict()
    repeated = shared_names(tensors)
    return {
        name: _kind(name, tensor.dtype, name in matrices, private)
        for name, tensor in tensors.items()
        if name not in repeated
    }


def shared_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Later names of tensors that lie on the same memory with the same shape, to the first name."""
    first: dict[tuple[object, ...], str] = {}
    repeated: dict[str, str] = {}
    for name, tensor in tensors.items():
        where = (tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.dtype)
        if tensor.data_ptr() and first.setdefault(where, name) != name:
            repeated[name] = first[where]
    return repeated


def stores_in_by_out(module: nn.Module) -> bool:
    """Whether it is Hugging Face's ``Conv1D``: a linear layer with weights (in, out)."""
    return type(module).__name__ == "Conv1D"


def kinds_from_shapes(
    layers: Mapping[str, tuple[tuple[int, ...], torch.dtype]], private: Iterable[str] = ()
) -> dict[str, LayerKind]:
    """Kind of every layer when only names, shapes and dtypes are known.

    Two and more dimensions make a matrix, except where the name looks like an embedding.
    """
    private = tuple(private)
    return {
        name: _kind(name, dtype, len(shape) >= 2 and not EMBEDDING_NAME.search(name.lower()), private)
        for name, (shape, dtype) in layers.items()
    }


def _kind(name: str, dtype: torch.dtype, matrix: bool, private: tuple[str, ...]) -> LayerKind:
    if matches(name, private):
        return LayerKind.PRIVATE
    if not (dtype.is_floating_point or dtype.is_complex):
        return LayerKind.CONSTANT
    return LayerKind.MATRIX if matrix else LayerKind.VECTOR


def _matrix_leaves(module: nn.Module) -> tuple[str, ...]:
    plain = (nn.Linear, nn.modules.conv._ConvNd)
    if isinstance(module, plain) or stores_in_by_out(module):
        return ("weight",)
    if isinstance(module, nn.MultiheadAttention):
        return ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return ()
