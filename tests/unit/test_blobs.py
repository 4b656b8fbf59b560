"""Blobs: complete, durable and read-only under the hash of what is in them, or not there."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fedmerge.common import vectorfile
from fedmerge.common.errors import FileError, NotFound, StoreFull, TooLarge
from fedmerge.common.taskvector import Dense, LowRank, TaskVector
from fedmerge.server.store.blobs import Blobs
from fedmerge.server.store.disk import Disk


@pytest.fixture
def blobs(tmp_path: Path) -> Blobs:
    return Blobs(tmp_path, Disk())


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_received_bytes_lie_under_their_hash_and_cannot_be_written(blobs: Blobs, tmp_path: Path) -> None:
    with blobs.receive(100) as incoming:
        incoming.write(b"task ")
        incoming.write(memoryview(b"vector"))
        assert incoming.path.read_bytes() == b"task vector"
        assert incoming.path.stat().st_mode & 0o777 == 0o600
        assert (incoming.size, incoming.sha256) == (11, sha256(b"task vector"))
        blob = incoming.seal()
    assert (blob.sha256, blob.size) == (sha256(b"task vector"), 11)
    path = blobs.path(blob.sha256)
    assert files(tmp_path) == [f"blobs/{blob.sha256[:2]}/{blob.sha256}.safetensors"]
    assert path.read_bytes() == b"task vector"
    assert path.stat().st_mode & 0o777 == 0o440
    assert path.parent.stat().st_mode & 0o777 == 0o700
    blobs.verify(blob.sha256)


@pytest.mark.parametrize("error", [None, KeyError("stop"), KeyboardInterrupt()])
def test_what_is_not_sealed_is_removed(blobs: Blobs, tmp_path: Path, error: BaseException | None) -> None:
    def receive() -> None:
        with blobs.receive(100) as incoming:
            incoming.write(b"half")
            if error is not None:
                raise error

    if error is None:
        receive()
    else:
        with pytest.raises(type(error)):
            receive()
    assert files(tmp_path) == []


def test_the_limit_is_exact_and_a_larger_chunk_is_not_written(blobs: Blobs) -> None:
    with blobs.receive(10) as incoming:
        incoming.write(bytes(6))
        with pytest.raises(TooLarge, match="10"):
            incoming.write(bytes(5))
        assert incoming.path.stat().st_size == incoming.size == 6
        incoming.write(bytes(4))
        assert incoming.seal().size == 10


def test_nothing_at_all_can_be_stored(blobs: Blobs) -> None:
    with blobs.receive(0) as incoming:
        blob = incoming.seal()
    assert blob.size == 0
    blobs.verify(blob.sha256)


def test_a_second_blob_of_the_same_bytes_is_the_same_blob(blobs: Blobs, tmp_path: Path) -> None:
    first = blobs.write(lambda file: file.write(b"same"))
    with blobs.path(first.sha256).open("rb") as reader:
        assert blobs.write(lambda file: file.write(b"same")) == first
        assert reader.read() == b"same"
    assert len(files(tmp_path)) == 1


def test_a_task_vector_is_written_as_into_memory(blobs: Blobs) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(6, 2, generator=generator), torch.randn(2, 4, generator=generator)
    layers = {"dense": Dense(torch.randn(3, 5, generator=generator)), "low": LowRank(left, right, (6, 4))}
    vector = TaskVector.of(layers, ("frozen",), label="test")
    blob = blobs.write(lambda file: vectorfile.write(vector, file))
    assert blobs.path(blob.sha256).read_bytes() == vectorfile.to_bytes(vector)
    blobs.verify(blob.sha256)


def test_a_writer_that_fails_leaves_nothing(blobs: Blobs, tmp_path: Path) -> None:
    def fail(file: object) -> None:
        raise FileError("no such layer")

    with pytest.raises(FileError, match="no such layer"):
        blobs.write(fail)
    assert files(tmp_path) == []


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "a" * 63, "A" * 64, "a" * 64 + "\n", "a" * 65])
def test_only_a_hash_names_a_blob(blobs: Blobs, name: str) -> None:
    for method in (blobs.path, blobs.verify, blobs.discard):
        with pytest.raises(NotFound):
            method(name)


def test_a_discarded_blob_is_gone_and_may_be_discarded_again(blobs: Blobs, tmp_path: Path) -> None:
    blob = blobs.write(lambda file: file.write(b"old"))
    blobs.discard(blob.sha256)
    blobs.discard(blob.sha256)
    assert files(tmp_path) == []


def test_a_sweep_removes_what_nothing_names_and_touches_no_strangers(blobs: Blobs, tmp_path: Path) -> None:
    kept, stray = (
        blobs.write(lambda file, data=data: file.write(data)).sha256 for data in (b"kept", b"stray")
    )
    strange = [
        "ledger.sqlite",
        "incoming/notes.txt",
        "cache/folder/file",
        "blobs/readme.txt",
        "blobs/ab/notes.safetensors",
        f"blobs/zz/{stray}.safetensors",
        f"blobs/{stray[:2]}/{stray}.backup",
    ]
    for name in [*strange, "incoming/0a.part", "cache/1.bf16", "cache/2"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    gone = blobs.sweep(lambda name: name == kept)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in gone) == [
        f"blobs/{stray[:2]}/{stray}.safetensors",
        "cache/1.bf16",
        "cache/2",
        "incoming/0a.part",
    ]
    assert files(tmp_path) == sorted([*strange, f"blobs/{kept[:2]}/{kept}.safetensors"])
    assert blobs.sweep(lambda name: name == kept) == []


def test_total_bytes_counts_every_file(blobs: Blobs, tmp_path: Path) -> None:
    blobs.write(lambda file: file.write(bytes(1000)))
    (tmp_path / "ledger.sqlite").write_bytes(bytes(200))
    with blobs.receive(100) as incoming:
        incoming.write(bytes(30))
        assert blobs.total_bytes() == 1230
    assert blobs.total_bytes() == 1200


class RecordingDisk(Disk):
    def __init__(self) -> None:
        self.steps: list[str] = []

    def step(self, name: str) -> None:
        self.steps.append(name)


def test_a_name_is_given_only_to_synced_bytes_and_is_synced_itself(tmp_path: Path) -> None:
    disk = RecordingDisk()
    blobs = Blobs(tmp_path, disk)
    disk.steps.clear()
    blob = blobs.write(lambda file: file.write(b"vector"))
    folder = blob.sha256[:2]
    assert [step.replace(blob.sha256, "HASH") for step in disk.steps[2:]] == [
        disk.steps[0].replace("create", "sync"),
        f"make {folder}",
        "sync the folder blobs",
        "rename to HASH.safetensors",
        f"sync the folder {folder}",
    ]


def test_a_disk_error_names_the_file_and_what_to_do(tmp_path: Path) -> None:
    class Full(Disk):
        @contextmanager
        def changing(self, what: str, path: Path) -> Iterator[None]:
            with super().changing(what, path):
                if what == "write":
                    raise OSError(28, "No space left on device")
                yield

    blobs = Blobs(tmp_path, Full())
    with blobs.receive(10) as incoming, pytest.raises(StoreFull) as caught:
        incoming.write(b"x")
    assert caught.value.where == incoming.path
    assert caught.value.got == "No space left on device"
    assert "Free space" in str(caught.value)


def test_the_store_needs_no_torch() -> None:
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import fedmerge.server.store.blobs, fedmerge.server.store.ledger, fedmerge.server.store.lock"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
