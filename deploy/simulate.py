"""``fedmerge simulate``: many sites on one machine, through Flower's simulation engine.

The real ServerApp loop and ClientApp run. Rules merge the same fine-tuned vectors; methods that train in ways
of their own follow one another.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from fedmerge.common.privacy import Privacy
from fedmerge.common.score import pooled
from fedmerge.common.writing import make_folder
from fedmerge.deploy.progress import RunProgress
from fedmerge.deploy.report.metrics import mean
from fedmerge.deploy.report.results import (
    Failure,
    Learning,
    MergeRow,
    Results,
    RuleResults,
    SiteTraffic,
    save,
)
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


@dataclass(frozen=True)
class Finished:
    """What a method left: its federation, its place in it, and the bytes that its rule keeps at the end."""

    method: Method
    federation: Federation
    state_bytes: int


def simulate(
    config: SimulationConfig, methods: Sequence[Method], out: Path, progress: RunProgress
) -> Results:
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
        sites_per_round=config.sites_per_round,
        partition=config.partition,
        seed=config.seed,
        min_sites=config.sites,
        timeout_seconds=config.timeout_seconds,
    )
    history = History(progress.follow)
    make_folder(out)
    set_up = time.perf_counter() - clock
    try:
        with progress.run(*expected(methods, layout)):
            finished = _run_in_flower(config, base, methods, layout, history, out)
    finally:
        history.save(out / "history.jsonl")
    total = time.perf_counter() - clock
    results = _results(config, stream, finished, history, started, {"set-up": set_up, "total": total})
    save(results, out)
    return results


def expected(methods: Sequence[Method], layout: FederationConfig) -> tuple[int, int, int]:
    """How many local runs, merges and scorings a simulation takes if nothing fails."""
    trainings = merges = scorings = 0
    for number, group in enumerate(grouped(methods)):
        own = group[0].laid_out(layout)
        versions = 1 if own.joint else len(own.tasks)
        asked = min(own.sites_per_round or own.sites_per_task, own.sites_per_task)
        trainings += versions * asked * own.rounds
        merges += versions
        scorings += (versions + (number == 0)) * min(own.min_sites, versions * own.sites_per_task)
    return trainings, merges, scorings


def _run_in_flower(
    config: SimulationConfig,
    base: Base,
    methods: Sequence[Method],
    layout: FederationConfig,
    history: History,
    out: Path,
) -> list[Finished]:
    """The ServerApp and ClientApps in Flower's simulation engine, on a Ray that we start."""
    from flwr.app import Context
    from flwr.serverapp import Grid, ServerApp
    from flwr.simulation import run_simulation

    from fedmerge.client.app import SiteConfig, make_client_app
    from fedmerge.server.engine.ray_engine import start_ray

    logging.getLogger("flwr").setLevel(logging.CRITICAL)  # what fails at a site is in the history
    workers = config.workers or cores()
    start_ray(num_cpus=workers)
    finished: dict[str, Finished] = {}
    by_name = {method.name: method for method in methods}
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        def keep(federation: Federation) -> None:
            for name, model in federation.models.items():
                finished[name] = Finished(by_name[name], federation, model.engine.state_bytes())
            if config.save_merged:
                save_merged(federation, out)

        run_methods(grid, base, methods, layout, EngineConfig(actors=config.actors), history, keep)

    site = SiteConfig(
        config.stream, seed=config.seed, rows=config.rows, privacy=config.privacy, sketch_seed=config.seed
    )
    resources = {"num_cpus": 1, "num_gpus": torch.cuda.device_count() / workers}
    backend: Any = {"client_resources": resources}
    run_simulation(server, make_client_app(site), config.sites, backend_config=backend)
    return [finished[method.name] for method in methods]


