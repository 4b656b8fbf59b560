"""The Flower ClientApp of a site: fine-tunes on request and replies with a task vector, never with data.

How it is configured is in :mod:`fedmerge.client.config`.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from hashlib import sha256

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import Mod

from fedmerge import __version__
from fedmerge.client import versions
from fedmerge.client.config import (
    SiteConfig,
    check_base,
    checked,
    open_configured,
    options_of,
    site_config,
    state_of,
)
from fedmerge.client.loading import load_stream
from fedmerge.client.memory import SiteMemory, recalled, remember
from fedmerge.client.mods import refuse_flower_dp
from fedmerge.client.outgoing import Outgoing, as_it_is, outgoing
from fedmerge.client.resume import RunCheckpoint
from fedmerge.client.state import Result, SiteState
from fedmerge.client.training import OnStep
from fedmerge.common import wire
from fedmerge.common.base import Base
from fedmerge.common.compression import Compression
from fedmerge.common.config import from_json
from fedmerge.common.errors import TooLarge
from fedmerge.common.ranges import MAX_MESSAGE_BYTES
from fedmerge.common.score import Score
from fedmerge.common.statistics import statistics_of
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.training import Correction, LocalTraining, SketchSpec
from fedmerge.common.vectorfile import load, to_bytes
from fedmerge.common.wire import (
    CorrectJob,
    EvaluateJob,
    Greeting,
    Hello,
    TrainJob,
)

logger = logging.getLogger("fedmerge.client")


def make_client_app(config: SiteConfig | None = None, mods: Sequence[Mod] = ()) -> ClientApp:
    """A ClientApp for one site, or for every site of a simulation.

    Args:
        config: by default read from the context of each message.
        mods: Flower's, around every message.

    Raises:
        ConfigError: one of Flower's mods for differential privacy, which are wrong on task vectors.
    """
    refuse_flower_dp(mods)
    client = ClientApp(mods=list(mods))

    @client.query("hello")
    def hello(message: Message, context: Context) -> Message:
        mine = config or site_config(context)
        return Message(_hello(mine, _label(mine, context), message.content), reply_to=message)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        mine, memory = config or site_config(context), recalled(context)
        content = _train(mine, _label(mine, context), message.content, memory)
        remember(memory, context)
        if not _simulated(context):
            _check_size(content)
        return Message(content, reply_to=message)

    @client.query("correct")
    def correct(message: Message, context: Context) -> Message:
        mine = config or site_config(context)
        memory = recalled(context)
        content = _correct(mine, _label(mine, context), message.content, memory)
        remember(memory, context)
        return Message(content, reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        mine = config or site_config(context)
        return Message(_evaluate(mine, message.content, recalled(context)), reply_to=message)

    @client.query("publish")
    def publish(message: Message, context: Context) -> Message:
        return Message(versions.publish(config or site_config(context), message.content), reply_to=message)

    @client.query("put_shard")
    def put_shard(message: Message, context: Context) -> Message:
        return Message(versions.put_shard(config or site_config(context), message.content), reply_to=message)

    @client.query("get_shard")
    def get_shard(message: Message, context: Context) -> Message:
        return Message(versions.get_shard(config or site_config(context), message.content), reply_to=message)

    return client


def _hello(config: SiteConfig, label: str, content: RecordDict) -> RecordDict:
    greeting = _greeting(content)
    state = state_of(config) if greeting.serving else None
    if state is not None:
        _heed(state, greeting)
    if state is not None and state.base and not greeting.check_base:
        base, stream = state.base, load_stream(config.stream, options_of(config))
    else:
        site = open_configured(config)
        base, stream = site.base.fingerprint, site.stream
    reply = Hello(__version__, label, base, config.held or stream.tasks)
    if state is not None:
        state.base, held = base, state.held
        waiting = tuple(result.manifest.sha256 for result in state.results())
        reply = replace(reply, holds=held.number, model=held.model, waiting=waiting)
    return RecordDict({wire.JOB: wire.pack_job(reply)})


def _greeting(content: RecordDict) -> Greeting:
    """What the server said; of another version's words only which one it is: it will refuse this site."""
    said = content.config_records.get(wire.JOB, ConfigRecord())
    if said.get("version") != __version__:
        return Greeting(str(said.get("version")))
    return wire.unpack_job(Greeting, content, where="hello")


def _heed(state: SiteState, greeting: Greeting) -> None:
    """Forgets what the server has, and writes down what it refused."""
    for found in greeting.acknowledged:
        state.forget(found)
    for found, reason in zip(greeting.refused, greeting.reasons, strict=False):
        logger.warning("the server refused an update: %s", reason)
        state.refuse(found, reason)


