"""Is FedProx's term added as defined, for weights and for adapters?"""

import pytest
import torch
from small_tasks import CONFIG, network, run_of, task
from torch import nn

from fedmerge.client.options.lora import LowRankAdaptation
from fedmerge.client.options.prox import Proximal
from fedmerge.client.training import fine_tune
from fedmerge.common.training import LocalTraining, Lora, Prox


def moved(parameters) -> None:
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in parameters:
            step, gradient = torch.randn(2, *parameter.shape, generator=generator).to(parameter)
            parameter.add_(step)
            parameter.grad = gradient


def test_gradient_is_that_of_the_loss_plus_half_mu_times_the_squared_distance():
    run = run_of(network().double())
    moved(run.trained.values())
    of_loss = {name: parameter.grad.clone() for name, parameter in run.trained.items()}
    Proximal(run, Prox(mu=0.3)).after_backward()

    distance = sum((p - run.start[name]).norm(2) ** 2 for name, p in run.trained.items())
    wanted = torch.autograd.grad(0.3 / 2 * distance, tuple(run.trained.values()))
    for (name, parameter), term in zip(run.trained.items(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, of_loss[name] + term)


def test_distance_of_an_adapted_layer_is_its_products_norm():
    run = run_of(network())
    with LowRankAdaptation(run, Lora(rank=2, alpha=3.0, full="*.bias")):
        moved(run.trained.values())
        of_loss = {name: parameter.grad.clone() for name, parameter in run.trained.items()}
        Proximal(run, Prox(mu=0.3)).after_backward()

        distance = sum((p - run.start[name]).norm(2) ** 2 for name, p in run.whole.items())
        for path in ("0", "3"):
            inner = run.trained[f"{path}.lora_A.fedmerge.weight"]
            outer = run.trained[f"{path}.lora_B.fedmerge.weight"]
            distance = distance + (3.0 / 2 * outer @ inner).norm(2) ** 2
        wanted = torch.autograd.grad(0.3 / 2 * distance, tuple(run.trained.values()))
        for (name, parameter), term in zip(run.trained.items(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, of_loss[name] + term)


def test_parameter_without_a_gradient_is_left_alone():
    run = run_of(network())
    Proximal(run, Prox(mu=1.0)).after_backward()
    assert all(parameter.grad is None for parameter in run.trained.values())


@pytest.mark.parametrize("names", [["prox"], ["lora", "prox"]])
def test_larger_mu_stays_nearer_to_the_start(names):
    def distance(mu: float) -> float:
        model, start = network(), nn.utils.parameters_to_vector(network().parameters())
        fine_tune(model, task(), CONFIG, 0, training=LocalTraining.chosen(names, {"prox": {"mu": mu}}))
        return float((nn.utils.parameters_to_vector(model.parameters()) - start).norm())

    assert distance(10.0) < distance(1.0) < distance(0.001)
