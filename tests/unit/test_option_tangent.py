"""Is a linearised model linear in its weights, exact at the base, and nothing else outside?"""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from option_run import run_of
from torch import nn
from torch.utils import _pytree
from torch.utils.data import TensorDataset

from fedmerge.client.linearised import linearised
from fedmerge.client.options.tangent import Linearisation
from fedmerge.client.site import Site
from fedmerge.client.tasks import Stream, Task, TrainingConfig
from fedmerge.client.training import fine_tune, score
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError
from fedmerge.common.training import LocalTraining, Tangent

Pair = namedtuple("Pair", "first second")


class Block(nn.Module):
    """Attention, a convolution, norms and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.heads = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.filter = nn.Conv1d(8, 4, 3, padding=1)
        self.batch = nn.BatchNorm1d(4)

    def forward(self, ids):
        x = self.tokens(ids)
        query, key, value = self.heads(self.norm(x)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        x = x + nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return torch.tanh(self.batch(self.filter(x.transpose(1, 2)))).mean(2)


def block() -> Block:
    torch.manual_seed(1)
    return Block().double()


def base_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(model: nn.Module, seed: int = 0, size: float = 0.1) -> dict[str, torch.Tensor]:
    """Random differences from the base."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: size * torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in model.named_parameters()
    }


@torch.no_grad()
def put(model, base, *changes):
    for name, parameter in model.named_parameters():
        parameter.copy_(base[name] + sum(change[name] for change in changes))


IDS = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]])


@pytest.mark.parametrize("training", [True, False])
def test_derivative_is_that_of_finite_differences(training):
    model = block().train(training)
    base, change = base_of(model), moved(model)
    plain = block().eval()
    put(plain, base, {name: 1e-5 * step for name, step in change.items()})
    above = plain(IDS)
    put(plain, base, {name: -1e-5 * step for name, step in change.items()})
    slope = (above - plain(IDS)) / 2e-5
    put(model, base, change)
    model.batch.running_mean.fill_(3.0)
    with linearised(model, base):
        found = model(IDS)
    put(plain, base)
    torch.testing.assert_close(found, plain(IDS) + slope, atol=1e-8, rtol=0)
    assert model.batch.training is training
    assert model.batch.running_mean.tolist() == [3.0] * 4
    assert torch.equal(model.batch.running_var, base["batch.running_var"])


def test_at_the_base_it_is_the_model():
    model = block().eval()
    with linearised(model, base_of(model)):
        found = model(IDS)
    torch.testing.assert_close(found, model(IDS))


@pytest.mark.parametrize("trained", [True, False])
def test_it_is_affine_in_the_weights(trained):
    model, outputs = block().eval().requires_grad_(trained), []
    base, one, two = base_of(model), moved(model, 1), moved(model, 2)
    with linearised(model, base):
        for changes in ((), (one,), (two,), (one, two), (one, one, one)):
            put(model, base, *changes)
            outputs.append(model(IDS))
    zero, first, second, both, thrice = outputs
    torch.testing.assert_close(both - zero, first - zero + second - zero)
    torch.testing.assert_close(thrice - zero, 3 * (first - zero))
    assert float((first - zero).detach().norm()) > 1e-3
    assert float((thrice - model(IDS)).detach().norm()) > 1e-3


def test_gradients_are_those_of_the_linear_model_with_the_base_jacobian():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    base, inputs = base_of(model), torch.randn(5, 3, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)).square().sum())
    put(model, base, moved(model))
    with linearised(model, base):
        output = model(inputs)
        output.sum().backward()
    ones = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (inputs,)).sum())(base)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, ones[name])
    model.zero_grad()
    with linearised(model, base):
        put(model, base)
        model(inputs).square().sum().backward()
    for name, wanted in jacobian(base).items():
        torch.testing.assert_close(model.get_parameter(name).grad, wanted)


@dataclass
class Answer:
    """An output class, known to torch's trees as Hugging Face's are."""

    scores: torch.Tensor
    note: str


_pytree.register_pytree_node(
    Answer, lambda a: ([a.scores, a.note], None), lambda held, _: Answer(*held), serialized_type_name="Answer"
)


