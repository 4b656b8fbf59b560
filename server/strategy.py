"""Continual merging as a Flower ``Strategy``, for anyone's own ServerApp::

    from fedmerge.server.strategy import ContinualMerging

    strategy = ContinualMerging(min_nodes=2)
    result = strategy.start(grid, ArrayRecord(model.state_dict()), num_rounds=len(tasks))

Every round is a task, or several: replies are grouped by the ``task`` of their config record (one task
named ``round-N`` without it), combined by ``num-examples`` within a task, and merged one by one in
the order of the tasks' names. Clients keep what they send now, the trained weights under the name
``arrays``, or send only what moved as ``task-vector``. They always start from the base: that is what the
rules' papers measure task vectors from. ``result.arrays`` is the global model.

A rule that needs statistics names them under ``needs`` in the config of a round, and says under ``sketch``
how to sketch (JSON of a ``SketchSpec``) if sketches are among them. Only clients that send ``task-vector``
as the bytes of our file, as fedmerge's own ClientApp does, can bring them.

``Strategy.start`` waits for all replies of a round; fedmerge's own ServerApp does not.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from tokenize import TokenError

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.checkpoint import Checkpoint
from fedmerge.common.errors import BadWeight, ConfigError, FedmergeError, FileError, StatisticsMissing
from fedmerge.common.layers import LayerKind
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.server.admission import LIMITS, MAX_EXAMPLES, BaseNorms, Limits, admit, weight
from fedmerge.server.combine import combine
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.history import History
from fedmerge.server.merge import DEFAULT_RULE, make_rule
from fedmerge.server.merge.rule import Rule
from fedmerge.server.model import GlobalModel

logger = logging.getLogger("fedmerge.server")

TASK_KEY, NEEDS_KEY, SKETCH_KEY = "task", "needs", "sketch"

UNREADABLE = (TypeError, ValueError, RuntimeError, OSError, EOFError, SyntaxError, MemoryError, TokenError)
"""What NumPy and torch raise over bytes that are not an array of numbers."""


class ContinualMerging(Strategy):
    """Merges each round's task vectors into one global model.

    Args:
        rule: a rule or its name with default options.
        kinds: overrides of layer kinds by name; the rest follows from names and shapes.
        private: shell-style patterns of layers that stay at the sites.
        min_nodes: how many nodes to wait for at the first round, for at most ``wait_seconds``; a round
            then goes on with whoever is there.
        max_examples: cap of a self-reported count.
        limits: how large a vector may be against the base.
        engine: where to merge, given the rule and the base; threads in this process by default,
            ``RayEngine`` for actors.
    """

    def __init__(
        self,
        rule: Rule | str = DEFAULT_RULE,
        *,
        kinds: Mapping[str, LayerKind] | None = None,
        private: Iterable[str] = (),
        min_nodes: int = 1,
        wait_seconds: float = 120.0,
        max_examples: int = MAX_EXAMPLES,
        limits: Limits = LIMITS,
        engine: type[Engine] = LocalEngine,
    ) -> None:
        self.rule = make_rule(rule) if isinstance(rule, str) else rule
        self._kinds, self._private = dict(kinds or {}), tuple(private)
        self._min_nodes, self._wait_seconds, self._max_examples = min_nodes, wait_seconds, max_examples
        self._limits, self._engine = limits, engine
        self._origin: ArrayRecord | None = None
        self._deadline = 0.0
        self.model: GlobalModel | None = None
        self.history = History()

    def summary(self) -> None:
        """Logs the rule and its options."""
        logger.info("continual merging by %s (%s)", self.rule.name, self.rule)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The base to every node; ``arrays`` is registered as the base in the first round."""
        if self.model is None:
            self._register(arrays)
        assert self._origin is not None
        needs: dict[str, str | list[str]] = {NEEDS_KEY: sorted(self.rule.needs)} if self.rule.needs else {}
        if (sketch := self.rule.asks()) is not None:
            needs[SKETCH_KEY] = sketch.model_dump_json()
        told = ConfigRecord({**config, **needs, "server-round": server_round})
        content = RecordDict({"arrays": self._origin, "config": told})
        return [Message(content, node, MessageType.TRAIN) for node in self._nodes(grid)]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merges the round's tasks; a reply that cannot be used is recorded and left out.

        Returns:
            The global model, or None if nothing was merged; and the number of tasks merged and of
            replies left out, lambda_t and norms of the last merge.
        """
        tasks: dict[str, list[tuple[TaskVector, int]]] = {}
        refused = 0
        for reply in replies:
            try:
                vector, examples = self._received(reply, server_round)
            except FedmergeError as error:
                refused += 1
                self.history.record("failed", site=_site(reply), round=server_round, reason=str(error))
                logger.warning("round %d: %s", server_round, error)
                continue
            tasks.setdefault(vector.manifest.task, []).append((vector, examples))
        merged = [task for task in sorted(tasks) if self._merged(task, tasks[task], server_round)]
        if not merged:
            return None, None
        last = self._model.versions[-1]
        metrics = MetricRecord(
            {
                "tasks-merged": len(merged),
                "replies-left-out": refused,
                "lambda-t": last.lambda_t,
                "update-norm": last.update_norm,
                "merged-norm": last.merged_norm,
            }
        )
        return self.global_model(), metrics

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The global model to every node."""
        content = RecordDict(
            {"arrays": arrays, "config": ConfigRecord({**config, "server-round": server_round})}
        )
        return [Message(content, node, MessageType.EVALUATE) for node in self._nodes(grid)]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Means of the clients' metrics, weighted by ``num-examples``.

        Left out: failed replies, those with a bad count, and values that are not finite.
        """
        totals: dict[str, float] = {}
        weights: dict[str, int] = {}
        for reply in (reply for reply in replies if not reply.has_error()):
            metrics = next(iter(reply.content.metric_records.values()), MetricRecord())
            try:
                share = weight(metrics.get("num-examples", 1), where=_site(reply), cap=self._max_examples)
            except BadWeight as error:
                logger.warning("round %d: %s", server_round, error)
                continue
            for key, value in metrics.items():
                if key != "num-examples" and isinstance(value, int | float) and abs(value) < math.inf:
                    totals[key] = totals.get(key, 0.0) + share * value
                    weights[key] = weights.get(key, 0) + share
        return MetricRecord({key: totals[key] / weights[key] for key in totals}) if totals else None

    def global_model(self) -> ArrayRecord:
        """Base plus merged vector, in the base's names and dtypes."""
        merged = self._model.merged()
        return ArrayRecord(dict(merged.apply(self._model.base)))

    @property
    def _model(self) -> GlobalModel:
        if self.model is None:
            raise ConfigError(
                "no base yet", do="Call start() first, or configure_train() with the base's arrays."
            )
        return self.model

    def _register(self, arrays: ArrayRecord) -> None:
        tensors = _tensors(arrays, "initial arrays")
        base = Base.from_checkpoint(Checkpoint.of(tensors, "initial arrays"), self._kinds, self._private)
        self._origin, self._norms = arrays, BaseNorms.of(base)
        self.model = GlobalModel(base, self._engine(self.rule, base.layers.values()))
        self._deadline = time.monotonic() + self._wait_seconds

    def _nodes(self, grid: Grid) -> list[int]:
        nodes = sorted(grid.get_node_ids())
        while len(nodes) < self._min_nodes and (left := self._deadline - time.monotonic()) > 0:
            time.sleep(min(1.0, left))
            nodes = sorted(grid.get_node_ids())
        return nodes

    def _received(self, reply: Message, server_round: int) -> tuple[TaskVector, int]:
        where = _site(reply)
        if reply.has_error():
            raise FedmergeError(f"error {reply.error.code}: {reply.error.reason}", where=where)
        base = self._model.base
        named = next(
            (str(c[TASK_KEY]) for c in reply.content.config_records.values() if TASK_KEY in c),
            f"round-{server_round}",
        )
        metrics = next(iter(reply.content.metric_records.values()), MetricRecord())
        examples = weight(metrics.get("num-examples"), where=where, cap=self._max_examples)
        vector = self._vector(reply.content, Manifest(base.fingerprint, 0, named, where, examples), where)
        admit(vector, base, self._norms, self._limits, task=named, rules=[self.rule])
        return vector, examples

    def _vector(self, content: RecordDict, manifest: Manifest, where: str) -> TaskVector:
        """A vector from our own record, from an array record of differences, or from trained weights."""
        base = self._model.base
        sent = content.array_records.get(wire.VECTOR)
        if sent is not None and all(array.stype == wire.STYPE for array in sent.values()):
            return wire.unpack_vector(content, wire.VECTOR, where=where)
        if sent is not None:
            tensors = _tensors(sent, where)
            unchanged = [name for name in base.merged_layers if name not in tensors]
            return TaskVector.of(tensors, unchanged, manifest, where)
        trained = content.array_records.get("arrays")
        if trained is None:
            raise ConfigError(
                "a reply without weights",
                where=where,
                got=sorted(content),
                wanted=f"an array record named 'arrays' or {wire.VECTOR!r}",
            )
        tuned = Checkpoint.of(_tensors(trained, where), where)
        return TaskVector.from_checkpoints(base, tuned, manifest=manifest, private=self._private)

    def _merged(self, task: str, arrived: Sequence[tuple[TaskVector, int]], server_round: int) -> bool:
        """Merges a task; one whose sites do not bring the same statistics is recorded and left out."""
        try:
            self._merge(task, arrived, server_round)
        except StatisticsMissing as error:
            self.history.record("failed", task=task, round=server_round, reason=str(error))
            logger.warning("round %d: %s", server_round, error)
            return False
        return True

    def _merge(self, task: str, arrived: Sequence[tuple[TaskVector, int]], server_round: int) -> None:
        vectors, weights = zip(*arrived, strict=True)
        vector = combine(vectors, weights, self.rule.needs)
        sites = [vector.manifest.site for vector, _ in arrived]
        version = self._model.merge(vector, sites)
        self._model.prepare()
        self.history.record(
            "merged",
            round=server_round,
            task=task,
            sites=sites,
            version=version.number,
            lambda_t=version.lambda_t,
            update_norm=version.update_norm,
            merged_norm=version.merged_norm,
        )


def _tensors(record: ArrayRecord, where: str) -> dict[str, Tensor]:
    """Flower's arrays as tensors.

    Raises:
        FileError: bytes that NumPy does not read as an array of numbers.
    """
    tensors = {}
    for name, array in record.items():
        try:
            tensors[name] = torch.from_numpy(array.numpy())
        except UNREADABLE as error:
            raise FileError(
                "an array that cannot be read",
                where=where,
                layer=name,
                got=type(error).__name__,
                wanted="a NumPy array of numbers",
            ) from error
    return tensors


def _site(reply: Message) -> str:
    return f"node {reply.metadata.src_node_id}"
