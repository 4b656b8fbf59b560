"""The engine on Ray actors: the only module that imports ray.

Every actor holds some layers: their states and what was prepared. The driver sends one layer at a
time, so no process holds a whole vector twice, and only numpy arrays and our own types travel.

When an actor dies, its shard is rebuilt on a new one from the last exported states (owned by the
driver, in Ray's object store) and the updates absorbed since, which the driver can still read. An
update counts once its pending states are current on every shard; absorbing a layer again overwrites
its pending state, so nothing is ever applied twice.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import InitVar, dataclass, field
from functools import partial
from typing import Any

import ray
import torch
from ray._private import ray_constants
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)
from torch import Tensor

from fedmerge.common.errors import ConfigError, EngineError, FedmergeError
from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.server.engine import placement
from fedmerge.server.engine.engine import ALLOCATOR, Act, Engine, OnLayer, Step
from fedmerge.server.engine.shard import Shard, as_update
from fedmerge.server.merge.rule import Context, LayerSums, Rule, State, Totals, tensors_of

IN_FLIGHT = 4
"""Layers on their way to one actor at a time."""

CONNECT_SECONDS = 10.0

REVIVALS = 3
"""How often one shard may lose its actor within one call before the call gives up."""

LOST = (ActorDiedError, ActorUnavailableError, RayActorError, ObjectLostError)

Arrays = tuple[Any, ...]

Facts = tuple[int, dict[str, Any], int, Any, bool]
"""A :class:`Context` as it travels: merges, statistics as arrays, seed, what was measured, whether a step."""

Exported = tuple[type[State], dict[str, Any]]
"""A state as it travels: its type and its fields as arrays."""


class ShardActor:
    """A shard behind array-valued calls; a plain class until Ray wraps it."""

    def __init__(self, rule: Rule, layers: list[LayerSpec], threads: int) -> None:
        torch.set_num_threads(threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        self._shard = Shard(rule, layers, "cuda" if ray.get_gpu_ids() else "cpu")

    def measure(self, name: str, arrays: Arrays, facts: Facts) -> Any:
        return self._shard.measure(name, self._update(name, arrays), _context(facts)).numpy()

    def absorb(self, name: str, arrays: Arrays, act: Act, facts: Facts) -> LayerSums:
        return self._shard.absorb(name, self._update(name, arrays), act, _context(facts))

    def settle(self, totals: Totals, pending: bool, names: list[str]) -> None:
        for name in names:
            self._shard.settle(name, totals, pending)

    def untouched(self, names: list[str]) -> list[LayerSums]:
        return [self._shard.untouched(name) for name in names]

    def finish(self) -> None:
        self._shard.finish()

    def abandon(self) -> None:
        self._shard.abandon()

    def prepare(self) -> None:
        for name in self._shard.layers:
            self._shard.prepare(name)

    def read(self, name: str, totals: Totals, pending: bool) -> Any:
        return self._shard.read(name, totals, pending).numpy()

    def state(self, name: str) -> Exported:
        state = self._shard.state(name)
        return type(state), {field: tensor.numpy() for field, tensor in tensors_of(state).items()}

    def clear(self) -> None:
        self._shard.clear()

    def put(self, name: str, exported: Exported) -> None:
        self._shard.put(name, _state(exported))

    def export(self) -> dict[str, Exported]:
        """Every touched layer's state, enough for :meth:`restore`."""
        return {name: self.state(name) for name in self._shard.states}

    def restore(self, exported: Mapping[str, Exported]) -> None:
        self._shard.clear()
        for name, state in exported.items():
            self._shard.put(name, _state(state))

    def whereabouts(self) -> dict[str, str | int]:
        """Process id, host and device, for logs and tests."""
        return {"pid": os.getpid(), "host": os.uname().nodename, "device": str(self._shard.device)}

    def _update(self, name: str, arrays: Arrays) -> LayerUpdate:
        return as_update(tuple(_tensor(array) for array in arrays), self._shard.layers[name].shape)


@dataclass
class _Place:
    """One shard: its layers, its actor, and what it takes to rebuild it.

    ``lost`` says that the actor is not to be asked any more, alive or not: the shard is rebuilt before
    its next use. ``losses`` counts within the current call.
    """

    layers: list[LayerSpec]
    actor: Any
    lost: bool = False
    losses: int = 0
    exported: Any = None
    exporting: Any = None
    since: deque[Step] = field(default_factory=deque)


