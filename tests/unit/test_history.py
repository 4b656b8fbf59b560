"""Is everything that is recorded kept in order and readable afterwards?"""

import json

from fedmerge.server.history import History


def test_events_keep_their_order_and_their_facts():
    history = History()
    history.record("sent", site="a", bytes_down=3)
    history.record("failed", site="b", reason="gone")
    history.record("sent", site="b", bytes_down=4)
    assert [event["event"] for event in history.events] == ["sent", "failed", "sent"]
    assert [event["bytes_down"] for event in history.of("sent")] == [3, 4]
    assert history.of("merged") == []
    times = [event["at"] for event in history.events]
    assert times == sorted(times)
    assert times[0] >= 0


def test_the_listener_hears_every_event_as_it_happens():
    heard = []
    history = History(heard.append)
    history.record("joined", site="a")
    assert heard == history.events


def test_a_saved_history_is_one_json_object_per_line(tmp_path):
    history = History()
    history.record("merged", rule="opcm", sites=["a", "β"], lambda_t=1.5, loss=None)
    history.record("finished", versions=1)
    history.save(tmp_path / "history.jsonl")
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == history.events
