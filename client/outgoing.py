"""An update as it leaves a site: first made private, then smaller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from fedmerge.client.compress import compress
from fedmerge.client.memory import SiteMemory
from fedmerge.client.privacy import privatise
from fedmerge.common.compression import Compression
from fedmerge.common.privacy import Privacy, epsilon, releases
from fedmerge.common.taskvector import TaskVector


@dataclass(frozen=True)
class Outgoing:
    """A task vector to be written with ``dtype``, and numbers that go with it."""

    vector: TaskVector
    dtype: torch.dtype = torch.float32
    numbers: Mapping[str, int | float] = field(default_factory=dict)


def as_it_is(vector: TaskVector) -> TaskVector:
    return vector


def outgoing(
    vector: TaskVector,
    privacy: Privacy | None,
    compression: Compression,
    memory: SiteMemory,
    measured: Callable[[TaskVector], TaskVector] = as_it_is,
) -> Outgoing:
    """What is sent of a vector. Compression sees what is private already.

    Args:
        memory: counts releases, and holds what was not sent in earlier rounds.
        measured: puts what is private on top of what everybody knows, such as the model that training started
            from, which is neither clipped nor blurred.

    Raises:
        StoreDamaged: privacy is asked for, and how often the site has released something is not known.
        ConfigError, NonFinite: as :func:`~fedmerge.client.privacy.privatise` does.
    """
    numbers: dict[str, int | float] = {}
    if privacy is not None:
        spent = memory.released(releases(1, vector.manifest.statistics))
        vector = privatise(vector, privacy)
        numbers["epsilon"] = epsilon(privacy.noise, spent, privacy.delta)
    vector = measured(vector)
    if compression == Compression():
        return Outgoing(vector, numbers=numbers)
    sent = compress(vector, compression, memory.tensors)
    return Outgoing(sent.vector, sent.dtype, numbers | {"cut": sent.report.residual})
