"""Requests to sites and their replies: own push and pull, never a barrier.

A node handles one message at a time, so each has a queue here and one message under way, or a few where
the requests allow it. A request that is not answered in time, or whose node has left, ends with a reason
instead of a reply.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from fedmerge.common.errors import FedmergeError

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
FLOWERS_WORDS = "Exception ClientAppException occurred. Message: "
SPARE_SECONDS = 60.0
"""Flower forgets a message this long after we do; asking for one that it has forgotten is an error there."""


@dataclass(frozen=True)
class Request:
    """One message to one node; its content is built when it is sent, and may raise a FedmergeError.

    ``key`` says what it was for when the reply comes; ``timeout`` counts from sending, in seconds.

    Attributes:
        late: seconds after ``timeout`` during which a reply is still taken; it ends the request a second
            time, and the node is sent other messages meanwhile.
        window: how many requests, this one included, may be under way to the node; the smallest counts.
        bulky: its reply is large, so it is fetched in a step without another such reply.
    """

    node: int
    kind: str
    key: Hashable
    content: Callable[[], RecordDict]
    timeout: float
    late: float = 0.0
    window: int = 1
    bulky: bool = False


@dataclass(frozen=True)
class Reply:
    """How a request ended: ``content``, or None and the ``reason``. ``seconds`` since it was sent.

    ``gone``: because the node has left.
    """

    request: Request
    content: RecordDict | None
    reason: str
    seconds: float
    gone: bool = False


class Mailbox:
    """Queues per node over a Flower grid.

    Args:
        on_sent: called with a request and its content when it leaves.
        clock: seconds, monotonic; replaced in tests.
    """

    def __init__(
        self,
        grid: Grid,
        on_sent: Callable[[Request, RecordDict], None] = lambda request, content: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._grid, self._on_sent, self._clock = grid, on_sent, clock
        self._queues: dict[int, deque[Request]] = {}
        self._under_way: dict[str, tuple[Request, float]] = {}
        self._late: dict[str, tuple[Request, float]] = {}

    def nodes(self) -> set[int]:
        """Nodes connected now."""
        return set(self._grid.get_node_ids())

    def names(self) -> dict[int, str]:
        """The name each connected node was registered under; empty where it has none."""
        return {node.node_id: node.name for node in self._grid.get_nodes()}

    def put(self, request: Request, *, first: bool = False) -> None:
        """Queues a request, at the front if ``first``."""
        queue = self._queues.setdefault(request.node, deque())
        (queue.appendleft if first else queue.append)(request)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or under way."""
        return not self._under_way and not self._queues

    def busy(self) -> set[int]:
        """Nodes for which something is queued or under way."""
        return {request.node for request, _ in self._under_way.values()} | set(self._queues)

    def step(self) -> list[Reply]:
        """Sends what can be sent and returns what has ended since the last step."""
        ended = self._send() + self._arrived() + self._expired()
        if ended:
            ended += self._send()
        return ended

    def _send(self) -> list[Reply]:
        windows: dict[int, list[int]] = {}
        for request, _ in self._under_way.values():
            windows.setdefault(request.node, []).append(request.window)
        ready = [node for node, queue in self._queues.items() if _room(windows.get(node, []), queue[0])]
        if not ready:
            return []
        here = self.nodes()
        gone: list[Reply] = []
        for node in ready:
            queue, open_windows = self._queues[node], windows.setdefault(node, [])
            while queue and _room(open_windows, queue[0]):
                request = queue.popleft()
                failed = self._push(request, here)
                if failed:
                    gone.append(failed)
                else:
                    open_windows.append(request.window)
            if not queue:
                del self._queues[node]
        return gone

    def _push(self, request: Request, here: set[int]) -> Reply | None:
        if request.node not in here:
            return Reply(request, None, "the site has left", 0.0, gone=True)
        try:
            content = request.content()
        except FedmergeError as error:
            return Reply(request, None, str(error), 0.0)
        seconds = request.timeout + request.late + SPARE_SECONDS
        message = Message(content, request.node, request.kind, ttl=seconds)
        sent = list(self._grid.push_messages([message]))
        if not sent or not sent[0]:
            return Reply(request, None, "the message was not accepted", 0.0)
        self._under_way[sent[0]] = request, self._clock()
        self._on_sent(request, content)
        return None

    def _arrived(self) -> list[Reply]:
        replies = []
        for message in self._pull():
            # An unreachable node's error does not carry the node's id, so go by the message it answers.
            number = message.metadata.reply_to_message_id
            late = number in self._late
            answered = self._late.pop(number, None) or self._under_way.pop(number, None)
            if answered is None:
                continue  # a second reply to the same message
            request, sent_at = answered
            seconds = self._clock() - sent_at
            if not message.has_error():
                replies.append(Reply(request, message.content, "", seconds))
            elif not late:
                gone = message.error.code == ErrorCode.NODE_UNAVAILABLE
                replies.append(Reply(request, None, _reason(message), seconds, gone))
        return replies

    def _pull(self) -> Iterable[Message]:
        """What has arrived; of bulky replies at most one, so that memory does not grow with the sites."""
        waiting = {**self._late, **self._under_way}
        small = [number for number, (request, _) in waiting.items() if not request.bulky]
        found = list(self._grid.pull_messages(small)) if small else []
        for number, (request, _) in waiting.items():
            if request.bulky and (bulky := list(self._grid.pull_messages([number]))):
                return found + bulky
        return found

    def _expired(self) -> list[Reply]:
        now = self._clock()
        for number, (request, sent_at) in list(self._late.items()):
            if now - sent_at > request.timeout + request.late:
                del self._late[number]
        late = [mid for mid, (request, sent_at) in self._under_way.items() if now - sent_at > request.timeout]
        ended = []
        for number in late:
            request, sent_at = self._under_way.pop(number)
            if request.late:
                self._late[number] = request, sent_at
            reason = f"no reply within {request.timeout:.0f} s"
            ended.append(Reply(request, None, reason, now - sent_at))
        return ended


def _room(windows: list[int], request: Request) -> bool:
    """Whether a request may join those under way to its node."""
    return len(windows) < min([request.window, *windows])


def _reason(message: Message) -> str:
    """What went wrong at the site, in one line, without what Flower and Ray wrap around it."""
    plain = COLOURS.sub("", message.error.reason or "").rpartition(FLOWERS_WORDS)[2]
    lines = [line.strip().removesuffix("'>") for line in plain.splitlines() if line.strip(" '>")]
    return f"error {message.error.code}: {lines[0] if lines else 'no reason given'}"
