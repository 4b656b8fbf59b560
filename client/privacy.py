"""Clips what a site is about to send and adds Gaussian noise, see :mod:`fedmerge.common.privacy`.

It comes before compression, which then only processes what is private already. A result is privatised once
and kept: noise drawn anew for every retry would be one release more each time, and could be averaged away.

Noise comes from the operating system's cryptographic generator, never from a seed: who knows or guesses a
seed takes the noise off again, and so does who reconstructs the state of an ordinary generator from layers
that hold noise and nothing else.

Legend of shape suffixes: R rows of a factor, N in columns, K kept directions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from math import fsum, isfinite, pi, prod, sqrt

import torch
from torch import Tensor

from fedmerge.common.errors import NonFinite
from fedmerge.common.lowrank import balanced
from fedmerge.common.privacy import Privacy
from fedmerge.common.statistics import Statistic, Statistics, is_factor, statistics_of
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank, TaskVector, require_mergeable

Entropy = Callable[[int], bytes]
"""So many random bytes that nobody can foresee."""

BELOW = 1 - 2**-23
"""Clipped numbers are rounded to float32; with this factor their norm stays within the bound nevertheless."""

BLOCK = 2**20
"""Numbers drawn at a time."""


def privatise(vector: TaskVector, privacy: Privacy, entropy: Entropy = os.urandom) -> TaskVector:
    """The vector and its statistics, clipped and with noise on every number that is sent.

    - Layers: at or below the bound they pass as they are, above they are scaled down to it, all by one
      factor; then noise. Of low-rank layers both factors, as small as they can be for their product, so that
      the same noise hides less of it. Layers called unchanged stay so.
    - Statistics: one release for each kind, over all layers as if concatenated. A Gram is released as the
      matrix, and its noisy version made symmetric, positive semidefinite and a factor again; one that several
      layers share is released once. Means of squares are cut off at 0 afterwards, residuals also at 1.

    Args:
        entropy: for tests alone; see above.

    Raises:
        ConfigError: a statistic without a bound.
        NonFinite: a layer or a statistic with NaN or infinities.
    """
    told = statistics_of(vector)
    bounds = {kind: privacy.bound(kind) for _, kind in told.stored(told.shapes)}
    updates = {name: _smallest(update, vector.label, name) for name, update in vector.items()}
    tensors = [tensor for update in updates.values() for tensor in update.tensors()]
    release = _Release(tensors, privacy.clip, privacy.noise, entropy, vector.label)
    layers = {name: _released(update, release) for name, update in updates.items()}
    held = TaskVector.of(layers, vector.unchanged, vector.manifest, vector.label)
    return replace(held, statistics=_statistics(vector, told, bounds, privacy.noise, entropy))


def gaussian(shape: tuple[int, ...], entropy: Entropy) -> Tensor:
    """Independent standard normal numbers in float64, by Box and Muller's method from 53 random bits each."""
    drawn = torch.empty(prod(shape), dtype=torch.float64)
    for start in range(0, len(drawn), BLOCK):
        block = drawn[start : start + BLOCK]
        pairs = (len(block) + 1) // 2
        words = torch.frombuffer(bytearray(entropy(16 * pairs)), dtype=torch.int64)
        first, second = ((words >> 11 & 2**53 - 1).double() * 2.0**-53).chunk(2)
        radius, angle = (-2 * torch.log1p(-first)).sqrt(), 2 * pi * second
        block.copy_(torch.cat([radius * angle.cos(), radius * angle.sin()])[: len(block)])
    return drawn.reshape(shape)


class _Release:
    """One Gaussian mechanism over several tensors: all are scaled by one factor and get the same noise.

    Args:
        tensors: what will be released, or anything of the same norms. ``bound``: most norm over all of them.
    """

    def __init__(
        self, tensors: Iterable[Tensor], bound: float, noise: float, entropy: Entropy, label: str
    ) -> None:
        squares = (float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors)
        norm = sqrt(fsum(squares))
        if not isfinite(norm):
            raise NonFinite("numbers that are not finite cannot be clipped", where=label)
        self._factor = bound / norm * BELOW if norm > bound else 1.0
        self._deviation, self._entropy = bound * noise, entropy

    def __call__(self, values: Tensor) -> Tensor:
        """A tensor, clipped and with noise, in its own dtype."""
        if self._factor != 1.0:
            values = (values.double() * self._factor).to(values.dtype)
        if not self._deviation:
            return values
        noise = gaussian(tuple(values.shape), self._entropy) * self._deviation
        return (values.double() + noise).to(values.dtype)


def _smallest(update: LayerUpdate, label: str, name: str) -> LayerUpdate:
    """A layer as it is released: of a low-rank one, the factors with the least sum of squares."""
    if not isinstance(update, LowRank):
        return update
    require_mergeable(update, where=label, layer=name)
    return balanced(update)


def _released(update: LayerUpdate, release: _Release) -> LayerUpdate:
    if isinstance(update, LowRank):
        return LowRank(release(update.left_MR), release(update.right_RN), update.shape)
    return Dense(release(update.values))


def _statistics(
    vector: TaskVector, told: Statistics, bounds: Mapping[str, float], noise: float, entropy: Entropy
) -> Statistics:
    stored = told.stored(told.shapes)
    held: dict[str, dict[str, Tensor]] = {layer: {} for layer in told.shapes}
    for kind, bound in bounds.items():
        layers = [layer for layer, name in stored if name == kind]
        norms = (_as_small(kind, told(layer)[kind]) for layer in layers)
        release = _Release(norms, bound, noise, entropy, vector.label)
        for layer in layers:
            held[layer][kind] = _valid(kind, told(layer)[kind], release)
    for layer, holder in told.shared_among(told.shapes).items():
        held[layer][Statistic.INPUT_GRAM] = held[holder][Statistic.INPUT_GRAM]
    return Statistics.of(held)


def _as_small(kind: str, values: Tensor) -> Tensor:
    """Something of the norm of what is released: of a factor R that is R^T R, whose norm R R^T has too."""
    if not is_factor(kind, tuple(values.shape)):
        return values
    wide_RN = values.double()
    return wide_RN @ wide_RN.T


def _valid(kind: str, values: Tensor, release: _Release) -> Tensor:
    """A statistic after its release, made into one that data can give."""
    if is_factor(kind, tuple(values.shape)):
        wide_RN = values.double()
        return _factor(release(wide_RN.T @ wide_RN))
    if kind == Statistic.SKETCH:
        return release(values)
    return release(values).clamp(min=0.0, max=1.0 if kind == Statistic.RESIDUAL else None)


def _factor(noisy_NN: Tensor) -> Tensor:
    """A factor (K, N) of the positive semidefinite matrix nearest to the symmetric part of a square one."""
    values, vectors = torch.linalg.eigh((noisy_NN + noisy_NN.T) / 2)
    kept = values > 0
    kept[-1] = True
    factor_KN: Tensor = values[kept].clamp(min=0).sqrt()[:, None] * vectors[:, kept].T
    return factor_KN.float().contiguous()
