"""Do statistics come through a task vector file as they were measured, and are lies about them found out?"""

import json
from dataclasses import replace
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file, save

from fedmerge.common import statistics, vectorfile
from fedmerge.common.base import Base
from fedmerge.common.errors import BadStatistic, DtypeMismatch, FileError, NonFinite, ShapeMismatch
from fedmerge.common.scan import scan
from fedmerge.common.sources import check_vector
from fedmerge.common.statistics import Statistic, Statistics, check_shape, check_values, statistics_of
from fedmerge.common.taskvector import LowRank, Manifest, TaskVector

ALL = tuple(Statistic)
FITTING = {Statistic.SKETCH: (3, 2), Statistic.RESIDUAL: (1,)}
"""Shapes for a layer of (2, 3), where it is not the layer's own."""
SHAPES = {"q": (3, 4), "k": (3, 4), "v": (5, 4), "norm": (4,), "embed": (6, 2), "conv": (3, 2, 2, 2)}


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured() -> dict[str, dict[str, torch.Tensor]]:
    """Of every layer what it may have; q, k and v share one Gram, and q and conv have sketches."""
    shared = drawn(1, 2, 4)
    found = {
        name: {
            "fisher": drawn(2 + i, *shape).square(),
            "second_moment": drawn(9 + i, *shape).square() * 1e-6,
        }
        for i, (name, shape) in enumerate(SHAPES.items())
    }
    for name in ("q", "k", "v"):
        found[name]["input_gram"] = shared
    found["norm"]["input_gram"] = drawn(20, 4).square()
    found["conv"]["input_gram"] = drawn(21, 8, 8)
    for name, columns, width in (("q", 4, 4), ("conv", 8, 12)):
        found[name] |= {"sketch": drawn(22, columns, width), "residual": torch.tensor([0.25])}
    return found


def vector(held=None, listed=ALL, names=tuple(SHAPES)) -> TaskVector:
    layers = {name: drawn(30 + i, *SHAPES[name]) for i, name in enumerate(names)}
    if "k" in layers:
        layers["k"] = LowRank(drawn(40, 3, 1), drawn(41, 1, 4), (3, 4))
    manifest = Manifest(task="t", statistics=tuple(map(str, listed)))
    held = measured() if held is None else held
    return replace(TaskVector.of(layers, (), manifest), statistics=lambda name: held.get(name, {}))


def assert_same(one, other, dtype=torch.float32) -> None:
    for name in SHAPES:
        mine, theirs = one(name), other(name)
        assert set(mine) == set(theirs)
        for statistic, values in mine.items():
            assert values.dtype is torch.float32
            assert torch.equal(values, theirs[statistic].to(dtype).float())


# --- files ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_brings_back_the_statistics_of_every_layer(tmp_path, dtype):
    path = tmp_path / "u.safetensors"
    vectorfile.save(vector(), path, dtype)
    back = vectorfile.load(path)
    assert back.names == vector().names
    assert back.manifest.statistics == ("input_gram", "fisher", "second_moment", "sketch", "residual")
    assert_same(back.statistics, vector().statistics, dtype)


def test_a_gram_that_layers_share_is_written_once_and_told_by_name(tmp_path):
    path = tmp_path / "u.safetensors"
    vectorfile.save(vector(), path)
    parts = [part for part in load_file(path) if part.endswith("#input_gram")]
    assert sorted(parts) == ["conv#input_gram", "norm#input_gram", "q#input_gram"]
    assert statistics_of(vectorfile.load(path)).shared_input == {"k": "q", "v": "q"}


def test_equal_grams_in_two_tensors_are_not_taken_for_one():
    held = measured()
    held["k"]["input_gram"] = held["q"]["input_gram"].clone()
    assert statistics_of(vector(held)).shared_input == {"v": "q"}


def test_a_square_factor_and_its_transpose_on_one_memory_are_two_grams():
    factor = drawn(1, 4, 4)
    held = {"q": {"input_gram": factor}, "k": {"input_gram": factor.T}, "v": {"input_gram": factor}}
    back = vectorfile.from_bytes(vectorfile.to_bytes(vector(held)))
    assert statistics_of(back).shared_input == {"v": "q"}
    assert torch.equal(back.statistics("k")["input_gram"], factor.T)


