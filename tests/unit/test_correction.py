"""Does a correction bring one projection's output back to what it was, and touch nothing else?"""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmerge.client.correction import correct
from fedmerge.client.site import Site
from fedmerge.client.tasks import Stream, Task
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError, NonFinite
from fedmerge.common.taskvector import Dense, Manifest, TaskVector
from fedmerge.common.training import Correction


def task(width: int = 3, rows: int = 40) -> Task:
    inputs = torch.randn(rows, width, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(inputs, torch.arange(rows) % 2)
    return Task(
        "noise",
        data,
        data,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
    )


class Network(nn.Module):
    """``unused`` never runs; ``late`` runs last, though it comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(4, 2)
        self.early = nn.Linear(3, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.late(torch.tanh(self.early(x)))


LAYERS = ("early.weight", "late.weight", "unused.weight")


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def corrected(settings: Correction, **changes):
    given = {
        "model": network(),
        "task": task(),
        "merged": weights(network(1)),
        "previous": weights(network(2)),
        "layers": LAYERS,
        "seed": 0,
    } | changes
    return correct(settings=settings, **given)


def test_one_step_moves_every_weight_of_a_linear_layer_against_its_gradient():
    """AdamW's first step from rest: the learning rate against the sign of ``(W - W_previous) x x^T``."""
    model = nn.Linear(3, 2)
    merged, previous = weights(nn.Linear(3, 2)), weights(nn.Linear(3, 2))
    previous["bias"] = merged["bias"]
    settings = Correction(loss="mse", learning_rate=1e-3, batch_size=100)
    changes, report = corrected(settings, model=model, merged=merged, previous=previous, layers=["weight"])
    inputs = task().train.tensors[0]
    gradient = (merged["weight"] - previous["weight"]) @ inputs.T @ inputs
    torch.testing.assert_close(changes["weight"], -1e-3 * gradient.sign(), atol=1e-7, rtol=0)
    wanted = ((merged["weight"] - previous["weight"]) @ inputs.T).square().mean()
    assert report.first_loss == report.final_loss == pytest.approx(float(wanted))
    assert (report.layers, report.steps, report.examples) == (("weight",), 1, 40)


@pytest.mark.parametrize("loss", ["l1", "mse"])
def test_representation_comes_closer_to_the_previous_one(loss):
    settings = Correction(loss=loss, learning_rate=0.01, epochs=20, batch_size=10)
    changes, report = corrected(settings)
    assert report.steps == 80
    assert report.final_loss < 0.7 * report.first_loss
    assert changes["late.weight"].dtype is torch.float32


def test_only_the_last_layer_that_runs_is_fitted_and_the_model_is_left_alone():
    model = network().train()
    before = weights(model)
    changes, _ = corrected(Correction(learning_rate=0.01), model=model)
    assert list(changes) == ["late.weight"]
    assert changes["late.weight"].any()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_change_makes_a_task_vector():
    changes, _ = corrected(Correction(learning_rate=0.01))
    assert TaskVector.of(changes).names == ("late.weight",)


@pytest.mark.parametrize(
    ("patterns", "layers", "expected"),
    [
        ("early.*", LAYERS, ["early.weight"]),
        ("*", LAYERS, ["late.weight", "early.weight"]),
        ("", ("early.weight", "unused.weight"), ["early.weight"]),
    ],
)
def test_layers_are_chosen_by_pattern_among_those_that_may_change(patterns, layers, expected):
    changes, _ = corrected(Correction(layers=patterns, learning_rate=0.01), layers=layers)
    assert list(changes) == expected


@pytest.mark.parametrize("patterns", ["unused.*", "nothing"])
def test_layer_that_does_not_run_is_refused(patterns):
    with pytest.raises(ConfigError, match="task 'noise': no layer to correct"):
        corrected(Correction(layers=patterns))


def test_rate_of_zero_and_equal_models_change_nothing():
    still, report = corrected(Correction(learning_rate=0.0))
    assert not still["late.weight"].any()
    assert report.first_loss > 0
    same, report = corrected(Correction(learning_rate=0.1), previous=weights(network(1)))
    assert not same["late.weight"].any()
    assert report.first_loss == 0


def test_weights_that_are_not_given_are_the_models_own():
    """Both copies have the model's private bias, which the loss would see."""
    merged = {name: tensor for name, tensor in weights(network(1)).items() if name != "late.bias"}
    _, report = corrected(Correction(), merged=merged, previous=dict(merged))
    assert report.first_loss == 0


def test_linearised_models_are_compared_linearised():
    """With no hidden curvature at the base, the representation is affine in both layers."""
    base = weights(network())
    merged, previous = weights(network(1)), weights(network(2))
    settings = Correction(loss="mse", batch_size=100)
    _, report = corrected(settings, base=base)
    inputs = task().train.tensors[0]
    outputs = []
    for model in (merged, previous):
        call = lambda p: torch.func.functional_call(network(), p, (inputs,))  # noqa: E731
        change = {name: model[name] - base[name] for name in base}
        outputs.append(torch.func.jvp(call, (base,), (change,))[1])
    assert report.first_loss == pytest.approx(float((outputs[0] - outputs[1]).square().mean()), rel=1e-5)
    _, plain = corrected(settings)
    assert plain.first_loss != pytest.approx(report.first_loss, rel=1e-3)


def test_linearised_correction_falls_too():
    settings = Correction(learning_rate=0.01, epochs=20, batch_size=10)
    _, report = corrected(settings, base=weights(network()))
    assert report.final_loss < 0.9 * report.first_loss


def test_dropout_is_no_difference_between_models():
    model = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.9), nn.Linear(20, 2))
    _, report = corrected(
        Correction(),
        model=model,
        merged=weights(model),
        previous=weights(model),
        layers=["2.weight"],
        task=task(rows=8),
    )
    assert report.first_loss == 0


