"""Which updates are let in, and every limit there is. Pure checks: nothing is written, nothing changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import fsum, sqrt
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedmerge.common import vectorfile
from fedmerge.common.base import Base
from fedmerge.common.errors import (
    BadWeight,
    BaseMismatch,
    Busy,
    FedmergeError,
    FileError,
    MismatchError,
    NonFinite,
    NormExceeded,
    QuotaExceeded,
    TooLarge,
    VersionMismatch,
)
from fedmerge.common.header import LENGTH_BYTES, MAX_HEADER_BYTES
from fedmerge.common.scan import check_rank, scan
from fedmerge.common.sources import check_vector
from fedmerge.common.statistics import check_values
from fedmerge.common.taskvector import LowRank, Manifest, TaskVector, require_mergeable
from fedmerge.server.merge.rule import Rule
from fedmerge.server.needs import check_needs

FLOAT32_MAX = 3.4028234663852886e38

MOST_MERGES = 2**20
"""The sum of so many admitted vectors stays within float32, so finite updates cannot overflow the model."""

MAX_EXAMPLES = 100_000
"""A self-reported count above this weighs no more than this."""

MAX_TASK_CHARS = 200
MAX_STATISTICS = 64

HEADER_BYTES, HEADER_BYTES_PER_LAYER, HEADER_BYTES_PER_CHAR = 2**20, 4096, 120
"""Room for a header, more than any writer needs; parsing one takes some twenty times its bytes of memory."""

Count = Annotated[int, Field(ge=1)]
Ratio = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Limits(BaseModel):
    """Every bound of what a server takes in.

    Norms are bounded against the base alone, never against earlier updates, so that who comes first cannot
    move the bound. Write ``r`` for ``layer_ratio``, ``R_l`` for a layer's reference norm
    (:class:`BaseNorms`), ``s`` for ``total_ratio`` and ``W`` for the norm of the whole base. Merging one
    admitted update as number t moves a layer of the model by at most

    - average: ``r R_l`` at t = 1, then ``2 r R_l / t``;
    - task_arithmetic: ``factor r R_l``, more than ``r R_l`` only for a factor above 1;
    - opcm: ``r R_l`` at t = 1. Later one scalar re-scales the whole model to the mean norm of the updates,
      and where vectors cancel or are projected away what remains is blown up. The model stays within
      ``s W`` of the base, so the whole step, and a single layer's, is at most ``2 s W``; a small layer
      could thus move by more than ``r R_l``, in the worst case tested by nine times as much;
    - other rules: no bound is worked out here.

    An aggregator therefore looks at the step itself before it commits (:func:`check_step`): an update
    that would move a layer by more than ``r R_l`` is held until an admin approves it.

    The defaults leave room for training from scratch, which moves a layer by about its own norm: up to
    1.02 ``R_l`` and 0.93 ``W`` in the stream ``example``. Fine-tuning a pretrained model moves it far
    less: the stream ``text`` up to 0.010 ``R_l`` and 0.006 ``W``, 0.036 and 0.024 at five times its rate. A
    server for pretrained models does well with ratios of 0.3 and 0.1.

    Attributes:
        max_update_bytes: of one task vector file.
        max_examples: cap of a self-reported example count; a larger one weighs no more.
        layer_ratio: most ||D_l|| / R_l of any layer. ``total_ratio``: most ||tau|| / W.
        max_staleness: None lets in vectors measured from the base alone; n also those from at most n
            versions before the current one.
        updates_per_day, bytes_per_day: of one site.
        max_queue: updates waiting to be merged. ``max_held``: updates waiting for approval.
        quarantine: whose updates wait for approval: nobody's, those of sites without a merged update, or all.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_update_bytes: Count = 2 * 2**30
    max_examples: Count = MAX_EXAMPLES
    layer_ratio: Ratio = 3.0
    total_ratio: Ratio = 2.0
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    updates_per_day: Count = 200
    bytes_per_day: Count = 64 * 2**30
    max_queue: Count = 64
    max_held: Count = 64
    quarantine: Literal["none", "new-sites", "all"] = "none"


