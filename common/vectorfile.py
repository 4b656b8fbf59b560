"""Task vectors as safetensors files, on disk and on the wire.

Tensors, float32 when written here unless bfloat16 or int8 is asked for:

    NAME            a dense layer, in the layer's own shape
    NAME#left       (M, R), with NAME#right (R, N): a low-rank layer; the scale is in the left factor
    NAME#STATISTIC  input_gram, fisher, second_moment, sketch or residual of a layer stored here, in the
                    shapes that common.statistics describes
    PART#scale      float32 scales of PART, one of the first three, where that is int8, see common.int8

Metadata, all strings:

    format          "fedmerge.task_vector/1"
    base            fingerprint of the base, 64 hex digits; empty if unknown
    origin_version  the version fine-tuning started from
    task, site      names
    examples        training examples behind it, at least 1
    statistics      JSON list of the names of the statistics that come with it; names unknown here pass
    unchanged       JSON list of layers known to be zero, which are not stored
    low_rank        JSON object from each low-rank layer's name to the layer's shape
    shared_input    JSON object from each layer whose input Gram is that of another one, and is therefore
                    not stored, to the layer that stores it; only where there is such a layer

Readers also take float16 and float64 tensors; all become float32 when they are read.

Legend of shape suffixes: M out rows, N in columns, R rank.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fedmerge.common.checkpoint import tensor_bytes, tensor_reader
from fedmerge.common.errors import (
    BadWeight,
    DtypeMismatch,
    FileError,
    ShapeMismatch,
    UnsafeFile,
    VersionMismatch,
)
from fedmerge.common.header import (
    LENGTH_BYTES,
    MAX_DIMS,
    MAX_TENSOR_BYTES,
    Header,
    check_name,
    parse_header,
    read_header,
    unique_keys,
)
from fedmerge.common.int8 import check_layout, decoder
from fedmerge.common.layers import FLOAT_DTYPES, describe, short_dtype
from fedmerge.common.parts import LEFT, RIGHT, SCALE
from fedmerge.common.statisticparts import check_listed, open_statistics, part_of, statistic_in
from fedmerge.common.statistics import Shape, Statistic, Statistics, check_shape, check_values, statistics_of
from fedmerge.common.stored import tensors_of, update_from
from fedmerge.common.taskvector import LayerUpdate, LowRank, Manifest, TaskVector, require_mergeable
from fedmerge.common.writing import CODES, replacing

FAMILY = "fedmerge.task_vector/"
FORMAT = FAMILY + "1"
SHARED_INPUT = "shared_input"
KEYS = ("base", "origin_version", "task", "site", "examples", "statistics", "unchanged", "low_rank")
WHOLE_NUMBER = re.compile(r"[0-9]{1,19}", re.ASCII)
FINGERPRINT = re.compile(r"([0-9a-f]{64})?", re.ASCII)
LONGEST_NUMBER = 10**13
"""More than any size or offset in bytes that is ever written: 10 TB."""


def save(vector: TaskVector, path: Path | str, dtype: torch.dtype = torch.float32) -> int:
    """Writes a task vector, one layer in memory at a time, and returns the bytes written.

    The file appears under its name complete and on disk, or not at all: it is written beside it, synced
    and renamed over whatever was there.

    Args:
        dtype: of the payload, factors too: float32; bfloat16, to which values are rounded to nearest even; or
            int8, which leaves statistics in float32.

    Raises:
        FileError: the folder is missing or cannot be written, or a layer's name cannot be stored.
        FileError: statistics that the manifest does not list.
        BadWeight: an example count below 1.
        ShapeMismatch, BadStatistic: a statistic that does not fit its layer, or that no data can give.
        NonFinite: a layer or a statistic with NaN or infinities, before or after rounding.
    """
    with replacing(Path(path)) as file:
        return write(vector, file, dtype)


def to_bytes(vector: TaskVector, dtype: torch.dtype = torch.float32) -> bytes:
    """The bytes that :func:`save` would write; the same errors but for the disk's."""
    stream = BytesIO()
    write(vector, stream, dtype)
    return stream.getvalue()


