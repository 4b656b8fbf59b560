"""Is an aggregator behind an address the same as one in this process?"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_aggregator import FakeAccess, FakeAggregator
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from fedmerge.common import errors
from fedmerge.common.errors import (
    Busy,
    ConfigError,
    FedmergeError,
    FileError,
    Forbidden,
    NotFound,
    StateError,
    StoreFull,
    Unauthenticated,
    Unreachable,
)
from fedmerge.common.messages import KINDS
from fedmerge.common.records import Receipt, UpdateState, VersionKind, VersionRecord
from fedmerge.common.remote import RemoteAggregator
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.server.metrics import Metrics
from fedmerge.server.service.access import LoopbackAccess, Role, SocketAccess
from fedmerge.server.service.guard import Guard
from fedmerge.server.service.server import Listener, Service
from fedmerge.server.service.servicer import ROLES, SERVICE, AggregatorServicer
from fedmerge.server.service.settings import ServiceSettings
from fedmerge.server.service.status import STATUS

SIZE = 3_000_001
"""Not a whole number of chunks."""

Start = Callable[..., RemoteAggregator]


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeAggregator]:
    fake = FakeAggregator(tmp_path / "state")
    yield fake
    fake.close()


@pytest.fixture
def vector(tmp_path: Path) -> Path:
    path = tmp_path / "vector.safetensors"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def serving() -> Iterator[Callable[..., Service]]:
    """Serves an aggregator on loopback, with all roles unless told otherwise."""
    with ExitStack() as stack:

        def start(aggregator: Any, *roles: Role, metrics: Metrics | None = None, **settings: Any) -> Service:
            chosen = ServiceSettings(**{"stop_seconds": 0, **settings})
            listener = Listener("127.0.0.1:0", FakeAccess(*roles))
            return stack.enter_context(Service(aggregator, [listener], chosen, metrics))

        yield start


@pytest.fixture
def connect(serving: Callable[..., Service]) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(aggregator: Any, *roles: Role, site: str = "site-1", **settings: Any) -> RemoteAggregator:
            (address,) = serving(aggregator, *roles, **settings).addresses
            return stack.enter_context(RemoteAggregator(address, site=site, timeout=20, patience=0))

        yield start


def test_a_submitted_file_arrives_and_is_fetched_byte_for_byte(
    fake: FakeAggregator, connect: Start, vector: Path, tmp_path: Path
) -> None:
    remote = connect(fake)
    sent: list[tuple[int, int]] = []
    receipt = remote.submit(vector, site="site-1", sent=lambda done, size: sent.append((done, size)))
    assert receipt.state is UpdateState.MERGED
    assert sent[-1] == (SIZE, SIZE)
    record = remote.fetch(tmp_path / "merged", receipt.version)
    assert record == fake.version(1)
    assert (tmp_path / "merged").read_bytes() == vector.read_bytes()
    assert fake.parts() == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_current_version_is_fetched_by_default(
    fake: FakeAggregator, connect: Start, vector: Path, tmp_path: Path
) -> None:
    fake.submit(vector, site="site-1")
    fake.roll_back(1, by="admin")
    progress: list[tuple[int, int]] = []
    record = connect(fake).fetch(tmp_path / "m", received=lambda done, size: progress.append((done, size)))
    assert (record.number, record.kind) == (2, VersionKind.ROLLBACK)
    assert progress[-1] == (SIZE, SIZE)


def test_a_known_update_is_not_sent_again(fake: FakeAggregator, connect: Start, vector: Path) -> None:
    remote = connect(fake)
    first = remote.submit(vector, site="site-1")
    received = fake.calls["receive"]
    again = remote.submit(vector, site="site-1")
    assert again == Receipt(first.update, first.state, first.version, again=True)
    assert fake.calls["receive"] == received


def test_every_answer_is_that_of_the_aggregator(fake: FakeAggregator, connect: Start, vector: Path) -> None:
    fake.submit(vector, site="site-1")
    remote = connect(fake)
    update = fake.updates()[0].id
    for ask in (
        lambda service: service.status(),
        lambda service: service.update(update),
        lambda service: service.updates(),
        lambda service: service.updates(after=1),
        lambda service: service.refusals(5),
        lambda service: service.version(),
        lambda service: service.version(0),
        lambda service: service.versions(after=-1),
        lambda service: service.versions(after=-1, limit=1),
    ):
        assert ask(remote) == ask(fake)


def test_long_lists_come_in_pages(fake: FakeAggregator, connect: Start, vector: Path) -> None:
    fake.submit(vector, site="site-1")
    for _ in range(1500):
        fake.roll_back(1, by="admin")
    remote = connect(fake)
    assert remote.versions(limit=1400) == fake.versions(limit=1400)
    assert remote.versions(limit=9999) == fake.versions(limit=9999)


def test_admins_act_under_the_name_they_call_by(fake: FakeAggregator, connect: Start, vector: Path) -> None:
    fake.submit(vector, site="site-1")
    remote = connect(fake)
    assert remote.roll_back(0, by="alice").by == "alice"
    assert remote.remove("task-1", by="bob").kind is VersionKind.REMOVAL
    assert fake.said_by == ["alice", "bob"]


def test_held_updates_are_approved_and_rejected(tmp_path: Path, connect: Start, vector: Path) -> None:
    fake = FakeAggregator(tmp_path / "held", held=True)
    remote = connect(fake)
    held = remote.submit(vector, site="site-1")
    assert held.state is UpdateState.HELD
    assert remote.approve(held.update, by="alice").state is UpdateState.MERGED
    with pytest.raises(StateError, match="not held"):
        remote.reject(held.update, by="alice")
    vector.write_bytes(b"other")
    other = remote.submit(vector, site="site-1")
    remote.reject(other.update, by="alice", reason="not from here")
    assert fake.update(other.update).reason == "not from here"
    fake.close()


def test_watchers_hear_of_the_current_version_and_of_newer_ones(
    fake: FakeAggregator, connect: Start, vector: Path
) -> None:
    fake.submit(vector, site="site-1")
    remote = connect(fake)
    first, second = remote.watch(0), remote.watch(-1)
    assert [next(first).number, next(second).number] == [1, 1]
    fake.roll_back(0, by="admin")
    assert [next(first).number, next(second).number] == [2, 2]


@pytest.mark.parametrize("kind", KINDS.values())
def test_an_error_is_raised_again_as_it_was_under_the_status_of_its_class(
    fake: FakeAggregator, connect: Start, kind: type[FedmergeError]
) -> None:
    def fail() -> None:
        raise kind("it is so", where="blob ä", layer="a.b", got="(1,)", wanted="(4,)", do="Do.")

    fake.on_status = fail
    with pytest.raises(kind, match=r"it is so: got \(1,\), wanted \(4,\)\. Do\.") as caught:
        connect(fake).status()
    assert type(caught.value) is kind
    assert caught.value.where == "blob ä"
    assert isinstance(caught.value.__cause__, grpc.Call)
    assert caught.value.__cause__.code() is STATUS[kind]


def test_an_unexpected_error_tells_a_reference_and_nothing_else(
    fake: FakeAggregator, connect: Start, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("the secret")

    fake.on_status = fail
    with caplog.at_level(logging.ERROR), pytest.raises(FedmergeError, match="INTERNAL") as caught:
        connect(fake).status()
    assert "secret" not in str(caught.value)
    reference = str(caught.value).split("reference ")[1].split()[0]
    assert any(reference in record.getMessage() and record.exc_info for record in caplog.records)


OWN = {"Submit", "Pull", "Watch", "GetStatus", "GetUpdate", "GetVersion", "ListVersions"}
ALLOWED = {
    Role.SITE: OWN,
    Role.GATEWAY: OWN,
    Role.ADMIN: set(ROLES) - {"Submit"},
}


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("method", ROLES)
def test_each_role_may_call_its_methods_and_no_others(
    fake: FakeAggregator, serving: Callable[..., Service], vector: Path, role: Role, method: str
) -> None:
    fake.submit(vector, site="site-1")
    described = pb.DESCRIPTOR.services_by_name["Aggregator"].methods_by_name[method]
    with grpc.insecure_channel(serving(fake, role).addresses[0]) as channel:
        code = first_answer(channel, described)
    assert (code is grpc.StatusCode.PERMISSION_DENIED) == (method not in ALLOWED[role])


def first_answer(channel: grpc.Channel, method: Any) -> grpc.StatusCode:
    """The status of a call with an empty request; OK as soon as a stream answers."""
    kind = ("stream" if method.client_streaming else "unary") + "_"
    kind += "stream" if method.server_streaming else "unary"
    call = getattr(channel, kind)(f"/{SERVICE}/{method.name}")
    try:
        answer = call(iter([b""]) if method.client_streaming else b"", timeout=20)
        if method.server_streaming:
            next(answer)
            answer.cancel()
    except grpc.RpcError as error:
        return error.code()  # type: ignore[attr-defined, no-any-return]
    return grpc.StatusCode.OK


def test_a_method_without_a_row_is_refused(fake: FakeAggregator, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: roles for name, roles in ROLES.items() if name != "GetStatus"}
    monkeypatch.setattr(
        "fedmerge.server.service.server.Guard",
        lambda access, service, roles, settings: Guard(access, service, rows, settings),
    )
    with (
        Service(fake, [Listener("127.0.0.1:0", FakeAccess())], ServiceSettings(stop_seconds=0)) as service,
        RemoteAggregator(service.addresses[0]) as remote,
    ):
        assert remote.version().number == 0
        with pytest.raises(Forbidden):
            remote.status()


def test_a_site_submits_for_itself_alone_and_a_gateway_for_any(
    fake: FakeAggregator, connect: Start, vector: Path
) -> None:
    with pytest.raises(Forbidden, match="site-2"):
        connect(fake, Role.SITE).submit(vector, site="site-2")
    assert fake.updates() == []
    assert connect(fake, Role.GATEWAY, site="proxy").submit(vector, site="site-2").version == 1
    assert fake.updates()[0].site == "site-2"


def test_a_site_sees_its_own_updates_alone(fake: FakeAggregator, connect: Start, vector: Path) -> None:
    fake.submit(vector, site="site-1")
    update = fake.updates()[0].id
    assert connect(fake, Role.SITE).update(update).site == "site-1"
    with pytest.raises(NotFound, match=update):
        connect(fake, Role.SITE, site="site-2").update(update)
    assert connect(fake, Role.ADMIN, site="admin").update(update).site == "site-1"


def test_listeners_of_one_aggregator_have_policies_of_their_own(
    fake: FakeAggregator, tmp_path: Path, vector: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
    listeners = [
        Listener(f"unix:{tmp_path}/a.sock", SocketAccess()),
        Listener("127.0.0.1:0", LoopbackAccess()),
        Listener("127.0.0.1:0", FakeAccess(Role.SITE)),
    ]
    with Service(fake, listeners, ServiceSettings(stop_seconds=0)) as service:
        local, loopback, site = (RemoteAggregator(address, site="site-1") for address in service.addresses)
        assert local.submit(vector, site="site-7").version == 1
        assert loopback.roll_back(0, by="alice").by == "alice"
        assert local.roll_back(1, by="alice").by == "alice"
        with pytest.raises(Forbidden):
            site.roll_back(1, by="alice")
        for remote in (local, loopback, site):
            assert remote.version().number == 3
            remote.close()


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.7:0"])
def test_nothing_but_loopback_goes_without_tls(fake: FakeAggregator, address: str) -> None:
    with pytest.raises(ConfigError, match="needs TLS"), Service(fake, [Listener(address, FakeAccess())]):
        pass
    with pytest.raises(ConfigError, match="needs TLS"):
        RemoteAggregator(address)


@pytest.mark.parametrize("address", ["", "localhost", ":1", "localhost:", "localhost:x", "a:65536", "unix:"])
def test_what_is_no_address_is_refused(fake: FakeAggregator, address: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        RemoteAggregator(address)
    with pytest.raises(ConfigError, match="not an address"), Service(fake, [Listener(address, FakeAccess())]):
        pass


def test_a_port_that_is_taken_is_refused_and_no_listener_stays(fake: FakeAggregator, tmp_path: Path) -> None:
    free = Listener(f"unix:{tmp_path}/free.sock", FakeAccess())
    with Service(fake, [Listener("127.0.0.1:0", FakeAccess())], ServiceSettings(stop_seconds=0)) as first:
        taken = Listener(first.addresses[0], FakeAccess())
        with pytest.raises(ConfigError, match="cannot listen"), Service(fake, [free, taken]):
            pass
        with RemoteAggregator(free.address, timeout=5) as remote, pytest.raises(Unreachable):
            remote.status()


def test_health_and_reflection_tell_what_is_served(
    fake: FakeAggregator, serving: Callable[..., Service]
) -> None:
    with grpc.insecure_channel(serving(fake).addresses[0]) as channel:
        asked = health_pb2.HealthCheckRequest(service=SERVICE)
        health = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=20)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        listing = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([listing]))
        assert SERVICE in [service.name for service in answer.list_services_response.service]


def test_while_it_drains_it_serves_nobody_new_and_what_is_under_way_ends(
    fake: FakeAggregator, vector: Path
) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(20)

    fake.on_reply = wait
    receipts: list[Receipt] = []
    settings = ServiceSettings(stop_seconds=20)
    with (
        Service(fake, [Listener("127.0.0.1:0", FakeAccess())], settings) as service,
        RemoteAggregator(service.addresses[0], site="site-1") as remote,
    ):
        sending = threading.Thread(target=lambda: receipts.append(remote.submit(vector, site="site-1")))
        sending.start()
        assert inside.wait(20)
        channel = grpc.insecure_channel(service.addresses[0])
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        stopping = threading.Thread(target=service.stop)
        stopping.start()
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        channel.close()
        go_on.set()
        sending.join()
        stopping.join()
    assert receipts[0].version == 1


def test_watchers_do_not_hold_up_a_stop(fake: FakeAggregator, vector: Path) -> None:
    fake.submit(vector, site="site-1")
    settings = ServiceSettings(stop_seconds=3600)
    with (
        Service(fake, [Listener("127.0.0.1:0", FakeAccess())], settings) as service,
        RemoteAggregator(service.addresses[0], patience=0) as remote,
    ):
        watching = remote.watch(0)
        assert next(watching).number == 1
        service.stop()
        with pytest.raises(Unreachable, match="the server stops"):
            next(watching)


def test_a_missing_file_and_an_empty_one_are_refused(
    fake: FakeAggregator, connect: Start, tmp_path: Path
) -> None:
    remote = connect(fake)
    with pytest.raises(FileError, match="No such file"):
        remote.submit(tmp_path / "none", site="site-1")
    (tmp_path / "empty").touch()
    with pytest.raises(FileError, match="at least 1"):
        remote.submit(tmp_path / "empty", site="site-1")


def test_what_cannot_be_sent_is_refused_here(fake: FakeAggregator, connect: Start, vector: Path) -> None:
    remote = connect(fake)
    for ask in (
        lambda: remote.version(2**63),
        lambda: remote.remove("\ud800", by="alice"),
        lambda: remote.remove("task", by="élise\n"),
        lambda: remote.submit(vector, site="é"),
    ):
        with pytest.raises(ConfigError, match="sent"):
            ask()


def test_a_list_of_no_sensible_length_is_refused(fake: FakeAggregator, connect: Start) -> None:
    with pytest.raises(ConfigError, match="limit"):
        connect(fake).refusals(0)


def test_a_version_is_fetched_into_a_folder_that_is_there(
    fake: FakeAggregator, connect: Start, vector: Path, tmp_path: Path
) -> None:
    fake.submit(vector, site="site-1")
    with pytest.raises(FileError, match="cannot be written"):
        connect(fake).fetch(tmp_path / "none" / "merged")


def test_version_0_is_not_sent(fake: FakeAggregator, connect: Start, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        connect(fake).fetch(tmp_path / "merged", 0)
    assert not list(tmp_path.glob("*merged*"))


def test_an_offset_outside_the_file_is_refused(
    fake: FakeAggregator, serving: Callable[..., Service], vector: Path
) -> None:
    fake.submit(vector, site="site-1")
    request = pb.PullRequest(offset=SIZE + 1, sha256=fake.version().sha256)
    with grpc.insecure_channel(serving(fake).addresses[0]) as channel:
        call = channel.unary_stream(f"/{SERVICE}/Pull")(request.SerializeToString())
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_bytes_sent_and_watchers_are_counted(
    fake: FakeAggregator, serving: Callable[..., Service], vector: Path, tmp_path: Path
) -> None:
    fake.submit(vector, site="site-1")
    metrics = Metrics()
    with RemoteAggregator(serving(fake, metrics=metrics).addresses[0]) as remote:
        remote.fetch(tmp_path / "merged")
        watching = remote.watch(0)
        next(watching)
        assert metrics.registry.get_sample_value("fedmerge_watchers") == 1
    assert metrics.registry.get_sample_value("fedmerge_bytes_total", {"direction": "out"}) == SIZE


def test_a_name_without_any_role_may_do_nothing(fake: FakeAggregator) -> None:
    class Stranger:
        def caller(self, context: object) -> Any:
            raise Unauthenticated("nobody knows you")

    with (
        Service(fake, [Listener("127.0.0.1:0", Stranger())], ServiceSettings(stop_seconds=0)) as service,
        RemoteAggregator(service.addresses[0]) as remote,
        pytest.raises(Unauthenticated, match="nobody knows you"),
    ):
        remote.status()


def test_calls_beyond_the_limit_are_told_when_to_come_back(fake: FakeAggregator, connect: Start) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(20)

    fake.on_status = wait
    remote = connect(fake, calls=1)
    first = threading.Thread(target=remote.status)
    first.start()
    assert inside.wait(20)
    with pytest.raises(Busy, match="at most 1") as caught:
        remote.version()
    assert caught.value.retry_after == errors.Busy.retry_after
    go_on.set()
    first.join()
    assert remote.version().number == 0


def test_this_machine_is_reached_without_the_environment_s_proxy(
    fake: FakeAggregator, connect: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert connect(fake).version().number == 0


def test_a_server_that_ends_a_fetch_without_a_word_is_a_typed_error(
    fake: FakeAggregator, connect: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def nothing(self: object, request: object, context: object) -> None: ...

    monkeypatch.setattr(AggregatorServicer, "Pull", nothing)
    with pytest.raises(FileError, match="begins with its header"):
        connect(fake).fetch(tmp_path / "out")


def test_watchers_hear_of_versions_again_after_the_ledger_failed_once(
    fake: FakeAggregator, connect: Start, vector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, failures = fake.watch, [StoreFull("cannot be read")]

    def failing(after: int) -> Iterator[VersionRecord]:
        if failures:
            raise failures.pop()
        return watch(after)

    monkeypatch.setattr(fake, "watch", failing)
    monkeypatch.setattr("fedmerge.server.service.announcements.PAUSE_SECONDS", 0.01)
    remote = connect(fake)
    remote.submit(vector, site="site-1")
    assert next(remote.watch(0)).number == 1
    assert not failures
