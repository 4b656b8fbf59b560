"""The sites of a serving server: what it knows of each, and how it treats them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.common.config import Seed
from fedmerge.common.ranges import MAX_MESSAGE_BYTES, RANGE_BYTES
from fedmerge.common.records import Dtype
from fedmerge.server.admission import LIMITS

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]
MessageBytes = Annotated[int, Field(ge=1, le=MAX_MESSAGE_BYTES)]

LONGEST_WAIT = 3600.0
WINDOW = 2
"""Ranges under way per site: the next one travels while the site works on this one."""
SLOWEST_LINE = 500_000
"""Bytes per second; a site on a slower line needs smaller ranges than the default ones."""
START_SECONDS = 120.0
"""For what a site does with a range, in processes of their own, on a busy machine."""


class ServingSettings(BaseModel):
    """How a server serves. Times are in seconds.

    Attributes:
        seed: of every local run.
        announce_seconds: between two hellos of a site that has nothing to do.
        ask_again_seconds: until a site that was refused is asked again.
        timeout_seconds: for one message, from sending it to its reply; for a range at most what one takes
            on the slowest line, so that a lost one is soon sent again.
        late_seconds: a training's reply is still taken so long after its time.
        attempts: how often a task is tried before it is given up until the server starts again.
        retry_seconds: before the second attempt; doubled each time, up to an hour.
        evaluate: whether sites score every version they get on the tasks they hold.
        dtype: how merged vectors are sent: ``f32``, or ``bf16`` at half the bytes.
        max_message_bytes: a larger vector travels in ranges of ``range_bytes``.
        max_update_bytes: a larger update is refused before it travels; the service has a bound of its own.
        report_seconds: between two lines that say how things are.
        registered_sites: whether only nodes registered under a name may take part. Set it wherever
            SuperNodes authenticate; without it a node with no registered name goes by its own label.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: Seed = 0
    announce_seconds: Seconds = 30.0
    ask_again_seconds: Seconds = 600.0
    timeout_seconds: Seconds = 3600.0
    late_seconds: Seconds = 43_200.0
    attempts: Positive = 5
    retry_seconds: Seconds = 30.0
    evaluate: bool = True
    dtype: Dtype = "f32"
    max_message_bytes: MessageBytes = MAX_MESSAGE_BYTES
    range_bytes: MessageBytes = RANGE_BYTES
    max_update_bytes: Positive = LIMITS.max_update_bytes
    report_seconds: Seconds = 60.0
    registered_sites: bool = False

    @property
    def range_seconds(self) -> float:
        """For one range, from sending it to its reply."""
        return min(self.timeout_seconds, START_SECONDS + WINDOW * self.range_bytes / SLOWEST_LINE)


@dataclass
class Tries:
    """Something that fails now and then.

    Attributes:
        first: seconds before the second attempt, doubled each time, up to ``longest``.
        count: failures in a row. ``at``: when it may be tried again.
    """

    first: float
    longest: float = LONGEST_WAIT
    count: int = 0
    at: float = 0.0

    def failed(self, now: float, wait: float | None = None) -> None:
        self.at = now + (wait or min(self.first * 2.0 ** min(self.count, 20), self.longest))
        self.count += 1

    def gone(self, now: float) -> None:
        """It could not even be tried."""
        self.at = now + self.first

    def worked(self) -> None:
        self.count, self.at = 0, 0.0


@dataclass
class Peer:
    """A connected node.

    Attributes:
        name: as registered. ``site``: who it is to the service; empty until it has been let in.
        holds: number and hash of the version it has.
        hello_at: when to greet it. ``checked``: whether its base has been compared since it came.
        offer: the version on its way. ``published_last``: whether it got one since it was last taught.
    """

    node: int
    name: str
    publishing: Tries
    site: str = ""
    tasks: tuple[str, ...] = ()
    holds: tuple[int, str] = (0, "")
    hello_at: float = -math.inf
    checked: bool = False
    offer: int | None = None
    published_last: bool = False


def reported(value: object) -> float | None:
    """A number that a site reports, rounded; None if it is none."""
    return round(float(value), 4) if isinstance(value, int | float) and abs(value) < math.inf else None
