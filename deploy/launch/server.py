"""``fedmerge server``: one process that merges, with Flower's processes under it.

Things are started in this order and stopped in the reverse one: Ray, the aggregator, the gRPC service,
metrics, the SuperLink, the proxy for sites, SuperExec, and the run that serves the sites.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fedmerge.common.base import Base
from fedmerge.common.checkpoint import open_checkpoint
from fedmerge.common.errors import ConfigError, Unreachable
from fedmerge.common.lookup import find_function
from fedmerge.common.records import VersionRecord
from fedmerge.common.tls import server_credentials
from fedmerge.deploy.launch.config import EngineChoice, HostPort, Model, ServerConfig, Training, local
from fedmerge.deploy.launch.explain import explain
from fedmerge.deploy.launch.ports import wait_free
from fedmerge.deploy.launch.processes import KeptRunning, NewLines, settle, until_told, wait_until
from fedmerge.deploy.launch.proxy import FleetProxy
from fedmerge.deploy.launch.superlink import ONLINE, Control, Place, ServingRun, Sites, Value
from fedmerge.deploy.offline import kinds_by_name
from fedmerge.server.aggregator import Aggregator, AggregatorSettings
from fedmerge.server.engine.engine import Engine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.rule import Rule
from fedmerge.server.metrics import Metrics
from fedmerge.server.retention import Retention
from fedmerge.server.service.access import Access, CertificateAccess, LoopbackAccess, SocketAccess
from fedmerge.server.service.server import Listener, Service
from fedmerge.server.service.settings import ServiceSettings

logger = logging.getLogger("fedmerge.launch")

SOCKET = "aggregator.sock"
PORT_SECONDS = 20.0
SUPERLINK_SECONDS = 60.0
LOOK_SECONDS = 1.0
SLOW_LOOK_SECONDS = 5.0
"""Between two questions to the SuperLink."""

MOST_MISSED = 12
"""Unanswered questions after which a SuperLink is taken to hang."""

Look = Callable[[], None]


def run_server(config: ServerConfig) -> None:
    """Serves until SIGINT or SIGTERM; says in the log what it does and what it waits for.

    Raises:
        FedmergeError: it cannot start, or something does not stay up; everything is stopped by then.
    """
    settle()
    stopping = threading.Event()
    with ExitStack() as stack:
        looks: list[Look] = []
        aggregator = _open_aggregator(config, stack)
        stack.enter_context(until_told(stopping))  # after Ray, which takes SIGTERM for itself
        address = _serve_grpc(config, aggregator, stack)
        if config.flower.enabled:
            looks = _serve_flower(config, address, aggregator.metrics, stack, stopping)
        if not stopping.is_set():
            logger.info("serving")
        while not stopping.wait(LOOK_SECONDS):
            for look in looks:
                look()
        logger.info("stopping")
    logger.info("stopped")


def open_model(model: Model) -> Base:
    """The base that a config names.

    Raises:
        ConfigError, FileError, UnknownLayer: nothing usable there.
    """
    source, colon, name = model.base.rpartition(":")
    if not (source and colon and name.isidentifier()):
        opened = open_checkpoint(Path(model.base))
        return Base.from_checkpoint(opened, kinds_by_name(opened, model.kinds), model.private)
    if model.kinds:
        raise ConfigError("kinds go with a checkpoint; a model's class knows its own", where="[model] kinds")
    return Base.from_model(find_function(model.base, where="[model] base")(), model.private)


def _open_aggregator(config: ServerConfig, stack: ExitStack) -> Aggregator:
    rule, folder = make_rule(config.rule.name, config.rule.options), config.state.folder
    logger.info("reading the base %s", config.model.base)
    base = open_model(config.model)
    make_engine = _engine_maker(config.engine, rule, base)
    logger.info("opening %s: rule %s over base %s", folder, rule.name, base.fingerprint[:12])
    settings = AggregatorSettings(
        limits=config.limits, retention=Retention(**config.state.model_dump(exclude={"folder"}))
    )
    opened = Aggregator(folder, base, rule, make_engine, settings, on_merge=_replayed)
    aggregator = stack.enter_context(opened)
    now = aggregator.status()
    waiting = f"{now.staged} updates wait to be merged, {now.held} for approval"
    logger.info("version %d, %d tasks; %s", now.version, len(now.tasks), waiting)
    if now.failing:
        logger.error("merging stands still: %s", now.failing)
    aggregator.metrics.follow(aggregator.status, folder)
    return aggregator


def _engine_maker(choice: EngineChoice, rule: Rule, base: Base) -> Callable[[], Engine]:
    layers = list(base.layers.values())
    if choice.ray_address == "none":
        from fedmerge.server.engine.local import LocalEngine

        return partial(LocalEngine, rule, layers, threads=choice.threads)
    from fedmerge.server.engine.ray_engine import RayEngine, start_ray

    where = choice.ray_address or "a private instance on loopback"
    logger.info("connecting to Ray: %s", where)
    start_ray(choice.ray_address or "local")
    return partial(
        RayEngine,
        rule,
        layers,
        actors=choice.actors,
        threads=choice.threads,
        num_gpus=choice.num_gpus,
        # Of a cluster, each actor takes its cores; this machine's are shared with everything else here.
        num_cpus=choice.threads if choice.ray_address else 0,
    )


def _replayed(version: VersionRecord) -> None:
    logger.info("merged again after the restart: version %d, task %s", version.number, version.task)


def _serve_grpc(config: ServerConfig, aggregator: Aggregator, stack: ExitStack) -> str:
    """Starts the gRPC service and metrics; returns the address of the unix socket."""
    socket = config.state.folder / SOCKET
    socket.unlink(missing_ok=True)
    listeners = [Listener(f"unix:{socket}", SocketAccess())]
    if config.service.listen is not None:
        access: Access = LoopbackAccess()
        credentials = None
        if config.tls is not None:
            access = CertificateAccess(config.tls.ca, config.tls.crl)
            credentials = server_credentials(config.tls)
        listeners.append(Listener(str(config.service.listen), access, credentials))
    settings = ServiceSettings(**config.service.model_dump(exclude={"listen"}))
    service = stack.enter_context(Service(aggregator, listeners, settings, aggregator.metrics))
    logger.info("gRPC at %s", ", ".join(service.addresses))
    if listen := config.metrics.listen:
        stack.enter_context(aggregator.metrics.serve(listen.host, listen.port, config.tls))
        logger.info("metrics at %s", listen)
    return service.addresses[0]


def _serve_flower(
    config: ServerConfig, aggregator: str, metrics: Metrics, stack: ExitStack, stopping: threading.Event
) -> list[Look]:
    """Starts Flower's side; returns what must be looked after. If told to stop meanwhile, a part of it."""
    flower, tls = config.flower, config.tls
    place = Place(config.state.folder / "flower", flower.superlink_port, tls)
    place.prepare()
    logger.info("starting the SuperLink on %s", place.address)
    for key, address in (("superlink_port", local(flower.superlink_port)), ("listen", flower.listen)):
        wait_free(address, f"flower.{key}", PORT_SECONDS, stopping)
    superlink = KeptRunning(place.superlink(), explain=explain)
    stack.callback(superlink.stop)
    assert superlink.running is not None, "it was just started"
    if not wait_until(place.healthy, superlink.running, SUPERLINK_SECONDS, stopping):
        return []
    control = Control(place)
    stack.callback(control.close)
    looks: list[Look] = [superlink.look, _seldom(_unless_healthy(place, superlink))]
    if tls is not None:
        looks.append(_seldom(partial(_let_in, Sites(flower.sites), control)))
        looks[-1]()
    _open_proxy(flower.listen, place, stack)
    superexec = KeptRunning(place.superexec({}), explain=explain)
    stack.callback(superexec.stop)
    run = ServingRun(control, _run_config(config, aggregator))
    stack.callback(run.stop)
    run.start()
    events = NewLines(_serving_folder(config) / "history.jsonl", logging.getLogger("fedmerge.server"))
    return [*looks, superexec.look, run.look, _seldom(partial(_count, control, metrics)), events.look]