LIMITS = Limits()


@dataclass(frozen=True)
class BaseNorms:
    """What updates are measured against, from the base alone.

    Attributes:
        layers: reference norm by layer: ||W_l||_F, or sqrt(numel) times the root mean square of all merged
            weights where that is more, so that a bias of zeros has a bound too.
        total: ||W||_2 over all merged layers.
    """

    layers: Mapping[str, float]
    total: float

    @classmethod
    def of(cls, base: Base) -> BaseNorms:
        """In float64, one tensor in memory at a time.

        Raises:
            NonFinite: a layer of the base with NaN or infinities.
        """
        norms = {name: _norm_in(base, name) for name in base.merged_layers}
        sizes = {name: math.prod(layer.shape) for name, layer in base.merged_layers.items()}
        total = sqrt(fsum(norm**2 for norm in norms.values()))
        rms = total / sqrt(sum(sizes.values()) or 1)
        return cls({name: max(norm, sqrt(sizes[name]) * rms) for name, norm in norms.items()}, total)


@dataclass(frozen=True)
class Admitted:
    """An update that may be merged.

    Attributes:
        manifest: what it says about itself, but for the site that sent it and the examples it may weigh.
        norm: ||tau||_2.
    """

    manifest: Manifest
    norm: float

    @property
    def examples(self) -> int:
        return self.manifest.examples


def admit_update(
    source: Path | TaskVector,
    base: Base,
    norms: BaseNorms,
    limits: Limits = LIMITS,
    *,
    current_version: int,
    site: str,
    rules: Iterable[Rule] = (),
) -> Admitted:
    """Lets an update in, or raises; cheap checks first, then one pass over the values.

    A file is never held in memory: its header, then one block at a time.

    Args:
        source: a task vector file, or a task vector.
        current_version: the server's. ``site``: who sent it, as authenticated; messages name it.
        rules: whose statistics it must bring (``server.needs``). Others that it brings are held to the
            same checks of form and count as bytes; nothing reads them.

    Raises:
        TooLarge: the file, or its header.
        UnsafeFile, FileError: not a well-formed task vector file, or a malformed manifest.
        BaseMismatch, VersionMismatch: made from another base, or from a version that is not let in.
        MissingLayer, UnknownLayer, ShapeMismatch, DtypeMismatch: against the base's layers.
        StatisticsMissing: a statistic that a rule needs.
        BadStatistic: a statistic that no data can give.
        BadWeight: an example count that is not a whole number of at least 1.
        NonFinite: NaN, infinities, or a norm so large that sums of such vectors overflow float32.
        NormExceeded: a layer or the whole update is larger than the limits allow.
    """
    where = f"update of {site}"
    with _reported_as(where):
        if isinstance(source, TaskVector):
            vector, squares = source, _squares(source)
        else:
            _check_file(source, base, limits, where)
            vector, squares = vectorfile.load(source), scan(source)
        manifest = vector.manifest
        check_manifest(manifest, base, where)
        check_origin(manifest.origin_version, current_version, limits, where)
        check_vector(vector, base)
        check_needs(vector, base, rules, where)
        examples = weight(manifest.examples, where=where, cap=limits.max_examples)
        norm = check_norms(squares, norms, limits, where)
    return Admitted(replace(manifest, site=site, examples=examples), norm)


