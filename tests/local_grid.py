"""A Flower grid in this process: ClientApps run when a message is pushed; faults are put at exact messages.

    grid = LocalGrid({1: site("a"), 2: site("b")}, [Fault(2, "train", nth=1, leaves=True)])

No SuperLink and no Ray, so a whole federated run takes well under a second. With a :class:`FakeClock` in
grid and federation, delays and time-outs pass without anybody waiting for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedmerge.client.app import make_client_app
from fedmerge.client.config import SiteConfig
from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.deploy.streams.example import build_model
from fedmerge.server.admission import LIMITS, Limits
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.federation import Federation
from fedmerge.server.history import History
from fedmerge.server.layout import FederationConfig
from fedmerge.server.merge import make_rule
from fedmerge.server.model import GlobalModel
from fedmerge.server.standing import Checkpoints

SERVER = 1
"""Flower's node id of the server."""

ROWS = 64
"""Training rows per task: enough to learn the example stream's tasks, few enough to be quick."""


class FakeClock:
    """Seconds that pass by being looked at: every reading is ``tick`` later than the one before."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self._tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self._tick
        return self.now


@dataclass(frozen=True)
class Fault:
    """What happens to a node's messages.

    Attributes:
        node, kind: whose messages of which type; None is any.
        nth: only the so-manieth message of that type to that node, from 1; None is every one.
        lost: it is never answered. ``error``: the node answers with this error.
        leaves: the node goes away while it works; Flower answers for it, under its own id.
        delay: seconds until the reply can be pulled, by the grid's clock. ``twice``: it comes twice.
        tamper: what becomes of the reply's content.
    """

    node: int | None = None
    kind: str | None = None
    nth: int | None = None
    lost: bool = False
    error: str = ""
    leaves: bool = False
    delay: float = 0.0
    twice: bool = False
    tamper: Callable[[RecordDict], RecordDict] | None = None

    def strikes(self, message: Message, number: int) -> bool:
        to = message.metadata
        return (
            self.node in (None, to.dst_node_id)
            and self.kind in (None, to.message_type)
            and self.nth in (None, number)
        )


class LocalGrid(Grid):
    """Nodes and their ClientApps by node id.

    Args:
        apps: connected from the start. ``faults``: all that strike a message take effect.
        late: node id to (messages pushed before it connects, its ClientApp).
        clock: of delays; one that stands still delivers nothing that is delayed.
        config: node configs by node id. ``names``: what nodes are registered as, by node id.

    Attributes:
        pushed, replies: every message that left, and every reply that was made, in order.
    """

    def __init__(
        self,
        apps: Mapping[int, ClientApp],
        faults: Sequence[Fault] = (),
        *,
        late: Mapping[int, tuple[int, ClientApp]] | None = None,
        clock: Callable[[], float] | None = None,
        config: Mapping[int, dict[str, str | int | float | bool]] | None = None,
        names: Mapping[int, str] | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, SERVER
        self._apps, self._late, self._faults = dict(apps), dict(late or {}), faults
        self._clock = clock or FakeClock()
        self._config, self._names = config or {}, dict(names or {})
        self._contexts: dict[int, Context] = {}
        self._run = Run.create_empty(run_id=1)
        self._ids = count(1)
        self._seen: Counter[tuple[int, str]] = Counter()
        self._waiting: dict[str, list[tuple[float, Message]]] = {}
        self.pushed: list[Message] = []
        self.replies: list[Message] = []

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *_args: object, **_named: object) -> Message:
        raise NotImplementedError("deprecated in Flower")

    def get_node_ids(self) -> Iterable[int]:
        for node, (messages, app) in list(self._late.items()):
            if len(self.pushed) >= messages:
                self._apps[node] = app
                del self._late[node]
        return list(self._apps)

    def get_nodes(self) -> Iterable[NodeInfo]:
        return [NodeInfo(node_id=node, name=self._names.get(node, "")) for node in self.get_node_ids()]

    def join(self, node: int, app: ClientApp, name: str = "") -> None:
        """Connects a node, now or again."""
        self._apps[node], self._names[node] = app, name

    def leave(self, node: int) -> None:
        """Disconnects a node, if it is connected."""
        self._apps.pop(node, None)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        now = self._clock()
        found = []
        for number in message_ids:
            replies = self._waiting.get(number, [])
            if replies and replies[0][0] <= now:
                found.append(replies.pop(0)[1])
        return found

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def trained(self) -> list[Message]:
        """The replies to training requests that carry content, as they were made."""
        return [r for r in self.replies if r.metadata.message_type == wire.TRAIN and not r.has_error()]

    def _push(self, message: Message) -> str:
        to = message.metadata
        to.__dict__["_message_id"] = str(next(self._ids))
        self.pushed.append(message)
        self._seen[to.dst_node_id, to.message_type] += 1
        number = self._seen[to.dst_node_id, to.message_type]
        faults = [fault for fault in self._faults if fault.strikes(message, number)]
        reply = self._answer(message, faults)
        if not any(fault.lost for fault in faults):
            self.replies.append(reply)
            due = self._clock() + sum(fault.delay for fault in faults)
            times = 2 if any(fault.twice for fault in faults) else 1
            self._waiting[to.message_id] = [(due, reply)] * times
        return to.message_id

    def _answer(self, message: Message, faults: Sequence[Fault]) -> Message:
        node = message.metadata.dst_node_id
        if node not in self._apps or any(fault.leaves for fault in faults):
            self._apps.pop(node, None)
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = SERVER  # as the SuperLink does
            return reply
        for fault in faults:
            if fault.error:
                return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, fault.error), reply_to=message)
        reply = self._run_app(message)
        for fault in faults:
            if fault.tamper is not None and not reply.has_error():
                reply.content = fault.tamper(reply.content)
        return reply

    def _run_app(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = self._contexts.setdefault(
            node, Context(1, node, dict(self._config.get(node, {})), RecordDict(), {})
        )
        TaskIdentity.node_id = node
        try:
            return self._apps[node](message, context)
        except Exception as error:
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{error!r}"), reply_to=message)
        finally:
            TaskIdentity.node_id = SERVER


def site(
    label: str, *tasks: str, stream: str = "example", rows: int = ROWS, state: Path | None = None
) -> ClientApp:
    """A real ClientApp over the example stream that says it holds ``tasks``; all if none are named."""
    config = SiteConfig(stream, label, tasks, rows=rows, device="cpu", state=state, sketch_seed=0)
    return make_client_app(config)


def federate(
    grid: Grid,
    *rules: str,
    clock: FakeClock | None = None,
    base: Base | None = None,
    limits: Limits = LIMITS,
    checkpoints: Checkpoints | None = None,
    **layout: object,
) -> Federation:
    """A whole run over a grid's sites, each rule merged in this process."""
    base = base or Base.from_model(build_model())
    time = {"clock": clock} if clock else {}
    engines = {
        name: LocalEngine(make_rule(name), base.layers.values(), workers=1) for name in rules or ("opcm",)
    }
    models = {name: GlobalModel(base, engine) for name, engine in engines.items()}
    settings = {"wait_seconds": 1.0} | layout
    federation = Federation(
        grid,
        base,
        models,
        FederationConfig(**settings),
        History(),
        poll_seconds=0.0,
        limits=limits,
        checkpoints=checkpoints,
        **time,
    )
    try:
        federation.run()
    finally:
        for engine in engines.values():
            engine.close()
    return federation


def merged_bits(federation: Federation, rule: str = "opcm") -> bytes:
    """The global model of a rule, as the bytes of a task vector file."""
    return to_bytes(federation.models[rule].merged())


def merged_offline(vectors: Iterable[TaskVector], rule: str = "opcm") -> bytes:
    """What the same vectors give when they are merged here, in this order."""
    base = Base.from_model(build_model())
    with LocalEngine(make_rule(rule), base.layers.values(), workers=1) as engine:
        model = GlobalModel(base, engine)
        for vector in vectors:
            model.merge(vector)
        return to_bytes(model.merged())


def sent_vector(reply: Message) -> TaskVector:
    """The task vector in a reply."""
    return vector_in(reply.content)


def vector_in(content: RecordDict) -> TaskVector:
    """The task vector in a reply's content."""
    return wire.unpack_vector(content, wire.VECTOR, where="reply")
