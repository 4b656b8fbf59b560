"""Does a task vector survive its file, and does a file that lies about itself name the layer?"""

import json

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from fedmerge.common import vectorfile
from fedmerge.common.errors import (
    BadWeight,
    DtypeMismatch,
    FileError,
    NonFinite,
    ShapeMismatch,
    UnsafeFile,
    VersionMismatch,
)
from fedmerge.common.taskvector import Dense, LowRank, Manifest, TaskVector

MANIFEST = Manifest("ab" * 32, 3, 'têxt "a"', "hospital-2", 1200, ("gram", "second \\ moments"))


def vector(**kwargs):
    torch.manual_seed(0)
    layers = {
        "a.weight": LowRank(torch.randn(4, 2), torch.randn(2, 12), (4, 3, 2, 2)),
        "a.bias": torch.randn(4),
        'odd "é\\ name': LowRank(torch.randn(3, 1), torch.randn(1, 5), (3, 5)),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }
    return TaskVector.of(layers, unchanged=["embed.weight"], manifest=MANIFEST, **kwargs)


def assert_equal(one: TaskVector, other: TaskVector) -> None:
    assert one.names == other.names
    assert one.unchanged == other.unchanged
    assert one.manifest == other.manifest
    assert dict(one.shapes) == dict(other.shapes)
    for name in one.names:
        mine, theirs = one.read(name), other.read(name)
        assert type(mine) is type(theirs)
        assert mine.shape == theirs.shape
        assert all(torch.equal(a, b) for a, b in zip(mine.tensors(), theirs.tensors(), strict=True))


def test_bytes_bring_back_the_same_vector():
    assert_equal(vectorfile.from_bytes(vectorfile.to_bytes(vector())), vector())


def test_a_file_brings_back_the_same_vector_and_holds_the_same_bytes(tmp_path):
    path = tmp_path / "u.safetensors"
    written_bytes = vectorfile.save(vector(), path)
    assert path.stat().st_size == written_bytes
    assert path.read_bytes() == vectorfile.to_bytes(vector())
    assert_equal(vectorfile.load(path), vector())


def test_a_vector_without_stored_layers_round_trips(tmp_path):
    held = TaskVector.of({}, unchanged=["a"])
    vectorfile.save(held, tmp_path / "u.safetensors")
    assert_equal(vectorfile.load(tmp_path / "u.safetensors"), held)


def test_safetensors_itself_reads_our_files(tmp_path):
    vectorfile.save(vector(), tmp_path / "u.safetensors")
    held = load_file(tmp_path / "u.safetensors")
    assert torch.equal(held["a.weight#left"], vector().read("a.weight").left_MR)
    assert held["a.weight#right"].shape == (2, 12)


def test_shapes_that_the_vector_does_not_tell_still_fit_the_header(tmp_path):
    held = TaskVector(("w",), lambda name: Dense(torch.ones(1, 2, 3, 4)))
    assert vectorfile.from_bytes(vectorfile.to_bytes(held)).shapes == {"w": (1, 2, 3, 4)}


