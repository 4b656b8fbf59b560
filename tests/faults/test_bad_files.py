"""Can any bytes do more than raise a typed error that names the file?"""

import io
import json
import os
import pickle
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedmerge.common import vectorfile
from fedmerge.common.checkpoint import open_checkpoint
from fedmerge.common.errors import FedmergeError, FileError, UnsafeFile
from fedmerge.common.header import MAX_HEADER_BYTES, parse_header, read_header
from fedmerge.common.taskvector import LowRank, TaskVector

FILE = "update 7f3a"


def packed(header, payload: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, given as JSON text or an object, and a header length that may be wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"a": entry([2], 0, 8), "b": entry([1, 2], 8, 16)}


def test_a_sound_header_tells_metadata_layout_and_ranges():
    data = packed({"__metadata__": {"format": "pt"}, **GOOD}, bytes(16))
    header = parse_header(data, FILE)
    assert header.metadata == {"format": "pt"}
    assert header.layout == {"a": ((2,), torch.float32), "b": ((1, 2), torch.float32)}
    assert header.ranges == {"a": (len(data) - 16, len(data) - 8), "b": (len(data) - 8, len(data))}


def test_headers_of_safetensors_itself_pass():
    tensors = {str(dtype): torch.ones(2, 3).to(dtype) for dtype in (torch.bool, torch.int8, torch.bfloat16)}
    tensors |= {
        "empty": torch.empty(0, 7),
        "scalar": torch.tensor(1.0),
        "u64": torch.ones(2).to(torch.uint64),
    }
    layout = parse_header(save(tensors), FILE).layout
    assert layout == {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}


