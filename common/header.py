"""Safetensors headers, read strictly and before the safetensors library sees the bytes.

A file is 8 bytes of header length (little-endian), a JSON header, and the payload. A header passes only
if it describes its payload exactly: every byte belongs to one tensor, no name appears twice, and every
size follows from shape and dtype. Only the header is read, never the payload.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TypeGuard

import torch

from fedmerge.common.errors import FileError, UnsafeFile

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
MAX_NAME_CHARS = 1024
MAX_DIMS = 64
MAX_TENSOR_BYTES = 2**63 - 1

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before any tensor is read.

    Attributes:
        metadata: the strings under ``__metadata__``; empty if there are none.
        layout: shape and dtype of every tensor, in the header's order.
        ranges: first byte and byte after the last of every tensor, counted from the start of the file.
    """

    metadata: Mapping[str, str]
    layout: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ranges: Mapping[str, tuple[int, int]]


def read_header(path: Path) -> Header:
    """The header of a file; reads at most 100 MB, and nothing of the payload.

    Raises:
        FileError: the file is missing, not a regular file, or cannot be read.
        UnsafeFile: the bytes are not a well-formed safetensors file.
    """
    label = str(path)
    try:
        if not path.is_file():
            state = "not a regular file" if path.exists() else "no such file"
            raise FileError(state, where=label, wanted="a .safetensors file")
        with path.open("rb") as file:
            total_bytes = path.stat().st_size
            start = file.read(LENGTH_BYTES)
            text = file.read(_header_bytes(start, total_bytes, label))
    except OSError as error:
        raise FileError("cannot be read", where=label, got=error.strerror) from error
    return _parse(start, text, total_bytes, label)


