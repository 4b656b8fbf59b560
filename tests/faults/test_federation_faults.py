"""Whatever one site does, do the others merge what they would have merged without it, and is it recorded?

F8 and the bad input of the reliability plan, at the level of a whole run: the version that comes out must
have the bits of a run that never had the faulty site.
"""

import math
import random
import struct
from dataclasses import replace

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from local_grid import (
    ROWS,
    FakeClock,
    Fault,
    LocalGrid,
    federate,
    merged_bits,
    merged_offline,
    sent_vector,
    site,
    vector_in,
)

from fedmerge.common import wire
from fedmerge.common.errors import ConfigError
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.deploy.streams.example import TASKS
from fedmerge.server.combine import add_vectors, combine

A, B, C = 11, 12, 13
RULES = ("opcm", "average")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def grid_of(*faults: Fault, clock: FakeClock | None = None, without: int | None = None) -> LocalGrid:
    apps = {A: site("a", TASKS[0]), B: site("b", TASKS[1]), C: site("c", TASKS[2])}
    return LocalGrid({node: app for node, app in apps.items() if node != without}, faults, clock=clock)


def failures(run, site: str) -> list[tuple[str, str, str]]:
    events = [event for event in run.history.of("failed") if event["site"] == site]
    return [(event["task"], event["phase"], event["reason"]) for event in events]


@pytest.fixture(scope="module")
def without_b():
    return federate(grid_of(without=B), *RULES, tasks=(TASKS[0], TASKS[2]))


def assert_as_without_b(run, reference) -> None:
    assert [task.task for task in run.merged] == [TASKS[0], TASKS[2]]
    assert all(merged_bits(run, rule) == merged_bits(reference, rule) for rule in RULES)
    for task in (TASKS[0], TASKS[2]):
        assert run.score("opcm", 2, task) == reference.score("opcm", 2, task)
    assert failures(run, "a") == failures(run, "c") == []
    assert run.history.events[-1]["event"] == "finished"


# --- sites that fail ---


def test_a_site_that_errors_is_left_out(without_b):
    run = federate(
        grid_of(Fault(B, wire.TRAIN, error="RuntimeError: disk full\nat line 3")), *RULES, tasks=TASKS
    )
    assert_as_without_b(run, without_b)
    assert failures(run, "b") == [(TASKS[1], "train", "error 2: RuntimeError: disk full")]


def test_a_site_that_never_answers_is_given_up_after_its_time(without_b):
    clock = FakeClock(tick=0.01)
    faults = Fault(B, wire.TRAIN, lost=True)
    run = federate(grid_of(faults, clock=clock), *RULES, tasks=TASKS, clock=clock, timeout_seconds=5)
    assert_as_without_b(run, without_b)
    assert failures(run, "b") == [(TASKS[1], "train", "no reply within 5 s")]


def test_a_site_that_answers_too_late_is_given_up_and_its_vector_ignored(without_b):
    clock = FakeClock(tick=0.01)
    faults = Fault(B, wire.TRAIN, delay=7.0), Fault(C, wire.TRAIN, delay=4.0)
    run = federate(grid_of(*faults, clock=clock), *RULES, tasks=TASKS, clock=clock, timeout_seconds=5)
    assert_as_without_b(run, without_b)
    assert failures(run, "b") == [(TASKS[1], "train", "no reply within 5 s")]


def test_a_site_that_leaves_in_mid_run_is_left_out(without_b):
    run = federate(grid_of(Fault(B, wire.TRAIN, leaves=True)), *RULES, tasks=TASKS)
    assert_as_without_b(run, without_b)
    first, *later = failures(run, "b")
    assert first == (TASKS[1], "train", "error 5: Node Unavailable")
    assert {(phase, reason) for _, phase, reason in later} == {("evaluate", "the site has left")}


def test_a_site_that_leaves_before_its_task_is_left_out(without_b):
    run = federate(grid_of(Fault(B, wire.EVALUATE, nth=1, leaves=True)), *RULES, tasks=TASKS)
    assert_as_without_b(run, without_b)
    assert (TASKS[1], "train", "the site has left") in failures(run, "b")


