"""Statistics in a task vector file: the names of their tensors, and what a reader holds them to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from torch import Tensor

from fedmerge.common.errors import FileError
from fedmerge.common.header import Header
from fedmerge.common.statistics import Shape, Statistic, Statistics, check_shape, check_values

NAMES = frozenset(Statistic)


def part_of(layer: str, statistic: str) -> str:
    """The name of the tensor that stores a layer's statistic."""
    return f"{layer}#{statistic}"


def statistic_in(part: str) -> str:
    """The statistic that a tensor's name tells; empty for other tensors."""
    statistic = part.partition("#")[2]
    return statistic if statistic in NAMES else ""


def open_statistics(
    header: Header,
    shared_input: Mapping[str, str],
    layers: Mapping[str, Shape],
    label: str,
    read_tensor: Callable[[str], Tensor],
) -> Statistics:
    """The statistics in a file, held against its layers; values are checked when they are read.

    Args:
        shared_input: as in the metadata. ``layers``: shapes of the layers that the file stores.

    Raises:
        FileError: statistics of a layer that is not stored; a shared Gram that is stored twice or nowhere.
        ShapeMismatch: naming the layer.
    """
    shapes = _with_shared(_stored(header), shared_input, label)
    for layer, found in shapes.items():
        if layer not in layers:
            raise FileError("statistics of a layer that is not stored", where=label, layer=layer)
        for statistic, shape in found.items():
            check_shape(statistic, shape, layers[layer], where=label, layer=layer)

    def read(layer: str) -> dict[str, Tensor]:
        found = {}
        for statistic, shape in shapes[layer].items():
            holder = shared_input.get(layer, layer) if statistic == Statistic.INPUT_GRAM else layer
            found[statistic] = read_tensor(part_of(holder, statistic)).float()
            check_values(statistic, shape, [found[statistic]], where=label, layer=layer)
        return found

    stored = (header.ranges[part] for part in header.ranges if statistic_in(part))
    return Statistics(read, shapes, shared_input, sum(end - begin for begin, end in stored))


def check_listed(statistics: Statistics, listed: Collection[str], label: str) -> None:
    """Refuses statistics that the manifest does not list, or that no file can hold.

    Raises:
        FileError: naming the layer and the statistic.
    """
    for layer, found in statistics.shapes.items():
        for statistic in found:
            if statistic not in listed or statistic not in NAMES:
                raise FileError(
                    "a statistic that is not known, or that the manifest does not list",
                    where=label,
                    layer=layer,
                    got=statistic,
                    wanted=" or ".join(name for name in listed if name in NAMES) or "none",
                )


def _stored(header: Header) -> dict[str, dict[str, Shape]]:
    """Shapes by layer and statistic, in the order of the payload."""
    shapes: dict[str, dict[str, Shape]] = {}
    for part in sorted(header.layout, key=lambda part: header.ranges[part]):
        if statistic := statistic_in(part):
            shapes.setdefault(part.partition("#")[0], {})[statistic] = header.layout[part][0]
    return shapes


def _with_shared(
    stored: Mapping[str, Mapping[str, Shape]], shared_input: Mapping[str, str], label: str
) -> dict[str, dict[str, Shape]]:
    shapes = {layer: dict(found) for layer, found in stored.items()}
    gram = str(Statistic.INPUT_GRAM)
    for layer, holder in shared_input.items():
        if gram in stored.get(layer, {}) or gram not in stored.get(holder, {}):
            raise FileError(
                "a shared input Gram that is stored twice or nowhere",
                where=label,
                layer=layer,
                wanted=f"it is stored with {holder!r} alone",
            )
        shapes.setdefault(layer, {})[gram] = stored[holder][gram]
    return shapes
