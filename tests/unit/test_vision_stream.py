"""Are pinned image packages and an exported model read as what they are, and is the stream fair?

Everything but the slow test works on archives and a model made here, without a network.
"""

import gzip
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fedmerge.client.loading import load_stream
from fedmerge.client.tasks import StreamOptions
from fedmerge.client.training import fine_tune, score
from fedmerge.common.errors import ConfigError, FileError
from fedmerge.common.layers import matches
from fedmerge.deploy.streams import images as sources
from fedmerge.deploy.streams import vision as stream_module
from fedmerge.deploy.streams.images import SOURCES, Images, Source
from fedmerge.deploy.streams.onnx import read_weights
from fedmerge.deploy.streams.vision import (
    MEAN,
    SCALE,
    SIDE,
    STD,
    TEST_ROWS,
    TRAIN_ROWS,
    PrototypeHead,
    pictures,
    prototypes,
    read_model,
    split,
    vision,
)

# An ONNX file by hand: protobuf's wire format.


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def entry(field: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(field << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(data)) + data


def stored(name: str, tensor: torch.Tensor, kind: int = 1) -> bytes:
    dims = b"".join(entry(1, size) for size in tensor.shape)
    raw = tensor.contiguous().numpy().tobytes()
    return entry(5, dims + entry(2, kind) + entry(8, name) + entry(9, raw))


def product(module: str, weight: str) -> bytes:
    name = f"/{module.replace('.', '/')}/MatMul"
    return entry(1, entry(1, "x") + entry(1, weight) + entry(2, "y") + entry(3, name) + entry(4, "MatMul"))


def onnx_file(path, *parts: bytes):
    path.write_bytes(entry(1, 8) + entry(2, "pytorch") + entry(7, b"".join(parts)))
    return path


def test_linear_weights_get_their_names_and_their_layout_back(tmp_path):
    weight, bias = torch.arange(6.0).view(2, 3), torch.tensor([1.0, 2.0])
    path = onnx_file(
        tmp_path / "m.onnx",
        product("block.0.fc1", "onnx::MatMul_7"),
        stored("block.0.fc1.bias", bias),
        stored("onnx::MatMul_7", weight.T),
        stored("steps", torch.tensor([3]), kind=7),
        entry(1, entry(1, "x") + entry(1, "y") + entry(4, "MatMul")),  # of two activations
    )
    found = read_weights(path)
    assert set(found) == {"block.0.fc1.weight", "block.0.fc1.bias"}
    assert torch.equal(found["block.0.fc1.weight"], weight)
    assert torch.equal(found["block.0.fc1.bias"], bias)


def test_what_is_no_onnx_file_is_refused(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"\xff not a model")
    with pytest.raises(FileError, match=r"m.onnx: not an ONNX file"):
        read_weights(tmp_path / "m.onnx")


def test_tensor_with_too_few_bytes_is_refused(tmp_path):
    lies = entry(5, entry(1, 2) + entry(1, 3) + entry(2, 1) + entry(8, "w") + entry(9, b"1234"))
    with pytest.raises(FileError, match=r"layer 'w': .* got 4 bytes, wanted \(2, 3\) float32"):
        read_weights(onnx_file(tmp_path / "m.onnx", lies))


CHECKPOINT_NAMES = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}


def checkpoint_name(name: str) -> str:
    """As DINOv2's checkpoint names it, whatever the installed transformers calls it."""
    name = re.sub(r"attention\.([qkv]_proj)", lambda found: f"attention.{CHECKPOINT_NAMES[found[1]]}", name)
    return name.replace("attention.o_proj", "attention.output.dense")


def exported(model: nn.Module, path):
    """The file that PyTorch's exporter writes for the model, as far as it is read."""
    parts = []
    for number, (name, tensor) in enumerate(model.state_dict().items()):
        name = f"backbone.{checkpoint_name(name)}"
        module = name.removesuffix(".weight")
        if name.endswith("position_embeddings"):
            parts.append(stored("onnx::Concat_1957", tensor[:, :1]))
            parts.append(stored("onnx::Reshape_1962", tensor[:, 1:]))
        elif tensor.ndim == 2 and module != name:
            parts.append(product(module, f"onnx::MatMul_{number}"))
            parts.append(stored(f"onnx::MatMul_{number}", tensor.T))
        elif not name.endswith("mask_token"):
            parts.append(stored(name, tensor))
    return onnx_file(path, *parts, stored("decoder.final_conv.bias", torch.zeros(1)))


