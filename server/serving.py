"""A server without rounds: sites come and go, vectors are handed in as they arrive, versions go out.

The loop stands between Flower's sites and an aggregation service, embedded or remote. What it must know
after a restart is in three places: the service knows which tasks it has, every site says in its hello
which version it holds and which results wait there, and the inbox on disk has what came in between.

A site with nothing to do is asked, in this order, to say hello (when it is time), and to take the current
version and to learn a task that the service does not have, whichever of the two it did not do last.
Everything that goes wrong is recorded and tried again, later each time. Nobody waits for anybody else.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedmerge import __version__
from fedmerge.common import wire
from fedmerge.common.errors import BaseMismatch, FedmergeError, Forbidden, MismatchError, Unreachable
from fedmerge.common.names import check_site_name
from fedmerge.common.records import AggregationService
from fedmerge.common.wire import Greeting, Hello
from fedmerge.server.admission import MAX_TASK_CHARS
from fedmerge.server.backing import Backing
from fedmerge.server.history import History
from fedmerge.server.inbox import Inbox
from fedmerge.server.learning import NOTHING_MORE, Learning, RangeAsked, Taught, Teaching, Verdicts
from fedmerge.server.mailbox import Mailbox, Reply, Request
from fedmerge.server.peers import Peer, ServingSettings, Tries
from fedmerge.server.publishing import Offered, Publishing, RangeSent

MAX_TASKS = 10_000
"""Of one site."""

HELLO_SECONDS = 600.0
"""A hello may have to load a large model from a slow disk."""


@dataclass(frozen=True)
class _Hello:
    """What a site was told in a hello."""

    acknowledged: tuple[str, ...]
    refused: tuple[str, ...]


class Serving:
    """Connects the sites of a grid with an aggregation service until it is told to stop.

    Args:
        grid: Flower's.
        base_fingerprint: of the pretrained model the service merges over.
        service: takes updates in and gives versions out.
        settings: see there.
        history: receives every event; a ``Journal`` does not keep them in memory.
        folder: for what has arrived and for versions on their way out; one server at a time.
        clock: seconds, monotonic; replaced in tests.
        teaching: what every site is asked of its learning.
    """

    def __init__(
        self,
        grid: Grid,
        base_fingerprint: str,
        service: AggregationService,
        settings: ServingSettings,
        history: History,
        folder: Path,
        poll_seconds: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
        teaching: Teaching = NOTHING_MORE,
    ) -> None:
        self.base, self.settings, self.history = base_fingerprint, settings, history
        self._poll_seconds, self._clock = poll_seconds, clock
        self._stopping = threading.Event()
        self.peers: dict[int, Peer] = {}
        self._mailbox = Mailbox(grid, self._note_sent, clock, partial(self._fail, "", "", "superlink"))
        self._backing = Backing(service, history, clock)
        self._inbox = Inbox(folder / "inbox")
        self._learning = Learning(
            self._mailbox,
            self._backing,
            self._inbox,
            settings,
            history,
            base_fingerprint,
            clock,
            self._make_hello_due,
            teaching,
        )
        self._publishing = Publishing(
            self._mailbox,
            self._backing,
            settings,
            history,
            folder / "published",
            base_fingerprint,
            clock,
            teaching.training.tangent is not None,
        )
        self._report_at = clock()

    def stop(self) -> None:
        """Ends :meth:`run` soon; may be called from a signal handler or another thread."""
        self._stopping.set()

    def run(self) -> None:
        """Serves until :meth:`stop`. What is under way then is asked for again by the next server."""
        while not self._stopping.is_set():
            if not self.step():
                self._stopping.wait(self._poll_seconds)
        self.history.record("finished", version=self._version())

    def step(self) -> bool:
        """Handles what has come and sends what can be sent; returns whether there may be more at once."""
        replies = self._mailbox.step()
        self._look_around()
        self._backing.look()
        for reply in replies:
            self._take(reply)
        handed_in = self._learning.hand_in()
        busy = self._mailbox.busy()
        for peer in self.peers.values():
            if peer.node not in busy:
                self._next_for(peer)
        self._publishing.tidy(self.peers.values())
        self._report()
        return bool(replies) or handed_in

    def _take(self, reply: Reply) -> None:
        peer = self.peers.get(reply.request.node)
        match reply.request.key:
            case Taught() as taught:
                self._learning.take_result(reply, taught)
            case RangeAsked() as asked:
                self._learning.take_range(reply, asked)
            case _Hello() as hello if peer is not None:
                self._welcome(peer, reply, hello)
            case Offered() as offered if peer is not None:
                self._publishing.take(peer, reply, offered)
            case RangeSent() as sent if peer is not None:
                self._publishing.take_range(peer, reply, sent)

    # --- nodes ---

    def _look_around(self) -> None:
        names = self._mailbox.names()
        for node in set(self.peers) - set(names):
            peer = self.peers.pop(node)
            if peer.site:
                self.history.record("left", site=peer.site)
        for node in sorted(set(names) - set(self.peers)):
            self.peers[node] = Peer(node, names[node], Tries(self.settings.retry_seconds))

    def _next_for(self, peer: Peer) -> None:
        now = self._clock()
        if now >= peer.hello_at:
            self._greet(peer)
        elif peer.site:
            turns = [self._publishing.offer, self._learning.teach]
            # A version on its way in ranges is offered again at once: it only waits for its last word.
            if peer.published_last and peer.offer is None:
                turns.reverse()
            for turn in turns:
                if turn(peer):
                    return

    def _greet(self, peer: Peer) -> None:
        told = self._learning.verdicts.get(peer.site, Verdicts())
        acknowledged, refused = tuple(told.acknowledged), tuple(told.refused)
        key, reasons = _Hello(acknowledged, refused), tuple(told.refused.values())
        greeting = Greeting(__version__, True, not peer.checked, acknowledged, refused, reasons)
        content = RecordDict({wire.JOB: wire.pack_job(greeting)})
        timeout = min(HELLO_SECONDS, self.settings.timeout_seconds)
        self._mailbox.put(Request(peer.node, wire.HELLO, key, lambda: content, timeout))

    def _make_hello_due(self, site: str) -> None:
        for peer in self.peers.values():
            if peer.site == site:
                peer.hello_at = -math.inf

    def _welcome(self, peer: Peer, reply: Reply, told: _Hello) -> None:
        try:
            if reply.content is None:
                raise Unreachable("no hello", where=f"node {peer.node}", got=reply.reason)
            hello = self._checked(peer, reply.content)
        except FedmergeError as error:
            self._turn_away(peer, reply, error)
            return
        joining = not peer.site
        peer.site, peer.tasks, peer.checked = _identity(peer, hello), hello.tasks, True
        peer.holds = hello.holds, hello.model
        peer.hello_at = self._clock() + self.settings.announce_seconds
        if joining:
            self.history.record("joined", site=peer.site, tasks=list(hello.tasks), version=hello.holds)
        self._learning.told(peer.site, told.acknowledged, told.refused)
        self._learning.acknowledge_again(peer.site, hello.waiting)

    def _turn_away(self, peer: Peer, reply: Reply, error: FedmergeError) -> None:
        """A node that does not fit is asked again later; one lost hello is no reason to part from a site."""
        if not reply.gone:
            self._fail(peer.site or f"node {peer.node}", "", "hello", str(error))
        if peer.site and reply.content is None:
            peer.hello_at = self._clock() + self.settings.announce_seconds
            return
        if peer.site:
            self.history.record("left", site=peer.site)
        peer.site, peer.checked = "", False
        peer.hello_at = self._clock() + self.settings.ask_again_seconds

    def _checked(self, peer: Peer, content: RecordDict) -> Hello:
        """The hello of a site that fits. Raises what does not."""
        where = f"node {peer.node}"
        said = content.config_records.get(wire.JOB, ConfigRecord())
        wire.check_version(str(said.get("version")), __version__, where=where)
        hello = wire.unpack_job(Hello, content, where=where)
        if hello.base != self.base:
            raise BaseMismatch(
                "another pretrained model", where=where, got=hello.base[:12], wanted=self.base[:12]
            )
        if self.settings.registered_sites and not peer.name:
            raise Forbidden(
                "not registered under a name", where=where, do="flwr supernode register KEY --name SITE"
            )
        site = _identity(peer, hello)
        check_site_name(site)
        if any(other.site == site for other in self.peers.values() if other is not peer):
            raise Forbidden("another node takes part under this name", where=where, got=site)
        if not peer.name and site in {other.name for other in self.peers.values()}:
            raise Forbidden("another node is registered under this name", where=where, got=site)
        _check_tasks(hello.tasks, where)
        return hello

    # --- the record ---

    def _report(self) -> None:
        now = self._clock()
        if now < self._report_at:
            return
        self._report_at = now + self.settings.report_seconds
        self.history.record(
            "status",
            version=self._version(),
            sites=sum(bool(peer.site) for peer in self.peers.values()),
            nodes=len(self.peers),
            busy=len(self._mailbox.busy()),
            transfers=self._learning.arriving,
            waiting=len(self._inbox.waiting()),
            learned=self._backing.learned,
        )

    def _version(self) -> int | None:
        return self._backing.current.number if self._backing.current else None

    def _note_sent(self, request: Request, content: RecordDict) -> None:
        if request.kind == wire.HELLO:
            return  # every half minute, and of no interest
        peer = self.peers.get(request.node)
        site = peer.site if peer else f"node {request.node}"
        self.history.record("sent", site=site, message=request.kind, bytes_down=wire.bytes_in(content))

    def _fail(self, site: str, task: str, phase: str, reason: str) -> None:
        self.history.record("failed", site=site, task=task, phase=phase, reason=reason)


def _identity(peer: Peer, hello: Hello) -> str:
    """Who a node is to the service: the name its key was registered under, or else its label."""
    return peer.name or hello.site


def _check_tasks(tasks: tuple[str, ...], where: str) -> None:
    if len(tasks) > MAX_TASKS:
        raise MismatchError("too many tasks", where=where, got=len(tasks), wanted=f"at most {MAX_TASKS}")
    for task in tasks:
        if not (0 < len(task) <= MAX_TASK_CHARS and task.isprintable()):
            raise MismatchError(
                "not a task's name",
                where=where,
                got=ascii(task[:80]),
                wanted=f"1 to {MAX_TASK_CHARS} printable characters",
            )
