"""CoSO: steps in subspaces of gradients, orthogonal to those of earlier tasks (arXiv 2505.11816).

Of every trained matrix layer with gradient G, history H (orthonormal columns) and subspace P::

    P = leading left singular vectors of (I - H H^T) G       chosen anew every few steps
    R = P^T G,  W <- W - rate * P Adam(R)
    S <- frequent directions of [S, P R]                     see fedmerge.client.options.sketch
    H <- [H, leading directions of S]                        at the end of the task

``Adam(R)`` is the loop's own optimizer: it steps a stand-in Z (K, N) whose gradient is R and whose value is
zero between steps, and ``W <- W + P Z`` carries the step over. So learning rate, schedule, clipping (over R
beside the other parameters' gradients) and the choice of optimizer are those of the loop.

Departures and what the sources leave open:

- When P changes, the optimizer's moments are turned with it: with ``T = P_new^T P_old``, the first moment
  becomes ``T m`` and the second ``(T * T) v``, as if its elements were uncorrelated.
- Singular vectors are found by a randomised method in float64 (two power iterations), exact for small layers.
  Directions lost in the rounding of G are left out, so P may have fewer columns in use than ``rank``.
- W is not decayed: that would move it along H.
- Biases and other parameters that are no matrices train freely, and so does everything in a site's first task
  but for the rank of a step.

The history is that of the site's own earlier tasks. It is kept in the run's memory as ``coso/LAYER``, (M, J),
float32; J is at most M, and grows only by the last run of a task, if it ends without an error. Of a task's
rounds it is the last one's gradients that are remembered.

Legend of shape suffixes: M out rows, N in columns, K rank of the subspace, J columns of the history.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from fedmerge.client.options.matrices import matrices, orthonormal
from fedmerge.client.options.option import Option, Run
from fedmerge.client.options.sketch import FrequentDirections
from fedmerge.common.errors import ShapeMismatch
from fedmerge.common.training import Coso

OVERSAMPLE = 10
"""Columns beyond the rank with which leading singular vectors are searched."""

LOST = 1e-6
"""Share of a gradient's norm at and below which a direction of it is rounding."""


class GradientSubspaces(Option):
    """Trains matrix layers through stand-ins of low rank."""

    def __init__(self, run: Run, config: Coso) -> None:
        super().__init__(run)
        self._config = config
        self._layers: dict[str, _Layer] = {}

    def __enter__(self) -> Self:
        for name, weight in matrices(self.run).items():
            layer = _Layer(weight, _history(self.run, name, weight), self._config)
            self._layers[name] = layer
            self.run.trained[_key(name)] = layer.stand_in
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, layer in self._layers.items():
            self.run.trained.pop(_key(name), None)
            if kind is None and self.run.ends_task:
                self.run.memory[_key(name)] = layer.extended(self._config.energy).float().cpu().contiguous()

    @torch.no_grad()
    def after_backward(self) -> None:
        assert self.run.optimizer is not None, "the loop makes it once the options are entered"
        for layer in self._layers.values():
            layer.project(self.run.step % self._config.every == 0, self.run.optimizer.state)

    @torch.no_grad()
    def after_step(self) -> None:
        for layer in self._layers.values():
            layer.carry()

    def state(self) -> dict[str, Tensor]:
        subspaces = {f"subspace/{name}": layer.basis_MK for name, layer in self._layers.items()}
        return subspaces | {f"sketch/{name}": layer.sketch.columns_ML for name, layer in self._layers.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, layer in self._layers.items():
            layer.basis_MK = state[f"subspace/{name}"].to(layer.basis_MK)
            sketched = state[f"sketch/{name}"].to(layer.sketch.columns_ML)
            layer.sketch = FrequentDirections(sketched, layer.sketch.limit)


class _Layer:
    """One matrix layer, its stand-in, and what is known of its gradients."""

    def __init__(self, weight: nn.Parameter, history_MJ: Tensor, config: Coso) -> None:
        rows, columns = weight.flatten(1).shape
        rank = min(config.rank, rows, columns)
        self.weight, self.history_MJ = weight, history_MJ
        self.stand_in = nn.Parameter(weight.new_zeros(rank, columns))
        self.basis_MK = weight.new_zeros(rows, rank).detach()
        self.sketch = FrequentDirections.empty(rows, config.sketch, weight.device)

    def project(self, renew: bool, state: Mapping[Any, MutableMapping[str, Any]]) -> None:
        """Hands the weight's gradient on to the stand-in, so that the optimizer passes the weight over."""
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is None:
            return
        gradient_MN = gradient.flatten(1)
        if renew or not self.basis_MK.any():
            self._renew(gradient_MN, state.get(self.stand_in, {}))
        self.stand_in.grad = self.basis_MK.T @ gradient_MN
        triangle = torch.linalg.qr(self.stand_in.grad.T.double(), mode="r").R
        self.sketch = self.sketch.plus(self.basis_MK.double() @ triangle.T)  # as large as P R to the left

    def carry(self) -> None:
        """The optimizer's step of the stand-in becomes the weight's."""
        self.weight.add_((self.basis_MK @ self.stand_in).reshape(self.weight.shape))
        self.stand_in.zero_()

    def extended(self, energy: float) -> Tensor:
        """The history with the directions of this run, (M, J) float64, orthonormal; J is at most M."""
        return orthonormal(torch.cat([self.history_MJ, self.sketch.directions(energy)], dim=1))

    def _renew(self, gradient_MN: Tensor, moments: MutableMapping[str, Any]) -> None:
        known, rank = self.basis_MK, self.basis_MK.shape[1]
        self.basis_MK = subspace(gradient_MN, self.history_MJ, rank).to(known)
        turn = self.basis_MK.T @ known
        for key, moment in moments.items():
            if isinstance(moment, Tensor) and moment.shape == self.stand_in.shape:
                moments[key] = (turn.square() if key == "exp_avg_sq" else turn) @ moment


def subspace(gradient_MN: Tensor, history_MJ: Tensor, rank: int) -> Tensor:
    """(M, rank), float64: leading left singular vectors of the gradient off the history, then zeros."""
    wide = gradient_MN.double()
    free = wide - history_MJ @ (history_MJ.T @ wide)
    left, values, _ = torch.svd_lowrank(free, q=min(rank + OVERSAMPLE, *free.shape))
    in_use = values[:rank] > LOST * torch.linalg.vector_norm(wide)
    found: Tensor = left[:, :rank] * in_use
    return found


def _history(run: Run, name: str, weight: nn.Parameter) -> Tensor:
    rows = weight.shape[0]
    history = run.memory.get(_key(name), torch.zeros(rows, 0))
    if history.dim() != 2 or history.shape[0] != rows or history.shape[1] > rows:
        raise ShapeMismatch(
            "directions of earlier tasks that do not fit",
            where=_key(name),
            got=tuple(history.shape),
            wanted=f"({rows}, at most {rows})",
        )
    return orthonormal(history.to(weight.device))


def _key(name: str) -> str:
    return f"coso/{name}"
