"""The engine: a rule's state for every layer, spread over workers.

One interface, two engines: :class:`~fedmerge.server.engine.local.LocalEngine` in this process and
:class:`~fedmerge.server.engine.ray_engine.RayEngine` on actors. Both give the same bits for any number
of workers, because every layer is computed by one worker with a fixed number of threads and the only
numbers that cross layers are summed exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from hashlib import sha256
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from fedmerge.common.errors import EngineError, FactorisationFailed, StatisticsMissing, UnknownLayer
from fedmerge.common.layers import LayerSpec
from fedmerge.common.statistics import OF_INPUTS
from fedmerge.common.taskvector import Dense, TaskVector, no_statistics
from fedmerge.server.merge.rule import Context, LayerSums, Rule, State, Totals, tensors_of
from fedmerge.server.merge.spectrum import LinAlgError

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Environment of worker processes: glibc returns tensors of a mebibyte and more when they are freed. Left
alone it raises that bound as it goes, and memory grows with its fragments."""

OnLayer = Callable[[str], None]
"""Called with a layer's name when it is done; for progress bars."""


class Act(StrEnum):
    """What is done with a vector: it is absorbed, taken out again, or added to the merged model as it is."""

    ABSORB = "absorb"
    REMOVE = "remove"
    ADJUST = "adjust"


@dataclass(frozen=True)
class Step:
    """One vector and what is done with it.

    ``merges`` were there before; ``measured`` is the sum of what the rule measured of it, if it does;
    ``relative`` says that it is measured from the merged model.
    """

    update: TaskVector
    act: Act = Act.ABSORB
    merges: int = 0
    measured: Tensor | None = None
    relative: bool = False

    def context(self, name: str) -> Context:
        """What the rule may know when it absorbs one layer."""
        update = self.update
        seed = seed_of(update, name)
        return Context(self.merges, update.statistics(name), seed, self.measured, self.relative)


@dataclass(frozen=True)
class Pending:
    """A step absorbed everywhere, and the engine's totals and touched layers once it is current."""

    step: Step
    totals: Totals
    touched: frozenset[str]


