"""The Flower ServerApp: started by ``flwr run`` beside a SuperLink, or called directly in a simulation.

Run-config keys, all optional but ``base``; a mode ignores the keys of the other:

- ``mode``: ``tasks``, a run that ends when every task is merged, or ``serve``, one that does not end
- ``base``: the pretrained model, a checkpoint or ``package.module:function`` that builds it;
  ``private``: comma-separated patterns of layers that never leave a site
- ``rule``: comma-separated names, one in mode ``serve``; ``NAME.OPTION``: a rule's option, as ``opcm.alpha``
- ``method``: comma-separated names of :mod:`fedmerge.server.methods`, in place of ``rule``; ``start``:
  ``base`` or ``merged``, in place of the method's own
- ``train``: comma-separated training options for all sites, as ``lora``; ``NAME.OPTION``: their options, as
  ``lora.rank``, those of the training loop as ``loop.epochs``, and of ``correction``
- ``compress``: how sites make their updates smaller: ``bf16``, ``int8``, ``lowrank:ENERGY``
- ``actors``, ``threads``, ``num-gpus``, ``ray-address``: see ``EngineConfig``
- ``out``: folder for ``history.jsonl``, the final merged vectors, and what is on its way in mode ``serve``

In mode ``tasks``:

- ``tasks`` (comma-separated, in merging order), ``rounds``, ``sites-per-task``, ``sites-per-round``,
  ``partition``, ``seed``, ``min-sites``, ``wait-seconds``, ``timeout-seconds``, ``max-examples``,
  ``evaluate``: ``FederationConfig``

In mode ``serve``:

- ``aggregator``: address of a running aggregation server, ``host:port`` or ``unix:/path``; ``base``, ``rule``
  and the engine are then that server's, and of ``method`` counts how sites train alone. ``tls-ca``,
  ``tls-cert``, ``tls-key``: PEM files for it
- ``state``: without an address, the folder of the aggregator in this process; by default in ``out``.
  ``limits.NAME``, ``retention.NAME``: what it lets in and keeps
- ``seed``, ``timeout-seconds``, ``evaluate`` and the other keys of ``ServingSettings``
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.superlink.grid import InMemoryGrid
from pydantic import BaseModel, ConfigDict, Field

from fedmerge.common.base import Base
from fedmerge.common.config import Config, listed, validated
from fedmerge.common.errors import ConfigError
from fedmerge.common.layers import LayerKind
from fedmerge.common.logs import log_to_stderr
from fedmerge.common.lookup import find_function
from fedmerge.common.records import AggregationService
from fedmerge.common.training import OPTIONS
from fedmerge.common.vectorfile import save
from fedmerge.server.engine.engine import Engine
from fedmerge.server.engine.ray_engine import RayEngine, start_ray
from fedmerge.server.federation import Federation
from fedmerge.server.history import Event, History
from fedmerge.server.journal import Journal
from fedmerge.server.layout import FederationConfig
from fedmerge.server.learning import Teaching
from fedmerge.server.merge import DEFAULT_RULE, RULES, make_rule
from fedmerge.server.merge.rule import Rule
from fedmerge.server.methods import Method, Settings, grouped, make_method
from fedmerge.server.model import GlobalModel
from fedmerge.server.peers import ServingSettings
from fedmerge.server.serving import Serving
from fedmerge.server.standing import Checkpoints

logger = logging.getLogger("fedmerge.server")

RAY_START_SECONDS = 60.0
POLL_SECONDS = 1.0
"""Between two looks at a SuperLink; a site answers in seconds at best."""
SIMULATION_POLL_SECONDS = 0.1

GATEWAY = "gateway"
"""What this server calls itself before an aggregation server without TLS."""
PATIENCE_SECONDS = 10.0
"""For one call to an aggregation server that is away: the serving loop tries again, and looks after sites
meanwhile."""


class EngineConfig(BaseModel):
    """Where merging happens.

    Attributes:
        actors: Ray actors per rule. ``threads``: torch threads of each.
        num_gpus: GPUs per actor; None decides by what the cluster has.
        ray_address: of a cluster; None starts a local Ray unless RAY_ADDRESS is set.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    actors: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    num_gpus: float | None = Field(default=None, ge=0)
    ray_address: str | None = None


class ServiceConfig(BaseModel):
    """Where the aggregation service of a serving run is.

    Attributes:
        aggregator: its address; None for one in this process, in the folder ``state``.
        tls_ca, tls_cert, tls_key: PEM files to reach an address with; all three or none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    aggregator: str | None = None
    state: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


class RunConfig(BaseModel):
    """What both modes are told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["tasks", "serve"] = "tasks"
    base: str = ""
    private: str = ""
    rule: str = DEFAULT_RULE
    method: str = ""
    start: Literal["", "base", "merged"] = ""
    train: str = ""
    compress: str = "none"
    out: Path = Path("fedmerge-out")