def admit(
    vector: TaskVector,
    base: Base,
    norms: BaseNorms,
    limits: Limits = LIMITS,
    *,
    task: str,
    origin: int = 0,
    rules: Iterable[Rule] = (),
) -> None:
    """Lets a vector in that was asked for, from a version and for a task; errors as of :func:`admit_update`.

    Raises:
        MismatchError: a vector for another task. VersionMismatch: or from another version.
    """
    where = vector.label
    check_manifest(vector.manifest, base, where)
    if vector.manifest.origin_version != origin:
        raise VersionMismatch(
            "another origin version", where=where, got=vector.manifest.origin_version, wanted=origin
        )
    if vector.manifest.task != task:
        raise MismatchError(
            "a vector for another task", where=where, got=repr(vector.manifest.task), wanted=repr(task)
        )
    check_vector(vector, base)
    check_needs(vector, base, rules, where)
    check_norms(_squares(vector), norms, limits, where)


def check_size(size: int, limits: Limits, where: str) -> None:
    """Raises TooLarge for a file that is never taken, however long the site waits."""
    most = min(limits.max_update_bytes, limits.bytes_per_day)
    if size > most:
        raise TooLarge("the update is too large", where=where, got=f"{size} bytes", wanted=f"at most {most}")


def check_quota(used_updates: int, used_bytes: int, size: int, limits: Limits, where: str) -> None:
    """Raises QuotaExceeded if one more update of ``size`` bytes is more than a site's share of a day."""
    if used_updates >= limits.updates_per_day:
        raise QuotaExceeded(
            "the site's updates of a day are used up",
            where=where,
            got=f"{used_updates} updates",
            wanted=f"at most {limits.updates_per_day}",
        )
    if used_bytes + size > limits.bytes_per_day:
        raise QuotaExceeded(
            "the site's bytes of a day are used up",
            where=where,
            got=f"{used_bytes} bytes and {size} more",
            wanted=f"at most {limits.bytes_per_day}",
        )


def check_queue(staged: int, limits: Limits) -> None:
    """Raises Busy if no further update may wait to be merged."""
    if staged >= limits.max_queue:
        raise Busy("the queue is full", got=f"{staged} updates", wanted=f"fewer than {limits.max_queue}")


def check_held(held: int, limits: Limits) -> None:
    """Raises Busy if no further update may wait for approval."""
    if held >= limits.max_held:
        raise Busy(
            "too many updates wait for approval",
            got=f"{held} updates",
            wanted=f"fewer than {limits.max_held}",
        )


def needs_approval(limits: Limits, *, new_site: bool) -> bool:
    """Whether an update is held. ``new_site``: no update of its site has been merged yet."""
    return limits.quarantine == "all" or (limits.quarantine == "new-sites" and new_site)


def check_manifest(manifest: Manifest, base: Base, where: str) -> None:
    """Refuses a task name that cannot be shown, too many statistics, and another base.

    Raises:
        FileError, BaseMismatch.
    """
    if not (0 < len(manifest.task) <= MAX_TASK_CHARS and manifest.task.isprintable()):
        raise FileError(
            "a malformed task name",
            where=where,
            got=f"{len(manifest.task)} characters, {manifest.task[:40]!a}",
            wanted=f"1 to {MAX_TASK_CHARS} printable characters",
        )
    if len(manifest.statistics) > MAX_STATISTICS:
        raise FileError(
            "too many statistics",
            where=where,
            got=len(manifest.statistics),
            wanted=f"at most {MAX_STATISTICS}",
        )
    if manifest.base != base.fingerprint:
        raise BaseMismatch(
            "made from another base",
            where=where,
            got=manifest.base[:12] or "none",
            wanted=base.fingerprint[:12],
            do="Fine-tune from the weights the server registered.",
        )


def check_origin(origin: int, current: int, limits: Limits, where: str) -> None:
    """Raises VersionMismatch for an origin that is in the future, or staler than the limits allow."""
    if origin == 0:
        return
    if limits.max_staleness is None:
        raise VersionMismatch(
            "another origin version",
            where=where,
            got=origin,
            wanted=0,
            do="Fine-tune from the base, or measure the vector from it.",
        )
    oldest = max(current - limits.max_staleness, 0)
    if not oldest <= origin <= current:
        what = "an origin version that does not exist yet" if origin > current else "a stale origin version"
        raise VersionMismatch(what, where=where, got=origin, wanted=f"0, or {oldest} to {current}")


