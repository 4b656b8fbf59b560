"""What a service allows its callers."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.common.messages import CHUNK_BYTES

Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class ServiceSettings(BaseModel):
    """Bounds on bytes, time and calls; whoever comes beyond them is refused, never queued.

    Attributes:
        chunk_bytes: payload of a message of a version that is sent. What sites send may be larger.
        idle_seconds: how long to wait for the other side's next chunk.
        min_bytes_per_second: what a transfer must reach on average, ``grace_seconds`` after it began;
            only the time spent waiting for the other side counts.
        uploads, pulls, watchers, calls: how many at a time, all sites together; a call is any other method.
        uploads_per_site: how many at a time of one site. ``calls_per_site``: likewise of everything it asks,
            uploads, transfers and watching included.
        keepalive_seconds: silence after which a connection is tried; it is dropped ``keepalive_timeout``
            seconds later.
        stop_seconds: how long calls under way may still take when the service stops.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    chunk_bytes: Annotated[int, Field(ge=1024, le=CHUNK_BYTES)] = CHUNK_BYTES
    idle_seconds: Seconds = 30.0
    grace_seconds: Seconds = 30.0
    min_bytes_per_second: Count = 16 << 10
    uploads: Count = 16
    uploads_per_site: Count = 2
    pulls: Count = 16
    watchers: Count = 256
    calls: Count = 32
    calls_per_site: Count = 6
    keepalive_seconds: Annotated[float, Field(ge=10, le=7200)] = 30.0
    keepalive_timeout: Seconds = 20.0
    stop_seconds: Annotated[float, Field(ge=0, le=3600)] = 10.0
