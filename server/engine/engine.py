"""The engine: a rule's state for every layer, spread over workers.

One interface, two engines: :class:`~fedmerge.server.engine.local.LocalEngine` in this process and
:class:`~fedmerge.server.engine.ray_engine.RayEngine` on actors. Both give the same bits for any number
of workers, because every layer is computed by one worker with a fixed number of threads and the only
numbers that cross layers are summed exactly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from torch import Tensor

from fedmerge.common.errors import EngineError, UnknownLayer
from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import Dense, TaskVector
from fedmerge.server.merge.rule import LayerSums, Rule, Totals
from fedmerge.server.merge.spectrum import LinAlgError

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Environment of worker processes: glibc returns tensors of a mebibyte and more when they are freed. Left
alone it raises that bound as it goes, and memory grows with its fragments."""

OnLayer = Callable[[str], None]
"""Called with a layer's name when it is done; for progress bars."""


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

    @property
    @abstractmethod
    def workers(self) -> int: ...

    def merge(self, update: TaskVector, on_layer: OnLayer = lambda _: None) -> Totals:
        """Absorbs one task vector into every layer, all or nothing.

        Args:
            update: finite values with the layers' shapes; layers it does not name are unchanged.
                Layers are read from it one at a time, and may be read again if a worker dies.

        Returns:
            The totals after the merge, also kept in :attr:`totals`.

        Raises:
            UnknownLayer: the update names a layer this engine does not hold.
            FedmergeError: whatever reading a layer of the update raises.
            EngineError: a worker could not be replaced, or a factorisation failed. In every case the
                model is as it was before.
        """
        for name in update.names:
            if name not in self.layers:
                raise UnknownLayer("not a layer of this engine", where=update.label, layer=name)
        sums = self._absorb(update, on_layer)
        totals = self.totals.after(sums[name] for name in self.layers)
        self._finish()
        self.totals, self.touched = totals, self.touched.union(update.names)
        return totals

    def merged(self) -> TaskVector:
        """The merged task vector, layers in the base's order, each read from the engine when asked for.

        Layers that no update has touched are listed as unchanged.
        """
        names = tuple(name for name in self.layers if name in self.touched)
        unchanged = tuple(name for name in self.layers if name not in self.touched)
        shapes = {name: self.layers[name].shape for name in names}
        return TaskVector(
            names, lambda name: Dense(self.read_layer(name)), unchanged, label=self.rule.name, shapes=shapes
        )

    @abstractmethod
    def read_layer(self, name: str) -> Tensor:
        """The merged task vector of one layer, float32 in the layer's shape."""

    @abstractmethod
    def prepare(self, wait: bool = False) -> None:
        """Starts factorising for the next arrival; returns at once unless asked to wait.

        Raises:
            EngineError: when waiting, a factorisation failed. Otherwise the next merge says so.
        """

    @abstractmethod
    def close(self) -> None:
        """Ends the workers. Closing twice is harmless."""

    @abstractmethod
    def _absorb(self, update: TaskVector, on_layer: OnLayer) -> dict[str, LayerSums]:
        """Absorbs into pending states; on any error none is left behind."""

    @abstractmethod
    def _finish(self) -> None:
        """Makes the pending states current."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def factorising(layer: str) -> Iterator[None]:
    """Says which layer it was when linear algebra gives up."""
    try:
        yield
    except LinAlgError as error:
        raise EngineError(
            f"the factorisation failed: {error}",
            layer=layer,
            do="The update was not merged; check its values for extreme ranges.",
        ) from error