def _train(config: SiteConfig, label: str, content: RecordDict, memory: SiteMemory) -> RecordDict:
    job = wire.unpack_job(TrainJob, content, where="train request")
    if job.keep:
        state = state_of(config)
        key = _key(config, job)
        result = state.result(job.task, key)
        if result is None:
            memory = state.memory(key)
            started = state.held.model if job.held else ""
            words = f"{key} {started} {__version__} {torch.__version__}"
            checkpoint = RunCheckpoint(state.folder / "run", words)
            sent = _learned(config, label, job, content, memory, checkpoint)
            state.remember(memory, key)
            result = state.keep(
                sent.vector, sent.dtype, key=key, metrics=sent.numbers, range_bytes=job.range_bytes
            )
            checkpoint.finish()
        told, metrics = _told(state, result, job.message_bytes), result.metrics
    else:
        sent = _learned(config, label, job, content, memory)
        metrics = dict(sent.numbers)
        told = {wire.VECTOR: wire.pack_vector(to_bytes(sent.vector, dtype=sent.dtype))}
    about = ConfigRecord({"task": job.task, "site": label})
    return RecordDict({**told, wire.METRICS: MetricRecord(dict(metrics)), "update": about})


def _told(state: SiteState, result: Result, message_bytes: int) -> dict[str, ArrayRecord | ConfigRecord]:
    if result.manifest.size > message_bytes:
        return {wire.MANIFEST: wire.pack_job(result.manifest)}
    return {wire.VECTOR: wire.pack_vector(state.read(result))}


def _learned(
    config: SiteConfig,
    label: str,
    job: TrainJob,
    content: RecordDict,
    memory: SiteMemory,
    checkpoint: RunCheckpoint | None = None,
) -> Outgoing:
    """What a training request brings: the update as it is sent, and numbers that go with it."""
    where = "train request"
    site, training = open_configured(config), from_json(LocalTraining, job.training, where=where)
    compression = Compression.parse(job.compress)
    check_base(job.base, site.base)
    origin, version = _origin(config, job, content, site.base)
    memory.begin(job.learning, job.task, job.round)
    task, *also = (
        site.task(name, job.part, job.parts, job.partition, job.seed) for name in (job.task, *job.also)
    )
    vector, report = site.learn(
        task,
        seed=seed_of_round(job.seed, job.round),
        site=label,
        origin=origin,
        origin_version=version,
        from_base=job.held,
        heads=memory.heads(job.task, job.learning),
        device=config.device,
        on_step=_progress(label, job.task),
        needs=job.needs,
        training=training,
        also=also,
        sketch=from_json(SketchSpec, job.sketch, where=where) if job.sketch else None,
        bases=wire.unpack_bases(content, where=where),
        private_seed=_private_seed(config, label, job),
        memory=memory.tensors,
        ends_task=job.last,
        checkpoint=checkpoint,
    )
    for name in (job.task, *job.also):
        memory.keep_heads(name, site.heads())
    numbers: dict[str, int | float] = {
        "num-examples": report.examples,
        "train-loss": report.mean_loss,
        "train-seconds": report.seconds,
    }
    if job.last:
        started = time.perf_counter()
        scores = site.score([task, *also], device=config.device, tangent=training.tangent is not None)
        numbers["score-seconds"] = time.perf_counter() - started
        numbers |= wire.scored({("fine-tuned", name): found for name, found in scores.items()})
    if job.needs:
        found = ", ".join(vector.manifest.statistics)
        size = statistics_of(vector).payload_bytes
        logger.info("%s measured %s on %s: %d bytes", label, found, job.task, size)
    measured = partial(site.beyond_base, origin=origin) if job.held else as_it_is
    sent = outgoing(vector, config.privacy, compression, memory, measured)
    return replace(sent, numbers={**numbers, **sent.numbers})


def _origin(
    config: SiteConfig, job: TrainJob, content: RecordDict, base: Base
) -> tuple[TaskVector | None, int]:
    """Where a run starts: the vector from the base, None for the base itself; and its version."""
    if job.held:
        state = state_of(config)
        if state.merged is None:
            return None, 0
        return checked(load(state.merged), base), state.held.number
    if wire.ORIGIN in content:
        return checked(wire.unpack_vector(content, wire.ORIGIN, where="origin"), base), job.origin_version
    return None, job.origin_version


def _private_seed(config: SiteConfig, label: str, job: TrainJob) -> int | None:
    """Another one for every site, task and round."""
    if config.sketch_seed is None:
        return None
    return _drawn(f"{config.sketch_seed}/{label}/{job.task}/{job.round}")


