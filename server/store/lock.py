"""One server per state folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedmerge.common.errors import StoreError, StoreLocked
from fedmerge.server.store.disk import Disk

LOCK = "lock"


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Makes the state folder, readable by its owner only, and keeps every other holder out.

    The lock goes with the process, however it ends; the file stays and says who had it last.

    Raises:
        StoreLocked: another holder, in this process or another, has the folder.
        StoreFull: the folder cannot be made.
        StoreError: the folder cannot be used.
    """
    try:
        for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            Disk().make_folder(missing)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError("cannot be used as a state folder", where=folder, got=error.strerror) from error
    try:
        _take(handle, folder)
        yield
    finally:
        os.close(handle)


def _take(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except BlockingIOError as error:
        holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip()
        raise StoreLocked(
            "another server uses this state folder",
            where=folder,
            got=f"process {holder or 'unknown'}",
            do="Stop it, or give this server a folder of its own.",
        ) from error
    except OSError as error:
        raise StoreError("cannot be locked", where=folder, got=error.strerror) from error
