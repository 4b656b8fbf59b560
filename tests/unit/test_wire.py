"""Does what one side packs arrive on the other, and is anything else refused with a reason?"""

import math

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedmerge.common import wire
from fedmerge.common.errors import MismatchError, UnsafeFile, VersionMismatch
from fedmerge.common.ranges import RangeManifest
from fedmerge.common.score import Score
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.common.wire import EvaluateJob, Greeting, Hello, Holding, PublishJob, ShardJob, TrainJob

HELLO = Hello("0.1.0", "ward 7", "f" * 64, ("plain", "reversed"))
JOBS = [
    HELLO,
    Hello("0.1.0", "", "", ()),
    TrainJob("plain", "f" * 64, 2, 0, 7, 1, 3, "dirichlet:0.5"),
    Greeting("0.1.0", True, False, ("a" * 64,), ("b" * 64,), ("layer 'w': NaN",)),
    Greeting("0.1.0"),
    Hello("0.1.0", "a", "f" * 64, ("plain",), 3, "c" * 64, ("d" * 64,)),
    TrainJob("plain", "f" * 64, keep=True, message_bytes=1000, range_bytes=10),
    TrainJob("plain", "f" * 64, needs=("fisher", "input_gram")),
    PublishJob(3, "c" * 64, "f" * 64, "bf16", ("plain",), 7),
    ShardJob("d" * 64, 4),
    Holding(3, "c" * 64, (0, 2)),
    Holding(0, ""),
    EvaluateJob(3, "f" * 64, 7, ("plain", "reversed"), (0, 1), (1, 2)),
    EvaluateJob(1, "f" * 64, 7, ("plain",), (0,), (1,), learning="fot", learned=("plain",)),
]


def content_of(job) -> RecordDict:
    return RecordDict({wire.JOB: wire.pack_job(job)})


def vector() -> TaskVector:
    manifest = Manifest("a" * 64, 0, "plain", "ward 7", 12)
    return TaskVector.of({"w": torch.arange(6.0).reshape(2, 3)}, ["b"], manifest)


def with_bytes(data: bytes, stype: str = wire.STYPE, key: str = "bytes") -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)
    return RecordDict({wire.VECTOR: ArrayRecord({key: array})})


@pytest.mark.parametrize("job", JOBS, ids=lambda job: type(job).__name__)
def test_jobs_come_back_as_they_were(job):
    assert wire.unpack_job(type(job), content_of(job), where="test") == job


def test_a_manifest_comes_back_under_its_own_name():
    manifest = RangeManifest(2500, "a" * 64, 1000, ("b" * 64, "c" * 64, "d" * 64))
    content = RecordDict({wire.JOB: wire.pack_job(HELLO), wire.MANIFEST: wire.pack_job(manifest)})
    assert wire.unpack_job(RangeManifest, content, where="test", key=wire.MANIFEST) == manifest


@pytest.mark.parametrize("change", [{"size": 0}, {"hashes": ["b" * 64]}, {"sha256": "a"}])
def test_a_manifest_that_lies_is_refused(change):
    manifest = RangeManifest(2500, "a" * 64, 1000, ("b" * 64, "c" * 64, "d" * 64))
    record = ConfigRecord({**wire.pack_job(manifest), **change})
    with pytest.raises(MismatchError):
        wire.unpack_job(RangeManifest, RecordDict({wire.JOB: record}), where="site a")


def test_a_vector_comes_back_bit_for_bit():
    data = to_bytes(vector())
    content = RecordDict({wire.VECTOR: wire.pack_vector(data)})
    assert wire.vector_bytes(content, wire.VECTOR, where="test") == data
    back = wire.unpack_vector(content, wire.VECTOR, where="update of ward 7")
    assert torch.equal(back.read("w").to_dense(), vector().read("w").to_dense())
    assert (back.manifest, back.unchanged, back.label) == (vector().manifest, ("b",), "update of ward 7")


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({wire.VECTOR: MetricRecord({"bytes": 1})}),
        RecordDict({wire.VECTOR: ArrayRecord({})}),
        with_bytes(b"x", stype="numpy.ndarray"),
        with_bytes(b"x", key="other"),
    ],
    ids=["nothing", "metrics", "no array", "numpy's type", "another name"],
)
def test_a_message_without_our_vector_is_refused_by_name(content):
    with pytest.raises(MismatchError, match=r"^site a: no task vector under 'task-vector'"):
        wire.unpack_vector(content, wire.VECTOR, where="site a")