def load(path: Path | str) -> TaskVector:
    """Opens a task vector file; reads its header, and each layer when it is asked for.

    Raises:
        FileError: missing, not a task vector, or its parts do not fit together; names file and layer.
        UnsafeFile: not a well-formed safetensors file.
        VersionMismatch: written in a format that this software does not know.
        BadWeight: an example count that is not an integer of at least 1.
        ShapeMismatch, DtypeMismatch: factors that do not multiply to their layer, statistics that do not fit
            it, or tensors that are not floats.
        NonFinite, BadStatistic: when the offending layer or its statistics are read.
    """
    path = Path(path)
    return _open(str(path), read_header(path), tensor_reader(path))


def from_bytes(data: bytes, label: str = "bytes") -> TaskVector:
    """Opens a task vector held in memory; ``label`` names it in messages. Errors as for :func:`load`."""
    header = parse_header(data, label)

    def read(name: str) -> Tensor:
        shape, dtype = header.layout[name]
        begin, end = header.ranges[name]
        if begin == end:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(bytearray(data[begin:end]), dtype=dtype).reshape(shape)

    return _open(label, header, read)


def is_task_vector(path: Path | str) -> bool:
    """Whether a file says that it is a task vector, of any version; reads the header only.

    Raises:
        FileError: a missing file.
        UnsafeFile: not a well-formed safetensors file.
    """
    return read_header(Path(path)).metadata.get("format", "").startswith(FAMILY)


# Writing: the header needs every rank, known only once a layer is read. So room for the longest possible
# header is left free, the payload follows, and the header is written last, padded with spaces.


def write(vector: TaskVector, file: BinaryIO, dtype: torch.dtype = torch.float32) -> int:
    """Writes what :func:`save` writes into an open file that can seek, from its start; returns the bytes."""
    for name in (*vector.names, *vector.unchanged):
        check_name(name, vector.label)
        if "#" in name:
            raise FileError("a layer's name must not contain '#'", where=vector.label, layer=name)
    statistics = statistics_of(vector)
    check_listed(statistics, vector.manifest.statistics, vector.label)
    shared = statistics.shared_among(vector.names)
    _manifest(_metadata(vector.manifest, vector.unchanged, {}, shared), vector.label)
    room_bytes = _room(vector, statistics, dtype)
    file.seek(LENGTH_BYTES + room_bytes)
    payload = _Payload(file, dtype)
    low_rank = _write_layers(vector, statistics, shared, payload)
    metadata = _metadata(vector.manifest, vector.unchanged, low_rank, shared)
    header = _compact({"__metadata__": metadata, **payload.entries})
    assert len(header) <= room_bytes
    total_bytes = file.tell()
    file.seek(0)
    file.write(room_bytes.to_bytes(LENGTH_BYTES, "little") + header.ljust(room_bytes))
    return total_bytes


def _room(vector: TaskVector, statistics: Statistics, dtype: torch.dtype) -> int:
    """Bytes that the header certainly fits in, a multiple of 8."""
    longest = [LONGEST_NUMBER] * 2
    entry = {"dtype": "BF16", "shape": longest, "data_offsets": longest}
    suffixes = (LEFT, RIGHT, LEFT + SCALE, RIGHT + SCALE) if dtype is torch.int8 else (LEFT, RIGHT)
    shared = statistics.shared_among(vector.names)
    total = len(_compact({"__metadata__": _metadata(vector.manifest, vector.unchanged, {}, shared)}))
    for name in vector.names:
        dims = len(vector.shapes[name]) if name in vector.shapes else MAX_DIMS
        shape = [LONGEST_NUMBER] * dims
        total += len(_compact(dict.fromkeys((name + suffix for suffix in suffixes), entry)))
        total += len(_compact(json.dumps({name: shape})))
    for name, statistic in statistics.stored(vector.names):
        shape = [LONGEST_NUMBER] * len(statistics.shapes[name][statistic])
        total += len(_compact({part_of(name, statistic): {**entry, "shape": shape}}))
    return (total + 7) // 8 * 8


def _compact(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


class _Payload:
    """Tensors written one after the other, layers in ``dtype``; ``entries`` describes them for the header."""

    def __init__(self, file: BinaryIO, dtype: torch.dtype) -> None:
        self._file, self.dtype, self._offset = file, dtype, 0
        self.entries: dict[str, dict[str, Any]] = {}

    def put(self, part: str, tensor: Tensor) -> None:
        values = tensor_bytes(tensor)
        self._file.write(values)
        end = self._offset + len(values)
        self.entries[part] = {
            "dtype": CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._offset, end],
        }
        self._offset = end


