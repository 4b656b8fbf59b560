"""How a run is laid out: which sites learn which task, from where, in how many rounds."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from fedmerge.common.config import Partition, Seed
from fedmerge.common.errors import ConfigError
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.training import Correction, LocalTraining
from fedmerge.server.admission import MAX_EXAMPLES
from fedmerge.server.merge.rule import Cadence, Rule
from fedmerge.server.model import Version

Positive = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0)]


class FederationConfig(BaseModel):
    """How a run is laid out.

    Attributes:
        tasks: names in merging order; empty takes every task the sites announce, in order of their labels.
        joint: learn all of them at once, as one update: what merging could reach with all data in one place.
        start: where sites start each task: from the ``base``, all tasks at the same time, or from the
            ``merged`` model, one task after another.
        rounds: local fine-tunings per task; from the second on, sites start from what the task has moved.
        sites_per_task: how many sites share a task's data.
        sites_per_round: how many of them are asked in each round, drawn by seed; None asks all.
        partition: how they share it: ``iid``, ``dirichlet:ALPHA`` or ``shards:K``.
        weights: of the sites of a task: their numbers of ``examples``, or ``uniform``.
        training: what sites are asked of their training. ``compress``: how they make updates smaller.
        correction: what sites fit after each merge, if anything.
        seed: of every local run and partition.
        min_sites: how many to wait for; ``wait_seconds``: how long before starting with those there are.
        timeout_seconds: for one message, from sending it to its reply.
        max_examples: cap of a self-reported example count.
        evaluate: whether sites score every version on every task; ``evaluate_base``: the base too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tasks: tuple[str, ...] = ()
    joint: bool = False
    start: Literal["base", "merged"] = "base"
    rounds: Positive = 1
    sites_per_task: Positive = 1
    sites_per_round: Positive | None = None
    partition: Partition = "iid"
    weights: Literal["examples", "uniform"] = "examples"
    training: LocalTraining = LocalTraining()
    compress: str = "none"
    correction: Correction | None = None
    seed: Seed = 0
    min_sites: Positive = 1
    wait_seconds: Seconds = 120.0
    timeout_seconds: Seconds = 3600.0
    max_examples: Positive = MAX_EXAMPLES
    evaluate: bool = True
    evaluate_base: bool = True

    @property
    def sites_asked(self) -> int:
        """How many sites of a task a round asks if all are there."""
        return min(self.sites_per_round or self.sites_per_task, self.sites_per_task)


@dataclass(frozen=True)
class Site:
    """A connected node and what it said about itself."""

    node: int
    label: str
    tasks: tuple[str, ...]


@dataclass
class TaskRun:
    """One task under way: who learns it, what has come back, what it has moved so far.

    Attributes:
        also: tasks that are learned with it, as one. ``sites``: all that share it.
        asked: those of this round; ``waiting``: their nodes that have not answered.
        arrived: what has come in this round, by node, with its weight.
        moved: the sum of the rounds so far. ``idle``: rounds in a row that brought nothing.
        taught: nodes that some round has learned from; ``learned_by``: their labels.
        seconds: spent on merging its rounds. ``versions``: what the merge gave, by model.
    """

    task: str
    sites: list[Site]
    also: tuple[str, ...] = ()
    round: int = 1
    asked: list[Site] = field(default_factory=list)
    waiting: set[int] = field(default_factory=set)
    arrived: dict[int, tuple[TaskVector, int]] = field(default_factory=dict)
    moved: TaskVector | None = None
    idle: int = 0
    taught: set[int] = field(default_factory=set)
    learned_by: list[str] = field(default_factory=list)
    seconds: float = 0.0
    versions: dict[str, Version] = field(default_factory=dict)
    closed: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All tasks that are learned."""
        return self.task, *self.also

    def part_of(self, node: int) -> int:
        return [site.node for site in self.sites].index(node)

    def gathered(self, weights: str) -> tuple[list[TaskVector], list[int], list[int]]:
        """What has come in, in the order of the sites asked: vectors, their shares, and examples."""
        ordered = [self.arrived[site.node] for site in self.asked if site.node in self.arrived]
        examples = [count for _, count in ordered]
        shares = examples if weights == "examples" else [1] * len(ordered)
        return [vector for vector, _ in ordered], shares, examples

    def begin(self, sites_per_round: int | None, seed: int) -> None:
        """Chooses the sites of the round, by seed, task and round alone."""
        self.asked = self.sites
        if sites_per_round is not None and sites_per_round < len(self.sites):
            chosen = random.Random(f"{seed}/{self.task}/{self.round}").sample(self.sites, sites_per_round)
            self.asked = [site for site in self.sites if site in chosen]
        self.waiting, self.arrived = {site.node for site in self.asked}, {}

    def note_taught(self) -> None:
        """Counts those whose vectors of this round are in."""
        self.taught |= set(self.arrived)
        self.learned_by = [site.label for site in self.sites if site.node in self.taught]


def assign(config: FederationConfig, sites: Iterable[Site]) -> tuple[list[TaskRun], list[str]]:
    """Gives each task to sites that hold it, taking turns; and the tasks that nobody holds."""
    ordered = sorted(sites, key=lambda site: (site.label, site.node))
    tasks = config.tasks or tuple(dict.fromkeys(task for site in ordered for task in site.tasks))
    groups = [tasks] if config.joint else [(task,) for task in tasks]
    runs, orphans, share = [], [], config.sites_per_task
    for turn, names in enumerate(groups):
        holders = [site for site in ordered if set(names) <= set(site.tasks)]
        if not holders:
            orphans.append(", ".join(names))
            continue
        first = turn * share % len(holders)
        runs.append(TaskRun(names[0], (holders[first:] + holders[:first])[:share], names[1:]))
    return runs, orphans


def check_layout(config: FederationConfig, rules: Sequence[Rule]) -> None:
    """Refuses what does not go together.

    Raises:
        ConfigError: several rules though sites start from the merged model, of which there is one per rule; a
            correction under a rule that cannot take it, or without the model before a task beside it.
    """
    if config.start == "merged" and len(rules) != 1:
        raise ConfigError(
            "sites can start from one merged model only",
            got=f"{len(rules)} rules",
            wanted="one rule",
            do="Run rules one by one, or let sites start from the base.",
        )
    if config.correction is None:
        return
    (rule, *_) = rules
    if config.start == "base" or not rule.steps or rule.cadence is Cadence.ROUND:
        raise ConfigError(
            "a correction needs sites that start from the merged model, and a rule with one step per task",
            got=f"start {config.start!r}, rule {rule.name!r}",
        )