@dataclass
class _Feed:
    """One shard's layers of an arrival: still to send, and sent but not answered."""

    place: _Place
    brought: InitVar[frozenset[str]]
    ask: Callable[[_Place, str, Step], Any]
    names: deque[str] = field(default_factory=deque)
    sent: dict[Any, str] = field(default_factory=dict)

    def __post_init__(self, brought: frozenset[str]) -> None:
        self.restart(brought)

    def restart(self, brought: frozenset[str]) -> None:
        """Everything again, for an actor that has absorbed nothing."""
        self.names = deque(layer.name for layer in self.place.layers if layer.name in brought)
        self.sent = {}

    @property
    def busy(self) -> bool:
        return bool(self.names or self.sent)

    def send(self, step: Step) -> None:
        while self.names and len(self.sent) < IN_FLIGHT:
            name = self.names.popleft()
            self.sent[self.ask(self.place, name, step)] = name


class RayEngine(Engine):
    """Shards on Ray actors, placed by cost.

    Ray must be running or startable: see :func:`start_ray`.

    Args:
        actors: how many; at most one per layer.
        threads: torch threads in each actor.
        num_gpus: GPUs per actor, fractions allowed; None gives each actor one if the cluster has
            enough, an equal fraction if it has fewer, none if it has none.
        num_cpus: CPUs Ray reserves per actor. 0 where Flower's simulation holds them all.
    """

    def __init__(
        self,
        rule: Rule,
        layers: Iterable[LayerSpec],
        *,
        actors: int = 2,
        threads: int = 1,
        num_gpus: float | None = None,
        num_cpus: float = 0,
    ) -> None:
        super().__init__(rule, layers, threads=threads)
        if actors < 1:
            raise ConfigError("an engine needs at least one actor", got=actors, wanted=">= 1")
        start_ray()
        groups = placement.place(self.layers.values(), actors)
        gpus = _gpus_per_actor(len(groups)) if num_gpus is None else num_gpus
        environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads), **ALLOCATOR}
        self._remote = ray.remote(num_cpus=num_cpus, num_gpus=gpus, max_restarts=0)(ShardActor).options(
            scheduling_strategy="SPREAD", runtime_env={"env_vars": environment}
        )
        self._places = [_Place(group, self._start(group)) for group in groups]
        self._place_of = {layer.name: place for place in self._places for layer in place.layers}
        self._absorbed: Step | None = None

    @property
    def workers(self) -> int:
        return len(self._places)

    def whereabouts(self) -> list[dict[str, str | int]]:
        """Process id, host and device of every actor."""
        return [self._call(place, "whereabouts") for place in self._places]

    def prepare(self, wait: bool = False) -> None:
        for place in self._places:
            place.actor.prepare.remote()
        if wait:
            for place in self._places:
                self._call(place, "prepare")

    def state(self, name: str) -> State:
        return _state(self._call(self._place_of[name], "state", name))

    def close(self) -> None:
        if ray.is_initialized():
            for place in self._places:
                ray.kill(place.actor)
        self._places = []

    def _absorb(self, step: Step, on_layer: OnLayer) -> dict[str, LayerSums]:
        try:
            sums = self._absorb_everywhere(step, on_layer)
        except BaseException:
            self._abandon()
            raise
        self._absorbed = step
        return sums

    def _absorb_everywhere(self, step: Step, on_layer: OnLayer) -> dict[str, LayerSums]:
        brought = frozenset(step.update.names)
        sums: dict[str, LayerSums] = {}
        for place in self._places:
            kept = [layer.name for layer in place.layers if layer.name not in brought]
            sums |= zip(kept, self._call(place, "untouched", kept), strict=True)
        return sums | self._ask_everywhere(_absorb, step, on_layer)

    def _measure_layers(self, step: Step) -> dict[str, Tensor]:
        found = self._ask_everywhere(_measure, step, lambda _: None)
        return {name: _tensor(values) for name, values in found.items()}

    def _ask_everywhere(
        self, ask: Callable[[_Place, str, Step], Any], step: Step, on_layer: OnLayer
    ) -> dict[str, Any]:
        """Feeds every shard its layers, the costliest of each first, a few at a time; answers by layer."""
        brought = frozenset(step.update.names)
        answers: dict[str, Any] = {}
        feeds = [_Feed(place, brought, ask) for place in self._places]
        for place in self._places:
            place.losses = 0
            self._ensure_alive(place)
        while any(feed.busy for feed in feeds):
            for feed in feeds:
                feed.send(step)
            done, _ = ray.wait([reference for feed in feeds for reference in feed.sent], num_returns=1)
            feed = next(feed for feed in feeds if done[0] in feed.sent)
            name = feed.sent.pop(done[0])
            try:
                known, answers[name] = name in answers, _result(done[0])
            except LOST as error:
                self._lose(feed.place, error)
                self._ensure_alive(feed.place)
                feed.restart(brought)
            else:
                if not known:
                    on_layer(name)
        return answers

    def _settle(self, names: Iterable[str], totals: Totals, *, pending: bool) -> None:
        """Actors that are lost here are found and replaced when a layer is read from them."""
        if self.rule.heavy:
            wanted = frozenset(names)
            asked = [
                place.actor.settle.remote(
                    totals, pending, [layer.name for layer in place.layers if layer.name in wanted]
                )
                for place in self._places
                if not place.lost
            ]
            ray.wait(asked, num_returns=len(asked), fetch_local=False)

    def _abandon(self) -> None:
        """Nothing stays pending, also where an actor is dead or silent."""
        self._absorbed = None
        for place in self._places:
            try:
                _result(place.actor.abandon.remote())
            except LOST:
                place.lost = True

    def _finish(self, step: Step) -> None:
        try:
            for place in self._places:
                self._finish_place(place)
        except BaseException:
            for place in self._places:
                place.lost = True  # some have finished: all go back to where they were
            raise
        finally:
            self._absorbed = None
        for place in self._places:
            place.since.append(step)
        for place in self._places:
            self._collect_export(place)
            if place.exporting is None:
                place.exporting = len(place.since), place.actor.export.remote()

    def _finish_place(self, place: _Place) -> None:
        place.losses = 0
        self._insist(place, lambda: _result(place.actor.finish.remote()))

    def _read(self, name: str, totals: Totals, *, pending: bool) -> Tensor:
        return _tensor(self._call(self._place_of[name], "read", name, totals, pending))

    def _restore(self, read: Callable[[str], State], names: Iterable[str]) -> None:
        """One layer at a time into every actor; what they export then is what they are rebuilt from."""
        brought = frozenset(names)
        for place in self._places:
            place.since.clear()
            place.exported = place.exporting = None
            place.losses = 0
            self._insist(place, partial(self._restore_place, place, read, brought))

    def _restore_place(self, place: _Place, read: Callable[[str], State], brought: frozenset[str]) -> None:
        _result(place.actor.clear.remote())
        for layer in place.layers:
            if layer.name in brought:
                state = read(layer.name)
                arrays = {field: tensor.numpy() for field, tensor in tensors_of(state).items()}
                _result(place.actor.put.remote(layer.name, (type(state), arrays)))
        exported = place.actor.export.remote()
        ray.wait([exported], fetch_local=False)
        place.exported = exported

    def _collect_export(self, place: _Place) -> None:
        """Takes over an export that has arrived; what it contains need not be replayed."""
        if place.exporting is None:
            return
        covered, reference = place.exporting
        ready, _ = ray.wait([reference], timeout=0, fetch_local=False)
        if not ready:
            return
        place.exporting = None
        try:
            ray.get(reference)
        except RayError:  # whatever it was, the next export covers these vectors too
            return
        place.exported = reference
        for _ in range(covered):
            place.since.popleft()

    def _revive(self, place: _Place) -> None:
        """A new actor with the shard's last exported states and every update since."""
        self._collect_export(place)
        place.exporting = None
        ray.kill(place.actor)
        place.actor = self._start(place.layers)
        if place.exported is not None:
            _result(place.actor.restore.remote(place.exported))
        for step in place.since:
            self._absorb_alone(place, step)
            _result(place.actor.finish.remote())
        if self._absorbed is not None:
            self._absorb_alone(place, self._absorbed)
        place.lost = False

    def _absorb_alone(self, place: _Place, step: Step) -> None:
        for layer in place.layers:
            if layer.name in step.update.names:
                _result(_absorb(place, layer.name, step))

    def _call(self, place: _Place, method: str, *arguments: Any) -> Any:
        """One call that may be repeated on a new actor."""
        place.losses = 0
        return self._insist(place, lambda: _result(getattr(place.actor, method).remote(*arguments)))

    def _insist(self, place: _Place, attempt: Callable[[], Any]) -> Any:
        """What an attempt returns that the actor lived through."""
        while True:
            self._ensure_alive(place)
            try:
                return attempt()
            except LOST as error:
                self._lose(place, error)

    def _ensure_alive(self, place: _Place) -> None:
        while place.lost:
            try:
                self._revive(place)
            except LOST as error:
                self._lose(place, error)

    def _lose(self, place: _Place, error: Exception) -> None:
        place.lost = True
        place.losses += 1
        if place.losses > REVIVALS:
            raise _given_up(place) from error

    def _start(self, layers: list[LayerSpec]) -> Any:
        return self._remote.remote(self.rule, layers, self.threads)


