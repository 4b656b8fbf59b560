"""An aggregator behind an address, over gRPC."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from fedmerge.common.address import host_of
from fedmerge.common.buffers import GRPC_WINDOW, recycle_buffers
from fedmerge.common.errors import (
    Busy,
    ConfigError,
    FedmergeError,
    FileError,
    Forbidden,
    LimitError,
    NotFound,
    StoreFull,
    Unauthenticated,
    Unreachable,
    VersionMismatch,
)
from fedmerge.common.frames import from_wire, to_wire
from fedmerge.common.hashing import hash_file
from fedmerge.common.messages import (
    CHUNK_BYTES,
    DTYPES,
    FRAME_BYTES,
    MOST_LISTED,
    Record,
    to_record,
    unpack_error,
)
from fedmerge.common.names import SITE_KEY
from fedmerge.common.partfile import PartFile
from fedmerge.common.records import (
    Dtype,
    Receipt,
    Refusal,
    Status,
    UpdateRecord,
    UpdateState,
    VersionRecord,
    update_id,
)
from fedmerge.common.tls import is_loopback
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.protos.fedmerge.v1.aggregator_pb2_grpc import AggregatorStub

OPTIONS = (
    *GRPC_WINDOW,
    ("grpc.max_receive_message_length", 4 * (CHUNK_BYTES + FRAME_BYTES)),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 5000),
)

SERVICE = pb.DESCRIPTOR.services_by_name["Aggregator"].full_name
SUBMIT, PULL = f"/{SERVICE}/Submit", f"/{SERVICE}/Pull"

SLOWEST_BYTES_PER_SECOND = 16 << 10
"""A transfer that is slower on average is given up."""

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0
"""Seconds between attempts, doubled from one to the next."""

MOST_DOUBLINGS = 10

ACT_SECONDS = 3600.0
"""For the answer to a rollback or a removal, which may have to merge many updates again."""

Progress = Callable[[int, int], None]
"""Told after each chunk: bytes that are over, and the size of the file."""


def _tell_nobody(done: int, size: int) -> None:
    pass


class RemoteAggregator:
    """Implements ``records.AggregationService`` over one connection, which restores itself.

    Submitting and fetching go on after an interruption: submitting by asking first whether the update is
    known by now, fetching from the bytes already there.

    Args:
        address: ``host:port`` or ``unix:/path/to/socket``.
        credentials: see ``common.tls``; None for no TLS, which only this machine can be reached by.
        site: the name under which to call a server without TLS; with TLS, the certificate names the caller.
        timeout: seconds for the answer to one call; transfers get more, by their size.
        patience: seconds for which failed transfers and watches are tried again without any progress.

    Raises:
        ConfigError: not an address, or another machine's without TLS.
    """

    def __init__(
        self,
        address: str,
        credentials: grpc.ChannelCredentials | None = None,
        *,
        site: str | None = None,
        timeout: float = 30.0,
        patience: float = 300.0,
    ) -> None:
        if credentials is None and not is_loopback(host_of(address)):
            raise ConfigError(
                "another machine needs TLS", where=address, do="Give ca, cert and key of this side."
            )
        recycle_buffers()
        self._address, self._site = address, site
        self._timeout, self._patience = timeout, patience
        # This machine is reached as it is, whatever proxy the environment names for others.
        options = (*OPTIONS, ("grpc.enable_http_proxy", int(not is_loopback(host_of(address)))))
        self._channel = (
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self._stub: Any = AggregatorStub(self._channel)  # type: ignore[no-untyped-call]
        self._submit: Any = self._channel.stream_unary(SUBMIT, to_wire, pb.Receipt.FromString)
        self._pull: Any = self._channel.unary_stream(
            PULL, pb.PullRequest.SerializeToString, from_wire(pb.PullResponse)
        )

    def close(self) -> None:
        """Ends the connection; calls under way raise Unreachable."""
        self._channel.close()

    def __enter__(self) -> RemoteAggregator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def submit(self, source: Path, *, site: str, sent: Progress = _tell_nobody) -> Receipt:
        """Hands in a task vector file; when this returns, the update survives a crash."""
        header = _upload_header(source, site)
        retry = Retry(self._patience)
        while True:
            try:
                return self._known(site, header.sha256) or self._send(source, header, sent)
            except FedmergeError as error:
                retry.wait(error)

    def update(self, update: str) -> UpdateRecord:
        return to_record(self._ask("GetUpdate", update=update), UpdateRecord)

    def updates(self, after: int = 0, limit: int = 100) -> list[UpdateRecord]:
        return self._listed("ListUpdates", "updates", UpdateRecord, lambda last: last.seq, after, limit)

    def refusals(self, limit: int = 100) -> list[Refusal]:
        """The latest refusals, newest first; at most 1,000."""
        page = self._ask("ListRefusals", limit=min(limit, MOST_LISTED)).refusals
        return [to_record(message, Refusal) for message in page]

    def status(self) -> Status:
        return to_record(self._ask("GetStatus"), Status)

    def version(self, number: int | None = None) -> VersionRecord:
        return to_record(self._ask("GetVersion", version=number), VersionRecord)

    def versions(self, after: int = 0, limit: int = 100) -> list[VersionRecord]:
        return self._listed("ListVersions", "versions", VersionRecord, lambda last: last.number, after, limit)

    def fetch(
        self,
        into: Path,
        version: int | None = None,
        dtype: Dtype = "f32",
        received: Progress = _tell_nobody,
    ) -> VersionRecord:
        """Writes a version's merged vector as a task vector file; complete and verified, or not at all.

        What came before an interruption stays in a hidden file beside ``into``, also for a later call.
        """
        retry = Retry(self._patience)
        with PartFile(into) as part:
            while True:
                before = part.size
                try:
                    return self._receive(part, version, dtype, received)
                except FedmergeError as error:
                    if part.size > before:
                        retry.reset()
                    retry.wait(error)

    def roll_back(self, version: int, *, by: str) -> VersionRecord:
        return to_record(self._ask("RollBack", by, ACT_SECONDS, version=version), VersionRecord)

    def remove(self, task: str, *, by: str) -> VersionRecord:
        return to_record(self._ask("Remove", by, ACT_SECONDS, task=task), VersionRecord)

    def approve(self, update: str, *, by: str) -> Receipt:
        return to_record(self._ask("Approve", by, update=update), Receipt)

    def reject(self, update: str, *, by: str, reason: str = "") -> None:
        self._ask("Reject", by, update=update, reason=reason)

    def watch(self, after: int) -> Iterator[VersionRecord]:
        """The current version once it is above ``after``, and newer ones as they come.

        Goes on when the server comes back; once it is gone for longer than ``patience``, raises Unreachable.
        """
        retry = Retry(self._patience)
        while True:
            call = self._stub.Watch(_request("Watch", after=after), metadata=self._metadata())
            try:
                for message in call:
                    record = to_record(message, VersionRecord)
                    after = record.number
                    retry.reset()
                    yield record
                failure: FedmergeError = Unreachable("the server ended the stream", where=self._address)
            except grpc.RpcError as error:
                failure = self._told_by(error)
            finally:
                call.cancel()
            retry.wait(failure)

    def _known(self, site: str, sha256: str) -> Receipt | None:
        try:
            found = self.update(update_id(site, sha256))
        except NotFound:
            return None
        if found.state is UpdateState.FAILED:
            return None
        return Receipt(found.id, found.state, found.version, again=True)

    def _send(self, source: Path, header: pb.UploadHeader, sent: Progress) -> Receipt:
        try:
            message = self._submit(
                _upload(source, header, sent),
                timeout=self._transfer_seconds(header.size),
                metadata=self._metadata(),
            )
        except grpc.RpcError as error:
            raise self._told_by(error) from error
        return to_record(message, Receipt)

    def _receive(
        self, part: PartFile, version: int | None, dtype: Dtype, received: Progress
    ) -> VersionRecord:
        request = _request("Pull", version=version, dtype=DTYPES[dtype], offset=part.size, sha256=part.sha256)
        call = self._pull(request, metadata=self._metadata())
        try:
            header = _pull_header(next(call, None))
            part.expect(header.sha256, header.offset)
            with ThreadPoolExecutor(1) as writer:
                _write_behind(map(_chunk_of, call), part, writer, received, header.size)
        except grpc.RpcError as error:
            raise self._told_by(error) from error
        finally:
            call.cancel()
        part.finish()
        return to_record(header.record, VersionRecord)

    def _ask(self, method: str, by: str | None = None, seconds: float | None = None, **fields: object) -> Any:
        """The answer to one call; ``by`` names the caller instead of ``site``."""
        request = _request(method, **fields)
        try:
            return getattr(self._stub, method)(
                request, timeout=seconds or self._timeout, metadata=self._metadata(by)
            )
        except grpc.RpcError as error:
            raise self._told_by(error) from error

    def _listed(
        self,
        method: str,
        field: str,
        kind: type[Record],
        place: Callable[[Record], int],
        after: int,
        limit: int,
    ) -> list[Record]:
        """Records above ``after``, in as many calls as it takes; ``place`` is what they are in order of."""
        found: list[Record] = []
        while len(found) < limit:
            asked = min(limit - len(found), MOST_LISTED)
            answer = self._ask(method, after=place(found[-1]) if found else after, limit=asked)
            page = getattr(answer, field)
            found += [to_record(message, kind) for message in page]
            if len(page) < asked:
                break
        return found

    def _metadata(self, by: str | None = None) -> list[tuple[str, str]]:
        name = by or self._site
        if name and not (name.isascii() and name.isprintable()):
            raise ConfigError("not a name that can be sent", got=ascii(name))
        return [(SITE_KEY, name)] if name else []

    def _transfer_seconds(self, size: int) -> float:
        return self._timeout + size / SLOWEST_BYTES_PER_SECOND

    def _told_by(self, error: grpc.RpcError) -> FedmergeError:
        """The error that the server raised, or what can be said without its help."""
        assert isinstance(error, grpc.Call)
        metadata = dict(error.trailing_metadata() or ())
        return unpack_error(metadata) or _untold(error, self._address)


class Retry:
    """Decides whether and when a failed transfer is tried again.

    Args:
        patience: seconds since the first failure, or since the last progress.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        """There was progress."""
        self._failures, self._first = 0, 0.0

    def wait(self, error: FedmergeError) -> None:
        """Returns when it is time to try again; raises the error if that would not help or come in time."""
        now = time.monotonic()
        self._first = self._first if self._failures else now
        pause = self._pause(error)
        if pause is None or now + pause > self._first + self._patience:
            raise error
        self._failures += 1
        time.sleep(pause)

    def _pause(self, error: FedmergeError) -> float | None:
        """Seconds; never twice the same, so that sites cut off together do not come back together."""
        if isinstance(error, LimitError) and error.retry_after is not None:
            return float(error.retry_after) * random.uniform(1.0, 1.25)
        if isinstance(error, Unreachable | StoreFull):
            doublings = min(self._failures, MOST_DOUBLINGS)
            return min(FIRST_PAUSE * 2.0**doublings, LONGEST_PAUSE) * random.uniform(0.5, 1.0)
        return None