OF_METHOD = frozenset({"start", "training", "weights", "correction", "joint", "compress", "evaluate_base"})
"""Settings of a federation that follow from the method."""

CONFIGS = (RunConfig, EngineConfig, FederationConfig, ServiceConfig, ServingSettings)

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run with the settings of the run config."""
    given: dict[str, Any] = {key: value for key, value in context.run_config.items() if value != ""}
    log_to_stderr()
    owners = (*RULES, *OPTIONS, "loop", "correction", "limits", "retention")
    options = {name: _options_of(name, given) for name in owners}
    given["tasks"] = listed(given.get("tasks", ""))
    settings = {key.replace("-", "_"): value for key, value in given.items()}
    _check_known(settings)
    run: RunConfig = _picked(RunConfig, settings)
    engines: EngineConfig = _picked(EngineConfig, settings)
    methods = [_method(name, run, options) for name in listed(run.method or run.rule)]
    run.out.mkdir(parents=True, exist_ok=True)
    if run.mode == "serve":
        service: ServiceConfig = _picked(ServiceConfig, settings)
        bounds = {name: options[name] for name in ("limits", "retention")}
        _serve(grid, run, methods, engines, service, bounds, _picked(ServingSettings, settings))
    else:
        layout = {key: value for key, value in settings.items() if key not in OF_METHOD}
        _run_tasks(grid, run, methods, engines, _picked(FederationConfig, layout))


def _method(name: str, run: RunConfig, options: Settings) -> Method:
    method = make_method(name, options, listed(run.train), run.compress)
    return replace(method, start=run.start) if run.start else method


def _run_tasks(
    grid: Grid,
    run: RunConfig,
    methods: Sequence[Method],
    engines: EngineConfig,
    layout: FederationConfig,
) -> None:
    base, history = open_base(run.base, listed(run.private)), History(_log)

    def finish(federation: Federation) -> None:
        save_merged(federation, run.out)
        logger.info("%d tasks merged; the vectors are in %s", len(federation.merged), run.out)

    try:
        run_methods(grid, base, methods, layout, engines, history, finish)
    finally:
        history.save(run.out / "history.jsonl")


def _serve(
    grid: Grid,
    run: RunConfig,
    methods: Sequence[Method],
    engines: EngineConfig,
    config: ServiceConfig,
    bounds: Mapping[str, Any],
    settings: ServingSettings,
) -> None:
    """Serves until Flower ends the run."""
    journal = Journal(run.out / "history.jsonl", _log)
    poll_seconds = SIMULATION_POLL_SECONDS if isinstance(grid, InMemoryGrid) else POLL_SECONDS
    try:
        with _service(grid, run, methods, engines, config, bounds) as (service, base, rule):
            folder, teaching = run.out / "serving", _teaching(methods[0], rule)
            Serving(grid, base, service, settings, journal, folder, poll_seconds, teaching=teaching).run()
    finally:
        journal.close()


@contextmanager
def _service(
    grid: Grid,
    run: RunConfig,
    methods: Sequence[Method],
    engines: EngineConfig,
    config: ServiceConfig,
    bounds: Mapping[str, Any],
) -> Iterator[tuple[AggregationService, str, Rule]]:
    """The aggregation service, the fingerprint of its base, and its rule."""
    if config.aggregator is not None:
        with _remote(config.aggregator, config) as remote:
            status = remote.status()
            yield remote, status.base, make_rule(status.rule, status.options)
        return
    if len(methods) != 1:
        raise ConfigError("a server merges under one rule", got=run.rule, wanted="one name under 'rule'")
    base, rule = open_base(run.base, listed(run.private)), methods[0].rule
    with _embedded(config.state or run.out / "state", grid, base, rule, engines, bounds) as embedded:
        yield embedded, base.fingerprint, rule


def _teaching(method: Method, rule: Rule) -> Teaching:
    """What sites are asked of their learning, by a method, for a rule which may be another server's."""
    return Teaching(rule.needs, rule.asks(), method.training, method.compress, method.start == "merged")


@contextmanager
def _remote(address: str, config: ServiceConfig) -> Iterator[AggregationService]:
    from fedmerge.common.remote import RemoteAggregator
    from fedmerge.common.tls import TlsFiles, channel_credentials

    files = {"ca": config.tls_ca, "cert": config.tls_cert, "key": config.tls_key}
    given = {name: path for name, path in files.items() if path is not None}
    if given and len(given) < len(files):
        raise ConfigError(
            "TLS needs all three files", got=[f"tls-{k}" for k in given], wanted="tls-ca, tls-cert, tls-key"
        )
    credentials = channel_credentials(validated(TlsFiles, given)) if given else None
    with RemoteAggregator(address, credentials, site=GATEWAY, patience=PATIENCE_SECONDS) as remote:
        yield remote


