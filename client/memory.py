"""What a site keeps from one local run to the next: what it has not sent yet, what its options remember, and
how often it has released something.

In a run of Flower it lies in the node's context, in serving mode in the site's folder
(:class:`fedmerge.client.state.SiteState`). It belongs to one way of learning: another begins anew, but for
the number of releases, which only grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor

from fedmerge.client.compress import forget

RECORD, ABOUT = "fedmerge.memory", "fedmerge.memory-of"


@dataclass
class SiteMemory:
    """A site's memory.

    Attributes:
        tensors: by keys that begin with what they are of; float32, on the CPU.
        learning: of which way of learning. ``task``: the last that was learned.
        releases: Gaussian releases so far, of vectors and of statistics.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    learning: str = ""
    task: str = ""
    releases: int = 0

    def begin(self, learning: str, task: str, round: int) -> None:
        """Gets ready for a run: what another way of learning left is dropped, and what was not sent of
        another task."""
        if learning != self.learning:
            self.tensors.clear()
        if (learning, task) != (self.learning, self.task) or round == 1:
            forget(self.tensors)
        self.learning, self.task = learning, task

    def facts(self) -> dict[str, str | int]:
        return {"learning": self.learning, "task": self.task, "releases": self.releases}


def recalled(context: Context) -> SiteMemory:
    """A site's memory in its node's context; an empty one at first."""
    arrays, about = context.state.get(RECORD), context.state.get(ABOUT)
    if not isinstance(arrays, ArrayRecord) or not isinstance(about, ConfigRecord):
        return SiteMemory()
    tensors = {key: torch.from_numpy(array.numpy().copy()) for key, array in arrays.items()}
    return memory_of(tensors, dict(about))


def remember(memory: SiteMemory, context: Context) -> None:
    """Puts a site's memory into its node's context."""
    context.state[RECORD] = ArrayRecord(dict(memory.tensors))
    context.state[ABOUT] = ConfigRecord(dict(memory.facts()))


def memory_of(tensors: dict[str, Tensor], facts: Mapping[str, object]) -> SiteMemory:
    """A memory from its parts, as they were written down."""
    releases = facts.get("releases", 0)
    return SiteMemory(
        tensors,
        str(facts.get("learning", "")),
        str(facts.get("task", "")),
        releases if isinstance(releases, int) else 0,
    )