def _request(method: str, **fields: object) -> Any:
    try:
        return getattr(pb, f"{method}Request")(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError("a value that cannot be sent", where=method, got=str(error)) from error


def _upload_header(source: Path, site: str) -> pb.UploadHeader:
    sha256, size = hash_file(source)
    if not (site.isascii() and site.isprintable()):
        raise ConfigError("not a name that can be sent", got=ascii(site))
    return pb.UploadHeader(site=site, size=size, sha256=sha256)


def _upload(source: Path, header: pb.UploadHeader, sent: Progress) -> Iterator[pb.SubmitRequest | bytes]:
    """What is sent, one message in memory at a time."""
    yield pb.SubmitRequest(header=header)
    with source.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
            sent(file.tell(), header.size)


def _pull_header(message: pb.PullResponse | memoryview | None) -> pb.PullHeader:
    if not isinstance(message, pb.PullResponse) or message.WhichOneof("part") != "header":
        raise FileError("a version begins with its header")
    return message.header


def _chunk_of(message: pb.PullResponse | memoryview) -> bytes | memoryview:
    return message.chunk if isinstance(message, pb.PullResponse) else message


def _write_behind(
    chunks: Iterator[bytes | memoryview],
    part: PartFile,
    writer: ThreadPoolExecutor,
    received: Progress,
    size: int,
) -> None:
    """Writes each chunk while the next one comes; holds two chunks.

    Raises:
        Unreachable: the stream ended before the last byte. FileError: the disk.
    """
    writing: Future[None] | None = None
    try:
        for chunk in chunks:
            if writing is not None:
                writing.result()
            if part.size + len(chunk) > size:
                raise FileError("more bytes than announced", wanted=f"{size}")
            received(part.size, size)
            writing = writer.submit(part.append, chunk)
    finally:
        if writing is not None:
            writing.result()
    received(part.size, size)
    if part.size < size:
        raise Unreachable("the server stopped sending", got=f"{part.size} bytes", wanted=f"{size}")


def _untold(error: grpc.Call, address: str) -> FedmergeError:
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "handshake" in details.lower():
        return Unauthenticated(
            "no TLS connection", where=address, got=details, do="Check ca, cert and key of both sides."
        )
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED | grpc.StatusCode.CANCELLED:
            return Unreachable(
                "the server does not answer",
                where=address,
                got=f"{code.name}: {details}",
                do="Is it running, and is this its address? Whatever was acknowledged is safe.",
            )
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Busy("the server takes no more calls for now", where=address, got=details)
        case grpc.StatusCode.UNIMPLEMENTED:
            return VersionMismatch(
                "the server does not know this call",
                where=address,
                do="Use the same fedmerge version on both sides.",
            )
        case grpc.StatusCode.UNAUTHENTICATED:
            return Unauthenticated("the server does not know who asks", where=address, got=details)
        case grpc.StatusCode.PERMISSION_DENIED:
            return Forbidden("the server does not allow it", where=address, got=details)
    return FedmergeError("the call failed", where=address, got=f"{code.name}: {details}")
