"""A rehearsal of a site's training, before it takes part: two steps on two examples of every task it holds.

It takes place in a process of its own, over a model of its own. Nothing is sent, and nothing is written but
what the site's own code writes.
"""

from __future__ import annotations

import sysconfig
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from fedmerge.client.batches import steps_of
from fedmerge.client.memory import SiteMemory
from fedmerge.client.outgoing import outgoing
from fedmerge.client.running import batch_of
from fedmerge.client.site import Site, open_site
from fedmerge.client.tasks import Batch, StreamOptions, Task, length
from fedmerge.common.compression import Compression
from fedmerge.common.errors import ConfigError, FedmergeError, MismatchError
from fedmerge.common.layers import matches
from fedmerge.common.privacy import Privacy
from fedmerge.common.training import LocalTraining, Loop
from fedmerge.common.vectorfile import to_bytes
from fedmerge.deploy.checks import Check, Checks
from fedmerge.deploy.launch.apart import answer, tell
from fedmerge.deploy.launch.config import ClientConfig
from fedmerge.deploy.report.words import count, format_bytes

FEW = 2
"""Examples of each kind that are used, and steps that are taken; the last is timed, as the first is slow."""

WITHIN = timedelta(hours=1)
NOT_THE_SITE_S = (
    *(str(Path(__file__).parents[1] / folder) for folder in ("client", "common", "deploy")),
    *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
)
"""Folders of code that a site did not write."""


def rehearsal(config: ClientConfig) -> Checks:
    """Whether the site can learn and score each of its tasks, how long that takes and how much it sends."""
    what = "the rehearsal ended early"
    asked = config.model_dump_json()
    try:
        found = answer("fedmerge.deploy.rehearsal:_main", asked, within=WITHIN, what=what, where="training")
    except FedmergeError as error:
        yield Check.of("training", error)
        return
    yield from (Check(**one) for one in found)


def _main(asked: str) -> None:
    config = ClientConfig.model_validate_json(asked)
    torch.set_num_threads(config.site.threads)
    site = open_site(config.site.task, StreamOptions(config.site.seed, config.site.rows))
    tell([asdict(check) for check in rehearse(site, config)])


def rehearse(site: Site, config: ClientConfig) -> Checks:
    """The checks themselves, in this process; they change the weights of the site's model."""
    yield from _patterns(site)
    for name in config.site.held or site.stream.tasks:
        yield from _one_by_one(_Rehearsal(site, config, name))


def _patterns(site: Site) -> Checks:
    """Which patterns of private and of frozen layers mean nothing."""
    names = list(site.model.state_dict())
    for kind, patterns in (("private", site.stream.private), ("frozen", site.stream.training.frozen)):
        empty = [pattern for pattern in patterns if not any(matches(name, (pattern,)) for name in names)]
        if empty:
            found, do = f"no layer matches {', '.join(empty)}", f"Correct the stream's {kind} patterns."
            yield Check(f"{kind} layers", "FAIL" if kind == "private" else "warn", found, do)


def _one_by_one(rehearsed: _Rehearsal) -> Checks:
    """The checks of a task, until one fails."""
    every: list[tuple[str, Callable[[], str]]] = [
        ("data", rehearsed.data),
        ("training", rehearsed.training),
        ("scoring", rehearsed.scoring),
        ("update", rehearsed.update),
    ]
    for kind, look in every:
        name = f"{rehearsed.name}, {kind}"
        try:
            yield Check(name, "ok", look())
        except FedmergeError as error:
            yield Check.of(name, error)
            return
        except Exception as error:  # a site's own code raises what it likes
            yield Check(
                name, "FAIL", f"{type(error).__name__}: {_first_line(error)}", f"See {_origin(error)}."
            )
            return


