"""Is every kind of bad update refused by a typed error that names it, and every lawful one let in?

One claim per kind of bad input, on files, through the checks that a server runs before it acknowledges.
"""

import io
import json
import math
import os
import pickle
import tracemalloc
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save

from fedmerge.common.base import Base
from fedmerge.common.config import validated
from fedmerge.common.errors import (
    BadStatistic,
    BadWeight,
    BaseMismatch,
    ConfigError,
    DtypeMismatch,
    FileError,
    MissingLayer,
    NonFinite,
    NormExceeded,
    ShapeMismatch,
    TooLarge,
    UnknownLayer,
    UnsafeFile,
    VersionMismatch,
)
from fedmerge.common.header import MAX_HEADER_BYTES
from fedmerge.common.scan import BLOCK_BYTES
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import FORMAT, to_bytes
from fedmerge.server.admission import MAX_EXAMPLES, BaseNorms, Limits, admit_update

SIDE = 600
"""A layer of this many rows and columns takes more than one block of the pass over the values."""
assert 4 * SIDE**2 > BLOCK_BYTES


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


BASE = Base.from_checkpoint(
    {"w": ones(8, 6), "b": ones(4), "big": ones(SIDE, SIDE), "head": ones(2, 2)}, private=["head"]
)
NORMS = BaseNorms.of(BASE)
LAYERS = {"w": ones(8, 6), "b": ones(4), "big": ones(SIDE, SIDE)}
SMALL = {"w": ones(8, 6), "b": ones(4)}
FACTORS = {"w#left": ones(8, 2), "w#right": ones(2, 6)}
TOLD = {
    "format": FORMAT,
    "base": BASE.fingerprint,
    "origin_version": "0",
    "task": "triage",
    "site": "whatever it says",
    "examples": "64",
    "statistics": "[]",
    "unchanged": "[]",
    "low_rank": "{}",
}


def file_of(tensors=LAYERS, **told) -> bytes:
    """A well-formed safetensors file; ``told`` changes its metadata, None leaves a key out."""
    return save(tensors, {key: value for key, value in {**TOLD, **told}.items() if value is not None})


def small(tensors=SMALL, **told) -> bytes:
    """The same with the large layer unchanged."""
    return file_of(tensors, **{"unchanged": '["big"]', **told})


def low_rank(tensors=FACTORS, shape=(8, 6), **told) -> bytes:
    tensors = {**tensors, "b": ones(4)}
    return small(tensors, **{"low_rank": json.dumps({"w": list(shape)}), **told})


@pytest.fixture
def admit(tmp_path):
    """Puts bytes into a file and asks whether they are let in."""

    def admit(data: bytes, limits: Limits | None = None, version: int = 0):
        path = tmp_path / "incoming.part"
        path.write_bytes(data)
        return admit_update(path, BASE, NORMS, limits or Limits(), current_version=version, site="ward-7")

    return admit


@pytest.fixture
def refused(admit):
    """Asks for one refusal, by type and layer, in a message that names the update."""

    def refused(error, data: bytes, says: str | None = None, layer: str | None = None, **given):
        with pytest.raises(error, match=says) as caught:
            admit(data, **given)
        assert type(caught.value) is error
        assert str(caught.value).startswith("update of ward-7")
        assert caught.value.layer == layer

    return refused


def test_the_files_that_the_others_here_are_spoiled_from_are_let_in(admit):
    for data in (file_of(), small(), low_rank()):
        assert admit(data).manifest == Manifest(BASE.fingerprint, 0, "triage", "ward-7", 64)


# --- not a task vector file ---


class Trap:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def stream_of(write) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


NO_SAFETENSORS = {
    "pickle": pickle.dumps(Trap()),
    "pickle, oldest protocol": pickle.dumps(Trap(), protocol=0),
    ".pt": stream_of(lambda stream: torch.save(LAYERS, stream)),
    ".pt before zip": stream_of(
        lambda stream: torch.save(LAYERS, stream, _use_new_zipfile_serialization=False)
    ),
    ".npz": stream_of(lambda stream: np.savez(stream, w=np.ones(3))),
    "zip": stream_of(lambda stream: zipfile.ZipFile(stream, "w").close()),
    "nothing": b"",
    "text": b"these are not the weights you are looking for",
}


