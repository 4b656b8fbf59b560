"""The engine in this process: threads over layers, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.machine import cores
from fedmerge.server.engine.engine import Engine, OnLayer, Step
from fedmerge.server.engine.placement import cost
from fedmerge.server.engine.shard import Shard
from fedmerge.server.merge.rule import LayerSums, Rule, State, Totals


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
        futures = {
            name: self._pool.submit(self._absorb_layer, name, step)
            for name in self._costliest_first(step.update.names)
        }
        try:
            for name, future in futures.items():
                sums[name] = future.result()
                on_layer(name)
        except BaseException:
            for future in futures.values():
                future.cancel()
            for future in futures.values():
                if not future.cancelled():
                    future.exception()
            self._shard.abandon()
            raise
        return sums

    def _absorb_layer(self, name: str, step: Step) -> LayerSums:
        preparing = self._preparing.pop(name, None)
        if preparing is not None and not preparing.cancel():
            preparing.result()
        return self._shard.absorb(name, step.update.read(name), step.removing, step.context(name))

    def _measure_layers(self, step: Step) -> list[Tensor]:
        return list(self._pool.map(self._measure_layer, step.update.names, repeat(step)))

    def _measure_layer(self, name: str, step: Step) -> Tensor:
        return self._shard.measure(name, step.update.read(name), step.context(name))

    def _settle(self, names: Iterable[str], totals: Totals, *, pending: bool) -> None:
        if self.rule.heavy:
            read = partial(self._shard.read, totals=totals, pending=pending)
            for _ in self._pool.map(read, self._costliest_first(names)):
                pass

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
