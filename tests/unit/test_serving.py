"""Does a server that never ends learn every task once, and keep every site up to date?"""

import json
import threading

import pytest
from flwr.app import ConfigRecord
from local_grid import Fault, LocalGrid, sent_vector, site
from serving_bench import Bench

from fedmerge.client.site import Site, open_site
from fedmerge.common import wire
from fedmerge.common.config import validated
from fedmerge.common.errors import ConfigError
from fedmerge.common.vectorfile import load, to_bytes
from fedmerge.deploy.streams.example import TASKS, TEST_ROWS
from fedmerge.server.history import History
from fedmerge.server.journal import Journal
from fedmerge.server.peers import ServingSettings
from fedmerge.server.serving import Serving

A, B, C = 11, 12, 13

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def bench(tmp_path) -> Bench:
    return Bench(tmp_path)


# --- learning ---


def test_every_task_of_every_site_is_learned_once(bench):
    bench.join(A, "a", "plain", "shuffled")
    bench.join(B, "b", "plain")
    bench.until(lambda: len(bench.learned()) == 3)
    bench.settle()
    assert sorted(bench.learned()) == [("a", "plain"), ("a", "shuffled"), ("b", "plain")]
    assert bench.sent(wire.TRAIN) == 3
    assert bench.of("failed") == []


def test_what_the_service_gets_is_what_the_site_sent(bench):
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    assert bench.service.files[1] == to_bytes(sent_vector(bench.grid.trained()[0]))


def test_a_site_that_joins_late_is_served_next(bench):
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    bench.join(B, "b", "shuffled")
    bench.until(lambda: len(bench.learned()) == 2)
    assert [event["site"] for event in bench.of("joined")] == ["a", "b"]


def test_a_task_that_a_site_adds_is_learned_after_its_next_hello(bench, tmp_path):
    stream = tmp_path / "growing.py"
    stream.write_text(
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from fedmerge.deploy.streams.example import example\n"
        "def tasks(options):\n"
        "    listed = Path(__file__).with_name('list').read_text().split()\n"
        "    return replace(example(options), tasks=tuple(listed))\n"
    )
    (tmp_path / "list").write_text("plain")
    bench.join(A, "a", stream=f"{stream}:tasks")
    bench.until(bench.learned)
    bench.settle()
    (tmp_path / "list").write_text("plain reversed")
    bench.until(lambda: len(bench.learned()) == 2)
    assert bench.learned() == [("a", "plain"), ("a", "reversed")]


def test_sites_do_not_wait_for_each_other(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, delay=2000.0))
    bench.join(A, "a", "plain")
    bench.join(B, "b", "plain", "shuffled", "reversed")
    bench.until(lambda: len(bench.learned()) == 3)
    assert {name for name, _ in bench.learned()} == {"b"}
    bench.until(lambda: ("a", "plain") in bench.learned())


def test_a_hello_is_repeated_as_often_as_told_and_only_to_idle_sites(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.TRAIN, delay=300.0), announce_seconds=60)
    bench.join(A, "a", "plain")
    bench.join(B, "b", "shuffled")
    bench.step(56)
    assert bench.sent(wire.HELLO, A) == 1
    assert bench.sent(wire.HELLO, B) == 6  # one more than every minute: it is told what became of its task


def test_only_the_first_hello_loads_the_model(tmp_path, monkeypatch):
    bench, opened, really = Bench(tmp_path, Fault(kind=wire.TRAIN, error="not today")), [], open_site
    monkeypatch.setattr("fedmerge.client.config.open_site", lambda *of: opened.append(of) or really(*of))
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.sent(wire.HELLO) == 4)
    assert len(opened) == 1


# --- who is who ---


def test_a_site_is_who_its_key_was_registered_as_whatever_it_calls_itself(bench):
    bench.join(A, "b", "plain", name="hospital-a")
    bench.join(B, "b", "plain", name="hospital-b")
    bench.until(lambda: len(bench.learned()) == 2)
    assert {name for name, _ in bench.learned()} == {"hospital-a", "hospital-b"}


