"""What a merge rule is: a few pure functions over one layer.

The engine owns one state per layer. For every update, on every layer that the update brings::

    prepared = rule.prepare(state)                    # costly, needs no client: runs between arrivals
    state = rule.absorb(state, prepared, D, context)  # matrix products and sums

then reduces two sums per layer to :class:`Totals`, and reads the model out with
``rule.read(state, totals)``. Functions never change their arguments, so a state stays valid until the
merge is committed. A layer that an update does not bring keeps its state; for rules that divide by the
number of tasks it counts as zero there. To add a rule: subclass :class:`Rule` in one file and
name it in ``RULES``.

Legend of shape suffixes: M out rows, N in columns, K numerical rank or core size, R update rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from math import fsum, sqrt
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import LayerUpdate
from fedmerge.common.training import SketchSpec


class State(Protocol):
    """What a rule keeps of one layer: a frozen dataclass whose fields are tensors.

    Its size must not depend on how many updates it has absorbed.
    """

    def sum_of_squares(self) -> float:
        """||S||_F^2 of the running sum it stands for, in float64."""
        ...


class Cadence(StrEnum):
    """When a rule absorbs: once per task, or at every round of a task."""

    TASK = "task"
    ROUND = "round"


@dataclass(frozen=True)
class LayerSums:
    """What one layer adds to the global scalars at one arrival, both in float64."""

    update_sq: float
    state_sq: float


@dataclass(frozen=True)
class Totals:
    """The global scalars after some number of merges; constant size.

    Attributes:
        merges: vectors absorbed so far (T).
        norm_sum: sum over them of ||tau_i||_2, each over the whole model.
        update_norm: ||tau_T||_2 of the last one.
        state_norm: ||S_T||_2 of the running sum over the whole model.
    """

    merges: int = 0
    norm_sum: float = 0.0
    update_norm: float = 0.0
    state_norm: float = 0.0

    def after(self, sums: Iterable[LayerSums]) -> Totals:
        """The scalars after one more merge; summed exactly, so the order of layers does not matter."""
        sums = list(sums)
        update_norm = sqrt(fsum(s.update_sq for s in sums))
        return replace(
            self,
            merges=self.merges + 1,
            norm_sum=self.norm_sum + update_norm,
            update_norm=update_norm,
            state_norm=sqrt(fsum(s.state_sq for s in sums)),
        )

    def before(self, sums: Iterable[LayerSums]) -> Totals:
        """The scalars once a vector has been taken out again; ``update_norm`` is then that vector's."""
        sums = list(sums)
        update_norm = sqrt(fsum(s.update_sq for s in sums))
        merges = self.merges - 1
        return Totals(
            merges=merges,
            norm_sum=max(self.norm_sum - update_norm, 0.0) if merges else 0.0,
            update_norm=update_norm,
            state_norm=sqrt(fsum(s.state_sq for s in sums)),
        )

    def adjusted(self, sums: Iterable[LayerSums]) -> Totals:
        """The scalars once the merged model has been moved without a merge."""
        return replace(self, state_norm=sqrt(fsum(s.state_sq for s in sums)))

    @property
    def share(self) -> float:
        """A task's share of a mean over all of them, 1 / T; 0 before the first."""
        return 1.0 / self.merges if self.merges else 0.0

    @property
    def mean_norm(self) -> float:
        """Mean of the task vectors' norms; 0 before the first."""
        return self.norm_sum / self.merges if self.merges else 0.0


@dataclass(frozen=True)
class Context:
    """What a rule may know of an arrival besides one layer's task vector.

    Attributes:
        merges: vectors absorbed before it.
        statistics: what the site measured of this layer, by :class:`Statistic` name; float32.
        seed: for rules that draw at random, 0 to 2^63 - 1; the same whenever this update's layer is
            absorbed, wherever that is.
        measured: the sum of :meth:`Rule.measure` over all layers of the update; None unless the rule
            ``measures``.
        step: whether the update is measured from the merged model, and not from the base.
    """

    merges: int = 0
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    seed: int = 0
    measured: Tensor | None = None
    step: bool = False


ALONE = Context()
"""The first vector, without statistics."""


class Rule(BaseModel, ABC):
    """A way of merging. Its fields are its options, validated, frozen and recorded with every result.

    Class attributes:
        name: how users pick it.
        needs: statistics a site must send along with the task vector.
        order_free: whether the result is the same in any order of arrival, up to rounding.
        additive: whether a state is a sum of one term per update, so that one can be taken out again.
        measures: whether it must see all of an update before it absorbs any layer.
        steps: whether it also takes updates that are measured from the merged model.
        heavy: whether reading a layer out costs a factorisation; engines then keep what they have read.
        cadence: when it absorbs.
        states: every type a layer's state may have; what can be saved and read back.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ClassVar[str]
    needs: ClassVar[frozenset[str]] = frozenset()
    order_free: ClassVar[bool] = False
    additive: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    steps: ClassVar[bool] = False
    heavy: ClassVar[bool] = False
    cadence: ClassVar[Cadence] = Cadence.TASK
    states: ClassVar[tuple[type, ...]]

    @abstractmethod
    def init(self, layer: LayerSpec) -> State:
        """The state before any merge."""

    def prepare(self, state: Any) -> Any:
        """What absorbing needs that depends on the state alone; None when nothing does."""
        return None

    def measure(self, state: Any, update: LayerUpdate, context: Context = ALONE) -> Tensor:
        """What is summed over an update's layers and then given to each as ``measured``; float64, (K,).

        Args:
            context: as for :meth:`absorb`, but nothing is ``measured`` yet.
        """
        raise NotImplementedError(f"{self.name} measures nothing")

    @abstractmethod
    def absorb(self, state: Any, prepared: Any, update: LayerUpdate, context: Context = ALONE) -> State:
        """The state after one more update of this layer, whose values are finite."""

    def remove(self, state: Any, update: LayerUpdate, context: Context = ALONE) -> State:
        """The state as if an update it has absorbed had never come, up to rounding.

        Only ``additive`` rules have one.
        """
        raise NotImplementedError(f"{self.name} cannot take a vector out again")

    def adjust(self, state: Any, update: LayerUpdate) -> State:
        """The state with the merged model moved by ``update``, and nothing else of it changed.

        Rules that take ``steps`` have one.
        """
        raise NotImplementedError(f"{self.name} cannot move the merged model")

    def shown(self, state: Any) -> Tensor | None:
        """What sites are sent of a layer's state when they train and measure: orthonormal columns (N, K) of
        input directions that are protected; None where there are none."""
        return None

    def asks(self) -> SketchSpec | None:
        """How sites are to sketch their inputs; None unless the rule needs sketches."""
        return None

    def scale(self, totals: Totals) -> float:
        """The factor c_T from the running sum to the merged task vector; 1 for rules that read out more
        than a multiple of a sum, 0 before the first merge."""
        return 1.0 if totals.merges else 0.0

    @abstractmethod
    def read(self, state: Any, totals: Totals) -> Tensor:
        """The merged task vector of one layer: matrix layers (M, N), vectors (1, numel), float32."""

    def lambda_t(self, totals: Totals) -> float:
        """How much the running sum was shrunk: 1 / c_T, as papers report it; 0 where c_T is 0."""
        scale = self.scale(totals)
        return 1.0 / scale if scale else 0.0


def tensors_of(state: State) -> dict[str, Tensor]:
    """A state's fields by name, for files and transport."""
    return {f.name: getattr(state, f.name) for f in fields(state)}  # type: ignore[arg-type]
