"""A site's folder in serving mode: the merged version it holds, and results that the server has not got yet.

Layout:

    version.json            which merged version is held, and its file
    merged-N-*.safetensors  that version, as a task vector file
    incoming*               a version that is arriving in ranges
    outbox/                 results of training: KEY.safetensors and, once that is complete, KEY.json
    refusals.jsonl          results that the server refused, and why
    memory.safetensors      what the site keeps from one local run to the next, memory-before.safetensors what
                            it kept before the last one; memory.json: how often it has released something
    run/                    where a local run stands, until its result is kept
    base.json               fingerprint of the base when it was last computed

Everything is written so that a crash leaves the old or the new, and a file without its JSON is ignored.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from fedmerge.client.memory import SiteMemory, memory_of
from fedmerge.common.errors import FileError, MismatchError, NotFound, StoreFull
from fedmerge.common.header import read_header
from fedmerge.common.ranges import RangeManifest, read_file
from fedmerge.common.records import Dtype
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import save
from fedmerge.common.writing import replacing

MEMORY, BEFORE = "memory.safetensors", "memory-before.safetensors"
OF = "of"
"""Names, in a memory's metadata, the training that it comes from."""


@dataclass(frozen=True)
class HeldVersion:
    """The merged version a site has.

    Attributes:
        number: 0 if there is none. ``model``: its hash in the server's ledger.
        file: its name in the folder; ``size``: in bytes. ``dtype``: as it was sent.
        at: when it came, seconds since the epoch.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    number: int = 0
    model: str = ""
    file: str = ""
    size: int = 0
    dtype: Dtype = "f32"
    at: float = 0.0


@dataclass(frozen=True)
class Result:
    """What a training brought.

    Attributes:
        task: its name. ``key``: a hash of everything the training depended on.
        manifest: of the task vector file. ``metrics``: numbers that go with it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    task: str
    key: str
    manifest: RangeManifest
    metrics: dict[str, int | float] = field(default_factory=dict)
    at: float = 0.0