def test_two_nodes_cannot_take_part_under_one_name(bench):
    bench.join(A, "a", "plain")
    bench.join(B, "a", "shuffled")
    bench.settle()
    assert bench.learned() == [("a", "plain")]
    assert bench.failures("hello") == [
        (f"node {B}", f"node {B}: another node takes part under this name: got a")
    ]


def test_a_label_does_not_give_the_name_of_a_registered_node(tmp_path):
    bench = Bench(tmp_path, Fault(A, wire.HELLO, nth=1, error="busy"))
    bench.join(A, "x", "plain", name="hospital-a")
    bench.join(B, "hospital-a", "shuffled")
    bench.settle()
    assert bench.learned() == []
    assert "another node is registered under this name" in bench.failures("hello")[1][1]


def test_the_name_is_free_again_when_its_node_has_left(tmp_path):
    bench = Bench(tmp_path, ask_again_seconds=100)
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    bench.join(B, "a", "plain", "shuffled")
    bench.step(3)
    bench.grid.leave(A)
    bench.until(lambda: len(bench.learned()) == 2)
    assert bench.learned() == [("a", "plain"), ("a", "shuffled")]
    assert [event["site"] for event in bench.of("left")] == ["a"]


def test_where_names_are_required_a_node_without_one_is_refused(tmp_path):
    bench = Bench(tmp_path, registered_sites=True)
    bench.join(A, "a", "plain")
    bench.join(B, "b", "plain", name="b")
    bench.settle()
    assert bench.learned() == [("b", "plain")]
    assert "not registered under a name" in bench.failures("hello")[0][1]


@pytest.mark.parametrize("label", ["", "../up", "a b", "-a", "x" * 65, "ä"])
def test_a_label_that_is_no_sites_name_is_refused(tmp_path, label):
    def tamper(content):
        content[wire.JOB] = ConfigRecord({**content[wire.JOB], "site": label})
        return content

    bench = Bench(tmp_path, Fault(A, wire.HELLO, tamper=tamper))
    bench.join(A, "a", "plain")
    bench.settle()
    assert bench.learned() == []
    assert bench.failures("hello") != []


# --- versions ---


def test_every_site_gets_the_current_version_and_keeps_it(bench):
    bench.join(A, "a", "plain")
    bench.join(B, "b", "shuffled")
    bench.until(lambda: len(bench.learned()) == 2)
    bench.settle()
    for label in "ab":
        assert bench.state(label).held.number == 2
        assert bench.state(label).merged.read_bytes() == bench.service.files[2]
        assert len(list((bench.folder / label).glob("merged-*"))) == 1


def test_versions_that_a_site_missed_are_not_sent(tmp_path):
    bench = Bench(tmp_path, Fault(B, wire.TRAIN, delay=1000.0))
    bench.join(A, "a", *TASKS)
    bench.join(B, "b", "plain")
    bench.until(lambda: len(bench.learned()) == 3)
    bench.until(lambda: bench.state("b").held.number == 4)
    assert [event["version"] for event in bench.of("published", site="b")] == [4]


def test_a_site_that_is_up_to_date_is_sent_nothing_when_it_comes_back(bench):
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.state("a").held.number == 1)
    bench.settle()
    bench.grid.leave(A)
    bench.step(2)
    bench.join(B, "a", "plain")
    bench.settle()
    assert bench.sent(wire.PUBLISH, B) == 0
    assert bench.sent(wire.TRAIN, B) == 0
    assert bench.of("joined")[-1]["version"] == 1


def test_a_site_that_comes_late_gets_the_current_version_before_it_learns(bench):
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    bench.join(B, "b", "shuffled")
    bench.until(lambda: len(bench.learned()) == 2)
    kinds = [m.metadata.message_type for m in bench.grid.pushed if m.metadata.dst_node_id == B]
    assert kinds.index(wire.PUBLISH) < kinds.index(wire.TRAIN)


def test_a_stream_of_versions_does_not_keep_a_site_from_learning(bench):
    bench.join(A, "a", *TASKS)

    def another_version() -> bool:
        bench.service.release(bench.service.files.get(1, b"") + b" " * bench.service.released[-1].number)
        return len(bench.learned()) == 3

    bench.service.fetch = lambda into, version=None, dtype="f32": (
        into.write_bytes(bench.service.files[1]) and bench.service.version(version)
    )
    bench.until(bench.learned)
    bench.until(another_version)


