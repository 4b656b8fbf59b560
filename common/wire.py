"""What travels between server and sites, as Flower records.

Requests, each with a ``job`` record:

====================  ===========================================  ======================================
message               server sends                                 site replies
====================  ===========================================  ======================================
``query.hello``       software version; in serving mode also       software version, site, base, tasks; in
                      what became of the site's updates            serving mode also which version it
                                                                   holds and which updates wait there
``train``             task, how to train, origin version, round,   task vector or, if it is large, its
                      seed, part, statistics that the rules need   manifest; examples, accuracy, seconds
``query.correct``     task, the merged vector and that before it   task vector of the layers it corrected
``evaluate``          tasks, merged vector of every rule           accuracy and examples by rule and task
``query.publish``     a version's merged vector or, if it is       the version it holds now, ranges it
                      large, its manifest; tasks to score          lacks; accuracy and examples by task
``query.put_shard``   one range of a merged vector                 ranges it still lacks
``query.get_shard``   which range of which update                  that range
====================  ===========================================  ======================================

The last three belong to serving mode. Vectors travel as the bytes of our task vector file in one array
of its own type, because Flower's numpy arrays refuse bfloat16; so do the ranges of a large file. Weights
and data never travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ConfigDict, TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from torch import Tensor

from fedmerge.common.errors import MismatchError, VersionMismatch
from fedmerge.common.ranges import MAX_MESSAGE_BYTES, RANGE_BYTES, RangeManifest
from fedmerge.common.records import Dtype
from fedmerge.common.score import Score
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import from_bytes

HELLO = "query.hello"
TRAIN = "train"
CORRECT = "query.correct"
EVALUATE = "evaluate"
PUBLISH = "query.publish"
PUT_SHARD = "query.put_shard"
GET_SHARD = "query.get_shard"

STYPE = "fedmerge.safetensors"
JOB, METRICS, VECTOR, ORIGIN = "job", "metrics", "task-vector", "origin"
BASES = "bases"
"""Record of the input directions that the server protects, by layer."""
PREVIOUS = "previous"
"""Record of the merged vector before the last merge."""
MERGED = "merged."
"""Prefix of the records that hold a rule's merged vector."""
MANIFEST, RANGE = "manifest", "range"
PUBLISHED = "merged"
"""What scores of a published version are filed under, in place of a rule's name."""

EXACT = ConfigDict(extra="forbid")
"""A job of another version, with fields this one does not know, is refused."""


@dataclass(frozen=True)
class Greeting:
    """What the server says first, and again and again in serving mode.

    Attributes:
        version: of fedmerge. ``serving``: whether versions will be published to the site.
        check_base: whether the site is to compute its base's fingerprint, or may repeat what it last was.
        acknowledged: hashes of its updates that are durable at the server; it may forget them.
        refused: hashes of those that are not let in; ``reasons``: why, in the same order.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    version: str
    serving: bool = False
    check_base: bool = True
    acknowledged: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hello:
    """What a site says about itself.

    Attributes:
        version: of fedmerge; ``site``: its label; ``base``: fingerprint of its pretrained model;
        tasks: names of the tasks it holds data for.
        holds: number of the merged version it has, 0 for none; ``model``: the hash that version has at
            the server. ``waiting``: hashes of updates that it has not been told the fate of.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    version: str
    site: str
    base: str
    tasks: tuple[str, ...]
    holds: int = 0
    model: str = ""
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainJob:
    """Fine-tune on one task.

    Attributes:
        task: its name. ``round``: 1 to the number of rounds.
        base: fingerprint both sides measure from; ``origin_version``: 0, the base, before the first
            round's vectors are added to it.
        seed: of the local run.
        part, parts: which share of the task's rows this site holds; ``partition``: how they are dealt.
        keep: whether the site keeps the result until it is told that the server has it.
        message_bytes: a larger result is kept and told by its manifest, in ranges of ``range_bytes``.
        needs: statistics to send with the vector, by their names, sorted. ``sketch``: how to sketch, JSON
            of a ``SketchSpec``; empty unless a sketch is among them.
        also: further tasks to learn at the same time. ``training``: JSON of a ``LocalTraining``.
        compress: how the vector is made smaller, see ``fedmerge.common.compression``.
        last: whether it is the task's last round: the fine-tuned model is scored then, and training options
            remember the task.
        learning: of which way of learning, where a run has several; what a site keeps belongs to one.
        held: whether to start from the version that the site holds; the vector is from the base all the same.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    task: str
    base: str
    round: int = 1
    origin_version: int = 0
    seed: int = 0
    part: int = 0
    parts: int = 1
    partition: str = "iid"
    keep: bool = False
    message_bytes: int = MAX_MESSAGE_BYTES
    range_bytes: int = RANGE_BYTES
    needs: tuple[str, ...] = ()
    sketch: str = ""
    also: tuple[str, ...] = ()
    training: str = ""
    compress: str = "none"
    last: bool = True
    learning: str = ""
    held: bool = False


@dataclass(frozen=True)
class CorrectJob:
    """Fit one projection of the merged model to the representation by the model before it.

    Attributes:
        correction: JSON of a ``Correction``. ``training``: of the ``LocalTraining`` that taught the task.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    task: str
    base: str
    origin_version: int
    seed: int
    part: int
    parts: int
    partition: str
    correction: str
    training: str = ""


