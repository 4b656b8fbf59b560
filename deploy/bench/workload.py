"""What benchmarks share: made-up weights and task vectors, seconds, the machine, a progress bar."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import sqrt
from pathlib import Path
from statistics import median

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.machine import cores
from fedmerge.common.statistics import OF_INPUTS, Statistic
from fedmerge.common.taskvector import Dense, LayerUpdate, LowRank, TaskVector

BASE_DEVIATION = 0.02
UPDATE_DEVIATION = 0.001
"""Standard deviations of the base's weights and of what a task adds to them."""

GRAM_ROWS = 256
"""Rank of a made-up input Gram, at most the layer's columns."""


class Seconds(BaseModel):
    """Wall time of one step, over ``samples`` steps."""

    model_config = ConfigDict(frozen=True)

    median: float
    min: float
    max: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Seconds:
        return cls(median=median(samples), min=min(samples), max=max(samples), samples=len(samples))


class Machine(BaseModel):
    """Where it ran. The load averages show whether others used the machine meanwhile."""

    model_config = ConfigDict(frozen=True)

    processor: str
    cores: int
    torch_version: str
    published_threads: int
    load_before: float
    load_after: float

    @classmethod
    def now(cls, published_threads: int, load_before: float) -> Machine:
        """This machine, after a run that began under ``load_before``."""
        return cls(
            processor=_processor(),
            cores=cores(),
            torch_version=torch.__version__,
            published_threads=published_threads,
            load_before=load_before,
            load_after=os.getloadavg()[0],
        )


@dataclass(frozen=True)
class Workload:
    """Made-up weights: a Gaussian base, and per task a Gaussian of full rank or a LoRA product.

    Every layer of every task has its own seed, so any of them can be made again, alone.
    """

    layers: tuple[LayerSpec, ...]
    lora: int | None = None
    seed: int = 0

    def base(self) -> dict[str, Tensor]:
        return {
            layer.name: torch.randn(layer.shape, generator=self._generator("base", layer)) * BASE_DEVIATION
            for layer in self.layers
        }

    def update(self, task: int, layer: LayerSpec) -> LayerUpdate:
        """One layer of a task vector; with LoRA, factors for matrices."""
        generator = self._generator(f"task {task}", layer)
        if self.lora is None or layer.kind is not LayerKind.MATRIX:
            return Dense(torch.randn(layer.shape, generator=generator) * UPDATE_DEVIATION)
        rows, columns = layer.matrix_shape
        left = torch.randn(rows, self.lora, generator=generator) * (UPDATE_DEVIATION / sqrt(self.lora))
        return LowRank(left, torch.randn(self.lora, columns, generator=generator), layer.shape)

    def vector(self, task: int) -> TaskVector:
        """A task vector that is made layer by layer as it is read; LoRA leaves vector layers alone."""
        brought = {layer.name: layer for layer in self.layers if self._brought(layer)}
        unchanged = tuple(layer.name for layer in self.layers if layer.name not in brought)
        return TaskVector(tuple(brought), lambda name: self.update(task, brought[name]), unchanged)

    def with_statistics(self, task: int, needs: frozenset[str]) -> TaskVector:
        """:meth:`vector` with made-up statistics; those of inputs have the rank of ``GRAM_ROWS`` inputs."""
        vector, specs = self.vector(task), {layer.name: layer for layer in self.layers}
        return replace(vector, statistics=lambda name: dict(self._statistics(task, specs[name], needs)))

    def tuned(self, task: int, base: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """The fine-tuned weights that the published step gets; a LoRA product is formed in ``dtype``."""
        changed = {name: base[name].to(dtype) + dense(u, dtype) for name, u in self.vector(task).items()}
        return {name: changed.get(name, weight.to(dtype)) for name, weight in base.items()}

    def _statistics(self, task: int, layer: LayerSpec, needs: frozenset[str]) -> Iterator[tuple[str, Tensor]]:
        generator = self._generator(f"statistics {task}", layer)
        for name in sorted(needs):
            if name not in OF_INPUTS:
                yield name, torch.rand(layer.shape, generator=generator) * UPDATE_DEVIATION
            elif layer.kind is LayerKind.MATRIX:
                yield name, _of_inputs(name, layer.matrix_shape[1], generator)

    def _brought(self, layer: LayerSpec) -> bool:
        return self.lora is None or layer.kind is LayerKind.MATRIX

    def _generator(self, what: str, layer: LayerSpec) -> torch.Generator:
        digest = blake2b(f"{self.seed} {what} {layer.name}".encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


def _of_inputs(name: str, columns: int, generator: torch.Generator) -> Tensor:
    """What is told of a matrix layer's inputs, of low rank."""
    if name == Statistic.RESIDUAL:
        return torch.ones(1)
    factor = torch.randn(min(GRAM_ROWS, columns), columns, generator=generator)
    return factor if name == Statistic.INPUT_GRAM else factor.T @ factor


def matrices(layers: Iterable[LayerSpec]) -> list[str]:
    return [layer.name for layer in layers if layer.kind is LayerKind.MATRIX]


def dense(update: LayerUpdate, dtype: torch.dtype) -> Tensor:
    if isinstance(update, LowRank):
        return (update.left_MR.to(dtype) @ update.right_RN.to(dtype)).reshape(update.shape)
    return update.values.to(dtype)


def progress_bar(console: Console | None) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, disable=console is None, transient=True)


def _processor() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else "unknown processor"
