"""Local steps orthogonal to the input directions that the server protects (FOT, arXiv 2309.01289).

With the orthonormal columns U of a layer, ``D <- D - D U U^T``: on inputs within the span of U the layer
keeps its outputs at every step. Departure: the paper trains freely at the sites and projects the aggregate at
the server. There, a site's steps within the span are lost; here they are never made, and the aggregate of
such updates needs no projection. Before the server has protected anything, training is plain.

Legend of shape suffixes: M out rows, N in columns, K protected directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from fedmerge.client.options.matrices import matrices, orthonormal
from fedmerge.client.options.option import Run
from fedmerge.client.options.projected import Projected, Projection
from fedmerge.common.errors import ShapeMismatch
from fedmerge.common.training import Project


class ProtectedInputs(Projected):
    """Keeps what trained matrix layers make of the directions in ``run.bases``."""

    def __init__(self, run: Run, config: Project) -> None:
        super().__init__(run)

    def projections(self) -> Mapping[str, Projection]:
        """Of the layers that are trained and have a basis.

        Raises:
            ShapeMismatch: a basis that is not (N, K) with K at most N.
        """
        found = {}
        for name, weight in matrices(self.run).items():
            if name in self.run.bases:
                basis = self.run.bases[name]
                _check(name, basis, weight.flatten(1).shape[1])
                found[name] = partial(_without, orthonormal(basis).to(weight))
        return found


def _without(basis_NK: Tensor, moved_MN: Tensor) -> Tensor:
    return moved_MN - (moved_MN @ basis_NK) @ basis_NK.T


def _check(name: str, basis: Tensor, columns: int) -> None:
    if basis.dim() != 2 or basis.shape[0] != columns or basis.shape[1] > columns:
        raise ShapeMismatch(
            "a basis of protected directions that does not fit",
            layer=name,
            got=tuple(basis.shape),
            wanted=f"({columns}, at most {columns})",
        )
