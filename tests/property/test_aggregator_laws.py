"""Whatever is merged, rolled back, taken out and restarted, in any order: is every kept version what it was?

A model in memory says what a version must be: the vectors that were added and taken out, in order, merged
by an engine that has never seen a disk. Every kept version must have these very bits, and a rollback to it
as well, however little is kept.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from pathlib import Path

import pytest
import torch

from fedmerge.common.base import Base
from fedmerge.common.errors import NotFound, NotKept
from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.records import UpdateState, VersionKind, update_id
from fedmerge.common.statistics import Statistic, Statistics
from fedmerge.common.taskvector import LayerUpdate, LowRank, Manifest, TaskVector
from fedmerge.common.vectorfile import load, save, to_bytes
from fedmerge.server.admission import Limits
from fedmerge.server.aggregator import Aggregator, AggregatorSettings
from fedmerge.server.engine.engine import Act, Engine
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.replay import Replay
from fedmerge.server.retention import Retention

SEQUENCES = 20
ACTS = 14
SITE = "ward-1"
WAIT_SECONDS = 30

GENERATOR = torch.Generator().manual_seed(0)
BASE = Base.from_checkpoint(
    {
        "wide.weight": torch.randn(16, 16, generator=GENERATOR),
        "a.weight": torch.randn(6, 5, generator=GENERATOR),
        "a.bias": torch.zeros(6),
    }
)

Step = tuple[int, bool]
"""A vector's seed, and whether it was taken out."""


def task_of(seed: int) -> str:
    return f"task-{seed % 5}"


@cache
def vector(seed: int) -> TaskVector:
    """Dense or in factors, of some layers or all, with the statistics and the id it has at the server."""
    chance, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    held: dict[str, torch.Tensor | LayerUpdate] = {}
    for name, layer in BASE.layers.items():
        if chance.random() < 0.2 and (held or name != "a.bias"):
            continue
        if len(layer.shape) == 2 and chance.random() < 0.5:
            rows, columns = layer.shape
            left = 0.2 * torch.randn(rows, 1, generator=generator)
            held[name] = LowRank(left, torch.randn(1, columns, generator=generator), layer.shape)
        else:
            held[name] = 0.05 * torch.randn(layer.shape, generator=generator)
    unchanged = [name for name in BASE.layers if name not in held]
    listed = tuple(sorted(Statistic))
    manifest = Manifest(BASE.fingerprint, 0, task_of(seed), SITE, statistics=listed)
    measured = Statistics.of({name: measured_of(BASE.layers[name], chance) for name in held})
    made = replace(TaskVector.of(held, unchanged, manifest), statistics=measured)
    return replace(made, id=update_id(SITE, sha256(to_bytes(made)).hexdigest()))


def measured_of(layer: LayerSpec, chance: random.Random) -> dict[str, torch.Tensor]:
    """Curvatures, and for matrices a Gram's factor of low rank and a sketch of rank 1."""
    generator = torch.Generator().manual_seed(chance.randrange(2**31))
    found = {
        str(name): torch.rand(layer.shape, generator=generator) + 0.1
        for name in (Statistic.FISHER, Statistic.SECOND_MOMENT)
    }
    if layer.kind is LayerKind.MATRIX:
        columns = layer.matrix_shape[1]
        found[Statistic.INPUT_GRAM] = torch.randn(3, columns, generator=generator)
        found[Statistic.SKETCH] = torch.randn(columns, 1, generator=generator) * torch.ones(columns)
        found[Statistic.RESIDUAL] = torch.rand(1, generator=generator)
    return found


def engine_of(rule: str) -> Engine:
    return LocalEngine(make_rule(rule), BASE.layers.values(), workers=1)


@cache
def bits(rule: str, steps: tuple[Step, ...]) -> dict[str, bytes]:
    with engine_of(rule) as engine:
        for seed, removing in steps:
            engine.absorb(vector(seed), act=Act.REMOVE if removing else Act.ABSORB)
            engine.commit()
        return {name: update.to_dense().numpy().tobytes() for name, update in engine.merged().items()}


@dataclass(frozen=True)
class Model:
    """What a version must be: how it came about, and whose vectors are in it."""

    steps: tuple[Step, ...] = ()
    inside: tuple[int, ...] = ()

    def with_(self, seed: int) -> Model:
        return Model((*self.steps, (seed, False)), (*self.inside, seed))

    def without(self, task: str, order_free: bool) -> Model:
        left = tuple(seed for seed in self.inside if task_of(seed) != task)
        if not left or not order_free:
            return Model(tuple((seed, False) for seed in left), left)
        gone = tuple((seed, True) for seed in self.inside if task_of(seed) == task)
        return Model((*self.steps, *gone), left)


