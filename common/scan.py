"""The values of a task vector file, checked and measured in one pass, one block in memory at a time.

Legend of shape suffixes: M out rows, N in columns, R rank, B rows of a block.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import isfinite, prod
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from fedmerge.common.errors import FileError, NonFinite, ShapeMismatch, UnsafeFile
from fedmerge.common.header import Header, read_header
from fedmerge.common.int8 import check_scales, dealt
from fedmerge.common.parts import LEFT, RIGHT, SCALE
from fedmerge.common.statisticparts import statistic_in
from fedmerge.common.statistics import check_values
from fedmerge.common.taskvector import LowRank, require_mergeable
from fedmerge.common.vectorfile import load

BLOCK_BYTES = 2**20
GRAM_RANK = 1024
"""Two Gram matrices of this rank take 16 MiB, whatever the layer."""


def scan(path: Path | str, max_block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[str, float]]:
    """``||D||_F^2`` of every stored layer in float64, in one pass over the payload.

    What :func:`~fedmerge.common.vectorfile.load` and reading every layer and its statistics would find out,
    without a layer in memory: one block of the payload at a time, and both factors of a low-rank layer.

    Args:
        max_block_bytes: at least 8.

    Yields:
        name and squared norm of each layer, in the order of the payload.

    Raises:
        ShapeMismatch: a low-rank layer of a rank that :func:`check_rank` refuses.
        NonFinite: a layer with NaN or infinities in float32, or factors whose product may overflow it.
        BadStatistic: a statistic that no data can give.
        FileError: and the errors of opening, for a file that is not one or changes meanwhile.
    """
    path = Path(path)
    vector, header = load(path), read_header(path)
    label = str(path)
    with _BlockReader(path, header, max_block_bytes) as reader:
        for name, shape in vector.shapes.items():
            if name in header.layout:
                square = _dense_square(reader, name, label)
            else:
                check_rank(header.layout[name + LEFT][0][1], shape, where=label, layer=name)
                square = _low_rank_square(reader, name, shape, label)
            yield name, square
        for part, (shape, _) in header.layout.items():
            if statistic := statistic_in(part):
                layer = part.partition("#")[0]
                check_values(statistic, shape, reader.blocks(part), where=label, layer=layer)


def check_rank(rank: int, shape: tuple[int, ...], *, where: str, layer: str) -> None:
    """Refuses a rank whose Gram matrices would outgrow the layer: above its smaller side and above 1024.

    A file of a few megabytes may otherwise ask for terabytes.

    Raises:
        ShapeMismatch: naming the layer, got rank and wanted rank.
    """
    most = max(GRAM_RANK, min(shape[0], prod(shape[1:])))
    if rank > most:
        raise ShapeMismatch(
            "factors of a higher rank than the layer can have",
            where=where,
            layer=layer,
            got=f"rank {rank}",
            wanted=f"at most {most}",
        )


class _BlockReader:
    """Reads tensors of a file block by block through one buffer; nothing is mapped.

    Args:
        max_block_bytes: size of the buffer. A block is valid until the next one is read.
    """

    def __init__(self, path: Path, header: Header, max_block_bytes: int) -> None:
        self._path, self._header = path, header
        self._buffer = bytearray(max_block_bytes // 8 * 8)

    def __enter__(self) -> Self:
        try:
            self._file = self._path.open("rb", buffering=0)
        except OSError as error:
            raise FileError("cannot be read", where=self._path, got=error.strerror) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def blocks(self, part: str) -> Iterator[Tensor]:
        """The values of a tensor in float32, flat, in order.

        Raises:
            FileError: scales that :func:`check_scales` refuses.
        """
        dtype = self._header.layout[part][1]
        if dtype is torch.int8:
            yield from self._scaled(part)
        else:
            yield from (block.float() for block in self._stored(part, dtype))

    def _scaled(self, part: str) -> Iterator[Tensor]:
        scales_S = self.whole(part + SCALE)
        check_scales(scales_S, part, str(self._path))
        _, scales, inner = dealt(part, self._header.layout[part][0])
        start = 0
        for integers in self._stored(part, torch.int8):
            places = torch.arange(start, start + len(integers))
            yield integers.float() * scales_S[places // inner % scales]
            start += len(integers)

    def _stored(self, part: str, dtype: torch.dtype) -> Iterator[Tensor]:
        begin, end = self._header.ranges[part]
        for offset in range(begin, end, len(self._buffer)):
            view = memoryview(self._buffer)[: end - offset]
            self._fill(view, offset)
            yield torch.frombuffer(self._buffer, dtype=dtype, count=len(view) // dtype.itemsize)

    def whole(self, part: str) -> Tensor:
        """A tensor in float32, in its own shape."""
        shape = self._header.layout[part][0]
        values = torch.empty(prod(shape), dtype=torch.float32)
        filled = 0
        for block in self.blocks(part):
            values[filled : filled + len(block)] = block
            filled += len(block)
        return values.reshape(shape)

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            try:
                count = os.preadv(self._file.fileno(), [view], offset)
            except OSError as error:
                raise FileError("cannot be read", where=self._path, got=error.strerror) from error
            if not count:
                raise UnsafeFile("the file became shorter while it was read", where=self._path)
            view, offset = view[count:], offset + count


def _dense_square(reader: _BlockReader, name: str, label: str) -> float:
    square = 0.0
    for values in reader.blocks(name):
        wide = values.double()
        square += float(wide.dot(wide))
    if not isfinite(square):
        raise NonFinite("values that are not finite in float32", where=label, layer=name, wanted="none")
    return square


def _low_rank_square(reader: _BlockReader, name: str, shape: tuple[int, ...], label: str) -> float:
    """From the R x R Grams, summed over blocks of rows and columns, so that no factor is widened whole."""
    update = LowRank(reader.whole(name + LEFT), reader.whole(name + RIGHT), shape)
    require_mergeable(update, where=label, layer=name)
    left_RR, right_RR = _gram(update.left_MR), _gram(update.right_RN.T)
    return max(float(left_RR.mul_(right_RR).sum()), 0.0)


def _gram(tall_MR: Tensor) -> Tensor:
    """``tall^T tall`` in float64."""
    rows, rank = tall_MR.shape
    gram_RR = torch.zeros(rank, rank, dtype=torch.float64)
    step = max(1, BLOCK_BYTES // (8 * rank))
    for start in range(0, rows, step):
        wide_BR = tall_MR[start : start + step].double()
        gram_RR.addmm_(wide_BR.T, wide_BR)
    return gram_RR
