"""Do CoSO's steps follow the definition, and stay off what earlier tasks have used?"""

import pytest
import torch
from option_run import MATRICES, Shapes, noisy_loss, run_of, stepped
from torch import nn
from torch.utils.data import TensorDataset

from fedmerge.client.options.coso import GradientSubspaces, subspace
from fedmerge.client.options.sketch import FrequentDirections
from fedmerge.client.tasks import Task, TrainingConfig
from fedmerge.client.training import fine_tune
from fedmerge.common.errors import ShapeMismatch
from fedmerge.common.training import Coso, LocalTraining

RATE, BETAS, EPS = 0.05, (0.9, 0.999), 1e-8


def gradients(steps: int, rows: int = 6, columns: int = 9) -> torch.Tensor:
    return torch.randn(steps, rows, columns, generator=torch.Generator().manual_seed(1))


def history(columns: int, rows: int = 6) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))).Q


def by_hand(start, steps, rank, every, known):
    """The definition in float64, written out; the weights after each step."""
    weight, seen, first, second, basis = start.double(), [], None, None, None
    known = torch.linalg.qr(known.double()).Q
    for t, gradient in enumerate(steps.double()):
        if t % every == 0:
            before = basis
            free = gradient - known @ known.T @ gradient
            basis = torch.linalg.svd(free).U[:, :rank]
            if before is not None:
                turn = basis.T @ before
                first, second = turn @ first, turn.square() @ second
        inside = basis.T @ gradient
        first = (1 - BETAS[0]) * inside + (BETAS[0] * first if first is not None else 0)
        second = (1 - BETAS[1]) * inside**2 + (BETAS[1] * second if second is not None else 0)
        adam = first / (1 - BETAS[0] ** (t + 1)) / ((second / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS)
        weight = weight - RATE * basis @ adam
        seen.append(weight)
    return seen


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(9, 6, bias=False)


@pytest.mark.parametrize(("every", "columns"), [(1, 0), (1, 2), (2, 2), (3, 3)])
def test_steps_are_those_of_the_definition(every, columns):
    model, given = linear(), gradients(4)
    run = run_of(model, memory={"coso/weight": history(columns)})
    option = GradientSubspaces(run, Coso(rank=3, every=every))
    seen = stepped(option, lambda t: (given[t] * model.weight).sum(), 4, lr=RATE, weight_decay=0.5)
    expected = by_hand(run.start["weight"], given, 3, every, history(columns))
    for weights, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(weights["weight"].double(), wanted, atol=1e-5, rtol=0)


def test_every_step_is_orthogonal_to_the_history():
    model = Shapes()
    memory = {f"coso/{name}": history(3, len(model.get_parameter(name))) for name in MATRICES}
    known = dict(memory)
    run = run_of(model, memory=memory)
    before = run.start
    for weights in stepped(GradientSubspaces(run, Coso(rank=2)), noisy_loss(model), 10, lr=0.02):
        for name in MATRICES:
            moved = (weights[name] - before[name]).flatten(1)
            assert float((known[f"coso/{name}"].T @ moved).abs().max()) < 5e-7
            assert int(torch.linalg.matrix_rank(moved, rtol=1e-3)) == min(2, len(moved) - 3)
        before = weights


def test_history_grows_by_orthonormal_directions_that_hold_the_task():
    model = Shapes()
    memory: dict[str, torch.Tensor] = {}
    for _ in range(2):
        known = dict(memory)
        run = run_of(model, memory=memory)
        last = stepped(GradientSubspaces(run, Coso(rank=2, energy=0.999)), noisy_loss(model), 2, lr=0.02)[-1]
        for name in MATRICES:
            kept = memory[f"coso/{name}"]
            assert kept.dtype is torch.float32
            torch.testing.assert_close(kept.T @ kept, torch.eye(kept.shape[1]), atol=1e-6, rtol=0)
            moved = (last[name] - run.start[name]).flatten(1)
            assert float((moved - kept @ (kept.T @ moved)).norm()) <= 0.1 * float(moved.norm())
            before = known.get(f"coso/{name}", kept[:, :0])
            assert kept.shape[1] > before.shape[1] or kept.shape[1] == kept.shape[0]
            torch.testing.assert_close(kept @ (kept.T @ before), before, atol=1e-6, rtol=0)
    assert memory["coso/0.weight"].shape == (4, 4)


def test_leading_direction_kept_is_that_of_the_summed_steps():
    """Of ``P R`` over two gradients that share a subspace, in which only the first has orthogonal rows."""
    model, given = linear(), gradients(2)
    run = run_of(model)
    option = GradientSubspaces(run, Coso(rank=3, every=2, energy=1e-6))
    stepped(option, lambda t: (given[t] * model.weight).sum(), 2, lr=RATE)
    basis = torch.linalg.svd(given[0].double()).U[:, :3]
    inside = basis @ basis.T @ torch.cat([*given.double()], dim=1)
    wanted = torch.linalg.svd(inside).U[:, :1]
    kept = run.memory["coso/weight"].double()
    torch.testing.assert_close(kept @ kept.T, wanted @ wanted.T, atol=1e-5, rtol=0)


def test_full_history_stops_the_layer():
    model, given = linear(), gradients(2)
    run = run_of(model, memory={"coso/weight": history(6)})
    seen = stepped(GradientSubspaces(run, Coso(rank=3)), lambda t: (given[t] * model.weight).sum(), 2, lr=1.0)
    assert torch.equal(seen[-1]["weight"], run.start["weight"])
    assert run.memory["coso/weight"].shape == (6, 6)


def test_gradient_mostly_within_the_history_is_not_followed_there():
    """A hundred thousand times as large within: what rounding the history leaves of it must not matter."""
    generator = torch.Generator().manual_seed(0)
    known, model = history(3), linear()
    given = 1e5 * known @ torch.randn(3, 9, generator=generator) + torch.randn(6, 9, generator=generator)
    run = run_of(model, memory={"coso/weight": known})
    (weights,) = stepped(
        GradientSubspaces(run, Coso(rank=2)), lambda t: (given * model.weight).sum(), 1, lr=RATE
    )
    moved = weights["weight"] - run.start["weight"]
    assert float((known.T @ moved).norm()) < 1e-5 * float(moved.norm())


def test_gradient_within_the_history_is_not_followed_into_its_rounding():
    known = history(3)
    inside = known @ torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    assert not subspace(inside, torch.linalg.qr(known.double()).Q, 3).any()


def test_run_that_fails_leaves_the_memory_alone():
    run = run_of(linear(), memory={"coso/weight": history(2)})
    kept = run.memory["coso/weight"]
    with pytest.raises(ZeroDivisionError):
        stepped(GradientSubspaces(run, Coso()), lambda t: run.model.weight.sum() / (1 // (1 - t)), 2, lr=1.0)
    assert run.memory["coso/weight"] is kept
    assert list(run.trained) == ["weight"]


def test_saved_state_goes_on_as_if_nothing_had_happened():
    given = gradients(4)

    def run_from(model, first, state=None, moments=None):
        option = GradientSubspaces(run_of(model), Coso(rank=3, every=2, sketch=4))
        with option:
            option.run.optimizer = torch.optim.AdamW(option.run.trained.values(), lr=RATE)
            if state is not None:
                option.load(state)
                option.run.optimizer.load_state_dict(moments)
            for t in range(first, 3 if state is None else 4):
                option.run.step = t
                option.run.optimizer.zero_grad()
                (given[t] * model.weight).sum().backward()
                option.after_backward()
                option.run.optimizer.step()
                option.after_step()
            saved = option.state(), option.run.optimizer.state_dict()
        return *saved, option.run.memory

    whole = linear()
    run = run_of(whole)
    stepped(
        GradientSubspaces(run, Coso(rank=3, every=2, sketch=4)),
        lambda t: (given[t] * whole.weight).sum(),
        4,
        lr=RATE,
    )
    parts = linear()
    state, moments, _ = run_from(parts, 0)
    *_, memory = run_from(parts, 3, state, moments)
    assert torch.equal(parts.weight, whole.weight)
    assert torch.equal(memory["coso/weight"], run.memory["coso/weight"])


@pytest.mark.parametrize("shape", [(5, 2), (6, 7), (6,)])
def test_history_that_does_not_fit_is_refused(shape):
    run = run_of(linear(), memory={"coso/weight": torch.zeros(shape)})
    with pytest.raises(ShapeMismatch, match="coso/weight: directions of earlier tasks"):
        GradientSubspaces(run, Coso()).__enter__()


def test_whole_runs_of_two_tasks_keep_their_steps_apart():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 10), nn.Tanh(), nn.Linear(10, 3))
    config = TrainingConfig(steps=6, batch_size=10, learning_rate=0.02, weight_decay=0.1)
    memory: dict[str, torch.Tensor] = {}
    moved = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        rows = TensorDataset(torch.randn(40, 8, generator=generator), torch.randn(40, 3, generator=generator))
        noise = Task("noise", rows, rows, lambda m, b: (m(b[0]) - b[1]).square().mean(), lambda m, b: b[0])
        before, known = model[0].weight.detach().clone(), memory.get("coso/0.weight")
        training = LocalTraining.chosen(["coso"], {"coso": {"rank": 2, "energy": 0.9}})
        report = fine_tune(model, noise, config, 0, training=training, memory=memory)
        moved.append(model[0].weight.detach() - before)
    assert report.trained == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert float((known.T @ moved[1]).abs().max()) < 1e-6
    assert float(moved[1].norm()) > 0.01


# --- the sketch ---


@pytest.mark.parametrize("limit", [3, 5, 8])
def test_sketch_is_below_the_sum_by_no_more_than_its_bound(limit):
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor([10.0, 6, 3, 1, 0.5, 0.3, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    blocks = [
        scales[:, None] * torch.randn(10, 4, generator=generator, dtype=torch.float64) for _ in range(9)
    ]
    sketch = FrequentDirections.empty(10, limit, torch.device("cpu"))
    for block in blocks:
        sketch = sketch.plus(block)
        assert sketch.columns_ML.shape[1] <= limit
    whole = torch.cat(blocks, dim=1)
    missing = torch.linalg.eigvalsh(whole @ whole.T - sketch.columns_ML @ sketch.columns_ML.T)
    values = torch.linalg.svdvals(whole)
    assert float(missing[0]) > -1e-9
    for kept in range(limit + 1):
        assert float(missing[-1]) <= float(values[kept:].square().sum()) / (limit + 1 - kept)
    assert float(missing[-1]) > 1e-3


def test_sketch_finds_what_comes_in_small_parts_after_something_larger():
    """Dropping the smaller of two directions each time would keep the first forever."""
    first, second = torch.eye(3)[:, :1], torch.eye(3)[:, 1:2]
    sketch = FrequentDirections.empty(3, 1, torch.device("cpu")).plus(1.1 * first)
    for _ in range(20):
        sketch = sketch.plus(second)
    torch.testing.assert_close(sketch.directions(0.9).abs().float(), second)


def test_sketch_as_wide_as_its_rows_loses_nothing():
    block = gradients(1, 5, 30)[0].double()
    sketch = FrequentDirections.empty(5, 100, torch.device("cpu"))
    for columns in block.split(7, dim=1):
        sketch = sketch.plus(columns)
    torch.testing.assert_close(sketch.columns_ML @ sketch.columns_ML.T, block @ block.T)


def test_directions_are_the_fewest_with_the_energy():
    """Squared lengths 16, 3 and 1: shares 0.8, 0.95 and 1."""
    sketch = FrequentDirections.empty(4, 4, torch.device("cpu")).plus(
        torch.eye(4)[:, :3] * torch.tensor([1, 3**0.5, 4])
    )
    assert [sketch.directions(share).shape[1] for share in (0.5, 0.79, 0.81, 0.94, 0.96, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        3,
    ]
    assert FrequentDirections.empty(4, 2, torch.device("cpu")).directions(0.9).shape == (4, 0)
    assert sketch.plus(torch.zeros(4, 2)).directions(1.0).shape == (4, 3)


def test_history_grows_with_the_last_run_of_a_task_alone():
    model, memory = nn.Linear(6, 4), {}
    rows = TensorDataset(torch.randn(12, 6), torch.randn(12, 4))
    task = Task("t", rows, rows, lambda m, b: (m(b[0]) - b[1]).square().mean(), lambda m, b: b[0])
    training = LocalTraining.chosen(["coso"], {"coso": {"rank": 1, "energy": 0.5}})
    config = TrainingConfig(steps=3, batch_size=4, learning_rate=0.01)
    for round in range(3):
        fine_tune(model, task, config, round, device="cpu", training=training, memory=memory, ends_task=False)
    assert memory == {}
    fine_tune(model, task, config, 3, device="cpu", training=training, memory=memory)
    assert 0 < memory["coso/weight"].shape[1] < 4
