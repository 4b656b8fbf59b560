"""What a state folder keeps: a bounded number of versions, vectors and snapshots."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.server.store.ledger import Ledger


class Retention(BaseModel):
    """How much is kept on disk.

    What it takes to serve and to continue any kept version stays, whatever the other numbers say.

    Attributes:
        versions: merged vectors, the newest first; only these can be served again or rolled back to.
        vectors: merged updates' task vectors, the newest first; a task whose vector is gone cannot be
            removed. None keeps all.
        snapshot_every: merges between two snapshots of the engine's state; a restart replays at most so
            many.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: Annotated[int, Field(ge=1)] = 10
    vectors: Annotated[int, Field(ge=0)] | None = 100
    snapshot_every: Annotated[int, Field(ge=1)] = 8


def expired_versions(ledger: Ledger, keep: int) -> list[int]:
    """Versions whose merged vector may go; never the current one."""
    return [version.number for version in ledger.kept_versions()[:-keep]]


def replay_floor(ledger: Ledger, retention: Retention) -> int:
    """The version that every kept one can be rebuilt from: 0, or one with a snapshot.

    Snapshots before it, and vectors merged up to it, are not needed. From any later version, versions
    lead down one by one to this one or to a rollback or removal, and those have snapshots of their own.
    """
    kept = ledger.kept_versions()
    if not kept or retention.vectors is None:
        return 0
    oldest = kept[max(0, len(kept) - retention.versions)].number
    wanted = min(oldest, kept[-1].number - retention.vectors)
    return max((v.number for v in ledger.snapshots() if v.number <= wanted), default=0)
