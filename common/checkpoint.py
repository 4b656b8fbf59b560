"""Checkpoints as named tensors that are read one at a time, when they are needed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fedmerge.common.errors import FileError, UnsafeFile
from fedmerge.common.header import Header, check_name, read_header, unique_keys
from fedmerge.common.layers import describe, shared_names

Layout = Mapping[str, tuple[tuple[int, ...], torch.dtype]]

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 100_000_000


@dataclass(frozen=True)
class Checkpoint:
    """Named tensors and where they came from.

    ``layout`` tells names, shapes and dtypes without reading any tensor; ``read(name)`` reads one.
    ``label`` names the source in messages: a path, or ``state_dict``. ``shared`` maps a further name of
    a tensor in memory (tied weights) to its first; files never share.
    """

    label: str
    layout: Layout
    read: Callable[[str], Tensor]
    shared: Mapping[str, str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], label: str = "state_dict") -> Checkpoint:
        """A checkpoint over tensors already in memory.

        Raises:
            FileError: a value is not a tensor, as in a dictionary that holds a state dict and more.
        """
        for name, value in tensors.items():
            if not isinstance(value, Tensor):
                raise FileError(
                    "not a tensor",
                    where=label,
                    layer=str(name),
                    got=type(value).__name__,
                    do="Pass the state dict itself.",
                )
        layout = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        return cls(label, layout, lambda name: tensors[name].detach(), shared_names(tensors))


def open_checkpoint(source: Path | str | Mapping[str, Tensor] | Checkpoint) -> Checkpoint:
    """Opens a checkpoint; reads headers only.

    Args:
        source: a state dict; a ``.safetensors`` file; a Hugging Face folder with ``model.safetensors`` or
            ``model.safetensors.index.json`` and its shards; the index file itself; or a Checkpoint, which
            is returned as it is.

    Raises:
        FileError: a missing file, a folder without safetensors weights, or an index that disagrees with
            its shards.
        UnsafeFile: pickle, zip, a header that lies about its bytes, or an index that points elsewhere.
    """
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return Checkpoint.of(source)
    path = Path(source)
    if path.is_dir():
        path = _weights_in(path)
    if path.name.endswith(".index.json"):
        return _open_sharded(path)
    return Checkpoint(str(path), read_header(path).layout, tensor_reader(path))


def read_json(path: Path, max_bytes: int = MAX_INDEX_BYTES) -> Any:
    """A JSON file in which no object names a key twice.

    Raises:
        FileError: missing, unreadable, larger than ``max_bytes``, or not such JSON.
    """
    try:
        with path.open("rb") as file:
            text = file.read(max_bytes + 1)
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error
    if len(text) > max_bytes:
        raise FileError("too large", where=path, wanted=f"at most {max_bytes} bytes")
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FileError("not JSON with unique keys", where=path) from error


def tensor_reader(path: Path) -> Callable[[str], Tensor]:
    """Reads single tensors of a file whose header has passed; the file is mapped at the first read."""

    @cache
    def mapped() -> tuple[Header, Any]:
        header = read_header(path)
        return header, safe_open(path, framework="pt")

    def read(name: str) -> Tensor:
        try:
            header, file = mapped()
            tensor: Tensor = file.get_tensor(name)
        except SafetensorError as error:
            raise UnsafeFile("safetensors refuses it", where=path, layer=name, got=str(error)) from error
        except OSError as error:
            raise FileError("cannot be read", where=path, layer=name, got=error.strerror) from error
        wanted = header.layout.get(name)
        if wanted != (tuple(tensor.shape), tensor.dtype):
            raise UnsafeFile(
                "read as something else than its header says",
                where=path,
                layer=name,
                got=describe(tensor.shape, tensor.dtype),
                wanted=wanted and describe(*wanted),
            )
        return tensor

    return read


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The little-endian values of a tensor in row-major order, as safetensors stores them."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _weights_in(folder: Path) -> Path:
    for name in (SINGLE, INDEX):
        if (folder / name).is_file():
            return folder / name
    if (folder / "adapter_config.json").is_file():
        raise FileError("an adapter, not a whole model", where=folder, do="Open it together with its base.")
    if any(folder.glob("pytorch_model*.bin*")):
        raise UnsafeFile(
            "only pickled weights (pytorch_model.bin)",
            where=folder,
            wanted=SINGLE,
            do="Load it once with transformers in a place you trust and save_pretrained it again.",
        )
    raise FileError("no weights in this folder", where=folder, wanted=f"{SINGLE} or {INDEX}")


def _open_sharded(index: Path) -> Checkpoint:
    shard_of = _weight_map(index)
    shards = {shard: read_header(index.parent / shard) for shard in sorted(set(shard_of.values()))}
    _check_shards(index, shard_of, shards)
    readers = {shard: tensor_reader(index.parent / shard) for shard in shards}
    layout = {name: shards[shard].layout[name] for name, shard in shard_of.items()}
    return Checkpoint(str(index), layout, lambda name: readers[shard_of[name]](name))


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index)
    shard_of = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise FileError("a malformed index", where=index, wanted="a 'weight_map' from layers to files")
    for name, shard in shard_of.items():
        check_name(name, str(index))
        if shard in ("", ".", "..") or not shard.isprintable() or "/" in shard or "\\" in shard:
            raise UnsafeFile(
                "a shard outside the index's own folder",
                where=index,
                layer=name,
                got=ascii(shard),
                wanted="a plain file name",
            )
    return shard_of


def _check_shards(index: Path, shard_of: Mapping[str, str], shards: Mapping[str, Header]) -> None:
    for name, shard in shard_of.items():
        if name not in shards[shard].layout:
            raise FileError("not in the shard the index names", where=index, layer=name, wanted=f"in {shard}")
    for shard, header in shards.items():
        for name in header.layout:
            if shard_of.get(name) != shard:
                raise FileError(
                    "in a shard where the index does not put it",
                    where=index,
                    layer=name,
                    got=shard,
                    wanted=shard_of.get(name, "a line in the index"),
                )
