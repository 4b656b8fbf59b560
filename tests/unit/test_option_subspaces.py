"""Do the options osft and project keep every step within their subspace?"""

from copy import deepcopy

import pytest
import torch
from option_run import MATRICES, Shapes, noisy_loss, run_of, stepped
from torch import nn
from torch.utils.data import TensorDataset

from fedmerge.client.options.osft import SmallDirections, largest
from fedmerge.client.options.project import ProtectedInputs
from fedmerge.client.tasks import Task, TrainingConfig
from fedmerge.client.training import fine_tune
from fedmerge.common.errors import ConfigError, ShapeMismatch
from fedmerge.common.training import LocalTraining, Osft, Project

DECAYED = {"lr": 0.02, "weight_decay": 0.3}


def bases(model: nn.Module, columns: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    random = {
        name: torch.randn(p.flatten(1).shape[1], columns, generator=generator)
        for name, p in model.named_parameters()
        if name in MATRICES
    }
    return {name: torch.linalg.qr(columns).Q for name, columns in random.items()}


def task() -> Task:
    generator = torch.Generator().manual_seed(4)
    rows = TensorDataset(*(torch.randn(shape, generator=generator) for shape in ((30, 2, 5, 5), (30, 20))))
    return Task("noise", rows, rows, lambda m, b: (m(b[0]) - b[1]).square().mean(), lambda m, b: b[0])


def test_projected_steps_are_orthogonal_to_protected_inputs_at_every_step():
    model = Shapes()
    protected = bases(model)
    run = run_of(model, bases=protected)
    for weights in stepped(ProtectedInputs(run, Project()), noisy_loss(model), 12, **DECAYED):
        for name, basis in protected.items():
            moved = (weights[name] - run.start[name]).flatten(1)
            assert float((moved @ basis).abs().max()) < 5e-7
            assert float(moved.norm()) > 0.01


@pytest.mark.parametrize("kind", ["osft", "project"])
def test_moments_of_the_optimizer_see_the_gradient_within_the_subspace_only(kind):
    model = Shapes()
    protected = bases(model)
    run = run_of(model, bases=protected)
    option = ProtectedInputs(run, Project()) if kind == "project" else SmallDirections(run, Osft())
    with option:
        noisy_loss(model)(0).backward()
        option.after_backward()
    for name, basis in protected.items():
        gradient = model.get_parameter(name).grad.flatten(1)
        sides = largest(run.start[name].flatten(1), 0.5) if kind == "osft" else (gradient[:, :0], basis)
        left, right = (side.float() for side in sides)
        assert float(gradient.norm()) > 1e-3
        assert float((gradient @ right).norm() + (left.T @ gradient).norm()) < 1e-6


def test_projection_keeps_what_a_layer_makes_of_protected_inputs():
    model = Shapes()
    protected = bases(model)
    fine_tune(
        model,
        task(),
        TrainingConfig(steps=15, learning_rate=0.02, weight_decay=0.3),
        seed=0,
        training=LocalTraining.chosen(["project"]),
        bases=protected,
    )
    before = Shapes()
    inputs = protected["3.weight"].T
    torch.testing.assert_close(inputs @ model[3].weight.T, inputs @ before[3].weight.T, atol=1e-6, rtol=0)
    assert float((model[3].weight - before[3].weight).detach().norm()) > 0.01


def test_basis_that_was_rounded_on_its_way_still_protects():
    model = Shapes()
    rounded = {name: basis.bfloat16() for name, basis in bases(model).items()}
    run = run_of(model, bases=rounded)
    for weights in stepped(ProtectedInputs(run, Project()), noisy_loss(model), 5, **DECAYED):
        for name, basis in rounded.items():
            moved = (weights[name] - run.start[name]).flatten(1)
            assert float((moved @ basis.float()).abs().max()) < 5e-7


def test_without_bases_projection_is_plain_training():
    plain, projected = Shapes(), Shapes()
    config = TrainingConfig(steps=3, learning_rate=0.02)
    fine_tune(plain, task(), config, seed=0)
    fine_tune(projected, task(), config, seed=0, training=LocalTraining.chosen(["project"]))
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), projected.parameters(), strict=True))


@pytest.mark.parametrize("shape", [(11, 2), (12, 13), (12,)])
def test_basis_that_does_not_fit_is_refused(shape):
    run = run_of(Shapes(), bases={"3.weight": torch.zeros(shape)})
    with pytest.raises(ShapeMismatch, match=r"layer '3.weight'.*wanted \(12, at most 12\)"):
        ProtectedInputs(run, Project()).__enter__()


