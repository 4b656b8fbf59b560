"""What the layers of a model see, by forward hooks, and its Grams summed over forward passes.

Of a matrix layer the rows x are the inputs that its weight multiplies, as :attr:`LayerSpec.matrix_shape`
lays out the columns:

- ``nn.Linear``: the input, every token a row.
- ``nn.Conv1d``, ``2d``, ``3d``: the unfolded patches, (in / groups * kernel) wide. The groups of a grouped
  convolution have inputs of their own but share the columns: their patches are pooled into one Gram.
- ``nn.MultiheadAttention``: the query of self-attention, where query, key and value are one tensor; or each
  of them for the three projections that differ in width. Cross-attention through one packed projection has
  none, and neither has the output projection: torch computes both in one call that no hook sees into.

Of an elementwise scale (LayerNorm, RMSNorm, GroupNorm and BatchNorm of ``torch.nn``) the rows are the
normalised inputs, of which only the mean square of each element is kept; BatchNorm normalises by its running
statistics, as it does in evaluation mode.

Left out: embeddings and biases, which multiply no input; transposed convolutions, whose input is not what a
row of the weight multiplies; Hugging Face's ``Conv1D``, whose weight is stored as (in, out), so that the
Gram's side is that of the rows; and modules whose class has a forward of its own, because what reaches the
weight there is not known.

Legend of shape suffixes: R rows, N in columns, K kept rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import require_finite

Rows = Callable[[Tensor], Tensor]
"""A module's input to the rows (R, N) that its weight multiplies."""


@dataclass(frozen=True, eq=False)
class Gram:
    """``sum of x x^T`` over rows x: the rows themselves while they are fewer than N, the matrix from then on.

    In float32, as the model computes; factorised in float64.
    """

    count: int = 0
    rows: tuple[Tensor, ...] = ()
    gram_NN: Tensor | None = None

    def plus(self, x_RN: Tensor) -> Gram:
        """The sum with more rows, which are copied: a model may go on to change its input in place."""
        count = self.count + len(x_RN)
        if self.gram_NN is not None:
            return Gram(count, (), torch.addmm(self.gram_NN, x_RN.T, x_RN))
        rows = (*self.rows, x_RN.clone())
        if count < x_RN.shape[1]:
            return Gram(count, rows)
        stacked_RN = torch.cat(rows)
        return Gram(count, (), stacked_RN.T @ stacked_RN)

    def mean(self, energy: float, where: str, layer: str) -> Tensor:
        """``factor_KN`` with ``factor^T factor`` = the mean of x x^T over the rows, up to ``energy``.

        The fewest eigenvectors, times the roots of their eigenvalues, that have at least this share of
        the trace; one at least. Costs the eigenvalues of a matrix of N or the number of rows, whichever is
        smaller.
        """
        held = torch.cat(self.rows) if self.gram_NN is None else self.gram_NN
        require_finite(held, where=where, layer=layer)
        if self.gram_NN is None:
            rows_RN = held.double() / sqrt(self.count)
            _, vectors_RK = _largest(rows_RN @ rows_RN.T, energy)
            factor_KN = vectors_RK.T @ rows_RN
        else:
            values_K, vectors_NK = _largest(held.double() / self.count, energy)
            factor_KN = values_K.sqrt()[:, None] * vectors_NK.T
        return factor_KN.float().contiguous().cpu()


@dataclass(frozen=True, eq=False)
class Squares:
    """``sum of x^2`` over rows x, elementwise, in float64."""

    count: int = 0
    total_N: Tensor | None = None

    def plus(self, x_RN: Tensor) -> Squares:
        total_N = x_RN.double().square().sum(dim=0)
        return Squares(self.count + len(x_RN), total_N if self.total_N is None else self.total_N + total_N)

    def mean(self, energy: float, where: str, layer: str) -> Tensor:
        """The mean square of every element, (N,), whatever the energy."""
        assert self.total_N is not None
        found = (self.total_N / self.count).float().cpu()
        require_finite(found, where=where, layer=layer)
        return found


