"""A server under load: many sites at once, some dropping out, repeating themselves or sending rubbish.

The server runs in a process of its own and is spoken to over gRPC. What it did is then compared with what
it should have done, update by update. With kills it is stopped with SIGKILL at random moments and started
again; the model must then be the one an unbroken run gives, bit for bit.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
import signal
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import grpc
import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from fedmerge.common.base import Base
from fedmerge.common.errors import EngineError, FedmergeError
from fedmerge.common.records import UpdateState, VersionKind
from fedmerge.common.remote import RemoteAggregator
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.deploy.bench.shapes import layers_of
from fedmerge.deploy.progress import bars
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.protos.fedmerge.v1 import aggregator_pb2_grpc
from fedmerge.server.aggregator import Aggregator, AggregatorSettings
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.retention import Retention
from fedmerge.server.service.access import SocketAccess
from fedmerge.server.service.server import Listener, Service

SOCKET = "load.sock"
STATE = "state"
UPDATE_NORM = 0.01
"""Of a layer's own, about what fine-tuning does."""

START_SECONDS = 60.0
SAMPLE_SECONDS = 0.2
PIECE_BYTES = 64 << 10
HONEST, DROPPED, REPEATED, COPIED = "honest", "dropped", "repeated", "copied"
RUBBISH = {
    "pickle": "UnsafeFile",
    "cut": "UnsafeFile",
    "nan": "NonFinite",
    "huge": "NormExceeded",
    "base": "BaseMismatch",
}
"""What malformed updates are, and the errors they must be refused with."""


@dataclass(frozen=True)
class Load:
    """What to send.

    Attributes:
        updates: how many, all sites together; ``sites``: sending at a time.
        drops, duplicates, malformed: shares of them. A dropped one breaks off and comes again whole; half
            of the duplicates repeat the site's own update, half copy another site's.
        kills: how often the server is killed.
    """

    updates: int = 1000
    sites: int = 50
    drops: float = 0.10
    duplicates: float = 0.10
    malformed: float = 0.05
    kills: int = 0
    shape: str = "tiny"
    rule: str = "opcm"
    seed: int = 0


@dataclass(frozen=True)
class Send:
    """One thing a site does: ``kind`` of ``number``, the honest update it is, repeats or copies."""

    kind: str
    number: int


class LoadResult(BaseModel):
    """What was sent and what became of it.

    Attributes:
        expected, counted: updates by outcome: merged, answered again, refused by error.
        wrong: every update that did not end as it should; empty if all is well.
        receipt_ms, merged_ms: median and 99th percentile from the first byte to the receipt, and from
            the receipt to the version.
        memory: versions committed and the server's resident MiB, as the run went on.
        kills: how often the server was killed. ``same_bits``: whether the model is that of an unbroken
            run; None without kills.
    """

    model_config = ConfigDict(frozen=True)

    load: dict[str, Any]
    expected: dict[str, int]
    counted: dict[str, int]
    wrong: list[str]
    seconds: float
    receipt_ms: tuple[float, float]
    merged_ms: tuple[float, float]
    memory: list[tuple[int, float]]
    kills: int
    same_bits: bool | None

    @property
    def passed(self) -> bool:
        return not self.wrong and self.same_bits is not False


def bench_load(plan: Load, console: Console, folder: Path | None = None) -> LoadResult:
    """Runs a load against a fresh server.

    Args:
        folder: for the server's state; by default one that is removed afterwards.
    """
    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedmerge-load-")))
        return _Run(plan, folder, console).result()


def sends_of(plan: Load) -> dict[str, list[Send]]:
    """What every site does, in its order; the seed decides."""
    draw = random.Random(plan.seed)
    counts = {
        DROPPED: round(plan.updates * plan.drops),
        REPEATED: round(plan.updates * plan.duplicates / 2),
        COPIED: round(plan.updates * plan.duplicates / 2),
        "rubbish": round(plan.updates * plan.malformed),
    }
    fresh = plan.updates - counts[REPEATED] - counts[COPIED] - counts["rubbish"]
    kinds = [DROPPED] * counts[DROPPED] + [HONEST] * (fresh - counts[DROPPED])
    draw.shuffle(kinds)
    numbered = [Send(kind, number) for number, kind in enumerate(kinds)]
    sites: dict[str, list[Send]] = {f"site-{index:03d}": [] for index in range(plan.sites)}
    for site, send in zip(cycle(sites), numbered, strict=False):
        sites[site].append(send)
    names = [site for site, sends in sites.items() if sends]
    for _ in range(counts[REPEATED]):
        sends = sites[draw.choice(names)]
        at = draw.randrange(len(sends))
        while sends[at].kind not in (HONEST, DROPPED):
            at = draw.randrange(len(sends))
        sends.insert(draw.randint(at + 1, len(sends)), Send(REPEATED, sends[at].number))
    for number, kind in zip(range(counts["rubbish"]), cycle(RUBBISH), strict=False):
        sends = sites[draw.choice(names)]
        sends.insert(draw.randint(0, len(sends)), Send(kind, number))
    return sites


