"""Tensors of a task vector as int8 with float32 scales: a quarter of the bytes.

A value is ``integer * scale``, the integer from -127 to 127. There is one scale per row of a dense layer,
seen as (out, in * kernel), and one for a whole layer of fewer than two dimensions. Of factors there is one
per direction of the rank: per column of the left one and per row of the right one.

A scale is the row's largest magnitude over 127, rounded up to 17 significant bits. So the product is exact in
float32, a value is off by at most half a scale, rows of zeros stay zero, and values that were read and are
stored again stay the same.

Legend of shape suffixes: P outer parts, S scales, I inner elements; P * S * I are all values, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from fedmerge.common.errors import DtypeMismatch, FileError, ShapeMismatch
from fedmerge.common.header import Header
from fedmerge.common.layers import describe
from fedmerge.common.parts import LEFT, SCALE

LARGEST = 127
SPARE_BITS = 2**7 - 1
"""Low bits of a float32 that an exact product with an integer up to 127 leaves no room for."""


def dealt(part: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``(P, S, I)``: how the values of a tensor of this name and shape are dealt to its scales."""
    if part.endswith(LEFT):
        return shape[0], shape[1], 1
    return (1, shape[0], prod(shape[1:])) if len(shape) >= 2 else (1, 1, prod(shape))


def encoded(part: str, values: Tensor) -> dict[str, Tensor]:
    """The tensors that store one, by name: the integers and their scales, which tell if it is not finite."""
    wide_PSI = values.double().reshape(dealt(part, tuple(values.shape)))
    scales_S = _scales(wide_PSI)
    divisors_S = torch.where(scales_S == 0, 1.0, scales_S).double()
    integers = (wide_PSI / divisors_S[:, None]).round().to(torch.int8)
    return {part: integers.reshape(values.shape), part + SCALE: scales_S}


def decoder(read: Callable[[str], Tensor], label: str) -> Callable[[str], Tensor]:
    """Reads tensors in float32, those of int8 by their scales, where ``read`` gives them as they are stored.

    The function it returns raises FileError for negative scales, which no writer makes.
    """

    def decode(part: str) -> Tensor:
        stored = read(part)
        if stored.dtype is not torch.int8:
            return stored.float()
        scales_S = read(part + SCALE)
        check_scales(scales_S, part, label)
        integers_PSI = stored.float().reshape(dealt(part, tuple(stored.shape)))
        return (integers_PSI * scales_S[:, None]).reshape(stored.shape)

    return decode


def check_scales(scales_S: Tensor, part: str, label: str) -> None:
    """Refuses negative scales; those that are not finite show in every value."""
    if bool((scales_S < 0).any()):
        raise FileError("negative scales", where=label, layer=part.partition("#")[0], wanted="at least 0")


def check_layout(header: Header, label: str) -> None:
    """Holds the scales of a file against its tensors of int8; both must have passed otherwise.

    Raises:
        FileError: integers without scales, or scales without integers.
        ShapeMismatch, DtypeMismatch: scales that do not fit.
    """
    for part, (_, dtype) in header.layout.items():
        layer = part.partition("#")[0]
        if part.endswith(SCALE):
            owner = part.removesuffix(SCALE)
            if owner not in header.layout or header.layout[owner][1] is not torch.int8:
                raise FileError("scales of a tensor that is not int8", where=label, layer=layer, got=part)
            _check_fit(layer, owner, header, label)
        elif dtype is torch.int8 and part + SCALE not in header.layout:
            raise FileError("int8 without scales", where=label, layer=layer, wanted=part + SCALE)


def _check_fit(layer: str, part: str, header: Header, label: str) -> None:
    shape, dtype = header.layout[part + SCALE]
    wanted = (dealt(part, header.layout[part][0])[1],)
    if dtype is not torch.float32 or shape != wanted:
        kind = ShapeMismatch if dtype is torch.float32 else DtypeMismatch
        raise kind(
            "scales that do not fit their tensor",
            where=label,
            layer=layer,
            got=describe(shape, dtype),
            wanted=describe(wanted, torch.float32),
        )


def _scales(wide_PSI: Tensor) -> Tensor:
    if not wide_PSI.numel():
        return torch.zeros(wide_PSI.shape[1])
    largest_S = wide_PSI.abs().amax(dim=(0, 2))
    scales_S = (largest_S / LARGEST).float()
    bits_S = (scales_S.view(torch.int32) + SPARE_BITS) & ~SPARE_BITS
    smallest = torch.finfo(torch.float32).tiny
    return torch.where(largest_S == 0, 0.0, bits_S.view(torch.float32).clamp_min(smallest))
