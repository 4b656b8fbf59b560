"""What travels between server and sites, as Flower records.

Three requests, each with a ``job`` record:

====================  ===========================================  ======================================
message               server sends                                 site replies
====================  ===========================================  ======================================
``query.hello``       software version                             software version, site, base, tasks
``train``             task, origin version, round, seed, part      task vector, examples, accuracy, seconds
``evaluate``          tasks, merged vector of every rule           accuracy and examples by rule and task
====================  ===========================================  ======================================

Vectors travel as the bytes of our task vector file in one array of its own type, because Flower's
numpy arrays refuse bfloat16. Weights and data never travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedmerge.common.errors import MismatchError, VersionMismatch
from fedmerge.common.score import Score
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import from_bytes

HELLO = "query.hello"
TRAIN = "train"
EVALUATE = "evaluate"

STYPE = "fedmerge.safetensors"
JOB, METRICS, VECTOR, ORIGIN = "job", "metrics", "task-vector", "origin"
MERGED = "merged."
"""Prefix of the records that hold a rule's merged vector."""

EXACT = ConfigDict(extra="forbid")
"""A job of another version, with fields this one does not know, is refused."""


@dataclass(frozen=True)
class Hello:
    """What a site says about itself.

    Attributes:
        version: of fedmerge; ``site``: its label; ``base``: fingerprint of its pretrained model;
        tasks: names of the tasks it holds data for.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    version: str
    site: str
    base: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class TrainJob:
    """Fine-tune on one task.

    Attributes:
        task: its name. ``round``: 1 to the number of rounds.
        base: fingerprint both sides measure from; ``origin_version``: 0, the base, before the first
            round's vectors are added to it.
        seed: of the local run.
        part, parts: which share of the task's rows this site holds; ``partition``: how they are dealt.
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


@dataclass(frozen=True)
class EvaluateJob:
    """Score the base plus every merged vector on the site's own test data.

    ``parts`` and ``part`` hold one number per task.
    """

    __pydantic_config__: ClassVar[ConfigDict] = EXACT

    version: int
    base: str
    seed: int
    tasks: tuple[str, ...]
    part: tuple[int, ...]
    parts: tuple[int, ...]
    partition: str = "iid"


Job = TypeVar("Job", TrainJob, EvaluateJob, Hello)


def pack_vector(data: bytes) -> ArrayRecord:
    """Bytes of a task vector file as a record."""
    return ArrayRecord({"bytes": Array(dtype="uint8", shape=(len(data),), stype=STYPE, data=data)})


def vector_bytes(content: RecordDict, key: str, *, where: str) -> bytes:
    """The bytes of a task vector in a message.

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


def pack_job(job: TrainJob | EvaluateJob | Hello) -> ConfigRecord:
    """A job as scalars and lists."""
    return ConfigRecord({k: list(v) if isinstance(v, tuple) else v for k, v in asdict(job).items()})


def unpack_job(kind: type[Job], content: RecordDict, *, where: str) -> Job:
    """The job in a message.

    Raises:
        MismatchError: the record is missing or has other fields.
    """
    record = content.get(JOB)
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
    record = MetricRecord()
    for (rule, task), score in scores.items():
        record[f"accuracy/{rule}/{task}"] = score.accuracy
        record[f"examples/{rule}/{task}"] = score.examples
    return record


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