@pytest.fixture(scope="module")
def tiny():
    """A vision transformer of two blocks, all its weights random."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=8, num_attention_heads=2, num_hidden_layers=2, image_size=56, layerscale_value=1.0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Dinov2Model(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


def test_exported_model_computes_what_the_model_computes(tiny, tmp_path):
    read = read_model(exported(tiny, tmp_path / "m.onnx"), tiny.config)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(read(pixels).pooler_output, tiny(pixels).pooler_output)


# Images out of packages.


def test_table_of_pixels_becomes_bytes_and_classes(tmp_path):
    with gzip.open(tmp_path / "t.csv.gz", "wt") as lines:
        lines.write("0,4,8,16,3\n16,0,0,0,1\n")
    images = sources.read_table(tmp_path, "t.csv.gz", side=2, brightest=16)
    assert images.pixels.tolist() == [[[[0, 64], [128, 255]]], [[[255, 0], [0, 0]]]]
    assert images.labels_N.tolist() == [3, 1]
    assert (images.pixels.dtype, images.classes) == (torch.uint8, 4)


@pytest.fixture
def clothes(tmp_path, monkeypatch):
    """Five garments of each class and an empty entry, two used by a task; the first pixel numbers them."""
    monkeypatch.setattr(sources, "CLOTHES_PER_CLASS", 2)
    folder = tmp_path / "package" / "src" / "clothes"
    folder.mkdir(parents=True)
    for label in range(10):
        rows = [[10 * label + number, *[0] * 783] for number in range(1, 6)]
        (folder / f"{label}.json").write_text(json.dumps({"data": [*rows[:2], [], *rows[2:]]}))
    return tmp_path


def test_clothes_are_the_first_of_each_class(clothes):
    images = sources.read_clothes(clothes)
    assert images.pixels.shape == (20, 1, 28, 28)
    assert images.labels_N.tolist() == [label for label in range(10) for _ in range(2)]
    assert images.pixels[:4, 0, 0, 0].tolist() == [1, 2, 11, 12]


def test_turned_clothes_are_others_turned_by_their_class(clothes):
    images = sources.read_turned(clothes)
    assert images.labels_N.tolist() == [0, 1, 2, 3] * 5
    corners = [(0, 0), (27, 0), (27, 27), (0, 27)]  # counter-clockwise
    found = [int(images.pixels[i, 0, row, column]) for i, (row, column) in enumerate(corners)]
    assert found == [3, 4, 13, 14]


def test_drawings_are_read_line_by_line(tmp_path):
    folder = tmp_path / "package" / "src" / "drawings"
    folder.mkdir(parents=True)
    for thing, values in (("cup", [0.5, 1]), ("ice cream", [0.25])):
        with gzip.open(folder / f"{thing}.ndjson.gz", "wt") as lines:
            lines.writelines(json.dumps([value] * 784) + "\n" for value in values)
    images = sources.read_drawings(tmp_path, ("ice cream", "cup"))
    assert images.labels_N.tolist() == [0, 1, 1]
    assert images.pixels[:, 0, 0, 0].tolist() == [64, 128, 255]


def test_photos_are_read_line_by_line(tmp_path):
    pixels = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    pixels[:, 0, 0, 0] = np.arange(4)
    pixels[:, 0, 1, 2] = 255
    (tmp_path / "package").mkdir()
    Image.fromarray(pixels.reshape(4, 1024, 3)).save(tmp_path / "package" / "test_batch.png")
    (tmp_path / "package" / "test_lables.json").write_text("[9, 0, 1, 2]")
    images = sources.read_photos(tmp_path)
    assert images.pixels.shape == (4, 3, 32, 32)
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert images.pixels[:, :, 0, 1].tolist() == [[0, 0, 255]] * 4
    assert images.labels_N.tolist() == [9, 0, 1, 2]


# The stream's own parts.


def synthetic(count: int = 600, classes: int = 4) -> Images:
    """Images that repeat after 500, of which no two others agree."""
    numbers = torch.arange(count) % 500
    pixels = torch.stack([numbers % 251, numbers // 251 * 40], dim=1).byte().view(count, 1, 1, 2)
    return Images(pixels, numbers % classes)


def test_split_shares_no_pixels_and_draws_classes_in_turn():
    images = synthetic()
    train, test = split(images, seed=0, train_rows=60, test_rows=120)
    assert (len(train), len(test)) == (60, 120)
    seen = [images.pixels[row].flatten().tolist() for row in train + test]
    assert len({tuple(pixels) for pixels in seen}) == 180
    for rows in (train, test):
        counts = torch.bincount(images.labels_N[rows], minlength=4)
        assert counts.max() - counts.min() <= 3
    assert split(images, 0, 60, 120) == (train, test)
    assert split(images, 0, 10, 120) == (train[:10], test)
    assert split(images, 1, 60, 120)[1] != test
    assert len(split(images, 0, 10_000, 120)[0]) == 500 - 120


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_have_three_normalised_channels_of_the_models_size(channels):
    images = Images(torch.full((3, channels, 8, 8), 255, dtype=torch.uint8), torch.tensor([5, 6, 7]))
    pixels, labels = pictures(images, [2, 0]).tensors
    assert labels.tolist() == [7, 5]
    assert pixels.shape == (2, 3, SIDE, SIDE)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(pixels, white.view(1, 3, 1, 1).expand(2, 3, SIDE, SIDE))


class Seen(nn.Module):
    """A stand-in for the model: its feature is what it is shown."""

    def forward(self, pixels):
        from types import SimpleNamespace

        return SimpleNamespace(pooler_output=pixels)


def test_prototypes_are_mean_directions_and_an_absent_class_scores_nothing():
    shown = torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 1.0]])
    found = prototypes(Seen(), (shown, torch.tensor([0, 0, 1])), classes=3)
    half = 0.5**0.5
    torch.testing.assert_close(found, torch.tensor([[half, half], [0.0, 1.0], [0.0, 0.0]]))


def test_head_scores_cosines_whatever_the_length_of_the_features():
    head = PrototypeHead(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    batch = [torch.tensor([[5.0, 0.0], [0.0, 0.1]]), torch.tensor([0, 0])]
    scores = head.scores(Seen(), batch)
    torch.testing.assert_close(scores, SCALE * torch.tensor([[1.0, 0.6], [0.0, 0.8]]))
    assert head.metric(Seen(), batch).tolist() == [1.0, 0.0]
    torch.testing.assert_close(head.loss(Seen(), batch), nn.functional.cross_entropy(scores, batch[1]))


@pytest.fixture
def small(monkeypatch, tiny):
    """The stream over the tiny model and two synthetic tasks."""
    monkeypatch.setattr(stream_module, "_base", lambda: tiny)
    monkeypatch.setattr(stream_module, "images_of", lambda name: synthetic())
    monkeypatch.setattr(stream_module, "SOURCES", dict.fromkeys(("one", "two"), Source(None, None)))
    stream_module.load_task.cache_clear()
    yield vision
    stream_module.load_task.cache_clear()


def test_vision_is_built_in_and_needs_no_network_to_be_named():
    stream = load_stream("vision", StreamOptions())
    assert (stream.name, stream.tasks) == ("vision", tuple(SOURCES))


@pytest.mark.parametrize("rows", [0, -1])
def test_vision_without_training_rows_is_refused(rows):
    with pytest.raises(ConfigError, match="rows out of range"):
        vision(StreamOptions(rows=rows))


def test_stream_obeys_its_options(small):
    stream = small(StreamOptions(seed=3, rows=40))
    task = stream.load("one")
    assert (len(task.train), len(task.test), len(task.labels)) == (40, TEST_ROWS, 40)
    assert stream.load("one") is task
    assert task.labels == task.train.tensors[1].tolist()
    other = small(StreamOptions(seed=4, rows=40)).load("one")
    assert not torch.equal(other.train.tensors[0], task.train.tensors[0])
    with pytest.raises(ConfigError, match="unknown task: got 'onee', wanted one, two"):
        stream.load("onee")


def test_every_weight_is_trained_but_those_that_make_tokens(small):
    stream = small(StreamOptions(rows=40))
    model = stream.build_model()
    fine_tune(model, stream.load("one"), replace(stream.training, steps=2, batch_size=8), seed=0)
    fresh = stream.build_model().state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved == {name for name in fresh if not name.startswith("embeddings.")}
    assert {name for name in fresh if not matches(name, stream.training.frozen)} == moved


FROM_ONNXRUNTIME = (
    [0.564248263835907, -0.046836547553539276, 1.8550039529800415, -4.066585063934326],
    [0.9552228450775146, -0.7357156872749329, 0.706247866153717, -4.050684928894043],
)
"""First four features of tokens 0 and 200, by onnxruntime on the same file."""


@pytest.mark.slow
def test_vision_delivers_what_it_promises():
    """Fetches about 290 MB when the cache is cold."""
    stream = vision(StreamOptions())
    stream.prepare()
    model = stream.build_model()
    waves = torch.arange(3 * 224 * 224, dtype=torch.float64).sin().float().view(1, 3, 224, 224)
    with torch.no_grad():
        features = model(waves).last_hidden_state[0, [0, 200], :4]
    torch.testing.assert_close(features, torch.tensor(FROM_ONNXRUNTIME), atol=1e-4, rtol=1e-4)
    for name in stream.tasks:
        task, classes = stream.load(name), sources.images_of(name).classes
        held = 1000 - TEST_ROWS if name in ("animals", "things") else TRAIN_ROWS
        assert (len(task.train), len(task.test)) == (held, TEST_ROWS)
        assert set(task.test.tensors[1].tolist()) == set(range(classes))
        assert score(model, task).accuracy > 1.2 / classes
