"""Is the loss taken where the draw says, with the right gradient, and are the weights then what they were?"""

from collections import Counter

import pytest
import torch
from small_tasks import CONFIG, hits, loss, network, run_of, same, task, weights
from torch import nn

from fedmerge.client.options.lora import LowRankAdaptation
from fedmerge.client.options.perturb import Perturbation
from fedmerge.client.training import fine_tune, score
from fedmerge.common.training import LocalTraining, Lora, Perturb


class Quadratic(nn.Module):
    """``theta^T H theta / 2 + g^T theta`` in float64."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        root = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        self.curvature, self.slope = root @ root.T, torch.randn(3, generator=generator, dtype=torch.float64)
        self.theta = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))

    def at(self, theta):
        return theta @ self.curvature @ theta / 2 + self.slope @ theta

    def forward(self):
        return self.at(self.theta)


def moved_quadratic(**settings) -> tuple[Quadratic, Perturbation, torch.Tensor]:
    """A model away from its start, the option and the displacement."""
    model = Quadratic()
    option = Perturbation(run_of(model), Perturb(**settings))
    with torch.no_grad():
        model.theta.add_(torch.tensor([0.3, -1.0, 0.7]))
    return model, option, (model.theta - option.run.start["theta"]).detach()


def loss_by_shift(model: Quadratic, option: Perturbation, draws: int = 40) -> dict[float, float]:
    found = {}
    for option.run.step in range(draws):
        with option.perturbed():
            value = float(model().detach())
        found[option.shift] = value
    return found


def test_loss_is_that_of_the_three_places():
    model, option, moved = moved_quadratic(epsilon=0.25)
    theta = model.theta.detach()
    found = loss_by_shift(model, option)
    assert sorted(found) == [-0.25, 0.0, 0.25]
    for shift, value in found.items():
        assert value == pytest.approx(float(model.at(theta + shift * moved)), rel=1e-14)


@pytest.mark.parametrize("unperturbed", [1 / 3, 0.6])
def test_expected_loss_of_a_quadratic_adds_its_curvature_along_the_task_vector(unperturbed):
    model, option, moved = moved_quadratic(epsilon=0.5, unperturbed=unperturbed)
    found, share = loss_by_shift(model, option, 100), (1 - unperturbed) / 2
    expected = unperturbed * found[0.0] + share * (found[0.5] + found[-0.5])
    penalty = (1 - unperturbed) * 0.5**2 / 2 * float(moved @ model.curvature @ moved)
    assert expected == pytest.approx(float(model().detach()) + penalty, rel=1e-13)
    assert penalty > 0.01


@pytest.mark.parametrize("unperturbed", [0.0, 1 / 3, 0.8])
def test_places_are_drawn_with_their_probabilities(unperturbed):
    _, option, _ = moved_quadratic(unperturbed=unperturbed)
    drawn, draws = Counter(), 4000
    for option.run.step in range(draws):
        with option.perturbed():
            drawn[option.shift] += 1
    for shift, wanted in ((0.0, unperturbed), (0.5, (1 - unperturbed) / 2), (-0.5, (1 - unperturbed) / 2)):
        assert drawn[shift] / draws == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / draws) ** 0.5)


def test_gradient_is_that_of_the_perturbed_loss_as_a_function_of_the_weights():
    model, option, _ = moved_quadratic()
    seen = set()
    for option.run.step in range(20):
        model.theta.grad = None
        with option.perturbed():
            model().backward()
        option.after_backward()
        theta = model.theta.detach().clone().requires_grad_()
        reference = model.at(theta + option.shift * (theta - option.run.start["theta"]))
        torch.testing.assert_close(model.theta.grad, torch.autograd.grad(reference, theta)[0])
        seen.add(option.shift)
    assert len(seen) == 3


def test_batches_of_a_step_share_the_draw_and_weights_keep_their_bits():
    model, option, _ = moved_quadratic()
    before, shifts = weights(model), []
    for option.run.step in range(12):
        for _ in range(3):
            with option.perturbed():
                model().backward()
            shifts.append(option.shift)
            assert same(before, weights(model))
    assert shifts[::3] == shifts[1::3] == shifts[2::3]
    assert len(set(shifts)) == 3


def test_weights_keep_their_bits_also_when_the_loss_raises():
    model = nn.Linear(100, 100)
    option = Perturbation(run_of(model), Perturb(unperturbed=0.0))
    nn.init.normal_(model.weight, std=1e-4)  # far from the start: adding and subtracting would lose bits
    before = weights(model)

    def breaks():
        with option.perturbed():
            assert not same(before, weights(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert same(before, weights(model))


def test_adapters_and_merged_weights_are_perturbed_to_the_same_loss():
    batch = (torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 2)
    plain = network()
    dense = Perturbation(run_of(plain), Perturb(unperturbed=0.0))
    model = network()
    run = run_of(model)
    with LowRankAdaptation(run, Lora(rank=2, full="*.bias")):
        with torch.no_grad():
            for parameter in run.trained.values():
                parameter.add_(torch.randn(parameter.shape, generator=run.generator), alpha=0.3)
            for name, parameter in run.whole.items():
                plain.get_parameter(name).copy_(parameter)
            for name, adapter in run.adapters.items():
                left_MR, right_RN = adapter.factors()
                plain.get_parameter(name).add_(left_MR @ right_RN)
        low_rank = Perturbation(run, Perturb(unperturbed=0.0))
        run.generator, dense.run.generator = (torch.Generator().manual_seed(9) for _ in range(2))
        losses = []
        for run.step in range(8):
            dense.run.step = run.step
            with low_rank.perturbed(), dense.perturbed():
                assert low_rank.shift == dense.shift
                torch.testing.assert_close(loss(model, batch), loss(plain, batch))
                losses.append(float(loss(plain, batch).detach()))
        assert len({round(value, 5) for value in losses}) == 2


def test_gradient_of_the_factors_is_that_of_the_perturbed_loss():
    run = run_of(network())
    batch = (torch.randn(6, 4), torch.arange(6) % 2)
    with LowRankAdaptation(run, Lora(rank=2, targets="3.weight")):
        option = Perturbation(run, Perturb(unperturbed=0.0))
        inner, outer = run.trained.values()
        nn.init.normal_(outer)
        with option.perturbed():
            loss(run.model, batch).backward()
        option.after_backward()
        hidden = run.model[2](run.model[0](batch[0]))
        product = (1 + option.shift) * outer @ inner
        reference = nn.functional.cross_entropy(
            run.model[3].base_layer(hidden) + hidden @ product.T, batch[1]
        )
        wanted = torch.autograd.grad(reference, (inner, outer))
        torch.testing.assert_close((inner.grad, outer.grad), wanted)


@pytest.mark.parametrize("names", [["perturb"], ["lora", "perturb"]])
def test_perturbed_training_learns_the_task_and_repeats_bit_for_bit(names):
    models = [network(), network()]
    for model in models:
        fine_tune(model, task(), CONFIG, 0, training=LocalTraining.chosen(names))
    assert same(weights(models[0]), weights(models[1]))
    assert score(models[0], task(metric=hits)).accuracy > 0.9
