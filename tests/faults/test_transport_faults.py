"""What is left, and who is hurt, when a connection breaks, stalls, lies or comes ten times too often?"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from fake_aggregator import FakeAccess, FakeAggregator, Opened

from fedmerge.common.errors import Busy, FileError, LimitError, Unreachable
from fedmerge.common.messages import CHUNK_BYTES, RETRY_KEY, unpack_error
from fedmerge.common.partfile import PartFile
from fedmerge.common.records import Dtype
from fedmerge.common.remote import RemoteAggregator
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.protos.fedmerge.v1.aggregator_pb2_grpc import AggregatorStub
from fedmerge.server.service.server import Listener, Service
from fedmerge.server.service.settings import ServiceSettings

SIZE = 5 * CHUNK_BYTES + 1
MARKER, DAMAGED = b"[MARKER]", b"[mARKER]"
SECONDS = 20
"""How long to wait for what must happen; nothing here takes as long."""


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
def serve(fake: FakeAggregator) -> Iterator[Callable[..., Service]]:
    with ExitStack() as stack:

        def start(address: str = "127.0.0.1:0", **settings: Any) -> Service:
            chosen = ServiceSettings(**{"stop_seconds": 0, **settings})
            return stack.enter_context(Service(fake, [Listener(address, FakeAccess())], chosen))

        yield start


@pytest.fixture
def stub() -> Iterator[Callable[[Service], Any]]:
    """A bare client, which can do what ours does not."""
    with ExitStack() as stack:

        def connect(service: Service) -> Any:
            return AggregatorStub(stack.enter_context(grpc.insecure_channel(service.addresses[0])))

        yield connect


def header(data: bytes, site: str = "site-1") -> pb.SubmitRequest:
    announced = pb.UploadHeader(site=site, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    return pb.SubmitRequest(header=announced)


def chunks(data: bytes) -> Iterator[pb.SubmitRequest]:
    for start in range(0, len(data), CHUNK_BYTES):
        yield pb.SubmitRequest(chunk=data[start : start + CHUNK_BYTES])


class Proxy:
    """Passes bytes on to a server, and does to one answer what a bad network does.

    ``cut_after``: bytes of answers after which the first connection passes no more, and breaks as soon as
    ``cut`` is called: what was passed on has then been read at the other end, as far as the caller cares.
    ``damage``: whether a marker on its way is changed, once. ``passed``: bytes of answers, by connection.
    """

    def __init__(self, address: str, *, cut_after: int | None = None, damage: bool = False) -> None:
        self._server = ("127.0.0.1", int(address.rpartition(":")[2]))
        self._cut_after, self._damage = cut_after, damage
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.passed: list[int] = []
        self._cut = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.cut()
        self._listening.close()

    def cut(self) -> None:
        self._cut.set()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(self._server)
                self.passed.append(0)
                number = len(self.passed) - 1
                threading.Thread(target=self._pass, args=(client, server, None), daemon=True).start()
                threading.Thread(target=self._pass, args=(server, client, number), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, number: int | None) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if self._damage and MARKER in data:
                    self._damage, data = False, data.replace(MARKER, DAMAGED, 1)
                if number is not None:
                    self.passed[number] += len(data)
                target.sendall(data)
                if number == 0 and self._cut_after is not None and self.passed[0] >= self._cut_after:
                    self._cut.wait(SECONDS)
                    break
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, 1.0])
def test_a_site_that_drops_leaves_nothing_and_hurts_nobody(
    fake: FakeAggregator,
    serve: Callable[..., Service],
    stub: Callable[[Service], Any],
    vector: Path,
    share: float,
) -> None:
    service = serve()
    written = threading.Semaphore(0)
    fake.on_write = lambda size: written.release()
    data = os.urandom(SIZE)
    part = list(chunks(data[: int(share * SIZE)]))
    dropped = threading.Event()

    def sending() -> Iterator[pb.SubmitRequest]:
        yield header(data, "site-2")
        yield from part
        dropped.wait(SECONDS)

    call = stub(service).Submit.future(sending())
    for _ in part:
        assert written.acquire(timeout=SECONDS)
    while share == 0.0 and not fake.calls["receive"]:
        time.sleep(0.01)  # the header has come once the aggregator is asked
    with RemoteAggregator(service.addresses[0]) as other:
        meanwhile = other.submit(vector, site="site-1")
    assert fake.gone.acquire(timeout=SECONDS)
    call.cancel()
    dropped.set()
    assert fake.gone.acquire(timeout=SECONDS)
    assert meanwhile.version == 1
    assert fake.parts() == []
    # Whoever drops after the last byte has handed in a whole file; it may count, but once.
    taken_in = [update.site for update in fake.updates()]
    assert taken_in == ["site-1"] or (share == 1.0 and taken_in == ["site-1", "site-2"])
    vector.write_bytes(data)
    with RemoteAggregator(service.addresses[0]) as back:
        assert back.submit(vector, site="site-2").again == ("site-2" in taken_in)
    assert [update.site for update in fake.updates()] == ["site-1", "site-2"]


def cut_off(fake: FakeAggregator, call: Any) -> LimitError:
    """The error that a slow site gets; nothing of it is kept."""
    with pytest.raises(grpc.RpcError) as caught:
        call.result(timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    error = unpack_error(dict(caught.value.trailing_metadata()))
    assert isinstance(error, LimitError)
    assert error.retry_after is None
    assert fake.gone.acquire(timeout=SECONDS)
    assert fake.parts() == []
    assert fake.updates() == []
    return error


def test_a_site_that_sends_byte_by_byte_is_cut_off(
    fake: FakeAggregator, serve: Callable[..., Service], stub: Callable[[Service], Any], vector: Path
) -> None:
    service = serve(grace_seconds=0.3, min_bytes_per_second=10_000)
    ended, data = threading.Event(), os.urandom(SIZE)

    def sending() -> Iterator[pb.SubmitRequest]:
        yield header(data)
        for byte in data:
            yield pb.SubmitRequest(chunk=bytes([byte]))
            if ended.wait(0.05):
                return

    call = stub(service).Submit.future(sending())
    call.add_done_callback(lambda _: ended.set())
    assert "10000 bytes per second" in str(cut_off(fake, call))
    with RemoteAggregator(service.addresses[0]) as other:
        assert other.submit(vector, site="site-2").version == 1


@pytest.mark.parametrize("after", ["nothing", "the header", "a chunk"])
def test_a_site_that_falls_silent_is_cut_off(
    fake: FakeAggregator, serve: Callable[..., Service], stub: Callable[[Service], Any], after: str
) -> None:
    ended, data = threading.Event(), os.urandom(SIZE)
    said = {"nothing": 0, "the header": 1, "a chunk": 2}[after]

    def sending() -> Iterator[pb.SubmitRequest]:
        yield from [header(data), *chunks(data)][:said]
        ended.wait(SECONDS)

    call = stub(serve(idle_seconds=0.2)).Submit.future(sending())
    call.add_done_callback(lambda _: ended.set())
    if after == "nothing":
        fake.gone.release()
    assert "no pause over 0.2 seconds" in str(cut_off(fake, call))


def test_a_slow_disk_of_the_server_cuts_nobody_off(
    fake: FakeAggregator, serve: Callable[..., Service], vector: Path
) -> None:
    fake.on_write = lambda size: time.sleep(0.1)
    service = serve(idle_seconds=0.3, grace_seconds=0.3, min_bytes_per_second=10**9)
    with RemoteAggregator(service.addresses[0]) as remote:
        assert remote.submit(vector, site="site-1").version == 1


def test_a_reader_that_stops_reading_is_cut_off(
    fake: FakeAggregator, serve: Callable[..., Service], stub: Callable[[Service], Any], tmp_path: Path
) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(40 * CHUNK_BYTES))
    fake.submit(large, site="site-1")
    service = serve(idle_seconds=0.3, pulls=1)
    call = stub(service).Pull(pb.PullRequest())
    assert next(call).header.size == 40 * CHUNK_BYTES
    with (
        pytest.MonkeyPatch.context() as patch,
        RemoteAggregator(service.addresses[0], patience=SECONDS) as other,
    ):
        patch.setattr(Busy, "retry_after", 0.05)
        assert other.fetch(tmp_path / "merged").number == 1  # waits until the only slot is free again
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


LIES = {
    "fewer bytes than announced": (
        [header(b"12345678"), pb.SubmitRequest(chunk=b"1234567")],
        "INVALID_ARGUMENT",
    ),
    "more bytes than announced": ([header(b"1234"), pb.SubmitRequest(chunk=b"12345")], "OUT_OF_RANGE"),
    "other bytes than announced": ([header(b"1234"), pb.SubmitRequest(chunk=b"1235")], "INVALID_ARGUMENT"),
    "no header": ([pb.SubmitRequest(chunk=b"1234")], "INVALID_ARGUMENT"),
    "an empty message": ([pb.SubmitRequest()], "INVALID_ARGUMENT"),
    "two headers": ([header(b"1234")] * 2, "INVALID_ARGUMENT"),
    "nothing": ([], "INVALID_ARGUMENT"),
    "a size of 0": ([header(b"")], "INVALID_ARGUMENT"),
    "a negative size": ([pb.SubmitRequest(header=pb.UploadHeader(size=-1))], "INVALID_ARGUMENT"),
    "too large a chunk": (
        [header(bytes(SIZE)), pb.SubmitRequest(chunk=bytes(2 * CHUNK_BYTES))],
        "RESOURCE_EXHAUSTED",
    ),
}


@pytest.mark.parametrize(("messages", "code"), LIES.values(), ids=LIES)
def test_an_upload_that_lies_is_refused_and_leaves_nothing(
    fake: FakeAggregator,
    serve: Callable[..., Service],
    stub: Callable[[Service], Any],
    messages: list[pb.SubmitRequest],
    code: str,
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        stub(serve()).Submit(iter(messages), timeout=SECONDS)
    assert caught.value.code() is grpc.StatusCode[code]
    for _ in range(fake.calls["receive"]):
        assert fake.gone.acquire(timeout=SECONDS)
    assert fake.parts() == []
    assert fake.updates() == []


def test_a_lost_reply_is_answered_as_already_acknowledged(
    fake: FakeAggregator, serve: Callable[..., Service], stub: Callable[[Service], Any], vector: Path
) -> None:
    service = serve()
    committed, lost = threading.Event(), threading.Event()

    def fail() -> None:
        committed.set()
        assert lost.wait(SECONDS)

    fake.on_reply = fail
    data = vector.read_bytes()
    call = stub(service).Submit.future(iter([header(data), *chunks(data)]))
    assert committed.wait(SECONDS)
    stopping = threading.Thread(target=service.stop)
    stopping.start()
    assert call.exception(timeout=SECONDS) is not None
    lost.set()
    stopping.join()
    before = fake.versions()
    with RemoteAggregator(serve().addresses[0]) as remote:
        receipt = remote.submit(vector, site="site-1")
    assert (receipt.again, receipt.version) == (True, 1)
    assert fake.versions() == before


def wait_until_gone(address: str) -> None:
    with suppress(Unreachable), RemoteAggregator(address) as remote:
        while True:
            remote.status()


def test_a_submission_goes_on_when_the_server_comes_back(
    fake: FakeAggregator, serve: Callable[..., Service], vector: Path, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/a.sock"
    service = serve(address)
    inside, stopped = threading.Event(), threading.Event()

    def fail(size: int) -> None:
        inside.set()
        assert stopped.wait(SECONDS)

    fake.on_write = fail
    with RemoteAggregator(address, patience=SECONDS) as remote, ThreadPoolExecutor(2) as pool:
        sending = pool.submit(remote.submit, vector, site="site-1")
        assert inside.wait(SECONDS)
        stopping = pool.submit(service.stop)
        wait_until_gone(address)
        stopped.set()
        stopping.result(SECONDS)
        assert fake.parts() == []
        serve(address)
        receipt = sending.result(SECONDS)
    assert (receipt.again, receipt.version) == (False, 1)


def test_ten_times_as_many_as_fit_are_told_to_come_back_and_all_get_in(
    fake: FakeAggregator, serve: Callable[..., Service], stub: Callable[[Service], Any], tmp_path: Path
) -> None:
    capacity, sites = 2, 20
    service = serve(uploads=capacity)
    full, go_on = threading.Semaphore(0), threading.Event()

    def wait() -> None:
        full.release()
        assert go_on.wait(SECONDS)

    fake.on_reply = wait
    bare = stub(service).Submit
    calls = []
    for number in range(sites):
        data = f"vector {number}".encode()
        messages = [header(data, f"site-{number}"), *chunks(data)]
        calls.append(bare.future(iter(messages), timeout=SECONDS))
        if number < capacity:
            assert full.acquire(timeout=SECONDS)
    for call in calls[capacity:]:
        error = call.exception(timeout=SECONDS)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert float(dict(error.trailing_metadata())[RETRY_KEY]) == Busy.retry_after
    assert fake.calls["receive"] == capacity
    go_on.set()
    assert all(call.result(timeout=SECONDS).update for call in calls[:capacity])

    def submit(number: int) -> bool:
        path = tmp_path / f"{number}"
        path.write_bytes(f"vector {number}".encode())
        with RemoteAggregator(service.addresses[0], patience=SECONDS) as remote:
            return remote.submit(path, site=f"site-{number}").again

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(sites) as pool:
        patch.setattr(Busy, "retry_after", 0.02)
        again = list(pool.map(submit, range(sites)))
    assert again == [True] * capacity + [False] * (sites - capacity)
    assert sorted(update.site for update in fake.updates()) == sorted(f"site-{n}" for n in range(sites))


def test_one_site_does_not_take_all_slots(
    fake: FakeAggregator, serve: Callable[..., Service], stub: Callable[[Service], Any], vector: Path
) -> None:
    service = serve(uploads=3, uploads_per_site=1)
    inside, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        inside.set()
        assert go_on.wait(SECONDS)

    fake.on_reply = wait
    first = stub(service).Submit.future(iter([header(b"a", "greedy"), *chunks(b"a")]))
    assert inside.wait(SECONDS)
    with pytest.raises(grpc.RpcError, match="uploads of one site"):
        stub(service).Submit(iter([header(b"b", "greedy"), *chunks(b"b")]))
    fake.on_reply = lambda: None
    with RemoteAggregator(service.addresses[0]) as other:
        assert other.submit(vector, site="modest").version == 2
    go_on.set()
    assert first.result(timeout=SECONDS).version == 1


@pytest.mark.parametrize("calls", [1, 2])
def test_after_an_interruption_only_missing_bytes_are_fetched(
    fake: FakeAggregator, serve: Callable[..., Service], vector: Path, tmp_path: Path, calls: int
) -> None:
    fake.submit(vector, site="site-1")
    progress: list[int] = []
    cut_after = 3 * CHUNK_BYTES + 1000
    with closing(Proxy(serve().addresses[0], cut_after=cut_after)) as proxy:

        def received(done: int, size: int) -> None:
            progress.append(done)
            if done >= 2 * CHUNK_BYTES:
                proxy.cut()

        if calls == 2:
            with RemoteAggregator(proxy.address, patience=0) as first, pytest.raises(Unreachable):
                first.fetch(tmp_path / "merged", 1, received=received)
            assert not (tmp_path / "merged").exists()
        with RemoteAggregator(proxy.address, patience=SECONDS) as remote:
            remote.fetch(tmp_path / "merged", 1, received=received)
        rest = sum(proxy.passed[1:])
    assert (tmp_path / "merged").read_bytes() == vector.read_bytes()
    assert progress == sorted(progress)
    assert SIZE - 3 * CHUNK_BYTES <= rest < SIZE - 2 * CHUNK_BYTES + 50_000
    assert not list(tmp_path.glob(".merged*"))


def test_bytes_of_another_version_are_not_gone_on_with(
    fake: FakeAggregator, serve: Callable[..., Service], vector: Path, tmp_path: Path
) -> None:
    fake.submit(vector, site="site-1")
    service = serve()
    with (
        closing(Proxy(service.addresses[0], cut_after=3 * CHUNK_BYTES)) as proxy,
        RemoteAggregator(proxy.address, patience=0) as remote,
        pytest.raises(Unreachable),
    ):
        remote.fetch(tmp_path / "merged", received=lambda done, size: proxy.cut())
    assert len(list(tmp_path.glob(".merged*"))) == 1
    vector.write_bytes(os.urandom(SIZE))
    fake.submit(vector, site="site-1")
    with RemoteAggregator(service.addresses[0]) as remote:
        assert remote.fetch(tmp_path / "merged").number == 2
    assert (tmp_path / "merged").read_bytes() == vector.read_bytes()
    assert not list(tmp_path.glob(".merged*"))


def test_damage_on_the_way_down_is_noticed_and_leaves_what_was_there(
    fake: FakeAggregator, serve: Callable[..., Service], vector: Path, tmp_path: Path
) -> None:
    vector.write_bytes(MARKER * 100_000)
    fake.submit(vector, site="site-1")
    (tmp_path / "merged").write_bytes(b"before")
    with (
        closing(Proxy(serve().addresses[0], damage=True)) as proxy,
        RemoteAggregator(proxy.address) as remote,
    ):
        with pytest.raises(FileError, match="damaged on their way"):
            remote.fetch(tmp_path / "merged")
        assert (tmp_path / "merged").read_bytes() == b"before"
        assert remote.fetch(tmp_path / "merged").number == 1
    assert (tmp_path / "merged").read_bytes() == vector.read_bytes()


def test_damage_on_the_way_up_is_noticed_and_leaves_nothing(
    fake: FakeAggregator, serve: Callable[..., Service], vector: Path
) -> None:
    vector.write_bytes(MARKER * 100_000)
    with (
        closing(Proxy(serve().addresses[0], damage=True)) as proxy,
        RemoteAggregator(proxy.address, patience=0) as remote,
    ):
        with pytest.raises(FileError, match="not those announced"):
            remote.submit(vector, site="site-1")
        assert fake.parts() == []
        assert remote.submit(vector, site="site-1").version == 1


def test_a_server_cannot_name_a_file_outside(
    fake: FakeAggregator, serve: Callable[..., Service], vector: Path, tmp_path: Path
) -> None:
    fake.submit(vector, site="site-1")
    opened = fake.open_version

    @contextmanager
    def lying(version: int | None, dtype: Dtype) -> Iterator[Opened]:
        with opened(version, dtype) as found:
            yield replace(found, sha256="../../evil")

    fake.open_version = lying  # type: ignore[method-assign]
    with (
        RemoteAggregator(serve().addresses[0]) as remote,
        pytest.raises(FileError, match="not a SHA-256"),
    ):
        remote.fetch(tmp_path / "merged")


def test_a_watcher_goes_on_when_the_server_comes_back(
    fake: FakeAggregator, serve: Callable[..., Service], vector: Path, tmp_path: Path
) -> None:
    address = f"unix:{tmp_path}/a.sock"
    service = serve(address)
    with RemoteAggregator(address, patience=SECONDS) as remote:
        watching = remote.watch(0)
        fake.submit(vector, site="site-1")
        assert next(watching).number == 1
        service.stop()
        fake.roll_back(0, by="admin")
        serve(address)
        assert next(watching).number == 2


def test_a_server_that_is_gone_is_told_with_the_way_out(tmp_path: Path, vector: Path) -> None:
    with RemoteAggregator(f"unix:{tmp_path}/none.sock", patience=0) as remote:
        for ask in (
            remote.status,
            lambda: remote.submit(vector, site="site-1"),
            lambda: remote.fetch(tmp_path / "merged"),
            lambda: next(remote.watch(0)),
        ):
            with pytest.raises(Unreachable, match="Is it running"):
                ask()
    assert not list(tmp_path.glob(".merged*"))


def test_two_fetches_into_one_file_do_not_mix_their_bytes(tmp_path: Path) -> None:
    """Both would verify what they received, and leave what both have written."""
    data, into = os.urandom(1000), tmp_path / "merged.safetensors"
    sha256 = hashlib.sha256(data).hexdigest()
    with PartFile(into) as first, PartFile(into) as second:
        first.expect(sha256, 0)
        first.append(data[:500])
        with pytest.raises(FileError, match="is being fetched already"):
            second.expect(sha256, 0)
        with pytest.raises(FileError, match="is being fetched already"), PartFile(into):
            pass
        first.append(data[500:])
        first.finish()
    assert into.read_bytes() == data


def test_a_chunk_without_bytes_ends_an_upload(
    fake: FakeAggregator, serve: Callable[..., Service], stub: Callable[[Service], Any]
) -> None:
    """A stream of them would cost the server time and never end."""
    over = threading.Event()

    def endless() -> Iterator[pb.SubmitRequest]:
        yield header(b"abc")
        while not over.is_set():
            yield pb.SubmitRequest(chunk=b"")

    with pytest.raises(grpc.RpcError) as caught:
        stub(serve()).Submit(endless(), timeout=SECONDS)
    over.set()
    assert isinstance(unpack_error(dict(caught.value.trailing_metadata())), FileError)  # type: ignore
    assert not fake.parts()
