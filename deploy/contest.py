"""Rules on the task vectors of one stream and one seed: merged one by one, scored after each merge.

A rule that is ``order_free`` gives the same model for the same set of tasks, up to rounding: that model is
read and scored once, whichever orders lead to it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import factorial, prod

import torch

from fedmerge.client.site import Site
from fedmerge.client.tasks import Task
from fedmerge.common.errors import ConfigError, FedmergeError
from fedmerge.common.score import Score
from fedmerge.common.statistics import FLOAT32_BYTES, statistics_of
from fedmerge.common.taskvector import TaskVector
from fedmerge.deploy.learned import carrying
from fedmerge.deploy.report.leaderboard import FailedRun, Reference, RuleRun, measured
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge.rule import Rule

Known = dict[frozenset[str], dict[str, float]]
"""Accuracies by task of the models merged so far, by the set of tasks in them."""
OnMerge = Callable[[str], None]
"""Called with a line of what was done once a vector is merged and the model scored."""


class Judges:
    """Score models on several tasks at a time, each judge on its own copy of the model with one thread."""

    def __init__(self, site: Site, count: int) -> None:
        copies = [Site(site.stream, site.stream.build_model(), site.base) for _ in range(count - 1)]
        self._sites = [site, *copies]

    @property
    def count(self) -> int:
        return len(self._sites)

    def score(self, tasks: Sequence[Task], merged: TaskVector | None = None) -> dict[str, Score]:
        """Scores by task of the base plus a merged vector; of the base alone if None."""
        shares = [tasks[n :: self.count] for n in range(self.count)]
        found: dict[str, Score] = {}
        with ThreadPoolExecutor(self.count, "judge", torch.set_num_threads, (1,)) as pool:
            for scores in pool.map(lambda site, share: _score(site, share, merged), self._sites, shares):
                found |= scores
        return found


@dataclass(frozen=True)
class Contest:
    """One stream with one seed.

    Attributes:
        tasks: in the stream's own order. ``vectors``: one per task, in memory, with the rules' statistics.
        orders: of arrival, by number.
        quick: score each task after its own merge and after the last one only.
    """

    stream: str
    seed: int
    site: Site
    tasks: Mapping[str, Task]
    vectors: Mapping[str, TaskVector]
    orders: Sequence[tuple[str, ...]]
    judges: Judges
    quick: bool = False

    def reference(self) -> Reference:
        """What there is without merging."""
        zero_shot = self.judges.score(list(self.tasks.values()))
        fine_tuned = {
            name: self.judges.score([task], self.vectors[name])[name] for name, task in self.tasks.items()
        }
        layers = self.site.base.merged_layers.values()
        return Reference(
            stream=self.stream,
            seed=self.seed,
            base_fingerprint=self.site.base.fingerprint,
            base_bytes=sum(prod(layer.shape) * layer.dtype.itemsize for layer in layers),
            vector_bytes=sum(_values_bytes(vector) for vector in self.vectors.values()),
            tasks=list(self.tasks),
            zero_shot={name: score.accuracy for name, score in zero_shot.items()},
            fine_tuned={name: score.accuracy for name, score in fine_tuned.items()},
            test_examples={name: score.examples for name, score in zero_shot.items()},
        )

    def runs(self, rule: Rule, on_merge: OnMerge = lambda _: None) -> Iterator[RuleRun | FailedRun]:
        """One rule in every order. A run that a typed error ends is told as failed."""
        vectors = {name: carrying(vector, rule.needs) for name, vector in self.vectors.items()}
        known: Known = {}
        for order in range(len(self.orders)):
            try:
                yield self._run(rule, order, vectors, known if rule.order_free else {}, on_merge)
            except FedmergeError as error:
                reason = f"{type(error).__name__}: {error}"
                yield FailedRun(
                    stream=self.stream, rule=rule.name, seed=self.seed, order=order, reason=reason
                )

    def _run(
        self, rule: Rule, order: int, vectors: Mapping[str, TaskVector], known: Known, on_merge: OnMerge
    ) -> RuleRun:
        arriving = self.orders[order]
        absorbing: list[float] = []
        reading: list[float | None] = []
        accuracy: list[list[float | None]] = []
        layers = self.site.base.layers.values()
        with LocalEngine(rule, layers, workers=self.judges.count) as engine:
            for number, name in enumerate(arriving):
                clock = time.perf_counter()
                engine.merge(vectors[name])
                absorbing.append(time.perf_counter() - clock)
                wanted = self._wanted(arriving, number)
                found = known.setdefault(frozenset(arriving[: number + 1]), {})
                reading.append(self._score_missing(engine, wanted, found))
                accuracy.append([found[task] if task in wanted else None for task in arriving])
                on_merge(f"{self.stream}, seed {self.seed}: {rule.name} takes in {name}")
            state_bytes = engine.state_bytes()
        return RuleRun(
            stream=self.stream,
            rule=rule.name,
            seed=self.seed,
            order=order,
            tasks=list(arriving),
            accuracy=accuracy,
            **measured(accuracy, self.quick),
            absorb_seconds=absorbing,
            read_seconds=reading,
            state_bytes=state_bytes,
            statistics_bytes=sum(statistics_of(vector).payload_bytes for vector in vectors.values()),
        )

    def _wanted(self, arriving: Sequence[str], number: int) -> Sequence[str]:
        """The tasks to score after a merge."""
        everything = not self.quick or number == len(arriving) - 1
        return arriving[: number + 1] if everything else arriving[number : number + 1]

    def _score_missing(
        self, engine: LocalEngine, wanted: Sequence[str], found: dict[str, float]
    ) -> float | None:
        """Scores what ``found`` lacks; returns the seconds it took to read the model, None if nothing did."""
        missing = [self.tasks[task] for task in wanted if task not in found]
        if not missing:
            return None
        clock = time.perf_counter()
        merged = engine.merged().in_memory()
        seconds = time.perf_counter() - clock
        found |= {task: score.accuracy for task, score in self.judges.score(missing, merged).items()}
        return seconds


def arrival_orders(tasks: Sequence[str], count: int, seed: int) -> list[tuple[str, ...]]:
    """The given order and different random ones, drawn by seed, ``count`` in all.

    Raises:
        ConfigError: so many tasks cannot arrive in so many orders.
    """
    if count > factorial(len(tasks)):
        raise ConfigError(
            "more orders than there are",
            got=count,
            wanted=f"at most {factorial(len(tasks))}, of {len(tasks)} tasks",
        )
    draw = random.Random(seed)
    orders = [tuple(tasks)]
    while len(orders) < count:
        order = tuple(draw.sample(tasks, len(tasks)))
        if order not in orders:
            orders.append(order)
    return orders


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """So many threads inside torch's operators meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _score(site: Site, tasks: Sequence[Task], merged: TaskVector | None) -> dict[str, Score]:
    if tasks and merged is None:
        site.reset()
    return site.score(tasks, merged) if tasks else {}


def _values_bytes(vector: TaskVector) -> int:
    """What a vector's layers take in a file, as float32."""
    return sum(FLOAT32_BYTES * t.numel() for _, update in vector.items() for t in update.tensors())