BAD = {
    "nothing": b"",
    "seven bytes": bytes(7),
    "header length 0": packed(b"", bytes(16), length=0),
    "header length one too long": packed(GOOD, b"", length=len(json.dumps(GOOD)) + 1),
    "header length one too short": packed(GOOD, bytes(16), length=len(json.dumps(GOOD)) - 1),
    "header length 2^63": packed(GOOD, bytes(16), length=2**63),
    "header length 2^64 - 1": packed(GOOD, bytes(16), length=2**64 - 1),
    "header over 100 MB": packed(GOOD, bytes(16), length=MAX_HEADER_BYTES + 1),
    "not JSON": packed(b"{nonsense"),
    "not UTF-8": packed(b'{"\xff": 1}'),
    "UTF-16": packed("{}".encode("utf-16")),
    "a list": packed(b"[]"),
    "nested too deep": packed(b'{"a":' * 100_000),
    "a number too long": packed(b'{"a": ' + b"9" * 10_000 + b"}"),
    "leading space": packed(b" {}"),
    "payload of no tensor": packed({}, bytes(1)),
    "key twice": packed(b'{"a": %b, "a": %b}' % ((json.dumps(GOOD["a"]).encode(),) * 2), bytes(8)),
    "key twice in an entry": packed(
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', bytes(8)
    ),
    "metadata not strings": packed({"__metadata__": {"a": 1}}),
    "metadata a list": packed({"__metadata__": []}),
    "NUL in a name": packed({"a\0b": entry([2], 0, 8)}, bytes(8)),
    "newline in a name": packed({"a\nb": entry([2], 0, 8)}, bytes(8)),
    "half a surrogate pair in a name": packed(b'{"\\ud800": %b}' % json.dumps(GOOD["a"]).encode(), bytes(8)),
    "path in a name": packed({"../a": entry([2], 0, 8)}, bytes(8)),
    "windows path in a name": packed({"a\\..\\b": entry([2], 0, 8)}, bytes(8)),
    "name of 1025": packed({"a" * 1025: entry([2], 0, 8)}, bytes(8)),
    "empty name": packed({"": entry([2], 0, 8)}, bytes(8)),
    "overlap": packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)),
    "the same bytes twice": packed({"a": entry([2], 0, 8), "b": entry([2], 0, 8)}, bytes(8)),
    "gap": packed({"a": entry([2], 0, 8), "b": entry([2], 12, 20)}, bytes(20)),
    "gap at the start": packed({"a": entry([2], 4, 12)}, bytes(12)),
    "bytes left over": packed(GOOD, bytes(17)),
    "bytes missing": packed(GOOD, bytes(15)),
    "no payload": packed(GOOD),
    "size too small for the shape": packed({"a": entry([3], 0, 8)}, bytes(8)),
    "size too large for the shape": packed({"a": entry([1], 0, 8)}, bytes(8)),
    "negative dimension": packed({"a": entry([-2], 0, 8)}, bytes(8)),
    "two negative dimensions": packed({"a": entry([-1, -2], 0, 8)}, bytes(8)),
    "huge dimension": packed({"a": entry([2**63], 0, 8)}, bytes(8)),
    "huge dimensions times zero": packed({"a": entry([2**62, 2**62, 0], 0, 0)}),
    "65 dimensions": packed({"a": entry([1] * 65, 0, 4)}, bytes(4)),
    "fractional dimension": packed({"a": entry([2.0], 0, 8)}, bytes(8)),
    "boolean dimension": packed({"a": entry([True, 2], 0, 8)}, bytes(8)),
    "shape a number": packed({"a": entry(2, 0, 8)}, bytes(8)),
    "unknown dtype": packed({"a": entry([2], 0, 8, "F31")}, bytes(8)),
    "dtype a number": packed({"a": entry([2], 0, 8, 32)}, bytes(8)),
    "offsets backwards": packed({"a": entry([2], 8, 0)}, bytes(8)),
    "negative offsets": packed({"a": entry([2], -8, 0)}, bytes(8)),
    "three offsets": packed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, bytes(8)),
    "no offsets": packed({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
    "an extra key": packed({"a": {**entry([2], 0, 8), "compressed": True}}, bytes(8)),
    "entry a number": packed({"a": 1}, bytes(8)),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_a_header_that_lies_is_refused_in_memory_and_on_disk(tmp_path, data):
    with pytest.raises(UnsafeFile, match=FILE):
        parse_header(data, FILE)
    (tmp_path / "bad.safetensors").write_bytes(data)
    with pytest.raises(UnsafeFile, match=r"bad.safetensors"):
        open_checkpoint(tmp_path / "bad.safetensors")


def pickled(saver) -> bytes:
    stream = io.BytesIO()
    saver(stream)
    return stream.getvalue()


class Trap:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


PICKLES = {
    "torch.save": pickled(lambda stream: torch.save({"w": torch.ones(2)}, stream)),
    "legacy torch.save": pickled(
        lambda stream: torch.save({"w": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    ),
    "trap": pickle.dumps(Trap()),
    "empty zip": pickled(lambda stream: zipfile.ZipFile(stream, "w").close()),
}


@pytest.mark.parametrize("data", PICKLES.values(), ids=PICKLES)
@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "pytorch_model.bin"])
def test_pickles_and_zips_are_told_apart_and_never_run(tmp_path, monkeypatch, data, name):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(data)
    with pytest.raises(UnsafeFile, match=r"looks like a (pickle|zip).*Save it as safetensors"):
        open_checkpoint(name)
    assert not Path("pwned").exists()


def test_a_header_whose_length_looks_like_a_pickle_still_opens(tmp_path):
    text = json.dumps(GOOD).encode().ljust(0x0280)
    assert set(parse_header(packed(text, bytes(16)), FILE).layout) == {"a", "b"}


def test_a_huge_file_with_a_bad_header_is_refused_without_reading_it(tmp_path):
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(packed(GOOD))
        file.truncate(10**12)
    with pytest.raises(UnsafeFile, match="belong to no tensor"):
        read_header(path)


def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(FileError, match="not a regular file"):
        open_checkpoint(tmp_path / "pipe.safetensors")


def valid() -> bytes:
    torch.manual_seed(0)
    return vectorfile.to_bytes(
        TaskVector.of(
            {"w": LowRank(torch.randn(3, 1), torch.randn(1, 4), (3, 4)), "b": torch.randn(3)}, unchanged=["e"]
        )
    )


VALID = valid()
TEXT_END = 8 + int.from_bytes(VALID[:8], "little")
WRITTEN_END = VALID.rindex(b"}", 0, TEXT_END) + 1


def open_and_read(data: bytes) -> None:
    """Only typed errors may escape, at opening or at reading."""
    with suppress(FedmergeError):
        vector = vectorfile.from_bytes(data, FILE)
        for name in vector.names:
            assert vector.read(name).to_dense().isfinite().all()


def open_and_read_file(path: Path) -> None:
    for opened in (vectorfile.load, open_checkpoint):
        with suppress(FedmergeError):
            held = opened(path)
            for name in held.names if isinstance(held, TaskVector) else held:
                held.read(name)


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
BYTE = st.integers(0, 255)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), BYTE), min_size=1, max_size=8))
@settings(max_examples=3000, **FUZZ)
@example([(0, 0)])
def test_changed_bytes_raise_only_typed_errors(changes):
    data = bytearray(VALID)
    for place, value in changes:
        data[place] = value
    open_and_read(bytes(data))


