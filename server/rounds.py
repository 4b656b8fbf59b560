"""What the sites of a round are sent, and what they bring taken together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from flwr.app import ArrayRecord, RecordDict
from safetensors.torch import save

from fedmerge.common import wire
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import to_bytes
from fedmerge.common.wire import CorrectJob, TrainJob
from fedmerge.server.combine import add_vectors, combine
from fedmerge.server.layout import FederationConfig, Site, TaskRun
from fedmerge.server.merge.rule import Cadence, Rule
from fedmerge.server.model import GlobalModel


class Rounds:
    """Rounds of training for one or more rules, which are all given the same vectors.

    Args:
        base: fingerprint of the pretrained model. ``models``: one per rule; if sites start from
            the merged model, one alone.

    Attributes:
        needs: statistics that one of the rules needs; they come with a task's last round.
        at_once: whether every round is merged as it closes, and not the sum of a task's rounds.
    """

    def __init__(self, base: str, models: Mapping[str, GlobalModel], config: FederationConfig) -> None:
        self._base, self._models, self._config = base, models, config
        self._rules = [model.engine.rule for model in models.values()]
        self._sketch = next((spec for rule in self._rules if (spec := rule.asks()) is not None), None)
        self.needs = tuple(sorted({need for rule in self._rules for need in rule.needs}))
        by_round = any(rule.cadence is Cadence.ROUND for rule in self._rules)
        self.at_once = config.start == "merged" and by_round

    def is_last(self, run: TaskRun) -> bool:
        """Whether the statistics that the rules need come with the round that a task is in."""
        return run.round == self._config.rounds

    def asking(self, run: TaskRun) -> list[Rule]:
        """The rules whose needs the vectors of that round must meet."""
        return self._rules if self.is_last(run) else []

    def requests(self, run: TaskRun, version: int) -> Iterator[tuple[Site, Callable[[], RecordDict]]]:
        """Whom to ask in the round that a task is in, and the contents of the messages.

        Args:
            version: that sites start from.
        """
        last = self.is_last(run)
        records = self._starting_point(run, version) | self._bases(last)
        for site in run.asked:
            yield site, partial(content_of, self._job(run, site, version, last), records)

    def _job(self, run: TaskRun, site: Site, version: int, last: bool) -> TrainJob:
        config = self._config
        return TrainJob(
            run.task,
            self._base,
            run.round,
            version,
            config.seed,
            run.part_of(site.node),
            len(run.sites),
            config.partition,
            needs=self.needs if last else (),
            sketch=self._sketch.model_dump_json() if last and self._sketch is not None else "",
            also=run.also,
            training=config.training.model_dump_json(exclude_none=True),
            compress=config.compress,
            last=last,
            learning="+".join(self._models),
        )

    def _starting_point(self, run: TaskRun, version: int) -> dict[str, ArrayRecord]:
        """The vector from the base to where sites start this round; none where that is the base."""
        vector = run.moved
        if version or (run.moved is not None and self.at_once):
            (model,) = self._models.values()
            vector = model.merged()
            if run.moved is not None and not self.at_once:
                vector = add_vectors(vector, run.moved)
        return {} if vector is None else {wire.ORIGIN: wire.pack_vector(to_bytes(vector))}

    def _bases(self, last: bool) -> dict[str, ArrayRecord]:
        """The input directions that the model protects, where sites project or measure by them."""
        measured = last and self._sketch is not None
        if self._config.start == "base" or not (measured or self._config.training.project):
            return {}
        (model,) = self._models.values()
        shown = {name: model.engine.rule.shown(model.engine.state(name)) for name in model.engine.touched}
        data = save({name: tensor for name, tensor in shown.items() if tensor is not None})
        return {wire.BASES: wire.pack_vector(data)}

    def combined(self, run: TaskRun) -> TaskVector:
        """What the sites of a round have learned, as one vector.

        Raises:
            StatisticsMissing: they do not bring the same ones.
        """
        vectors, shares, examples = run.gathered(self._config.weights)
        return combine(vectors, shares, self.needs if self.is_last(run) else (), examples=examples)


def content_of(job: TrainJob | CorrectJob, records: Mapping[str, ArrayRecord]) -> RecordDict:
    """A request and what goes with it."""
    return RecordDict({wire.JOB: wire.pack_job(job), **records})
