"""Can one site with a valid certificate keep the others out, or learn what is not its own?"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_aggregator import FakeAggregator
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2_grpc

from fedmerge.common.errors import Busy, FileError, NotFound, StoreDamaged
from fedmerge.common.messages import unpack_error
from fedmerge.common.records import update_id
from fedmerge.common.remote import RemoteAggregator
from fedmerge.common.tls import channel_credentials, server_credentials
from fedmerge.deploy.authority import Authority, tls_files
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.protos.fedmerge.v1.aggregator_pb2_grpc import AggregatorStub
from fedmerge.server.service.access import CertificateAccess
from fedmerge.server.service.server import Listener, Service
from fedmerge.server.service.settings import ServiceSettings

SECONDS = 60
HONEST, ATTACKER = "sites/hospital-1", "sites/hospital-2"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    made = Authority.create(tmp_path / "certs", "lab")
    made.server(["127.0.0.1"])
    for name in ("hospital-1", "hospital-2"):
        made.site(name)
    made.admin("alice")
    return made


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAggregator]:
    fake = FakeAggregator(tmp_path / "state")
    yield fake
    fake.close()


@pytest.fixture
def serve(authority: Authority, fake: FakeAggregator) -> Iterator[Callable[..., str]]:
    """Starts a service for the authority's certificates, with few places, and gives its address."""
    files = tls_files(authority.folder / "server")
    with ExitStack() as stack:

        def start(**settings: Any) -> str:
            few = {"uploads": 4, "pulls": 4, "watchers": 4, "calls": 4, "calls_per_site": 2}
            access = CertificateAccess(authority.folder / "ca.crt", authority.folder / "crl.pem")
            service = stack.enter_context(
                Service(
                    fake,
                    [Listener("127.0.0.1:0", access, server_credentials(files))],
                    ServiceSettings(**{**few, "stop_seconds": 0, **settings}),
                )
            )
            return service.addresses[0]

        yield start


@pytest.fixture
def connect(authority: Authority) -> Iterator[Callable[[str, str], grpc.Channel]]:
    """A connection of its own with a certificate."""
    with ExitStack() as stack:

        def secure(address: str, who: str) -> grpc.Channel:
            credentials = channel_credentials(tls_files(authority.folder / who))
            options = [("grpc.use_local_subchannel_pool", 1)]
            return stack.enter_context(grpc.secure_channel(address, credentials, options))

        yield secure


@contextmanager
def silent() -> Iterator[Callable[[], Iterator[Any]]]:
    """Makes requests that never come."""
    over = threading.Event()

    def never() -> Iterator[Any]:
        over.wait()
        yield from ()

    try:
        yield never
    finally:
        over.set()


def uploads_without_a_header(channel: grpc.Channel, requests: Iterator[Any]) -> Any:
    return AggregatorStub(channel).Submit.future(requests)  # type: ignore[no-untyped-call]


def calls_without_a_request(channel: grpc.Channel, requests: Iterator[Any]) -> Any:
    return channel.stream_unary("/fedmerge.v1.Aggregator/GetStatus").future(requests)


def watchers(channel: grpc.Channel, requests: Iterator[Any]) -> Any:
    return AggregatorStub(channel).Watch(pb.WatchRequest(after=9))  # type: ignore[no-untyped-call]


def watchers_of_health(channel: grpc.Channel, requests: Iterator[Any]) -> Any:
    return health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="x"))


def questions_without_an_end(channel: grpc.Channel, requests: Iterator[Any]) -> Any:
    return reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(requests)


@pytest.mark.parametrize(
    "attack",
    [
        uploads_without_a_header,
        calls_without_a_request,
        watchers,
        watchers_of_health,
        questions_without_an_end,
    ],
)
def test_one_site_has_only_so_many_calls_under_way(
    attack: Callable[[grpc.Channel, Iterator[Any]], Any],
    serve: Callable[..., str],
    connect: Callable[[str, str], grpc.Channel],
) -> None:
    address = serve(idle_seconds=10 * SECONDS)
    attacker, honest = connect(address, ATTACKER), connect(address, HONEST)
    with silent() as requests:
        open_calls = [attack(attacker, requests()) for _ in range(3)]
        ended = threading.Semaphore(0)
        for call in open_calls:
            if not call.add_callback(ended.release):  # it had ended before
                ended.release()
        assert ended.acquire(timeout=SECONDS), "the third is turned away"
        errors = [unpack_error(dict(call.trailing_metadata())) for call in open_calls if call.done()]
        assert [type(error) for error in errors] == [Busy]
        stub: Any = AggregatorStub(honest)  # type: ignore[no-untyped-call]
        assert stub.GetStatus(pb.GetStatusRequest(), timeout=SECONDS).version == 0
        for call in open_calls:
            call.cancel()


