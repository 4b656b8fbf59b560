"""Sketches of a model's inputs outside protected directions, for FOT (arXiv 2309.01289).

With A (N, rows) what a layer is fed over all training examples and U the directions that the server protects,
a site sends the sum ``(A - U U^T A) G`` and the ratio ``||A - U U^T A|| / ||A||``. G has one random row per
row of inputs, drawn when it is met and forgotten at once; no more of A is held than one forward pass.

G is what hides single inputs in the sketch, so it must stay with the site: unless a seed is given it comes
from the operating system's entropy, 128 bits of it.

Rows are as in :mod:`fedmerge.client.grams`. Layers that share an input have sketches of their own.

Legend of shape suffixes: R rows, N in columns, K protected directions, S columns of a sketch.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn

from fedmerge.client.grams import Watch, Watcher
from fedmerge.common.errors import ShapeMismatch
from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.statistics import Statistic
from fedmerge.common.taskvector import require_finite
from fedmerge.common.training import SketchSpec

MIXED_AT_A_TIME = 2**22
"""Random numbers in memory at a time: 16 MiB."""


class InputSketches(Watcher):
    """Sketches the inputs of a model's matrix layers while it is watched; use as :class:`InputGrams`.

    Args:
        spec: how. ``bases``: protected directions by layer, orthonormal columns (N, K); others have none.
        seed: of G; None draws what nobody can draw again. Sites with one seed would have one G.

    Raises:
        ShapeMismatch: a basis that does not fit its layer.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, LayerSpec],
        spec: SketchSpec,
        bases: Mapping[str, Tensor],
        seed: int | None,
        label: str,
    ) -> None:
        matrices = {name: layer for name, layer in layers.items() if layer.kind is LayerKind.MATRIX}
        super().__init__(model, matrices)
        self._spec, self._label = spec, label
        self._bases = {name: bases[name] for name in matrices if name in bases}
        for name, basis_NK in self._bases.items():
            _check_basis(basis_NK, matrices[name], label)
        self._random = np.random.default_rng(seed)
        self._sums: dict[str, _Sketch] = {}

    def add(self, watch: Watch, given: Tensor) -> None:
        rows_RN = watch.rows(given.detach().float())
        if watch.layer not in self._sums:
            columns = self._layers[watch.layer].matrix_shape[1]
            self._sums[watch.layer] = _Sketch(
                self._bases.get(watch.layer, torch.zeros(columns, 0)).to(rows_RN),
                rows_RN.new_zeros(columns, self._spec.columns(columns)),
            )
        sketch = self._sums[watch.layer]
        width = sketch.sum_NS.shape[1]
        for part_RN in torch.split(rows_RN, max(1, MIXED_AT_A_TIME // width)):
            sketch.add(part_RN, self._mixing(len(part_RN), width))

    def found(self) -> dict[str, dict[str, Tensor]]:
        """Sketch and residual of every layer that was fed; float32, on the CPU.

        Raises:
            NonFinite: an input was NaN or infinite.
        """
        found = {}
        for layer, sketch in self._sums.items():
            require_finite(sketch.sum_NS, where=self._label, layer=layer)
            ratio = sketch.ratio**2 if self._spec.squared else sketch.ratio
            found[layer] = {
                str(Statistic.SKETCH): sketch.sum_NS.cpu(),
                str(Statistic.RESIDUAL): torch.tensor([ratio]),
            }
        return found

    def _mixing(self, rows: int, columns: int) -> Tensor:
        """The next rows of G, (R, S)."""
        if self._spec.distribution == "normal":
            return torch.from_numpy(self._random.standard_normal((rows, columns), dtype=np.float32))
        return torch.from_numpy(self._random.random((rows, columns), dtype=np.float32)).mul_(2).sub_(1)


class _Sketch:
    """The sums over one layer's inputs, where the model computes.

    Attributes:
        ratio: ``||A - U U^T A|| / ||A||``, 0 to 1; 0 where all inputs are zero.
    """

    def __init__(self, basis_NK: Tensor, sum_NS: Tensor) -> None:
        self.basis_NK, self.sum_NS = basis_NK, sum_NS
        self._whole = self._outside = 0.0

    def add(self, rows_RN: Tensor, mixing_RS: Tensor) -> None:
        rest_RN = rows_RN - (rows_RN @ self.basis_NK) @ self.basis_NK.T
        self._whole += _square(rows_RN)
        self._outside += _square(rest_RN)
        self.sum_NS.addmm_(rest_RN.T, mixing_RS.to(rest_RN.device))

    @property
    def ratio(self) -> float:
        return min(sqrt(self._outside / self._whole), 1.0) if self._whole else 0.0


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _check_basis(basis_NK: Tensor, layer: LayerSpec, label: str) -> None:
    columns = layer.matrix_shape[1]
    if basis_NK.dim() != 2 or not len(basis_NK) == columns >= basis_NK.shape[1]:
        raise ShapeMismatch(
            "protected directions of a shape that does not fit the layer",
            where=label,
            layer=layer.name,
            got=tuple(basis_NK.shape),
            wanted=f"({columns}, K) with K at most {columns}",
        )
