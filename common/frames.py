"""Chunks on the wire, without passing every byte through a protobuf message and its copies.

``SubmitRequest`` and ``PullResponse`` are a header (field 1) or a chunk (field 2). A message that is a
chunk and nothing else is a tag, a length and the bytes; such messages are written and read here, all
others by protobuf. The wire format is the contract's in both cases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from google.protobuf.message import Message

CHUNK_TAG = 2 << 3 | 2
"""Field 2, length-delimited."""

LONGEST_LENGTH = 5
"""Bytes of a length below 2^35."""

Framed = TypeVar("Framed", bound=Message)


def to_wire(message: Message | bytes) -> bytes:
    """A message's bytes; plain bytes are a chunk's."""
    if isinstance(message, Message):
        return message.SerializeToString()
    return bytes((CHUNK_TAG, *_varint(len(message)))) + message


def from_wire(kind: type[Framed]) -> Callable[[bytes], Framed | memoryview]:
    """What reads messages of a kind: a chunk comes as a view of its bytes, all else as a message."""

    def read(data: bytes) -> Framed | memoryview:
        chunk = _chunk_in(data)
        return kind.FromString(data) if chunk is None else chunk

    return read


def _chunk_in(data: bytes) -> memoryview | None:
    """The chunk, if there is one and nothing else."""
    if not data or data[0] != CHUNK_TAG:
        return None
    length, shift = 0, 0
    for at, byte in enumerate(data[1 : 1 + LONGEST_LENGTH], start=2):
        length |= (byte & 0x7F) << shift
        if byte < 0x80:
            return memoryview(data)[at:] if length == len(data) - at else None
        shift += 7
    return None


def _varint(number: int) -> list[int]:
    """Seven bits at a time, the lowest first; the high bit says that more follow."""
    found = []
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return [*found, number]