@dataclass
class Run:
    """A state folder, and what its versions must be."""

    folder: Path
    rule: str
    retention: Retention
    chance: random.Random
    quarantine: bool
    models: list[Model] = field(default_factory=lambda: [Model()])
    merged_as: dict[int, int] = field(default_factory=dict)
    seen: int = 0

    def opened(self) -> Aggregator:
        limits = Limits(quarantine="all" if self.quarantine else "none")
        settings = AggregatorSettings(limits=limits, retention=self.retention)
        rule = make_rule(self.rule)
        return Aggregator(self.folder / "state", BASE, rule, lambda: engine_of(self.rule), settings)

    def __call__(self) -> None:
        left = ACTS
        while left > 0:
            with self.opened() as aggregator:
                assert aggregator.status().failing == ""
                self.check(aggregator, everything=True)
                for _ in range(self.chance.randint(1, left)):
                    left -= 1
                    self.act(aggregator)
                    self.check(aggregator)
        with self.opened() as aggregator:
            self.check(aggregator, everything=True)
            for number in self.chance.sample(self.kept(), len(self.kept())):
                if aggregator.version(number).kept:
                    self.roll_back(aggregator, number)
                    self.check(aggregator)

    def act(self, aggregator: Aggregator) -> None:
        chosen = self.chance.choices(
            [self.submit, self.submit_again, self.roll_back, self.roll_back_too_far, self.remove],
            [8, 1, 3, 1, 4],
        )
        chosen[0](aggregator)

    def submit(self, aggregator: Aggregator) -> None:
        seed, self.seen = self.seen, self.seen + 1
        receipt = aggregator.submit(self.file(seed), site=SITE)
        if self.quarantine:
            assert receipt.state is UpdateState.HELD
            if self.chance.random() < 0.3:
                aggregator.reject(receipt.update, by="root")
                return
            aggregator.approve(receipt.update, by="root")
        assert aggregator.wait_until_merged(WAIT_SECONDS)
        self.models.append(self.models[-1].with_(seed))
        self.merged_as[seed] = len(self.models) - 1
        assert aggregator.update(receipt.update).version == len(self.models) - 1

    def submit_again(self, aggregator: Aggregator) -> None:
        if self.seen:
            assert aggregator.submit(self.file(self.chance.randrange(self.seen)), site=SITE).again

    def roll_back(self, aggregator: Aggregator, number: int | None = None) -> None:
        number = self.chance.choice([0, *self.kept()]) if number is None else number
        version = aggregator.roll_back(number, by="root")
        assert (version.kind, version.parent) == (VersionKind.ROLLBACK, number)
        self.models.append(self.models[number])

    def roll_back_too_far(self, aggregator: Aggregator) -> None:
        gone = range(1, len(self.models) - len(self.kept()))
        with pytest.raises(NotKept if gone else NotFound):
            aggregator.roll_back(self.chance.choice(gone or [len(self.models)]), by="root")

    def remove(self, aggregator: Aggregator) -> None:
        model = self.models[-1]
        if not model.inside:
            with pytest.raises(NotFound):
                aggregator.remove(task_of(0), by="root")
            return
        task = task_of(self.chance.choice(model.inside))
        try:
            aggregator.remove(task, by="root")
        except NotKept:
            assert self.may_lack(task), f"{task} should be removable"
        else:
            self.models.append(model.without(task, make_rule(self.rule).additive))

    def may_lack(self, task: str) -> bool:
        """Whether a vector that taking out a task needs may be gone; any older one, where order matters."""
        if self.retention.vectors is None:
            return False
        newest_gone = len(self.models) - 1 - self.retention.vectors
        needed = [seed for seed in self.models[-1].inside if task_of(seed) == task]
        if not make_rule(self.rule).additive:
            needed = list(self.merged_as)
        return any(self.merged_as[seed] <= newest_gone for seed in needed)

    def kept(self) -> Sequence[int]:
        return range(max(1, len(self.models) - self.retention.versions), len(self.models))

    def check(self, aggregator: Aggregator, everything: bool = False) -> None:
        current = len(self.models) - 1
        status, model = aggregator.status(), self.models[-1]
        assert (status.version, status.failing, status.merged) == (current, "", len(model.inside))
        assert list(status.tasks) == list(dict.fromkeys(map(task_of, model.inside)))
        for number in self.kept() if everything else self.kept()[-1:]:
            with aggregator.open_version(number) as published:
                got = {
                    name: update.to_dense().numpy().tobytes() for name, update in load(published.path).items()
                }
            assert got == bits(self.rule, self.models[number].steps), f"version {number}"
        assert [v.number for v in aggregator.versions(limit=1000) if v.kept and v.number] == list(self.kept())
        named = {v.snapshot for v in aggregator.versions(limit=1000)}
        named |= {v.sha256 for v in aggregator.versions(limit=1000) if v.kept}
        named |= {u.sha256 for u in aggregator.updates(limit=1000) if u.kept}
        on_disk = {path.stem for path in (self.folder / "state" / "blobs").rglob("*.safetensors")}
        assert on_disk == named - {""}

    def file(self, seed: int) -> Path:
        path = self.folder / f"{seed}.safetensors"
        if not path.exists():
            save(vector(seed), path)
        return path


def run(seed: int, folder: Path) -> None:
    """One random sequence; the seed and its settings say all about it."""
    chance = random.Random(seed)
    folder.mkdir()
    retention = Retention(
        versions=chance.randint(1, 4),
        vectors=chance.choice([None, 0, 1, 2, 5]),
        snapshot_every=chance.randint(1, 5),
    )
    rule = chance.choice(sorted(RULES))
    print(f"seed {seed}: {rule}, {retention}")
    Run(folder, rule, retention, chance, quarantine=chance.random() < 0.2)()
    shutil.rmtree(folder)


def test_every_kept_version_is_what_it_was_bit_for_bit(tmp_path: Path) -> None:
    first = random.randrange(10**6)
    for seed in range(first, first + SEQUENCES):
        run(seed, tmp_path / str(seed))


def test_a_removal_that_goes_back_too_little_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nearest(self: Replay, number: int, wanted: Sequence[object]) -> tuple[int, Sequence[object]]:
        return number, ()

    monkeypatch.setattr(Replay, "beginning", nearest)

    def runs() -> None:
        for seed in range(100):
            run(seed, tmp_path / str(seed))

    with pytest.raises(AssertionError):
        runs()
