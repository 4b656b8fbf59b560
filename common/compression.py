"""How a task vector is made smaller before it is sent; both sides name it by the same text.

==================  ==================================================================================
``none``            float32 as it is
``bf16``            every value rounded to bfloat16: half the bytes
``int8``            integers with a scale per row (:mod:`fedmerge.common.int8`): a quarter
``lowrank:0.9``     of every layer of two and more dimensions the fewest singular directions that hold
                    this share of its squared norm, where their factors have fewer numbers than it
``lowrank:0.9+int8``  or ``+bf16``: both, the factors rounded
==================  ==================================================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from fedmerge.common.errors import ConfigError

Rounding = Literal["none", "bf16", "int8"]

DTYPES: dict[Rounding, torch.dtype] = {
    "none": torch.float32,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
}


@dataclass(frozen=True)
class Compression:
    """What is left out of a task vector.

    Attributes:
        energy: share of a layer's squared norm that its factors hold, above 0 and below 1; None keeps layers
            as they are. ``rounding``: of the values that are then sent.
    """

    energy: float | None = None
    rounding: Rounding = "none"

    @classmethod
    def parse(cls, text: str) -> Compression:
        """The compression of this name.

        Raises:
            ConfigError: another name, or a share outside 0 to 1.
        """
        names = text.split("+")
        energy = None
        if names[0].startswith(LOWRANK):
            energy = _share(names.pop(0).removeprefix(LOWRANK), text)
        if not names:
            return cls(energy)
        for rounding in DTYPES:
            if names == [rounding] and (energy is None or rounding != "none"):
                return cls(energy, rounding)
        raise _malformed(text)

    def __str__(self) -> str:
        parts = [] if self.energy is None else [f"{LOWRANK}{self.energy!r}"]
        if self.rounding != "none" or not parts:
            parts.append(self.rounding)
        return "+".join(parts)

    @property
    def dtype(self) -> torch.dtype:
        """As :func:`fedmerge.common.vectorfile.save` takes it."""
        return DTYPES[self.rounding]


LOWRANK = "lowrank:"


def _share(number: str, text: str) -> float:
    try:
        share = float(number)
    except ValueError:
        raise _malformed(text) from None
    if not 0 < share < 1:
        raise _malformed(text)
    return share


def _malformed(text: str) -> ConfigError:
    return ConfigError(
        "an unknown compression",
        got=repr(text),
        wanted="none, bf16, int8, lowrank:ENERGY above 0 and below 1, or the last with +bf16 or +int8",
    )
