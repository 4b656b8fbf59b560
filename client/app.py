"""The Flower ClientApp of a site: fine-tunes on request and replies with a task vector, never with data.

Configured by the SuperNode's ``--node-config`` (or the run's config, or directly in a simulation):

- ``stream``: where the site's tasks are, ``package.module:function`` or ``path/file.py:function``
- ``site-name``: its label; ``held-tasks``: comma-separated names of the tasks it holds, all by default
- ``seed``, ``rows``, ``device``, ``threads``
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedmerge import __version__
from fedmerge.client.site import Site, open_site
from fedmerge.client.tasks import StreamOptions, Task
from fedmerge.client.training import OnStep
from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.config import listed
from fedmerge.common.errors import BaseMismatch, ConfigError
from fedmerge.common.logs import log_to_stderr
from fedmerge.common.score import Score
from fedmerge.common.sources import check_vector
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.common.wire import EvaluateJob, Hello, TrainJob

logger = logging.getLogger("fedmerge.client")


@dataclass(frozen=True)
class SiteConfig:
    """What a site needs to know about itself.

    Attributes:
        stream: the stream's spec. ``held``: names of the tasks this site holds; empty means all.
        label: the site's name in reports; by default its partition number or node id.
        rows: bound on training examples per task. ``threads``: torch threads of one message.
    """

    stream: str
    label: str = ""
    held: tuple[str, ...] = ()
    seed: int = 0
    rows: int | None = None
    device: str = "auto"
    threads: int = 1


def make_client_app(config: SiteConfig | None = None) -> ClientApp:
    """A ClientApp for one site, or for every site of a simulation.

    Args:
        config: by default read from the context of each message.
    """
    client = ClientApp()

    @client.query("hello")
    def hello(message: Message, context: Context) -> Message:
        mine = config or site_config(context)
        site = _open(mine)
        held = mine.held or site.stream.tasks
        reply = Hello(__version__, _label(mine, context), site.base.fingerprint, held)
        return Message(RecordDict({wire.JOB: wire.pack_job(reply)}), reply_to=message)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        mine = config or site_config(context)
        return Message(_train(mine, _label(mine, context), message.content), reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return Message(_evaluate(config or site_config(context), message.content), reply_to=message)

    return client


def site_config(context: Context) -> SiteConfig:
    """Reads a site's configuration from Flower's; the node's own settings win over the run's.

    Raises:
        ConfigError: no stream is named, or a number is none.
    """
    given: Mapping[str, object] = {**context.run_config, **context.node_config}
    if "stream" not in given:
        raise ConfigError(
            "this site does not say where its tasks are",
            where="node config",
            wanted="stream",
            do="Start the SuperNode with --node-config 'stream=\"my_site.tasks:stream\"'.",
        )
    return SiteConfig(
        stream=str(given["stream"]),
        label=str(given.get("site-name", "")),
        held=listed(given.get("held-tasks", "")),
        seed=_whole(given, "seed") or 0,
        rows=_whole(given, "rows"),
        device=str(given.get("device", "auto")),
        threads=_whole(given, "threads") or 1,
    )


def _train(config: SiteConfig, label: str, content: RecordDict) -> RecordDict:
    job = wire.unpack_job(TrainJob, content, where="train request")
    site = _open(config)
    _check_base(job.base, site.base)
    origin = None
    if wire.ORIGIN in content:
        origin = _checked(wire.unpack_vector(content, wire.ORIGIN, where="origin"), site.base)
    task = site.task(job.task, job.part, job.parts, job.partition, job.seed)
    vector, report = site.learn(
        task,
        seed=job.seed,
        site=label,
        origin=origin,
        device=config.device,
        on_step=_progress(label, job.task),
    )
    started = time.perf_counter()
    scores = site.score([task], device=config.device)
    metrics = MetricRecord(
        {
            "num-examples": report.examples,
            "train-loss": report.mean_loss,
            "train-seconds": report.seconds,
            "score-seconds": time.perf_counter() - started,
            **wire.pack_scores({("fine-tuned", name): found for name, found in scores.items()}),
        }
    )
    return RecordDict(
        {
            wire.VECTOR: wire.pack_vector(to_bytes(vector)),
            wire.METRICS: metrics,
            "update": ConfigRecord({"task": job.task, "site": label}),
        }
    )


def _evaluate(config: SiteConfig, content: RecordDict) -> RecordDict:
    job = wire.unpack_job(EvaluateJob, content, where="evaluate request")
    site = _open(config)
    _check_base(job.base, site.base)
    started = time.perf_counter()
    tasks = [
        site.task(name, part, parts, job.partition, job.seed)
        for name, part, parts in zip(job.tasks, job.part, job.parts, strict=True)
    ]
    scores: dict[tuple[str, str], Score] = {}
    for rule, merged in _merged_models(content, site.base):
        scores |= {(rule, name): found for name, found in _scored(site, tasks, merged, config.device).items()}
    metrics = MetricRecord({"score-seconds": time.perf_counter() - started, **wire.pack_scores(scores)})
    return RecordDict({wire.METRICS: metrics})


def _scored(site: Site, tasks: list[Task], merged: TaskVector | None, device: str) -> dict[str, Score]:
    if merged is None:
        site.reset()
    return site.score(tasks, merged, device)


def _merged_models(content: RecordDict, base: Base) -> list[tuple[str, TaskVector | None]]:
    """The merged vector of every rule, or the base alone when there is none."""
    keys = [key for key in content.array_records if key.startswith(wire.MERGED)]
    if not keys:
        return [("base", None)]
    return [
        (key.removeprefix(wire.MERGED), _checked(wire.unpack_vector(content, key, where=key), base))
        for key in keys
    ]


def _checked(vector: TaskVector, base: Base) -> TaskVector:
    _check_base(vector.manifest.base, base)
    check_vector(vector, base)
    return vector


def _check_base(theirs: str, base: Base) -> None:
    if theirs != base.fingerprint:
        raise BaseMismatch(
            "the server merges over another pretrained model",
            got=theirs[:12] or "none",
            wanted=base.fingerprint[:12],
            do="Install the weights that the server registered.",
        )


def _open(config: SiteConfig) -> Site:
    log_to_stderr()
    torch.set_num_threads(config.threads)
    return open_site(config.stream, StreamOptions(config.seed, config.rows))


def _progress(label: str, task: str) -> OnStep:
    """Logs the loss every quarter of a run."""

    def on_step(step: int, steps: int, loss: float) -> None:
        if step == steps or step % max(1, steps // 4) == 0:
            logger.info("%s learns %s: step %d of %d, loss %.3f", label, task, step, steps, loss)

    return on_step


def _label(config: SiteConfig, context: Context) -> str:
    return config.label or f"site-{context.node_config.get('partition-id', context.node_id)}"


def _whole(given: Mapping[str, object], key: str) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError("not a whole number", where="node config", got=f"{key}={value!r}")
    return value


app = make_client_app()