class Many(nn.Module):
    def __init__(self, kind) -> None:
        super().__init__()
        self.layer, self.kind = nn.Linear(2, 2), kind

    def forward(self, x, *, twice=False):
        y = self.layer(x).tanh() * (2 if twice else 1)
        return self.kind(y)


@pytest.mark.parametrize(
    ("kind", "tensor_of"),
    [
        (lambda y: (y, y.argmax(1)), lambda out: out[0]),
        (lambda y: {"scores": y, "best": y.argmax(1), "none": None}, lambda out: out["scores"]),
        (lambda y: Pair([y], 3), lambda out: out.first[0]),
        (lambda y: Answer(y, "x"), lambda out: out.scores),
    ],
    ids=["tuple", "dict", "named tuple", "dataclass"],
)
def test_outputs_keep_their_structure(kind, tensor_of):
    model = Many(kind)
    base = base_of(model)
    inputs = torch.randn(3, 2)
    put(model, base, moved(model))
    with linearised(model, base):
        found = model(inputs, twice=True)
    assert type(found) is type(model(inputs))
    assert _pytree.tree_structure(found) == _pytree.tree_structure(model(inputs))
    change = model.layer(inputs) - (inputs @ base["layer.weight"].T + base["layer.bias"])
    at_base = (inputs @ base["layer.weight"].T + base["layer.bias"]).tanh()
    torch.testing.assert_close(tensor_of(found), 2 * (at_base + (1 - at_base.square()) * change))


def test_dropout_draws_one_mask_for_value_and_derivative():
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5))
    base = base_of(model)
    put(model, base, moved(model, size=1.0))
    with linearised(model, base):
        found = model(torch.randn(1, 4))
    dropped = int((found == 0).sum())
    assert 10 < dropped < 40


def test_model_may_move_meanwhile():
    """As it does when it is scored on another device; here to another type."""
    model = block().float().eval()
    base = base_of(model)
    put(model, base, moved(model))
    with linearised(model, base):
        before = model(IDS)
        model.double()
        torch.testing.assert_close(model(IDS).float(), before)


def test_model_is_its_own_again_also_after_an_error():
    model = block()
    base = base_of(model)

    def own(ids):
        return "own"

    model.forward = own
    with pytest.raises(ZeroDivisionError), linearised(model, base):
        raise ZeroDivisionError
    assert model(IDS) == "own"
    del model.forward
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model)
    assert model.training
    assert model.batch.training


def test_part_that_is_called_by_itself_is_refused():
    model = block()
    with (
        pytest.raises(ConfigError, match=r"part of the model is called by itself.*got tokens"),
        linearised(model, base_of(model)),
    ):
        model.tokens(IDS)
    model.tokens(IDS)


def test_task_that_never_calls_the_model_is_refused():
    model = block()
    with pytest.raises(ConfigError, match="never calls the model itself"), linearised(model, base_of(model)):
        model.tokens.weight.sum()


def test_weights_that_are_not_of_the_base_are_refused():
    with pytest.raises(ConfigError, match="layer 'bias': only weights of the base"):
        linearised(nn.Linear(2, 2), {"weight": torch.zeros(2, 2)}).__enter__()


def test_operation_without_a_forward_derivative_is_refused():
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    model = Many(Opaque.apply)
    base = base_of(model)
    with pytest.raises(ConfigError, match="cannot be linearised"), linearised(model, base):
        model(torch.zeros(1, 2))


def test_layers_that_torch_would_fuse_are_linearised_in_scoring():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    base = base_of(model)
    put(model, base, moved(model, size=0.01))
    with torch.no_grad(), linearised(model, base):
        found = model(torch.ones(1, 3, 8))
    assert 0 < float((found - model(torch.ones(1, 3, 8))).detach().norm()) < 0.1


# --- in a run ---


def points() -> Task:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    rows = TensorDataset(torch.randn(40, 4, generator=generator) + 2 * labels[:, None], labels)
    return Task(
        "points",
        rows,
        rows,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        lambda model, batch: (model(batch[0]).argmax(1) == batch[1]).float(),
    )


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


CONFIG = TrainingConfig(steps=20, batch_size=8, learning_rate=0.05)