@pytest.mark.parametrize("data", NO_SAFETENSORS.values(), ids=NO_SAFETENSORS)
def test_what_is_no_safetensors_file_is_refused_and_never_run(refused, tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    refused(UnsafeFile, data)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("told", [{"format": None}, {"format": "pt"}])
def test_a_checkpoint_is_no_task_vector(refused, told):
    refused(FileError, small(**told), "not a task vector")


@pytest.mark.parametrize("key", [key for key in TOLD if key != "format"])
def test_a_manifest_with_a_missing_key_is_refused(refused, key):
    refused(FileError, small(**{key: None}), f"lack '{key}'")


def test_another_format_version_is_refused(refused):
    refused(VersionMismatch, small(format="fedmerge.task_vector/2"))


# --- headers that lie ---

GOOD = low_rank()


def packed(header: dict | bytes, payload: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + payload


def parts(data: bytes = GOOD) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def moved(name: str, begin: int, end: int) -> bytes:
    """One tensor's range shifted by some bytes."""
    header, payload = parts()
    offsets = header[name]["data_offsets"]
    header[name]["data_offsets"] = [offsets[0] + begin, offsets[1] + end]
    return packed(header, payload)


def renamed(name: str, to: str) -> bytes:
    header, payload = parts()
    return packed({to if key == name else key: entry for key, entry in header.items()}, payload)


def doubled_key() -> bytes:
    header, payload = parts()
    text = json.dumps(header)
    return packed(f'{text[:-1]}, "b": {json.dumps(header["b"])}}}'.encode(), payload)


def of_dtype(code: str) -> bytes:
    header, payload = parts()
    header["b"]["dtype"] = code
    return packed(header, payload)


LENGTH = int.from_bytes(GOOD[:8], "little")

LIES = {
    "length 0": packed(GOOD[8:], b"", 0),
    "length one too short": packed(GOOD[8:], b"", LENGTH - 1),
    "length one too long": packed(GOOD[8:], b"", LENGTH + 1),
    "length of the whole file": packed(GOOD[8:], b"", len(GOOD) - 8),
    "length 2^63": packed(GOOD[8:], b"", 2**63),
    "length 2^64 - 1": packed(GOOD[8:], b"", 2**64 - 1),
    "overlapping ranges": moved("w#right", -8, -8),
    "a range twice": moved("w#right", -32, -32),
    "a range beyond the file": moved("w#right", 8, 8),
    "a range of another size": moved("w#right", 0, -4),
    "bytes of no tensor": GOOD + b"\0",
    "a byte missing": GOOD[:-1],
    "no payload": GOOD[: 8 + LENGTH],
    "a duplicate key": doubled_key(),
    "NUL in a name": renamed("b", "b\0"),
    "a control character in a name": renamed("b", "b\n"),
    "half a surrogate pair in a name": renamed("b", "\ud800"),
    "../ in a name": renamed("b", "../b"),
    "/../ in a name": renamed("b", "x/../../etc/b"),
    "..\\ in a name": renamed("b", "..\\b"),
    "a name of 1,025 characters": renamed("b", "b" * 1025),
    "a name of 100,000 characters": renamed("b", "b" * 100_000),
    "an empty name": renamed("b", ""),
    "an unknown dtype": of_dtype("F31"),
}


@pytest.mark.parametrize("data", LIES.values(), ids=LIES)
def test_a_header_that_lies_is_refused(admit, data):
    with pytest.raises(UnsafeFile, match="update of ward-7"):
        admit(data)


@pytest.mark.parametrize("range_missing", ["b", "w#left"])
def test_a_tensor_whose_range_is_missing_is_refused(admit, range_missing):
    header, payload = parts()
    del header[range_missing]["data_offsets"]
    with pytest.raises(UnsafeFile, match="malformed entry"):
        admit(packed(header, payload))


def test_names_in_the_metadata_are_held_to_the_same_rules(refused):
    for name in ("../b", "b\0", "b" * 1025, ""):
        refused(UnsafeFile, small({"w": ones(8, 6)}, unchanged=json.dumps(["big", "b", name])))


# --- sizes ---


def peak_of(action) -> int:
    tracemalloc.start()
    try:
        action()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_terabyte_is_refused_unread(tmp_path):
    path = tmp_path / "incoming.part"
    with path.open("wb") as file:
        file.write(GOOD)
        file.truncate(10**12)

    def ask():
        with pytest.raises(TooLarge, match="too large: got 1000000000000 bytes"):
            admit_update(path, BASE, NORMS, Limits(), current_version=0, site="ward-7")

    assert peak_of(ask) < 10**6


def test_a_header_longer_than_the_base_needs_is_refused_unread(tmp_path):
    path = tmp_path / "incoming.part"
    with path.open("wb") as file:
        file.write(MAX_HEADER_BYTES.to_bytes(8, "little") + b"{")
        file.truncate(8 + MAX_HEADER_BYTES)

    def ask():
        with pytest.raises(TooLarge, match="longer than the base's layers need"):
            admit_update(path, BASE, NORMS, Limits(), current_version=0, site="ward-7")

    assert peak_of(ask) < 10**6


@pytest.mark.parametrize("size", [2**31, 2**62, 2**63 - 1, 2**63, 10**400])
def test_a_shape_of_any_size_asks_for_no_memory(admit, size):
    header, payload = parts()
    header["b"]["shape"] = [size]

    def ask():
        with pytest.raises(UnsafeFile):
            admit(packed(header, payload))

    assert peak_of(ask) < 10**6


def test_a_rank_whose_squares_would_fill_memory_is_refused(refused):
    factors = {"w#left": torch.zeros(8, 200_000), "w#right": torch.zeros(200_000, 6)}
    refused(ShapeMismatch, low_rank(factors), "higher rank than the layer can have", "w")


# --- layers that are not the base's ---


@pytest.mark.parametrize(
    ("data", "error", "layer"),
    [
        (small({"w": ones(8, 6)}), MissingLayer, "b"),
        (file_of(SMALL), MissingLayer, "big"),
        (small({**SMALL, "extra": ones(2)}), UnknownLayer, "extra"),
        (small(unchanged='["big", "extra"]'), UnknownLayer, "extra"),
        (small({"w": ones(8, 6), "bias": ones(4)}), UnknownLayer, "bias"),
        (small({**SMALL, "head": ones(2, 2)}), UnknownLayer, "head"),
        (small({"w": ones(6, 8), "b": ones(4)}), ShapeMismatch, "w"),
        (small({"w": ones(8, 6), "b": ones(1)}), ShapeMismatch, "b"),
        (small({"w": ones(8, 6), "b": torch.tensor(1.0)}), ShapeMismatch, "b"),
        (small({"w": ones(8, 6), "b": ones(1, 4)}), ShapeMismatch, "b"),
        (small({"w": ones(8, 6), "b": ones(0)}), ShapeMismatch, "b"),
        (low_rank({"w#left": ones(6, 2), "w#right": ones(2, 8)}, (6, 8)), ShapeMismatch, "w"),
        (low_rank({"w#left": ones(8, 2), "w#right": ones(3, 6)}), ShapeMismatch, "w"),
        (low_rank({"w#left": ones(8, 2)}), FileError, "w"),
    ],
    ids=[
        "missing",
        "missing and not called unchanged",
        "extra",
        "extra unchanged",
        "renamed",
        "private",
        "transposed",
        "(1,) for (4,)",
        "() for (4,)",
        "(1, 4) for (4,)",
        "empty",
        "factors transposed",
        "factors that do not multiply",
        "half a pair",
    ],
)
def test_layers_that_do_not_fit_the_base_are_refused_by_name(refused, data, error, layer):
    refused(error, data, layer=layer)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
)
def test_a_dtype_that_is_not_documented_is_refused(refused, dtype):
    refused(DtypeMismatch, small({"w": ones(8, 6), "b": ones(4).to(dtype)}), layer="b")


def test_integers_without_their_scales_are_refused(refused):
    refused(FileError, small({"w": ones(8, 6), "b": ones(4).to(torch.int8)}), layer="b")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_documented_dtype_is_let_in(admit, dtype):
    assert admit(small({name: t.to(dtype) for name, t in SMALL.items()})).norm == pytest.approx(52**0.5)


# --- values ---

PLACES = {
    "first": 0,
    "last of the first block": BLOCK_BYTES // 4 - 1,
    "first of the second block": BLOCK_BYTES // 4,
    "middle": SIDE**2 // 2,
    "last": SIDE**2 - 1,
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_one_value_that_is_not_finite_anywhere_in_a_layer_is_refused(refused, place, value):
    big = ones(SIDE, SIDE)
    big.view(-1)[PLACES[place]] = value
    refused(NonFinite, file_of({**LAYERS, "big": big}), layer="big")


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", FACTORS)
@pytest.mark.parametrize("place", [0, -1])
def test_one_value_that_is_not_finite_in_a_factor_is_refused(refused, part, place, value):
    factors = {name: t.clone() for name, t in FACTORS.items()}
    factors[part].view(-1)[place] = value
    refused(NonFinite, low_rank(factors), layer="w")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_infinity_in_any_dtype_is_refused(refused, dtype):
    b = ones(4).to(dtype)
    b[2] = math.inf
    refused(NonFinite, small({"w": ones(8, 6), "b": b}), layer="b")


WIDE = Limits(layer_ratio=1e40, total_ratio=1e40)
HUGE = {
    "every value": small({"w": torch.full((8, 6), 3e38), "b": ones(4)}),
    "one value": small({"w": torch.full((8, 6), 3e38).triu(5), "b": ones(4)}),
    "float64 beyond float32": small({"w": torch.full((8, 6), 1e300, dtype=torch.float64), "b": ones(4)}),
    "factors": low_rank({"w#left": torch.full((8, 2), 1e30), "w#right": torch.full((2, 6), 1e30)}),
}


@pytest.mark.parametrize("data", HUGE.values(), ids=HUGE)
def test_finite_values_whose_norm_overflows_float32_are_refused_whatever_the_limits(refused, data):
    refused(NonFinite, data, layer="w", limits=WIDE)
    refused(NonFinite, data, layer="w")


def test_a_layer_too_large_for_the_base_is_refused_by_name_with_both_ratios(refused):
    refused(
        NormExceeded,
        small({"w": ones(8, 6), "b": torch.full((4,), 100.0)}),
        "got 100 times its norm, wanted at most 3 times",
        "b",
    )


def test_layers_too_large_together_are_refused(refused):
    data = file_of({name: 2.5 * t for name, t in LAYERS.items()})
    refused(NormExceeded, data, "got 2.5 times its norm, wanted at most 2 times")


def test_the_zero_vector_is_lawful(admit):
    assert admit(file_of({name: 0 * t for name, t in LAYERS.items()})).norm == 0
    assert admit(low_rank({name: 0 * t for name, t in FACTORS.items()}, (8, 6))).norm == 2.0
    assert admit(file_of({}, unchanged='["w", "b", "big"]')).norm == 0


# --- what an update says about itself ---


@pytest.mark.parametrize(
    ("base", "error"),
    [("0" * 64, BaseMismatch), ("", BaseMismatch), ("0" * 63, FileError), ("G" * 64, FileError)],
)
def test_an_update_of_another_base_is_refused(refused, base, error):
    refused(error, small(base=base))


@pytest.mark.parametrize(
    ("origin", "staleness", "says"),
    [
        ("1", None, "another origin version"),
        ("3", 1, "a stale origin version: got 3, wanted 0, or 4 to 5"),
        ("6", 1, "does not exist yet: got 6, wanted 0, or 4 to 5"),
        ("9" * 19, 1, "does not exist yet"),
    ],
)
def test_a_stale_or_future_origin_is_refused(refused, origin, staleness, says):
    limits = Limits(max_staleness=staleness)
    refused(VersionMismatch, small(origin_version=origin), says, limits=limits, version=5)


@pytest.mark.parametrize("origin", ["-1", "1.0", "nan", "", "9" * 20, "٣"])
def test_an_origin_that_is_no_number_is_refused(refused, origin):
    refused(FileError, small(origin_version=origin), "malformed origin version")


@pytest.mark.parametrize("examples", ["0", "-1", "nan", "inf", "1e18", "0.5", "", "9" * 20, "٣"])
def test_a_weight_that_is_no_whole_number_from_1_is_refused(refused, examples):
    refused(BadWeight, small(examples=examples))


def test_a_weight_of_a_billion_billion_weighs_no_more_than_the_cap(admit):
    assert admit(small(examples=str(10**18))).examples == MAX_EXAMPLES
    assert admit(small(examples=str(10**18)), Limits(max_examples=7)).examples == 7


@pytest.mark.parametrize("task", ["", "x" * 201, "a\nb", "a\0b", "\x1b[31mred", "\u202eevil", "\t"])
def test_a_task_name_that_cannot_be_shown_is_refused(refused, task):
    refused(FileError, small(task=task), "malformed task name")


@pytest.mark.parametrize("task", ["x" * 200, "../../etc/passwd", "tâche n° 1 (新)"])
def test_any_printable_task_name_is_let_in(admit, task):
    assert admit(small(task=task)).manifest.task == task


def test_statistics_without_end_are_refused(refused):
    refused(FileError, small(statistics=json.dumps([f"s{i}" for i in range(65)])), "too many statistics")


def test_the_site_is_the_one_that_sent_it_whatever_the_file_says(admit):
    vector = TaskVector.of(LAYERS, (), Manifest(BASE.fingerprint, 0, "triage", "another site", 5))
    assert admit(to_bytes(vector)).manifest == replace(vector.manifest, site="ward-7")


# --- statistics ---

MEASURED = {
    "w#fisher": ones(8, 6),
    "w#input_gram": ones(2, 6),
    "b#second_moment": ones(4),
    "b#input_gram": ones(4),
}
ALL_STATISTICS = json.dumps(["input_gram", "fisher", "second_moment"])


def with_statistics(changed=None, **told) -> bytes:
    """The small file with statistics of both layers; ``changed`` replaces parts, None leaves one out."""
    parts = {**SMALL, **MEASURED, **(changed or {})}
    kept = {name: values for name, values in parts.items() if values is not None}
    return small(kept, **{"statistics": ALL_STATISTICS, **told})


def test_statistics_are_let_in_in_any_documented_dtype(admit):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        data = with_statistics({name: t.to(dtype) for name, t in MEASURED.items()})
        assert admit(data).manifest.statistics == ("input_gram", "fisher", "second_moment")
    assert admit(low_rank({**FACTORS, **MEASURED}, statistics=ALL_STATISTICS)).norm > 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", MEASURED)
@pytest.mark.parametrize("place", [0, -1])
def test_one_value_that_is_not_finite_in_a_statistic_is_refused(refused, part, place, value):
    spoiled = MEASURED[part].clone()
    spoiled.view(-1)[place] = value
    refused(NonFinite, with_statistics({part: spoiled}), layer=part[0])


SQUARES = [part for part in MEASURED if part != "w#input_gram"]


@pytest.mark.parametrize(
    ("part", "value"),
    [*((part, value) for part in SQUARES for value in (-1.0, -1e-30)), *((part, 3e38) for part in MEASURED)],
)
def test_statistics_that_no_data_give_are_refused(refused, part, value):
    spoiled = MEASURED[part].clone()
    spoiled.view(-1)[-1] = value
    refused(BadStatistic, with_statistics({part: spoiled}), layer=part[0])


@pytest.mark.parametrize(
    ("changed", "told", "error", "layer"),
    [
        ({"w#fisher": ones(6, 8)}, {}, ShapeMismatch, "w"),
        ({"w#input_gram": ones(7, 6)}, {}, ShapeMismatch, "w"),
        ({"w#input_gram": ones(2, 8)}, {}, ShapeMismatch, "w"),
        ({"w#input_gram": ones(48)}, {}, ShapeMismatch, "w"),
        ({"b#input_gram": ones(1, 1)}, {}, ShapeMismatch, "b"),
        ({"b#second_moment": ones(4, 1)}, {}, ShapeMismatch, "b"),
        ({"w#fisher": ones(8, 6).bool()}, {}, DtypeMismatch, "w"),
        ({"w#hessian": ones(8, 6)}, {}, FileError, "w#hessian"),
        ({"big#fisher": ones(SIDE, SIDE)}, {}, FileError, "big"),
        ({"head#fisher": ones(2, 2)}, {}, FileError, "head"),
        ({}, {"statistics": '["input_gram", "fisher"]'}, FileError, "b"),
        ({}, {"shared_input": '{"b": "w"}'}, FileError, "b"),
        ({"b#input_gram": None}, {"shared_input": '{"b": "w"}'}, ShapeMismatch, "b"),
        ({}, {"shared_input": '{"big": "w"}'}, FileError, "big"),
        ({}, {"shared_input": "[]"}, FileError, None),
    ],
    ids=[
        "transposed",
        "more rows than columns",
        "other columns",
        "elementwise for a matrix",
        "a factor for a vector",
        "another shape",
        "another dtype",
        "an unknown name",
        "of a layer called unchanged",
        "of a layer that is not merged",
        "not listed",
        "stored and shared",
        "shared with another width",
        "shared by a layer that is not stored",
        "no object",
    ],
)
def test_statistics_that_do_not_fit_their_layers_are_refused(refused, changed, told, error, layer):
    refused(error, with_statistics(changed, **told), layer=layer)


# --- limits ---


@pytest.mark.parametrize(
    "given",
    [
        {"layer_ration": 1.0},
        {"max_update_bytes": 0},
        {"max_update_bytes": 1.5},
        {"max_examples": 0},
        {"layer_ratio": 0},
        {"layer_ratio": -1},
        {"layer_ratio": math.nan},
        {"total_ratio": math.inf},
        {"max_staleness": -1},
        {"updates_per_day": 0},
        {"bytes_per_day": -1},
        {"max_queue": 0},
        {"max_held": 0},
        {"quarantine": "some"},
        {"quarantine": None},
    ],
    ids=str,
)
def test_a_limit_that_does_not_exist_or_is_out_of_range_is_refused_by_name(given):
    with pytest.raises(ConfigError, match=f"setting '{next(iter(given))}'"):
        validated(Limits, given)