def test_a_site_that_leaves_after_its_task_has_still_taught_it():
    whole = federate(grid_of(), *RULES, tasks=TASKS)
    run = federate(grid_of(Fault(B, wire.EVALUATE, nth=2, leaves=True)), *RULES, tasks=TASKS)
    assert all(merged_bits(run, rule) == merged_bits(whole, rule) for rule in RULES)
    assert run.score("opcm", 3, TASKS[0]) == whole.score("opcm", 3, TASKS[0])
    assert run.score("opcm", 3, TASKS[1]) is None


# --- vectors that cannot be merged ---


def rewritten(change) -> object:
    """A reply whose vector has been through ``change``, as a site could write it."""

    def tamper(content: RecordDict) -> RecordDict:
        vector = vector_in(content).in_memory()
        content[wire.VECTOR] = wire.pack_vector(to_bytes(change(vector)))
        return content

    return tamper


def layers_of(vector: TaskVector) -> dict[str, torch.Tensor]:
    return {name: update.to_dense() for name, update in vector.items()}


def with_layers(**changed):
    """Layers replaced, or dropped where None; underscores stand for dots."""

    def change(vector: TaskVector) -> TaskVector:
        layers = layers_of(vector) | {name.replace("_", "."): value for name, value in changed.items()}
        return TaskVector.of({k: v for k, v in layers.items() if v is not None}, (), vector.manifest)

    return rewritten(change)


def saying(**changed):
    return rewritten(lambda vector: replace(vector, manifest=replace(vector.manifest, **changed)))


def raw(change):
    """A reply whose bytes have been through ``change``."""

    def tamper(content: RecordDict) -> RecordDict:
        data = wire.vector_bytes(content, wire.VECTOR, where="site")
        content[wire.VECTOR] = wire.pack_vector(change(data))
        return content

    return tamper


def reporting(key: str, value: object):
    def tamper(content: RecordDict) -> RecordDict:
        content[wire.METRICS][key] = value
        return content

    return tamper


def dropping(key: str):
    def tamper(content: RecordDict) -> RecordDict:
        del content[key]
        return content

    return tamper


def spike(vector: TaskVector) -> TaskVector:
    layers = {name: torch.zeros_like(values) for name, values in layers_of(vector).items()}
    layers["0.weight"][0, 0] = 3e38
    return TaskVector.of(layers, (), vector.manifest)


