"""Does a task vector survive its file, and does a file that lies about itself name the layer?"""

import json
import math

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
from fedmerge.common.scan import scan
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


# --- scan: what reading every layer would find out, a block at a time ---

BLOCK = 64
"""Bytes: small enough that every tensor here takes several blocks."""


def written(tmp_path, data: bytes):
    path = tmp_path / "u.safetensors"
    path.write_bytes(data)
    return path


def test_scan_gives_the_squared_norm_of_every_layer_in_order(tmp_path):
    path = written(tmp_path, vectorfile.to_bytes(vector()))
    found = dict(scan(path, BLOCK))
    assert list(found) == list(vectorfile.load(path).names)
    for name, update in vector().items():
        assert found[name] == pytest.approx(update.to_dense().double().square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("block", [8, BLOCK, 2**20])
def test_scan_takes_every_float_type_whatever_the_block(tmp_path, dtype, block):
    values = torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = written(tmp_path, file_of({"w": values}))
    ((name, square),) = scan(path, block)
    assert name == "w"
    assert square == pytest.approx(float(values.float().double().square().sum()), rel=1e-12)


def test_scan_squares_values_whose_squares_overflow_float32(tmp_path):
    path = written(tmp_path, file_of({"w": torch.full((5,), 1e30)}))
    assert dict(scan(path))["w"] == pytest.approx(5e60, rel=1e-6)


@pytest.mark.parametrize("shape", [(40, 3, 30), (3, 40, 30), (5, 60, 5), (1, 2000, 1)])
def test_scan_measures_a_product_of_any_rank_that_it_takes(tmp_path, shape, monkeypatch):
    monkeypatch.setattr("fedmerge.common.scan.BLOCK_BYTES", BLOCK)
    monkeypatch.setattr("fedmerge.common.scan.GRAM_RANK", 2000)
    rows, rank, columns = shape
    factors = LowRank(torch.randn(rows, rank), torch.randn(rank, columns), (rows, columns))
    path = written(tmp_path, vectorfile.to_bytes(TaskVector.of({"w": factors})))
    wanted = (factors.left_MR.double() @ factors.right_RN.double()).square().sum()
    assert dict(scan(path))["w"] == pytest.approx(float(wanted), rel=1e-9)


def test_scan_refuses_a_rank_that_no_layer_can_have(tmp_path):
    tensors = {"w#left": torch.ones(2, 2000), "w#right": torch.ones(2000, 3)}
    path = written(tmp_path, file_of(tensors, {"w": [2, 3]}))
    with pytest.raises(ShapeMismatch, match=r"layer 'w': .* got rank 2000, wanted at most 1024"):
        list(scan(path))


SPOILED = {
    "first": ({"v": torch.ones(50)}, {}, 0),
    "in the middle": ({"v": torch.ones(50)}, {}, 31),
    "last": ({"v": torch.ones(50)}, {}, 49),
    "in the left factor": ({"v#left": torch.ones(50, 1), "v#right": torch.ones(1, 3)}, {"v": [50, 3]}, 17),
    "in the right factor": ({"v#right": torch.ones(1, 50), "v#left": torch.ones(3, 1)}, {"v": [3, 50]}, 17),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoiled", SPOILED)
def test_scan_refuses_what_reading_refuses_in_the_same_words(tmp_path, spoiled, value):
    tensors, low_rank, place = SPOILED[spoiled]
    tensors = {name: values.clone() for name, values in tensors.items()}
    next(iter(tensors.values())).view(-1)[place] = value
    path = written(tmp_path, file_of({"a": torch.ones(3), **tensors}, low_rank))
    with pytest.raises(NonFinite) as reading:
        vectorfile.load(path).read("v")
    with pytest.raises(NonFinite) as scanning:
        list(scan(path, BLOCK))
    assert (scanning.value.what, scanning.value.where, scanning.value.layer) == (
        reading.value.what,
        reading.value.where,
        "v",
    )


@pytest.mark.parametrize(
    ("tensors", "low_rank"),
    [
        ({"w": torch.tensor([1e39], dtype=torch.float64)}, None),
        ({"w#left": torch.full((2, 1), 1e30), "w#right": torch.full((1, 3), 1e30)}, {"w": [2, 3]}),
    ],
    ids=["float64 beyond float32", "product of factors"],
)
def test_scan_refuses_what_overflows_float32_when_read(tmp_path, tensors, low_rank):
    path = written(tmp_path, file_of(tensors, low_rank))
    with pytest.raises(NonFinite, match="layer 'w'"):
        list(scan(path))


def test_scan_refuses_a_header_that_safetensors_would_refuse_later(tmp_path):
    half_a_pair = file_of(site="@@@@@@").replace(b"@@@@@@", rb"\ud800")
    with pytest.raises(UnsafeFile, match="half a surrogate pair"):
        list(scan(written(tmp_path, half_a_pair)))


def test_scan_of_a_file_that_shrinks_meanwhile_is_a_typed_error(tmp_path):
    path = written(tmp_path, file_of({"v": torch.ones(50), "w": torch.ones(50)}))
    found = scan(path, BLOCK)
    next(found)
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(UnsafeFile, match="became shorter"):
        next(found)


# --- bfloat16 ---


def test_a_vector_may_be_stored_in_bfloat16_at_half_the_bytes(tmp_path):
    path = tmp_path / "u.safetensors"
    assert vectorfile.save(vector(), path, torch.bfloat16) == path.stat().st_size
    assert path.read_bytes() == vectorfile.to_bytes(vector(), torch.bfloat16)
    assert {values.dtype for values in load_file(path).values()} == {torch.bfloat16}
    back = vectorfile.load(path)
    assert back.names == vector().names
    for name, update in vector().items():
        for mine, theirs in zip(back.read(name).tensors(), update.tensors(), strict=True):
            assert mine.dtype is torch.float32
            assert torch.equal(mine, theirs.to(torch.bfloat16).float())


def test_bfloat16_rounds_to_nearest_and_ties_to_even():
    step = 2.0**-7
    given = torch.tensor([1 + step / 2, 1 + 3 * step / 2, 1 + step * 0.51, -1 - step / 2])
    held = vectorfile.from_bytes(vectorfile.to_bytes(TaskVector.of({"w": given}), torch.bfloat16))
    assert held.read("w").to_dense().tolist() == [1, 1 + 2 * step, 1 + step, -1]


def test_a_value_that_bfloat16_rounds_to_infinity_is_not_written():
    with pytest.raises(NonFinite, match="layer 'w'"):
        vectorfile.to_bytes(TaskVector.of({"w": torch.tensor([3.4e38])}), torch.bfloat16)


def test_an_open_file_takes_the_same_bytes(tmp_path):
    with (tmp_path / "u").open("w+b") as file:
        count = vectorfile.write(vector(), file)
    assert (tmp_path / "u").read_bytes() == vectorfile.to_bytes(vector())
    assert count == (tmp_path / "u").stat().st_size