def test_another_version_under_the_same_number_is_sent(bench):
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.state("a").held.number == 1)
    other = bench.service.files[1].replace(b'"plain"', b'"other"')
    assert other != bench.service.files[1]
    bench.service.released.pop()
    bench.service.release(other)
    bench.until(lambda: bench.state("a").merged.read_bytes() == other)


def test_a_version_is_scored_on_the_tasks_a_site_holds(tmp_path):
    bench = Bench(tmp_path, evaluate=True)
    bench.join(A, "a", "plain", "reversed")
    bench.join(B, "b", "shuffled")
    bench.until(lambda: len(bench.learned()) == 3 and bench.of("evaluated", site="a", version=3))
    event = bench.of("evaluated", site="a", version=3)[0]
    assert set(event["accuracy"]) == {"plain", "reversed"}
    assert event["examples"] == {"plain": TEST_ROWS, "reversed": TEST_ROWS}
    assert all(0 <= accuracy <= 1 for accuracy in event["accuracy"].values())


def test_without_evaluation_nothing_is_scored(bench):
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.state("a").held.number == 1)
    bench.settle()
    assert bench.of("evaluated") == []


def test_files_of_old_versions_do_not_pile_up(bench):
    bench.join(A, "a", *TASKS)
    bench.until(lambda: bench.state("a").held.number == 3)
    bench.step()
    assert len(list((bench.folder / "server" / "published").iterdir())) == 1
    assert list((bench.folder / "server" / "inbox").iterdir()) == []


# --- large vectors ---

SMALL = {"max_message_bytes": 1000, "range_bytes": 2000}


