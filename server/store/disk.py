"""Every change to the state folder, as single steps that a test can stop before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge.common.errors import StoreFull

if TYPE_CHECKING:
    from collections.abc import Buffer

FOLDER_MODE = 0o700
UNFINISHED_MODE = 0o600
FINISHED_MODE = 0o440


class Disk:
    """Changes files and folders, one step at a time.

    Every method raises StoreFull when the disk refuses a step, whatever the reason; it names the path.
    """

    def step(self, name: str) -> None:
        """Runs before each step. An OSError from here is treated as one from the disk."""

    @contextmanager
    def changing(self, what: str, path: Path) -> Iterator[None]:
        """One step: the block makes one change to ``path``."""
        try:
            self.step(f"{what} {path.name}")
            yield
        except OSError as error:
            raise StoreFull(
                f"cannot {what}",
                where=path,
                got=error.strerror or str(error),
                do="Free space or repair the disk, then send it again; nothing was acknowledged.",
            ) from error

    def create(self, path: Path) -> DiskFile:
        """A new file, open for writing."""
        with self.changing("create", path):
            return DiskFile(path, self)

    def sync(self, file: DiskFile) -> None:
        """Makes a file read-only and its bytes durable."""
        with self.changing("sync", file.path):
            os.fchmod(file.fileno(), FINISHED_MODE)
            os.fsync(file.fileno())

    def sync_folder(self, folder: Path) -> None:
        """Makes the names in a folder durable."""
        with self.changing("sync the folder", folder):
            handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    def rename(self, source: Path, target: Path) -> None:
        """Gives a file its name, over whatever had it."""
        with self.changing("rename to", target):
            source.replace(target)

    def remove(self, path: Path) -> None:
        """Removes a file, if it is there."""
        with self.changing("remove", path):
            path.unlink(missing_ok=True)

    def make_folder(self, folder: Path) -> None:
        """A durable folder inside one that is there; synced even if another thread has just made it."""
        with self.changing("make", folder):
            folder.mkdir(mode=FOLDER_MODE, exist_ok=True)
        self.sync_folder(folder.parent)


class DiskFile(FileIO):
    """An unbuffered file whose every write is a step of a disk."""

    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, "x", opener=lambda name, flags: os.open(name, flags, UNFINISHED_MODE))
        self.path = path
        self._disk = disk

    def write(self, data: Buffer, /) -> int:
        """Writes all of ``data``; returns its size in bytes."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        while rest:
            with self._disk.changing("write", self.path):
                rest = rest[super().write(rest) :]
        return size
