"""Are whole image sets read as they were published, once, and shown to models as they should be?

Everything works on packages made here, without a network.
"""

import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fedmerge.common.errors import UnsafeFile
from fedmerge.deploy.streams import imagesets
from fedmerge.deploy.streams.images import Images
from fedmerge.deploy.streams.imagesets import SOURCES, image_set, prepare


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no set in memory."""
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path))
    image_set.cache_clear()
    yield tmp_path
    image_set.cache_clear()


def unpacked(cache, name):
    """The folder in which a set's package lies unpacked."""
    folder = cache / SOURCES[name].package.folder / "package"
    folder.mkdir(parents=True)
    return folder


def write_numerals(cache, train=(5, 0, 4), test=(7, 2)):
    """IDX files; every pixel of an image is its number, from 1."""
    data = unpacked(cache, "mnist") / "data"
    data.mkdir()
    for part, labels in (("train", train), ("t10k", test)):
        (data / f"{part}-labels-idx1-ubyte").write_bytes(b"\x00" * 8 + bytes(labels))
        pixels = b"".join(bytes([number + 1]) * 784 for number in range(len(labels)))
        (data / f"{part}-images-idx3-ubyte").write_bytes(b"\xff" * 16 + pixels)


def first_pixels(images: Images) -> list[int]:
    return images.pixels[:, 0, 0, 0].tolist()


def test_numerals_are_read_without_the_headers(cache):
    write_numerals(cache)
    images = image_set("mnist")
    assert images.train.pixels.shape == (3, 1, 28, 28)
    assert (first_pixels(images.train), images.train.labels_N.tolist()) == ([1, 2, 3], [5, 0, 4])
    assert (first_pixels(images.test), images.test.labels_N.tolist()) == ([1, 2], [7, 2])
    assert (images.train.pixels.dtype, images.train.labels_N.dtype) == (torch.uint8, torch.int64)


def test_first_garments_of_each_class_are_for_testing(cache, monkeypatch):
    monkeypatch.setattr(imagesets, "GARMENTS_TESTED", 2)
    folder = unpacked(cache, "fashion") / "src" / "clothes"
    folder.mkdir(parents=True)
    for label in range(10):
        rows = [[10 * label + number, *[0] * 783] for number in range(5)]
        (folder / f"{label}.json").write_text(json.dumps({"data": [rows[0], [], *rows[1:]]}))
    images = image_set("fashion")
    assert first_pixels(images.test)[:4] == [0, 1, 10, 11]
    assert first_pixels(images.train)[:4] == [2, 3, 4, 12]
    assert images.test.labels_N.tolist() == [label for label in range(10) for _ in range(2)]
    assert images.train.labels_N.tolist() == [label for label in range(10) for _ in range(3)]


def test_photos_are_read_from_all_batches_in_order(cache):
    folder = unpacked(cache, "cifar")
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        pixels = np.full((2, 1024, 3), 10 * number, dtype=np.uint8)
        pixels[1] += 1
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "train_lables.json").write_text(json.dumps(list(range(10))))
    (folder / "test_lables.json").write_text("[8, 9]")
    images = image_set("cifar")
    assert images.train.pixels.shape == (10, 3, 32, 32)
    assert first_pixels(images.train) == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    assert images.train.labels_N.tolist() == list(range(10))
    assert (first_pixels(images.test), images.test.labels_N.tolist()) == ([50, 51], [8, 9])


def test_set_is_read_once_and_then_mapped(cache, monkeypatch):
    write_numerals(cache)
    prepare("mnist")
    first = image_set("mnist")
    image_set.cache_clear()

    def read(folder):
        raise AssertionError("read again")

    monkeypatch.setattr(imagesets, "SOURCES", {"mnist": replace(SOURCES["mnist"], read=read)})
    again = image_set("mnist")
    assert torch.equal(again.train.pixels, first.train.pixels)
    assert torch.equal(again.test.labels_N, first.test.labels_N)
    assert again is image_set("mnist")


def test_set_that_cannot_be_read_leaves_nothing_decoded(cache):
    unpacked(cache, "mnist")
    with pytest.raises(FileNotFoundError):
        image_set("mnist")
    assert [path.name for path in cache.iterdir()] == [SOURCES["mnist"].package.folder]


def test_decoded_set_may_be_read_by_whoever_may_read_the_cache(cache):
    write_numerals(cache)
    image_set("mnist")
    (decoded,) = cache.glob("*.safetensors")
    os.umask(mask := os.umask(0))
    assert stat.S_IMODE(decoded.stat().st_mode) == 0o666 & ~mask


def test_damaged_decoded_set_is_refused_by_name(cache):
    write_numerals(cache)
    image_set("mnist")
    image_set.cache_clear()
    (decoded,) = cache.glob("*.safetensors")
    decoded.write_bytes(decoded.read_bytes()[:-1])
    with pytest.raises(UnsafeFile, match=decoded.name):
        image_set("mnist")


def test_every_channel_is_normalised_by_its_own_mean_and_deviation():
    source = replace(SOURCES["cifar"], mean=(0.0, 0.5, 1.0), std=(1.0, 0.25, 0.5))
    pixels = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 3, 1, 1)
    assert source.normalised(pixels).flatten().tolist() == pytest.approx([0.0, 2.0, -1.6])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_sets_are_whole_and_their_channels_normalised(name):
    """Fetches up to 139 MB when the cache is cold."""
    prepare(name)
    images = image_set(name)
    train = 50_000 if name == "cifar" else 60_000
    assert (len(images.train.pixels), len(images.test.pixels)) == (train, 10_000)
    assert images.train.classes == images.test.classes == 10
    shown = SOURCES[name].normalised(images.train.pixels)
    assert shown.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    assert (shown.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3