def test_the_layer_that_holds_a_shared_gram_may_be_left_out():
    found = Statistics.of(measured())
    assert found.shared_input["v"] == "q"
    part = replace(vector(names=("k", "v")), statistics=found)
    back = vectorfile.from_bytes(vectorfile.to_bytes(part))
    assert statistics_of(back).shared_input == {"v": "k"}
    assert torch.equal(back.statistics("v")["input_gram"], measured()["q"]["input_gram"])


def test_writing_again_what_was_read_gives_the_same_bytes():
    data = vectorfile.to_bytes(vector())
    assert vectorfile.to_bytes(vectorfile.from_bytes(data)) == data
    assert vectorfile.to_bytes(vectorfile.from_bytes(data).in_memory()) == data


def test_in_memory_a_shared_gram_is_one_tensor():
    held = vectorfile.from_bytes(vectorfile.to_bytes(vector())).in_memory()
    assert_same(held.statistics, vector().statistics)
    assert held.statistics("q")["input_gram"] is held.statistics("v")["input_gram"]


def test_a_file_without_statistics_has_the_bytes_it_had_before_there_were_any():
    layers = {"w": torch.ones(1, 2), "l": LowRank(torch.ones(2, 1), torch.ones(1, 3), (2, 3))}
    plain = TaskVector.of(layers, ["e"], Manifest(task="t", statistics=("gram", "fisher")))
    data = vectorfile.to_bytes(plain)
    assert sha256(data).hexdigest() == "5126daf8baeead30441a8ad4796aa43b780d830764092d74c9f8af5ae4566006"
    assert statistics_of(vectorfile.from_bytes(data)).shapes == {}


def test_opening_reads_no_statistics_and_asking_reads_only_one_layers(tmp_path, monkeypatch):
    vectorfile.save(vector(), tmp_path / "u.safetensors")
    reads = []
    real = vectorfile.tensor_reader
    monkeypatch.setattr(
        vectorfile, "tensor_reader", lambda path: lambda name: reads.append(name) or real(path)(name)
    )
    held = vectorfile.load(tmp_path / "u.safetensors")
    assert statistics_of(held).shapes["k"]["input_gram"] == (2, 4)
    assert reads == []
    held.statistics("k")
    assert sorted(reads) == ["k#fisher", "k#second_moment", "q#input_gram"]


def test_a_layer_that_is_not_known_has_no_statistics():
    assert vectorfile.from_bytes(vectorfile.to_bytes(vector())).statistics("other") == {}


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_payload_counts_a_shared_gram_once_and_the_dtype_of_the_file(dtype, size):
    squares = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    values = squares + 2 * 4 + 4 + 8 * 8 + 4 * 4 + 1 + 8 * 12 + 1
    assert statistics_of(vector()).payload_bytes == 4 * values
    back = vectorfile.from_bytes(vectorfile.to_bytes(vector(), dtype))
    assert statistics_of(back).payload_bytes == size * values


# --- what is not written ---


def test_a_statistic_that_the_manifest_does_not_list_is_not_written():
    with pytest.raises(FileError, match=r"layer 'q': .* got fisher, wanted input_gram"):
        vectorfile.to_bytes(vector(listed=["input_gram"]))


def test_a_statistic_that_no_reader_knows_is_not_written():
    with pytest.raises(FileError, match="got hessian"):
        vectorfile.to_bytes(vector({"q": {"hessian": torch.ones(1)}}, listed=["hessian"]))


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"fisher": -torch.ones(3, 4)}, BadStatistic),
        ({"fisher": torch.ones(4, 3)}, ShapeMismatch),
        ({"input_gram": torch.full((1, 4), float("nan"))}, NonFinite),
    ],
)
def test_what_a_reader_refuses_is_not_written(changed, error):
    with pytest.raises(error, match="layer 'q'"):
        vectorfile.to_bytes(vector({"q": changed}))


# --- what is not read ---


def file_of(parts, listed=ALL, **metadata):
    """A file of one (2, 3) and one (3,) layer with these parts; safetensors alone writes it."""
    told = {
        "format": vectorfile.FORMAT,
        "base": "",
        "origin_version": "0",
        "task": "",
        "site": "",
        "examples": "1",
        "statistics": json.dumps(list(listed)),
        "unchanged": '["still"]',
        "low_rank": "{}",
        **metadata,
    }
    return save({"w": torch.ones(2, 3), "b": torch.ones(3), "z": torch.ones(2, 3), **parts}, told)