@dataclass
class _Rehearsal:
    """A task's rehearsal; each method does one part, says what it found, and raises if it went wrong."""

    site: Site
    config: ClientConfig
    name: str

    @cached_property
    def task(self) -> Task:
        return self.site.task(self.name, 0, 1, "iid", self.config.site.seed)

    @cached_property
    def few(self) -> Task:
        """The same task over its first examples."""
        task = self.task
        return replace(task, train=_first(task.train), test=_first(task.test), labels=None)

    def data(self) -> str:
        """Reads examples of both kinds and makes batches of them."""
        task, few = self.task, self.few
        counts = length(task.train), length(task.test)
        for number, kind, rows in zip(counts, ("training", "test"), (few.train, few.test), strict=True):
            if not number:
                raise ConfigError(f"no {kind} examples", where=f"task {self.name!r}", wanted="at least 1")
            batch_of(few, rows, range(length(rows)), torch.device("cpu"))
        if task.labels is not None and len(task.labels) != counts[0]:
            raise ConfigError(
                "not one label per training example", got=f"{len(task.labels)} labels", wanted=counts[0]
            )
        return f"{counts[0]} training and {counts[1]} test examples; a batch of each can be made"

    def training(self) -> str:
        """Takes a few steps on a few examples."""
        ends = []
        self.vector, report = self.site.learn(
            self.few,
            seed=self.config.site.seed,
            site=self.config.site.name,
            device=self.config.site.device,
            on_step=lambda *_: ends.append(time.perf_counter()),
            training=LocalTraining(loop=Loop(steps=FEW, batch_size=FEW, accumulate=1)),
        )
        moved = sum(update.sum_of_squares() > 0 for _, update in self.vector.items())
        if not moved:
            raise ConfigError(
                "training moved nothing",
                do="Look at the loss, the learning rate, the frozen patterns and the weights' dtype.",
            )
        found = f"loss {report.mean_loss:.3g}; {moved} of {self._layers()} layers moved"
        if self.task.fit is not None:
            own = f"{_duration(report.seconds)} in the task's own function"
            return f"{found}; {own}, asked for {FEW} steps of {length(self.few.train)}"
        return f"{found}; {self._times(ends[-1] - ends[-2])}"

    def scoring(self) -> str:
        """Scores a few examples."""
        seen: list[Tensor] = []

        def metric(model: nn.Module, batch: Batch) -> Tensor:
            seen.append(self.few.metric(model, batch))
            return seen[-1]

        score = self.site.score([replace(self.few, metric=metric)], device=self.config.site.device)[self.name]
        scores = torch.cat([values.flatten() for values in seen])
        if len(scores) != score.examples:
            wanted = f"one for each of {score.examples} examples"
            raise ConfigError("the metric gives another number of scores", got=len(scores), wanted=wanted)
        if not bool(((scores >= 0) & (scores <= 1)).all()):
            raise ConfigError("the metric gives scores out of range", wanted="between 0 and 1")
        return f"{score.examples} examples scored, {score.accuracy:.2f} on average"

    def update(self) -> str:
        """Makes the update as it would be sent."""
        privacy = self.config.privacy
        sent = outgoing(self.vector, privacy, Compression(), SiteMemory())
        layers = len(sent.vector.names)
        found = f"{format_bytes(len(to_bytes(sent.vector, dtype=sent.dtype)))} for {count(layers, 'layer')}"
        kept = [name for name in self.site.base.layers if matches(name, self.site.stream.private)]
        if leaving := [name for name in kept if name in sent.vector.names]:
            raise MismatchError("a private layer would be sent", layer=leaving[0])
        if kept:
            found += f", {len(kept)} private stay here"
        return found if privacy is None else f"{found}; {_protection(privacy, sent.numbers['epsilon'])}"

    def _layers(self) -> int:
        return len(self.vector.names) + len(self.vector.unchanged)

    def _times(self, seconds: float) -> str:
        """A step's time, and what it says of a whole run: small batches take more time for each example."""
        config, rows = self.site.stream.training, length(self.task.train)
        steps, examples = steps_of(config, rows), min(config.batch_size * config.accumulate, rows)
        few = length(self.few.train)
        most = steps * seconds * max(1.0, examples / few)
        return (
            f"{_duration(seconds)} for a step of {few}, "
            f"at most about {_duration(most)} for {steps} steps of {examples}"
        )


def _first(rows: Dataset[Any]) -> Dataset[Any]:
    return Subset(rows, range(min(FEW, length(rows))))


def _protection(privacy: Privacy, epsilon: float) -> str:
    return (
        f"norm at most {privacy.clip:g}, noise {privacy.noise:g}: "
        f"epsilon {epsilon:.3g} for one update at delta {privacy.delta:g}"
    )


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min"), (1, "s")):
        if seconds >= unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds * 1000:.0f} ms"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no message")


def _origin(error: Exception) -> str:
    """The innermost line of the site's own code, else of any."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NOT_THE_SITE_S)] or frames
    return f"{own[-1].filename}, line {own[-1].lineno}"
