"""Whatever a site submits, opened as a task vector and held against the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

from torch import Tensor

from fedmerge.common import adapter, vectorfile
from fedmerge.common.base import Base
from fedmerge.common.checkpoint import SINGLE, Checkpoint
from fedmerge.common.errors import BaseMismatch, FileError, MissingLayer, ShapeMismatch, UnknownLayer
from fedmerge.common.layers import LayerKind
from fedmerge.common.statisticparts import check_listed
from fedmerge.common.statistics import check_shape, statistics_of
from fedmerge.common.taskvector import Manifest, TaskVector, nearest


class SourceKind(StrEnum):
    ADAPTER = "adapter"
    TASK_VECTOR = "task vector"
    CHECKPOINT = "checkpoint"


def kind_of(path: Path) -> SourceKind:
    """What a file or folder is to be opened as; reads a header at most.

    Raises:
        FileError: a missing file. UnsafeFile: a file that is not well-formed safetensors.
    """
    if (path / adapter.CONFIG).is_file() and not (path / SINGLE).is_file():
        return SourceKind.ADAPTER
    if path.suffix != ".json" and not path.is_dir() and vectorfile.is_task_vector(path):
        return SourceKind.TASK_VECTOR
    return SourceKind.CHECKPOINT


def open_update(
    source: Path | str | Mapping[str, Tensor] | Checkpoint,
    base: Base,
    *,
    manifest: Manifest | None = None,
    frozen: Iterable[str] = (),
    private: Iterable[str] = (),
) -> TaskVector:
    """Opens a task vector file, a PEFT adapter folder, or a fine-tuned checkpoint.

    Reads names, shapes and metadata; each layer is read when it is asked for.

    Args:
        source: a file of ours, a folder with ``adapter_config.json`` and no ``model.safetensors``, or
            whatever :func:`~fedmerge.common.checkpoint.open_checkpoint` opens.
        base: what the update is measured from.
        manifest: what to say about an adapter or a checkpoint; a task vector file brings its own.
        frozen: patterns of layers of a checkpoint known to be untouched; they are not sent.
        private: patterns of layers of an adapter or a checkpoint to leave out, such as a task's own head.

    Raises:
        FileError: and its kinds, for files that cannot be used.
        MismatchError: and its kinds, for what does not fit the base.
        FileError: ``manifest``, ``frozen`` or ``private`` given for a task vector file.
    """
    if isinstance(source, Mapping | Checkpoint):
        return TaskVector.from_checkpoints(base, source, manifest=manifest, frozen=frozen, private=private)
    path = Path(source)
    kind = kind_of(path)
    if kind is SourceKind.ADAPTER:
        return adapter.open_adapter(path, base, manifest=manifest, private=private)
    if kind is SourceKind.TASK_VECTOR:
        if manifest is not None or tuple(frozen) or tuple(private):
            raise FileError("a task vector already says what it is", where=path, do="Give the path alone.")
        vector = vectorfile.load(path)
        check_vector(vector, base)
        return vector
    return TaskVector.from_checkpoints(base, path, manifest=manifest, frozen=frozen, private=private)


def check_vector(vector: TaskVector, base: Base) -> None:
    """Holds a task vector against the base by names and shapes; reads no tensor of a file of ours.

    Its stored and unchanged layers together must be exactly the base's merged layers. Statistics must be
    listed in the manifest and have the shape that the layer's kind asks for.

    Raises:
        BaseMismatch: measured from a base with another fingerprint; an empty one passes.
        UnknownLayer, MissingLayer, ShapeMismatch: naming the vector and the layer.
        FileError: statistics that are not listed.
    """
    if vector.manifest.base not in ("", base.fingerprint):
        raise BaseMismatch(
            "measured from another base",
            where=vector.label,
            got=vector.manifest.base[:12],
            wanted=base.fingerprint[:12],
            do="Fine-tune from this base, or submit to the server of the other.",
        )
    for name in (*vector.names, *vector.unchanged):
        if name not in base.merged_layers:
            held = base.layers.get(name)
            what = (
                "not a layer of the base" if held is None else f"a {held.kind} layer, which is never merged"
            )
            raise UnknownLayer(what, where=vector.label, layer=name, wanted=nearest(name, base.merged_layers))
    _check_cover(vector, base)
    for name in vector.names:
        shape = vector.shapes[name] if name in vector.shapes else vector.read(name).shape
        if tuple(shape) != base.layers[name].shape:
            raise ShapeMismatch(
                "another shape than the base's",
                where=vector.label,
                layer=name,
                got=tuple(shape),
                wanted=base.layers[name].shape,
            )
    _check_statistics(vector, base)


def _check_cover(vector: TaskVector, base: Base) -> None:
    told = set(vector.names) | set(vector.unchanged)
    for name in base.merged_layers:
        if name not in told:
            raise MissingLayer(
                "neither stored nor called unchanged",
                where=vector.label,
                layer=name,
                do="Name layers that were not trained as unchanged.",
            )


def _check_statistics(vector: TaskVector, base: Base) -> None:
    found = statistics_of(vector)
    check_listed(found, vector.manifest.statistics, vector.label)
    for name in vector.names:
        layer = base.layers[name]
        is_matrix = layer.kind is LayerKind.MATRIX
        for statistic, shape in found.shapes.get(name, {}).items():
            check_shape(statistic, shape, layer.shape, where=vector.label, layer=name, matrix=is_matrix)