def print_load(result: LoadResult, console: Console) -> None:
    """A table of outcomes, and the figures."""
    table = Table("outcome", "expected", "counted", title=f"{result.load['updates']} updates")
    for name in sorted(result.expected.keys() | result.counted.keys()):
        table.add_row(name, str(result.expected.get(name, 0)), str(result.counted.get(name, 0)))
    console.print(table)
    facts = Table("", "median", "99 %", show_header=True)
    facts.add_row("first byte to receipt", *(f"{value:.1f} ms" for value in result.receipt_ms))
    facts.add_row("receipt to version", *(f"{value:.1f} ms" for value in result.merged_ms))
    console.print(facts)
    console.print(f"{result.seconds:.1f} s in all, seed {result.load['seed']}", highlight=False)
    if result.memory:
        shown = result.memory[:: max(1, len(result.memory) // 8)]
        curve = ", ".join(f"{version}: {mebibytes:.0f}" for version, mebibytes in shown)
        console.print(f"server's memory in MiB by version: {curve}", highlight=False, soft_wrap=True)
    if result.kills:
        same = "the same bits as an unbroken run" if result.same_bits else "NOT the bits of an unbroken run"
        console.print(f"killed {result.kills} times: {same}", highlight=False)
    for line in result.wrong[:20]:
        console.print(f"[red]wrong[/red]: {line}", highlight=False)
    console.print("every update ended as it should" if result.passed else "[bold red]FAILED[/bold red]")


def plot_load(result: LoadResult, path: Path) -> None:
    """The server's memory over the versions committed, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    versions, mebibytes = zip(*result.memory, strict=True)
    axes.plot(versions, mebibytes)
    axes.set(xlabel="versions committed", ylabel="server's resident memory, MiB", ylim=(0, None))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


class _Run:
    """One run: the server's process, the sites' threads, and what each of them saw."""

    def __init__(self, plan: Load, folder: Path, console: Console) -> None:
        self.plan, self.folder, self.console = plan, folder, console
        self.base = _base(plan.shape, plan.seed)
        self.server = _Server(folder, plan)
        self.lock = Lock()
        self.receipts: dict[str, float] = {}
        self.receipt_seconds: list[float] = []
        self.counted: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.memory: list[tuple[int, float]] = []

    def result(self) -> LoadResult:
        sites = sends_of(self.plan)
        copies = round(self.plan.updates * self.plan.duplicates / 2)
        fresh = sum(send.kind in (HONEST, DROPPED) for sends in sites.values() for send in sends)
        started = time.perf_counter()
        with self.server, bars(self.console) as progress:
            bar = progress.add_task("sending", total=self.plan.updates, note="")
            done = partial(progress.advance, bar)
            with self._watched(), self._killed(fresh):
                self._send_all({site: sends for site, sends in sites.items() if sends}, done)
                self._send_copies(copies, fresh, done)
            progress.update(bar, note="merging")
            merged = self._settled(fresh)
            seconds = time.perf_counter() - started
            expected = self._expected(sites, copies, fresh)
            self._compare(expected, fresh)
        return LoadResult(
            load=vars(self.plan) | {},
            expected=expected,
            counted=dict(self.counted),
            wrong=self.wrong,
            seconds=round(seconds, 3),
            receipt_ms=_percentiles(self.receipt_seconds),
            merged_ms=_percentiles(merged),
            memory=self.memory,
            kills=self.server.kills,
            same_bits=self._same_bits() if self.server.kills else None,
        )

    # Sites

    def _send_all(self, sites: dict[str, list[Send]], done: Callable[[], None]) -> None:
        def site(name: str, sends: list[Send]) -> None:
            with self._connection() as remote:
                for send in sends:
                    self._send(remote, name, send)
                    done()

        with ThreadPoolExecutor(len(sites)) as pool:
            for finished in [pool.submit(site, *each) for each in sites.items()]:
                finished.result()

    def _send_copies(self, copies: int, fresh: int, done: Callable[[], None]) -> None:
        """Another site sends what is already there; after all the rest, so that it is."""
        draw = random.Random(self.plan.seed + 1)
        with self._connection() as remote:
            for _ in range(copies):
                self._send(remote, "copycat", Send(COPIED, draw.randrange(fresh)))
                done()

    def _send(self, remote: RemoteAggregator, site: str, send: Send) -> None:
        path = self.folder / f"{site}.safetensors"
        wanted = RUBBISH.get(send.kind) or ("Duplicate" if send.kind == COPIED else None)
        self._write(send, path)
        started = time.perf_counter()
        try:
            if send.kind == DROPPED:
                self._drop(path, site, random.Random(send.number).choice([0.0, 0.5, 0.99, 1.0]))
            receipt = remote.submit(path, site=site)
        except FedmergeError as error:
            self._note(type(error).__name__, type(error).__name__ == wanted, f"{site} {send}: {error}")
            return
        now = time.perf_counter()
        again = send.kind == REPEATED
        self._note("again" if again else "acknowledged", wanted is None, f"{site} {send}: let in")
        with self.lock:
            if not again:
                self.receipt_seconds.append(now - started)
                self.receipts[receipt.update] = time.time()
            elif receipt.update not in self.receipts:
                self.wrong.append(f"{site} {send}: answered as new")

    def _note(self, outcome: str, right: bool, what: str) -> None:
        with self.lock:
            self.counted[outcome] += 1
            if not right:
                self.wrong.append(what)

    def _write(self, send: Send, path: Path) -> None:
        """The file of an honest update, or one that is malformed in its own way."""
        seed = self.plan.seed * 10**6 + send.number
        vector = _vector(self.base, seed)
        if send.kind == "base":
            vector = replace(vector, manifest=replace(vector.manifest, base="0" * 64))
        if send.kind == "huge":
            vector = TaskVector.of(
                {name: update.to_dense() * 1e6 for name, update in vector.items()}, manifest=vector.manifest
            )
        data = bytearray(to_bytes(vector))
        if send.kind == "nan":
            data[-4:] = b"\x00\x00\xc0\x7f"
        if send.kind == "cut":
            del data[-5:]
        if send.kind == "pickle":
            data = bytearray(b"\x80\x04\x95" + send.number.to_bytes(8) + b"cos\nsystem\n")
        path.write_bytes(data)

    def _drop(self, path: Path, site: str, share: float) -> None:
        """Begins to send, and is gone after a share of the bytes."""
        data = path.read_bytes()
        header = pb.UploadHeader(site=site, size=len(data), sha256=hashlib.sha256(data).hexdigest())
        gone, over = Event(), Event()

        def pieces() -> Iterator[pb.SubmitRequest]:
            yield pb.SubmitRequest(header=header)
            for at in range(0, int(len(data) * share), PIECE_BYTES):
                yield pb.SubmitRequest(chunk=data[at : min(at + PIECE_BYTES, int(len(data) * share))])
            gone.set()
            over.wait(START_SECONDS)

        with grpc.insecure_channel(self.server.address) as channel:
            stub = aggregator_pb2_grpc.AggregatorStub(channel)  # type: ignore[no-untyped-call]
            call = stub.Submit.future(pieces(), timeout=START_SECONDS)
            call.add_done_callback(lambda _: gone.set())  # the server may be gone first
            gone.wait(START_SECONDS)
            call.cancel()
            over.set()

    @contextmanager
    def _connection(self) -> Iterator[RemoteAggregator]:
        with RemoteAggregator(
            self.server.address, timeout=START_SECONDS, patience=10 * START_SECONDS
        ) as remote:
            yield remote

    # The server

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Notes the server's memory while inside."""
        over = Event()

        def watch() -> None:
            with self._connection() as remote:
                while not over.wait(SAMPLE_SECONDS):
                    with suppress(FedmergeError, OSError, ValueError):
                        self.memory.append((remote.version().number, self.server.mebibytes()))

        thread = Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    @contextmanager
    def _killed(self, fresh: int) -> Iterator[None]:
        """Kills and restarts the server at random moments while inside."""
        over = Event()
        draw = random.Random(self.plan.seed + 2)

        def kill() -> None:
            for _ in range(self.plan.kills):
                if over.wait(draw.uniform(0.0, 1.0)):
                    return
                self.server.kill()
                self.server.start()

        thread = Thread(target=kill)
        thread.start()
        try:
            yield
        finally:
            if not self.plan.kills:
                over.set()
            thread.join()

    def _settled(self, fresh: int) -> list[float]:
        """Waits until all is merged; seconds from every receipt to its version."""
        with self._connection() as remote:
            while (status := remote.status()).staged:
                if status.failing:
                    raise EngineError("the server stands still", got=status.failing)
                time.sleep(SAMPLE_SECONDS)
            at: dict[str, float] = {}
            for after in range(0, fresh, 500):
                at |= {version.update: version.at for version in remote.versions(after, 500)}
        return [max(at[update] - when, 0.0) for update, when in self.receipts.items() if update in at]

    def _expected(self, sites: dict[str, list[Send]], copies: int, fresh: int) -> dict[str, int]:
        kinds = Counter(send.kind for sends in sites.values() for send in sends)
        expected = Counter({"acknowledged": fresh, "again": kinds[REPEATED], "Duplicate": copies})
        for kind, error in RUBBISH.items():
            expected[error] += kinds[kind]
        return {name: count for name, count in expected.items() if count}

    def _compare(self, expected: dict[str, int], fresh: int) -> None:
        """What sites were told, and what the ledger says, with what should have been."""
        if dict(self.counted) != expected:
            self.wrong.append(f"sites were told {dict(self.counted)}, should have been {expected}")
        merged: defaultdict[str, int] = defaultdict(int)
        with self._connection() as remote:
            versions = [v for after in range(0, fresh, 500) for v in remote.versions(after, 500)]
            updates = [u for after in range(0, fresh, 500) for u in remote.updates(after, 500)]
            refused = dict(remote.status().refused)
        for version in versions:
            if version.kind is VersionKind.MERGE:
                merged[version.update] += 1
        self.wrong += [f"lost: {update}" for update in self.receipts if not merged[update]]
        self.wrong += [f"merged {count} times: {update}" for update, count in merged.items() if count > 1]
        self.wrong += [f"never acknowledged: {update}" for update in merged.keys() - self.receipts.keys()]
        self.wrong += [f"{u.state}: {u.id}" for u in updates if u.state is not UpdateState.MERGED]
        errors = {name: count for name, count in expected.items() if name not in ("acknowledged", "again")}
        if not self.server.kills and refused != errors:
            self.wrong.append(f"the ledger counts {refused}, should be {errors}")

    def _same_bits(self) -> bool:
        """Whether an engine that merges the acknowledged vectors in their order gives the same file."""
        with (
            _aggregator(self.folder / STATE, self.base, self.plan.rule) as broken,
            _aggregator(self.folder / "unbroken", self.base, self.plan.rule) as unbroken,
        ):
            last = 0
            while updates := broken.updates(last, 100):
                for update in updates:
                    path = self.folder / STATE / "blobs" / update.sha256[:2] / f"{update.sha256}.safetensors"
                    unbroken.submit(path, site=update.site)
                    unbroken.wait_until_merged()
                last = updates[-1].seq
            return broken.version().sha256 == unbroken.version().sha256


class _Server:
    """A server in a process of its own, which may be killed."""

    def __init__(self, folder: Path, plan: Load) -> None:
        self.address = f"unix:{folder / SOCKET}"
        self.kills = 0
        self._arguments = folder, plan.shape, plan.seed, plan.rule
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        self._process: Any = None
        self._told: Connection

    def start(self) -> None:
        self._told, theirs = self._context.Pipe()
        self._process = self._context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()
        if not self._told.poll(START_SECONDS):
            raise EngineError("the server did not start", got=f"nothing after {START_SECONDS:.0f} s")
        self._told.recv_bytes()

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.join()
        self._told.close()
        self.kills += 1

    def mebibytes(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) / 1024

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self._told.close()  # which tells it to stop
        self._process.join(START_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _serve(told: Connection, folder: Path, shape: str, seed: int, rule: str) -> None:
    """The server's process: says when it serves, and serves until the other end is closed."""
    torch.set_num_threads(1)
    base = _base(shape, seed)
    with (
        _aggregator(folder / STATE, base, rule) as aggregator,
        Service(aggregator, [Listener(f"unix:{folder / SOCKET}", SocketAccess())]),
    ):
        told.send_bytes(b"serving")
        with suppress(EOFError, OSError):
            told.recv_bytes()


def _aggregator(folder: Path, base: Base, name: str) -> Aggregator:
    """All vectors are kept, for the comparison with an unbroken run."""
    rule = make_rule(name)
    settings = AggregatorSettings(retention=Retention(versions=2, vectors=None))
    return Aggregator(
        folder, base, rule, partial(LocalEngine, rule, base.layers.values(), workers=1), settings
    )


def _base(shape: str, seed: int) -> Base:
    generator = torch.Generator().manual_seed(seed)
    held = {
        layer.name: torch.randn(layer.shape, generator=generator) / layer.matrix_shape[1] ** 0.5
        for layer in layers_of(shape)
    }
    return Base.from_checkpoint(held)


def _vector(base: Base, seed: int) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    held = {}
    for name, layer in base.merged_layers.items():
        drawn = torch.randn(layer.shape, generator=generator)
        held[name] = drawn * (UPDATE_NORM * base.read(name).norm() / drawn.norm())
    return TaskVector.of(held, manifest=Manifest(base.fingerprint, 0, f"task-{seed}", "load"))


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    """Median and 99th percentile, in milliseconds."""
    if not seconds:
        return 0.0, 0.0
    values = torch.quantile(torch.tensor(seconds, dtype=torch.float64), torch.tensor([0.5, 0.99]).double())
    return round(float(values[0]) * 1000, 2), round(float(values[1]) * 1000, 2)