def _write_layers(
    vector: TaskVector, statistics: Statistics, shared: Mapping[str, str], payload: _Payload
) -> dict[str, tuple[int, ...]]:
    """Every layer and its statistics behind it; the shapes of the low-rank layers."""
    low_rank: dict[str, tuple[int, ...]] = {}
    for name, update in vector.items():
        if isinstance(update, LowRank):
            low_rank[name] = update.shape
        parts = tensors_of(name, update, payload.dtype)
        held = update_from(name, low_rank, decoder(parts.__getitem__, vector.label))
        require_mergeable(held, where=vector.label, layer=name)
        for part, tensor in parts.items():
            payload.put(part, tensor)
        for statistic, values in statistics(name).items():
            if statistic != Statistic.INPUT_GRAM or name not in shared:
                rounded = values.to(torch.float32 if payload.dtype is torch.int8 else payload.dtype)
                _check_statistic(statistic, rounded, update.shape, vector.label, name)
                payload.put(part_of(name, statistic), rounded)
    return low_rank


def _check_statistic(statistic: str, values: Tensor, layer_shape: Shape, label: str, name: str) -> None:
    shape = tuple(values.shape)
    check_shape(statistic, shape, layer_shape, where=label, layer=name)
    check_values(statistic, shape, [values.float()], where=label, layer=name)


def _metadata(
    manifest: Manifest, unchanged: Iterable[str], low_rank: Mapping[str, Shape], shared: Mapping[str, str]
) -> dict[str, str]:
    return {
        "format": FORMAT,
        "base": manifest.base,
        "origin_version": str(manifest.origin_version),
        "task": manifest.task,
        "site": manifest.site,
        "examples": str(manifest.examples),
        "statistics": json.dumps(list(manifest.statistics)),
        "unchanged": json.dumps(list(unchanged)),
        "low_rank": json.dumps({name: list(shape) for name, shape in low_rank.items()}),
        **({SHARED_INPUT: json.dumps(dict(shared))} if shared else {}),
    }


def _open(label: str, header: Header, read_tensor: Callable[[str], Tensor]) -> TaskVector:
    metadata = _known_metadata(header.metadata, label)
    manifest = _manifest(metadata, label)
    unchanged = _names(metadata, "unchanged", label)
    low_rank = _low_rank(metadata, label)
    shapes = _layers(header, low_rank, unchanged, label)
    shared = _shared_input(metadata, label)
    statistics = open_statistics(header, shared, shapes, label, read_tensor)
    check_listed(statistics, manifest.statistics, label)
    decode = decoder(read_tensor, label)

    def read(name: str) -> LayerUpdate:
        update = update_from(name, low_rank, decode)
        require_mergeable(update, where=label, layer=name)
        return update

    return TaskVector(tuple(shapes), read, unchanged, manifest, label, shapes, statistics)


def _known_metadata(metadata: Mapping[str, str], label: str) -> Mapping[str, str]:
    found = metadata.get("format", "")
    if not found.startswith(FAMILY):
        raise FileError(
            "not a task vector",
            where=label,
            wanted=f"{FORMAT!r} under 'format' in the metadata",
            do="A checkpoint or an adapter becomes a task vector together with its base.",
        )
    if found != FORMAT:
        raise VersionMismatch(
            "a format that this software does not know",
            where=label,
            got=ascii(found[:80]),
            wanted=repr(FORMAT),
            do="Use the same fedmerge version on both sides.",
        )
    for key in KEYS:
        if key not in metadata:
            raise FileError(f"the metadata lack {key!r}", where=label)
    return metadata


def _manifest(metadata: Mapping[str, str], label: str) -> Manifest:
    examples = metadata["examples"]
    if not WHOLE_NUMBER.fullmatch(examples) or int(examples) < 1:
        raise BadWeight(
            "a malformed example count", where=label, got=ascii(examples[:40]), wanted="an integer >= 1"
        )
    origin = metadata["origin_version"]
    if not WHOLE_NUMBER.fullmatch(origin):
        raise FileError(
            "a malformed origin version", where=label, got=ascii(origin[:40]), wanted="an integer >= 0"
        )
    if not FINGERPRINT.fullmatch(metadata["base"]):
        raise FileError(
            "a malformed base fingerprint",
            where=label,
            got=ascii(metadata["base"][:80]),
            wanted="64 hex digits or nothing",
        )
    return Manifest(
        base=metadata["base"],
        origin_version=int(origin),
        task=metadata["task"],
        site=metadata["site"],
        examples=int(examples),
        statistics=_names(metadata, "statistics", label),
    )