class SiteState:
    """What a site keeps from one message to the next; every message may be a process of its own.

    Raises:
        StoreFull: the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._outbox = folder, folder / "outbox"
        try:
            self._outbox.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreFull("cannot be made", where=folder, got=error.strerror) from error

    # --- the merged version ---

    @property
    def held(self) -> HeldVersion:
        """The version that is complete here; number 0 if there is none."""
        held = _read(HeldVersion, self.folder / "version.json") or HeldVersion()
        path = self.folder / held.file
        if not held.file or not path.is_file() or path.stat().st_size != held.size:
            return HeldVersion()
        return held

    @property
    def merged(self) -> Path | None:
        """The file of the version that is held."""
        held = self.held
        return self.folder / held.file if held.number else None

    def install(self, arrived: Path, *, number: int, model: str, dtype: Dtype) -> None:
        """Makes a complete file in this folder the version that is held; the one before is removed."""
        path = self.folder / f"merged-{number}-{_name(model)[:12]}-{dtype}.safetensors"
        arrived.replace(path)
        held = HeldVersion(number, model, path.name, path.stat().st_size, dtype, time.time())
        _write(self.folder / "version.json", asdict(held))
        for old in self.folder.glob("merged-*.safetensors"):
            if old != path:
                old.unlink(missing_ok=True)

    def write_incoming(self, data: bytes) -> Path:
        """Puts a version that came in one message onto the disk."""
        with replacing(self.incoming) as file:
            file.write(data)
        return self.incoming

    @property
    def incoming(self) -> Path:
        """Where a version is put together before it is installed."""
        return self.folder / "incoming"

    # --- results ---

    def keep(
        self,
        vector: TaskVector,
        dtype: torch.dtype = torch.float32,
        *,
        key: str,
        metrics: Mapping[str, int | float],
        range_bytes: int,
    ) -> Result:
        """Keeps a result until the server has it; an earlier one of the same task is replaced.

        Args:
            dtype: that the vector is written with.
        """
        task = vector.manifest.task
        about, path = self._about(task), self._vector(task)
        about.unlink(missing_ok=True)
        save(vector, path, dtype=dtype)
        result = Result(task, key, RangeManifest.of(path, range_bytes), dict(metrics), time.time())
        _write(about, asdict(result))
        return result

    def result(self, task: str, key: str) -> Result | None:
        """The result of exactly this training, if it is still here."""
        found = _read(Result, self._about(task))
        return found if found is not None and found.key == key and self._vector(task).is_file() else None

    def results(self) -> Iterator[Result]:
        """All results that wait here, in order of their keys."""
        for path in sorted(self._outbox.glob("*.json")):
            found = _read(Result, path)
            if found is not None:
                yield found

    def read(self, result: Result) -> bytes:
        """The whole file of a result. Raises FileError."""
        return read_file(self._vector(result.task))

    def read_range(self, sha256: str, index: int) -> bytes:
        """One range of the result with that hash. Raises NotFound if it is not here."""
        for result in self.results():
            if result.manifest.sha256 == sha256:
                return result.manifest.read(self._vector(result.task), index)
        raise NotFound("no such result is kept here", where="outbox", got=sha256[:12])

    def forget(self, sha256: str) -> None:
        """Removes a result that the server has."""
        for result in self.results():
            if result.manifest.sha256 == sha256:
                self._about(result.task).unlink(missing_ok=True)
                self._vector(result.task).unlink(missing_ok=True)

    def refuse(self, sha256: str, reason: str) -> None:
        """Writes down why a result was refused, and removes it."""
        tasks = [result.task for result in self.results() if result.manifest.sha256 == sha256]
        for task in tasks:
            line = json.dumps({"at": time.time(), "task": task, "sha256": sha256, "reason": reason})
            with (self.folder / "refusals.jsonl").open("a") as file:
                file.write(line + "\n")
        self.forget(sha256)

    def _about(self, task: str) -> Path:
        return self._outbox / f"{_name(task)}.json"

    def _vector(self, task: str) -> Path:
        return self._outbox / f"{_name(task)}.safetensors"

    # --- memory ---

    def memory(self, key: str = "") -> SiteMemory:
        """What the site keeps from run to run; empty at first, and where it cannot be read.

        The number of releases is in ``memory.json``. If that file is damaged the number is not known.

        Args:
            key: of the training that is about to run. If it has run before, its result was not kept or is
                gone again, and the memory is the one from before it.
        """
        facts, tensors = _read_memory(self._memory_before(key))
        return memory_of(tensors, {**facts, "releases": self._releases()})

    def remember(self, memory: SiteMemory, key: str = "") -> None:
        """Puts a memory in place of the one before, which stays beside it; the releases are counted first.

        Args:
            key: of the training that it comes from.
        """
        facts = memory.facts()
        _write(self.folder / "memory.json", {"releases": facts["releases"]})
        path, about = self.folder / MEMORY, {"learning": memory.learning, "task": memory.task, OF: key}
        if self._memory_before(key) == path:
            path.replace(self.folder / BEFORE)
        with replacing(path) as file:
            file.write(save_tensors(dict(memory.tensors), about))

    def _memory_before(self, key: str) -> Path:
        """The file of the last memory that can be read and is not of that training."""
        facts, _ = _read_memory(self.folder / MEMORY)
        passed_over = not facts or (key and facts.get(OF) == key)
        return self.folder / (BEFORE if passed_over else MEMORY)

    def _releases(self) -> object:
        """As it was written down, 0 if it never was; None if it cannot be read."""
        about = self.folder / "memory.json"
        if not about.is_file():
            return 0
        try:
            facts = json.loads(about.read_bytes())
        except (OSError, ValueError):
            return None
        return facts.get("releases") if isinstance(facts, dict) else None

    # --- the base ---

    @property
    def base(self) -> str:
        """The base's fingerprint as it was last written down; empty if it never was."""
        found = _read(_Base, self.folder / "base.json")
        return found.fingerprint if found else ""

    @base.setter
    def base(self, fingerprint: str) -> None:
        if fingerprint != self.base:
            _write(self.folder / "base.json", asdict(_Base(fingerprint)))


@dataclass(frozen=True)
class _Base:
    fingerprint: str


def _read_memory(path: Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """What a memory is of, and its tensors; nothing where there is none that can be read."""
    if not path.is_file():
        return {}, {}
    try:
        return read_header(path).metadata, load_file(path)
    except (FileError, SafetensorError):
        return {}, {}


def _name(task: str) -> str:
    """A file name for a name that may hold any character."""
    return hashlib.sha256(task.encode()).hexdigest()[:32]


Kept = TypeVar("Kept", HeldVersion, Result, _Base)


def _read(kind: type[Kept], path: Path) -> Kept | None:
    """What was written down there; None if there is nothing, or nothing of this version's making."""
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError, MismatchError):
        return None


def _write(path: Path, value: Mapping[str, object]) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value).encode())