def start_ray(address: str | None = None, *, num_cpus: int | None = None, wait: float = 0.0) -> None:
    """Attaches to the Ray that is there, or starts a private local one (loopback, no dashboard).

    Args:
        address: ``host:port`` of a cluster; None uses RAY_ADDRESS, else a local instance.
        num_cpus: CPUs of a local instance.
        wait: seconds to wait for somebody else in this process to start Ray first, as Flower's
            simulation does.

    Raises:
        EngineError: no cluster at the address, or nobody started Ray in time.
    """
    deadline = time.monotonic() + wait
    while wait and not ray.is_initialized():
        if time.monotonic() > deadline:
            raise EngineError("Ray was not started", got=f"nothing after {wait:.0f} s")
        time.sleep(0.1)
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    _require_listener(where)
    local: dict[str, Any] = {"include_dashboard": False, "num_cpus": num_cpus}
    # Ray turns 127.0.0.1 into the host's address unless clusters are off; off, every port is on loopback.
    ray_constants.ENABLE_RAY_CLUSTER = where != "local"
    try:
        ray.init(
            address=where,
            namespace="fedmerge",
            log_to_driver=False,
            logging_level=logging.WARNING,
            **(local if where == "local" else {}),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise EngineError(
            "cannot reach Ray",
            got=str(error).splitlines()[0],
            where=where,
            do="Give the address of a running cluster, or none to start a local one.",
        ) from error


def _require_listener(address: str) -> None:
    """Refuses at once an address where nothing listens; Ray itself would keep trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not (colon and port.isdigit()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise EngineError(
            "no Ray cluster listens there",
            where=address,
            got=str(error),
            do="Give the address of a running cluster, or none to start a local one.",
        ) from error


def _gpus_per_actor(actors: int) -> float:
    gpus = float(ray.cluster_resources().get("GPU", 0.0))  # type: ignore[no-untyped-call]
    return min(1.0, gpus / actors)


def _absorb(place: _Place, name: str, step: Step) -> Any:
    """Sends one layer of a step to its actor; returns the reference to its sums."""
    return place.actor.absorb.remote(name, _arrays(name, step), step.act, _facts(step.context(name)))


def _measure(place: _Place, name: str, step: Step) -> Any:
    return place.actor.measure.remote(name, _arrays(name, step), _facts(step.context(name)))


def _arrays(name: str, step: Step) -> Arrays:
    return tuple(tensor.contiguous().numpy() for tensor in step.update.read(name).tensors())


def _facts(context: Context) -> Facts:
    measured = None if context.measured is None else context.measured.numpy()
    statistics = {key: tensor.contiguous().numpy() for key, tensor in context.statistics.items()}
    return context.merges, statistics, context.seed, measured, context.step


def _context(facts: Facts) -> Context:
    merges, statistics, seed, measured, step = facts
    tensors = {key: _tensor(array) for key, array in statistics.items()}
    return Context(merges, tensors, seed, None if measured is None else _tensor(measured), step)


def _state(exported: Exported) -> State:
    kind, arrays = exported
    return kind(**{field: _tensor(array) for field, array in arrays.items()})


def _tensor(array: Any) -> Tensor:
    """A copy of its own: arrays from the object store are read-only and may be freed."""
    return torch.tensor(array)


def _result(reference: Any) -> Any:
    """A call's result; our own typed errors come out as themselves."""
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, FedmergeError):
            raise error.cause from error
        raise


def _given_up(place: _Place) -> EngineError:
    return EngineError(
        "its actor keeps dying",
        where=f"shard of {len(place.layers)} layers",
        got=f"{place.losses} losses in one call",
        do="Look at the memory of the Ray node.",
    )
