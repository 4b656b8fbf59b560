"""Records and errors as messages of the gRPC contract, and back.

A record and its message have fields of the same names, so one rule converts them all: an absent optional
field is None, an enum value is named after its member, a list is a tuple, and a mapping that is no map of
the contract is JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from google.protobuf.descriptor import EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message

from fedmerge.common import errors, records
from fedmerge.common.errors import FedmergeError, LimitError, VersionMismatch
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb

Record = TypeVar("Record")

CHUNK_BYTES = 1 << 20
"""Payload of the largest message that either side sends; fewer bytes cost time per message, and buffers of
a mebibyte are no longer recycled (``common.buffers``)."""

FRAME_BYTES = 64 << 10
"""More than the largest message needs beside its payload."""

MOST_LISTED = 1000
"""Records in one answer at most."""

ERROR_KEY = "fedmerge-error-bin"
RETRY_KEY = "retry-after"
PARTS = ("where", "layer", "got", "wanted", "do")
TEXT_LENGTHS = (1000, 250, 60)
LONGEST_ERROR_BYTES = 3072
"""Headers are limited to 8 KiB by default, and base64 and the status message need their share."""

KINDS: Mapping[str, type[FedmergeError]] = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, FedmergeError)
}

MESSAGES: Mapping[type, type[Message]] = {
    records.Receipt: pb.Receipt,
    records.UpdateRecord: pb.UpdateRecord,
    records.VersionRecord: pb.VersionRecord,
    records.Refusal: pb.Refusal,
    records.Status: pb.Status,
}

DTYPES: Mapping[records.Dtype, pb.Dtype] = {"f32": pb.DTYPE_F32, "bf16": pb.DTYPE_BF16}


def to_message(record: Any) -> Any:
    """The message of a record; the contract names it as the record's class."""
    kind = MESSAGES[type(record)]
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    known: Mapping[str, Any] = kind.DESCRIPTOR.fields_by_name
    return kind(**{name: _sent(value, known[name]) for name, value in values.items() if value is not None})


def to_record(message: Message, kind: type[Record]) -> Record:
    """The record of a message, ``kind`` being its class.

    Raises:
        VersionMismatch: a value that this software does not know.
    """
    hints = get_type_hints(kind)
    known: Mapping[str, Any] = message.DESCRIPTOR.fields_by_name
    values: dict[str, Any] = {name: _received(message, known[name], hints[name]) for name in known}
    return kind(**values)


def to_dtype(value: int) -> records.Dtype:
    """What a request's ``dtype`` asks for. Raises VersionMismatch."""
    if value == pb.DTYPE_UNSPECIFIED:
        return "f32"
    for dtype, number in DTYPES.items():
        if number == value:
            return dtype
    raise VersionMismatch("a dtype that this software does not know", got=value, wanted=" or ".join(DTYPES))


def pack_error(error: FedmergeError) -> list[tuple[str, str | bytes]]:
    """Trailing metadata that tell an error; long texts are cut so that they fit into headers, and a file
    goes by its name alone: where it lies is nobody else's business."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__name__ in KINDS)
    packed = next(
        data
        for length in TEXT_LENGTHS
        if len(data := _error_json(name, error, length)) <= LONGEST_ERROR_BYTES or length == TEXT_LENGTHS[-1]
    )
    found: list[tuple[str, str | bytes]] = [(ERROR_KEY, packed)]
    if isinstance(error, LimitError) and error.retry_after is not None:
        found.append((RETRY_KEY, f"{error.retry_after:f}"))
    return found


def unpack_error(metadata: Mapping[str, str | bytes]) -> FedmergeError | None:
    """The error that trailing metadata tell; None if they tell none. An unknown class is a FedmergeError."""
    try:
        told = json.loads(metadata[ERROR_KEY])
        error = KINDS.get(told["error"], FedmergeError)(
            str(told["what"]), **{part: told[part] for part in PARTS if isinstance(told.get(part), str)}
        )
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if isinstance(error, LimitError):
        error.retry_after = _seconds(metadata.get(RETRY_KEY))
    return error


def _error_json(name: str, error: FedmergeError, length: int) -> bytes:
    parts = {part: getattr(error, part) for part in PARTS}
    texts = {part: _text(value)[:length] for part, value in parts.items() if value is not None}
    told = {"error": name, "what": error.what[:length], **texts}
    return json.dumps(told, ensure_ascii=False).encode(errors="replace")


def _text(value: object) -> str:
    return value.name if isinstance(value, Path) else str(value)


def _seconds(text: str | bytes | None) -> float | None:
    try:
        seconds = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return seconds if 0 <= seconds < math.inf else None


def _sent(value: object, field: FieldDescriptor) -> object:
    if isinstance(value, StrEnum):
        assert field.enum_type is not None
        return field.enum_type.values_by_name[_prefix(field.enum_type) + value.name].number
    if isinstance(value, Mapping):
        return json.dumps(dict(value)) if field.type == field.TYPE_STRING else dict(value)
    return value


def _received(message: Message, field: FieldDescriptor, hint: Any) -> object:
    if field.has_presence and not message.HasField(field.name):
        return None
    value = getattr(message, field.name)
    if field.enum_type is not None:
        return _member(hint, field.enum_type, value)
    if field.message_type is not None:
        return dict(value)
    if isinstance(value, str):
        return value if hint is str else _object(value, field)
    return value if isinstance(value, int | float) else tuple(value)


def _member(kind: type[StrEnum], described: EnumDescriptor, number: int) -> StrEnum:
    value = described.values_by_number.get(number)
    member = value.name.removeprefix(_prefix(described)) if value is not None else ""
    if member not in kind.__members__:
        raise VersionMismatch(
            "a value that this software does not know",
            where=described.name,
            got=number,
            do="Use the same fedmerge version on both sides.",
        )
    return kind[member]


def _object(text: str, field: FieldDescriptor) -> dict[str, object]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise VersionMismatch("not a JSON object", where=field.full_name, got=ascii(text[:80]))
    return found


def _prefix(described: EnumDescriptor) -> str:
    """``UPDATE_STATE_`` for ``UpdateState``."""
    return described.values[0].name.removesuffix("UNSPECIFIED")
