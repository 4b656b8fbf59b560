"""Training with the Flower ClientApp, or train function, that somebody already has."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    Context,
    Message,
    MessageType,
    Metadata,
    RecordDict,
    UserConfigValue,
)
from flwr.app.message import make_message
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

from fedmerge.client.tasks import Task, TrainingConfig
from fedmerge.common.errors import FedmergeError, MismatchError

REPLY_WITHIN = timedelta(days=365)
"""Nobody waits for the reply: it never leaves the process."""


def flower_fit(
    train: ClientAppCallable,
    *,
    node_config: Mapping[str, UserConfigValue] | None = None,
    run_config: Mapping[str, UserConfigValue] | None = None,
    train_config: Mapping[str, ConfigRecordValues] | None = None,
) -> Callable[[nn.Module, Task, TrainingConfig, int], None]:
    """A ``Task.fit`` that asks a Flower ClientApp to train, as Flower's own strategies ask it::

        Task(name, train_rows, test_rows, loss, metric, fit=flower_fit(app))

    It gets the weights as ``arrays`` and, as ``config``, ``server-round`` 1 and the learning rate as ``lr``;
    it replies with the trained weights in one array record, of whatever name. Where its data are is its own
    affair: a site's task names the same examples, for scores and statistics. What it keeps in its context
    lasts as long as the process.

    Args:
        train: a ``ClientApp`` with a train function, or such a function, ``(message, context) -> message``.
        node_config, run_config: what it reads of its context, such as ``partition-id``.
        train_config: more for ``config``, or in place of what is there.

    The function raises what the ClientApp raises, FedmergeError for an error that it replies, and
    MismatchError for other weights than the model's.
    """
    context = Context(0, 0, dict(node_config or {}), RecordDict(), dict(run_config or {}))

    def fit(model: nn.Module, task: Task, config: TrainingConfig, seed: int) -> None:
        told = ConfigRecord({"server-round": 1, "lr": config.learning_rate, **(train_config or {})})
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        content = RecordDict({"arrays": ArrayRecord(weights), "config": told})
        reply = train(_message(content), context)
        _put(model, _trained(reply, where=f"task {task.name!r}"), where=f"task {task.name!r}")

    return fit


def _message(content: RecordDict) -> Message:
    """A training request to this process itself."""
    ttl = REPLY_WITHIN.total_seconds()
    return make_message(Metadata(0, "", 0, 0, "", "", time.time(), ttl, MessageType.TRAIN), content)


def _trained(reply: Message, where: str) -> dict[str, Tensor]:
    """The weights in a reply."""
    if reply.has_error():
        raise FedmergeError(f"the ClientApp replied with an error: {reply.error.reason}", where=where)
    records = list(reply.content.array_records.items())
    if len(records) != 1:
        raise MismatchError(
            "a reply without one record of weights",
            where=where,
            got=", ".join(name for name, _ in records) or "none",
            wanted="an ArrayRecord",
        )
    return dict(records[0][1].to_torch_state_dict())


@torch.no_grad()
def _put(model: nn.Module, trained: Mapping[str, Tensor], where: str) -> None:
    held = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in trained.items()}
    for name in [*held, *trained]:
        wanted = tuple(held[name].shape) if name in held else None
        if shapes.get(name) != wanted:
            raise MismatchError(
                "the ClientApp trains another model",
                where=where,
                layer=name,
                got=shapes.get(name, "no such layer"),
                wanted=wanted or "no such layer",
            )
    for name, tensor in trained.items():
        held[name].copy_(tensor)
