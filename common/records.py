"""What a server tells about updates and versions: one vocabulary for the ledger, the wire and the terminal.

Times are seconds since the epoch, UTC; sizes are bytes; hashes are SHA-256 as 64 hex digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Literal, Protocol

Dtype = Literal["f32", "bf16"]
"""How a merged vector is sent: as it is, or rounded to bfloat16 at half the bytes."""


class UpdateState(StrEnum):
    """Where an acknowledged update is."""

    STAGED = "staged"  # durable, waits for its turn
    HELD = "held"  # durable, waits for approval
    MERGED = "merged"  # part of the version it names, whatever was done to versions since
    REJECTED = "rejected"  # by an admin, while it was held
    FAILED = "failed"  # it could not be merged, and the reason is recorded; it may be handed in again
    REMOVED = "removed"  # was merged and has been taken out


class VersionKind(StrEnum):
    """What made a version."""

    BASE = "base"  # version 0
    MERGE = "merge"
    ROLLBACK = "rollback"  # the model of ``parent`` is served again
    REMOVAL = "removal"  # a task was taken out of ``parent``


def update_id(site: str, sha256: str) -> str:
    """The id of an update: who sent it and what is in it, 32 hex digits.

    The same bytes sent again by the same site are the same update, so a retry is answered, not merged.
    """
    return hashlib.sha256(f"{site}\n{sha256}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Receipt:
    """The answer to a submission: the update is durable.

    Attributes:
        update: its id. ``version``: what it was merged as, if it was.
        again: whether it had been acknowledged before.
    """

    update: str
    state: UpdateState
    version: int | None = None
    again: bool = False


@dataclass(frozen=True)
class UpdateRecord:
    """One acknowledged update.

    Attributes:
        seq: 1, 2, ... in the order of acknowledgement, which is the order of merging.
        sha256, size: of the task vector file. ``kept``: whether its bytes are still there.
        examples: as admitted. ``norm``: ||tau||_2. ``version``: what it was merged as.
        reason: why it is held, failed or was rejected; or who approved it.
    """

    seq: int
    id: str
    site: str
    task: str
    state: UpdateState
    sha256: str
    size: int
    examples: int
    origin_version: int
    norm: float
    at: float
    version: int | None = None
    reason: str = ""
    kept: bool = True


@dataclass(frozen=True)
class VersionRecord:
    """One committed version; 0 is the base.

    Attributes:
        parent: the version it was made from; of a rollback, the version served again.
        update, task, site: whose vector a merge took in; of a removal, the task taken out.
        merges: vectors in the model. ``norm_sum``: the sum of their norms. ``update_norm``: of the last.
        state_norm: of the running sum. ``scale``: from it to the merged vector; ``lambda_t`` its inverse.
        merged_norm: ||theta - theta_0||_2.
        sha256, size: of the merged vector's file; ``kept``: whether it is still there and can be served.
        snapshot: hash of the engine state's file; empty if there is none.
        seconds: from the update's turn to the commit.
        by: the admin behind a rollback or a removal.
    """

    number: int
    kind: VersionKind
    parent: int
    at: float
    update: str = ""
    task: str = ""
    site: str = ""
    examples: int = 0
    merges: int = 0
    norm_sum: float = 0.0
    update_norm: float = 0.0
    state_norm: float = 0.0
    scale: float = 0.0
    lambda_t: float = 0.0
    merged_norm: float = 0.0
    sha256: str = ""
    size: int = 0
    kept: bool = True
    snapshot: str = ""
    seconds: float = 0.0
    by: str = ""


@dataclass(frozen=True)
class Refusal:
    """One update that was not let in. ``error`` is the error's class name, ``reason`` its message."""

    at: float
    site: str
    task: str
    sha256: str
    size: int
    error: str
    reason: str


@dataclass(frozen=True)
class Status:
    """A server at a glance.

    Attributes:
        version: the current one, 0 for the base. ``tasks``: in the current model, in order of merging.
        staged, held: updates waiting. ``merged``: vectors in the current model.
        refused: how many updates were refused, by error. ``failing``: why merging stands still, or empty.
        disk: bytes in the state folder.
    """

    fedmerge: str
    base: str
    rule: str
    options: Mapping[str, object]
    version: int
    tasks: tuple[str, ...]
    staged: int
    held: int
    merged: int
    refused: Mapping[str, int] = field(default_factory=dict)
    failing: str = ""
    disk: int = 0
    started: float = 0.0


class AggregationService(Protocol):
    """What an aggregator does for its callers, in this process or behind an address.

    Every method may be called from any thread and raises FedmergeErrors.
    """

    def submit(self, source: Path, *, site: str) -> Receipt:
        """Hands in a task vector file; when this returns, the update survives a crash."""
        ...

    def update(self, update: str) -> UpdateRecord:
        """One acknowledged update. Raises NotFound."""
        ...

    def updates(self, after: int = 0, limit: int = 100) -> list[UpdateRecord]:
        """Acknowledged updates with a ``seq`` above ``after``, in order."""
        ...

    def refusals(self, limit: int = 100) -> list[Refusal]:
        """The latest refusals, newest first."""
        ...

    def status(self) -> Status: ...

    def version(self, number: int | None = None) -> VersionRecord:
        """One version, the current one by default. Raises NotFound."""
        ...

    def versions(self, after: int = 0, limit: int = 100) -> list[VersionRecord]:
        """Versions above ``after``, in order."""
        ...

    def fetch(self, into: Path, version: int | None = None, dtype: Dtype = "f32") -> VersionRecord:
        """Writes a version's merged vector as a task vector file; complete and verified, or not at all.

        Raises NotFound for version 0 or one that never was, NotKept for one that retention dropped.
        """
        ...

    def roll_back(self, version: int, *, by: str) -> VersionRecord:
        """Serves an earlier version again, as a new version; 0 is the base. Raises NotFound, NotKept."""
        ...

    def remove(self, task: str, *, by: str) -> VersionRecord:
        """Takes a task out of the current model, as a new version. Raises NotFound, NotKept."""
        ...

    def approve(self, update: str, *, by: str) -> Receipt:
        """Lets a held update in. Raises NotFound, StateError."""
        ...

    def reject(self, update: str, *, by: str, reason: str = "") -> None:
        """Turns a held update away. Raises NotFound, StateError."""
        ...

    def watch(self, after: int) -> Iterator[VersionRecord]:
        """The current version once it is above ``after``, and every newer one as it comes; versions in
        between may be passed over. Ends when the server does."""
        ...