def seed_of_round(seed: int, round: int) -> int:
    """Another order of the examples in every round; the first has the seed itself."""
    return seed if round == 1 else _drawn(f"{seed}/{round}")


def _drawn(words: str) -> int:
    """A number from words, 0 to 2^62 - 1."""
    return int.from_bytes(sha256(words.encode()).digest()[:8]) >> 2


def _correct(config: SiteConfig, label: str, content: RecordDict, memory: SiteMemory) -> RecordDict:
    where = "correction request"
    job = wire.unpack_job(CorrectJob, content, where=where)
    site, training = open_configured(config), from_json(LocalTraining, job.training, where=where)
    check_base(job.base, site.base)
    merged, previous = (
        checked(wire.unpack_vector(content, key, where=key), site.base)
        for key in (wire.MERGED, wire.PREVIOUS)
    )
    vector, report = site.correct(
        site.task(job.task, job.part, job.parts, job.partition, job.seed),
        merged,
        previous,
        from_json(Correction, job.correction, where=where),
        seed=job.seed,
        site=label,
        origin_version=job.origin_version,
        device=config.device,
        tangent=training.tangent is not None,
        heads=memory.heads(job.task, memory.learning),
    )
    sent = outgoing(vector, config.privacy, Compression(), memory)
    numbers = {
        "num-examples": report.examples,
        "loss-before": report.first_loss,
        "loss-after": report.final_loss,
        **sent.numbers,
    }
    return RecordDict(
        {wire.VECTOR: wire.pack_vector(to_bytes(sent.vector)), wire.METRICS: MetricRecord(dict(numbers))}
    )


def _key(config: SiteConfig, job: TrainJob) -> str:
    """A hash of what a result depends on: the request, where the data come from, and what is done to them."""
    asked = {k: v for k, v in asdict(job).items() if k not in ("keep", "message_bytes", "range_bytes")}
    privacy = None if config.privacy is None else config.privacy.model_dump(mode="json")
    told = json.dumps([asked, config.stream, config.seed, config.rows, privacy], sort_keys=True)
    return sha256(told.encode()).hexdigest()


def _evaluate(config: SiteConfig, content: RecordDict, memory: SiteMemory) -> RecordDict:
    job = wire.unpack_job(EvaluateJob, content, where="evaluate request")
    site = open_configured(config)
    check_base(job.base, site.base)
    started = time.perf_counter()
    tasks = [
        site.task(name, part, parts, job.partition, job.seed)
        for name, part, parts in zip(job.tasks, job.part, job.parts, strict=True)
    ]
    scores: dict[tuple[str, str], Score] = {}
    heads = {name: memory.heads(name, job.learning) for name in job.learned}
    for rule, merged in _merged_models(content, site.base):
        if merged is None:
            site.reset()
        found = site.score(tasks, merged, config.device, job.tangent, heads)
        scores |= {(rule, name): score for name, score in found.items()}
    metrics = MetricRecord({"score-seconds": time.perf_counter() - started, **wire.pack_scores(scores)})
    return RecordDict({wire.METRICS: metrics})


def _merged_models(content: RecordDict, base: Base) -> list[tuple[str, TaskVector | None]]:
    """The merged vector of every rule, or the base alone when there is none."""
    keys = [key for key in content.array_records if key.startswith(wire.MERGED)]
    if not keys:
        return [("base", None)]
    return [
        (key.removeprefix(wire.MERGED), checked(wire.unpack_vector(content, key, where=key), base))
        for key in keys
    ]


def _simulated(context: Context) -> bool:
    return "partition-id" in context.node_config


def _check_size(content: RecordDict) -> None:
    """Refuses what a SuperLink cannot pass on as one message."""
    size = wire.bytes_in(content)
    if size > MAX_MESSAGE_BYTES:
        raise TooLarge(
            "a task vector too large for one message",
            got=f"{size} bytes",
            wanted=f"at most {MAX_MESSAGE_BYTES}",
            do='Run the server with mode="serve", which sends large vectors in ranges.',
        )


def _progress(label: str, task: str) -> OnStep:
    """Logs the loss every quarter of a run."""

    def on_step(step: int, steps: int, loss: float) -> None:
        if step == steps or step % max(1, steps // 4) == 0:
            logger.info("%s learns %s: step %d of %d, loss %.3f", label, task, step, steps, loss)

    return on_step


def _label(config: SiteConfig, context: Context) -> str:
    return config.label or f"site-{context.node_config.get('partition-id', context.node_id)}"


app = make_client_app()
