"""What a site keeps from one local run to the next: private layers of its tasks, what it has not sent yet,
what its options remember, and how often it has released something.

In a run of Flower it lies in the node's context, in serving mode in the site's folder
(:class:`fedmerge.client.state.SiteState`). It belongs to one way of learning: another begins anew, but for
the number of releases, which only grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor

from fedmerge.client.compress import forget
from fedmerge.common.errors import StoreDamaged

UNKNOWN = -1
"""Stands for a number of releases that is not known, where there is no None."""

RECORD, ABOUT = "fedmerge.memory", "fedmerge.memory-of"

HEADS = "heads/"
"""Begins the keys of private layers, followed by the task's name without slashes, and the layer's."""


@dataclass
class SiteMemory:
    """A site's memory.

    Attributes:
        tensors: by keys that begin with what they are of, on the CPU.
        learning: of which way of learning. ``task``: the last that was learned.
        releases: Gaussian releases so far, of vectors and of statistics; None if that is not known any more.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    learning: str = ""
    task: str = ""
    releases: int | None = 0

    def begin(self, learning: str, task: str, round: int) -> None:
        """Gets ready for a run: what another way of learning left is dropped, and what was not sent of
        another task. With its first round a task begins anew, also where that is asked for again."""
        if learning != self.learning:
            self.tensors.clear()
        if (learning, task) != (self.learning, self.task) or round == 1:
            forget(self.tensors)
        if round == 1:
            for name in self.heads(task, learning):
                del self.tensors[_head(task) + name]
        self.learning, self.task = learning, task

    def heads(self, task: str, learning: str) -> dict[str, Tensor]:
        """The private layers that a task was last learned with in this way; none if it was not."""
        if learning != self.learning:
            return {}
        prefix = _head(task)
        return {key.removeprefix(prefix): t for key, t in self.tensors.items() if key.startswith(prefix)}

    def keep_heads(self, task: str, heads: Mapping[str, Tensor]) -> None:
        """Keeps the private layers of a task; of bfloat16, which not every record can hold, as float32."""
        for name, tensor in heads.items():
            wide = tensor.float() if tensor.dtype is torch.bfloat16 else tensor
            kept = wide.detach().cpu().clone(memory_format=torch.contiguous_format)
            self.tensors[_head(task) + name] = kept

    def facts(self) -> dict[str, str | int]:
        releases = UNKNOWN if self.releases is None else self.releases
        return {"learning": self.learning, "task": self.task, "releases": releases}

    def released(self, times: int) -> int:
        """Counts further releases; returns all so far.

        Raises:
            StoreDamaged: it is not known how many there were.
        """
        if self.releases is None:
            raise StoreDamaged(
                "the record of what this site has released is damaged, so that epsilon cannot be told",
                where="memory.json",
                do='Restore the file from a copy, or write {"releases": N} with the number from the log.',
            )
        self.releases += times
        return self.releases


def _head(task: str) -> str:
    return f"{HEADS}{quote(task, safe='')}/"


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
    releases = facts.get("releases", UNKNOWN)
    return SiteMemory(
        tensors,
        str(facts.get("learning", "")),
        str(facts.get("task", "")),
        releases if isinstance(releases, int) and releases >= 0 else None,
    )
