"""Which updates are let in. Pure checks: no disk, no network, nothing is changed."""

from __future__ import annotations

import math

from fedmerge.common.base import Base
from fedmerge.common.errors import BadWeight, BaseMismatch, MismatchError, NonFinite, VersionMismatch
from fedmerge.common.sources import check_vector
from fedmerge.common.taskvector import TaskVector

FLOAT32_MAX = 3.4028234663852886e38

MOST_MERGES = 2**20
"""The sum of so many admitted vectors stays within float32, so finite updates cannot overflow the model."""

MAX_EXAMPLES = 100_000
"""A self-reported count above this weighs no more than this."""


def admit(vector: TaskVector, base: Base, *, task: str, origin_version: int = 0) -> None:
    """Lets a task vector in, or raises.

    Reads every layer once: values must be finite, and so must the float32 sum of many such vectors.

    Raises:
        BaseMismatch, VersionMismatch, MismatchError: made from another base or origin, or for another task.
        MissingLayer, UnknownLayer, ShapeMismatch, DtypeMismatch: against the base's layers.
        NonFinite: NaN, infinities, or a norm so large that sums of such vectors overflow float32.
    """
    manifest, where = vector.manifest, vector.label
    if manifest.base != base.fingerprint:
        raise BaseMismatch(
            "made from another base",
            where=where,
            got=manifest.base[:12] or "none",
            wanted=base.fingerprint[:12],
            do="Fine-tune from the weights the server registered.",
        )
    if manifest.origin_version != origin_version:
        raise VersionMismatch(
            "another origin version", where=where, got=manifest.origin_version, wanted=origin_version
        )
    if manifest.task != task:
        raise MismatchError(
            "a vector for another task", where=where, got=repr(manifest.task), wanted=repr(task)
        )
    check_vector(vector, base)
    norm = vector.norm()
    if not math.isfinite(norm):
        raise NonFinite("values that are not finite", where=where, wanted="none")
    if not norm <= FLOAT32_MAX / MOST_MERGES:
        raise NonFinite(
            "the vector's norm overflows float32 when vectors are summed",
            where=where,
            got=f"{norm:.1e}",
            wanted=f"at most {FLOAT32_MAX / MOST_MERGES:.1e}",
        )


def weight(examples: object, *, where: str, cap: int = MAX_EXAMPLES) -> int:
    """A self-reported example count as a weight, at most ``cap``.

    Raises:
        BadWeight: not a whole number of at least 1.
    """
    number = examples if isinstance(examples, int | float) and not isinstance(examples, bool) else math.nan
    if not 1 <= number < math.inf or number != int(number):
        raise BadWeight(
            "the example count is not a whole number of at least 1", where=where, got=repr(examples)
        )
    return min(int(number), cap)
