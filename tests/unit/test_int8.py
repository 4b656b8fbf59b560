"""Do integers with scales hold a layer as closely as they say, and does a file hold them strictly?"""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from fedmerge.common import vectorfile
from fedmerge.common.errors import DtypeMismatch, FileError, NonFinite, ShapeMismatch
from fedmerge.common.int8 import dealt, decoder, encoded
from fedmerge.common.scan import scan
from fedmerge.common.statistics import Statistics
from fedmerge.common.taskvector import LowRank, Manifest, TaskVector

SHAPES = {"w": (5, 7), "conv": (4, 3, 2, 2), "bias": (9,), "scalar": (), "empty": (0, 3), "thin": (3, 0)}


def random_layers(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def factors(rows: int, rank: int, columns: int) -> LowRank:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(s, generator=generator) for s in ((rows, rank), (rank, columns)))
    return LowRank(left, right, (rows, columns))


def decoded(part: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return decoder(tensors.__getitem__, "update 7f3a")(part)


def read_back(vector: TaskVector) -> TaskVector:
    return vectorfile.from_bytes(vectorfile.to_bytes(vector, torch.int8), "update 7f3a")


def test_a_row_by_hand():
    """127 is the largest of the row, so the scale is 1 and halves go to the even integer."""
    tensors = encoded("w", torch.tensor([[127.0, -0.5, 0.5, 1.5, -2.5, 0.0], [0.0] * 6]))
    assert tensors["w"].tolist() == [[127, 0, 0, 2, -2, 0], [0] * 6]
    assert tensors["w#scale"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("part", "shape", "wanted"),
    [
        ("w", (5, 7), (1, 5, 7)),
        ("w", (4, 3, 2, 2), (1, 4, 12)),
        ("w", (9,), (1, 1, 9)),
        ("w", (), (1, 1, 1)),
        ("w#left", (5, 2), (5, 2, 1)),
        ("w#right", (2, 7), (1, 2, 7)),
    ],
)
def test_rows_and_directions_have_a_scale_each(part, shape, wanted):
    assert dealt(part, shape) == wanted
    assert encoded(part, torch.ones(shape))[part + "#scale"].shape == (wanted[1],)


@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=6))
@settings(deadline=None, max_examples=400)
def test_no_value_is_off_by_more_than_half_its_scale(row):
    values = torch.tensor([row])
    tensors = encoded("w", values)
    off = (decoded("w", tensors).double() - values.double()).abs()
    assert bool((off <= tensors["w#scale"].double() / 2).all())
    assert float(tensors["w#scale"]) <= max(float(values.abs().max()) / 127 * (1 + 2.0**-15), 2.0**-126)


@given(st.lists(st.floats(width=32, min_value=-(2.0**127), max_value=2.0**127), min_size=1, max_size=6))
@settings(deadline=None, max_examples=400)
def test_what_was_read_is_stored_again_as_the_same_values(row):
    once = decoded("w", encoded("w", torch.tensor(row)))
    assert torch.equal(decoded("w", encoded("w", once)), once)


def test_an_integer_times_its_scale_is_exact_in_float32():
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(3000, 4, generator=generator) * 10 ** torch.randn(3000, 1, generator=generator)
    tensors = encoded("w", rows)
    exact = tensors["w"].double() * tensors["w#scale"].double()[:, None]
    assert torch.equal(decoded("w", tensors).double(), exact)
    assert torch.equal(encoded("w", exact.float())["w"], tensors["w"])


def test_left_factors_have_a_scale_per_column():
    left = torch.tensor([[127.0, 1.0], [63.0, -0.25]])
    tensors = encoded("w#left", left)
    assert tensors["w#left#scale"].tolist() == [1.0, pytest.approx(1 / 127, rel=2**-16)]
    assert tensors["w#left"].tolist() == [[127, 127], [63, -32]]


def test_a_file_brings_back_every_layer_within_half_a_scale(tmp_path):
    path = tmp_path / "u.safetensors"
    layers = random_layers()
    vectorfile.save(TaskVector.of({**layers, "low": factors(6, 2, 8)}), path, torch.int8)
    stored, back = load_file(path), vectorfile.load(path)
    assert back.names == (*layers, "low")
    assert {tensor.dtype for part, tensor in stored.items() if "scale" not in part} == {torch.int8}
    for name, values in layers.items():
        largest = float(stored[name + "#scale"].max()) if values.numel() else 0.0
        assert back.shapes[name] == tuple(values.shape)
        assert bool(((back.read(name).to_dense() - values).abs() <= largest / 2).all())
    low = back.read("low")
    assert isinstance(low, LowRank)
    torch.testing.assert_close(low.left_MR, factors(6, 2, 8).left_MR, atol=0.02, rtol=0)


def test_statistics_stay_in_float32(tmp_path):
    fisher = torch.rand(5, 7, generator=torch.Generator().manual_seed(2))
    vector = TaskVector(
        ("w",),
        TaskVector.of({"w": random_layers()["w"]}).read,
        manifest=Manifest(statistics=("fisher",)),
        statistics=Statistics.of({"w": {"fisher": fisher}}),
    )
    path = tmp_path / "u.safetensors"
    vectorfile.save(vector, path, torch.int8)
    assert torch.equal(vectorfile.load(path).statistics("w")["fisher"], fisher)
    assert torch.equal(read_back(vector).statistics("w")["fisher"], fisher)
    assert len(list(scan(path))) == 1