@contextmanager
def _embedded(
    folder: Path, grid: Grid, base: Base, rule: Rule, engines: EngineConfig, bounds: Mapping[str, Any]
) -> Iterator[AggregationService]:
    from fedmerge.server.aggregator import Aggregator, AggregatorSettings

    _start_ray(grid, engines)
    settings = validated(AggregatorSettings, bounds)
    with Aggregator(folder, base, rule, lambda: _engine(rule, base, engines), settings) as aggregator:
        yield aggregator


def run_methods(
    grid: Grid,
    base: Base,
    methods: Sequence[Method],
    layout: FederationConfig,
    engines: EngineConfig,
    history: History,
    on_finished: Callable[[Federation], None] = lambda _: None,
    checkpoints: Callable[[Sequence[Method]], Checkpoints] | None = None,
) -> None:
    """Merges the tasks of a grid's sites by every method, each with its rule on its own Ray actors.

    Methods that share their task vectors run together, all others one after another. The base is scored once.

    Args:
        on_finished: called with each federation before its actors end, while merged models can still be read.
        checkpoints: where methods that are ``resumable`` write down how far they have come, unless there are
            private layers, which sites would forget.

    Raises:
        ConfigError: no usable site, or a method that the layout does not allow. EngineError: Ray cannot be
            reached, or actors keep dying.
    """
    _start_ray(grid, engines)
    for group in grouped(methods):
        history.record("learning", methods=[method.name for method in group])
        private = any(layer.kind is LayerKind.PRIVATE for layer in base.layers.values())
        resumable = group[0].resumable and not private
        standing = checkpoints(group) if checkpoints is not None and resumable else None
        _run_group(grid, base, group, layout, engines, history, on_finished, standing)
        layout = layout.model_copy(update={"evaluate_base": False})


def _run_group(
    grid: Grid,
    base: Base,
    group: Sequence[Method],
    layout: FederationConfig,
    engines: EngineConfig,
    history: History,
    on_finished: Callable[[Federation], None],
    checkpoints: Checkpoints | None,
) -> None:
    poll_seconds = SIMULATION_POLL_SECONDS if isinstance(grid, InMemoryGrid) else POLL_SECONDS
    with ExitStack() as stack:
        models = {
            method.name: GlobalModel(base, stack.enter_context(_engine(method.rule, base, engines)))
            for method in group
        }
        for model in models.values():
            model.engine.prepare(wait=True)  # many actors starting at once would starve the sites' workers
        config = group[0].laid_out(layout)
        federation = Federation(grid, base, models, config, history, poll_seconds, checkpoints=checkpoints)
        federation.run()
        on_finished(federation)
    if checkpoints is not None:
        checkpoints.clear()


def _start_ray(grid: Grid, engines: EngineConfig) -> None:
    # In `flwr run`'s own simulation Flower starts Ray, beside this thread.
    start_ray(engines.ray_address, wait=RAY_START_SECONDS if isinstance(grid, InMemoryGrid) else 0.0)


def _engine(rule: Rule, base: Base, engines: EngineConfig) -> Engine:
    return RayEngine(
        rule, base.layers.values(), actors=engines.actors, threads=engines.threads, num_gpus=engines.num_gpus
    )


def open_base(spec: str, private: Sequence[str] = ()) -> Base:
    """The base a spec names: a function that builds the model, or a checkpoint.

    Raises:
        ConfigError, FileError: nothing usable there.
    """
    if not spec:
        raise ConfigError(
            "no pretrained model is named",
            where="run config",
            wanted="base",
            do="Name a checkpoint or package.module:function in the key 'base'.",
        )
    if ":" in spec and not Path(spec).exists():
        return Base.from_model(find_function(spec, where="base")(), private)
    return Base.from_checkpoint(spec, private=private)


def save_merged(federation: Federation, folder: Path) -> None:
    """Writes the final merged vector of every rule as ``merged-RULE.safetensors``."""
    for name, model in federation.models.items():
        save(model.merged(), folder / f"merged-{name}.safetensors")


def _options_of(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """Takes options, ``NAME.OPTION``, out of the settings; empty ones stand for the default."""
    keys = [key for key in given if key.startswith(f"{name}.")]
    return {key.removeprefix(f"{name}.").replace("-", "_"): given.pop(key) for key in keys}


def _check_known(settings: Mapping[str, Any]) -> None:
    known = {name for config in CONFIGS for name in config.model_fields}
    known -= OF_METHOD - RunConfig.model_fields.keys()
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ConfigError(
            "unknown run-config key",
            got=unknown,
            wanted=" or ".join(sorted(known)),
            do=f"A rule's option is written RULE.OPTION; the rules are {', '.join(RULES)}.",
        )


def _picked(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """The config of one part, from the settings of all parts."""
    return validated(kind, {key: value for key, value in settings.items() if key in kind.model_fields})


def _log(event: Event) -> None:
    level = logging.WARNING if event["event"] == "failed" else logging.INFO
    logger.log(level, json.dumps(event))
