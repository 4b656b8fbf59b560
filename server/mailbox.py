"""Requests to sites and their replies: own push and pull, never a barrier.

A node handles one message at a time, so each has a queue here and at most one message under way. A
request that is not answered in time, or whose node has left, ends with a reason instead of a reply.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
FLOWERS_WORDS = "Exception ClientAppException occurred. Message: "


@dataclass(frozen=True)
class Request:
    """One message to one node; its content is built when it is sent.

    ``key`` says what it was for when the reply comes; ``timeout`` counts from sending, in seconds.
    """

    node: int
    kind: str
    key: Hashable
    content: Callable[[], RecordDict]
    timeout: float


@dataclass(frozen=True)
class Reply:
    """How a request ended: ``content``, or None and the ``reason``. ``seconds`` since it was sent."""

    request: Request
    content: RecordDict | None
    reason: str
    seconds: float


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

    def nodes(self) -> set[int]:
        """Nodes connected now."""
        return set(self._grid.get_node_ids())

    def put(self, request: Request, *, first: bool = False) -> None:
        """Queues a request, at the front if ``first``."""
        queue = self._queues.setdefault(request.node, deque())
        (queue.appendleft if first else queue.append)(request)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or under way."""
        return not self._under_way and not any(self._queues.values())

    def step(self) -> list[Reply]:
        """Sends what can be sent and returns what has ended since the last step."""
        ended = self._send() + self._arrived() + self._expired()
        if ended:
            ended += self._send()
        return ended

    def _send(self) -> list[Reply]:
        busy = {request.node for request, _ in self._under_way.values()}
        ready = [node for node, queue in self._queues.items() if queue and node not in busy]
        if not ready:
            return []
        here = self.nodes()
        gone: list[Reply] = []
        for node in ready:
            request = self._queues[node].popleft()
            if node not in here:
                gone.append(Reply(request, None, "the site has left", 0.0))
                continue
            content = request.content()
            message = Message(content, node, request.kind, ttl=max(request.timeout, 1.0))
            sent = list(self._grid.push_messages([message]))
            if not sent:
                gone.append(Reply(request, None, "the message was not accepted", 0.0))
                continue
            self._under_way[sent[0]] = request, self._clock()
            self._on_sent(request, content)
        return gone

    def _arrived(self) -> list[Reply]:
        if not self._under_way:
            return []
        replies = []
        for message in self._grid.pull_messages(list(self._under_way)):
            # An unreachable node's error does not carry the node's id, so go by the message it answers.
            answered = self._under_way.pop(message.metadata.reply_to_message_id, None)
            if answered is None:
                continue  # a second reply to the same message
            request, sent_at = answered
            seconds = self._clock() - sent_at
            if message.has_error():
                replies.append(Reply(request, None, _reason(message), seconds))
            else:
                replies.append(Reply(request, message.content, "", seconds))
        return replies

    def _expired(self) -> list[Reply]:
        now = self._clock()
        late = [mid for mid, (request, sent_at) in self._under_way.items() if now - sent_at > request.timeout]
        return [
            Reply(request, None, f"no reply within {request.timeout:.0f} s", now - sent_at)
            for request, sent_at in (self._under_way.pop(mid) for mid in late)
        ]


def _reason(message: Message) -> str:
    """What went wrong at the site, in one line, without what Flower and Ray wrap around it."""
    plain = COLOURS.sub("", message.error.reason or "").rpartition(FLOWERS_WORDS)[2]
    lines = [line.strip().removesuffix("'>") for line in plain.splitlines() if line.strip(" '>")]
    return f"error {message.error.code}: {lines[0] if lines else 'no reason given'}"