@pytest.mark.parametrize("data", [b"", b"garbage", b"\x80\x05K\x01.", b"PK\x03\x04" + bytes(60)])
def test_bytes_that_are_no_vector_are_refused_unread(data):
    with pytest.raises(UnsafeFile, match="site a"):
        wire.unpack_vector(with_bytes(data), wire.VECTOR, where="site a")


@pytest.mark.parametrize(
    "change",
    [{"extra": 1}, {"version": 5}, {"tasks": "plain"}, {"tasks": [1, 2]}, {"base": True}],
    ids=["a field too many", "a number for text", "text for a list", "numbers for names", "a truth value"],
)
def test_a_hello_of_other_fields_or_types_is_refused(change):
    record = ConfigRecord({**wire.pack_job(HELLO), **change})
    with pytest.raises(
        MismatchError,
        match=r"^node 3: not a Hello: .*'base', 'holds', 'model', 'site', 'tasks', 'version', 'waiting'",
    ):
        wire.unpack_job(Hello, RecordDict({wire.JOB: record}), where="node 3")


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({wire.JOB: MetricRecord({"version": 1})})])
def test_a_message_without_a_job_is_refused(content):
    with pytest.raises(MismatchError, match="not a Hello"):
        wire.unpack_job(Hello, content, where="node 3")


def test_a_job_of_another_kind_is_refused():
    with pytest.raises(MismatchError, match="not a TrainJob"):
        wire.unpack_job(TrainJob, content_of(HELLO), where="train request")


def test_another_software_version_is_refused_with_both():
    wire.check_version("0.1.0", "0.1.0", where="ward 7")
    with pytest.raises(VersionMismatch, match=r"ward 7: .*got 0\.2\.0, wanted 0\.1\.0\. Install the same"):
        wire.check_version("0.2.0", "0.1.0", where="ward 7")


def test_scores_come_back_by_rule_and_task():
    scores = {("opcm", "plain"): Score(0.25, 8), ("average", "re/versed"): Score(1.0, 3)}
    content = RecordDict({wire.METRICS: wire.pack_scores(scores)})
    assert wire.unpack_scores(content, ["opcm", "average"], ["plain", "re/versed"]) == scores
    assert wire.unpack_scores(content, ["opcm"], ["re/versed"]) == {}


@pytest.mark.parametrize(
    ("accuracy", "examples"),
    [(math.nan, 8), (math.inf, 8), (1.01, 8), (-0.1, 8), (0.5, 0), (0.5, -1), (0.5, 8.0), ([0.5], 8)],
)
def test_a_score_out_of_range_is_left_out_and_the_others_stay(accuracy, examples):
    record = wire.pack_scores({("opcm", "good"): Score(0.5, 4)})
    record["accuracy/opcm/bad"], record["examples/opcm/bad"] = accuracy, examples
    found = wire.unpack_scores(RecordDict({wire.METRICS: record}), ["opcm"], ["good", "bad"])
    assert found == {("opcm", "good"): Score(0.5, 4)}


def test_a_truth_value_cannot_be_a_score():
    with pytest.raises(TypeError):
        MetricRecord({"accuracy/opcm/plain": True})


@pytest.mark.parametrize("content", [RecordDict(), RecordDict({wire.METRICS: ConfigRecord({"a": 1})})])
def test_no_metrics_are_no_scores(content):
    assert wire.unpack_scores(content, ["opcm"], ["plain"]) == {}


def test_payload_is_counted_over_all_arrays():
    content = RecordDict({"a": wire.pack_vector(b"12345"), "b": wire.pack_vector(b"678")})
    assert wire.bytes_in(content) == 8