@pytest.mark.parametrize("frozen", [0.25, 0.5, 0.9])
def test_largest_singular_directions_are_never_touched(frozen):
    model = Shapes()
    run = run_of(model)
    seen = stepped(SmallDirections(run, Osft(frozen=frozen)), noisy_loss(model), 12, **DECAYED)
    for name in MATRICES:
        start = run.start[name].flatten(1).double()
        left, _, right = torch.linalg.svd(start, full_matrices=False)
        kept = int(frozen * min(start.shape))
        left, right = left[:, :kept], right[:kept].T
        for weights in seen:
            now = weights[name].flatten(1).double()
            torch.testing.assert_close(left.T @ now, left.T @ start, atol=5e-7, rtol=0)
            torch.testing.assert_close(now @ right, start @ right, atol=5e-7, rtol=0)
            assert float((now - start).norm()) > 1e-3


def test_parameters_that_are_no_matrices_train_freely():
    """A step of AdamW from rest moves every element by the learning rate."""
    for kind, config in ((SmallDirections, Osft()), (ProtectedInputs, Project())):
        model = Shapes()
        run = run_of(model, bases=bases(model))
        (weights,) = stepped(kind(run, config), noisy_loss(model), 1, lr=0.02, weight_decay=0.0)
        moved = (weights["4.bias"] - run.start["4.bias"]).abs()
        torch.testing.assert_close(moved, torch.full((20,), 0.02), atol=1e-5, rtol=0)


def test_trained_part_reaches_the_best_weights_of_its_set():
    """Least squares over the core alone has the solution that the two complements give."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False)
    start, target = model.weight.detach().clone(), torch.randn(4, 6)
    left, right = largest(start, 0.5)
    core = left.new_zeros(4, 4) + torch.eye(4) - left @ left.T
    best = start + core @ (target - start).double() @ (torch.eye(6) - right @ right.T)
    loss = lambda step: (model.weight - target).square().sum()  # noqa: E731
    option = SmallDirections(run_of(model), Osft(frozen=0.5))
    last = stepped(option, loss, 200, torch.optim.SGD, lr=0.1)[-1]
    torch.testing.assert_close(last["weight"].double(), best, atol=1e-5, rtol=0)
    assert left.shape[1] == right.shape[1] == 2


def test_frozen_share_is_rounded_down_and_leaves_rounding_out():
    assert largest(torch.diag(torch.arange(1.0, 101)), 0.29)[0].shape == (100, 29)
    assert largest(torch.ones(1, 7), 0.99)[0].shape == (1, 0)
    assert largest(torch.ones(4, 7), 0.75)[0].shape == (4, 1)
    assert largest(torch.zeros(4, 7), 0.75)[1].shape == (7, 0)


def test_frozen_directions_hold_through_a_whole_run():
    model, before = Shapes(), Shapes()
    config = TrainingConfig(steps=15, learning_rate=0.02, weight_decay=0.3)
    fine_tune(model, task(), config, seed=0, training=LocalTraining.chosen(["osft"]))
    left, right = (side.float() for side in largest(before[4].weight.detach(), 0.5))
    moved = (model[4].weight - before[4].weight).detach()
    assert float((left.T @ moved).abs().max()) < 1e-6
    assert float((moved @ right).abs().max()) < 1e-6
    assert float(moved.norm()) > 0.01


@pytest.mark.parametrize("option", ["tangent", "osft", "coso", "project"])
def test_options_for_whole_weights_are_refused_beside_adapters(option):
    with pytest.raises(ConfigError, match=f"{option} trains whole weights and lora does not"):
        LocalTraining.chosen(["lora", option])


@pytest.mark.parametrize("option", ["osft", "coso"])
def test_a_tasks_own_head_trains_freely(option):
    settings = {"osft": {"frozen": 0.9}, "coso": {"rank": 1}}[option]
    training = LocalTraining.chosen([option], {option: settings})
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(50, 12), nn.ReLU(), nn.Linear(12, 20))
    changes = {}
    for private in ((), ("3.*",)):
        copy = deepcopy(model)
        config = TrainingConfig(steps=2, batch_size=4, learning_rate=0.01)
        fine_tune(copy, task(), config, seed=0, device="cpu", training=training, private=private)
        changes[private] = copy[3].weight.detach() - model[3].weight.detach()
    rank = {private: int(torch.linalg.matrix_rank(moved, atol=1e-4)) for private, moved in changes.items()}
    assert rank[()] <= 2 < rank["3.*",]
