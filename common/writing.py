"""Writing files so that they appear complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

from torch import Tensor

from fedmerge.common.checkpoint import Layout, tensor_bytes
from fedmerge.common.errors import FileError
from fedmerge.common.header import DTYPES, LENGTH_BYTES

ALIGNMENT = 8

CODES = {dtype: code for code, dtype in DTYPES.items()}


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file opened for writing beside ``path``; synced and renamed over it when the block ends well.

    Raises:
        FileError: the folder is missing or cannot be written. Whatever stops the block leaves nothing.
    """
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        raise FileError("cannot be written", where=path, got=error.strerror) from error
    finally:
        part.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it, where they are not there yet.

    Raises:
        FileError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError("the folder cannot be made", where=folder, got=error.strerror) from error


def write_checkpoint(
    path: Path | str, layout: Layout, read: Callable[[str], Tensor], metadata: Mapping[str, str] | None = None
) -> int:
    """Writes named tensors as safetensors, one in memory at a time; returns the bytes written.

    Args:
        layout: names, shapes and dtypes, known beforehand. ``read``: one tensor, exactly as laid out.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, (shape, dtype) in layout.items():
        size = prod(shape) * dtype.itemsize
        entries[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header = header.ljust(-(-len(header) // ALIGNMENT) * ALIGNMENT)
    with replacing(Path(path)) as file:
        file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
        for name, (shape, dtype) in layout.items():
            tensor = read(name)
            assert (tuple(tensor.shape), tensor.dtype) == (tuple(shape), dtype)
            file.write(tensor_bytes(tensor))
    return LENGTH_BYTES + len(header) + offset


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
