"""``fedmerge simulate``: many sites on one machine, through Flower's simulation engine.

The real ServerApp loop and ClientApp run. Rules merge the same fine-tuned vectors; methods that train in ways
of their own follow one another.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from fedmerge import __version__
from fedmerge.client.loading import first_tasks, load_stream
from fedmerge.client.tasks import Stream, StreamOptions
from fedmerge.common.base import Base
from fedmerge.common.config import Partition, Seed
from fedmerge.common.errors import ConfigError
from fedmerge.common.machine import cores
from fedmerge.common.privacy import Privacy
from fedmerge.common.writing import make_folder
from fedmerge.deploy.outcomes import Outcome, Unfinished, outcome
from fedmerge.deploy.progress import RunProgress
from fedmerge.deploy.report.results import Failure, Results, SiteTraffic, save
from fedmerge.server.app import EngineConfig, run_methods, save_merged
from fedmerge.server.federation import Federation
from fedmerge.server.history import Event, History
from fedmerge.server.layout import FederationConfig
from fedmerge.server.methods import Method, grouped

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
        rounds: local fine-tunings per task. ``sites_per_round``: how many of a task's sites each asks.
        privacy: what sites do to their updates before they send them.
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
    sites_per_round: int | None = Field(default=None, ge=1)
    privacy: Privacy | None = None
    seed: Seed = 0
    rows: int | None = Field(default=None, ge=1)
    actors: int = Field(default=1, ge=1)
    workers: int | None = Field(default=None, ge=1)
    timeout_seconds: float = Field(default=3600.0, gt=0)
    save_merged: bool = False


def simulate(
    config: SimulationConfig,
    methods: Sequence[Method],
    out: Path,
    progress: RunProgress,
    resume: bool = False,
) -> Results:
    """Runs an experiment and writes ``results.json``, CSV files and ``history.jsonl`` under ``out``.

    Args:
        resume: goes on where the same experiment was stopped: after the last method that had ended and, where
            sites start from the merged model, the last task merged, or the last round written down.

    Raises:
        ConfigError: a setting that does not fit the stream; nothing to go on with, or noise for privacy, of
            which sites would lose account. Whatever stops the ServerApp comes through.
    """
    if config.sites_per_task > config.sites:
        raise ConfigError(
            "more sites per task than sites", got=config.sites_per_task, wanted=f"at most {config.sites}"
        )
    if resume and config.privacy is not None and config.privacy.noise:
        raise ConfigError(
            "a simulation with privacy cannot go on: sites keep account of it while they run",
            do="Start without --resume.",
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
        sites_per_round=config.sites_per_round,
        partition=config.partition,
        seed=config.seed,
        min_sites=config.sites,
        timeout_seconds=config.timeout_seconds,
    )
    history = History(progress.follow)
    make_folder(out)
    unfinished = Unfinished(out / "unfinished")
    outcomes, history.events = unfinished.begin(_settings(config, methods, layout), resume)
    left = [method for method in methods if method.name not in outcomes]
    layout = layout.model_copy(update={"evaluate_base": not outcomes})
    set_up = time.perf_counter() - clock
    try:
        with progress.run(*expected(left, layout)):
            if left:
                outcomes |= _run_in_flower(config, base, left, layout, history, out, unfinished)
    finally:
        history.save(out / "history.jsonl")
    total = time.perf_counter() - clock
    ordered = {method.name: outcomes[method.name] for method in methods}
    seconds = {"set-up": set_up, "total": total}
    results = _results(config, stream, base, ordered, history, started, seconds)
    save(results, out)
    unfinished.clear()
    return results


def _settings(config: SimulationConfig, methods: Sequence[Method], layout: FederationConfig) -> str:
    """Everything that a simulation's results depend on, as text."""
    told = [
        [
            method.name,
            method.rule.name,
            method.rule.model_dump(mode="json"),
            method.laid_out(layout).model_dump_json(),
        ]
        for method in methods
    ]
    return json.dumps([__version__, config.model_dump(mode="json", exclude={"workers"}), told])


def expected(methods: Sequence[Method], layout: FederationConfig) -> tuple[int, int, int]:
    """How many local runs, merges and scorings a simulation takes if nothing fails."""
    trainings = merges = scorings = 0
    for number, group in enumerate(grouped(methods)):
        own = group[0].laid_out(layout)
        versions = 1 if own.joint else len(own.tasks)
        trainings += versions * own.sites_asked * own.rounds
        merges += versions
        scorings += (versions + (number == 0 and layout.evaluate_base)) * min(
            own.min_sites, versions * own.sites_per_task
        )
    return trainings, merges, scorings


