"""The matrix layers of a run, for the options that train them in a way of their own.

A convolution is seen as (out, in * kernel), every other matrix layer as it is stored, as in
:attr:`fedmerge.common.layers.LayerSpec.matrix_shape`; so M are the rows and N the columns of what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmerge.client.options.option import Run
from fedmerge.common.layers import LayerKind, kinds_from_model


def matrices(run: Run) -> dict[str, nn.Parameter]:
    """The trained weights of linear and convolution layers, by name; ``flatten(1)`` makes them (M, N).

    Those of a task's own head, which no other task has a part in, are not among them.
    """
    kinds = kinds_from_model(run.model, run.private)
    return {name: weight for name, weight in run.whole.items() if kinds.get(name) is LayerKind.MATRIX}


def orthonormal(columns_MK: Tensor) -> Tensor:
    """Orthonormal columns with the same span, in float64, the first ones first.

    Columns that were stored or sent are orthonormal up to their rounding only.
    """
    found: Tensor = torch.linalg.qr(columns_MK.double()).Q
    return found
