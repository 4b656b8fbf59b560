"""``fedmerge simulate``: many sites on one machine, through Flower's simulation engine.

The real ServerApp loop and ClientApp run; several rules merge the same fine-tuned vectors.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedmerge.client.loading import first_tasks, load_stream
from fedmerge.client.tasks import Stream, StreamOptions
from fedmerge.common.base import Base
from fedmerge.common.config import Partition, Seed
from fedmerge.common.errors import ConfigError
from fedmerge.common.machine import cores
from fedmerge.common.score import pooled
from fedmerge.common.writing import make_folder
from fedmerge.deploy.progress import RunProgress
from fedmerge.deploy.report.results import Failure, MergeRow, Results, RuleResults, SiteTraffic, save
from fedmerge.server.app import EngineConfig, run_federation, save_merged
from fedmerge.server.federation import Federation
from fedmerge.server.history import Event, History
from fedmerge.server.layout import FederationConfig
from fedmerge.server.merge.rule import Rule

LIBRARIES = ("fedmerge", "torch", "flwr", "ray", "safetensors", "numpy", "transformers")

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "OMP_WAIT_POLICY": "passive",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Set before Ray starts, so that every worker has them: nothing phones home, threads do not spin."""


class SimulationConfig(BaseModel):
    """One experiment.

    Attributes:
        stream: see ``load_stream``. ``tasks``: how many of its tasks, in order; None takes all.
        sites: simulated sites. ``sites_per_task``: how many share a task; ``partition``: how.
        rounds: local fine-tunings per task.
        seed: of data splits, partitions and local runs. ``rows``: bound on training rows per task.
        actors: Ray actors per rule. ``workers``: sites that compute at the same time; None: one per core.
        save_merged: also write the final merged vector of every rule.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stream: str = "text"
    tasks: int | None = Field(default=None, ge=1)
    sites: int = Field(default=4, ge=1)
    sites_per_task: int = Field(default=1, ge=1)
    partition: Partition = "iid"
    rounds: int = Field(default=1, ge=1)
    seed: Seed = 0
    rows: int | None = Field(default=None, ge=1)
    actors: int = Field(default=1, ge=1)
    workers: int | None = Field(default=None, ge=1)
    timeout_seconds: float = Field(default=3600.0, gt=0)
    save_merged: bool = False


def simulate(config: SimulationConfig, rules: Sequence[Rule], out: Path, progress: RunProgress) -> Results:
    """Runs an experiment and writes ``results.json``, CSV files and ``history.jsonl`` under ``out``.

    Raises:
        ConfigError: a setting that does not fit the stream. Whatever stops the ServerApp comes through.
    """
    if config.sites_per_task > config.sites:
        raise ConfigError(
            "more sites per task than sites", got=config.sites_per_task, wanted=f"at most {config.sites}"
        )
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    started, clock = datetime.now(UTC), time.perf_counter()
    config = config.model_copy(update={"stream": _absolute(config.stream)})
    stream = load_stream(config.stream, StreamOptions(config.seed, config.rows))
    tasks = first_tasks(stream, config.tasks)
    stream.prepare()
    base = Base.from_model(stream.build_model(), stream.private)
    layout = FederationConfig(
        tasks=tasks,
        rounds=config.rounds,
        sites_per_task=config.sites_per_task,
        partition=config.partition,
        seed=config.seed,
        min_sites=config.sites,
        timeout_seconds=config.timeout_seconds,
    )
    history = History(progress.follow)
    make_folder(out)
    set_up = time.perf_counter() - clock
    trainings = len(tasks) * config.sites_per_task * config.rounds
    scorings = (len(tasks) + 1) * min(config.sites, len(tasks) * config.sites_per_task)
    try:
        with progress.run(tasks, trainings, scorings):
            federation, states = _run_in_flower(config, base, rules, layout, history, out)
    finally:
        history.save(out / "history.jsonl")
    total = time.perf_counter() - clock
    results = _results(config, stream, rules, federation, states, started, {"set-up": set_up, "total": total})
    save(results, out)
    return results


def _run_in_flower(
    config: SimulationConfig,
    base: Base,
    rules: Sequence[Rule],
    layout: FederationConfig,
    history: History,
    out: Path,
) -> tuple[Federation, dict[str, int]]:
    """The ServerApp and ClientApps in Flower's simulation engine, on a Ray that we start.

    Returns:
        the federation, and the bytes that each rule keeps at its end.
    """
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from fedmerge.client.app import SiteConfig, make_client_app
    from fedmerge.server.engine.ray_engine import start_ray

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what fails at a site is in the history
    workers = config.workers or cores()
    start_ray(num_cpus=workers)
    finished: list[tuple[Federation, dict[str, int]]] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        def keep(federation: Federation) -> None:
            states = {name: model.engine.state_bytes() for name, model in federation.models.items()}
            finished.append((federation, states))
            if config.save_merged:
                save_merged(federation, out)

        run_federation(grid, base, rules, layout, EngineConfig(actors=config.actors), history, keep)

    site = SiteConfig(config.stream, seed=config.seed, rows=config.rows)
    resources = {"num_cpus": 1, "num_gpus": torch.cuda.device_count() / workers}
    backend: Any = {"client_resources": resources}
    run_simulation(server, make_client_app(site), config.sites, backend_config=backend)
    return finished[0]


def _results(
    config: SimulationConfig,
    stream: Stream,
    rules: Sequence[Rule],
    federation: Federation,
    states: Mapping[str, int],
    started: datetime,
    seconds: dict[str, float],
) -> Results:
    history = federation.history
    tasks = [run.task for run in federation.runs]
    versions = range(1, len(federation.merged) + 1)

    def accuracy(rule: str, number: int, task: str) -> float | None:
        found = federation.score(rule, number, task)
        return found.accuracy if found else None

    def measured(rule: Rule) -> RuleResults:
        matrix = [[accuracy(rule.name, number, task) for task in tasks] for number in versions]
        rows = [_merge_row(event) for event in history.of("merged") if event["rule"] == rule.name]
        return RuleResults.measured(tasks, matrix, rows, rule.model_dump(), rule.needs, states[rule.name])

    fine_tuned = {task: pooled(federation.fine_tuned.get(task, [])) for task in tasks}
    zero_shot = {task: federation.score("base", 0, task) for task in tasks}
    return Results(
        stream=stream.name,
        seed=config.seed,
        sites=config.sites,
        rounds=config.rounds,
        rows=config.rows,
        sites_per_task=config.sites_per_task,
        partition=config.partition,
        command=shlex.join(["fedmerge", *sys.argv[1:]]),
        started=started.isoformat(timespec="seconds"),
        base_fingerprint=federation.base.fingerprint,
        versions={name: version(name) for name in LIBRARIES},
        threads_per_worker=1,
        actors=config.actors,
        tasks=tasks,
        zero_shot={task: score.accuracy if score else None for task, score in zero_shot.items()},
        fine_tuned={task: score.accuracy if score else None for task, score in fine_tuned.items()},
        test_examples={task: score.examples for task, score in zero_shot.items() if score},
        rules={rule.name: measured(rule) for rule in rules},
        sites_traffic=_traffic(federation),
        seconds=seconds | _phases(history),
        failures=[
            Failure(**{key: event[key] for key in Failure.model_fields}) for event in history.of("failed")
        ],
    )


def _merge_row(event: Event) -> MergeRow:
    facts = {key: event[key] for key in MergeRow.model_fields if key != "seconds"}
    return MergeRow(**facts, seconds={"absorb": event["absorb_seconds"], "read": event["read_seconds"]})


def _traffic(federation: Federation) -> list[SiteTraffic]:
    history = federation.history
    return [
        SiteTraffic(
            site=site.label,
            tasks=[run.task for run in federation.runs if site in run.sites],
            up_bytes=sum(event["bytes_up"] for event in history.of("trained") if event["site"] == site.label),
            down_bytes=sum(
                event["bytes_down"] for event in history.of("sent") if event["site"] == site.label
            ),
            failures=sum(event["site"] == site.label for event in history.of("failed")),
            statistics_bytes=sum(
                event["statistics_bytes"] for event in history.of("trained") if event["site"] == site.label
            ),
        )
        for site in sorted(federation.sites.values(), key=lambda site: site.label)
    ]


def _phases(history: History) -> dict[str, float]:
    """Working seconds by phase, added up over sites and rules: not wall time."""
    scored = [*history.of("trained"), *history.of("evaluated")]
    return {
        "fine-tuning": sum(event["train_seconds"] or 0.0 for event in history.of("trained")),
        "scoring": sum(event["score_seconds"] or 0.0 for event in scored),
        "merging": sum(event["absorb_seconds"] + event["read_seconds"] for event in history.of("merged")),
    }


def _absolute(spec: str) -> str:
    """A stream file by its full path, so that workers find it wherever they run."""
    source, colon, name = spec.rpartition(":")
    return f"{Path(source).resolve()}:{name}" if colon and source.endswith(".py") else spec
