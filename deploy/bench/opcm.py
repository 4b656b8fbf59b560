"""OPCM against its published step: time, distance to float64, and peak memory, on one machine in one run.

The published step (:mod:`fedmerge.deploy.bench.published`) factorises every layer in full at every
arrival. Ours runs through the real engine and is timed twice: *cold*, from a dense vector and nothing
prepared, and *at arrival*, prepared before as a server does while sites train. Both end with the new
weights of every layer, base plus merged vector, in memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import sqrt
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedmerge.common.errors import ConfigError
from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.deploy.bench.published import Diagonal, PublishedOpcm
from fedmerge.deploy.bench.shapes import layers_of
from fedmerge.deploy.bench.workload import Machine, Seconds, Workload, matrices, progress_bar
from fedmerge.server.engine.engine import ALLOCATOR, Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge.opcm import Opcm

MEMORY_TASKS = (8, 32)


class OpcmBench(BaseModel):
    """What one run measured.

    Attributes:
        published, cold, arrival: seconds per step, from the second task on, all layers.
        published_over_cold, published_over_arrival: ratios of the medians.
        distance_published, distance_ours: of the merged vector after ``tasks`` tasks to the float64 run,
            relative to that run's norm, over ``distance_layers``.
        yardstick: what the float64 run computes.
        peak_memory_bytes: high-water mark of a fresh process (and its actors) after so many tasks, with
            the allocator set as ``allocator`` says.
        peak_memory_ratio: the mark after the most tasks over the mark after the fewest.
    """

    model_config = ConfigDict(frozen=True)

    shape: str
    layers: int
    parameters: int
    vectors: str
    engine: str
    workers: int
    tasks: int
    repeats: int
    seed: int
    alpha: float
    published: Seconds
    cold: Seconds
    arrival: Seconds
    published_over_cold: float
    published_over_arrival: float
    distance_published: float
    distance_ours: float
    distance_layers: str
    yardstick: str
    peak_memory_bytes: dict[int, int]
    peak_memory_ratio: float
    allocator: dict[str, str] = ALLOCATOR
    machine: Machine


def bench_opcm(
    shape: str = "vit-b-32",
    lora: int | None = None,
    actors: int | None = None,
    *,
    tasks: int = 6,
    repeats: int = 3,
    published_steps: int = 2,
    whole_distance: bool | None = None,
    memory_tasks: tuple[int, int] = MEMORY_TASKS,
    seed: int = 0,
    console: Console | None = None,
) -> OpcmBench:
    """Measures the published step, ours cold and ours at arrival on the same made-up vectors.

    Args:
        shape: a name in ``SHAPES``.
        lora: rank of the task vectors; None for dense ones of full rank.
        actors: Ray actors; None for threads in this process.
        tasks: tasks merged per pass, at least 3; steps are timed from the second on.
        repeats: passes of ours over all tasks, cold and prepared arrivals taking turns.
        published_steps: timed steps of the published code, every layer each time.
        whole_distance: measure the distance over every layer; by default only where the model is small,
            else over one layer of each kind and size, each counted as often as the model has it.
        memory_tasks: where the peak memory is read.
        seed: decides every number.

    Raises:
        ConfigError: no such shape, or a count that is too small.
    """
    for name, value, least in (
        ("tasks", tasks, 3),
        ("repeats", repeats, 1),
        ("published_steps", published_steps, 1),
    ):
        if value < least:
            raise ConfigError(f"too few {name}", got=value, wanted=f">= {least}")
    work = Workload(tuple(layers_of(shape)), lora, seed)
    parameters = sum(_size(layer) for layer in work.layers)
    compared, weights = _compared(work, parameters < 20e6 if whole_distance is None else whole_distance)
    load_before, threads = os.getloadavg()[0], torch.get_num_threads()
    steps = repeats * tasks + published_steps + 1 + tasks + 1
    with progress_bar(console) as progress:
        job = progress.add_task("", total=steps)

        def bar(what: str) -> None:
            progress.update(job, advance=1, description=what)

        progress.update(job, description="published step")
        published = Seconds.of(_time_published(work, published_steps, bar))
        cold_samples, arrival_samples, workers = _time_ours(work, actors, tasks, repeats, bar)
        far = _distances(Workload(compared, lora, seed), weights, tasks, bar)
        memory = _peak_memory(shape, lora, actors, memory_tasks, seed)
        bar("peak memory")
    cold, arrival = Seconds.of(cold_samples), Seconds.of(arrival_samples)
    return OpcmBench(
        shape=shape,
        layers=len(work.layers),
        parameters=parameters,
        vectors="Gaussian, full rank" if lora is None else f"LoRA factors, rank {lora}",
        engine="local" if actors is None else "ray",
        workers=workers,
        tasks=tasks,
        repeats=repeats,
        seed=seed,
        alpha=Opcm().alpha,
        published=published,
        cold=cold,
        arrival=arrival,
        published_over_cold=published.median / cold.median,
        published_over_arrival=published.median / arrival.median,
        distance_published=far[0],
        distance_ours=far[1],
        distance_layers=_said(work, compared),
        yardstick=f"published step in float64, diagonal {_diagonal(lora).replace('_', ' ')}",
        peak_memory_bytes=memory,
        peak_memory_ratio=memory[max(memory)] / memory[min(memory)],
        machine=Machine.now(threads, load_before),
    )


def print_bench(result: OpcmBench, console: Console) -> None:
    """The result as a table with units."""
    machine = result.machine
    table = Table(
        title=f"OPCM on {result.shape}: {result.parameters / 1e6:.2f} M parameters, {result.vectors}"
    )
    for header in ("step, all layers", "median s", "min s", "max s", "times faster", "distance to float64"):
        table.add_column(header, justify="left" if header.startswith("step") else "right")
    table.add_row(
        "published, float32, full SVD", *_times(result.published), "1.0", f"{result.distance_published:.1e}"
    )
    table.add_row("ours, cold", *_times(result.cold), f"{result.published_over_cold:.1f}", "")
    table.add_row(
        "ours, at arrival",
        *_times(result.arrival),
        f"{result.published_over_arrival:.1f}",
        f"{result.distance_ours:.1e}",
    )
    console.print(table)
    memory = ", ".join(
        f"{size / 2**20:.0f} MiB after {tasks} tasks" for tasks, size in result.peak_memory_bytes.items()
    )
    console.print(
        f"Peak memory of ours: {memory} (ratio {result.peak_memory_ratio:.3f}), "
        f"with {', '.join(f'{name}={value}' for name, value in result.allocator.items())}."
    )
    console.print(
        f"Distance after {result.tasks} tasks, relative to the merged vector's norm, over "
        f"{result.distance_layers}. Yardstick: {result.yardstick}."
    )
    console.print(
        f"{result.engine} engine with {result.workers} workers of one thread; published on "
        f"{machine.published_threads} threads; {machine.cores} cores, {machine.processor}, torch "
        f"{machine.torch_version}; seed {result.seed}; load average {machine.load_before:.1f} before, "
        f"{machine.load_after:.1f} after."
    )


def _time_published(work: Workload, steps: int, bar: Callable[[str], None]) -> list[float]:
    base = work.base()
    model = PublishedOpcm(base, matrices(work.layers))
    seconds = []
    for task in range(steps + 1):
        tuned = work.tuned(task, base, torch.float32)
        started = time.perf_counter()
        model.merge(tuned)
        seconds.append(time.perf_counter() - started)
        bar(f"published step {task}")
    return seconds[1:]


def _time_ours(
    work: Workload, actors: int | None, tasks: int, repeats: int, bar: Callable[[str], None]
) -> tuple[list[float], list[float], int]:
    """Seconds of cold steps and of prepared arrivals, which take turns, and the number of workers."""
    base = work.base()
    samples: tuple[list[float], list[float]] = [], []
    for repeat in range(repeats):
        with _engine(work, actors) as engine:
            for task in range(tasks):
                prepared = (task + repeat) % 2
                vector = work.vector(task).in_memory()
                if prepared:
                    engine.prepare(wait=True)
                started = time.perf_counter()
                engine.merge(vector)
                _read_out(engine, base)
                if task:
                    samples[prepared].append(time.perf_counter() - started)
                bar(f"ours, {'at arrival' if prepared else 'cold'}")
            workers = engine.workers
    return *samples, workers


def _read_out(engine: Engine, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """The new weights, base plus merged vector; several layers at once, as the workers allow."""

    def weights(name: str) -> tuple[str, Tensor]:
        return name, engine.read_layer(name).add_(base[name])

    with ThreadPoolExecutor(engine.workers) as pool:
        return dict(pool.map(weights, engine.layers))


def _distances(
    work: Workload, weights: dict[str, int], tasks: int, bar: Callable[[str], None]
) -> tuple[float, float]:
    """Relative distance of the published float32 run and of ours to the float64 run."""
    base, linear, diagonal = work.base(), matrices(work.layers), _diagonal(work.lora)
    published = PublishedOpcm(base, linear)
    exact = PublishedOpcm(base, linear, diagonal=diagonal, dtype=torch.float64)
    with LocalEngine(Opcm(), work.layers) as engine:
        for task in range(tasks):
            engine.merge(work.vector(task))
        ours = {name: engine.read_layer(name) for name in engine.layers}
    for task in range(tasks):
        published.merge(work.tuned(task, base, torch.float32))
        exact.merge(work.tuned(task, base, torch.float64))
        bar(f"distance after {task + 1} tasks")
    wanted = exact.vector()
    return _relative(published.vector(), wanted, weights), _relative(ours, wanted, weights)


def _relative(got: dict[str, Tensor], wanted: dict[str, Tensor], weights: dict[str, int]) -> float:
    off = sum(weights[name] * float((got[name].double() - wanted[name]).square().sum()) for name in wanted)
    return sqrt(off / sum(weights[name] * float(wanted[name].square().sum()) for name in wanted))


def _compared(work: Workload, whole: bool) -> tuple[tuple[LayerSpec, ...], dict[str, int]]:
    """The layers a distance is measured over, and how often each one counts."""
    if whole:
        return work.layers, {layer.name: 1 for layer in work.layers}
    first: dict[tuple[LayerKind, tuple[int, ...]], LayerSpec] = {}
    weights: dict[str, int] = {}
    for layer in work.layers:
        chosen = first.setdefault((layer.kind, layer.shape), layer)
        weights[chosen.name] = weights.get(chosen.name, 0) + 1
    return tuple(first.values()), weights


def _said(work: Workload, compared: tuple[LayerSpec, ...]) -> str:
    if len(compared) == len(work.layers):
        return f"all {len(compared)} layers"
    return (
        f"{len(compared)} of {len(work.layers)} layers, one of each kind and size merged as a model of its "
        "own, each counted as often as the model has it"
    )


def _peak_memory(
    shape: str, lora: int | None, actors: int | None, tasks: tuple[int, int], seed: int
) -> dict[int, int]:
    """High-water marks in bytes after so many tasks, measured in a fresh process."""
    arguments = f"{shape!r}, {lora}, {actors}, {sorted(tasks)}, {seed}"
    code = f"from {__name__} import report_peak_memory; report_peak_memory({arguments})"
    environment = {**os.environ, **ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, env=environment)
    return {int(count): size for count, size in json.loads(done.stdout.splitlines()[-1]).items()}


def report_peak_memory(shape: str, lora: int | None, actors: int | None, tasks: list[int], seed: int) -> None:
    """Merges tasks made layer by layer, keeps nothing, prints the marks as JSON. Runs in its own process."""
    work = Workload(tuple(layers_of(shape)), lora, seed)
    marks: dict[int, int] = {}
    with _engine(work, actors) as engine:
        for task in range(max(tasks)):
            engine.prepare(wait=True)
            engine.merge(work.vector(task))
            for name in engine.layers:
                engine.read_layer(name)
            if task + 1 in tasks:
                marks[task + 1] = sum(map(_high_water_bytes, _processes(engine)))
    print(json.dumps(marks))


def _engine(work: Workload, actors: int | None) -> Engine:
    if actors is None:
        return LocalEngine(Opcm(), work.layers)
    from fedmerge.server.engine.ray_engine import RayEngine

    return RayEngine(Opcm(), work.layers, actors=actors)


def _processes(engine: Engine) -> list[int]:
    whereabouts = getattr(engine, "whereabouts", list)
    return [os.getpid(), *(int(place["pid"]) for place in whereabouts())]


def _high_water_bytes(process: int) -> int:
    """Peak resident size; unlike ``ru_maxrss`` it does not count what the parent held at the fork."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def _diagonal(lora: int | None) -> Diagonal:
    """The published step is ill-posed on low-rank vectors unless it stays within their rank."""
    return "cleared" if lora is None else "cleared_within_rank"


def _size(layer: LayerSpec) -> int:
    rows, columns = layer.matrix_shape
    return rows * columns


def _times(seconds: Seconds) -> Iterator[str]:
    return (f"{value:.3g}" for value in (seconds.median, seconds.min, seconds.max))