def test_a_layer_that_is_not_finite_is_not_written():
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(NonFinite, match="layer 'w'"):
            vectorfile.to_bytes(TaskVector.of({"w": torch.tensor([1.0, value])}), torch.int8)


def test_a_value_whose_integer_times_scale_overflows_is_not_written():
    with pytest.raises(NonFinite, match="layer 'w'"):
        vectorfile.to_bytes(TaskVector.of({"w": torch.tensor([torch.finfo(torch.float32).max])}), torch.int8)


@pytest.mark.parametrize("block", [8, 64, 2**20])
def test_scan_measures_integers_whatever_the_block(tmp_path, block):
    path = tmp_path / "u.safetensors"
    vectorfile.save(TaskVector.of({**random_layers(), "low": factors(6, 2, 8)}), path, torch.int8)
    found = dict(scan(path, block))
    for name, update in vectorfile.load(path).items():
        assert found[name] == pytest.approx(update.to_dense().double().square().sum().item(), rel=1e-5)


# --- strictness ---

WHOLE = torch.full((2, 3), 5, dtype=torch.int8)
GOOD = {"w": WHOLE, "w#scale": torch.ones(2)}
LOW = {
    "w#left": torch.ones(2, 1, dtype=torch.int8),
    "w#left#scale": torch.ones(1),
    "w#right": torch.ones(1, 3, dtype=torch.int8),
    "w#right#scale": torch.ones(1),
}


def file_of(tensors: dict[str, torch.Tensor], low_rank: bool = False) -> bytes:
    metadata = dict.fromkeys(("base", "task", "site"), "")
    metadata |= {"format": vectorfile.FORMAT, "origin_version": "0", "examples": "1", "unchanged": "[]"}
    metadata |= {"statistics": '["fisher"]', "low_rank": json.dumps({"w": [2, 3]} if low_rank else {})}
    return save(tensors, metadata)


def test_sound_files_of_others_open():
    assert vectorfile.from_bytes(file_of(GOOD)).read("w").to_dense().tolist() == [[5.0] * 3] * 2
    assert vectorfile.from_bytes(file_of(LOW, True)).read("w").to_dense().tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"w": WHOLE}, FileError, "int8 without scales.*wanted w#scale"),
        ({"w": torch.ones(2, 3), "w#scale": torch.ones(2)}, FileError, "not int8"),
        ({"w": torch.ones(2, 3), "v#scale": torch.ones(2)}, FileError, "not int8"),
        ({**GOOD, "#scale": torch.ones(2)}, FileError, "name is empty"),
        ({**GOOD, "w#scale#scale": torch.ones(2)}, FileError, "not int8"),
        ({**GOOD, "w#scale": torch.ones(3)}, ShapeMismatch, r"got \(3,\) float32, wanted \(2,\) float32"),
        ({**GOOD, "w#scale": torch.ones(2, 1)}, ShapeMismatch, "do not fit"),
        ({**GOOD, "w#scale": torch.ones(2).bfloat16()}, DtypeMismatch, "do not fit"),
        ({**GOOD, "w#scale": torch.ones(2, dtype=torch.int8)}, DtypeMismatch, "do not fit"),
        ({**GOOD, "w#fisher": WHOLE + 1}, DtypeMismatch, "cannot be merged"),
        ({**GOOD, "w#fisher": WHOLE + 1, "w#fisher#scale": torch.ones(2)}, DtypeMismatch, "cannot be merged"),
        ({**LOW, "w#left#scale": torch.ones(2)}, ShapeMismatch, "do not fit"),
        ({part: t for part, t in LOW.items() if part != "w#right#scale"}, FileError, "wanted w#right#scale"),
        ({**LOW, "w#scale": torch.ones(2)}, FileError, "not int8"),
    ],
)
def test_scales_that_do_not_belong_are_refused_at_opening(tensors, error, message):
    with pytest.raises(error, match=f"update 7f3a.*{message}"):
        vectorfile.from_bytes(file_of(tensors, "w#left" in tensors), "update 7f3a")


@pytest.mark.parametrize(
    ("value", "error"), [(math.nan, NonFinite), (math.inf, NonFinite), (-1e-9, FileError), (1e38, NonFinite)]
)
@pytest.mark.parametrize("scale", ["w#scale", "w#left#scale", "w#right#scale"])
def test_spoiled_scales_are_refused_when_read_and_when_scanned_in_the_same_words(
    tmp_path, scale, value, error
):
    tensors = {part: tensor.clone() for part, tensor in (GOOD if scale == "w#scale" else LOW).items()}
    tensors[scale][-1] = value
    if scale != "w#scale" and value == 1e38:
        tensors[scale.replace("#scale", "")].fill_(127)
    path = tmp_path / "u.safetensors"
    path.write_bytes(file_of(tensors, scale != "w#scale"))
    with pytest.raises(error) as reading:
        vectorfile.load(path).read("w")
    with pytest.raises(error) as scanning:
        list(scan(path))
    assert reading.value.what == scanning.value.what
    assert reading.value.layer == scanning.value.layer == "w"
