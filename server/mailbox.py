"""Requests to sites and their replies: own push and pull, never a barrier.

A node handles one message at a time, so each has a queue here and one message under way, or a few where
the requests allow it. A request that is not answered in time, or whose node has left, ends with a reason
instead of a reply. While the SuperLink fails, requests stay in their queues, and it is asked less and less
often.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import TypeVar

import httpx
from flwr.app import Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError

from fedmerge.common.errors import FedmergeError
from fedmerge.server.peers import Tries

logger = logging.getLogger("fedmerge.server")

SUPERLINK_ERRORS = (httpx.HTTPError, ObjectPushError)
"""What a grid raises when the SuperLink cannot do its work, as while its database is locked."""
FIRST_WAIT, LONGEST_WAIT = 2.0, 60.0
"""Seconds until a SuperLink that has failed is asked again."""

Answer = TypeVar("Answer")

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
        on_failure: called with what is wrong whenever the SuperLink fails.
    """

    def __init__(
        self,
        grid: Grid,
        on_sent: Callable[[Request, RecordDict], None] = lambda request, content: None,
        clock: Callable[[], float] = time.monotonic,
        on_failure: Callable[[str], object] = logger.warning,
    ) -> None:
        self._grid, self._on_sent, self._clock, self._on_failure = grid, on_sent, clock, on_failure
        self._pushing, self._pulling = Tries(FIRST_WAIT, LONGEST_WAIT), Tries(FIRST_WAIT, LONGEST_WAIT)
        self._names: dict[int, str] = {}
        self._queues: dict[int, deque[Request]] = {}
        self._under_way: dict[str, tuple[Request, float]] = {}
        self._late: dict[str, tuple[Request, float]] = {}

    def nodes(self) -> set[int]:
        """Nodes connected now, or when the SuperLink last answered."""
        return set(self.names())

    def names(self) -> dict[int, str]:
        """The name each connected node was registered under; empty where it has none."""
        nodes = self._ask(self._pulling, lambda: list(self._grid.get_nodes()))
        if nodes is not None:
            self._names = {node.node_id: node.name for node in nodes}
        return self._names

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
        if not ready or self._waiting(self._pushing):
            return []
        here = self.nodes()
        gone: list[Reply] = []
        for node in ready:
            queue, open_windows = self._queues[node], windows.setdefault(node, [])
            while queue and _room(open_windows, queue[0]) and not self._waiting(self._pushing):
                request = queue.popleft()
                failed = self._push(request, here)
                if failed:
                    gone.append(failed)
                elif self._waiting(self._pushing):
                    queue.appendleft(request)
                else:
                    open_windows.append(request.window)
            if not queue:
                del self._queues[node]
        return gone

    def _push(self, request: Request, here: set[int]) -> Reply | None:
        """How a request ended that cannot be sent; None if it is under way, or the SuperLink failed."""
        if request.node not in here:
            return Reply(request, None, "the site has left", 0.0, gone=True)
        try:
            content = request.content()
        except FedmergeError as error:
            return Reply(request, None, str(error), 0.0)
        seconds = request.timeout + request.late + SPARE_SECONDS
        message = Message(content, request.node, request.kind, ttl=seconds)
        sent = self._ask(self._pushing, lambda: list(self._grid.push_messages([message])))
        if sent is None:
            return None
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
        found = self._pulled(small) if small else []
        for number, (request, _) in waiting.items():
            if request.bulky and (bulky := self._pulled([number])):
                return found + bulky
        return found

    def _pulled(self, numbers: list[str]) -> list[Message]:
        return self._ask(self._pulling, lambda: list(self._grid.pull_messages(numbers))) or []

    def _waiting(self, tries: Tries) -> bool:
        """Whether the SuperLink has failed and is not to be asked now."""
        return self._clock() < tries.at

    def _ask(self, tries: Tries, question: Callable[[], Answer]) -> Answer | None:
        """What the SuperLink answers; None if it fails, or is not to be asked now."""
        if self._waiting(tries):
            return None
        try:
            answer = question()
        except SUPERLINK_ERRORS as error:
            tries.failed(self._clock())
            self._on_failure(f"the SuperLink failed: {error}")
            return None
        tries.worked()
        return answer

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