@pytest.mark.parametrize(
    ("parts", "error", "layer"),
    [
        ({"still#fisher": torch.ones(2)}, FileError, "still"),
        ({"other#fisher": torch.ones(2)}, FileError, "other"),
        ({"w#hessian": torch.ones(2)}, FileError, "w#hessian"),
        ({"w#sketch": torch.ones(2, 3)}, ShapeMismatch, "w"),
        ({"w#sketch": torch.ones(3)}, ShapeMismatch, "w"),
        ({"w#sketch": torch.ones(3, 0)}, ShapeMismatch, "w"),
        ({"w#sketch": torch.ones(3, 25)}, ShapeMismatch, "w"),
        ({"w#residual": torch.ones(2)}, ShapeMismatch, "w"),
        ({"w#residual": torch.tensor(0.5)}, ShapeMismatch, "w"),
        ({"w#fisher": torch.ones(3, 2)}, ShapeMismatch, "w"),
        ({"w#fisher": torch.ones(6)}, ShapeMismatch, "w"),
        ({"b#second_moment": torch.ones(1)}, ShapeMismatch, "b"),
        ({"w#input_gram": torch.ones(4, 3)}, ShapeMismatch, "w"),
        ({"w#input_gram": torch.ones(2, 2)}, ShapeMismatch, "w"),
        ({"w#input_gram": torch.ones(0, 3)}, ShapeMismatch, "w"),
        ({"w#input_gram": torch.ones(1, 1, 3)}, ShapeMismatch, "w"),
        ({"w#input_gram": torch.ones(3)}, ShapeMismatch, "w"),
        ({"b#input_gram": torch.ones(2)}, ShapeMismatch, "b"),
        ({"w#fisher": torch.ones(2, 3).int()}, DtypeMismatch, "w"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_at_opening(parts, error, layer):
    with pytest.raises(error) as caught:
        vectorfile.from_bytes(file_of(parts), "update 7f3a")
    assert (caught.value.layer, caught.value.where) == (layer, "update 7f3a")


@pytest.mark.parametrize("name", ALL)
def test_a_statistic_that_is_not_listed_is_refused(name):
    others = [other for other in ALL if other != name]
    parts = {f"w#{name}": torch.ones(FITTING.get(name, (2, 3)))}
    assert vectorfile.from_bytes(file_of(parts)).statistics("w")
    with pytest.raises(FileError, match=f"layer 'w': .* got {name}"):
        vectorfile.from_bytes(file_of(parts, others))


def test_a_listed_statistic_need_not_be_of_every_layer_and_unknown_names_pass():
    held = vectorfile.from_bytes(file_of({}, ["fisher", "of a later version"]))
    assert held.statistics("w") == {}


@pytest.mark.parametrize(
    "shared",
    [
        '{"z": "b"}',
        '{"z": "nowhere"}',
        '{"w": "w"}',
        '{"nowhere": "w"}',
        '{"still": "w"}',
        '{"z": "w", "b": "z"}',
        '{"z": ["w"]}',
        '{"z": "w", "z": "w"}',
        '["z"]',
        "nonsense",
    ],
)
def test_a_shared_gram_that_is_not_there_is_refused(shared):
    parts = {"w#input_gram": torch.ones(2, 3)}
    assert vectorfile.from_bytes(file_of(parts, shared_input='{"z": "w"}')).statistics("z")
    with pytest.raises(FileError):
        vectorfile.from_bytes(file_of(parts, shared_input=shared))


def test_the_layer_that_holds_a_shared_gram_may_come_last(tmp_path):
    path = tmp_path / "u.safetensors"
    path.write_bytes(file_of({"z#input_gram": drawn(1, 2, 3)}, shared_input='{"w": "z"}'))
    held = vectorfile.load(path)
    assert held.names.index("w") < held.names.index("z")
    assert len(list(scan(path))) == 3
    again = vectorfile.from_bytes(vectorfile.to_bytes(held))
    assert statistics_of(again).shared_input == {"z": "w"}
    assert torch.equal(again.statistics("w")["input_gram"], drawn(1, 2, 3))


def test_a_shared_gram_of_another_width_is_refused():
    with pytest.raises(ShapeMismatch, match="layer 'b'"):
        vectorfile.from_bytes(file_of({"w#input_gram": torch.ones(2, 3)}, shared_input='{"b": "w"}'))


NAN, INF = float("nan"), float("inf")

LIES = [
    *((name, value, NonFinite) for name in ALL for value in (NAN, INF, -INF)),
    ("input_gram", 1e30, BadStatistic),
    ("sketch", 1e30, BadStatistic),
    ("residual", 1.001, BadStatistic),
    ("residual", -1e-20, BadStatistic),
    ("fisher", 1e30, BadStatistic),
    ("fisher", -1e-20, BadStatistic),
    ("second_moment", -1.0, BadStatistic),
]


@pytest.mark.parametrize(("name", "value", "error"), LIES)
@pytest.mark.parametrize("place", [0, -1])
def test_values_that_no_data_give_are_refused_by_reading_and_by_scanning(tmp_path, name, value, error, place):
    spoiled = torch.ones(FITTING.get(name, (2, 3)))
    spoiled.view(-1)[place] = value
    path = tmp_path / "u.safetensors"
    path.write_bytes(file_of({f"w#{name}": spoiled, "b#fisher": torch.ones(3)}))
    with pytest.raises(error, match="layer 'w'") as reading:
        vectorfile.load(path).statistics("w")
    with pytest.raises(error) as scanning:
        list(scan(path, 8))
    assert str(scanning.value) == str(reading.value)
    assert vectorfile.load(path).statistics("b")


def test_a_sketch_may_be_negative_and_a_residual_is_a_ratio(tmp_path):
    path = tmp_path / "u.safetensors"
    for ratio in (0.0, 1.0):
        path.write_bytes(file_of({"w#sketch": -torch.ones(3, 24), "w#residual": torch.tensor([ratio])}))
        assert vectorfile.load(path).statistics("w")["sketch"].sum() == -72
        assert len(list(scan(path, 8))) == 3


def test_a_factor_may_be_negative_and_mean_squares_of_an_input_may_not(tmp_path):
    path = tmp_path / "u.safetensors"
    path.write_bytes(file_of({"w#input_gram": -torch.ones(1, 3)}))
    assert vectorfile.load(path).statistics("w")["input_gram"].sum() == -3
    assert len(list(scan(path))) == 3
    with pytest.raises(BadStatistic, match="negative"):
        vectorfile.from_bytes(file_of({"b#input_gram": -torch.ones(3)})).statistics("b")


def test_the_largest_statistic_is_taken_and_nothing_above_it():
    for name, shape, value in (("fisher", (2,), statistics.MOST / 2), ("input_gram", (1, 1), 2.0**30)):
        check_values(name, shape, [torch.full(shape, value)], where="a", layer="w")
        with pytest.raises(BadStatistic, match="too large"):
            check_values(name, shape, [torch.full(shape, value * 1.01)], where="a", layer="w")


# --- against the base ---

BASE = Base.from_checkpoint({name: torch.ones(shape) for name, shape in SHAPES.items()})


def test_statistics_in_the_form_of_their_layers_kind_fit_the_base():
    check_vector(vector(), BASE)
    check_vector(vectorfile.from_bytes(vectorfile.to_bytes(vector())), BASE)


@pytest.mark.parametrize(
    ("layer", "shape"), [("q", (12,)), ("embed", (2, 2)), ("norm", (1, 1)), ("conv", (24,)), ("q", (5, 4))]
)
def test_an_input_gram_in_the_form_of_another_kind_is_refused(layer, shape):
    held = {layer: {"input_gram": torch.ones(shape)}}
    with pytest.raises(ShapeMismatch, match=f"layer '{layer}': input_gram"):
        check_vector(vector(held), BASE)


@pytest.mark.parametrize(("name", "shape"), [("sketch", (2, 2)), ("residual", (1,))])
def test_only_matrix_layers_have_sketches(name, shape):
    with pytest.raises(ShapeMismatch, match=f"layer 'embed': {name}"):
        check_vector(vector({"embed": {name: torch.ones(shape)}}), BASE)


def test_a_vector_in_memory_is_held_to_its_list_too():
    with pytest.raises(FileError, match="does not list"):
        check_vector(vector(listed=["fisher"]), BASE)


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (4, 3, 2, 2)])
def test_squares_have_the_layers_shape_whatever_it_is(shape):
    check_shape("fisher", shape, shape, where="a", layer="w")
    with pytest.raises(ShapeMismatch):
        check_shape("fisher", (*shape, 1), shape, where="a", layer="w")
