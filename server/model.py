"""One rule's global model and its versions, in memory: what simulations and offline merging need."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedmerge.common.base import Base
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.server.combine import add_vectors
from fedmerge.server.engine.engine import Act, Engine, OnLayer


@dataclass(frozen=True)
class Version:
    """One committed global model.

    Attributes:
        number: 1 for the first merge; 0 is the base.
        task, sites, examples: whose vector was merged.
        scale: the factor from the running sum to the merged vector, 1 for rules that read out more than a
            multiple of a sum; ``lambda_t`` its inverse.
        update_norm, merged_norm: ||tau_T|| and ||theta - theta_0||, over all merged layers.
        absorb_seconds: from the vector in memory to the new state.
    """

    number: int
    task: str
    sites: tuple[str, ...]
    examples: int
    scale: float
    lambda_t: float
    update_norm: float
    merged_norm: float
    absorb_seconds: float


class GlobalModel:
    """Merges vectors one by one into versions of one global model.

    Args:
        base: the registered base.
        engine: holds the rule and its state.
    """

    def __init__(self, base: Base, engine: Engine) -> None:
        self.base, self.engine = base, engine
        self.versions: list[Version] = []

    def merge(
        self,
        vector: TaskVector,
        sites: Sequence[str] = (),
        on_layer: OnLayer = lambda _: None,
        *,
        step: bool = False,
    ) -> Version:
        """Merges one admitted vector; on error the model and its versions are as before.

        Args:
            step: whether it is measured from the current model. Rules that do not take steps are given the
                sum of both, which is dense.
        """
        started = time.perf_counter()
        if step and not self.engine.rule.steps:
            # In memory: an engine may read it again when another model is current.
            vector, step = add_vectors(self.merged(), vector).in_memory(), False
        totals = self.engine.absorb(vector, on_layer, relative=step)
        seconds = time.perf_counter() - started
        try:
            merged_norm = self.engine.pending().norm()
        except BaseException:
            self.engine.abandon()
            raise
        self.engine.commit()
        self.versions.append(self._described(vector, sites, totals.update_norm, merged_norm, seconds))
        return self.versions[-1]

    def current(self, vector: TaskVector, sites: Sequence[str], absorb_seconds: float) -> Version:
        """The model as it is, as if all that a task has moved, ``vector``, had been merged at once."""
        return self._described(vector, sites, vector.norm(), self.merged().norm(), absorb_seconds)

    def _described(
        self,
        vector: TaskVector,
        sites: Sequence[str],
        update_norm: float,
        merged_norm: float,
        absorb_seconds: float,
    ) -> Version:
        rule, totals = self.engine.rule, self.engine.totals
        return Version(
            number=totals.merges,
            task=vector.manifest.task,
            sites=tuple(sites),
            examples=vector.manifest.examples,
            scale=rule.scale(totals),
            lambda_t=rule.lambda_t(totals),
            update_norm=update_norm,
            merged_norm=merged_norm,
            absorb_seconds=absorb_seconds,
        )

    def adjust(self, vector: TaskVector) -> None:
        """Moves the current model by a vector, which counts as no merge; on error it is as before."""
        self.engine.absorb(vector, act=Act.ADJUST)
        self.engine.commit()

    def merged(self) -> TaskVector:
        """The current version as a vector from the base, layers read on demand."""
        manifest = Manifest(
            base=self.base.fingerprint, origin_version=self.engine.totals.merges, task="merged", site="server"
        )
        return replace(self.engine.merged(), manifest=manifest)

    def prepare(self) -> None:
        """Lets the engine factorise for the next arrival in the background."""
        self.engine.prepare()
