"""Does MIGU keep the gradients of the units with the largest outputs, and of no others?"""

import pytest
import torch
from option_run import run_of, stepped
from torch import nn
from torch.utils.data import TensorDataset

from fedmerge.client.options.migu import LargestUnits
from fedmerge.client.tasks import Task, TrainingConfig
from fedmerge.client.training import fine_tune
from fedmerge.common.training import LocalTraining, Migu


class Conv1D(nn.Module):
    """Named and stored as Hugging Face's: a linear layer with weights (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]]))
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, x):
        return x @ self.weight + self.bias


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight))
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
        layer.bias.zero_()
    return layer


def masked(model, quantile, *batches):
    """Gradients of the sum of outputs over these batches, as the option leaves them."""
    option = LargestUnits(run_of(model), Migu(quantile=quantile))
    with option:
        for batch in batches:
            model(batch).sum().backward()
        option.after_backward()
        option.after_step()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_rows_of_the_largest_units_keep_their_gradients():
    """Sums of magnitudes over two rows: 3, 1, 5 and 2; their median is 2.5."""
    found = masked(linear([[3.0, 0], [1, 0], [-5, 0], [2, 0]]), 0.5, torch.tensor([[0.5, 1], [-0.5, 1]]))
    assert found["bias"].tolist() == [2, 0, 2, 0]
    assert found["weight"].tolist() == [[0, 2], [0, 0], [0, 2], [0, 0]]


def test_magnitudes_are_summed_over_the_batches_of_a_step_and_over_all_rows():
    """Units 0 and 1, 5 and 1, 0 and 1: sums 5 and 3. The first or last alone would choose the other unit."""
    one, other = torch.tensor([[[1.0, 0]]]), torch.tensor([[[0.0, 1]]])
    found = masked(linear([[0.0, 5], [1, 1]]), 0.9, one, other, one)
    assert found["bias"].tolist() == [3, 0]


def test_sums_begin_anew_with_every_step():
    model = linear([[100.0, 1], [0, 2]])
    option = LargestUnits(run_of(model), Migu(quantile=0.5))
    inputs = torch.tensor([[[1.0, 0]], [[0.0, 1]]])
    seen = stepped(option, lambda step: model(inputs[step]).sum(), 2, torch.optim.SGD, lr=0.1)
    assert seen[0]["bias"].tolist() == pytest.approx([-0.1, 0])
    assert seen[1]["bias"].tolist() == pytest.approx([-0.1, -0.1])


@pytest.mark.parametrize(
    ("weight", "quantile", "kept"),
    [
        ([[2.0], [2.0], [2.0]], 0.7, [1, 1, 1]),
        ([[0.0], [0.0]], 0.7, [1, 1]),
        ([[3.0], [1.0], [1.0]], 0.5, [1, 1, 1]),
        ([[3.0], [2.0], [1.0]], 0.5, [1, 1, 0]),
        ([[3.0], [2.0], [1.0]], 0.99, [1, 0, 0]),
        ([[3.0], [2.0], [1.0]], 0.0, [1, 1, 1]),
        ([[7.0]], 0.9, [1]),
    ],
    ids=["equal", "zero", "tied at the quantile", "at the quantile", "one at least", "all", "one unit"],
)
def test_ties_are_treated_alike_and_one_unit_at_least_is_trained(weight, quantile, kept):
    assert masked(linear(weight), quantile, torch.ones(1, 1))["bias"].tolist() == kept


@pytest.mark.parametrize("batched", [True, False])
def test_units_of_a_convolution_are_its_channels(batched):
    model = nn.Conv2d(1, 2, 3, padding=1)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.full((1, 3, 3), 0.1), torch.full((1, 3, 3), -0.5)]))
        model.bias.zero_()
    image = torch.ones(1, 5, 5)
    found = masked(model, 0.9, image[None] if batched else image)
    assert found["bias"].tolist() == [0, 25]
    assert not found["weight"][0].any()
    assert found["weight"][1].all()


def test_units_of_a_layer_stored_the_other_way_are_its_columns():
    found = masked(Conv1D(), 0.6, torch.tensor([[1.0, 1]]))
    assert found["bias"].tolist() == [0, 0, 1, 1]
    assert found["weight"].tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]


def test_other_layers_and_passes_without_gradients_are_left_alone():
    model = nn.Sequential(nn.LayerNorm(2), linear([[1.0, 0], [0, 0.5]]))
    option = LargestUnits(run_of(model), Migu(quantile=0.9))
    with option:
        with torch.no_grad():
            model(torch.tensor([[-50.0, 50]] * 100))
        (model[1](torch.tensor([[1.0, 10.0]])) + model[0](torch.tensor([[1.0, 3.0]]))).sum().backward()
        option.after_backward()
    assert model[1].bias.grad.tolist() == [0, 1]
    assert model[0].bias.grad.tolist() == [1, 1]


def test_bias_over_a_frozen_weight_is_masked_and_a_frozen_layer_costs_nothing():
    layer, frozen = linear([[1.0], [2]]), linear([[1.0], [2]]).requires_grad_(False)
    layer.weight.requires_grad_(False)
    option = LargestUnits(run_of(nn.Sequential(layer)), Migu(quantile=0.9))
    with option:
        layer(torch.ones(1, 1)).sum().backward()
        option.after_backward()
    assert layer.bias.grad.tolist() == [0, 1]
    with LargestUnits(run_of(frozen), Migu()):
        assert not frozen._forward_hooks


def test_hooks_are_gone_after_a_run_that_fails():
    model = linear([[1.0], [2]])
    with pytest.raises(ZeroDivisionError), LargestUnits(run_of(model), Migu()):
        raise ZeroDivisionError
    assert not model._forward_hooks


@pytest.mark.parametrize("others", [(), ("tangent",), ("lora",), ("coso",)])
def test_whole_run_moves_the_largest_units_only(others):
    """Without momentum from units chosen before; the third unit is silent at every step."""
    model = nn.Sequential(linear([[1.0, 2], [3, 1], [0, 0.0]]), linear([[1.0, 1, 1]]))
    rows = TensorDataset(torch.rand(20, 2, generator=torch.Generator().manual_seed(0)) + 1)
    base = {name: p.detach().clone() for name, p in model.named_parameters()}
    task = Task("sum", rows, rows, lambda m, b: m(b[0]).square().mean(), lambda m, b: b[0])
    config = TrainingConfig(steps=4, batch_size=5, learning_rate=1e-3)
    training = LocalTraining.chosen([*others, "migu"], {"migu": {"quantile": 0.5}})
    fine_tune(model, task, config, seed=0, training=training, base=base)
    assert torch.equal(model[0].bias[2], base["0.bias"][2])
    if "lora" not in others:
        assert torch.equal(model[0].weight[2], base["0.weight"][2])
        assert not torch.equal(model[0].weight[1], base["0.weight"][1])
