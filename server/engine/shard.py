"""Some layers of the model, with the state a rule keeps of them. No Ray, no threads, no files."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from fedmerge.common.layers import LayerSpec
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank
from fedmerge.server.engine.engine import Act, factorising, factorising_model
from fedmerge.server.merge.rule import ALONE, Context, LayerSums, Rule, State, Totals, tensors_of

ALIGNMENT_BYTES = 64


class Shard:
    """Layers, their states and what was prepared for the next arrival.

    An arrival is absorbed layer by layer into pending states; :meth:`finish` makes them current at
    once, :meth:`abandon` drops them. Both may be repeated.
    """

    def __init__(self, rule: Rule, layers: Iterable[LayerSpec], device: str = "cpu") -> None:
        self.rule = rule
        self.layers = {layer.name: layer for layer in layers}
        self.device = torch.device(device)
        self.states: dict[str, State] = {}
        self.squares: dict[str, float] = {}
        self._prepared: dict[str, Any] = {}
        self._pending: dict[str, tuple[State, float]] = {}
        self._read_out: dict[tuple[str, bool], tuple[Totals, Tensor]] = {}

    def measure(self, name: str, update: LayerUpdate, context: Context = ALONE) -> Tensor:
        """What the rule measures of one layer before any is absorbed, on the CPU."""
        update, context = self._placed(_laid_out(update)), self._context(context)
        return self.rule.measure(self._state(name), update, context).cpu()

    def absorb(
        self, name: str, update: LayerUpdate, act: Act = Act.ABSORB, context: Context = ALONE
    ) -> LayerSums:
        """Does with one layer of an arrival what is to be done, pending until :meth:`finish`."""
        update, context = self._placed(_laid_out(update)), self._context(context)
        with factorising(name):
            match act:
                case Act.ABSORB:
                    state = self.rule.absorb(self._state(name), self._take_prepared(name), update, context)
                case Act.REMOVE:
                    state = self.rule.remove(self._state(name), update, context)
                case Act.ADJUST:
                    state = self.rule.adjust(self._state(name), update)
        sums = LayerSums(update.sum_of_squares(), state.sum_of_squares())
        self._pending[name] = state, sums.state_sq
        self._read_out.pop((name, True), None)
        return sums

    def untouched(self, name: str) -> LayerSums:
        """The sums of a layer that an arrival does not change."""
        return LayerSums(0.0, self.squares.get(name, 0.0))

    def finish(self) -> None:
        """Makes the pending states current, and what was read of them; what was read before is let go."""
        for name, (state, square) in self._pending.items():
            self.states[name], self.squares[name] = state, square
            self._prepared.pop(name, None)
        self._pending = {}
        self._read_out = {
            (name, False): found for (name, pending), found in self._read_out.items() if pending
        }

    def abandon(self) -> None:
        """Forgets the pending states; the current ones were never touched."""
        self._pending = {}
        self._read_out = {key: found for key, found in self._read_out.items() if not key[1]}

    def prepare(self, name: str) -> None:
        """Factorises one layer's state for the next arrival, unless that was done."""
        if name not in self._prepared:
            with factorising_model(name):
                self._prepared[name] = self.rule.prepare(self._state(name))

    def read(self, name: str, totals: Totals, pending: bool = False) -> Tensor:
        """The merged task vector of one layer, in the layer's shape, float32, contiguous, on the CPU.

        Args:
            pending: of the state that :meth:`finish` will make current, where there is one.
        """
        if not self.rule.heavy:
            return self._read(name, totals, pending)
        self.settle(name, totals, pending)
        return self._read_out[name, pending][1].clone()

    def settle(self, name: str, totals: Totals, pending: bool = False) -> None:
        """Reads one layer out ahead of :meth:`read` and keeps it, unless that was done."""
        found = self._read_out.get((name, pending))
        if found is None or found[0] != totals:
            self._read_out[name, pending] = totals, self._read(name, totals, pending)

    def state(self, name: str) -> State:
        """A touched layer's state with its tensors on the CPU."""
        state = self.states[name]
        return type(state)(**{field: tensor.cpu() for field, tensor in tensors_of(state).items()})

    def clear(self) -> None:
        """Every layer as if never touched."""
        self.states, self.squares, self._prepared, self._pending = {}, {}, {}, {}
        self._read_out = {}

    def put(self, name: str, state: State) -> None:
        """Takes over one layer's state, as :meth:`state` gave it."""
        self.states[name] = self._placed(state)
        self.squares[name] = self.states[name].sum_of_squares()
        self._prepared.pop(name, None)
        self._read_out.pop((name, False), None)

    def _read(self, name: str, totals: Totals, pending: bool) -> Tensor:
        coming = self._pending.get(name) if pending else None
        state = self._state(name) if coming is None else coming[0]
        with factorising_model(name) if coming is None else factorising(name):
            return self.rule.read(state, totals).reshape(self.layers[name].shape).cpu().contiguous()

    def _state(self, name: str) -> State:
        """A layer's state; one that no update has touched takes no memory between calls."""
        state = self.states.get(name)
        return self._placed(self.rule.init(self.layers[name])) if state is None else state

    def _take_prepared(self, name: str) -> Any:
        """What was prepared, released here so that it does not outlive its use."""
        self.prepare(name)
        return self._prepared.pop(name)

    def _context(self, context: Context) -> Context:
        statistics = {
            key: aligned(tensor.contiguous()).to(self.device) for key, tensor in context.statistics.items()
        }
        return replace(context, statistics=statistics)

    def _placed(self, holder: Any) -> Any:
        """A state or an update with its tensors on this shard's device."""
        if self.device.type == "cpu":
            return holder
        moved = {f.name: getattr(holder, f.name) for f in fields(holder)}
        return type(holder)(
            **{k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        )


def _laid_out(update: LayerUpdate) -> LayerUpdate:
    """The update in the memory layout it would have after travelling: products depend on strides and on
    alignment in the last bits, and tensors mapped from a file are not aligned."""
    return as_update(tuple(aligned(tensor.contiguous()) for tensor in update.tensors()), update.shape)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor at an address as torch itself would give it."""
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor


def as_update(tensors: tuple[Tensor, ...], shape: tuple[int, ...]) -> LayerUpdate:
    """A layer's update from its tensors: one is dense, two are the factors of a product."""
    return Dense(tensors[0].reshape(shape)) if len(tensors) == 1 else LowRank(tensors[0], tensors[1], shape)
