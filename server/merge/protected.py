"""A matrix layer whose later steps leave chosen input directions alone, and how those are chosen.

Legend: M out rows, N in columns, K protected directions, B room for them, R columns of a sample of inputs,
J directions that are added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import Self

import torch
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.server.merge.spectrum import rounding_floor, spectrum_of


@dataclass(frozen=True)
class Sample:
    """What is known of one task's inputs A (N, rows) to a layer.

    Attributes:
        mixed_NR: columns whose Gram matrix ``Y Y^T`` is that of the inputs, or of their residual
            ``A - U U^T A`` outside the protected directions U, in expectation or exactly, up to a factor.
        ratio: ``||A - U U^T A||_F / ||A||_F`` if ``mixed_NR`` is of the residual; 1 if of A itself.
    """

    mixed_NR: Tensor
    ratio: float


@dataclass(frozen=True)
class Protected:
    """The merged task vector of a matrix layer and the input directions that are protected.

    Attributes:
        merged_MN: float32.
        basis_NB: orthonormal columns, zero beyond the K that are in use; float32.
        energy_B: of each direction, its share of a task's input energy, summed over the tasks where it is
            known; above 0 where the direction is in use, else 0; float32.
        tasks: how many tasks have brought a sample, (1,) float32.
    """

    merged_MN: Tensor
    basis_NB: Tensor
    energy_B: Tensor
    tasks: Tensor

    @classmethod
    def zero(cls, layer: LayerSpec, room: int) -> Self:
        rows, columns = layer.matrix_shape
        return cls(torch.zeros(rows, columns), torch.zeros(columns, room), torch.zeros(room), torch.zeros(1))

    @property
    def basis_NK(self) -> Tensor:
        """The directions in use."""
        return self.basis_NB[:, : int(torch.count_nonzero(self.energy_B))]

    def sum_of_squares(self) -> float:
        return float(torch.linalg.vector_norm(self.merged_MN, dtype=torch.float64)) ** 2

    def outside(self, step_MN: Tensor) -> Tensor:
        """``D - D U U^T``: the step's part that says nothing to protected inputs."""
        basis_NK = self.basis_NK
        return torch.addmm(step_MN, step_MN @ basis_NK, basis_NK.T, alpha=-1)

    def seeing(self, sample: Sample, eps: float, squared: bool) -> Self:
        """One task on, with the directions that its inputs need for their share ``eps`` to be protected.

        With r the ratio of the residual to the inputs, those are the fewest leading left singular vectors of
        the residual whose share of its energy is above ``(r - (1 - eps)) / r``, one at least; none where
        the residual is rounding alone. Where there is no room for all, those of the most energy stay.

        Args:
            squared: r is a ratio of squared norms; ``sample.ratio`` too.
        """
        counted = replace(self, tasks=self.tasks + 1)
        basis_NK, seen_NR = self.basis_NK.double(), sample.mixed_NR.double()
        rest_NR = _outside(seen_NR, basis_NK)
        rest, seen = float(rest_NR.square().sum()), float(seen_NR.square().sum())
        found = spectrum_of(rest_NR).above(rounding_floor(seen_NR))
        if not found.rank or sample.ratio <= 0:
            return counted
        ratio = sample.ratio * (rest / seen if squared else sqrt(rest / seen))
        added = found.leading(_needed(found.values_K.square() / rest, ratio, eps))
        # Projected once more: rounding of U is large in the directions of a small residual.
        new_NJ = torch.linalg.qr(_outside(added.left_MK, basis_NK)).Q
        scale = (sample.ratio if squared else sample.ratio**2) / seen
        old_K = (basis_NK.T @ seen_NR).square().sum(dim=1)
        return counted._with(new_NJ, old_K * scale, added.values_K.square() * scale)

    def _with(self, new_NJ: Tensor, old_K: Tensor, new_J: Tensor) -> Self:
        """With more directions, and the energy that old and new ones have gained."""
        room, used = len(self.energy_B), len(old_K)
        least = torch.finfo(torch.float32).tiny
        energy = torch.cat([self.energy_B[:used] + old_K.float(), new_J.float().clamp_min(least)])
        basis_NC = torch.cat([self.basis_NB[:, :used], new_NJ.float()], dim=1)
        kept = energy.sort(descending=True, stable=True).indices[:room].sort().values
        return replace(
            self,
            basis_NB=_padded(basis_NC[:, kept], room),
            energy_B=_padded(energy[kept], room),
        )


def _needed(shares_K: Tensor, ratio: float, eps: float) -> int:
    """How many leading directions, of these shares of the residual's energy, to protect; 1 to all."""
    wanted = (ratio - (1 - eps)) / ratio
    return min(int((shares_K.cumsum(0) <= wanted).sum()) + 1, len(shares_K))


def _outside(values_NR: Tensor, basis_NK: Tensor) -> Tensor:
    """``Y - U U^T Y``."""
    return values_NR - basis_NK @ (basis_NK.T @ values_NR)


def _padded(values: Tensor, room: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, room - values.shape[-1]))
