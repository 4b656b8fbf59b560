"""Does every request end exactly once, with a reply or a reason, and no node get two messages at a time?"""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from local_grid import FakeClock, Fault, LocalGrid

from fedmerge.common.errors import FileError
from fedmerge.server.mailbox import Mailbox, Request

TIMEOUT = 10.0


def echo() -> ClientApp:
    """Answers with what it was sent."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: object) -> Message:
        return Message(RecordDict({"echo": message.content["ask"]}), reply_to=message)

    return app


def request(
    node: int, key: str, built: list[str] | None = None, timeout: float = TIMEOUT, **options: object
) -> Request:
    def content() -> RecordDict:
        (built if built is not None else []).append(key)
        return RecordDict({"ask": ConfigRecord({"key": key})})

    return Request(node, "train", key, content, timeout, **options)


def mailbox(*faults: Fault, nodes=(11, 12)) -> tuple[Mailbox, LocalGrid, FakeClock]:
    clock = FakeClock()
    grid = LocalGrid({node: echo() for node in nodes}, faults, clock=clock)
    return Mailbox(grid, clock=clock), grid, clock


def drained(box: Mailbox) -> list:
    replies = []
    while not box.idle:
        replies += box.step()
    return replies


def test_a_reply_comes_back_with_its_request():
    box, _, _ = mailbox()
    box.put(request(11, "a"))
    assert not box.idle
    (reply,) = box.step()
    assert (reply.request.key, reply.content["echo"]["key"], reply.reason) == ("a", "a", "")
    assert box.idle
    assert box.step() == []


def test_a_node_has_at_most_one_message_under_way():
    box, grid, clock = mailbox(Fault(11, delay=5.0))
    for key in "abc":
        box.put(request(11, key))
    for sent in (1, 2, 3):
        assert box.step() == []
        assert box.step() == []
        assert len(grid.pushed) == sent
        clock.now += 5.0
        (reply,) = box.step()
        assert reply.request.key == "abc"[sent - 1]
        assert reply.seconds == 5.0


def test_the_next_message_leaves_in_the_step_that_brings_the_reply():
    box, grid, _ = mailbox()
    box.put(request(11, "a"))
    box.put(request(11, "b"))
    box.step()
    assert len(grid.pushed) == 2


def test_nodes_do_not_wait_for_each_other():
    box, _, clock = mailbox(Fault(11, delay=5.0))
    box.put(request(11, "slow"))
    box.put(request(12, "quick"))
    assert [reply.request.key for reply in box.step()] == ["quick"]
    clock.now += 5.0
    assert [reply.request.key for reply in box.step()] == ["slow"]


def test_a_request_put_first_overtakes_those_that_wait():
    box, _, _ = mailbox()
    for key in "ab":
        box.put(request(11, key))
    box.put(request(11, "urgent"), first=True)
    assert [reply.request.key for reply in drained(box)] == ["urgent", "a", "b"]


def test_content_is_built_when_it_is_sent_and_shown_to_the_listener():
    clock, built, seen = FakeClock(), [], []
    grid = LocalGrid({11: echo()}, [Fault(11, delay=5.0)], clock=clock)
    box = Mailbox(grid, lambda asked, content: seen.append((asked.key, content["ask"]["key"])), clock)
    for key in "ab":
        box.put(request(11, key, built))
    box.step()
    assert built == ["a"]
    assert seen == [("a", "a")]


def test_a_request_without_an_answer_ends_after_its_time():
    box, _, clock = mailbox(Fault(11, nth=1, lost=True))
    box.put(request(11, "a"))
    box.put(request(11, "b"))
    assert box.step() == []
    clock.now += TIMEOUT
    assert box.step() == []
    clock.now += 0.5
    reply, *rest = box.step() + box.step()
    assert (reply.request.key, reply.content, reply.reason) == ("a", None, "no reply within 10 s")
    assert reply.seconds == TIMEOUT + 0.5
    assert [later.request.key for later in rest] == ["b"]


def test_a_reply_after_the_time_is_ignored():
    box, _, clock = mailbox(Fault(11, nth=1, delay=TIMEOUT + 5))
    box.put(request(11, "a"))
    box.step()
    clock.now += TIMEOUT + 1
    (reply,) = box.step()
    assert reply.content is None
    clock.now += 10
    assert box.step() == []
    box.put(request(11, "b"))
    assert [later.content["echo"]["key"] for later in drained(box)] == ["b"]


def test_the_time_counts_from_sending_not_from_waiting():
    box, _, clock = mailbox(Fault(11, delay=TIMEOUT - 1))
    for key in "ab":
        box.put(request(11, key))
    replies = []
    for _ in range(3):
        replies += box.step()
        clock.now += TIMEOUT - 1
    assert [(reply.request.key, reply.reason) for reply in replies] == [("a", ""), ("b", "")]


def test_an_error_is_told_by_its_first_line():
    box, _, _ = mailbox(Fault(11, error="ValueError: no data\nTraceback ..."))
    box.put(request(11, "a"))
    (reply,) = box.step()
    assert (reply.content, reply.reason) == (None, "error 2: ValueError: no data")


@pytest.mark.parametrize(
    "reason",
    [
        "<class 'ClientAppException'>:<'\nException ClientAppException occurred. Message: disk gone'>",
        "<class 'RayTaskError'>:<'\x1b[36mray::run()\x1b[39m (pid=7)\n  File \"a.py\"\nClientAppException: \n"
        "Exception ClientAppException occurred. Message: disk gone\n'>",
    ],
)
def test_an_error_is_told_without_what_flower_wraps_around_it(reason: str):
    box, _, _ = mailbox(Fault(11, error=reason))
    box.put(request(11, "a"))
    (reply,) = drained(box)
    assert reply.reason == "error 2: disk gone"


def test_a_node_that_leaves_while_it_works_is_known_by_the_message_it_answers():
    box, grid, _ = mailbox(Fault(12, leaves=True))
    box.put(request(11, "a"))
    box.put(request(12, "b"))
    replies = {reply.request.key: reply for reply in box.step()}
    assert grid.replies[1].metadata.src_node_id == 1
    assert replies["a"].reason == ""
    assert replies["b"].reason == "error 5: Node Unavailable"


def test_a_node_gone_before_sending_gets_nothing():
    box, grid, _ = mailbox()
    built: list[str] = []
    box.put(request(99, "a", built))
    (reply,) = box.step()
    assert (reply.content, reply.reason) == (None, "the site has left")
    assert (grid.pushed, built) == ([], [])


def test_a_message_that_flower_does_not_take_ends_with_a_reason():
    box, grid, _ = mailbox()
    grid.push_messages = lambda messages: []
    box.put(request(11, "a"))
    (reply,) = box.step()
    assert reply.reason == "the message was not accepted"


def test_a_second_reply_to_the_same_message_is_ignored():
    box, grid, _ = mailbox()
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [reply for reply in pull(ids) for _ in range(2)]
    box.put(request(11, "a"))
    assert [reply.request.key for reply in box.step()] == ["a"]
    assert box.idle


@pytest.mark.parametrize("nodes", [(), (11,), (11, 12)])
def test_it_knows_who_is_connected(nodes):
    box, _, _ = mailbox(nodes=nodes)
    assert box.nodes() == set(nodes)
    assert box.idle


# --- several messages under way ---


def test_as_many_messages_are_under_way_as_the_requests_allow():
    box, grid, clock = mailbox(Fault(11, delay=5.0))
    for key in "abcde":
        box.put(request(11, key, window=2))
    sent = []
    while not box.idle:
        box.step()
        sent.append(len(grid.pushed))
        clock.now += 5.0
    assert sent == [2, 4, 5, 5]


def test_a_request_that_wants_the_node_for_itself_waits_until_it_is_alone_and_lets_nobody_join():
    box, grid, clock = mailbox(Fault(11, delay=5.0))
    box.put(request(11, "a", window=2))
    box.put(request(11, "alone"))
    box.put(request(11, "b", window=2))
    box.step()
    assert len(grid.pushed) == 1
    clock.now += 5.0
    assert [reply.request.key for reply in box.step()] == ["a"]
    assert len(grid.pushed) == 2
    box.step()
    assert len(grid.pushed) == 2
    clock.now += 5.0
    box.step()
    assert len(grid.pushed) == 3


def test_a_node_is_busy_while_anything_is_queued_or_under_way():
    box, _, clock = mailbox(Fault(11, delay=5.0))
    box.put(request(11, "a"))
    assert box.busy() == {11}
    box.step()
    assert box.busy() == {11}
    clock.now += 5.0
    box.step()
    assert box.busy() == set()


def test_of_bulky_replies_one_is_taken_at_a_time_and_small_ones_do_not_wait_for_it():
    box, _, _ = mailbox(nodes=(11, 12, 13))
    box.put(request(11, "a", bulky=True))
    box.put(request(12, "b", bulky=True))
    box.put(request(13, "small"))
    assert [reply.request.key for reply in box.step()] == ["small", "a"]
    assert [reply.request.key for reply in box.step()] == ["b"]


def test_a_bulky_reply_that_does_not_come_holds_up_no_other():
    box, _, _ = mailbox(Fault(11, lost=True))
    box.put(request(11, "a", bulky=True))
    box.put(request(12, "b", bulky=True))
    assert [reply.request.key for reply in box.step()] == ["b"]


# --- late replies ---


def late_box(delay: float, **fault: object) -> tuple[Mailbox, LocalGrid, FakeClock]:
    box, grid, clock = mailbox(Fault(11, nth=1, delay=delay, **fault))
    box.put(request(11, "a", late=20.0))
    box.step()
    clock.now += TIMEOUT + 1
    (reply,) = box.step()
    assert reply.reason == "no reply within 10 s"
    return box, grid, clock


def test_a_late_reply_ends_its_request_a_second_time_and_holds_up_nothing():
    box, _, clock = late_box(25.0)
    assert box.idle
    box.put(request(11, "b"))
    assert [reply.request.key for reply in box.step()] == ["b"]
    clock.now += 14
    (reply,) = box.step()
    assert (reply.request.key, reply.content["echo"]["key"], reply.seconds) == ("a", "a", 25.0)
    assert box.step() == []


def test_a_reply_that_is_later_than_that_is_ignored_and_no_longer_asked_for():
    box, grid, clock = late_box(31.0)
    clock.now += 20
    box.step()
    asked = []
    grid.pull_messages = lambda ids: asked.extend(ids) or []
    assert box.step() == []
    assert asked == []


def test_an_error_that_comes_late_says_nothing_new():
    box, _, clock = late_box(15.0, error="no")
    clock.now += 10
    assert box.step() == []


def test_flower_keeps_a_message_longer_than_it_is_asked_for():
    box, grid, _ = mailbox()
    box.put(request(11, "a", late=20.0))
    box.step()
    assert grid.pushed[0].metadata.ttl > TIMEOUT + 20


# --- what cannot be sent ---


def test_content_that_cannot_be_built_ends_the_request_with_the_reason():
    def content() -> RecordDict:
        raise FileError("has gone", where="version 3")

    box, grid, _ = mailbox()
    box.put(Request(11, "train", "a", content, TIMEOUT))
    (reply,) = box.step()
    assert (reply.content, reply.reason, reply.gone) == (None, "version 3: has gone", False)
    assert grid.pushed == []


def test_a_message_that_flower_gives_no_number_ends_with_a_reason():
    box, grid, _ = mailbox()
    grid.push_messages = lambda messages: [None]
    box.put(request(11, "a"))
    (reply,) = box.step()
    assert reply.reason == "the message was not accepted"


@pytest.mark.parametrize(
    ("fault", "gone"), [({"leaves": True}, True), ({"error": "no"}, False), ({"lost": True}, False)]
)
def test_a_reply_tells_whether_it_is_missing_because_the_node_has_left(fault, gone):
    box, _, clock = mailbox(Fault(11, **fault))
    box.put(request(11, "a"))
    replies = box.step()
    clock.now += TIMEOUT + 1
    (reply,) = replies or box.step()
    assert reply.gone == gone
    box.put(request(99, "b"))
    assert [reply.gone for reply in box.step()] == [True]


def test_it_knows_what_nodes_are_registered_as():
    grid = LocalGrid({11: echo(), 12: echo()}, names={12: "hospital"})
    assert Mailbox(grid).names() == {11: "", 12: "hospital"}