def _largest(gram: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    """The fewest eigenvalues with this share of the trace, largest first, and their vectors as columns.

    At least one, and none that is lost in the rounding of float32.
    """
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    short = torch.cumsum(values, 0) < energy * values.sum()
    rank = int((values > torch.finfo(torch.float32).eps * values[0]).sum())
    kept = max(1, min(int(short.sum()) + 1, rank))
    return values[:kept], vectors[:, :kept]


@dataclass(frozen=True)
class Watch:
    """A layer under a hook.

    Attributes:
        layer: its name. ``rows``: what to make of its module's input.
        geometry: equal where two layers make the same rows of the same input.
    """

    layer: str
    rows: Rows
    geometry: Hashable


class Watcher(ABC):
    """Sees the inputs of a model's layers while it is watched.

    Args:
        layers: those that are watched, by name; layers whose inputs cannot be told are passed over.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LayerSpec]) -> None:
        self._model, self._layers = model, layers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches inside; removes the hooks afterwards, also when an error is raised."""
        names = {id(parameter): name for name, parameter in self._model.named_parameters()}
        handles = []
        with no_fused_attention():
            try:
                for module in self._model.modules():
                    if watched := self._watched(module, names):
                        hook = partial(self._see, watched)
                        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                yield
            finally:
                for handle in handles:
                    handle.remove()
                self.end_of_pass()

    def end_of_pass(self) -> None:
        """Lets go of the inputs of this pass."""
        return

    @abstractmethod
    def add(self, watch: Watch, given: Tensor) -> None:
        """Takes in what a layer's module was fed; without gradients."""

    def _watched(self, module: nn.Module, names: Mapping[int, str]) -> dict[str, Watch]:
        """The layers of a module that are measured, by the module's own name for them."""
        reader = READERS.get(getattr(type(module), "forward", None))
        if reader is None:
            return {}
        rows, geometry = reader(module)
        kind = LayerKind.VECTOR if reader is _of_norm else LayerKind.MATRIX
        watched = {}
        for leaf in LEAVES:
            layer = names.get(id(getattr(module, leaf, None)), "")
            if layer in self._layers and self._layers[layer].kind is kind:
                watched[leaf] = Watch(layer, rows, geometry)
        return watched

    @torch.no_grad()
    def _see(
        self, watched: dict[str, Watch], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        for leaf, given in _inputs(module, args, kwargs).items():
            if leaf in watched and given.numel():  # an expert may be called with no token
                self.add(watched[leaf], given)


class InputGrams(Watcher):
    """Sums the Grams of a model's layers while it is watched::

        grams = InputGrams(model, layers)
        with grams.watching():
            for batch in batches:
                model(batch)
                grams.end_of_pass()
        grams.means(energy)

    Layers that are fed the same tensor object in every pass share one sum, and one tensor of the result.

    Args:
        label: names the measurement in messages.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, LayerSpec], label: str) -> None:
        super().__init__(model, layers)
        self._label = label
        self._sums: dict[str, Gram | Squares] = {}
        self._seen: dict[Hashable, tuple[Gram | Squares, Tensor, Gram | Squares]] = {}

    def end_of_pass(self) -> None:
        self._seen.clear()

    def means(self, energy: float) -> dict[str, Tensor]:
        """By layer: a factor of the mean Gram, or mean squares; see :mod:`fedmerge.common.statistics`.

        Raises:
            NonFinite: an input was NaN or infinite.
        """
        done: dict[int, Tensor] = {}
        for layer, total in self._sums.items():
            if id(total) not in done:
                done[id(total)] = total.mean(energy, self._label, layer)
        return {layer: done[id(total)] for layer, total in self._sums.items()}

    def add(self, watch: Watch, given: Tensor) -> None:
        """Adds an input to a layer's sum, or takes over the sum of a layer that has just added the same."""
        before = self._sums.get(watch.layer) or _EMPTY[self._layers[watch.layer].kind]
        key = (id(before), id(given), given._version, watch.geometry)
        if key not in self._seen:
            after = before.plus(watch.rows(given.detach().float()))
            self._seen[key] = (before, given, after)  # held, so that no other object gets their ids
        self._sums[watch.layer] = self._seen[key][2]


LEAVES = ("weight", "in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_EMPTY: Mapping[LayerKind, Gram | Squares] = {LayerKind.MATRIX: Gram(), LayerKind.VECTOR: Squares()}


def _inputs(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """What each weight of a module multiplies in this call, by the module's own name for it."""
    if not isinstance(module, nn.MultiheadAttention):
        given, *_ = *args, *kwargs.values()  # RMSNorm calls it x, the others input
        return {"weight": given}
    query, key, value = (*args[:3], *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))
    if module.in_proj_weight is None:
        return {"q_proj_weight": query, "k_proj_weight": key, "v_proj_weight": value}
    return {"in_proj_weight": query} if query is key is value else {}


def _of_linear(module: nn.Module) -> tuple[Rows, Hashable]:
    return lambda x: x.reshape(-1, x.shape[-1]), None


def _of_convolution(module: nn.Module) -> tuple[Rows, Hashable]:
    assert isinstance(module, nn.modules.conv._ConvNd)
    shape = (module.kernel_size, module.stride, module.padding, module.dilation)
    return partial(patches, module), (*shape, module.groups, module.padding_mode)


def _of_norm(module: nn.Module) -> tuple[Rows, Hashable]:
    return partial(_normalised, module), id(module)


READERS: Mapping[object, Callable[[nn.Module], tuple[Rows, Hashable]]] = {
    nn.Linear.forward: _of_linear,
    nn.MultiheadAttention.forward: _of_linear,
    nn.Conv1d.forward: _of_convolution,
    nn.Conv2d.forward: _of_convolution,
    nn.Conv3d.forward: _of_convolution,
    nn.LayerNorm.forward: _of_norm,
    nn.RMSNorm.forward: _of_norm,
    nn.GroupNorm.forward: _of_norm,
    nn.modules.batchnorm._BatchNorm.forward: _of_norm,
}
"""By the function that a module's class calls, so that a class with a forward of its own has none."""


def patches(conv: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """What a convolution multiplies with its weight as (out, in / groups * kernel): one row per position,
    example and group.

    Args:
        x: (batch, in, *space), or (in, *space).
    """
    dims = len(conv.kernel_size)
    x = x if x.dim() == dims + 2 else x.unsqueeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(x, conv._reversed_padding_repeated_twice, mode)
    for dim, (size, stride, dilation) in enumerate(
        zip(conv.kernel_size, conv.stride, conv.dilation, strict=True), start=2
    ):
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    x = x.reshape(len(x), conv.groups, -1, *x.shape[2:])  # (batch, groups, in / groups, *positions, *kernel)
    return x.movedim(2, 2 + dims).flatten(2 + dims).flatten(0, 1 + dims)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    """What a norm multiplies with its scale: rows as wide as the scale has elements."""
    if isinstance(module, nn.LayerNorm):
        shape = module.normalized_shape
        return F.layer_norm(x, shape, eps=module.eps).reshape(-1, prod(shape))
    if isinstance(module, nn.RMSNorm):
        shape = module.normalized_shape
        return F.rms_norm(x, shape, eps=module.eps).reshape(-1, prod(shape))
    if isinstance(module, nn.GroupNorm):
        channels_second = F.group_norm(x, module.num_groups, eps=module.eps)
    else:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        mean, variance = (None if s is None else s.float() for s in (module.running_mean, module.running_var))
        channels_second = F.batch_norm(x, mean, variance, training=mean is None, eps=module.eps)
    return channels_second.movedim(1, -1).flatten(0, -2)


@contextmanager
def no_fused_attention() -> Iterator[None]:
    """torch's fused path for whole transformer layers calls no module inside, so no hook."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
