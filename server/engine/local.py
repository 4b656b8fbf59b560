"""The engine in this process: threads over layers, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.machine import cores
from fedmerge.server.engine.engine import Engine, OnLayer, Step
from fedmerge.server.engine.placement import cost
from fedmerge.server.engine.shard import Shard
from fedmerge.server.merge.rule import LayerSums, Rule, State, Totals

Found = TypeVar("Found")


class LocalEngine(Engine):
    """One shard in this process, its layers worked on by a pool of threads.

    Args:
        workers: threads over layers; by default the cores this process may use.
        threads: threads inside one layer's linear algebra. It is set for the whole process until
            the engine is closed.
        device: where states live.
    """

    def __init__(
        self,
        rule: Rule,
        layers: Iterable[LayerSpec],
        *,
        workers: int | None = None,
        threads: int = 1,
        device: str = "cpu",
    ) -> None:
        super().__init__(rule, layers, threads=threads)
        self._threads_before = torch.get_num_threads()
        torch.set_num_threads(threads)
        self._workers = workers or cores()
        self._pool = ThreadPoolExecutor(self._workers, "merge", torch.set_num_threads, (threads,))
        self._shard = Shard(rule, self.layers.values(), device)
        self._preparing: dict[str, Future[None]] = {}
        self._closed = False

    @property
    def workers(self) -> int:
        return self._workers

    def prepare(self, wait: bool = False) -> None:
        for name in self._costliest_first(self.layers.keys() - self._preparing.keys()):
            self._preparing[name] = self._pool.submit(self._shard.prepare, name)
        if wait:
            for future in self._preparing.values():
                future.result()

    def state(self, name: str) -> State:
        return self._shard.state(name)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        if not self._closed:
            torch.set_num_threads(self._threads_before)
        self._closed = True

    def _absorb(self, step: Step, on_layer: OnLayer) -> dict[str, LayerSums]:
        sums = {name: self._shard.untouched(name) for name in self.layers}
        try:
            return sums | self._of_each(step.update.names, partial(self._absorb_layer, step), on_layer)
        except BaseException:
            self._shard.abandon()
            raise

    def _of_each(
        self, names: Iterable[str], work: Callable[[str], Found], on_layer: OnLayer = lambda _: None
    ) -> dict[str, Found]:
        """What ``work`` gives for each layer, the costliest begun first; if it fails, none still runs."""
        futures = {name: self._pool.submit(work, name) for name in self._costliest_first(names)}
        found = {}
        try:
            for name, future in futures.items():
                found[name] = future.result()
                on_layer(name)
        finally:
            for future in futures.values():
                future.cancel()
            wait(futures.values())
        return found

    def _absorb_layer(self, step: Step, name: str) -> LayerSums:
        preparing = self._preparing.pop(name, None)
        if preparing is not None and not preparing.cancel():
            preparing.result()
        return self._shard.absorb(name, step.update.read(name), step.act, step.context(name))

    def _measure_layers(self, step: Step) -> dict[str, Tensor]:
        return self._of_each(step.update.names, partial(self._measure_layer, step))

    def _measure_layer(self, step: Step, name: str) -> Tensor:
        return self._shard.measure(name, step.update.read(name), step.context(name))

    def _settle(self, names: Iterable[str], totals: Totals, *, pending: bool) -> None:
        if self.rule.heavy:
            self._of_each(names, partial(self._shard.settle, totals=totals, pending=pending))

    def _finish(self, step: Step) -> None:
        self._shard.finish()

    def _abandon(self) -> None:
        self._shard.abandon()

    def _read(self, name: str, totals: Totals, *, pending: bool) -> Tensor:
        return self._shard.read(name, totals, pending)

    def _restore(self, read: Callable[[str], State], names: Iterable[str]) -> None:
        for future in self._preparing.values():
            if not future.cancel():
                future.exception()
        self._preparing = {}
        self._shard.clear()
        for name in names:
            self._shard.put(name, read(name))

    def _costliest_first(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=lambda name: (-cost(self.layers[name]), name))
