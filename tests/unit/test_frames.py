"""Is what is written past protobuf what protobuf would have written, and read as protobuf would read it?"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.common.frames import from_wire, to_wire
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb

KINDS = [pb.SubmitRequest, pb.PullResponse]
SIZES = [0, 1, 127, 128, 16383, 16384, 2**20, 2**21 + 1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_a_chunk_is_written_as_protobuf_writes_it_and_comes_back(
    kind: type[pb.SubmitRequest], size: int
) -> None:
    chunk = bytes(range(256)) * (size // 256) + bytes(size % 256)
    data = to_wire(chunk)
    assert data == kind(chunk=chunk).SerializeToString()
    found = from_wire(kind)(data)
    assert isinstance(found, memoryview)
    assert found == chunk


def test_a_header_is_a_message() -> None:
    message = pb.SubmitRequest(header=pb.UploadHeader(site="a", size=3, sha256="b"))
    assert from_wire(pb.SubmitRequest)(to_wire(message)) == message


@given(st.binary(max_size=40))
def test_any_bytes_are_read_as_protobuf_reads_them(data: bytes) -> None:
    try:
        wanted = pb.SubmitRequest.FromString(data)
    except Exception as error:
        with pytest.raises(type(error)):
            from_wire(pb.SubmitRequest)(data)
        return
    found = from_wire(pb.SubmitRequest)(data)
    if isinstance(found, memoryview):
        assert wanted.WhichOneof("part") == "chunk"
        assert found == wanted.chunk
    else:
        assert found == wanted


@given(st.binary(max_size=300), st.binary(max_size=4))
def test_a_chunk_with_something_before_or_after_it_is_left_to_protobuf(chunk: bytes, more: bytes) -> None:
    data = to_wire(chunk) + to_wire(more)
    assert from_wire(pb.SubmitRequest)(data) == pb.SubmitRequest.FromString(data)