def test_large_vectors_travel_in_ranges_both_ways_bit_for_bit(tmp_path):
    bench = Bench(tmp_path, **SMALL)
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.state("a").held.number == 1)
    assert bench.state("a").merged.read_bytes() == bench.service.files[1]
    size = len(bench.service.files[1])
    ranges = -(-size // 2000)
    assert (bench.sent(wire.GET_SHARD), bench.sent(wire.PUT_SHARD)) == (ranges, ranges)
    assert max(wire.bytes_in(m.content) for m in [*bench.grid.pushed, *bench.grid.replies]) == 2000
    assert bench.of("received")[0]["bytes_up"] == size
    assert load(bench.state("a").merged).manifest.task == "plain"


def test_a_large_and_a_small_message_give_the_same_bytes(tmp_path):
    whole, ranged = Bench(tmp_path / "1"), Bench(tmp_path / "2", **SMALL)
    for bench in (whole, ranged):
        bench.join(A, "a", "plain")
        bench.until(bench.learned)
    assert whole.service.files[1] == ranged.service.files[1]


def test_at_most_two_ranges_are_under_way(tmp_path):
    bench = Bench(tmp_path, Fault(kind=wire.GET_SHARD, delay=20.0), **SMALL)
    bench.join(A, "a", "plain")
    most = 0
    while not bench.learned():
        bench.step()
        answered = sum(m.metadata.message_type == wire.GET_SHARD for m in bench.grid.pushed)
        waiting = sum(bool(replies) for replies in bench.grid._waiting.values())
        most = max(most, waiting if answered else 0)
    assert most == 2


@pytest.mark.parametrize("key", ["max-message-bytes", "range-bytes"])
def test_a_message_above_what_flower_takes_cannot_be_asked_for(key):
    with pytest.raises(ConfigError, match=r"less than or equal to 512000000"):
        validated(ServingSettings, {key.replace("-", "_"): 512_000_001})


def test_an_update_above_the_limit_is_refused_before_a_byte_of_it_travels(tmp_path):
    bench = Bench(tmp_path, max_update_bytes=5000, **SMALL)
    bench.join(A, "a", "plain")
    bench.step(4)
    assert "an update that is too large" in bench.failures("refused")[0][1]
    assert bench.sent(wire.GET_SHARD) == 0


def test_a_version_that_has_arrived_in_ranges_is_installed_before_the_next_task_is_learned(tmp_path):
    bench = Bench(tmp_path, **SMALL)
    bench.join(A, "a", "plain", "reversed")
    bench.until(lambda: len(bench.learned()) == 2)
    events = [e["event"] for e in bench.history.events if e["event"] in ("trained", "published")]
    assert events == ["trained", "published", "trained"]


# --- what the site keeps ---


def test_a_result_is_kept_until_the_server_says_that_it_has_it(bench):
    bench.join(A, "a", "plain")
    bench.until(bench.grid.trained)
    assert [result.task for result in bench.state("a").results()] == ["plain"]
    bench.until(lambda: not list(bench.state("a").results()))
    assert list((bench.folder / "a" / "outbox").iterdir()) == []


def test_a_result_that_the_server_already_has_is_forgotten_after_a_restart(bench):
    bench.join(A, "a", "plain")
    bench.until(bench.learned)
    assert list(bench.state("a").results())
    bench.restart()
    bench.until(lambda: not list(bench.state("a").results()))
    assert bench.sent(wire.TRAIN) == 1


def test_a_site_without_a_folder_is_told_what_it_lacks(tmp_path):
    bench = Bench(tmp_path)
    bench.grid.join(A, site("a", "plain"))
    bench.settle()
    ((_, reason),) = bench.failures("hello")
    assert "no folder to keep versions and results in" in reason
    assert "--node-config" in reason


# --- the record ---


def test_the_history_has_the_events_of_a_run_with_an_end(tmp_path):
    bench = Bench(tmp_path, evaluate=True)
    bench.join(A, "a", "plain")
    bench.until(lambda: bench.of("evaluated"))
    bench.server.stop()
    bench.server.run()
    assert [event["event"] for event in bench.history.events if event["event"] not in ("sent", "status")] == [
        "version",
        "joined",
        "trained",
        "acknowledged",
        "version",
        "published",
        "evaluated",
        "finished",
    ]
    (trained,) = bench.of("trained")
    assert trained["bytes_up"] == wire.bytes_in(bench.grid.trained()[0].content)
    assert {"site", "task", "examples", "seconds", "train_seconds", "score_seconds", "loss"} <= set(trained)


def test_how_things_are_is_told_again_and_again(tmp_path):
    bench = Bench(tmp_path, report_seconds=50)
    bench.join(A, "a", "plain")
    bench.step(41)
    status = bench.of("status")
    assert len(status) == 5
    assert (status[-1]["version"], status[-1]["sites"], status[-1]["learned"]) == (1, 1, 1)


def test_a_journal_keeps_nothing_in_memory_and_everything_on_disk(tmp_path):
    heard = []
    journal = Journal(tmp_path / "deep" / "history.jsonl", heard.append)
    for turn in range(3):
        journal.record("turned", turn=turn)
    journal.close()
    lines = [json.loads(line) for line in (tmp_path / "deep" / "history.jsonl").read_text().splitlines()]
    assert [line["turn"] for line in lines] == [0, 1, 2]
    assert lines == heard
    assert journal.events == []


def test_a_full_journal_drops_the_oldest_events(tmp_path, monkeypatch):
    monkeypatch.setattr("fedmerge.server.journal.FILE_BYTES", 1000)
    journal = Journal(tmp_path / "history.jsonl")
    for turn in range(200):
        journal.record("turned", turn=turn)
    journal.close()
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000
    assert '"turn": 199' in (tmp_path / "history.jsonl").read_text()


def test_it_stops_when_it_is_told_from_another_thread(tmp_path):
    bench = Bench(tmp_path)
    server = Serving(
        LocalGrid({}), "", bench.service, ServingSettings(), History(), tmp_path / "other", poll_seconds=3600
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    server.stop()
    thread.join(timeout=30)
    assert not thread.is_alive()
    assert server.history.events[-1]["event"] == "finished"


def test_a_training_is_not_repeated_for_an_answer_that_came_twice(tmp_path, monkeypatch):
    trainings = []
    learn = Site.learn
    monkeypatch.setattr(Site, "learn", lambda self, *a, **k: trainings.append(1) or learn(self, *a, **k))
    bench = Bench(tmp_path, Fault(kind=wire.TRAIN, twice=True))
    bench.join(A, "a", "plain")
    bench.settle()
    assert (len(trainings), bench.learned()) == (1, [("a", "plain")])
