"""Merging, comparing and inspecting files, without a network."""

from __future__ import annotations

import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from fedmerge import __version__
from fedmerge.common import adapter, vectorfile
from fedmerge.common.base import Base
from fedmerge.common.checkpoint import Checkpoint, open_checkpoint, read_json
from fedmerge.common.errors import ConfigError, FileError, UnknownLayer
from fedmerge.common.layers import LayerKind, LayerSpec, matches, short_dtype
from fedmerge.common.lowrank import truncated
from fedmerge.common.sources import SourceKind, kind_of, open_update
from fedmerge.common.taskvector import LayerUpdate, LowRank, Manifest, TaskVector
from fedmerge.common.writing import write_checkpoint
from fedmerge.deploy.progress import bars
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge.rule import Rule
from fedmerge.server.model import GlobalModel, Version
from fedmerge.server.needs import check_needs


@dataclass(frozen=True)
class Workers:
    """Where to merge: in this process, or on Ray actors if ``actors`` is given."""

    actors: int | None = None
    num_gpus: float | None = None
    ray_address: str | None = None

    def engine(self, rule: Rule, layers: Iterable[LayerSpec]) -> AbstractContextManager[Engine]:
        if self.actors is None and self.ray_address is None:
            return LocalEngine(rule, layers)
        from fedmerge.server.engine.ray_engine import RayEngine, start_ray

        start_ray(self.ray_address)
        return RayEngine(rule, layers, actors=self.actors or 1, num_gpus=self.num_gpus)