def test_linearised_training_learns_and_is_scored_linearised():
    model = network()
    base = base_of(model)
    with linearised(model, base):
        before = score(model, points()).accuracy
    fine_tune(model, points(), CONFIG, seed=0, training=LocalTraining.chosen(["tangent"]), base=base)
    assert "forward" not in vars(model)
    with linearised(model, base):
        assert score(model, points()).accuracy > max(before, 0.9)


def test_step_of_a_run_from_elsewhere_is_that_of_the_linear_model():
    """One step of plain descent from weights that are not the base's."""
    model = network()
    base = base_of(model)
    put(model, base, moved(model, size=0.3))
    start = base_of(model)
    config = TrainingConfig(steps=1, batch_size=40, optimizer="sgd", learning_rate=0.1, max_grad_norm=0.0)
    fine_tune(model, points(), config, seed=0, training=LocalTraining.chosen(["tangent"]), base=base)

    def loss(weights, inputs, labels):
        change = {name: weights[name] - base[name] for name in base}
        call = lambda p: torch.func.functional_call(network(), p, (inputs,))  # noqa: E731
        value, derivative = torch.func.jvp(call, (base,), (change,))
        return nn.functional.cross_entropy(value + derivative, labels)

    gradients = torch.func.grad(loss)(start, *points().train.tensors)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), start[name] - 0.1 * gradients[name])


def test_option_ends_with_its_run():
    model = network()
    with Linearisation(run_of(model, base=base_of(model)), Tangent()) as option:
        assert "forward" in vars(model)
        model(torch.zeros(1, 4))
        option.after_backward()
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda m, x: m[2](torch.tanh(m[0](x))), "got 0"),
        (lambda m, x: torch.tanh(x @ m[0].weight.T) @ m[2].weight.T, "never calls the model itself"),
    ],
    ids=["by its parts", "by its weights"],
)
def test_run_whose_loss_goes_round_the_model_is_refused_at_its_first_step(scores, message):
    model, told = network(), []
    base = base_of(model)
    rounds = Task(
        "round",
        points().train,
        points().test,
        lambda m, b: nn.functional.cross_entropy(scores(m, b[0]), b[1]),
        points().metric,
    )
    with pytest.raises(ConfigError, match=message):
        fine_tune(
            model,
            rounds,
            CONFIG,
            0,
            lambda *progress: told.append(progress),
            training=LocalTraining.chosen(["tangent"]),
            base=base,
        )
    assert not told
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_linearised_training_runs_in_bf16(norm):
    def normed() -> nn.Module:
        model = network()
        return nn.Sequential(model[0], norm(8), *model[1:])

    rough, exact = normed(), normed()
    for model, bits in ((rough, "bf16"), (exact, "full")):
        fine_tune(
            model,
            points(),
            TrainingConfig(steps=3, batch_size=8, optimizer="sgd", learning_rate=0.1, precision=bits),
            seed=0,
            training=LocalTraining.chosen(["tangent"]),
            base=base_of(normed()),
        )
    ends = [nn.utils.parameters_to_vector(model.parameters()).detach() for model in (exact, rough, normed())]
    assert 0 < float((ends[0] - ends[1]).norm()) < 0.05 * float((ends[0] - ends[2]).norm())


def test_a_private_head_is_scored_at_the_point_it_was_trained_at():
    rows = TensorDataset(
        points := torch.randn(32, 3, generator=torch.Generator().manual_seed(2)), points.sin()
    )
    seen = []

    def metric(model, batch):
        seen.append(model(batch[0]))
        return torch.ones(len(batch[0]))

    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    task = Task("sine", rows, rows, lambda model, batch: (model(batch[0]) - batch[1]).square().mean(), metric)
    config = TrainingConfig(steps=10, learning_rate=0.05)
    stream = Stream("sines", ("sine",), lambda _: task, build, config, private=("2.*",))
    model = build()
    site = Site(stream, model, Base.from_model(model, stream.private))
    site.learn(task, seed=0, site="a", device="cpu", training=LocalTraining.chosen(["tangent"]))
    with linearised(model, build().state_dict()), torch.no_grad():
        wanted = model(points)
    site.score([task], device="cpu", tangent=True)
    assert torch.equal(seen[0], wanted)
