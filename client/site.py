"""What a site does with its own model and data: learn a task, score merged models. No Flower here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from glob import escape
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fedmerge.client.correction import CorrectionReport, correct
from fedmerge.client.fitting import check_fit, fit
from fedmerge.client.joint import joined
from fedmerge.client.linearised import linearised
from fedmerge.client.loading import load_stream
from fedmerge.client.resume import RunCheckpoint
from fedmerge.client.sharing import share
from fedmerge.client.statistics import Measured, check_needs, measure, second_moments
from fedmerge.client.tasks import Stream, StreamOptions, Task, TrainingConfig
from fedmerge.client.training import OnStep, TrainingReport, fine_tune, score, settled
from fedmerge.common.base import Base
from fedmerge.common.checkpoint import Checkpoint
from fedmerge.common.config import listed
from fedmerge.common.layers import LayerKind
from fedmerge.common.score import Score
from fedmerge.common.statistics import Statistic, Statistics
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.training import PLAIN, Correction, LocalTraining, Loop, SketchSpec

NONE: Mapping[str, Tensor] = MappingProxyType({})
NO_HEADS: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({})


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
        origin_version: int = 0,
        from_base: bool = False,
        heads: Mapping[str, Tensor] = NONE,
        device: str = "auto",
        on_step: OnStep | None = None,
        needs: Collection[str] = (),
        training: LocalTraining | None = None,
        also: Sequence[Task] = (),
        sketch: SketchSpec | None = None,
        bases: Mapping[str, Tensor] | None = None,
        private_seed: int | None = None,
        memory: dict[str, Tensor] | None = None,
        ends_task: bool = True,
        checkpoint: RunCheckpoint | None = None,
    ) -> tuple[TaskVector, TrainingReport]:
        """Fine-tunes from the base plus ``origin`` and returns what moved.

        The vector is measured from where training started; layers that were not trained are unchanged by
        declaration, and low-rank adapters come as their factors.

        Args:
            origin_version: the version that ``origin`` is, 0 if it is none.
            from_base: statistics come of every layer, because :meth:`beyond_base` will make a vector of all.
            heads: weights of private layers to start from, in place of those the model was built with.
            needs: names of statistics that come with the vector, of every layer that it stores.
            training: what departs from the stream's training. ``also``: tasks to learn at the same time; the
                stream's number of steps is meant for each.
            sketch: how to sketch, where a sketch is needed; ``private_seed``: as for
                :func:`~fedmerge.client.statistics.measure`. ``bases``: input directions that are protected.
            memory, ends_task, checkpoint: as for :func:`~fedmerge.client.training.fine_tune`.

        Raises:
            ConfigError: a statistic that is not known or cannot be had from this training, a number in the
                settings out of range, or what a task's own training function cannot do.
            NonFinite: training diverged, or statistics came out NaN or infinite.
        """
        check_needs(needs)
        training = self._with_heads(training or PLAIN)
        check_fit([task, *also], training, needs)
        started, moments = self._started(origin), dict[str, Tensor]()
        put(self.model, {name: started.read(name) for name in started.layers} | self._with_built(heads))

        def keep_moments(optimizer: Optimizer) -> None:
            if Statistic.SECOND_MOMENT in needs:
                moments.update(second_moments(self.model, optimizer))

        learned = joined([task, *also])
        config = self._config(training.loop, tasks=1 + len(also))
        training = training.model_copy(update={"loop": Loop()})
        if learned.fit is not None:
            report = fit(self.model, learned, config, seed, device)
        else:
            report = fine_tune(
                self.model,
                learned,
                config,
                seed,
                on_step,
                device,
                keep_moments,
                training=training,
                private=self.stream.private,
                base=self._weights() if training.tangent is not None else None,
                bases=bases,
                memory=memory,
                ends_task=ends_task,
                checkpoint=checkpoint,
            )
        manifest = Manifest(self.base.fingerprint, origin_version, task.name, site, report.examples)
        vector = self._moved(started, report, manifest)
        if needs:
            measuring = partial(measure, sketch=sketch, bases=bases, private_seed=private_seed)
            names = self.base.merged_layers if from_base and origin is not None else vector.names
            found = self._measured(learned, needs, names, moments, seed, device, measuring)
            manifest = replace(vector.manifest, statistics=tuple(sorted(set(needs))))
            vector = replace(vector, manifest=manifest, statistics=Statistics.of(found))
        return vector, report

    def _with_heads(self, training: LocalTraining) -> LocalTraining:
        """The same training with private layers trained whole beside adapters."""
        if training.lora is None or not self.stream.private:
            return training
        full = ",".join((*listed(training.lora.full), *self.stream.private))
        return training.model_copy(update={"lora": training.lora.model_copy(update={"full": full})})

    def _config(self, loop: Loop, tasks: int) -> TrainingConfig:
        """The settings of a run over so many tasks at once; steps are meant for each."""
        config = settled(self.stream.training, loop)
        return replace(config, steps=config.steps * tasks)

    def beyond_base(self, moved: TaskVector, origin: TaskVector | None) -> TaskVector:
        """A vector that was measured from the base plus ``origin``, measured from the base; in memory.

        Every layer is whole. Statistics are those of ``moved``.
        """
        if origin is None:
            return moved
        tuned = Checkpoint.of(dict(moved.apply(self._started(origin))), moved.label)
        vector = TaskVector.from_checkpoints(
            self.base, tuned, manifest=moved.manifest, private=self.stream.private
        )
        return replace(vector.in_memory(), statistics=moved.statistics)

    def _moved(self, started: Base, report: TrainingReport, manifest: Manifest) -> TaskVector:
        """What the model's weights are beyond those it started from, in memory."""
        still = frozenset(started.merged_layers) - report.trained
        vector = TaskVector.from_checkpoints(
            started,
            Checkpoint.of(self.model.state_dict(), f"fine-tuned {manifest.task}"),
            manifest=manifest,
            frozen=(*self.stream.training.frozen, *map(escape, still)),
            private=self.stream.private,
        )
        held = {name: report.updates.get(name) or vector.read(name) for name in vector.names}
        return TaskVector.of(held, vector.unchanged, vector.manifest, vector.label)

    def _measured(
        self,
        task: Task,
        needs: Collection[str],
        names: Iterable[str],
        moments: Mapping[str, Tensor],
        seed: int,
        device: str,
        measuring: Callable[..., Measured],
    ) -> Measured:
        """The statistics of these layers at the weights the model has now; ``moments`` are AdamW's."""
        layers = {name: self.base.layers[name] for name in names}
        found: Measured = {name: {} for name in layers}
        if set(needs) - {Statistic.SECOND_MOMENT}:
            config = self.stream.training
            found = measuring(self.model, task, needs, layers, config, seed=seed, device=device)
        if Statistic.SECOND_MOMENT in needs:
            for name, layer in layers.items():
                found[name][Statistic.SECOND_MOMENT] = moments.get(name, torch.zeros(layer.shape))
        return found

    def correct(
        self,
        task: Task,
        merged: TaskVector,
        previous: TaskVector,
        settings: Correction,
        *,
        seed: int,
        site: str,
        origin_version: int,
        device: str = "auto",
        tangent: bool = False,
        heads: Mapping[str, Tensor] = NONE,
    ) -> tuple[TaskVector, CorrectionReport]:
        """Fits a projection of the merged model to the representation by the model before it.

        Args:
            origin_version: the number of ``merged``. ``heads``: private layers the task was learned with.

        Returns:
            What is to be added to ``merged``: a vector of the fitted layers, all others unchanged.

        Raises:
            ConfigError, NonFinite: as :func:`fedmerge.client.correction.correct` does.
        """
        matrices = [name for name, layer in self.base.merged_layers.items() if layer.kind is LayerKind.MATRIX]
        changes, report = correct(
            self.model,
            task,
            {**dict(merged.apply(self.base)), **self._with_built(heads)},
            {**dict(previous.apply(self.base)), **self._with_built(heads)},
            settings,
            layers=matrices,
            seed=seed,
            device=device,
            base=self._weights() if tangent else None,
        )
        unchanged = [name for name in self.base.merged_layers if name not in changes]
        manifest = Manifest(self.base.fingerprint, origin_version, task.name, site, report.examples)
        return TaskVector.of(changes, unchanged, manifest, f"correction of {site}"), report

    def score(
        self,
        tasks: Iterable[Task],
        merged: TaskVector | None = None,
        device: str = "auto",
        tangent: bool = False,
        heads: Mapping[str, Mapping[str, Tensor]] = NO_HEADS,
    ) -> dict[str, Score]:
        """Scores of the base plus a merged vector, by task; the model itself as it is if None.

        Args:
            tangent: of the model's linearisation at the base.
            heads: by task, the private layers that it was learned with; others have those the model was built
                with.
        """
        if merged is not None:
            put(self.model, dict(merged.apply(self.base)))
        found = {}
        for task in tasks:
            if merged is not None or task.name in heads:
                put(self.model, self._with_built(heads.get(task.name, NONE)))
            with linearised(self.model, self._weights()) if tangent else nullcontext():
                found[task.name] = score(self.model, task, self.stream.training.eval_batch_size, device)
        return found

    def heads(self) -> dict[str, Tensor]:
        """Copies of the private layers as the model has them now."""
        held = self.model.state_dict()
        return {name: held[name].detach().clone() for name in self._built_heads()}

    def _built_heads(self) -> dict[str, Tensor]:
        """The private layers that the model was built with."""
        private = LayerKind.PRIVATE
        return {name: self.base.read(name) for name, spec in self.base.layers.items() if spec.kind is private}

    def _with_built(self, heads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every private layer: as kept, or as built where none is kept that fits the model as it is today."""
        built = self._built_heads()
        return {name: heads[name] if _fits(heads.get(name), t) else t for name, t in built.items()}

    def _weights(self) -> dict[str, Tensor]:
        """The base's own weights, private layers as they were built; what it lacks as the model has it."""
        held = {name: self.base.read(name) for name in self.base.layers}
        return {**self.model.state_dict(), **held}

    def reset(self) -> None:
        """Puts the base's weights back."""
        put(self.model, {name: self.base.read(name) for name in self.base.layers})

    def _started(self, origin: TaskVector | None) -> Base:
        """The weights a run starts from, as a base of their own."""
        if origin is None:
            return self.base
        return replace(self.base, checkpoint=Checkpoint.of(dict(origin.apply(self.base)), "origin"))


@lru_cache(maxsize=1)
def open_site(stream: str, options: StreamOptions) -> Site:
    """Loads a stream and its model once per process; worker processes serve many messages."""
    loaded = load_stream(stream, options)
    model = loaded.build_model()
    return Site(loaded, model, Base.from_model(model, loaded.private))


def _fits(kept: Tensor | None, built: Tensor) -> bool:
    return kept is not None and kept.shape == built.shape


@torch.no_grad()
def put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies weights into a model in place; names it does not have are an error, missing ones stay."""
    held = model.state_dict()
    for name, value in weights.items():
        held[name].copy_(value)