def _names(metadata: Mapping[str, str], key: str, label: str) -> tuple[str, ...]:
    found = _json(metadata, key, label)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise FileError(f"malformed metadata under {key!r}", where=label, wanted="a JSON list of names")
    for name in found:
        check_name(name, label)
    if len(set(found)) != len(found):
        raise FileError(f"a name appears twice under {key!r}", where=label)
    return tuple(found)


def _low_rank(metadata: Mapping[str, str], label: str) -> dict[str, tuple[int, ...]]:
    found = _json(metadata, "low_rank", label)
    if not isinstance(found, dict) or not all(_is_shape(shape) for shape in found.values()):
        raise FileError(
            "malformed metadata under 'low_rank'",
            where=label,
            wanted=f"a JSON object of shapes with 1 to {MAX_DIMS} sizes of at least 1",
        )
    return {name: tuple(shape) for name, shape in found.items()}


def _is_shape(found: object) -> bool:
    return (
        isinstance(found, list)
        and 1 <= len(found) <= MAX_DIMS
        and all(type(size) is int and 1 <= size <= MAX_TENSOR_BYTES for size in found)
        and prod(found) <= MAX_TENSOR_BYTES
    )


def _json(metadata: Mapping[str, str], key: str, label: str) -> object:
    try:
        return json.loads(metadata[key], object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise FileError(f"malformed metadata under {key!r}", where=label, wanted="JSON") from error


def _layers(
    header: Header, low_rank: Mapping[str, tuple[int, ...]], unchanged: Iterable[str], label: str
) -> dict[str, tuple[int, ...]]:
    """Name to shape of every stored layer, in the order of the payload."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in sorted(header.layout, key=lambda part: header.ranges[part]):
        name, hash_sign, factor = part.partition("#")
        _check_part(name, part, header, label)
        if statistic_in(part) or part.endswith(SCALE):
            continue
        if not hash_sign:
            shapes[name] = header.layout[part][0]
        elif hash_sign + factor not in (LEFT, RIGHT) or name not in low_rank:
            raise FileError("a part that belongs to no low-rank layer", where=label, layer=part)
        else:
            shapes.setdefault(name, low_rank[name])
    for name, shape in low_rank.items():
        _check_factors(name, shape, header, label)
    check_layout(header, label)
    for name in unchanged:
        if name in shapes:
            raise FileError("both stored and called unchanged", where=label, layer=name)
    return shapes


def _check_part(name: str, part: str, header: Header, label: str) -> None:
    shape, dtype = header.layout[part]
    if not name:
        raise UnsafeFile("a layer's name is empty", where=label, got=repr(part))
    if dtype not in FLOAT_DTYPES and (dtype is not torch.int8 or statistic_in(part)):
        raise DtypeMismatch(
            "a dtype that cannot be merged",
            where=label,
            layer=name,
            got=describe(shape, dtype),
            wanted=" or ".join(short_dtype(d) for d in (*FLOAT_DTYPES, torch.int8)),
        )


def _check_factors(name: str, shape: tuple[int, ...], header: Header, label: str) -> None:
    if name in header.layout:
        raise FileError("both dense and low-rank", where=label, layer=name)
    for part in (name + LEFT, name + RIGHT):
        if part not in header.layout:
            raise FileError("half of a factor pair is missing", where=label, layer=name, wanted=part)
    left, right = header.layout[name + LEFT][0], header.layout[name + RIGHT][0]
    rank = left[1] if len(left) == 2 else 0
    if rank < 1 or left != (shape[0], rank) or right != (rank, prod(shape[1:])):
        raise ShapeMismatch(
            "factors that do not multiply to the layer's shape",
            where=label,
            layer=name,
            got=f"{left} and {right} for {shape}",
            wanted=f"({shape[0]}, R) and (R, {prod(shape[1:])}) with R >= 1",
        )


def _shared_input(metadata: Mapping[str, str], label: str) -> dict[str, str]:
    found = _json(metadata, SHARED_INPUT, label) if SHARED_INPUT in metadata else {}
    if not isinstance(found, dict) or not all(isinstance(holder, str) for holder in found.values()):
        raise FileError(
            f"malformed metadata under {SHARED_INPUT!r}", where=label, wanted="a JSON object of names"
        )
    return found