def _results(
    config: SimulationConfig,
    stream: Stream,
    finished: Sequence[Finished],
    history: History,
    started: datetime,
    seconds: dict[str, float],
) -> Results:
    first = finished[0].federation
    tasks = list(first_tasks(stream, config.tasks))
    events = _by_method(history)
    zero_shot = {task: first.score("base", 0, task) for task in tasks}
    plain = next((f for f in finished if f.method.learning is not None), finished[0])
    return Results(
        stream=stream.name,
        seed=config.seed,
        sites=config.sites,
        rounds=config.rounds,
        rows=config.rows,
        sites_per_task=config.sites_per_task,
        sites_per_round=config.sites_per_round,
        partition=config.partition,
        privacy=None if config.privacy is None else config.privacy.model_dump(),
        command=shlex.join(["fedmerge", *sys.argv[1:]]),
        started=started.isoformat(timespec="seconds"),
        base_fingerprint=first.base.fingerprint,
        versions={name: version(name) for name in LIBRARIES},
        threads_per_worker=1,
        actors=config.actors,
        tasks=tasks,
        zero_shot={task: score.accuracy if score else None for task, score in zero_shot.items()},
        fine_tuned=_fine_tuned(plain.federation, tasks),
        test_examples={task: score.examples for task, score in zero_shot.items() if score},
        rules={one.method.name: _rule_results(one, tasks, events[one.method.name]) for one in finished},
        sites_traffic=_traffic(first, history),
        seconds=seconds | _phases(history),
        failures=[
            Failure(**{key: event[key] for key in Failure.model_fields}) for event in history.of("failed")
        ],
    )


def _rule_results(one: Finished, tasks: Sequence[str], events: Sequence[Event]) -> RuleResults:
    """A method's accuracies after each of its merges, and what its sites sent."""
    name, federation, rule = one.method.name, one.federation, one.method.rule

    def accuracy(number: int, task: str) -> float | None:
        found = federation.score(name, number, task)
        return found.accuracy if found else None

    matrix = [[accuracy(number, task) for task in tasks] for number in range(1, len(federation.merged) + 1)]
    rows = [_merge_row(event) for event in events if event["event"] == "merged" and event["rule"] == name]
    learning = _learning(one, tasks, events)
    options = rule.model_dump()
    return RuleResults.measured(tasks, matrix, rows, options, rule.needs, one.state_bytes, learning)


def _learning(one: Finished, tasks: Sequence[str], events: Sequence[Event]) -> Learning:
    method, layout = one.method, one.federation.config
    trained = [event for event in events if event["event"] == "trained"]
    corrected = sum(event["bytes_up"] for event in events if event["event"] == "corrected")
    spent = [event["epsilon"] for event in trained if event["epsilon"] is not None]
    told = method.training.model_dump(exclude_none=True)
    return Learning(
        rule=method.rule.name,
        start=layout.start,
        rounds=layout.rounds,
        sites=min(layout.sites_per_round or layout.sites_per_task, layout.sites_per_task),
        training={name: told[name] for name in method.training.options},
        loop=told["loop"],
        compress=method.compress,
        up_bytes=sum(event["bytes_up"] for event in trained) + corrected,
        statistics_bytes=sum(event["statistics_bytes"] for event in trained),
        updates=len(trained),
        cut=mean(event["cut"] for event in trained),
        fine_tuned=_fine_tuned(one.federation, tasks),
        epsilon=max(spent, default=None),
    )


def _fine_tuned(federation: Federation, tasks: Sequence[str]) -> dict[str, float | None]:
    found = {task: pooled(federation.fine_tuned.get(task, [])) for task in tasks}
    return {task: score.accuracy if score else None for task, score in found.items()}


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


def _merge_row(event: Event) -> MergeRow:
    facts = {key: event[key] for key in MergeRow.model_fields if key != "seconds"}
    return MergeRow(**facts, seconds={"absorb": event["absorb_seconds"], "read": event["read_seconds"]})


def _traffic(federation: Federation, history: History) -> list[SiteTraffic]:
    """What every site sent and received for all methods; its tasks are those of one federation."""
    return [
        SiteTraffic(
            site=site.label,
            tasks=[name for run in federation.runs if site in run.sites for name in run.names],
            up_bytes=sum(
                event["bytes_up"]
                for kind in ("trained", "corrected")
                for event in history.of(kind)
                if event["site"] == site.label
            ),
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