def test_a_call_whose_request_does_not_come_is_cut_off(
    serve: Callable[..., str], connect: Callable[[str, str], grpc.Channel]
) -> None:
    channel = connect(serve(idle_seconds=0.2), ATTACKER)
    with silent() as requests:
        call = calls_without_a_request(channel, requests())
        with pytest.raises(grpc.RpcError) as caught:
            call.result(timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]


def test_a_revoked_site_learns_nothing_from_health_and_reflection_either(
    authority: Authority, serve: Callable[..., str], connect: Callable[[str, str], grpc.Channel]
) -> None:
    channel = connect(serve(), ATTACKER)
    health = health_pb2_grpc.HealthStub(channel)
    assert health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS).status
    authority.revoke("hospital-2")
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(), timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]


@pytest.mark.parametrize("sha256", ["", "ab" * 31, "AB" * 32, "ab" * 32 + "\n", "x" * 100_000])
def test_what_is_no_hash_gets_no_further_than_the_service(
    sha256: str,
    fake: FakeAggregator,
    serve: Callable[..., str],
    connect: Callable[[str, str], grpc.Channel],
) -> None:
    stub: Any = AggregatorStub(connect(serve(), ATTACKER))  # type: ignore[no-untyped-call]
    header = pb.SubmitRequest(header=pb.UploadHeader(size=1, sha256=sha256))
    with pytest.raises(grpc.RpcError) as caught:
        stub.Submit(iter([header]), timeout=SECONDS)
    assert isinstance(unpack_error(dict(caught.value.trailing_metadata())), FileError)  # type: ignore
    assert not fake.calls["receive"]


def test_a_site_cannot_tell_another_site_s_update_from_none(
    authority: Authority, tmp_path: Path, serve: Callable[..., str]
) -> None:
    address = serve()
    vector = tmp_path / "vector.safetensors"
    vector.write_bytes(b"what only hospital-1 knows")
    sha256 = hashlib.sha256(vector.read_bytes()).hexdigest()
    theirs = update_id("hospital-1", sha256)

    def said(update: str) -> str:
        credentials = channel_credentials(tls_files(authority.folder / ATTACKER))
        with RemoteAggregator(address, credentials) as remote, pytest.raises(NotFound) as caught:
            remote.update(update)
        return str(caught.value)

    before = said(theirs)
    credentials = channel_credentials(tls_files(authority.folder / HONEST))
    with RemoteAggregator(address, credentials) as honest:
        assert honest.submit(vector, site="hospital-1").update == theirs
    assert said(theirs) == before


def test_errors_do_not_tell_sites_where_the_server_keeps_its_files(
    authority: Authority, fake: FakeAggregator, serve: Callable[..., str]
) -> None:
    def broken() -> None:
        raise StoreDamaged("not what was written", where=fake.folder / "blobs" / "ab12.safetensors")

    fake.on_status = broken
    credentials = channel_credentials(tls_files(authority.folder / ATTACKER))
    with (
        RemoteAggregator(serve(), credentials) as remote,
        pytest.raises(StoreDamaged, match=r"^ab12.safetensors: not what was written$"),
    ):
        remote.status()


@pytest.mark.parametrize("method", ["GetUpdate", "Watch", "Submit"])
def test_bytes_that_are_no_message_are_the_caller_s_fault(
    method: str, serve: Callable[..., str], connect: Callable[[str, str], grpc.Channel]
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        connect(serve(), ATTACKER).unary_unary(f"/fedmerge.v1.Aggregator/{method}")(
            b"\xff\xff", timeout=SECONDS
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def test_health_of_what_is_not_served_is_not_found(
    serve: Callable[..., str], connect: Callable[[str, str], grpc.Channel]
) -> None:
    health = health_pb2_grpc.HealthStub(connect(serve(), ATTACKER))
    with pytest.raises(grpc.RpcError) as caught:
        health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_sites_are_told_that_merging_stands_still_and_admins_why(
    authority: Authority, fake: FakeAggregator, serve: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    status = replace(fake.status(), failing=f"StoreFull: {fake.folder}: cannot be written")
    monkeypatch.setattr(fake, "status", lambda: status)
    address, told = serve(), {}
    for who in (ATTACKER, "admins/alice"):
        credentials = channel_credentials(tls_files(authority.folder / who))
        with RemoteAggregator(address, credentials) as remote:
            told[who] = remote.status().failing
    assert told == {ATTACKER: "StoreFull", "admins/alice": status.failing}
