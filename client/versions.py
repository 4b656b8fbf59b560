"""What a site does with versions that a serving server publishes, and with files in ranges."""

from __future__ import annotations

import logging
import time

from flwr.app import MetricRecord, RecordDict

from fedmerge.client.config import SiteConfig, check_base, checked, open_configured, state_of
from fedmerge.client.state import SiteState
from fedmerge.common import wire
from fedmerge.common.ranges import RangeFile, RangeManifest
from fedmerge.common.vectorfile import load
from fedmerge.common.wire import Holding, PublishJob, ShardJob

logger = logging.getLogger("fedmerge.client")


def publish(config: SiteConfig, content: RecordDict) -> RecordDict:
    """Keeps a version, once all of it is there, and scores it; says which ranges are missing otherwise."""
    job = wire.unpack_job(PublishJob, content, where="publish request")
    state = state_of(config)
    metrics = MetricRecord()
    if (state.held.number, state.held.model) != (job.version, job.model):
        if wire.MANIFEST in content:
            manifest = wire.unpack_job(RangeManifest, content, where="publish request", key=wire.MANIFEST)
            arriving = RangeFile(state.incoming, manifest)
            if arriving.missing:
                held = state.held
                return _holding(Holding(held.number, held.model, arriving.missing), metrics)
            arrived = arriving.finish()
        else:
            arrived = state.write_incoming(wire.vector_bytes(content, wire.VECTOR, where="publish request"))
        site = open_configured(config)
        check_base(job.base, site.base)
        checked(load(arrived), site.base)
        state.install(arrived, number=job.version, model=job.model, dtype=job.dtype)
        logger.info("version %d has arrived", job.version)
    if job.tasks:
        metrics = _score_version(config, state, job)
    return _holding(Holding(job.version, job.model), metrics)


def _score_version(config: SiteConfig, state: SiteState, job: PublishJob) -> MetricRecord:
    site = open_configured(config)
    started = time.perf_counter()
    tasks = [site.task(name, 0, 1, "iid", job.seed) for name in job.tasks]
    assert state.merged is not None, "this version has just been installed"
    memory = state.memory()
    heads = {task.name: memory.heads(task.name, memory.learning) for task in tasks}
    scores = site.score(tasks, load(state.merged), config.device, job.tangent, heads)
    found = wire.pack_scores({(wire.PUBLISHED, name): score for name, score in scores.items()})
    return MetricRecord({"score-seconds": time.perf_counter() - started, **found})


def put_shard(config: SiteConfig, content: RecordDict) -> RecordDict:
    """Takes in a range of a version that is on its way."""
    job = wire.unpack_job(ShardJob, content, where="shard")
    state = state_of(config)
    arriving = RangeFile.resume(state.incoming, job.sha256)
    arriving.write(job.index, wire.vector_bytes(content, wire.RANGE, where="shard"))
    held = state.held
    return _holding(Holding(held.number, held.model, arriving.missing), MetricRecord())


def get_shard(config: SiteConfig, content: RecordDict) -> RecordDict:
    """Hands out a range of a result."""
    job = wire.unpack_job(ShardJob, content, where="shard request")
    data = state_of(config).read_range(job.sha256, job.index)
    return RecordDict({wire.JOB: wire.pack_job(job), wire.RANGE: wire.pack_vector(data)})


def _holding(holding: Holding, metrics: MetricRecord) -> RecordDict:
    return RecordDict({wire.JOB: wire.pack_job(holding), wire.METRICS: metrics})
