"""Statistics: what a site may send beside its task vector, because a merge rule needs it.

All of them are per layer and float32. Sketches are sums over local samples, all others means, so that those
of several sites add up.

- ``input_gram``: ``G = mean of x x^T`` over the inputs x of a matrix layer, as a factor R (r, N) with
  ``R^T R = G`` and r from 1 to N, N the columns of :attr:`LayerSpec.matrix_shape`. Of an elementwise scale
  (the weight of a LayerNorm): the mean of its squared inputs, (numel,). Other layers have none. Layers that
  share one input share one Gram, which is held and sent once.
- ``fisher``: the diagonal of the empirical Fisher information at the fine-tuned weights, the layer's shape.
- ``second_moment``: AdamW's ``exp_avg_sq`` at the end of training, the layer's shape.
- ``sketch``: of the inputs A (N, rows) of a matrix layer, the part ``A - U U^T A`` outside the directions U
  that the server protects, times a random matrix that the site keeps to itself, (N, m).
- ``residual``: ``||A - U U^T A|| / ||A||`` from 0 to 1, or the ratio of squares, as the server asks; (1,).
  It comes with a sketch.

Legend of shape suffixes: M out rows, N in columns, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from math import isfinite, prod
from typing import TYPE_CHECKING

from torch import Tensor

from fedmerge.common.errors import BadStatistic, NonFinite, ShapeMismatch
from fedmerge.common.layers import shared_names

if TYPE_CHECKING:
    from fedmerge.common.taskvector import TaskVector

Shape = tuple[int, ...]

FLOAT32_BYTES = 4

MOST = 2.0**60
"""Most that a layer's values may sum up to, or the trace of its Gram. A million such, times weights of up to
2^40, stay within float32, so that no sum of finite statistics overflows."""


class Statistic(StrEnum):
    """Names of statistics, as rules ask for them and vector files list them."""

    INPUT_GRAM = "input_gram"
    FISHER = "fisher"
    SECOND_MOMENT = "second_moment"
    SKETCH = "sketch"
    RESIDUAL = "residual"


OF_INPUTS = frozenset({Statistic.INPUT_GRAM, Statistic.SKETCH, Statistic.RESIDUAL})
"""What only layers have whose inputs can be measured; every layer has the others."""

WIDEST = 8
"""Most columns of a sketch in multiples of its layer's."""


@dataclass(frozen=True)
class Statistics:
    """A task vector's statistics, each read when it is asked for.

    Called with a layer's name it gives that layer's statistics by name; none for a layer it does not know.

    Attributes:
        read: the statistics of a layer in ``shapes``.
        shapes: by layer, then statistic; known before anything is read.
        shared_input: layers that share the input Gram of another one, to that one.
        payload_bytes: in the file they come from; for others, as float32. A shared Gram counts once.
    """

    read: Callable[[str], Mapping[str, Tensor]]
    shapes: Mapping[str, Mapping[str, Shape]]
    shared_input: Mapping[str, str]
    payload_bytes: int

    @classmethod
    def of(cls, held: Mapping[str, Mapping[str, Tensor]]) -> Statistics:
        """Statistics in memory, by layer and name; layers that hold the same Gram tensor share it."""
        shapes = {
            layer: {name: tuple(values.shape) for name, values in found.items()}
            for layer, found in held.items()
        }
        grams = {
            layer: found[Statistic.INPUT_GRAM]
            for layer, found in held.items()
            if Statistic.INPUT_GRAM in found and found[Statistic.INPUT_GRAM].is_contiguous()
        }
        return cls.described(held.__getitem__, shapes, shared_names(grams))

    @classmethod
    def described(
        cls,
        read: Callable[[str], Mapping[str, Tensor]],
        shapes: Mapping[str, Mapping[str, Shape]],
        shared_input: Mapping[str, str],
    ) -> Statistics:
        """Statistics that are float32 wherever they lie."""
        found = cls(read, shapes, shared_input, 0)
        values = sum(prod(shapes[layer][name]) for layer, name in found.stored(shapes))
        return replace(found, payload_bytes=FLOAT32_BYTES * values)

    @classmethod
    def known(cls, read: Callable[[str], Mapping[str, Tensor]], layers: Iterable[str]) -> Statistics:
        """What a vector's ``statistics`` give for these layers; those of a plain function are all read."""
        if isinstance(read, Statistics):
            return read
        return cls.of({layer: found for layer in layers if (found := read(layer))})

    def __call__(self, layer: str) -> Mapping[str, Tensor]:
        return self.read(layer) if layer in self.shapes else {}

    def shared_among(self, layers: Iterable[str]) -> dict[str, str]:
        """Of these layers, those whose input Gram is that of an earlier one of them, to that one."""
        first: dict[str, str] = {}
        shared = {}
        for layer in layers:
            if Statistic.INPUT_GRAM in self.shapes.get(layer, {}):
                holder = first.setdefault(self.shared_input.get(layer, layer), layer)
                if holder != layer:
                    shared[layer] = holder
        return shared

    def stored(self, layers: Iterable[str]) -> list[tuple[str, str]]:
        """Layer and name of all that these layers have, a shared Gram with the first of its layers alone."""
        layers = tuple(layers)
        shared = self.shared_among(layers)
        return [
            (layer, name)
            for layer in layers
            for name in self.shapes.get(layer, {})
            if name != Statistic.INPUT_GRAM or layer not in shared
        ]

    def in_memory(self, layers: Iterable[str]) -> Statistics:
        """The statistics of these layers, all read; a shared Gram is held once."""
        layers = tuple(layers)
        shared = self.shared_among(layers)
        held: dict[str, dict[str, Tensor]] = {}
        for layer in layers:
            held[layer] = dict(self(layer))
            if layer in shared:
                held[layer][Statistic.INPUT_GRAM] = held[shared[layer]][Statistic.INPUT_GRAM]
        return Statistics.of(held)


