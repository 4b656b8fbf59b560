"""What every rule costs per arrival, beside OPCM in the same run on the same made-up vectors.

One arrival is timed in three parts: *prepare*, the factorisation that runs between arrivals while sites
train; *absorb*, from the vector and its statistics in memory to the new state; and *read*, from the state to
the merged vector of every layer. What a site waits for is absorb and read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from fedmerge.common.errors import ConfigError
from fedmerge.common.machine import cores
from fedmerge.common.taskvector import TaskVector
from fedmerge.deploy.bench.shapes import layers_of
from fedmerge.deploy.bench.workload import Machine, Seconds, Workload, progress_bar
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import make_rule
from fedmerge.server.merge.rule import Rule

YARDSTICK = "opcm"


class RuleCost(BaseModel):
    """One rule's figures over all layers, from the second task on.

    Attributes:
        prepare, absorb, read: seconds of each part.
        arrival_ratio: absorb and read, in OPCM's absorb and read; ``whole_ratio``: with prepare, in OPCM's
            with prepare.
        state_bytes: what the rule keeps; ``state_ratio``: in bytes of the float32 task vector.
    """

    model_config = ConfigDict(frozen=True)

    rule: str
    options: dict[str, object]
    prepare: Seconds
    absorb: Seconds
    read: Seconds
    arrival_ratio: float
    whole_ratio: float
    state_bytes: int
    state_ratio: float

    @property
    def arrival(self) -> float:
        """Median seconds a site waits for."""
        return self.absorb.median + self.read.median


class RulesBench(BaseModel):
    """What one run measured; ``workers`` threads over layers, each layer on one thread."""

    model_config = ConfigDict(frozen=True)

    shape: str
    parameters: int
    vectors: str
    tasks: int
    seed: int
    workers: int
    costs: list[RuleCost]
    machine: Machine


def bench_rules(
    rules: Sequence[Rule],
    shape: str = "minilm",
    lora: int | None = None,
    *,
    tasks: int = 4,
    seed: int = 0,
    console: Console | None = None,
) -> RulesBench:
    """Measures rules one after the other; OPCM too, where it is not among them.

    Args:
        shape: a name in ``SHAPES``. ``lora``: rank of the task vectors; None for dense ones of full rank.
        tasks: arrivals per rule, at least 2; the first is not counted.

    Raises:
        ConfigError: no such shape, or too few tasks.
    """
    if tasks < 2:
        raise ConfigError("too few tasks", got=tasks, wanted=">= 2")
    work = Workload(tuple(layers_of(shape)), lora, seed)
    load_before, threads = os.getloadavg()[0], torch.get_num_threads()
    measured = list(rules)
    if YARDSTICK not in {rule.name for rule in rules}:
        measured.insert(0, make_rule(YARDSTICK))
    with progress_bar(console) as progress:
        job = progress.add_task("", total=len(measured) * tasks)

        def bar(what: str) -> None:
            progress.update(job, advance=1, description=what)

        costs = [_cost(rule, work, tasks, bar) for rule in measured]
    yardstick = next(cost for cost in costs if cost.rule == YARDSTICK)
    return RulesBench(
        shape=shape,
        parameters=_parameters(work),
        vectors="Gaussian, full rank" if lora is None else f"LoRA factors, rank {lora}",
        tasks=tasks,
        seed=seed,
        workers=cores(),
        costs=[_beside(cost, yardstick) for cost in costs],
        machine=Machine.now(threads, load_before),
    )


def print_rules(result: RulesBench, console: Console) -> None:
    """The result as a table with units, cheapest arrival first."""
    table = Table(
        title=f"Rules on {result.shape}: {result.parameters / 1e6:.2f} M parameters, {result.vectors}"
    )
    headers = ("rule", "prepare s", "absorb s", "read s", "arrival / OPCM", "with prepare / OPCM", "state MB")
    table.add_column(headers[0], no_wrap=True)
    for header in headers[1:]:
        table.add_column(header, justify="right")
    for cost in sorted(result.costs, key=lambda cost: cost.arrival):
        table.add_row(
            cost.rule,
            *(f"{part.median:.3g}" for part in (cost.prepare, cost.absorb, cost.read)),
            f"{cost.arrival_ratio:.1f}",
            f"{cost.whole_ratio:.1f}",
            f"{cost.state_bytes / 1e6:.3g} ({cost.state_ratio:.1f} x)",
        )
    console.print(table)
    machine = result.machine
    console.print(
        f"Medians over arrivals 2 to {result.tasks}; {result.workers} workers of one thread; {machine.cores} "
        f"cores, {machine.processor}, torch {machine.torch_version}; seed {result.seed}; load average "
        f"{machine.load_before:.1f} before, {machine.load_after:.1f} after. State in multiples of a task "
        "vector in float32."
    )


def _cost(rule: Rule, work: Workload, tasks: int, bar: Callable[[str], None]) -> RuleCost:
    """The ratios are filled in once OPCM's own figures are known."""
    parts: tuple[list[float], list[float], list[float]] = [], [], []
    with LocalEngine(rule, work.layers) as engine:
        for task in range(tasks):
            vector = _in_memory(work.with_statistics(task, rule.needs))
            seconds = (
                _seconds(lambda: engine.prepare(wait=True)),
                _seconds(lambda: engine.merge(vector)),  # noqa: B023
                _seconds(lambda: engine.merged().in_memory()),
            )
            if task:
                for samples, value in zip(parts, seconds, strict=True):
                    samples.append(value)
            bar(rule.name)
        state_bytes = engine.state_bytes()
    prepare, absorb, read = map(Seconds.of, parts)
    return RuleCost(
        rule=rule.name,
        options=rule.model_dump(),
        prepare=prepare,
        absorb=absorb,
        read=read,
        arrival_ratio=1.0,
        whole_ratio=1.0,
        state_bytes=state_bytes,
        state_ratio=state_bytes / (4 * _parameters(work)),
    )


def _beside(cost: RuleCost, yardstick: RuleCost) -> RuleCost:
    whole = cost.arrival + cost.prepare.median
    return cost.model_copy(
        update={
            "arrival_ratio": cost.arrival / yardstick.arrival,
            "whole_ratio": whole / (yardstick.arrival + yardstick.prepare.median),
        }
    )


def _in_memory(vector: TaskVector) -> TaskVector:
    """The vector and its statistics made before the clock starts."""
    statistics = {name: vector.statistics(name) for name in vector.names}
    return replace(vector.in_memory(), statistics=statistics.__getitem__)


def _seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _parameters(work: Workload) -> int:
    return sum(rows * columns for rows, columns in (layer.matrix_shape for layer in work.layers))