@dataclass(frozen=True)
class EvaluateJob:
    """Score the base plus every merged vector on the site's own test data.

    ``parts`` and ``part`` hold one number per task. ``tangent``: of the model linearised at the base.
    ``learning``: as in :class:`TrainJob`. ``learned``: tasks that are in this version; others are
    scored with private layers as they were built, whatever the site has learned meanwhile.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    version: int
    base: str
    seed: int
    tasks: tuple[str, ...]
    part: tuple[int, ...]
    parts: tuple[int, ...]
    partition: str = "iid"
    tangent: bool = False
    learning: str = ""
    learned: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishJob:
    """Keep this version as the current one, and score it on ``tasks``.

    The merged vector comes with it. If a manifest comes instead, ranges follow as ``ShardJob`` and then
    this message again, until the site lacks nothing.

    Attributes:
        version: its number; ``model``: its hash in the ledger; ``dtype``: of the vector as it is sent.
        base: fingerprint it is measured from. ``tangent``: as in :class:`EvaluateJob`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    version: int
    model: str
    base: str
    dtype: Dtype = "f32"
    tasks: tuple[str, ...] = ()
    seed: int = 0
    tangent: bool = False


@dataclass(frozen=True)
class ShardJob:
    """One range of the file with this hash: sent with it, or asked for."""

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    sha256: str
    index: int


@dataclass(frozen=True)
class Holding:
    """What a site has of what is published.

    Attributes:
        holds, model: as in ``Hello``. ``missing``: ranges that it lacks of the version on its way.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    holds: int
    model: str
    missing: tuple[int, ...] = ()


AnyJob = (
    Greeting | Hello | TrainJob | CorrectJob | EvaluateJob | PublishJob | ShardJob | Holding | RangeManifest
)
Job = TypeVar(
    "Job",
    Greeting,
    Hello,
    TrainJob,
    CorrectJob,
    EvaluateJob,
    PublishJob,
    ShardJob,
    Holding,
    RangeManifest,
)


def pack_vector(data: bytes) -> ArrayRecord:
    """Bytes of a task vector file, or of one of its ranges, as a record."""
    return ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})


def vector_bytes(content: RecordDict, key: str, *, where: str) -> bytes:
    """The bytes of a task vector, or of one of its ranges, in a message.

    Raises:
        MismatchError: the record is missing or is not one array of our type.
    """
    record = content.get(key)
    array = record.get("bytes") if isinstance(record, ArrayRecord) else None
    if array is None or array.stype != STYPE:
        raise MismatchError(
            f"no task vector under {key!r}",
            where=where,
            got=sorted(content),
            wanted=f"one array of type {STYPE}",
        )
    return bytes(array.data)


def unpack_vector(content: RecordDict, key: str, *, where: str) -> TaskVector:
    """The task vector in a message; it is parsed strictly and read lazily."""
    return from_bytes(vector_bytes(content, key, where=where), label=where)


def unpack_bases(content: RecordDict, *, where: str) -> dict[str, Tensor]:
    """The protected directions in a message, by layer; none if there are none.

    Raises:
        MismatchError: not a safetensors file.
    """
    if BASES not in content:
        return {}
    try:
        return load_tensors(vector_bytes(content, BASES, where=where))
    except SafetensorError as error:
        raise MismatchError("not a safetensors file", where=f"{BASES} of {where}", got=str(error)) from error


def pack_job(job: AnyJob) -> ConfigRecord:
    """A job as scalars and lists."""
    return ConfigRecord({k: list(v) if isinstance(v, tuple) else v for k, v in asdict(job).items()})


def unpack_job(kind: type[Job], content: RecordDict, *, where: str, key: str = JOB) -> Job:
    """The job in a message, or the manifest.

    Raises:
        MismatchError: the record is missing or has other fields.
    """
    record = content.get(key)
    brought = dict(record) if isinstance(record, ConfigRecord) else {}
    try:
        return TypeAdapter(kind).validate_python(brought)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise MismatchError(
            f"not a {kind.__name__}: {first['msg']}",
            where=where,
            got=f"{'.'.join(map(str, first['loc']))} of {sorted(brought)}",
            wanted=sorted(field.name for field in fields(kind)),
        ) from error


def pack_scores(scores: Mapping[tuple[str, str], Score]) -> MetricRecord:
    """Scores by (rule, task)."""
    return MetricRecord(dict(scored(scores)))


def scored(scores: Mapping[tuple[str, str], Score]) -> dict[str, int | float]:
    """Scores by (rule, task) as named numbers."""
    found: dict[str, int | float] = {}
    for (rule, task), score in scores.items():
        found[f"accuracy/{rule}/{task}"] = score.accuracy
        found[f"examples/{rule}/{task}"] = score.examples
    return found


def unpack_scores(
    content: RecordDict, rules: Sequence[str], tasks: Sequence[str]
) -> dict[tuple[str, str], Score]:
    """Scores of the rules and tasks that a reply brings; what it leaves out is left out."""
    record = content.get(METRICS)
    metrics: dict[str, Any] = dict(record) if isinstance(record, MetricRecord) else {}
    found = {}
    for rule in rules:
        for task in tasks:
            accuracy, examples = (
                metrics.get(f"accuracy/{rule}/{task}"),
                metrics.get(f"examples/{rule}/{task}"),
            )
            if (
                isinstance(accuracy, float | int)
                and isinstance(examples, int)
                and 0 <= accuracy <= 1
                and examples > 0
            ):
                found[rule, task] = Score(float(accuracy), examples)
    return found


def check_version(theirs: str, ours: str, *, where: str) -> None:
    """Refuses another version of fedmerge on the other side."""
    if theirs != ours:
        raise VersionMismatch(
            "another version of fedmerge",
            where=where,
            got=theirs,
            wanted=ours,
            do="Install the same version on the server and on every site.",
        )


def bytes_in(content: RecordDict) -> int:
    """Payload bytes of the arrays in a message."""
    return sum(len(array.data) for record in content.array_records.values() for array in record.values())
