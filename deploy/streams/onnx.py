"""Weights out of an ONNX file that PyTorch exported, read as plain protobuf data; no ONNX runtime needed.

Only four message types of the format are declared, with the fields used here; protobuf skips the rest.
The exporter stores the weight of a linear layer transposed and under a number (``onnx::MatMul_1966``).
Its module is still told by the name of the node that multiplies by it
(``/backbone/encoder/layer.0/mlp/fc1/MatMul``), so it gets its name and layout back.
"""

from __future__ import annotations

from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from torch import Tensor

from fedmerge.common.errors import FileError

FLOAT32 = 1
"""``TensorProto.DataType.FLOAT``."""
PACKAGE = "fedmerge.onnx"
FIELDS = {
    "Model": {"graph": (7, "Graph")},
    "Graph": {"node": (1, "Node[]"), "initializer": (5, "Tensor[]")},
    "Node": {"input": (1, "string[]"), "name": (3, "string"), "op_type": (4, "string")},
    "Tensor": {
        "dims": (1, "int64[]"),
        "data_type": (2, "int32"),
        "name": (8, "string"),
        "raw_data": (9, "bytes"),
    },
}
"""Message type to its fields: number and type, ``[]`` for repeated ones."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The float32 tensors of a model file under PyTorch's names, linear weights as ``(out, in)``.

    Tensors of other types are left out.

    Raises:
        FileError: not an ONNX file, or a tensor whose bytes are elsewhere or do not fill its shape.
    """
    model = _message_class()()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise FileError("not an ONNX file", where=path, got=str(error)) from error
    stored = {raw.name: _tensor(raw, path) for raw in model.graph.initializer if raw.data_type == FLOAT32}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in stored:
            module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
            stored[f"{module}.weight"] = stored.pop(node.input[1]).T.contiguous()
    return stored


def _tensor(raw: Any, path: Path) -> Tensor:
    shape = tuple(raw.dims)
    if len(raw.raw_data) != torch.float32.itemsize * prod(shape):
        raise FileError(
            "a tensor's bytes do not fill its shape",
            where=path,
            layer=raw.name,
            got=f"{len(raw.raw_data)} bytes",
            wanted=f"{shape} float32",
        )
    return torch.frombuffer(bytearray(raw.raw_data), dtype=torch.float32).reshape(shape)


@lru_cache(maxsize=1)
def _message_class() -> Any:
    """The class of ``Model``, made from :data:`FIELDS` in a pool of its own."""
    file = FileDescriptorProto(name=f"{PACKAGE}.proto", package=PACKAGE, syntax="proto2")
    for message, fields in FIELDS.items():
        declared = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            field = declared.field.add(name=name, number=number)
            _declare(field, kind)
    pool = DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.Model"))


def _declare(field: FieldDescriptorProto, kind: str) -> None:
    single = kind.removesuffix("[]")
    field.label = field.LABEL_OPTIONAL if kind == single else field.LABEL_REPEATED
    if single in FIELDS:
        field.type, field.type_name = field.TYPE_MESSAGE, f".{PACKAGE}.{single}"
    else:
        field.type = field.Type.Value(f"TYPE_{single.upper()}")