class InputRecord(BaseModel):
    """One input and the version it became.

    ``kind`` is what the file was; ``changed`` and ``low_rank`` count its layers; ``unchanged`` names
    those it does not touch; ``left_out`` names what it holds beyond the base's merged layers.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    kind: str
    changed: int
    low_rank: int
    unchanged: list[str]
    left_out: list[str]
    version: dict[str, object]


class MergeRecord(BaseModel):
    """``OUT.json``: how merged weights came about."""

    model_config = ConfigDict(frozen=True)

    format: str = "fedmerge.merge/1"
    rule: str
    options: dict[str, object]
    base: str
    base_fingerprint: str
    inputs: list[InputRecord]
    kinds: dict[str, list[str]]
    scale: float
    lambda_t: float
    merged_norm: float
    engine: dict[str, object]
    seconds: dict[str, float]
    versions: dict[str, str]


def merge_files(
    base_path: Path,
    inputs: Sequence[Path],
    out: Path,
    rule: Rule,
    kinds: Mapping[LayerKind, Sequence[str]],
    private: Sequence[str],
    workers: Workers,
    console: Console,
) -> MergeRecord:
    """Merges inputs in order and writes base plus merged vector, with a record beside it.

    All inputs are opened and checked against the base, by names and shapes, and for the statistics that the
    rule needs, before any is merged.

    Raises:
        FedmergeError: nothing is written.
    """
    if out.suffix != ".safetensors":
        raise ConfigError(
            "the merged weights are a safetensors file", where=out, wanted="a name ending in .safetensors"
        )
    if not out.parent.is_dir():
        raise FileError("no such folder", where=out.parent)
    opened = open_checkpoint(base_path)
    base = Base.from_checkpoint(opened, kinds_by_name(opened, kinds), private)
    vectors = [open_update(path, base, private=_private_for(path, private)) for path in inputs]
    for path, vector in zip(inputs, vectors, strict=True):
        check_needs(vector, base, [rule], str(path))
    low_rank: list[set[str]] = [set() for _ in vectors]
    seconds = {"merging": 0.0, "writing": 0.0}
    with workers.engine(rule, base.layers.values()) as engine, bars(console) as progress:
        model = GlobalModel(base, engine)
        bar = progress.add_task("merging", total=sum(len(vector.names) for vector in vectors), note="")
        for path, vector, found in zip(inputs, vectors, low_rank, strict=True):
            progress.update(bar, note=path.name)
            started = time.perf_counter()
            model.merge(_noting(vector, found), [path.name], lambda _: progress.advance(bar))
            seconds["merging"] += time.perf_counter() - started
        started = time.perf_counter()
        bar = progress.add_task("writing", total=len(base.layers), note=out.name)
        _write_merged(base, model.merged(), out, lambda: progress.advance(bar))
        seconds["writing"] = time.perf_counter() - started
        record = _record(base_path, inputs, vectors, low_rank, base, rule, model, seconds)
    out.with_suffix(".json").write_text(record.model_dump_json(indent=2) + "\n")
    return record


def diff_files(
    base_path: Path,
    tuned_path: Path,
    out: Path,
    rank: int | None,
    energy: float | None,
    task: str,
    private: Sequence[str],
    console: Console,
) -> None:
    """Writes the task vector of a fine-tuned checkpoint, truncated layer by layer if asked to.

    Raises:
        ConfigError: both ``rank`` and ``energy``. FedmergeError: nothing is written.
    """
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError("the energy to keep is out of range", got=energy, wanted="above 0, at most 1")
    if rank is not None and energy is not None:
        raise ConfigError("choose one way to truncate", got="--rank and --energy", wanted="one of them")
    base = Base.from_checkpoint(base_path, private=private)
    manifest = Manifest(base=base.fingerprint, task=task)
    vector = TaskVector.from_checkpoints(base, tuned_path, manifest=manifest, private=private)
    lost: dict[str, float] = {}
    total = 0.0
    with bars(console) as progress:
        bar = progress.add_task("writing", total=len(vector.names), note=out.name)

        def read(name: str) -> LayerUpdate:
            nonlocal total
            update = vector.read(name)
            total += update.sum_of_squares()
            if (rank or energy) and base.layers[name].kind is LayerKind.MATRIX:
                update, lost[name] = truncated(update, rank=rank, energy=energy)
            progress.advance(bar)
            return update

        written = vectorfile.save(
            TaskVector(vector.names, read, vector.unchanged, manifest, vector.label), out
        )
    console.print(
        f"{out}: {written:,} bytes, {len(vector.names)} layers, norm {total**0.5:.4g}", highlight=False
    )
    if lost:
        share = (sum(lost.values()) / total) ** 0.5 if total else 0.0
        console.print(f"truncation left out {share:.2%} of the vector's norm", highlight=False)


def inspect_file(path: Path, console: Console) -> None:
    """Prints what a file is, its metadata, and every layer with shape, dtype and norm.

    Raises:
        FileError: nothing fedmerge can read.
    """
    kind = kind_of(path)
    if kind is SourceKind.ADAPTER:
        config = read_json(path / adapter.CONFIG)
        facts = ", ".join(f"{key} {config.get(key)}" for key in ("peft_type", "r", "lora_alpha"))
        console.print(f"{path}: PEFT adapter, {facts}", highlight=False)
        _print_checkpoint(path / adapter.WEIGHTS, console)
    elif kind is SourceKind.TASK_VECTOR:
        _print_vector(vectorfile.load(path), console)
    else:
        console.print(f"{path}: checkpoint", highlight=False)
        _print_checkpoint(path, console)


def read_kinds(path: Path | None) -> dict[LayerKind, list[str]]:
    """Patterns of layer names by kind, from a TOML file such as ``matrix = ["*.proj.weight"]``.

    Raises:
        FileError: missing or not TOML. ConfigError: a key that is not a kind, or not a list of patterns.
    """
    if path is None:
        return {}
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error
    except tomllib.TOMLDecodeError as error:
        raise FileError("not TOML", where=path, got=str(error)) from error
    kinds = {str(kind): kind for kind in LayerKind}
    for key, patterns in given.items():
        if key not in kinds:
            raise ConfigError("not a layer kind", where=path, got=repr(key), wanted=" or ".join(kinds))
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ConfigError("not a list of name patterns", where=path, got=f"{key} = {patterns!r}")
    return {kinds[key]: patterns for key, patterns in given.items()}


def print_merge(record: MergeRecord, out: Path, console: Console) -> None:
    """A table of the merges, how layers were treated, and where the result is."""
    table = Table(title=f"{record.rule} over {len(record.inputs)} inputs")
    for heading in ("version", "input", "kind", "layers", "‖τ‖", "‖θ-θ₀‖", "λ"):
        table.add_column(heading, justify="left" if heading in ("input", "kind") else "right")
    for row in record.inputs:
        facts = row.version
        layers = f"{row.changed}" + (f" ({row.low_rank} low-rank)" if row.low_rank else "")
        table.add_row(
            str(facts["number"]),
            Path(row.path).name,
            row.kind,
            layers,
            *(f"{facts[key]:.4g}" for key in ("update_norm", "merged_norm", "lambda_t")),
        )
    console.print(table)
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in record.kinds.items() if names)
    console.print(f"layers by kind: {counts} (names in {out.with_suffix('.json').name})", highlight=False)
    for row in record.inputs:
        if row.left_out:
            console.print(f"{Path(row.path).name}: left out {', '.join(row.left_out)}", highlight=False)
    console.print(f"merged weights: {out}", highlight=False, soft_wrap=True)


def _noting(vector: TaskVector, low_rank: set[str]) -> TaskVector:
    """The same vector, noting the names of low-rank layers as they are read."""

    def read(name: str) -> LayerUpdate:
        update = vector.read(name)
        if isinstance(update, LowRank):
            low_rank.add(name)
        return update

    return replace(vector, read=read)


def _write_merged(base: Base, merged: TaskVector, out: Path, advance: Callable[[], None]) -> None:
    weights = merged.apply(base)

    def read(name: str) -> torch.Tensor:
        written, tensor = next(weights)
        assert written == name
        advance()
        return tensor

    layout = {name: (layer.shape, layer.dtype) for name, layer in base.layers.items()}
    write_checkpoint(out, layout, read)


def _record(
    base_path: Path,
    inputs: Sequence[Path],
    vectors: Sequence[TaskVector],
    low_rank: Sequence[set[str]],
    base: Base,
    rule: Rule,
    model: GlobalModel,
    seconds: dict[str, float],
) -> MergeRecord:
    engine, last = model.engine, model.versions[-1]
    return MergeRecord(
        rule=rule.name,
        options=rule.model_dump(),
        base=str(base_path),
        base_fingerprint=base.fingerprint,
        inputs=[_input(*each, base) for each in zip(inputs, vectors, low_rank, model.versions, strict=True)],
        kinds={
            str(kind): [n for n, layer in base.layers.items() if layer.kind is kind] for kind in LayerKind
        },
        scale=last.scale,
        lambda_t=last.lambda_t,
        merged_norm=last.merged_norm,
        engine={"kind": type(engine).__name__, "workers": engine.workers, "threads": engine.threads},
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        versions={"fedmerge": __version__, "torch": version("torch"), "safetensors": version("safetensors")},
    )


def _input(path: Path, vector: TaskVector, low_rank: set[str], merged: Version, base: Base) -> InputRecord:
    kind = kind_of(path)
    held = open_checkpoint(path).layout if kind is SourceKind.CHECKPOINT else {}
    return InputRecord(
        path=str(path),
        kind=kind,
        changed=len(vector.names),
        low_rank=len(low_rank),
        unchanged=list(vector.unchanged),
        left_out=[name for name in held if name not in base.merged_layers],
        version=asdict(merged),
    )


def _private_for(path: Path, private: Sequence[str]) -> Sequence[str]:
    """Private patterns, for sources that do not carry their own list of layers."""
    return () if kind_of(path) is SourceKind.TASK_VECTOR else private


def kinds_by_name(opened: Checkpoint, patterns: Mapping[LayerKind, Sequence[str]]) -> dict[str, LayerKind]:
    """Kinds of the layers that patterns match; the first kind that matches counts.

    Raises:
        UnknownLayer: a pattern that matches nothing.
    """
    names = list(opened)
    for listed in patterns.values():
        for pattern in listed:
            if not any(matches(name, [pattern]) for name in names):
                raise UnknownLayer("a kind's pattern matches no layer", where=opened.label, got=repr(pattern))
    found: dict[str, LayerKind] = {}
    for kind, listed in patterns.items():
        found |= {name: kind for name in names if name not in found and matches(name, listed)}
    return found


def _print_vector(vector: TaskVector, console: Console) -> None:
    manifest = vector.manifest
    console.print(f"{vector.label}: task vector", highlight=False)
    console.print(
        f"base {manifest.base[:12] or 'unknown'}, task {manifest.task or '-'}, site {manifest.site or '-'}, "
        f"{manifest.examples} examples, origin version {manifest.origin_version}",
        highlight=False,
    )
    table = Table(
        "layer", "shape", "form", "norm", title=f"{len(vector.names)} layers, norm {vector.norm():.4g}"
    )
    for name, update in vector.items():
        form = f"rank {update.rank}" if isinstance(update, LowRank) else "dense"
        table.add_row(name, str(update.shape), form, f"{update.sum_of_squares() ** 0.5:.4g}")
    console.print(table)
    if vector.unchanged:
        console.print(f"unchanged: {', '.join(vector.unchanged)}", highlight=False)


def _print_checkpoint(path: Path, console: Console) -> None:
    checkpoint = open_checkpoint(path)
    base = Base.from_checkpoint(checkpoint)
    counts = Counter(str(layer.kind) for layer in base.layers.values())
    table = Table(
        "layer",
        "shape",
        "dtype",
        "kind by shape",
        "norm",
        title=", ".join(f"{n} {k}" for k, n in counts.items()),
    )
    for name, layer in base.layers.items():
        norm = (
            f"{float(torch.linalg.vector_norm(base.read(name).double())):.4g}"
            if layer.dtype.is_floating_point
            else ""
        )
        table.add_row(name, str(layer.shape), short_dtype(layer.dtype), str(layer.kind), norm)
    console.print(table)