def _run_in_flower(
    config: SimulationConfig,
    base: Base,
    methods: Sequence[Method],
    layout: FederationConfig,
    history: History,
    out: Path,
    unfinished: Unfinished,
) -> dict[str, Outcome]:
    """The ServerApp and ClientApps in Flower's simulation engine, on a Ray that we start."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from fedmerge.client.app import make_client_app
    from fedmerge.client.config import SiteConfig
    from fedmerge.server.engine.ray_engine import start_ray

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what fails at a site is in the history
    workers = config.workers or cores()
    start_ray(num_cpus=workers)
    found: dict[str, Outcome] = {}
    by_name = {method.name: method for method in methods}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        def keep(federation: Federation) -> None:
            events = _by_method(history)
            for name, model in federation.models.items():
                found[name] = outcome(
                    by_name[name], federation, model.engine.state_bytes(), layout.tasks, events[name]
                )
            if config.save_merged:
                save_merged(federation, out)
            unfinished.keep(found, history.events)

        engines = EngineConfig(actors=config.actors)
        run_methods(grid, base, methods, layout, engines, history, keep, unfinished.checkpoints)

    site = SiteConfig(
        config.stream, seed=config.seed, rows=config.rows, privacy=config.privacy, sketch_seed=config.seed
    )
    resources = {"num_cpus": 1, "num_gpus": torch.cuda.device_count() / workers}
    backend: Any = {"client_resources": resources}
    run_simulation(server, make_client_app(site), config.sites, backend_config=backend)
    return found


def _results(
    config: SimulationConfig,
    stream: Stream,
    base: Base,
    outcomes: Mapping[str, Outcome],
    history: History,
    started: datetime,
    seconds: dict[str, float],
) -> Results:
    tasks = list(first_tasks(stream, config.tasks))
    alone = next((one.result.learning for one in outcomes.values() if one.shared), None)
    scored = {task: found for one in outcomes.values() for task, found in one.zero_shot.items()}
    return Results(
        stream=stream.name,
        seed=config.seed,
        sites=config.sites,
        rounds=config.rounds,
        rows=config.rows,
        sites_per_task=config.sites_per_task,
        sites_per_round=config.sites_per_round,
        partition=config.partition,
        privacy=None if config.privacy is None else config.privacy.model_dump(exclude_none=True),
        command=shlex.join(["fedmerge", *sys.argv[1:]]),
        started=started.isoformat(timespec="seconds"),
        base_fingerprint=base.fingerprint,
        versions={name: version(name) for name in LIBRARIES},
        threads_per_worker=1,
        actors=config.actors,
        tasks=tasks,
        zero_shot={task: scored[task][0] if task in scored else None for task in tasks},
        fine_tuned={} if alone is None else alone.fine_tuned,
        test_examples={task: scored[task][1] for task in tasks if task in scored},
        rules={name: one.result for name, one in outcomes.items()},
        sites_traffic=_traffic(_held(outcomes.values()), history),
        seconds=seconds | _phases(history),
        failures=[
            Failure(**{key: event[key] for key in Failure.model_fields}) for event in history.of("failed")
        ],
    )


def _held(outcomes: Iterable[Outcome]) -> dict[str, list[str]]:
    """Tasks by site, over all methods."""
    found: dict[str, list[str]] = {}
    for one in outcomes:
        for site, tasks in one.held.items():
            found[site] = list(dict.fromkeys((*found.get(site, ()), *tasks)))
    return found


def _by_method(history: History) -> dict[str, list[Event]]:
    """The events of every method; methods that learned together share theirs."""
    found: dict[str, list[Event]] = {}
    current: list[Event] = []
    for event in history.events:
        if event["event"] == "learning":
            current = []
            found |= dict.fromkeys(event["methods"], current)
        current.append(event)
    return found


def _traffic(held: Mapping[str, list[str]], history: History) -> list[SiteTraffic]:
    """What every site sent and received for all methods."""
    return [
        SiteTraffic(
            site=site,
            tasks=tasks,
            up_bytes=sum(
                event["bytes_up"]
                for kind in ("trained", "corrected")
                for event in history.of(kind)
                if event["site"] == site
            ),
            down_bytes=sum(event["bytes_down"] for event in history.of("sent") if event["site"] == site),
            failures=sum(event["site"] == site for event in history.of("failed")),
            statistics_bytes=sum(
                event["statistics_bytes"] for event in history.of("trained") if event["site"] == site
            ),
        )
        for site, tasks in sorted(held.items())
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
