"""The methods of the contract, over an aggregator whose calls block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import grpc

from fedmerge.common.errors import ConfigError, FileError, NotFound, TooLarge
from fedmerge.common.hashing import SHA256
from fedmerge.common.messages import MOST_LISTED, to_dtype, to_message
from fedmerge.common.records import AggregationService, Dtype, Receipt, VersionRecord
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.protos.fedmerge.v1.aggregator_pb2_grpc import AggregatorServicer as Contract
from fedmerge.server.metrics import Metrics
from fedmerge.server.service.access import Context, Role, acting_site
from fedmerge.server.service.announcements import Announcements
from fedmerge.server.service.guard import CALLER
from fedmerge.server.service.limits import Pace, Slots
from fedmerge.server.service.settings import ServiceSettings
from fedmerge.server.service.threads import Lane, Threads

Result = TypeVar("Result")

SERVICE = pb.DESCRIPTOR.services_by_name["Aggregator"].full_name

EVERYONE = frozenset(Role)
SENDERS = frozenset({Role.SITE, Role.GATEWAY})
ADMINS = frozenset({Role.ADMIN})

ROLES: Mapping[str, Collection[Role]] = {
    "Submit": SENDERS,  # a site for itself, a gateway for any site
    "Pull": EVERYONE,
    "Watch": EVERYONE,
    "GetStatus": EVERYONE,
    "GetUpdate": EVERYONE,  # a site its own
    "ListUpdates": ADMINS,
    "ListRefusals": ADMINS,
    "GetVersion": EVERYONE,
    "ListVersions": EVERYONE,
    "RollBack": ADMINS,
    "Remove": ADMINS,
    "Approve": ADMINS,
    "Reject": ADMINS,
}
"""Who may call what; a method without a row is refused."""


class Upload(Protocol):
    """An update that is coming in; what is not finished when its context ends leaves no trace."""

    @property
    def known(self) -> Receipt | None:
        """The receipt, if the update has been acknowledged before and nothing need be sent."""
        ...

    def write(self, chunk: bytes | memoryview, /) -> None: ...

    def finish(self) -> Receipt: ...


class Published(Protocol):
    """A version's file, which stays readable until its context ends."""

    @property
    def record(self) -> VersionRecord: ...

    @property
    def path(self) -> Path: ...

    @property
    def size(self) -> int: ...

    @property
    def sha256(self) -> str: ...


class Backend(AggregationService, Protocol):
    """An aggregator as the service needs it. Every method blocks and may be called from any thread."""

    def receive(self, site: str, *, size: int, sha256: str) -> AbstractContextManager[Upload]: ...

    def open_version(
        self, version: int | None = None, dtype: Dtype = "f32"
    ) -> AbstractContextManager[Published]: ...