def test_module_with_several_outputs_is_compared_by_the_first():
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(3, 1, batch_first=True)

        def forward(self, x):
            return self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0]

    models = [Attending() for _ in range(2)]
    changes, report = corrected(
        Correction(learning_rate=0.01, epochs=10, batch_size=20),
        model=models[0],
        merged=weights(models[0]),
        previous=weights(models[1]),
        layers=["attention.in_proj_weight"],
    )
    assert list(changes) == ["attention.in_proj_weight"]
    assert report.final_loss < report.first_loss


def test_same_seed_gives_same_bits():
    settings = Correction(learning_rate=0.01, batch_size=7)
    first, second, other = (corrected(settings, seed=seed)[0]["late.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_task_without_examples_and_weights_that_are_not_finite_are_refused():
    with pytest.raises(ConfigError, match="no training examples"):
        corrected(Correction(), task=task(rows=0))
    broken = {name: tensor * torch.nan for name, tensor in weights(network()).items()}
    with pytest.raises(NonFinite, match="a representation is not finite"):
        corrected(Correction(), merged=broken)


def test_a_site_corrects_with_the_private_layers_that_the_task_was_learned_with():
    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))

    rows = TensorDataset(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(8, 2))
    task = Task("t", rows, rows, lambda m, b: (m(b[0]) - b[1]).square().mean(), lambda m, b: b[1])
    stream = Stream("s", ("t",), lambda _: task, build, private=("0.*",))
    site = Site(stream, build(), Base.from_model(build(), stream.private))
    merged = TaskVector.of({"1.weight": Dense(torch.ones(2, 4))}, ["1.bias"], Manifest(site.base.fingerprint))
    none = TaskVector.of({}, ["1.weight", "1.bias"], Manifest(site.base.fingerprint))
    blind = {"0.weight": torch.zeros(4, 3), "0.bias": torch.zeros(4)}
    settings = Correction(layers="1.weight")
    losses = [
        site.correct(
            task, merged, none, settings, seed=0, site="a", origin_version=1, device="cpu", heads=heads
        )[1].first_loss
        for heads in ({}, blind)
    ]
    assert losses[0] > 0 == losses[1]