def _run_config(config: ServerConfig, aggregator: str) -> dict[str, Value]:
    """The run config of a ServerApp that serves this process's aggregator."""
    settings = config.serving.model_copy(
        update={
            "registered_sites": config.tls is not None,
            "max_update_bytes": config.limits.max_update_bytes,
        }
    )
    out = str(_serving_folder(config))
    shared: dict[str, Value] = {"mode": "serve", "aggregator": aggregator, "out": out}
    serving = {key.replace("_", "-"): value for key, value in settings.model_dump().items()}
    return shared | serving | _asked(config.training)


def _asked(training: Training) -> dict[str, Value]:
    """What sites are asked of their training, as run-config keys."""
    told: dict[str, Value] = {
        "start": training.start,
        "compress": training.compress,
        "train": ",".join(training.options),
    }
    for owner in ("loop", *training.options):
        chosen = getattr(training, owner).model_dump(exclude_none=True)
        told |= {f"{owner}.{key.replace('_', '-')}": value for key, value in chosen.items()}
    return told


def _serving_folder(config: ServerConfig) -> Path:
    return config.state.folder / "flower" / "serving"


def _open_proxy(listen: HostPort, place: Place, stack: ExitStack) -> None:
    scheme = "http" if place.tls is None else "https"
    upstream_ca = None if place.tls is None else place.tls.ca
    upstream = f"{scheme}://{place.address}"
    proxy = FleetProxy(listen.host, listen.port, upstream, place.tls, upstream_ca)
    proxy.start()
    stack.callback(proxy.stop)
    logger.info("SuperNodes connect to %s", listen)


def _let_in(sites: Sites, control: Control) -> None:
    if sites.changed():
        sites.apply(control)


def _count(control: Control, metrics: Metrics) -> None:
    metrics.sites_connected(sum(node.status == ONLINE for node in control.nodes()))


def _unless_healthy(place: Place, superlink: KeptRunning) -> Look:
    """Ends a SuperLink that runs and has not answered for some time."""
    missed = 0

    def look() -> None:
        nonlocal missed
        missed = missed + 1 if superlink.running is not None and not place.healthy() else 0
        if missed >= MOST_MISSED:
            superlink.restart(f"it has not answered {missed} times")
            missed = 0

    return look


def _seldom(ask: Look) -> Look:
    """Asks the SuperLink something every few seconds; when it does not answer, next time."""
    last = -math.inf

    def look() -> None:
        nonlocal last
        if time.monotonic() - last >= SLOW_LOOK_SECONDS:
            last = time.monotonic()
            try:
                ask()
            except Unreachable as error:
                logger.warning("%s", error)

    return look