BAD = {
    "NaN in the last element": (raw(lambda d: d[:-4] + struct.pack("<f", math.nan)), "not finite in float32"),
    "infinity in the last element": (raw(lambda d: d[:-4] + struct.pack("<f", math.inf)), "not finite"),
    "finite, but too large": (rewritten(spike), "overflows float32"),
    "a transposed layer": (with_layers(**{"0_weight": torch.zeros(24, 48)}), "another shape than the base's"),
    "one number for a row": (with_layers(**{"2_bias": torch.zeros(1)}), "another shape than the base's"),
    "a layer too many": (with_layers(extra=torch.zeros(3)), "layer 'extra': not a layer of the base"),
    "a layer too few": (with_layers(**{"2_bias": None}), "layer '2.bias': neither stored nor called"),
    "another base": (saying(base="0" * 64), "made from another base: got 000000000000"),
    "a base it does not name": (saying(base=""), "made from another base: got none"),
    "a later origin": (saying(origin_version=1), "another origin version: got 1, wanted 0"),
    "another task": (saying(task="plain"), "a vector for another task: got 'plain', wanted 'shuffled'"),
    "garbage": (raw(lambda d: bytes(range(256)) * 4), "update of b"),
    "nothing": (raw(lambda d: b""), "update of b"),
    "a pickle": (raw(lambda d: b"\x80\x05\x95" + bytes(8) + b"cos\nsystem\n."), "update of b"),
    "a zip": (raw(lambda d: b"PK\x03\x04" + bytes(60)), "update of b"),
    "a header that lies about its length": (raw(lambda d: struct.pack("<Q", 2**63) + d[8:]), "update of b"),
    "half a file": (raw(lambda d: d[: len(d) // 2]), "update of b"),
    "no vector": (dropping(wire.VECTOR), "no task vector under 'task-vector'"),
    "no metrics": (dropping(wire.METRICS), "the example count is not a whole number of at least 1"),
    "no examples": (reporting("num-examples", 0), "got 0"),
    "fewer than no examples": (reporting("num-examples", -64), "got -64"),
    "a fraction of examples": (reporting("num-examples", 1.5), "got 1.5"),
    "NaN examples": (reporting("num-examples", math.nan), "got nan"),
    "a list of examples": (reporting("num-examples", [64]), r"got [64]"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_vector_is_refused_with_its_reason_and_the_others_merge(case, without_b):
    tamper, reason = BAD[case]
    run = federate(grid_of(Fault(B, wire.TRAIN, tamper=tamper)), *RULES, tasks=TASKS)
    assert_as_without_b(run, without_b)
    ((task, phase, said),) = failures(run, "b")
    assert (task, phase) == (TASKS[1], "refused")
    assert reason in said
    assert "update of b" in said


def test_a_boasted_weight_counts_no_more_than_the_cap():
    boast = Fault(A, wire.TRAIN, tamper=reporting("num-examples", 10**18))
    grid = LocalGrid({A: site("a"), B: site("b")}, [boast])
    run = federate(grid, tasks=("plain",), sites_per_task=2, max_examples=2 * ROWS, evaluate=False)
    vectors = [sent_vector(reply) for reply in grid.trained()]
    assert merged_bits(run) == merged_offline([combine(vectors, [2 * ROWS, ROWS // 2])])
    assert [event["examples"] for event in run.history.of("trained")] == [2 * ROWS, ROWS // 2]


def test_numbers_that_are_none_are_recorded_as_missing(without_b):
    strange = MetricRecord({"num-examples": ROWS, "train-loss": math.nan, "train-seconds": math.inf})

    def tamper(content: RecordDict) -> RecordDict:
        content[wire.METRICS] = strange
        return content

    run = federate(grid_of(Fault(B, wire.TRAIN, tamper=tamper)), tasks=TASKS, evaluate=False)
    trained = run.history.of("trained")[1]
    assert (trained["loss"], trained["train_seconds"], trained["score_seconds"]) == (None, None, None)


# --- several sites, several rounds ---


def test_a_task_goes_on_with_the_sites_that_are_left():
    grid = LocalGrid({A: site("a"), B: site("b")}, [Fault(A, wire.TRAIN, error="no")])
    run = federate(grid, tasks=("plain",), sites_per_task=2, evaluate=False)
    assert merged_bits(run) == merged_offline(map(sent_vector, grid.trained()))
    assert run.merged[0].learned_by == ["b"]


def test_a_task_that_all_its_sites_fail_is_left_out_and_the_rest_is_merged():
    faults = [Fault(A, wire.TRAIN, nth=1, error="no"), Fault(B, wire.TRAIN, nth=1, tamper=BAD["garbage"][0])]
    grid = LocalGrid({A: site("a"), B: site("b")}, faults)
    run = federate(grid, tasks=TASKS, sites_per_task=2, evaluate=False)
    assert [task.task for task in run.merged] == list(TASKS[1:])
    assert [(f["site"], f["task"], f["phase"]) for f in run.history.of("failed")] == [
        ("a", TASKS[0], "train"),
        ("b", TASKS[0], "refused"),
    ]


def test_a_run_in_which_everything_fails_ends_with_the_base():
    run = federate(grid_of(Fault(kind=wire.TRAIN, error="no")), tasks=TASKS)
    assert run.merged == []
    assert run.models["opcm"].merged().names == ()
    assert len(run.history.of("failed")) == 3
    assert run.score("base", 0, TASKS[0]) is not None


def test_a_site_lost_in_the_second_round_has_still_taught_the_first():
    grid = LocalGrid({A: site("a"), B: site("b")}, [Fault(B, wire.TRAIN, nth=2, leaves=True)])
    run = federate(grid, tasks=("plain",), sites_per_task=2, rounds=2, evaluate=False)
    of_a, of_b, again = (sent_vector(reply) for reply in grid.trained())
    half = ROWS // 2
    assert merged_bits(run) == merged_offline([add_vectors(combine([of_a, of_b], [half, half]), again)])
    assert run.merged[0].learned_by == ["a", "b"]


def test_a_second_round_that_all_sites_fail_leaves_what_the_first_moved():
    grid = LocalGrid({A: site("a")}, [Fault(A, wire.TRAIN, nth=2, error="no")])
    run = federate(grid, tasks=("plain",), rounds=2, evaluate=False)
    assert merged_bits(run) == merged_offline(map(sent_vector, grid.trained()))
    assert len(grid.trained()) == 1


# --- hello ---


def hello(**changed):
    def tamper(content: RecordDict) -> RecordDict:
        content[wire.JOB] = ConfigRecord({**content[wire.JOB], **changed})
        return content

    return tamper


def other_base(tmp_path) -> ClientApp:
    """The example stream over a model with other weights."""
    path = tmp_path / "other.py"
    path.write_text(
        "from dataclasses import replace\n"
        "import torch\n"
        "from fedmerge.deploy.streams.example import build_model, example\n"
        "def model():\n"
        "    made = build_model()\n"
        "    with torch.no_grad():\n"
        "        made[0].bias[0] += 1\n"
        "    return made\n"
        "def other(options):\n"
        "    return replace(example(options), build_model=model)\n"
    )
    return site("b", TASKS[1], stream=f"{path}:other")


HELLOS = {
    "another version": (hello(version="9.9.9"), r"b: another version of fedmerge: got 9.9.9"),
    "another base": (hello(base="0" * 64), "b: another pretrained model: got 000000000000"),
    "a number for a base": (hello(base=7), "not a Hello"),
    "a field too many": (hello(more="x"), "not a Hello"),
    "text for a list of tasks": (hello(tasks="plain"), "not a Hello"),
    "no job": (dropping(wire.JOB), "not a Hello"),
}


@pytest.mark.parametrize("case", HELLOS)
def test_a_site_that_does_not_fit_is_refused_at_hello(case, without_b):
    tamper, reason = HELLOS[case]
    grid = grid_of(Fault(B, wire.HELLO, tamper=tamper))
    run = federate(grid, *RULES, tasks=(TASKS[0], TASKS[2]))
    assert_as_without_b(run, without_b)
    ((_, phase, said),) = failures(run, f"node {B}")
    assert phase == "hello"
    assert reason in said
    assert [m.metadata.message_type for m in grid.pushed if m.metadata.dst_node_id == B] == [wire.HELLO]


def test_a_site_with_other_pretrained_weights_is_refused_at_hello(tmp_path, without_b):
    grid = LocalGrid({A: site("a", TASKS[0]), B: other_base(tmp_path), C: site("c", TASKS[2])})
    run = federate(grid, *RULES, tasks=(TASKS[0], TASKS[2]))
    assert_as_without_b(run, without_b)
    ((_, phase, said),) = failures(run, f"node {B}")
    assert (phase, "another pretrained model" in said) == ("hello", True)


def test_a_site_refuses_a_server_with_another_base(tmp_path):
    content = RecordDict({wire.JOB: wire.pack_job(wire.TrainJob(TASKS[0], "0" * 64))})
    grid = LocalGrid({A: site("a")})
    grid.push_messages([Message(content, A, wire.TRAIN)])
    assert "the server merges over another pretrained model" in grid.replies[0].error.reason


def test_a_node_that_never_says_hello_holds_up_neither_start_nor_end(without_b):
    clock = FakeClock(tick=0.01)
    grid = grid_of(Fault(B, wire.HELLO, lost=True), clock=clock)
    run = federate(grid, *RULES, tasks=(TASKS[0], TASKS[2]), clock=clock, wait_seconds=5, timeout_seconds=1e9)
    assert_as_without_b(run, without_b)
    assert failures(run, f"node {B}") == [("", "hello", "no reply within 5 s")]
    assert clock.now < 100


@pytest.mark.parametrize(
    "fault",
    [
        Fault(kind=wire.HELLO, error="no"),
        Fault(kind=wire.HELLO, lost=True),
        Fault(kind=wire.HELLO, leaves=True),
        Fault(kind=wire.HELLO, tamper=hello(version="9.9.9")),
    ],
    ids=["errors", "never answers", "leaves", "another version"],
)
def test_no_usable_site_is_an_error(fault):
    clock = FakeClock(tick=0.01)
    with pytest.raises(ConfigError, match="no site is ready: got 3 connected, none usable"):
        federate(grid_of(fault, clock=clock), tasks=TASKS, clock=clock, wait_seconds=5)
    assert clock.now < 100


# --- scores ---


@pytest.mark.parametrize(
    "fault",
    [
        Fault(B, wire.EVALUATE, error="no"),
        Fault(B, wire.EVALUATE, tamper=dropping(wire.METRICS)),
        Fault(B, wire.EVALUATE, tamper=reporting(f"accuracy/opcm/{TASKS[1]}", math.nan)),
        Fault(B, wire.EVALUATE, tamper=reporting(f"accuracy/opcm/{TASKS[1]}", 7.0)),
        Fault(B, wire.EVALUATE, tamper=reporting(f"examples/opcm/{TASKS[1]}", -3)),
    ],
    ids=["errors", "no metrics", "NaN", "above 1", "negative examples"],
)
def test_a_score_that_is_none_is_missing_and_the_others_stay(fault):
    run = federate(grid_of(fault), tasks=TASKS)
    assert len(run.merged) == 3
    assert run.score("opcm", 3, TASKS[1]) is None
    assert run.score("opcm", 3, TASKS[0]) is not None


def test_a_site_cannot_score_a_task_it_was_not_asked_about():
    def boast(content: RecordDict) -> RecordDict:
        content[wire.METRICS][f"accuracy/opcm/{TASKS[0]}"] = 0.0
        content[wire.METRICS][f"examples/opcm/{TASKS[0]}"] = 10**9
        return content

    whole = federate(grid_of(), tasks=TASKS)
    run = federate(grid_of(Fault(B, wire.EVALUATE, tamper=boast)), tasks=TASKS)
    assert run.score("opcm", 3, TASKS[0]) == whole.score("opcm", 3, TASKS[0])


# --- all at once ---


@pytest.mark.parametrize("seed", range(8))
def test_under_random_faults_the_model_is_that_of_the_updates_let_in(seed):
    draw = random.Random(seed)
    kinds = [
        {"lost": True},
        {"error": "no"},
        {"leaves": True},
        {"delay": draw.uniform(0.1, 8.0)},
        {"tamper": BAD["garbage"][0]},
        {"tamper": BAD["NaN in the last element"][0]},
    ]
    faults = [
        Fault(draw.choice((A, B, C)), wire.TRAIN, draw.randint(1, 2), **draw.choice(kinds)) for _ in range(4)
    ]
    clock = FakeClock(tick=0.01)
    grid = LocalGrid({A: site("a"), B: site("b"), C: site("c")}, faults, clock=clock)
    run = federate(
        grid, *RULES, tasks=TASKS, clock=clock, timeout_seconds=5, sites_per_task=2, wait_seconds=5
    )
    trained = {(event["site"], event["task"]) for event in run.history.of("trained")}
    steps = []
    for task in TASKS:
        let_in = {
            vector.manifest.site: vector
            for vector in admitted(grid)
            if vector.manifest.task == task and (vector.manifest.site, task) in trained
        }
        order = [held.label for held in next(r for r in run.runs if r.task == task).sites]
        vectors = [let_in[label] for label in order if label in let_in]
        if vectors:
            steps.append(combine(vectors, [ROWS // 2] * len(vectors)))
    assert len(run.merged) == len(steps)
    assert (
        len(trained) + len([f for f in run.history.of("failed") if f["phase"] in ("train", "refused")]) == 6
    )
    assert all(merged_bits(run, rule) == merged_offline(steps, rule) for rule in RULES)
    assert run.history.events[-1]["event"] == "finished"


def admitted(grid: LocalGrid) -> list[TaskVector]:
    """Vectors in replies that can be opened; whether they were let in is another question."""
    vectors = []
    for reply in grid.trained():
        data = wire.vector_bytes(reply.content, wire.VECTOR, where="reply")
        if not data.startswith(bytes(range(8))):
            vectors.append(sent_vector(reply))
    return vectors