def test_opening_reads_no_tensor(tmp_path, monkeypatch):
    vectorfile.save(vector(), tmp_path / "u.safetensors")
    reads = []
    real = vectorfile.tensor_reader
    monkeypatch.setattr(
        vectorfile, "tensor_reader", lambda path: lambda name: reads.append(name) or real(path)(name)
    )
    held = vectorfile.load(tmp_path / "u.safetensors")
    assert held.shapes["a.weight"] == (4, 3, 2, 2)
    assert reads == []
    held.read("a.weight")
    assert reads == ["a.weight#left", "a.weight#right"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "u.safetensors"
    vectorfile.save(vector(), path)
    before = path.read_bytes()
    broken = TaskVector.of({"a": torch.ones(2), "b": torch.tensor([float("nan")])})
    with pytest.raises(NonFinite, match="layer 'b'"):
        vectorfile.save(broken, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(FileError, match="cannot be written"):
        vectorfile.save(vector(), tmp_path / "no" / "u.safetensors")


@pytest.mark.parametrize("name", ["a#left", "", "a/../b", "nul\0", "x" * 1025])
def test_a_name_that_no_reader_accepts_is_not_written(name):
    with pytest.raises(FileError):
        vectorfile.to_bytes(TaskVector.of({name: torch.ones(1)}))


@pytest.mark.parametrize(
    ("manifest", "error"),
    [
        (Manifest(examples=0), BadWeight),
        (Manifest(base="xyz"), FileError),
        (Manifest(origin_version=-1), FileError),
    ],
)
def test_a_manifest_that_no_reader_accepts_is_not_written(manifest, error):
    with pytest.raises(error):
        vectorfile.to_bytes(TaskVector.of({"w": torch.ones(1)}, manifest=manifest))


def test_only_our_files_are_task_vectors(tmp_path):
    vectorfile.save(vector(), tmp_path / "u.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert vectorfile.is_task_vector(tmp_path / "u.safetensors")
    assert not vectorfile.is_task_vector(tmp_path / "m.safetensors")
    with pytest.raises(FileError, match=r"not a task vector.*together with its base"):
        vectorfile.load(tmp_path / "m.safetensors")


def file_of(tensors=None, low_rank=None, **metadata):
    """Bytes of a one-layer file, with metadata changed; None leaves a key out."""
    told = {
        "format": vectorfile.FORMAT,
        "base": "",
        "origin_version": "0",
        "task": "",
        "site": "",
        "examples": "1",
        "statistics": "[]",
        "unchanged": "[]",
        "low_rank": json.dumps(low_rank or {}),
        **metadata,
    }
    held = {"w": torch.ones(2, 3)} if tensors is None else tensors
    return save(held, {key: value for key, value in told.items() if value is not None})


def read_all(data: bytes) -> dict[str, torch.Tensor]:
    return {name: update.to_dense() for name, update in vectorfile.from_bytes(data, "update 7f3a").items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_types_become_float32(dtype):
    values = torch.randn(2, 3).to(dtype)
    held = read_all(file_of({"w": values}))["w"]
    assert held.dtype is torch.float32
    assert torch.equal(held, values.float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_other_types_are_refused_at_opening(dtype):
    with pytest.raises(DtypeMismatch, match="update 7f3a, layer 'w'"):
        vectorfile.from_bytes(file_of({"w": torch.ones(2).to(dtype)}), "update 7f3a")


def test_float64_beyond_float32_is_refused_when_read():
    data = file_of({"v": torch.ones(1), "w": torch.tensor([1e39], dtype=torch.float64)})
    held = vectorfile.from_bytes(data, "update 7f3a")
    assert held.read("v").to_dense() == 1
    with pytest.raises(NonFinite, match="update 7f3a, layer 'w'"):
        held.read("w")


@pytest.mark.parametrize("part", ["w#left", "w#right"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_factor_that_is_not_finite_is_refused(part, value):
    tensors = {"w#left": torch.ones(2, 1), "w#right": torch.ones(1, 3)}
    tensors[part][0, 0] = value
    with pytest.raises(NonFinite, match="layer 'w'"):
        read_all(file_of(tensors, {"w": [2, 3]}))


def test_finite_factors_whose_product_overflows_are_refused():
    tensors = {"w#left": torch.full((2, 1), 1e30), "w#right": torch.full((1, 3), 1e30)}
    with pytest.raises(NonFinite, match="product may overflow"):
        read_all(file_of(tensors, {"w": [2, 3]}))


LEFT, RIGHT = torch.ones(2, 1), torch.ones(1, 3)


@pytest.mark.parametrize(
    ("tensors", "low_rank", "error", "message"),
    [
        ({"w#left": LEFT}, {"w": [2, 3]}, FileError, "half of a factor pair is missing: wanted w#right"),
        ({"w#right": RIGHT}, {"w": [2, 3]}, FileError, "half of a factor pair is missing: wanted w#left"),
        ({}, {"w": [2, 3]}, FileError, "half of a factor pair"),
        ({"w#left": LEFT, "w#right": RIGHT}, {}, FileError, "belongs to no low-rank layer"),
        ({"w#up": LEFT, "w": RIGHT}, {}, FileError, "belongs to no low-rank layer"),
        (
            {"w#left": LEFT, "w#right": RIGHT, "w": torch.ones(2, 3)},
            {"w": [2, 3]},
            FileError,
            "both dense and low",
        ),
        ({"w#left": LEFT, "w#right": RIGHT}, {"w": [3, 3]}, ShapeMismatch, "do not multiply"),
        ({"w#left": LEFT, "w#right": RIGHT}, {"w": [2, 4]}, ShapeMismatch, "do not multiply"),
        ({"w#left": LEFT, "w#right": torch.ones(2, 3)}, {"w": [2, 3]}, ShapeMismatch, "do not multiply"),
        ({"w#left": torch.ones(2), "w#right": RIGHT}, {"w": [2, 3]}, ShapeMismatch, "do not multiply"),
        ({"w#left": torch.ones(2, 0), "w#right": torch.ones(0, 3)}, {"w": [2, 3]}, ShapeMismatch, "R >= 1"),
        ({"w#left": LEFT, "w#right": RIGHT}, {"w": [2, -3]}, FileError, "low_rank"),
        ({"w#left": LEFT, "w#right": RIGHT}, {"w": []}, FileError, "low_rank"),
        ({"w#left": LEFT, "w#right": RIGHT}, {"w": [2.0, 3]}, FileError, "low_rank"),
        ({"#left": LEFT, "#right": RIGHT}, {"": [2, 3]}, UnsafeFile, "name is empty"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(tensors, low_rank, error, message):
    with pytest.raises(error, match=message):
        vectorfile.from_bytes(file_of(tensors, low_rank))


@pytest.mark.parametrize("examples", ["0", "-1", "1.5", "nan", "1e18", "", "²", "9" * 5000])
def test_an_example_count_that_is_no_positive_integer_is_refused(examples):
    with pytest.raises(BadWeight, match="example count"):
        vectorfile.from_bytes(file_of(examples=examples))


def test_another_format_version_says_got_and_wanted():
    with pytest.raises(
        VersionMismatch, match=r"got 'fedmerge.task_vector/2', wanted 'fedmerge.task_vector/1'"
    ):
        vectorfile.from_bytes(file_of(format="fedmerge.task_vector/2"))


@pytest.mark.parametrize(
    "metadata",
    [
        {"base": "xyz"},
        {"base": None},
        {"site": None},
        {"origin_version": "-1"},
        {"origin_version": "1.0"},
        {"statistics": "{}"},
        {"statistics": "[1]"},
        {"statistics": '["a", "a"]'},
        {"unchanged": "nonsense"},
        {"unchanged": "[" * 100_000},
        {"unchanged": '["w"]'},
        {"unchanged": '["a", "a"]'},
        {"unchanged": '["nul\\u0000"]'},
        {"low_rank": "[]"},
        {"low_rank": '{"w": [2, 3], "w": [2, 3]}'},
    ],
)
def test_malformed_metadata_are_refused(metadata):
    with pytest.raises(FileError, match="update 7f3a"):
        vectorfile.from_bytes(file_of(**metadata), "update 7f3a")
