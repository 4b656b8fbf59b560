"""Pushing and pulling a task vector, against a bare gRPC byte stream on loopback in the same run.

The bare stream sends bytes that are in memory already and throws them away: no file, no hash, no checks.
Ours reads a file, hashes it, and writes and hashes it at the other end. Each end is a process of its own.

*Transport* ends when the last byte has been written and hashed at the receiving end; *total* also has what
a receipt or a finished file stands for: fsync, and for a push the checks of admission.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Literal

import grpc
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from fedmerge.common import vectorfile
from fedmerge.common.base import Base
from fedmerge.common.machine import cores
from fedmerge.common.messages import CHUNK_BYTES, FRAME_BYTES
from fedmerge.common.remote import RemoteAggregator
from fedmerge.common.taskvector import Manifest
from fedmerge.common.writing import write_checkpoint
from fedmerge.deploy.bench.shapes import layers_of
from fedmerge.deploy.bench.workload import Workload
from fedmerge.deploy.progress import bars
from fedmerge.server.aggregator import Aggregator
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.intake import Upload
from fedmerge.server.merge import make_rule
from fedmerge.server.service.access import LoopbackAccess
from fedmerge.server.service.server import Listener, Service

SITE = "bench"
LOOPBACK = "127.0.0.1:0"
BARE, UP, DOWN = "bare", "Up", "Down"
LIMIT = (("grpc.max_receive_message_length", CHUNK_BYTES + FRAME_BYTES),)

Kind = Literal["threads", "asyncio"]


class Transfer(BaseModel):
    """One direction.

    Attributes:
        bare: bytes per second of the bare stream, median, by the kind of its server.
        transport: bytes per second of ours until the last byte was written and hashed, median.
        ratio: ``transport`` over the faster bare stream.
        seconds: median, ``hash`` before a push, ``transport``, and ``total`` from the first byte to the
            receipt or the finished file.
        client_chunks, server_chunks: most memory that an end grew by during transport, in chunks.
    """

    model_config = ConfigDict(frozen=True)

    bare: dict[Kind, float]
    transport: float
    ratio: float
    seconds: dict[str, float]
    client_chunks: float
    server_chunks: float


class TransportBench(BaseModel):
    """What one run measured. The load averages show whether others used the machine meanwhile.

    ``local``: bytes per second of reading, hashing and writing the same file without a network, median;
    with the bare streams, it bounds what ours can reach.
    """

    model_config = ConfigDict(frozen=True)

    shape: str
    size_bytes: int
    chunk_bytes: int
    repeats: int
    local: float
    push: Transfer
    pull: Transfer
    cores: int
    load_before: float
    load_after: float


@dataclass
class _Sample:
    """One transfer of ours: seconds by part, and how many bytes each end grew by."""

    seconds: dict[str, float]
    client_bytes: int
    server_bytes: int


def bench_transport(
    shape: str = "vit-b-32", repeats: int = 5, folder: Path | None = None, console: Console | None = None
) -> TransportBench:
    """Measures transfers of made-up vectors; bare streams and ours take turns.

    Args:
        shape: a name in ``SHAPES``; ``vit-b-32`` is 350 MB. ``repeats``: timed transfers of each kind.
        folder: where both ends keep their files; the system's folder for temporary files by default.

    Raises:
        ConfigError: no such shape.
    """
    work = Workload(tuple(layers_of(shape)))
    load_before = os.getloadavg()[0]
    bare: dict[tuple[Kind, str], list[float]] = {}
    local: list[float] = []
    pushes: list[_Sample] = []
    pulls: list[_Sample] = []
    with TemporaryDirectory(prefix="fedmerge-bench-", dir=folder) as place, bars(console or _silent()) as bar:
        base = _write_base(work, Path(place))
        fingerprint = Base.from_checkpoint(base).fingerprint
        with _server("serve_aggregator", str(base)) as ours, _bare_servers() as others:
            job = bar.add_task("measuring", total=repeats + 2, note=shape)
            for number in range(repeats + 2):
                vector = Path(place) / "vector.safetensors"
                manifest = Manifest(base=fingerprint, task=f"task {number}")
                size = vectorfile.save(replace(work.vector(number), manifest=manifest), vector)
                for kind, server in others.items():
                    for method, measure in ((UP, _bare_up), (DOWN, _bare_down)):
                        bare.setdefault((kind, method), []).append(size / measure(server.address, size))
                local.append(size / _copy(vector, Path(place) / "copy.safetensors"))
                if number:  # by now the server has put away what it merged before
                    pulls.append(_pull(ours, Path(place) / "merged.safetensors"))
                if number <= repeats:
                    pushes.append(_push(ours, vector))
                bar.advance(job)
    return TransportBench(
        shape=shape,
        size_bytes=size,
        chunk_bytes=CHUNK_BYTES,
        repeats=repeats,
        local=median(local[1:]),
        push=_transfer(pushes, size, _medians(bare, UP)),
        pull=_transfer(pulls, size, _medians(bare, DOWN)),
        cores=cores(),
        load_before=load_before,
        load_after=os.getloadavg()[0],
    )


def print_transport(result: TransportBench, console: Console) -> None:
    """The result as a table with units."""
    size = f"{result.size_bytes / 1e6:.0f} MB in chunks of {result.chunk_bytes >> 10} KiB"
    table = Table(title=f"Transport of {result.shape}: {size}")
    for heading in ("", "bare MB/s", "ours MB/s", "ratio", "stream s", "total s", "client", "server"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, found in (("push", result.push), ("pull", result.pull)):
        table.add_row(
            name,
            f"{max(found.bare.values()) / 1e6:.0f}",
            f"{found.transport / 1e6:.0f}",
            f"{found.ratio:.2f}",
            f"{found.seconds['transport']:.2f}",
            f"{found.seconds['total']:.2f}",
            f"{found.client_chunks:.1f}",
            f"{found.server_chunks:.1f}",
        )
    console.print(table)
    console.print(
        f"Medians of {result.repeats}; client and server: the most that each grew by, in chunks. Total "
        f"includes fsync and, for a push, admission; hashing the file before it took "
        f"{result.push.seconds['hash']:.2f} s. Without a network, reading, hashing and writing reach "
        f"{result.local / 1e6:.0f} MB/s. {result.cores} cores, load average "
        f"{result.load_before:.1f} before, {result.load_after:.1f} after.",
        highlight=False,
    )


def serve_aggregator(base_path: str) -> None:
    """An aggregator on loopback that tells on standard output what happens. Runs in its own process."""
    base = Base.from_checkpoint(Path(base_path))

    rule = make_rule("average")

    def engine() -> LocalEngine:
        return LocalEngine(rule, base.layers.values())

    state = Path(base_path).parent / "state"
    listener = Listener(LOOPBACK, LoopbackAccess())
    with _Observed(state, base, rule, engine) as aggregator, Service(aggregator, [listener]) as service:
        _tell(address=service.addresses[0])
        sys.stdin.read()


def serve_bare(kind: Kind) -> None:
    """A bare byte stream on loopback. Runs in its own process."""
    if kind == "asyncio":
        asyncio.run(_serve_bare_asyncio())
        return
    server = grpc.server(ThreadPoolExecutor(4), [_bare_handler(_count, _send)], options=LIMIT)
    _tell(address=f"127.0.0.1:{server.add_insecure_port(LOOPBACK)}")
    server.start()
    sys.stdin.read()
    server.stop(None)


class _Observed(Aggregator):
    """Tells when an upload began, when its last byte was written and hashed, and what memory it took."""

    @contextmanager
    def receive(self, site: str, *, size: int, sha256: str) -> Iterator[Upload]:
        with super().receive(site, size=size, sha256=sha256) as upload:
            began, memory = time.perf_counter(), _Memory(os.getpid())
            finish = upload.finish

            def finish_and_tell() -> Any:
                _tell(began=began, verified=time.perf_counter(), grown=memory.grown_bytes())
                return finish()

            upload.finish = finish_and_tell  # type: ignore[method-assign]
            yield upload


class _Memory:
    """How much a process's resident memory grows from now on, at its peak."""

    def __init__(self, process: int) -> None:
        self._process = Path(f"/proc/{process}")
        (self._process / "clear_refs").write_text("5")  # the peak counts from here on
        self._before = self._bytes("VmRSS")

    def grown_bytes(self) -> int:
        return max(0, self._bytes("VmHWM") - self._before)

    def _bytes(self, key: str) -> int:
        lines = (self._process / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


@dataclass
class _Server:
    """A server process and what it says."""

    process: subprocess.Popen[str]
    address: str = ""

    def told(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]


@contextmanager
def _server(function: str, argument: str) -> Iterator[_Server]:
    code = f"from {__name__} import {function}; {function}({argument!r})"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            server = _Server(process)
            server.address = server.told()["address"]
            yield server
        finally:
            assert process.stdin is not None
            process.stdin.close()


@contextmanager
def _bare_servers() -> Iterator[dict[Kind, _Server]]:
    with _server("serve_bare", "threads") as threads, _server("serve_bare", "asyncio") as loop:
        yield {"threads": threads, "asyncio": loop}


def _push(server: _Server, vector: Path) -> _Sample:
    """Hands a vector in and waits until it is merged."""
    os.sync()
    with RemoteAggregator(server.address) as remote:
        before = remote.version().number
        memory, started = _Memory(os.getpid()), time.perf_counter()
        remote.submit(vector, site=SITE)
        ended, grown = time.perf_counter(), memory.grown_bytes()
        next(remote.watch(before))
    told = server.told()
    seconds = {
        "hash": told["began"] - started,
        "transport": told["verified"] - told["began"],
        "total": ended - told["began"],
    }
    return _Sample(seconds, grown, told["grown"])


def _pull(server: _Server, into: Path) -> _Sample:
    times: list[float] = []
    os.sync()
    with RemoteAggregator(server.address) as remote:
        memories = _Memory(os.getpid()), _Memory(server.process.pid)
        remote.fetch(into, received=lambda *_: times.append(time.perf_counter()))
        ended = time.perf_counter()
        client, other = (memory.grown_bytes() for memory in memories)
    return _Sample({"transport": times[-1] - times[0], "total": ended - times[0]}, client, other)


def _transfer(samples: Sequence[_Sample], size: int, bare: dict[Kind, float]) -> Transfer:
    """The first sample of each kind only warms up."""
    timed = samples[1:]
    seconds = {part: median(sample.seconds[part] for sample in timed) for part in timed[0].seconds}
    transport = size / seconds["transport"]
    return Transfer(
        bare=bare,
        transport=transport,
        ratio=transport / max(bare.values()),
        seconds=seconds,
        client_chunks=max(sample.client_bytes for sample in samples) / CHUNK_BYTES,
        server_chunks=max(sample.server_bytes for sample in samples) / CHUNK_BYTES,
    )


def _medians(bare: dict[tuple[Kind, str], list[float]], method: str) -> dict[Kind, float]:
    return {kind: median(rates[1:]) for (kind, called), rates in bare.items() if called == method}


def _copy(source: Path, into: Path) -> float:
    """Seconds of hashing and copying a file, as a transfer does it."""
    started, hashed = time.perf_counter(), hashlib.sha256()
    with source.open("rb", buffering=0) as reading, into.open("wb", buffering=0) as writing:
        while chunk := reading.read(CHUNK_BYTES):
            hashed.update(chunk)
            writing.write(chunk)
    return time.perf_counter() - started


def _write_base(work: Workload, folder: Path) -> Path:
    path, weights = folder / "base.safetensors", work.base()
    layout = {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()}
    write_checkpoint(path, layout, weights.__getitem__)
    return path


def _bare_up(address: str, size: int) -> float:
    """Seconds."""
    with grpc.insecure_channel(address, LIMIT) as channel:
        started = time.perf_counter()
        received = _bare_method(channel.stream_unary, UP)(_bare_chunks(size))
        assert int(received) == size
        return time.perf_counter() - started


def _bare_down(address: str, size: int) -> float:
    """Seconds."""
    with grpc.insecure_channel(address, LIMIT) as channel:
        started = time.perf_counter()
        answer = _bare_method(channel.unary_stream, DOWN)(str(size).encode())
        assert sum(len(chunk) for chunk in answer) == size
        return time.perf_counter() - started


def _bare_method(kind: Any, name: str) -> Any:
    return kind(f"/{BARE}/{name}")


def _bare_chunks(size: int) -> Iterator[bytes]:
    chunk = bytes(CHUNK_BYTES)
    yield from (chunk for _ in range(size // CHUNK_BYTES))
    yield bytes(size % CHUNK_BYTES)


def _bare_handler(up: Any, down: Any) -> grpc.GenericRpcHandler:
    methods: dict[str, Any] = {
        UP: grpc.stream_unary_rpc_method_handler(up),
        DOWN: grpc.unary_stream_rpc_method_handler(down),
    }
    return grpc.method_handlers_generic_handler(BARE, methods)


def _count(chunks: Iterator[bytes], _: object) -> bytes:
    return str(sum(map(len, chunks))).encode()


def _send(request: bytes, _: object) -> Iterator[bytes]:
    return _bare_chunks(int(request))


async def _count_asyncio(chunks: AsyncIterator[bytes], _: object) -> bytes:
    return str(sum([len(chunk) async for chunk in chunks])).encode()


async def _send_asyncio(request: bytes, context: Any) -> None:
    for chunk in _bare_chunks(int(request)):
        await context.write(chunk)


async def _serve_bare_asyncio() -> None:
    server = grpc.aio.server(options=LIMIT)
    server.add_generic_rpc_handlers([_bare_handler(_count_asyncio, _send_asyncio)])
    _tell(address=f"127.0.0.1:{server.add_insecure_port(LOOPBACK)}")
    await server.start()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    await server.stop(None)


def _tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def _silent() -> Console:
    return Console(quiet=True)