def parse_header(data: bytes | memoryview, label: str) -> Header:
    """The header of a file held in memory; ``label`` names it in messages.

    Raises:
        UnsafeFile: the bytes are not a well-formed safetensors file.
    """
    start = bytes(data[:LENGTH_BYTES])
    end = LENGTH_BYTES + _header_bytes(start, len(data), label)
    return _parse(start, bytes(data[LENGTH_BYTES:end]), len(data), label)


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """For ``json.loads(object_pairs_hook=...)``: a ValueError if a key appears twice."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _header_bytes(start: bytes, total_bytes: int, label: str) -> int:
    wanted = f"{LENGTH_BYTES} bytes and a header within {total_bytes} bytes"
    if len(start) < LENGTH_BYTES:
        raise _unsafe("too short for a header", start, label, got=f"{total_bytes} bytes", wanted=wanted)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise _unsafe(
            "the header is too long",
            start,
            label,
            got=f"{length} bytes",
            wanted=f"at most {MAX_HEADER_BYTES}",
        )
    if not 0 < length <= total_bytes - LENGTH_BYTES:
        raise _unsafe("the header does not fit the file", start, label, got=f"{length} bytes", wanted=wanted)
    return length


def _parse(start: bytes, text: bytes, total_bytes: int, label: str) -> Header:
    payload_start = LENGTH_BYTES + len(text)
    if payload_start != LENGTH_BYTES + int.from_bytes(start, "little"):
        raise UnsafeFile("the file became shorter while it was read", where=label)
    entries = _entries(start, text, label)
    metadata = _metadata(entries.pop("__metadata__", {}), label)
    layout: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    ranges: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        check_name(name, label)
        shape, dtype, (begin, end) = _tensor(name, entry, label)
        layout[name] = shape, dtype
        ranges[name] = payload_start + begin, payload_start + end
    _check_coverage(ranges, payload_start, total_bytes, label)
    return Header(metadata, layout, ranges)


def _entries(start: bytes, text: bytes, label: str) -> dict[str, object]:
    if not text.startswith(b"{"):
        raise _unsafe("the header is not a JSON object", start + text[:8], label)
    try:
        entries = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        reason = "the header names a key twice" if "twice" in str(error) else "the header is not JSON"
        raise _unsafe(reason, start, label) from error
    assert isinstance(entries, dict)
    return entries


def _metadata(found: object, label: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise UnsafeFile("the metadata is not an object of strings", where=label)
    for key, value in found.items():
        if any("\ud800" <= character <= "\udfff" for character in key + value):
            raise UnsafeFile("the metadata has half a surrogate pair", where=label, got=ascii(key[:80]))
    return found


def check_name(name: str, label: str) -> None:
    """Refuses names that are empty, very long, unprintable (NUL, surrogates), or with a ``..`` part."""
    if not 0 < len(name) <= MAX_NAME_CHARS:
        raise UnsafeFile(
            "a layer's name is empty or too long",
            where=label,
            got=f"{len(name)} characters",
            wanted=f"1 to {MAX_NAME_CHARS}",
        )
    if not name.isprintable():
        raise UnsafeFile("a layer's name has unprintable characters", where=label, got=ascii(name))
    if ".." in name.replace("\\", "/").split("/"):
        raise UnsafeFile("a layer's name has a '..' path part", where=label, got=repr(name))


def _tensor(name: str, entry: object, label: str) -> tuple[tuple[int, ...], torch.dtype, tuple[int, int]]:
    keys = {"dtype", "shape", "data_offsets"}
    if not isinstance(entry, dict) or set(entry) != keys:
        raise UnsafeFile("a malformed entry", where=label, layer=name, wanted=", ".join(sorted(keys)))
    dtype, shape = _dtype(name, entry["dtype"], label), _shape(name, entry["shape"], label)
    begin, end = _offsets(name, entry["data_offsets"], label)
    if prod(max(size, 1) for size in shape) * dtype.itemsize > MAX_TENSOR_BYTES:
        raise UnsafeFile("a shape beyond any memory", where=label, layer=name)
    if end - begin != (wanted := prod(shape) * dtype.itemsize):
        raise UnsafeFile(
            "the size does not follow from shape and dtype",
            where=label,
            layer=name,
            got=f"{end - begin} bytes",
            wanted=f"{wanted} bytes",
        )
    return shape, dtype, (begin, end)


def _dtype(name: str, found: object, label: str) -> torch.dtype:
    if not isinstance(found, str) or found not in DTYPES:
        raise UnsafeFile(
            "an unknown dtype", where=label, layer=name, got=ascii(found)[:40], wanted=", ".join(DTYPES)
        )
    return DTYPES[found]


def _shape(name: str, found: object, label: str) -> tuple[int, ...]:
    if not _are_sizes(found) or len(found) > MAX_DIMS:
        raise UnsafeFile(
            "a malformed shape",
            where=label,
            layer=name,
            got=ascii(found)[:80],
            wanted=f"at most {MAX_DIMS} sizes of at least 0",
        )
    return tuple(found)


def _offsets(name: str, found: object, label: str) -> tuple[int, int]:
    if not _are_sizes(found) or len(found) != 2 or found[0] > found[1]:
        raise UnsafeFile(
            "malformed offsets", where=label, layer=name, got=ascii(found)[:80], wanted="[begin, end]"
        )
    return found[0], found[1]


def _are_sizes(found: object) -> TypeGuard[list[int]]:
    return isinstance(found, list) and all(type(n) is int and 0 <= n <= MAX_TENSOR_BYTES for n in found)


def _check_coverage(ranges: Mapping[str, tuple[int, int]], start: int, end: int, label: str) -> None:
    covered = start
    for name, (first, last) in sorted(ranges.items(), key=lambda item: item[1]):
        if first != covered:
            what = "overlaps another tensor" if first < covered else "leaves a gap before it"
            raise UnsafeFile(what, where=label, layer=name, got=f"byte {first}", wanted=f"byte {covered}")
        covered = last
    if covered != end:
        what = "the tensors reach beyond the file" if covered > end else "bytes that belong to no tensor"
        raise UnsafeFile(what, where=label, got=f"{end} bytes", wanted=f"{covered} bytes")


def _unsafe(
    what: str, start: bytes, label: str, got: str | None = None, wanted: str | None = None
) -> UnsafeFile:
    """The error of bytes that are no safetensors file; says so if they look like a pickle or a zip."""
    kind = _familiar(start)
    if kind is None:
        return UnsafeFile(what, where=label, got=got, wanted=wanted)
    return UnsafeFile(
        f"not a safetensors file, it looks like a {kind}", where=label, do="Save it as safetensors."
    )


def _familiar(start: bytes) -> str | None:
    if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        return "zip (.pt, .pth, .bin or .npz)"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle (.pt, .pkl or .bin)"
    return None
