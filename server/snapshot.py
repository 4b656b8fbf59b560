"""An engine's state as a file, so that a server can go on where it stopped without replaying everything.

A safetensors file: tensor ``NAME#FIELD`` for every field of a touched layer's state, and metadata

    format      "fedmerge.snapshot/1"
    base        fingerprint of the base, 64 hex digits
    rule        JSON object: the rule's name and its options
    totals      JSON object: the global scalars
    states      JSON object from each touched layer's name to the type of its state

The same state gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, BinaryIO

from fedmerge.common.checkpoint import tensor_bytes, tensor_reader
from fedmerge.common.errors import MismatchError, StoreDamaged, UnsafeFile
from fedmerge.common.header import LENGTH_BYTES, read_header
from fedmerge.common.writing import ALIGNMENT, CODES
from fedmerge.server.engine.engine import Engine
from fedmerge.server.merge.rule import Rule, State, Totals, tensors_of

FORMAT = "fedmerge.snapshot/1"

ROOM_PER_FIELD = 512
"""Bytes that a tensor's header entry takes at most beside its name: a code, four sizes, two offsets."""

ROOM_PER_LAYER = 64


def write(engine: Engine, base: str, file: BinaryIO) -> None:
    """Writes an engine's current state, one layer in memory at a time.

    The header comes first in the file and is written last: shapes are known once the states are there.
    """
    names = [name for name in engine.layers if name in engine.touched]
    kinds: dict[str, str] = {}
    entries: dict[str, object] = {}
    room_bytes = _room(engine, base, names)
    file.seek(LENGTH_BYTES + room_bytes)
    offset = 0
    for name in names:
        state = engine.state(name)
        kinds[name] = type(state).__name__
        for field, tensor in tensors_of(state).items():
            data = tensor_bytes(tensor)
            file.write(data)
            entries[f"{name}#{field}"] = {
                "dtype": CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + len(data)],
            }
            offset += len(data)
    header = _compact({"__metadata__": _metadata(engine, base, kinds), **entries})
    assert len(header) <= room_bytes
    file.seek(0)
    file.write(room_bytes.to_bytes(LENGTH_BYTES, "little") + header.ljust(room_bytes))


def restore(engine: Engine, base: str, path: Path) -> None:
    """Brings an engine to the state in a file whose bytes have been verified.

    Raises:
        MismatchError: written for another base or rule. StoreDamaged: not a snapshot; the engine's state is
            then undefined until it is restored from another.
    """
    metadata = read_header(path).metadata
    _check(metadata, path, base, engine.rule)
    try:
        kinds: dict[str, str] = json.loads(metadata["states"])
        totals = Totals(**json.loads(metadata["totals"]))
        types = {kind.__name__: kind for kind in engine.rule.states}
        read = tensor_reader(path)

        def state(name: str) -> State:
            kind = types[kinds[name]]
            # Copies: tensors mapped from the file are not aligned, and must outlive it.
            found: State = kind(**{field: read(f"{name}#{field}").clone() for field in _fields(kind)})
            return found

        if not kinds.keys() <= engine.layers.keys():
            raise KeyError(*kinds.keys() - engine.layers.keys())
        engine.restore(state, kinds, totals)
    except (KeyError, TypeError, ValueError, UnsafeFile) as error:
        raise StoreDamaged("not a snapshot of this engine", where=path, got=repr(error)) from error


def _check(metadata: Mapping[str, str], path: Path, base: str, rule: Rule) -> None:
    wanted = {"format": FORMAT, "base": base, "rule": _rule(rule)}
    for key, value in wanted.items():
        if metadata.get(key) != value:
            raise MismatchError(
                f"a snapshot with another {key}", where=path, got=metadata.get(key), wanted=value
            )


def _metadata(engine: Engine, base: str, kinds: Mapping[str, str]) -> dict[str, str]:
    return {
        "format": FORMAT,
        "base": base,
        "rule": _rule(engine.rule),
        "totals": json.dumps(asdict(engine.totals)),
        "states": json.dumps(kinds),
    }


def _rule(rule: Rule) -> str:
    return json.dumps({"name": rule.name, **rule.model_dump(mode="json")}, sort_keys=True)


def _room(engine: Engine, base: str, names: list[str]) -> int:
    """Bytes that the header certainly fits in, a multiple of the alignment."""
    most = max(len(_fields(kind)) for kind in engine.rule.states)
    longest = max(len(kind.__name__) for kind in engine.rule.states)
    room = len(_compact({"__metadata__": _metadata(engine, base, {})})) + ALIGNMENT
    for name in names:
        quoted = len(json.dumps(json.dumps(name)))
        room += quoted + longest + ROOM_PER_LAYER + most * (quoted + ROOM_PER_FIELD)
    return room // ALIGNMENT * ALIGNMENT


def _fields(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _compact(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
