"""Task vectors of a stream for comparing rules: each task learned once from the base, and kept on request.

A kept vector is a task vector file whose name holds a hash of what the learning depended on: stream, seed,
rows, task, base, training settings and options, the file that defines the stream, and the versions of
fedmerge and torch. If any of that changes the file is not found. A vector with fewer statistics than are
needed is learned again.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch

from fedmerge import __version__
from fedmerge.client.loading import BUILT_IN
from fedmerge.client.site import Site, open_site
from fedmerge.client.tasks import StreamOptions, Task
from fedmerge.common.lookup import find_function
from fedmerge.common.statistics import Statistics
from fedmerge.common.taskvector import TaskVector, no_statistics
from fedmerge.common.training import PLAIN, LocalTraining
from fedmerge.common.vectorfile import load, save
from fedmerge.common.writing import make_folder

OnLearned = Callable[[str], None]
"""Called with a line of what was done once a vector is there."""


@dataclass(frozen=True)
class Learner:
    """Learns the tasks of one stream with one seed.

    Attributes:
        spec: the stream, as :func:`~fedmerge.client.loading.load_stream` takes it.
        tasks: names of those to learn. ``rows``: bound on training rows per task.
        cache: folder of kept vectors; None keeps none.
        training: what departs from the stream's training.
    """

    spec: str
    seed: int
    rows: int | None
    tasks: tuple[str, ...]
    cache: Path | None = None
    training: LocalTraining = PLAIN

    @cached_property
    def site(self) -> Site:
        return open_site(self.spec, StreamOptions(self.seed, self.rows))

    def load(self) -> list[Task]:
        """The tasks with their data, in order."""
        return [self.site.stream.load(name) for name in self.tasks]

    def learn(
        self, tasks: Sequence[Task], needs: Collection[str], on_learned: OnLearned = lambda _: None
    ) -> dict[str, TaskVector]:
        """The vector of every task, in memory, with at least these statistics.

        Raises:
            ConfigError, NonFinite: as :meth:`Site.learn` does.
            FileError: the cache folder cannot be written.
        """
        vectors = {}
        for task in tasks:
            vectors[task.name] = self._kept(task.name, needs) or self._learn(task, needs)
            on_learned(f"{self.site.stream.name}, seed {self.seed}: {task.name}")
        return vectors

    def path(self, task: str) -> Path | None:
        """Where a task's vector is kept."""
        if self.cache is None:
            return None
        facts = [self.spec, self.seed, self.rows, task, self.site.base.fingerprint]
        facts += [asdict(self.site.stream.training), self.training.model_dump()]
        facts += [_source(self.spec), __version__, torch.__version__]
        digest = sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        readable = re.sub(r"[^A-Za-z0-9_-]+", "-", f"{self.site.stream.name}-{self.seed}-{task}")
        return self.cache / f"{readable}-{digest[:16]}.safetensors"

    def _kept(self, task: str, needs: Collection[str]) -> TaskVector | None:
        path = self.path(task)
        if path is None or not path.is_file():
            return None
        vector = load(path)
        return vector.in_memory() if set(needs) <= set(vector.manifest.statistics) else None

    def _learn(self, task: Task, needs: Collection[str]) -> TaskVector:
        name = f"seed-{self.seed}"
        vector, _ = self.site.learn(task, seed=self.seed, site=name, needs=needs, training=self.training)
        if path := self.path(task.name):
            make_folder(path.parent)
            save(vector, path)
        return vector


def carrying(vector: TaskVector, needs: Collection[str]) -> TaskVector:
    """The vector as a site sends it to a server that asks for these statistics and no others."""
    manifest = replace(vector.manifest, statistics=tuple(sorted(needs)))
    if not needs:
        return replace(vector, manifest=manifest, statistics=no_statistics)
    held = {
        layer: {name: values for name, values in vector.statistics(layer).items() if name in needs}
        for layer in vector.names
    }
    return replace(vector, manifest=manifest, statistics=Statistics.of(held))


def _source(spec: str) -> str:
    """Hash of the file that a stream's function is defined in; empty where it has none."""
    function = find_function(BUILT_IN.get(spec, spec), where=f"stream {spec!r}")
    path = inspect.getsourcefile(inspect.unwrap(function))
    return sha256(Path(path).read_bytes()).hexdigest() if path else ""
