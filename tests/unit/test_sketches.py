"""Do sites sketch their inputs as they say, outside of what is protected, and with numbers of their own?"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, unfold
from torch.utils.data import TensorDataset

from fedmerge.client import sketches
from fedmerge.client.statistics import measure
from fedmerge.client.tasks import Task, TrainingConfig
from fedmerge.common.base import Base
from fedmerge.common.errors import NonFinite, ShapeMismatch
from fedmerge.common.statistics import Statistic
from fedmerge.common.training import SketchSpec
from fedmerge.server.merge.fot import Fot
from fedmerge.server.merge.rule import Context

SKETCH, RESIDUAL = Statistic.SKETCH, Statistic.RESIDUAL
SEED = 12


def inputs(*shape: int, seed: int = 0) -> Tensor:
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.linspace(0.5, 2, shape[-1]) + 0.3


def plain_loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]).flatten(1)[:, :2], batch[1])


def task_of(rows: Tensor, loss=plain_loss) -> Task:
    data = TensorDataset(rows, torch.arange(len(rows)) % 2)
    return Task("rows", data, data, loss, plain_loss)


def measured(model: nn.Module, task: Task, *wanted: str, batch: int = 8, **options: object):
    config = TrainingConfig(eval_batch_size=batch)
    layers = Base.from_model(model).merged_layers
    given = {"seed": 0, "device": "cpu", "private_seed": SEED, **options}
    return measure(model, task, wanted or (SKETCH, RESIDUAL), layers, config, **given)


def mixing(rows: int, columns: int, seed: int = SEED) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns), dtype=np.float32))


def basis(columns: int, directions: int, seed: int = 5) -> Tensor:
    drawn = torch.randn(columns, directions, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(drawn.double()).Q.float()


def close(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found.double(), wanted.double(), rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_worked_by_hand() -> None:
    """Inputs (3, 4) and (0, 2), the second axis protected: 9 of 29 are left, in the first axis."""
    model, rows = nn.Linear(2, 2), torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    found = measured(model, task_of(rows), bases={"weight": torch.tensor([[0.0], [1.0]])})["weight"]
    random = mixing(2, 2)
    torch.testing.assert_close(found[SKETCH], torch.stack([3 * random[0], torch.zeros(2)]))
    assert found[RESIDUAL].tolist() == pytest.approx([sqrt(9 / 29)])
    assert {values.dtype for values in found.values()} == {torch.float32}


@pytest.mark.parametrize("directions", [0, 1, 3, 6])
def test_a_sketch_is_the_mixed_residual_and_its_ratio_that_of_the_norms(directions: int) -> None:
    rows, shown = inputs(30, 5, 6), basis(6, directions)
    found = measured(nn.Linear(6, 2), task_of(rows), batch=7, bases={"weight": shown})["weight"]
    flat = rows.reshape(-1, 6).double()
    rest = flat - flat @ shown.double() @ shown.double().T
    assert found[RESIDUAL].item() == pytest.approx(float(rest.norm() / flat.norm()), abs=1e-6)
    random = np.random.default_rng(SEED)
    parts = [random.standard_normal((len(p) * 5, 6), dtype=np.float32) for p in rows.split(7)]
    wanted = rest.T @ torch.from_numpy(np.concatenate(parts)).double()
    assert torch.allclose(found[SKETCH].double(), wanted, atol=1e-4 * float(flat.norm()))


def test_without_protected_directions_the_ratio_is_one_and_zeros_have_none() -> None:
    assert measured(nn.Linear(6, 2), task_of(inputs(9, 6)))["weight"][RESIDUAL].tolist() == [1.0]
    nothing = measured(nn.Linear(6, 2), task_of(torch.zeros(9, 6)))["weight"]
    assert nothing[RESIDUAL].tolist() == [0.0]
    assert not nothing[SKETCH].any()


def test_squared_ratios_are_those_of_squared_norms() -> None:
    shown, task = {"weight": basis(6, 2)}, task_of(inputs(9, 6))
    plain = measured(nn.Linear(6, 2), task, bases=shown)["weight"]
    squared = measured(nn.Linear(6, 2), task, bases=shown, sketch=SketchSpec(squared=True))["weight"]
    assert squared[RESIDUAL].item() == pytest.approx(plain[RESIDUAL].item() ** 2)
    assert torch.equal(squared[SKETCH], plain[SKETCH])


@pytest.mark.parametrize(
    ("width", "columns"), [(0.01, 1), (0.25, 2), (0.5, 3), (1.0, 6), (5.0, 30), (8.0, 48)]
)
def test_width_is_in_multiples_of_the_layers_columns(width: float, columns: int) -> None:
    found = measured(nn.Linear(6, 2), task_of(inputs(9, 6)), sketch=SketchSpec(width=width))["weight"]
    assert found[SKETCH].shape == (6, columns)


@pytest.mark.parametrize(("distribution", "variance"), [("normal", 1.0), ("uniform", 1 / 3)])
def test_the_mixing_has_the_distribution_that_was_asked_for(distribution: str, variance: float) -> None:
    """One input row of ones shows the random numbers themselves."""
    spec = SketchSpec(width=8.0, distribution=distribution)
    found = measured(nn.Linear(500, 2), task_of(torch.ones(1, 500)), sketch=spec)["weight"][SKETCH][0]
    assert abs(float(found.mean())) < 0.05
    assert float(found.var()) == pytest.approx(variance, rel=0.1)
    assert (float(found.abs().max()) < 1) is (distribution == "uniform")
    assert float(found.min()) < -0.9 < 0.9 < float(found.max())


def test_its_gram_is_that_of_all_training_examples_in_expectation() -> None:
    rows = inputs(300, 6)
    grams = [
        measured(nn.Linear(6, 2), task_of(rows), sketch=SketchSpec(width=8), private_seed=seed)["weight"]
        for seed in range(40)
    ]
    mean = sum(g[SKETCH] @ g[SKETCH].T for g in grams) / (40 * 48)
    assert float((mean - rows.T @ rows).norm() / (rows.T @ rows).norm()) < 0.1


def test_all_examples_are_seen_once_in_batches_and_in_evaluation_mode() -> None:
    seen: list[float] = []
    modes: set[bool] = set()

    def loss(model, batch):
        seen.extend(batch[0][:, 0].tolist())
        modes.add(model.training or torch.is_grad_enabled())
        return plain_loss(model, batch)

    model = nn.Sequential(nn.Dropout(0.9), nn.Linear(1, 2)).train()
    measured(model, task_of(torch.arange(20.0)[:, None], loss), batch=6)
    assert seen == [float(row) for row in range(20)]
    assert modes == {False}
    assert model.training


def test_a_convolution_is_sketched_by_its_patches() -> None:
    conv, rows, shown = nn.Conv2d(2, 5, 3, stride=2, padding=1), inputs(4, 2, 7, 6), basis(18, 4)
    found = measured(conv, task_of(rows), bases={"weight": shown})["weight"]
    patches = unfold(rows, 3, 1, 1, 2).transpose(1, 2).reshape(-1, 18).double()
    rest = patches - patches @ shown.double() @ shown.double().T
    assert close(found[SKETCH], rest.T @ mixing(len(patches), 18).double())
    assert close(found[RESIDUAL], (rest.norm() / patches.norm()).reshape(1))


def test_only_matrix_layers_with_inputs_have_sketches() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
            self.used, self.idle = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.used(self.norm(self.embedding(x))).mean(1)

    found = measured(Model(), task_of(torch.arange(12).reshape(6, 2) % 5))
    assert {name for name, statistics in found.items() if statistics} == {"used.weight"}


def test_layers_of_one_input_are_mixed_each_with_its_own_numbers() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x):
            return self.left(x) + self.right(x)

    found = measured(Twins(), task_of(inputs(9, 4)))
    assert not close(found["left.weight"][SKETCH], found["right.weight"][SKETCH])


def test_nobody_can_draw_the_numbers_again_unless_a_seed_is_given() -> None:
    task = task_of(inputs(9, 6))
    one, two = (measured(nn.Linear(6, 2), task, private_seed=None)["weight"] for _ in range(2))
    assert not close(one[SKETCH], two[SKETCH])
    assert torch.equal(one[RESIDUAL], two[RESIDUAL])
    again = [measured(nn.Linear(6, 2), task, private_seed=3)["weight"][SKETCH] for _ in range(2)]
    assert torch.equal(*again)
    assert not close(again[0], measured(nn.Linear(6, 2), task, private_seed=4)["weight"][SKETCH])


def test_the_run_seed_tells_nothing_of_the_mixing() -> None:
    task = task_of(inputs(9, 6))
    one, two = (measured(nn.Linear(6, 2), task, seed=seed)["weight"] for seed in (0, 1))
    assert torch.equal(one[SKETCH], two[SKETCH])


def test_rows_that_are_mixed_in_pieces_give_the_same_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    task = task_of(inputs(40, 5, 6))
    whole = measured(nn.Linear(6, 2), task)["weight"][SKETCH]
    monkeypatch.setattr(sketches, "MIXED_AT_A_TIME", 6 * 7)
    assert close(measured(nn.Linear(6, 2), task)["weight"][SKETCH], whole)


def test_other_statistics_are_what_they_are_without_sketches() -> None:
    model, task = nn.Linear(6, 2), task_of(inputs(30, 6))
    alone = measured(model, task, Statistic.INPUT_GRAM, Statistic.FISHER)
    every = measured(model, task, *(set(Statistic) - {Statistic.SECOND_MOMENT}))
    assert set(every["weight"]) == {"input_gram", "fisher", "sketch", "residual"}
    for layer, found in alone.items():
        for name, values in found.items():
            assert torch.equal(values, every[layer][name])
    assert set(measured(model, task, RESIDUAL)["weight"]) == {"residual"}


def test_the_model_is_left_as_it_was_also_when_the_loss_fails() -> None:
    def loss(model, batch):
        model(batch[0])
        raise ZeroDivisionError

    model = nn.Linear(3, 2).train()
    before = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        measured(model, task_of(inputs(4, 3), loss))
    assert (len(model._forward_pre_hooks), model.training, model.weight.grad) == (0, True, None)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_that_are_not_finite_are_refused_by_name() -> None:
    with pytest.raises(NonFinite, match="task 'rows', layer 'weight'"):
        measured(nn.Linear(3, 2), task_of(inputs(4, 3) * torch.inf))


@pytest.mark.parametrize("shape", [(3, 1), (4, 5), (4,)])
def test_directions_that_do_not_fit_their_layer_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeMismatch, match="layer 'weight': protected directions"):
        measured(nn.Linear(4, 2), task_of(inputs(4, 4)), bases={"weight": torch.ones(shape)})


def test_directions_of_layers_that_are_not_measured_are_passed_over() -> None:
    assert measured(nn.Linear(4, 2), task_of(inputs(4, 4)), bases={"head": torch.ones(9, 1)})["weight"]


@pytest.mark.parametrize("option", [{"width": 0.0}, {"width": 8.1}, {"distribution": "cauchy"}])
def test_a_sketch_that_nobody_may_ask_for_is_refused(option: Mapping[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        SketchSpec.model_validate(option)


def test_two_sites_and_the_server_protect_what_all_their_rows_together_need() -> None:
    """GPSE from end to end: the sum of two sites' sketches finds the span of both."""
    span = basis(12, 4, seed=8)
    rows = inputs(80, 4, seed=2) @ span.T
    model, rule = nn.Linear(12, 3), Fot(eps=0.9999)
    parts = [
        measured(model, task_of(part), private_seed=i)["weight"] for i, part in enumerate(rows.split(50))
    ]
    told = {SKETCH: parts[0][SKETCH] + parts[1][SKETCH], RESIDUAL: torch.ones(1)}
    layer = Base.from_model(model).merged_layers["weight"]
    state = rule.init(layer).seeing(rule.sample(Context(statistics=told)), rule.eps, rule.squared)
    found = rule.shown(state).double()
    assert found.shape == (12, 4)
    assert torch.linalg.svdvals(found.T @ span.double()).min() > 1 - 1e-6
    after = measured(model, task_of(rows), bases={"weight": rule.shown(state)})["weight"]
    assert after[RESIDUAL].item() < 1e-5