def check_norms(squares: Iterable[tuple[str, float]], norms: BaseNorms, limits: Limits, where: str) -> float:
    """Holds every layer, then the whole, against the base; returns ||tau||_2.

    Args:
        squares: ||D_l||_F^2 by layer; it is read up to the first layer that is too large.

    Raises:
        NonFinite: sums of such vectors overflow float32. NormExceeded: larger than the limits allow.
    """
    seen = []
    for name, square in squares:
        _check_norm(sqrt(square), norms.layers[name], limits.layer_ratio, where, name)
        seen.append(square)
    norm = sqrt(fsum(seen))
    _check_norm(norm, norms.total, limits.total_ratio, where, None)
    return norm


def check_step(layer: str, square: float, norms: BaseNorms, limits: Limits) -> None:
    """Holds what one merge is about to move a layer, ``square`` its ||.||_F^2, against the base.

    Raises:
        NormExceeded: more than ``layer_ratio`` allows any update.
    """
    _check_norm(sqrt(square), norms.layers[layer], limits.layer_ratio, "the step to the next version", layer)


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


@contextmanager
def _reported_as(where: str) -> Iterator[None]:
    """Errors name the update, not the server's own file."""
    try:
        yield
    except FedmergeError as error:
        raise type(error)(
            error.what, where=where, layer=error.layer, got=error.got, wanted=error.wanted, do=error.do
        ) from error


def _check_file(path: Path, base: Base, limits: Limits, where: str) -> None:
    """Size and header length, before anything is parsed; all else is for the parser to say."""
    if not path.is_file():
        return
    size = path.stat().st_size
    check_size(size, limits, where)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
    per_layer = (HEADER_BYTES_PER_LAYER + HEADER_BYTES_PER_CHAR * len(name) for name in base.merged_layers)
    most = HEADER_BYTES + sum(per_layer)
    if most < length <= min(MAX_HEADER_BYTES, size):
        raise TooLarge(
            "the header is longer than the base's layers need",
            where=where,
            got=f"{length} bytes",
            wanted=f"at most {most}",
        )


def _squares(vector: TaskVector) -> Iterator[tuple[str, float]]:
    """What :func:`~fedmerge.common.scan.scan` tells of a file, of a vector in memory."""
    for name, update in vector.items():
        if isinstance(update, LowRank):
            check_rank(update.rank, update.shape, where=vector.label, layer=name)
        require_mergeable(update, where=vector.label, layer=name)
        for statistic, values in vector.statistics(name).items():
            check_values(statistic, tuple(values.shape), [values], where=vector.label, layer=name)
        yield name, update.sum_of_squares()


def _check_norm(norm: float, reference: float, ratio: float, where: str, layer: str | None) -> None:
    if norm > FLOAT32_MAX / MOST_MERGES:
        raise NonFinite(
            "a norm that overflows float32 when vectors are summed",
            where=where,
            layer=layer,
            got=f"{norm:.1e}",
            wanted=f"at most {FLOAT32_MAX / MOST_MERGES:.1e}",
        )
    if norm > ratio * reference:
        raise NormExceeded(
            "larger than the base allows",
            where=where,
            layer=layer,
            got=f"{norm / reference:.3g} times its norm" if reference else "a change",
            wanted=f"at most {ratio:g} times" if reference else "none, for the base is zero",
            do="Train more gently; or, if this is how training goes here, raise the server's ratio.",
        )


def _norm_in(base: Base, name: str) -> float:
    norm = float(torch.linalg.vector_norm(base.read(name), dtype=torch.float64))
    if not math.isfinite(norm):
        raise NonFinite("the base has values that are not finite", where=base.checkpoint.label, layer=name)
    return norm