class AggregatorServicer(Contract):
    """Answers calls that a guard has let through; shared by all listeners."""

    def __init__(
        self,
        aggregator: Backend,
        settings: ServiceSettings,
        threads: Threads,
        announcements: Announcements,
        metrics: Metrics,
    ) -> None:
        self._aggregator, self._settings, self._metrics = aggregator, settings, metrics
        self._threads, self._announcements = threads, announcements
        self._uploads = Slots("uploads", settings.uploads)
        self._uploads_of = Slots("uploads of one site", settings.uploads_per_site)
        self._pulls = Slots("transfers of versions", settings.pulls)
        self._watchers = Slots("watchers", settings.watchers)
        self._calls = Slots("calls", settings.calls)

    async def Submit(self, requests: object, context: Context) -> pb.Receipt:
        caller = CALLER.get()
        pace = Pace(caller.name, self._settings)
        with self._uploads.taken():
            header = await _upload_header(context, pace)
            site = acting_site(caller, header.site)
            receive = partial(self._aggregator.receive, site, size=header.size, sha256=header.sha256)
            with self._uploads_of.taken(site):
                async with self._threads.opened(receive) as upload:
                    receipt = upload.known or await self._take_in(upload, header.size, context, pace)
        return to_message(receipt)  # type: ignore[no-any-return]

    async def _take_in(self, upload: Upload, size: int, context: Context, pace: Pace) -> Receipt:
        """Receives a file while the chunk before is written; holds two chunks."""
        received = 0
        async with Lane(self._threads) as writing:
            while (chunk := await _upload_chunk(context, pace)) is not None:
                if not chunk:
                    raise FileError("a chunk without bytes")
                received += len(chunk)
                if received > size:
                    raise TooLarge("more bytes than announced", got=f"over {size}", wanted=f"{size}")
                pace.moved(len(chunk))
                await writing.start(upload.write, chunk)
            await writing.done()
        if received < size:
            raise FileError("the upload ended early", got=f"{received} bytes", wanted=f"{size}")
        return await self._threads.run(upload.finish)

    async def Pull(self, request: pb.PullRequest, context: Context) -> None:
        version = request.version if request.HasField("version") else None
        opening = partial(self._aggregator.open_version, version, to_dtype(request.dtype))
        with self._pulls.taken():
            async with self._threads.opened(opening) as published:
                offset = request.offset if request.sha256 == published.sha256 else 0
                if not 0 <= offset <= published.size:
                    raise ConfigError("the offset is outside the file", got=offset, wanted=published.size)
                pace = Pace(CALLER.get().name, self._settings)
                async with pace.waiting():
                    await context.write(_pull_header(published, offset))
                await self._send(published.path, offset, context, pace)

    async def _send(self, path: Path, offset: int, context: Context, pace: Pace) -> None:
        """Sends a file while the next chunk is read; holds two chunks."""
        opening = partial(path.open, "rb", buffering=0)
        async with self._threads.opened(opening) as file, Lane(self._threads) as reading:
            file.seek(offset)
            await reading.start(file.read, self._settings.chunk_bytes)
            while chunk := await reading.done():
                assert isinstance(chunk, bytes)
                await reading.start(file.read, self._settings.chunk_bytes)
                async with pace.waiting():
                    await context.write(chunk)
                pace.moved(len(chunk))
                self._metrics.sent(len(chunk))

    async def Watch(self, request: pb.WatchRequest, context: Context) -> None:
        known = request.after
        with self._watchers.taken(), self._metrics.watcher():
            while True:
                record = await self._announcements.above(known)
                await context.write(to_message(record))
                known = record.number

    async def GetStatus(self, request: pb.GetStatusRequest, context: Context) -> pb.Status:
        status = await self._call(self._aggregator.status)
        if CALLER.get().roles <= {Role.SITE}:
            status = replace(status, failing=status.failing.partition(":")[0])
        return to_message(status)  # type: ignore[no-any-return]

    async def GetUpdate(self, request: pb.GetUpdateRequest, context: Context) -> pb.UpdateRecord:
        caller = CALLER.get()
        record = await self._call(self._aggregator.update, request.update)
        if record.site != caller.name and caller.roles <= {Role.SITE}:
            raise NotFound("no such update", got=repr(request.update))
        return to_message(record)  # type: ignore[no-any-return]

    async def ListUpdates(self, request: pb.ListUpdatesRequest, context: Context) -> pb.ListUpdatesResponse:
        found = await self._call(self._aggregator.updates, request.after, _limit(request.limit))
        return pb.ListUpdatesResponse(updates=map(to_message, found))

    async def ListRefusals(
        self, request: pb.ListRefusalsRequest, context: Context
    ) -> pb.ListRefusalsResponse:
        found = await self._call(self._aggregator.refusals, _limit(request.limit))
        return pb.ListRefusalsResponse(refusals=map(to_message, found))

    async def GetVersion(self, request: pb.GetVersionRequest, context: Context) -> pb.VersionRecord:
        number = request.version if request.HasField("version") else None
        return to_message(await self._call(self._aggregator.version, number))  # type: ignore[no-any-return]

    async def ListVersions(
        self, request: pb.ListVersionsRequest, context: Context
    ) -> pb.ListVersionsResponse:
        found = await self._call(self._aggregator.versions, request.after, _limit(request.limit))
        return pb.ListVersionsResponse(versions=map(to_message, found))

    async def RollBack(self, request: pb.RollBackRequest, context: Context) -> pb.VersionRecord:
        rolling = partial(self._aggregator.roll_back, request.version, by=CALLER.get().name)
        return to_message(await self._call(rolling))  # type: ignore[no-any-return]

    async def Remove(self, request: pb.RemoveRequest, context: Context) -> pb.VersionRecord:
        removing = partial(self._aggregator.remove, request.task, by=CALLER.get().name)
        return to_message(await self._call(removing))  # type: ignore[no-any-return]

    async def Approve(self, request: pb.ApproveRequest, context: Context) -> pb.Receipt:
        approving = partial(self._aggregator.approve, request.update, by=CALLER.get().name)
        return to_message(await self._call(approving))  # type: ignore[no-any-return]

    async def Reject(self, request: pb.RejectRequest, context: Context) -> pb.RejectResponse:
        by = CALLER.get().name
        await self._call(partial(self._aggregator.reject, request.update, by=by, reason=request.reason))
        return pb.RejectResponse()

    async def _call(self, function: Callable[..., Result], *args: object) -> Result:
        with self._calls.taken():
            return await self._threads.run(function, *args)


def _pull_header(published: Published, offset: int) -> pb.PullResponse:
    header = pb.PullHeader(
        record=to_message(published.record), size=published.size, sha256=published.sha256, offset=offset
    )
    return pb.PullResponse(header=header)


async def _upload_header(context: Context, pace: Pace) -> pb.UploadHeader:
    message = await _next(context, pace)
    if not isinstance(message, pb.SubmitRequest) or message.WhichOneof("part") != "header":
        raise FileError("an upload begins with its header")
    if message.header.size < 1:
        raise FileError("an upload needs bytes", got=message.header.size, wanted="a size of at least 1")
    if not SHA256.fullmatch(message.header.sha256):
        raise FileError("not a SHA-256", got=ascii(message.header.sha256[:80]))
    return message.header


async def _upload_chunk(context: Context, pace: Pace) -> bytes | memoryview | None:
    """The next bytes; None after the last."""
    message = await _next(context, pace)
    if not isinstance(message, pb.SubmitRequest):
        return message
    if message.WhichOneof("part") != "chunk":
        raise FileError("an upload is its header, then chunks")
    return message.chunk


async def _next(context: Context, pace: Pace) -> pb.SubmitRequest | memoryview | None:
    """The next message, a chunk as its bytes; None after the last."""
    async with pace.waiting():
        message: Any = await context.read()
    return None if message is grpc.aio.EOF else message


def _limit(limit: int) -> int:
    if not 1 <= limit <= MOST_LISTED:
        raise ConfigError("the limit is out of range", got=limit, wanted=f"1 to {MOST_LISTED}")
    return limit