def statistics_of(vector: TaskVector) -> Statistics:
    """A vector's statistics with their shapes."""
    return Statistics.known(vector.statistics, vector.names)


def is_factor(statistic: str, shape: Shape) -> bool:
    """Whether it is a factor of a Gram."""
    return statistic == Statistic.INPUT_GRAM and len(shape) == 2


def check_shape(
    statistic: str, shape: Shape, layer_shape: Shape, *, where: str, layer: str, matrix: bool | None = None
) -> None:
    """Refuses a statistic that does not fit its layer.

    Args:
        matrix: whether the layer is one; where that is not known, what any layer of the shape may have fits.

    Raises:
        ShapeMismatch: naming the layer, got and wanted.
    """
    numel, columns = prod(layer_shape), prod(layer_shape[1:])
    fits, wanted = shape == layer_shape, f"{layer_shape}"
    if statistic == Statistic.INPUT_GRAM:
        as_factor = len(shape) == 2 and 1 <= shape[0] <= shape[1] == columns
        fits = (as_factor and matrix is not False) or (shape == (numel,) and matrix is not True)
        wanted = f"(r, {columns}) with r from 1 to {columns} of a matrix, ({numel},) of another layer"
    elif statistic == Statistic.SKETCH:
        most = WIDEST * columns
        fits = matrix is not False and len(shape) == 2 and shape[0] == columns and 1 <= shape[1] <= most
        wanted = f"({columns}, m) with m from 1 to {most}, of a matrix alone"
    elif statistic == Statistic.RESIDUAL:
        fits, wanted = matrix is not False and shape == (1,), "(1,), of a matrix alone"
    if not fits:
        raise ShapeMismatch(
            f"{statistic} of a shape that does not fit the layer",
            where=where,
            layer=layer,
            got=shape,
            wanted=wanted,
        )


def check_values(statistic: str, shape: Shape, blocks: Iterable[Tensor], *, where: str, layer: str) -> None:
    """Refuses values that no data can give.

    Factors of Grams and sketches may have any sign, and their squares are summed; everything else is squares
    itself, or a ratio.

    Args:
        shape: of the statistic; ``blocks``: its values in float32, in any number of pieces.

    Raises:
        NonFinite: NaN or infinities. BadStatistic: negative where squares are meant, or larger than ``MOST``;
            a ratio above 1.
    """
    signed = is_factor(statistic, shape) or statistic == Statistic.SKETCH
    most = 1.0 if statistic == Statistic.RESIDUAL else MOST
    total, lowest = 0.0, 0.0
    for values in blocks:
        wide = values.double().flatten()
        total += float(wide.dot(wide) if signed else wide.sum())
        lowest = min(lowest, float(wide.min()) if wide.numel() else 0.0)
    if not isfinite(total):
        raise NonFinite(
            f"{statistic} with values that are not finite in float32", where=where, layer=layer, wanted="none"
        )
    if lowest < 0 and not signed:
        raise BadStatistic(f"{statistic} with negative values", where=where, layer=layer, wanted="squares")
    if total > most:
        raise BadStatistic(
            f"{statistic} with a sum that is too large",
            where=where,
            layer=layer,
            got=f"{total:.1e}",
            wanted=f"at most {most:.1e}",
        )
