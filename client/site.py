"""What a site does with its own model and data: learn a task, score merged models. No Flower here."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from fedmerge.client.loading import load_stream
from fedmerge.client.sharing import share
from fedmerge.client.statistics import Measured, check_needs, measure, second_moments
from fedmerge.client.tasks import Stream, StreamOptions, Task
from fedmerge.client.training import OnStep, TrainingReport, fine_tune, score
from fedmerge.common.base import Base
from fedmerge.common.checkpoint import Checkpoint
from fedmerge.common.score import Score
from fedmerge.common.statistics import Statistic, Statistics
from fedmerge.common.taskvector import Manifest, TaskVector


@dataclass(frozen=True)
class Site:
    """A site's stream, its model and the base that model started as.

    The model is one object, moved from weights to weights; the base is a copy that never changes.
    """

    stream: Stream
    model: nn.Module
    base: Base

    def task(self, name: str, part: int, parts: int, partition: str, seed: int) -> Task:
        """This site's share of a task's data."""
        return share(self.stream.load(name), part, parts, partition, seed)

    def learn(
        self,
        task: Task,
        *,
        seed: int,
        site: str,
        origin: TaskVector | None = None,
        device: str = "auto",
        on_step: OnStep | None = None,
        needs: Collection[str] = (),
    ) -> tuple[TaskVector, TrainingReport]:
        """Fine-tunes from the base plus ``origin`` and returns what moved.

        The vector is measured from where training started, and is zero by declaration where the
        stream freezes parameters.

        Args:
            needs: names of statistics that come with the vector, of every layer that it stores.

        Raises:
            ConfigError: a statistic that is not known, or a number in the stream's settings out of range.
            NonFinite: training diverged, or statistics came out NaN or infinite.
        """
        check_needs(needs)
        started, moments = self._start(origin), dict[str, Tensor]()

        def keep_moments(optimizer: AdamW) -> None:
            if Statistic.SECOND_MOMENT in needs:
                moments.update(second_moments(self.model, optimizer))

        report = fine_tune(self.model, task, self.stream.training, seed, on_step, device, keep_moments)
        manifest = Manifest(self.base.fingerprint, 0, task.name, site, report.examples)
        tuned = Checkpoint.of(self.model.state_dict(), f"fine-tuned {task.name}")
        vector = TaskVector.from_checkpoints(
            started, tuned, manifest=manifest, frozen=self.stream.training.frozen, private=self.stream.private
        )
        vector = vector.in_memory()
        if needs:
            measured = self._measured(task, needs, vector.names, moments, seed, device)
            manifest = replace(vector.manifest, statistics=tuple(sorted(set(needs))))
            vector = replace(vector, manifest=manifest, statistics=Statistics.of(measured))
        return vector, report

    def _measured(
        self,
        task: Task,
        needs: Collection[str],
        names: Iterable[str],
        moments: Mapping[str, Tensor],
        seed: int,
        device: str,
    ) -> Measured:
        """The statistics of these layers at the weights the model has now; ``moments`` are AdamW's."""
        layers = {name: self.base.layers[name] for name in names}
        found: Measured = {name: {} for name in layers}
        if set(needs) - {Statistic.SECOND_MOMENT}:
            found = measure(self.model, task, needs, layers, self.stream.training, seed=seed, device=device)
        if Statistic.SECOND_MOMENT in needs:
            for name, layer in layers.items():
                found[name][Statistic.SECOND_MOMENT] = moments.get(name, torch.zeros(layer.shape))
        return found

    def score(
        self, tasks: Iterable[Task], merged: TaskVector | None = None, device: str = "auto"
    ) -> dict[str, Score]:
        """Scores of the base plus a merged vector, by task; the model itself as it is if None."""
        if merged is not None:
            put(self.model, dict(merged.apply(self.base)))
        batch = self.stream.training.eval_batch_size
        return {task.name: score(self.model, task, batch, device) for task in tasks}

    def reset(self) -> None:
        """Puts the base's weights back."""
        put(self.model, {name: self.base.read(name) for name in self.base.layers})

    def _start(self, origin: TaskVector | None) -> Base:
        if origin is None:
            self.reset()
            return self.base
        weights = dict(origin.apply(self.base))
        put(self.model, weights)
        return replace(self.base, checkpoint=Checkpoint.of(weights, "origin"))


@lru_cache(maxsize=1)
def open_site(stream: str, options: StreamOptions) -> Site:
    """Loads a stream and its model once per process; worker processes serve many messages."""
    loaded = load_stream(stream, options)
    model = loaded.build_model()
    return Site(loaded, model, Base.from_model(model, loaded.private))


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into a model in place; names it does not have are an error, missing ones stay."""
    held = model.state_dict()
    for name, value in weights.items():
        held[name].copy_(value)
