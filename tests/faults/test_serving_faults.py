"""Whatever happens to sites, messages, the server or the aggregator: is every task merged exactly once?

F8 and the faults around it, at the level of a server without rounds. A restart is a new server over the
same folder and the same service, which remembers nothing else.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import httpx
import pytest
from flwr.app import ConfigRecord, RecordDict
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from local_grid import Fault, vector_in
from serving_bench import STEP_SECONDS, Bench

from fedmerge.client.site import Site
from fedmerge.client.state import SiteState
from fedmerge.common import wire
from fedmerge.common.errors import (
    Busy,
    Duplicate,
    Forbidden,
    NonFinite,
    NotKept,
    QuotaExceeded,
    StoreFull,
    TooLarge,
    Unreachable,
)
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.deploy.streams.example import TASKS
from fedmerge.server.peers import WINDOW

A, B, C = 11, 12, 13
SMALL = {"max_message_bytes": 1000, "range_bytes": 2000}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def trainings(monkeypatch) -> list[tuple[str, str]]:
    """(site, task) of every fine-tuning that sites really do."""
    done, learn = [], Site.learn

    def counted(self, task, **options):
        done.append((options["site"], task.name))
        return learn(self, task, **options)

    monkeypatch.setattr(Site, "learn", counted)
    return done


def dropping(key: str):
    def tamper(content: RecordDict) -> RecordDict:
        del content[key]
        return content

    return tamper


def saying(**changed):
    """A reply whose job record has other values."""

    def tamper(content: RecordDict) -> RecordDict:
        content[wire.JOB] = ConfigRecord({**content[wire.JOB], **changed})
        return content

    return tamper


# --- nodes that leave, replies that do not come ---


def test_a_site_that_leaves_while_it_learns_is_taught_when_it_is_back(tmp_path, trainings):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, nth=1, leaves=True))
    bench.join(A, "a", "plain")
    bench.join(B, "b", "shuffled")
    bench.until(lambda: bench.learned() == [("b", "shuffled")])
    bench.settle()
    assert [event["site"] for event in bench.of("left")] == ["a"]
    bench.join(A, "a", "plain")
    bench.until(lambda: len(bench.learned()) == 2)
    assert trainings == [("b", "shuffled"), ("a", "plain")]


def test_leaving_however_often_does_not_use_up_a_tasks_attempts(tmp_path):
    bench = Bench(tmp_path, *(Fault(A, wire.TRAIN, nth=n, leaves=True) for n in range(1, 5)), attempts=1)
    for turn in range(1, 5):
        bench.join(A, "a", "plain")
        bench.until(lambda turn=turn: bench.sent(wire.TRAIN) == turn and not bench.server.peers)
    bench.join(A, "a", "plain")
    bench.until(bench.learned)


def test_a_reply_that_is_lost_is_asked_for_again_and_the_site_does_not_train_again(tmp_path, trainings):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, nth=1, lost=True), timeout_seconds=100)
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    assert (bench.sent(wire.TRAIN), trainings) == (2, [("a", "plain")])
    assert bench.failures("train") == [("a", "no reply within 100 s")]


def test_a_reply_that_comes_after_its_time_is_still_handed_in(tmp_path, trainings):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, nth=1, delay=150.0), timeout_seconds=100, retry_seconds=3000)
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    bench.settle(700)
    assert (bench.sent(wire.TRAIN), bench.learned(), trainings) == (1, [("a", "plain")], [("a", "plain")])


def test_a_late_reply_and_its_repetition_are_one_update(tmp_path, trainings):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, nth=1, delay=400.0), timeout_seconds=100, retry_seconds=30)
    bench.join(A, "a", "plain")
    bench.settle(200)
    assert bench.sent(wire.TRAIN) == 2
    assert (bench.learned(), trainings) == ([("a", "plain")], [("a", "plain")])


def test_a_reply_later_than_that_is_not_waited_for(tmp_path):
    bench = Bench(
        tmp_path,
        Fault(A, wire.TRAIN, nth=1, delay=400.0),
        timeout_seconds=100,
        late_seconds=200,
        retry_seconds=3600,
    )
    bench.join(A, "a", "plain")
    bench.settle(200)
    assert bench.learned() == []


def test_a_lost_hello_does_not_part_a_site_from_the_server(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.HELLO, nth=2, lost=True), Fault(A, wire.HELLO, nth=3, error="no"))
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.sent(wire.HELLO) == 5)
    assert (len(bench.of("joined")), bench.of("left")) == (1, [])


# --- trainings that fail ---


def test_a_training_that_fails_is_tried_again_later_each_time_and_at_last_given_up(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, error="no data"), attempts=4, retry_seconds=40)
    times = []
    bench.join(A, "a", "plain")
    for _ in range(400):
        before = bench.sent(wire.TRAIN)
        bench.step()
        times += [bench.clock.now] * (bench.sent(wire.TRAIN) - before)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(times) == 4
    assert all(wait <= gap <= wait + 3 * STEP_SECONDS for wait, gap in zip((40, 80, 160), gaps, strict=True))
    assert bench.failures("given up") == [("a", "4 attempts")]


def test_a_task_that_fails_does_not_keep_others_from_being_learned(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, nth=1, error="no data"))
    bench.join(A, "a", *TASKS)
    bench.until(lambda: len(bench.learned()) == 3)
    assert [task for _, task in bench.learned()] == [*TASKS[1:], TASKS[0]]


# --- refusals ---


@pytest.mark.parametrize("error", [NonFinite("NaN"), Duplicate("a copy"), TooLarge("too large")], ids=str)
def test_a_refusal_is_told_to_the_site_and_tried_again_a_few_times(tmp_path, error, trainings):
    bench = Bench(tmp_path, attempts=3)
    bench.service.errors["submit"] = [error] * 9
    bench.join(A, "a", "plain")
    bench.settle(400)
    assert bench.failures("refused") == [("a", str(error))] * 3
    assert len(trainings) == 3  # what was refused is not answered with again
    lines = (bench.folder / "a" / "refusals.jsonl").read_text().splitlines()
    assert [json.loads(line)["reason"] for line in lines] == [str(error)] * 3
    assert {json.loads(line)["task"] for line in lines} == {"plain"}
    assert list(bench.state("a").results()) == []


def garbage(content: RecordDict) -> RecordDict:
    content[wire.VECTOR] = wire.pack_vector(bytes(range(256)) * 4)
    return content


def of_another_task(content: RecordDict) -> RecordDict:
    vector = vector_in(content).in_memory()
    manifest = type(vector.manifest)(**{**vars(vector.manifest), "task": "somebody else's"})
    layers = dict(vector.items())
    content[wire.VECTOR] = wire.pack_vector(to_bytes(TaskVector.of(layers, vector.unchanged, manifest)))
    return content


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (garbage, "the header is too long"),
        (dropping(wire.VECTOR), "no task vector under 'task-vector'"),
        (of_another_task, "the site sent a vector for another task"),
    ],
    ids=["garbage", "nothing", "another task"],
)
def test_what_is_no_answer_is_recorded_and_asked_for_again(tmp_path, tamper, reason):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, nth=1, tamper=tamper))
    bench.join(A, "a", "plain")
    bench.until(lambda: ("a", "plain") in bench.learned())
    ((_, said),) = bench.failures("refused")
    assert reason in said


# --- hellos that do not fit ---


@pytest.mark.parametrize(
    ("tamper", "reason"),
    [
        (saying(version="9.9.9"), "another version of fedmerge: got 9.9.9"),
        (saying(version="9.9.9", more=1), "another version of fedmerge: got 9.9.9"),
        (saying(base="0" * 64), "another pretrained model"),
        (saying(base=7), "not a Hello"),
        (saying(holds="all"), "not a Hello"),
        (saying(waiting=[1]), "not a Hello"),
        (saying(more="x"), "not a Hello"),
        (saying(tasks=["two\nlines"]), "not a task's name"),
        (saying(tasks=["x" * 201]), "not a task's name"),
        (saying(tasks=["x"] * 10_001), "too many tasks"),
        (dropping(wire.JOB), "another version of fedmerge: got None"),
    ],
)
def test_a_site_that_does_not_fit_is_refused_and_asked_again_later(tmp_path, tamper, reason):
    bench = Bench(tmp_path, *(Fault(A, wire.HELLO, nth=n, tamper=tamper) for n in (1, 2)))
    bench.join(A, "a", "plain")
    bench.step(100)
    assert bench.sent(wire.HELLO) == 1
    assert bench.sent(wire.TRAIN) == 0
    assert reason in bench.failures("hello")[0][1]
    bench.until(bench.learned)
    assert len(bench.failures("hello")) == 2


def test_a_site_that_no_longer_fits_takes_no_further_part(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.HELLO, nth=3, tamper=saying(version="9.9.9")))
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.of("left"))
    assert [event["site"] for event in bench.of("left")] == ["a"]
    bench.join(B, "b", "shuffled")
    bench.until(lambda: bench.state("b").held.number == 2)
    assert bench.state("a").held.number == 1
    bench.until(lambda: bench.state("a").held.number == 2)  # it was asked again and fits again
    assert len(bench.of("joined", site="a")) == 2


# --- the aggregator ---


@pytest.mark.parametrize("error", [Unreachable("connection refused"), StoreFull("no space left")], ids=str)
def test_while_the_aggregator_is_away_sites_work_on_and_nothing_is_lost(tmp_path, error, trainings):
    bench = Bench(tmp_path)
    bench.join(A, "a", *TASKS)
    bench.until(lambda: len(bench.learned()) == 1)
    bench.service.down = error
    bench.until(lambda: len(trainings) == 3)
    bench.settle()
    assert len(list((tmp_path / "server" / "inbox").glob("*.json"))) == 2
    bench.service.down = None
    bench.until(lambda: len(bench.learned()) == 3)
    bench.until(lambda: bench.state("a").held.number == 3)
    assert len(trainings) == 3
    assert bench.of("reached") != []


def test_an_aggregator_that_is_away_is_asked_less_and_less_often(tmp_path):
    bench = Bench(tmp_path)
    bench.service.down = Unreachable("connection refused")
    bench.step(200)
    assert 15 <= len(bench.failures("aggregator")) <= 22
    assert bench.sent(wire.TRAIN) == 0


def test_nothing_is_taught_before_it_is_known_what_the_aggregator_has(tmp_path):
    bench = Bench(tmp_path)
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    bench.service.down = Unreachable("connection refused")
    bench.restart()
    bench.settle()
    bench.service.down = None
    bench.settle(200)
    assert bench.sent(wire.TRAIN) == 1


@pytest.mark.parametrize(
    "error", [Busy("full"), QuotaExceeded("enough for now"), Forbidden("revoked")], ids=str
)
def test_an_update_that_is_not_taken_now_is_kept_and_handed_in_later(tmp_path, error, trainings):
    bench = Bench(tmp_path)
    bench.service.errors["submit"] = [error]
    bench.join(A, "a", "plain")
    bench.until(bench.learned, steps=1000)
    waited = bench.of("acknowledged")[0], bench.failures("submit")
    assert waited[1] == [("a", str(error))]
    assert trainings == [("a", "plain")]


@pytest.mark.parametrize("error", [NotKept("retention"), StoreFull("damaged")], ids=str)
def test_a_version_that_cannot_be_had_is_left_out_and_the_next_one_is_sent(tmp_path, error):
    bench = Bench(tmp_path)
    bench.service.errors["fetch"] = [error]
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    bench.settle()
    bench.join(B, "b", "shuffled")
    bench.until(lambda: bench.state("a").held.number == 2)
    assert bench.failures("fetch" if isinstance(error, NotKept) else "aggregator") == [("", str(error))]


# --- the server ---


def test_a_server_killed_before_the_answer_asks_again_and_the_site_does_not_train_again(tmp_path, trainings):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, nth=1, delay=1000.0))
    bench.join(A, "a", "plain")
    bench.until(lambda: trainings)
    bench.restart()
    bench.until(bench.learned)
    assert trainings == [("a", "plain")]


def test_what_had_arrived_when_the_server_was_killed_is_handed_in_without_the_site(tmp_path):
    bench = Bench(tmp_path)
    bench.join(A, "a", "plain")
    bench.service.errors["submit"] = [Unreachable("connection refused")]
    bench.until(lambda: bench.of("trained"))
    bench.grid.leave(A)
    bench.restart()
    bench.until(bench.learned)
    assert bench.learned() == [("a", "plain")]


def test_a_server_killed_after_the_acknowledgement_learns_that_it_was_given(tmp_path, trainings):
    bench = Bench(tmp_path)
    bench.join(A, "a", "plain")
    bench.service.crash_after = True
    with pytest.raises(SystemExit):
        bench.settle()
    bench.restart()
    bench.settle()
    assert [event["again"] for event in bench.of("acknowledged")] == [True]
    assert (bench.learned(), trainings) == ([("a", "plain")], [("a", "plain")])
    assert list(bench.state("a").results()) == []


def test_half_of_what_an_earlier_server_wrote_is_ignored(tmp_path):
    bench = Bench(tmp_path)
    inbox = tmp_path / "server" / "inbox"
    (inbox / "0123.json").write_text("{")
    (inbox / "4567.json").write_text('{"site": "a", "task": "plain", "sha256": "0"}')
    (inbox / "89ab.safetensors").write_bytes(b"half")
    bench.restart()
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    assert bench.of("failed") == []


# --- the SuperLink ---

LOCKED = httpx.HTTPStatusError(
    "database is locked", request=httpx.Request("POST", "http://link"), response=httpx.Response(500)
)
CUT_SHORT = ObjectPushError("0" * 64, 1, "session")
CALLS = ("get_nodes", "push_messages", "pull_messages")


class Killed(BaseException):
    """The ServerApp ends here, without a chance to put anything in order."""


@contextmanager
def each_call(bench: Bench, before: Callable[[str], None], after: Callable[[str], None]) -> Iterator[None]:
    """Something happens before, and something after, every call that reaches the grid."""

    def watched(name: str, call: Callable):
        def called(*args):
            before(name)
            answer = call(*args)
            after(name)
            return answer

        return called

    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(bench.grid, name, watched(name, getattr(bench.grid, name)))
        yield


def nothing(_: str) -> None: ...


def done(bench: Bench) -> bool:
    return bench.learned() == [("a", "plain")] and bench.state("a").held.number == 1


@pytest.mark.parametrize("error", [LOCKED, CUT_SHORT], ids=["locked", "cut short"])
def test_a_superlink_that_fails_every_third_time_only_delays_a_transfer(tmp_path, error, trainings):
    bench = Bench(tmp_path, **SMALL)
    bench.join(A, "a", "plain")
    struck, calls = [], Counter()

    def fail(name: str) -> None:
        calls[name] += 1
        if calls[name] % 3 == 0:
            struck.append(name)
            raise error

    with each_call(bench, fail, nothing):
        bench.until(lambda: done(bench), steps=2000)
    assert set(struck) == set(CALLS)
    assert len(bench.failures("superlink")) == len(struck)
    assert trainings == [("a", "plain")]
    assert bench.state("a").merged.read_bytes() == bench.service.files[1]


@pytest.mark.parametrize("kind", [wire.GET_SHARD, wire.PUT_SHARD])
def test_a_range_whose_push_fails_after_it_has_left_does_no_harm(tmp_path, kind, trainings):
    bench = Bench(tmp_path, **SMALL)
    bench.join(A, "a", "plain")
    failures = [CUT_SHORT]

    def fail(name: str) -> None:
        if name == "push_messages" and bench.sent(kind) == 2 and failures:
            raise failures.pop()

    with each_call(bench, nothing, fail):
        bench.until(lambda: done(bench))
    assert not failures
    sent = indexes(bench, kind)
    assert sent == [0, 1, *range(1, len(sent) - 1)]
    assert trainings == [("a", "plain")]


def test_a_superlink_that_fails_is_asked_less_and_less_often_and_uses_up_no_attempt(tmp_path):
    bench = Bench(tmp_path, attempts=1)
    bench.join(A, "a", "plain")
    bench.step(3)
    asked = []

    def fail(name: str) -> None:
        asked.append(name)
        raise LOCKED

    with each_call(bench, fail, nothing):
        bench.step(120)
    assert 20 <= len(asked) <= 32
    bench.until(bench.learned)


def test_a_run_that_has_ended_is_not_taken_for_a_superlink_that_fails(tmp_path):
    bench = Bench(tmp_path)

    def ended(name: str) -> None:
        raise RuntimeError("the run has ended")

    with each_call(bench, ended, nothing), pytest.raises(RuntimeError, match="the run has ended"):
        bench.step()


# --- transfers ---


def indexes(bench: Bench, kind: str) -> list[int]:
    return [m.content[wire.JOB]["index"] for m in bench.grid.pushed if m.metadata.message_type == kind]


@pytest.mark.parametrize(
    "fault",
    [
        {"lost": True},
        {"error": "disk"},
        {"tamper": dropping(wire.RANGE)},
        {"tamper": lambda content: RecordDict({wire.RANGE: wire.pack_vector(b"other bytes")})},
    ],
    ids=["lost", "error", "nothing in it", "other bytes"],
)
def test_only_the_range_that_did_not_come_is_asked_for_again(tmp_path, fault, trainings):
    bench = Bench(tmp_path, Fault(A, wire.GET_SHARD, nth=2, **fault), timeout_seconds=100, **SMALL)
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    first = indexes(bench, wire.GET_SHARD)
    assert first == [*range(len(first) - 1), 1]
    assert trainings == [("a", "plain")]


@pytest.mark.parametrize("fault", [{"lost": True}, {"error": "disk"}], ids=["lost", "error"])
def test_only_the_range_that_did_not_arrive_is_sent_again(tmp_path, fault):
    # Of the lost ones the site has the bytes, and says so: nothing is sent twice.
    bench = Bench(tmp_path, Fault(A, wire.PUT_SHARD, nth=2, **fault), timeout_seconds=100, **SMALL)
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.state("a").held.number == 1)
    sent = indexes(bench, wire.PUT_SHARD)
    again = [] if fault.get("lost") else [1]
    assert sent == [*range(len(sent) - len(again)), *again]
    assert bench.state("a").merged.read_bytes() == bench.service.files[1]


def killed_at_call(bench: Bench, number: int) -> bool:
    """Lets a server work until it is killed right after so many calls; False if it was done before that."""
    calls = []

    def kill(name: str) -> None:
        calls.append(name)
        if len(calls) == number:
            raise Killed

    with each_call(bench, nothing, kill):
        try:
            bench.until(lambda: done(bench))
        except Killed:
            return True
    return False


def test_killed_after_any_call_a_server_in_a_transfer_sends_what_was_under_way_again(tmp_path, trainings):
    """Besides the window, that is a range that had come and was not on the disk yet."""
    number = 0
    while True:
        number += 1
        trainings.clear()
        bench = Bench(tmp_path / str(number), **SMALL)
        bench.join(A, "a", "plain")
        killed = killed_at_call(bench, number)
        bench.restart()
        bench.until(lambda bench=bench: done(bench))
        assert trainings == [("a", "plain")]
        assert bench.state("a").merged.read_bytes() == bench.service.files[1]
        for kind in (wire.GET_SHARD, wire.PUT_SHARD):
            sent = indexes(bench, kind)
            assert set(sent) == set(range(max(sent) + 1))
            assert len(sent) <= max(sent) + 1 + WINDOW + 1
        if not killed:
            break
    assert number > 20


def test_that_a_killed_server_forgets_what_had_arrived_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmerge.common.ranges._read_record", lambda path: None)
    bench = Bench(tmp_path, max_message_bytes=1000, range_bytes=1000)
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.sent(wire.GET_SHARD) >= 6)
    bench.restart()
    bench.until(bench.learned)
    sent = indexes(bench, wire.GET_SHARD)
    assert len(sent) > max(sent) + 1 + WINDOW + 1


def test_a_lost_range_is_not_waited_for_as_long_as_a_training(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.GET_SHARD, nth=2, lost=True), timeout_seconds=36_000, **SMALL)
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    assert bench.clock.now < 300


@pytest.mark.parametrize("kind", [wire.GET_SHARD, wire.PUT_SHARD])
def test_a_transfer_goes_on_after_a_restart_of_the_server(tmp_path, kind, trainings):
    bench = Bench(tmp_path, **SMALL)
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.sent(kind) >= 4)
    bench.restart()
    bench.until(lambda: bench.state("a").held.number == 1)
    sent = indexes(bench, kind)
    assert set(sent) == set(range(max(sent) + 1))
    assert len(sent) <= max(sent) + 1 + WINDOW  # at most those that were under way are sent again
    assert (bench.learned(), trainings) == ([("a", "plain")], [("a", "plain")])
    assert bench.state("a").merged.read_bytes() == bench.service.files[1]


def test_a_site_that_leaves_in_a_transfer_gets_the_rest_when_it_is_back(tmp_path, trainings):
    bench = Bench(
        tmp_path,
        Fault(A, wire.GET_SHARD, nth=3, leaves=True),
        Fault(A, wire.PUT_SHARD, nth=4, leaves=True),
        **SMALL,
    )
    for _ in range(3):
        bench.join(A, "a", "plain")
        bench.until(lambda: not bench.server.peers or bench.state("a").held.number == 1)
        bench.settle()
    assert bench.state("a").merged.read_bytes() == bench.service.files[1]
    assert trainings == [("a", "plain")]
    for kind in (wire.GET_SHARD, wire.PUT_SHARD):
        assert len(indexes(bench, kind)) <= max(indexes(bench, kind)) + 1 + WINDOW


def test_a_version_on_its_way_is_finished_before_a_newer_one_is_begun(tmp_path):
    bench = Bench(tmp_path, Fault(B, wire.PUT_SHARD, delay=60.0), Fault(B, wire.TRAIN, error="no"), **SMALL)
    bench.join(A, "a", *TASKS)
    bench.join(B, "b", "plain")
    bench.until(lambda: len(bench.learned()) == 3)
    bench.until(lambda: bench.state("b").held.number == 3)
    versions = [event["version"] for event in bench.of("published", site="b")]
    assert len(versions) == 2
    assert versions[-1] == 3


def test_a_bit_that_flips_at_the_site_while_a_version_arrives_is_found_and_mended(tmp_path):
    bench = Bench(tmp_path, **SMALL)
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.sent(wire.PUT_SHARD) >= 3)
    part = tmp_path / "a" / "incoming.part"
    damaged = bytearray(part.read_bytes())
    damaged[100] ^= 1
    part.write_bytes(damaged)
    bench.until(lambda: bench.state("a").held.number == 1)
    assert bench.state("a").merged.read_bytes() == bench.service.files[1]
    assert indexes(bench, wire.PUT_SHARD).count(0) == 2


@pytest.mark.parametrize(
    "changed",
    [{"hashes": ["0" * 64]}, {"size": 0}, {"size": 10**12}, {"sha256": "no"}, {"range_bytes": 10**12}],
    ids=str,
)
def test_a_manifest_that_lies_is_refused_and_asks_for_nothing(tmp_path, changed):
    def tamper(content: RecordDict) -> RecordDict:
        content[wire.MANIFEST] = ConfigRecord({**content[wire.MANIFEST], **changed})
        return content

    bench = Bench(tmp_path, Fault(A, wire.TRAIN, nth=1, tamper=tamper), **SMALL)
    bench.join(A, "a", "plain")
    bench.step(4)
    assert (len(bench.failures("refused")), bench.sent(wire.GET_SHARD)) == (1, 0)
    bench.until(bench.learned)


def test_a_manifest_for_other_bytes_never_becomes_an_update(tmp_path):
    def tamper(content: RecordDict) -> RecordDict:
        content[wire.MANIFEST] = ConfigRecord({**content[wire.MANIFEST], "sha256": "0" * 64})
        return content

    bench = Bench(tmp_path, Fault(A, wire.TRAIN, tamper=tamper), attempts=3, **SMALL)
    bench.join(A, "a", "plain")
    bench.settle(200)
    assert bench.learned() == []
    assert bench.failures("given up") == [("a", "3 attempts")]


@pytest.mark.parametrize(
    "tamper",
    [
        dropping(wire.JOB),
        saying(missing=[99]),
        saying(missing=[-1]),
        saying(holds="all"),
        saying(missing="x"),
    ],
    ids=["no job", "a range too many", "below zero", "no number", "no list"],
)
def test_an_answer_to_a_version_that_is_none_is_recorded_and_the_version_sent_again(tmp_path, tamper):
    bench = Bench(tmp_path, Fault(A, wire.PUBLISH, nth=1, tamper=tamper))
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    bench.until(lambda: bench.failures("publish"))
    bench.join(B, "b", "shuffled")
    bench.until(lambda: bench.state("a").held.number == 2)


def test_a_site_that_cannot_take_a_version_is_asked_less_and_less_often(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.PUBLISH, error="no space left"))
    bench.join(A, "a", "plain")
    bench.step(400)
    assert 4 <= bench.sent(wire.PUBLISH) <= 8
    assert len(bench.learned()) == 1


# --- all at once ---


def stormy(bench: Bench, draw: random.Random) -> None:
    """Three sites, three tasks each, under faults, restarts and an aggregator that comes and goes."""
    everybody_joins(bench)
    for _ in range(40):
        bench.step(draw.randint(1, 8))
        action = draw.choice(["restart", "away", "back", "leave", "join", "nothing"])
        if action == "restart":
            bench.restart()
        elif action == "away":
            bench.service.down = Unreachable("connection refused")
        elif action == "back":
            bench.service.down = None
        elif action == "leave":
            bench.grid.leave(draw.choice((A, B, C)))
        elif action == "join":
            everybody_joins(bench)
    bench.service.down = None
    bench.restart()


def everybody_joins(bench: Bench) -> bool:
    for node, label in ((A, "a"), (B, "b"), (C, "c")):
        bench.join(node, label, *TASKS)
    return True


def faults_of(draw: random.Random) -> list[Fault]:
    kinds = (wire.HELLO, wire.TRAIN, wire.PUBLISH, wire.GET_SHARD, wire.PUT_SHARD)
    effects = [{"lost": True}, {"error": "no"}, {"leaves": True}, {"twice": True}]
    return [
        Fault(
            draw.choice((A, B, C)),
            draw.choice(kinds),
            draw.randint(1, 6),
            **draw.choice([*effects, {"delay": draw.uniform(10, 600)}]),
        )
        for _ in range(10)
    ]


WANTED = sorted((label, task) for label in "abc" for task in TASKS)


def weathers(folder, seed: int, trainings: list[tuple[str, str]]) -> list[str]:
    """What is wrong after a storm, as a list of words; empty if nothing is."""
    print(f"seed {seed}")
    draw = random.Random(seed)
    size = {"max_message_bytes": 3000, "range_bytes": 4000} if seed % 2 else {}
    bench = Bench(folder, *faults_of(draw), timeout_seconds=200, attempts=50, **size)
    stormy(bench, draw)
    bench.until(lambda: everybody_joins(bench) and len(bench.learned()) >= 9, steps=3000)
    for _ in range(12):
        everybody_joins(bench)
        bench.settle(40)
    current = bench.service.version()
    wrong = [] if sorted(bench.learned()) == WANTED else ["updates"]
    wrong += [] if sorted(trainings) == WANTED else ["trainings"]
    for label in "abc":
        held = bench.state(label)
        wrong += [] if (held.held.number, held.held.model) == (current.number, current.sha256) else ["held"]
        wrong += [] if held.merged and held.merged.read_bytes() == bench.service.files[9] else ["bytes"]
        wrong += ["outbox"] if list(held.results()) else []
    wrong += ["inbox"] if list((folder / "server" / "inbox").glob("*.json")) else []
    return wrong


@pytest.mark.parametrize("seed", range(4))
def test_after_any_storm_every_task_is_merged_once_and_every_site_up_to_date(tmp_path, seed, trainings):
    assert weathers(tmp_path, seed, trainings) == []


def test_the_storm_finds_a_site_that_forgets_its_results(tmp_path, monkeypatch, trainings):
    monkeypatch.setattr(SiteState, "result", lambda self, task, key: None)

    def found(seed: int) -> list[str]:
        trainings.clear()
        return weathers(tmp_path / str(seed), seed, trainings)

    assert any("trainings" in found(seed) for seed in range(6))