class Engine(ABC):
    """State of one rule over all merged layers of a base.

    Attributes:
        rule: the merge rule; ``layers``: the layers it holds, by name.
        totals: the global scalars after the last merge; ``touched``: layers some update has brought.
        threads: threads per worker, fixed because results depend on it in the last bits.
        workers: how many workers share the layers.
    """

    def __init__(self, rule: Rule, layers: Iterable[LayerSpec], *, threads: int = 1) -> None:
        self.rule = rule
        self.layers = {layer.name: layer for layer in layers if layer.merged}
        self.threads = threads
        self.totals = Totals()
        self.touched: frozenset[str] = frozenset()
        self._pending: Pending | None = None

    @property
    @abstractmethod
    def workers(self) -> int: ...

    def merge(self, update: TaskVector, on_layer: OnLayer = lambda _: None) -> Totals:
        """Absorbs one task vector and makes it current at once. Arguments and errors as :meth:`absorb`."""
        totals = self.absorb(update, on_layer)
        self.commit()
        return totals

    def absorb(
        self,
        update: TaskVector,
        on_layer: OnLayer = lambda _: None,
        *,
        act: Act = Act.ABSORB,
        relative: bool = False,
    ) -> Totals:
        """Absorbs one task vector into every layer, pending until :meth:`commit`, all or nothing.

        Args:
            update: finite values with the layers' shapes; layers it does not name are unchanged.
                Layers are read from it one at a time, and may be read again if a worker dies.
            act: REMOVE takes the vector out instead, for rules that are ``additive``; ADJUST adds it to the
                merged model and counts as no merge, for rules that have :meth:`Rule.adjust`.
            relative: whether it is measured from the merged model; for rules that take ``steps``.

        Returns:
            The totals as they will be after the commit.

        Raises:
            UnknownLayer: the update names a layer this engine does not hold.
            StatisticsMissing: the rule needs what the update does not bring of a layer.
            FedmergeError: whatever reading a layer of the update raises.
            EngineError: a worker could not be replaced, or a factorisation failed. In every case the
                model is as it was before, and nothing is pending.
        """
        self.abandon()
        for name in update.names:
            if name not in self.layers:
                raise UnknownLayer("not a layer of this engine", where=update.label, layer=name)
        needs = self.rule.needs if act is not Act.ADJUST else frozenset()
        step = Step(with_needed(update, needs), act, self.totals.merges, relative=relative)
        if self.rule.measures and act is not Act.ADJUST:
            step = replace(step, measured=self._measure(step))
        found = self._absorb(step, on_layer)
        totals = self._totals_after(act, [found[name] for name in self.layers])
        self._pending = Pending(step, totals, self.touched.union(update.names))
        return totals

    def _totals_after(self, act: Act, sums: list[LayerSums]) -> Totals:
        match act:
            case Act.ABSORB:
                return self.totals.after(sums)
            case Act.REMOVE:
                return self.totals.before(sums)
            case Act.ADJUST:
                return self.totals.adjusted(sums)

    def pending(self) -> TaskVector:
        """The merged task vector as it will be after the commit; while nothing is pending, as it is."""
        coming = self._pending
        if coming is None:
            return self.merged()
        self._settle(coming.touched, coming.totals, pending=True)
        return self._vector(coming.touched, lambda name: self._read(name, coming.totals, pending=True))

    def commit(self) -> None:
        """Makes what is pending current; without anything pending it does nothing.

        Raises:
            EngineError: a worker could not be replaced; the model is as it was before.
        """
        coming = self._pending
        if coming is None:
            return
        try:
            self._finish(coming.step)
        finally:
            self._pending = None
        self.totals, self.touched = coming.totals, coming.touched

    def abandon(self) -> None:
        """Drops what is pending; the model was never changed."""
        if self._pending is not None:
            self._pending = None
            self._abandon()

    def restore(self, read: Callable[[str], State], touched: Iterable[str], totals: Totals) -> None:
        """Takes over a saved model and forgets everything else.

        Args:
            read: the state of one layer, asked for the touched ones in turn.
        """
        self.abandon()
        self.touched, self.totals = frozenset(touched), totals
        self._restore(read, [name for name in self.layers if name in self.touched])

    def merged(self) -> TaskVector:
        """The merged task vector, layers in the base's order, each read from the engine when asked for.

        Layers that no update has touched are listed as unchanged.
        """
        self._settle(self.touched, self.totals, pending=False)
        return self._vector(self.touched, self.read_layer)

    def read_layer(self, name: str) -> Tensor:
        """The merged task vector of one layer, float32 in the layer's shape."""
        return self._read(name, self.totals, pending=False)

    def state_bytes(self) -> int:
        """What the rule keeps of all touched layers, without what it has prepared or read out."""
        return sum(tensor.nbytes for name in self.touched for tensor in tensors_of(self.state(name)).values())

    def _vector(self, touched: frozenset[str], read: Callable[[str], Tensor]) -> TaskVector:
        names = tuple(name for name in self.layers if name in touched)
        unchanged = tuple(name for name in self.layers if name not in touched)
        shapes = {name: self.layers[name].shape for name in names}
        return TaskVector(
            names, lambda name: Dense(read(name)), unchanged, label=self.rule.name, shapes=shapes
        )

    @abstractmethod
    def state(self, name: str) -> State:
        """A touched layer's current state, its tensors on the CPU; a copy is not promised."""

    @abstractmethod
    def prepare(self, wait: bool = False) -> None:
        """Starts factorising for the next arrival; returns at once unless asked to wait.

        Raises:
            EngineError: when waiting, a factorisation failed. Otherwise the next merge says so.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the workers. Closing twice is harmless."""

    def _measure(self, step: Step) -> Tensor:
        """What the rule measures of an update, summed in the order of the base's layers."""
        found = self._measure_layers(step)
        parts = [found[name] for name in self.layers if name in found]
        return sum(parts[1:], start=parts[0]) if parts else torch.zeros(0, dtype=torch.float64)

    @abstractmethod
    def _measure_layers(self, step: Step) -> dict[str, Tensor]:
        """:meth:`Rule.measure` of every layer that the update brings."""

    @abstractmethod
    def _settle(self, names: Iterable[str], totals: Totals, *, pending: bool) -> None:
        """Reads out heavy rules' layers in parallel, ahead of :meth:`_read`; for others nothing."""

    @abstractmethod
    def _absorb(self, step: Step, on_layer: OnLayer) -> dict[str, LayerSums]:
        """Absorbs into pending states; on any error none is left behind."""

    @abstractmethod
    def _finish(self, step: Step) -> None:
        """Makes the pending states of a step current; on any error those of before are."""

    @abstractmethod
    def _abandon(self) -> None:
        """Forgets pending states."""

    @abstractmethod
    def _read(self, name: str, totals: Totals, *, pending: bool) -> Tensor:
        """The merged task vector of one layer, of the pending state if there is one and it is wanted."""

    @abstractmethod
    def _restore(self, read: Callable[[str], State], names: Iterable[str]) -> None:
        """Takes over the states of these layers; all others are as if never touched."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def with_needed(update: TaskVector, needs: frozenset[str]) -> TaskVector:
    """The update with those statistics alone that a rule needs.

    Reading them raises StatisticsMissing where one is lacking that every layer has: all but those of inputs.
    """
    if not needs:
        return replace(update, statistics=no_statistics)
    measured = update.statistics

    def statistics(name: str) -> Mapping[str, Tensor]:
        found = {key: tensor for key, tensor in measured(name).items() if key in needs}
        for lacking in sorted(needs - found.keys() - OF_INPUTS):
            raise StatisticsMissing(f"the merge rule needs {lacking}", where=update.label, layer=name)
        return found

    return replace(update, statistics=statistics)


def seed_of(update: TaskVector, layer: str) -> int:
    """A seed that depends on whose update it is and on the layer, and on nothing else."""
    manifest = update.manifest
    words = (update.id, manifest.site, manifest.task, str(manifest.origin_version), layer)
    return int.from_bytes(sha256("\0".join(words).encode()).digest()[:8]) >> 1


@contextmanager
def factorising(layer: str) -> Iterator[None]:
    """Says which layer of an update it was when linear algebra gives up."""
    try:
        yield
    except LinAlgError as error:
        raise FactorisationFailed(
            f"the factorisation failed: {error}",
            layer=layer,
            do="The update was not merged; check its values for extreme ranges.",
        ) from error


@contextmanager
def factorising_model(layer: str) -> Iterator[None]:
    """The same for the model itself, which is the fault of no update that comes later."""
    try:
        yield
    except LinAlgError as error:
        raise EngineError(
            f"the factorisation failed: {error}",
            layer=layer,
            do="The model can take no further update; roll back to an earlier version.",
        ) from error