@given(st.integers(8, WRITTEN_END), st.integers(0, 40), st.binary(max_size=40))
@settings(max_examples=3000, **FUZZ)
def test_a_changed_header_raises_only_typed_errors(place, cut, inserted):
    text = VALID[8:place] + inserted + VALID[place + cut : WRITTEN_END]
    open_and_read(packed(text, VALID[TEXT_END:]))


JSON = (
    rb'{ } [ ] " , : - 0 99999999999999999999 1e9 null NaN "w" "F64" "I8" "F8_E5M2" #left __metadata__ \ud800'
)
TOKENS = st.sampled_from([*JSON.split(), b"\\u0000", b"\xff", b"\\", b"#right"])


@given(st.lists(st.tuples(st.integers(8, WRITTEN_END), st.integers(0, 6), TOKENS), min_size=1, max_size=3))
@settings(max_examples=3000, **FUZZ)
def test_json_tokens_in_the_header_raise_only_typed_errors(changes):
    text = VALID[8:WRITTEN_END]
    for place, cut, token in changes:
        text = text[: place - 8] + token + text[place - 8 + cut :]
    open_and_read(packed(text, VALID[TEXT_END:]))


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=1000, **FUZZ)
def test_random_bytes_raise_only_typed_errors(data, with_length):
    open_and_read(packed(data) if with_length else data)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), BYTE), min_size=1, max_size=4), st.integers(0, 9))
@settings(max_examples=500, **FUZZ)
def test_changed_and_cut_files_raise_only_typed_errors(tmp_path_factory, changes, cut):
    data = bytearray(VALID)
    for place, value in changes:
        data[place] = value
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    path.write_bytes(data[: len(data) - cut])
    open_and_read_file(path)


INT8 = vectorfile.to_bytes(vectorfile.from_bytes(VALID), torch.int8)
INT8_END = 8 + int.from_bytes(INT8[:8], "little")


@given(st.lists(st.tuples(st.integers(0, len(INT8) - 1), BYTE), min_size=1, max_size=8))
@settings(max_examples=1000, **FUZZ)
@example([(place, 255) for place in range(INT8_END, len(INT8))])
def test_changed_bytes_of_integers_and_scales_raise_only_typed_errors(changes):
    data = bytearray(INT8)
    for place, value in changes:
        data[place] = value
    open_and_read(bytes(data))


@pytest.mark.parametrize("length", range(0, len(VALID), 7))
def test_every_shorter_file_is_refused(length):
    with pytest.raises(UnsafeFile):
        vectorfile.from_bytes(VALID[:length], FILE)
