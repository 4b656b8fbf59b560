"""Do sites measure the statistics they say, and leave the model as they found it?"""

import weakref
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, unfold
from torch.optim import AdamW
from torch.utils.data import TensorDataset

from fedmerge.client.grams import InputGrams, patches
from fedmerge.client.site import Site
from fedmerge.client.statistics import measure, second_moments
from fedmerge.client.tasks import Stream, Task, TrainingConfig
from fedmerge.client.training import fine_tune
from fedmerge.common.base import Base
from fedmerge.common.errors import ConfigError, NonFinite
from fedmerge.common.statistics import Statistic
from fedmerge.common.training import LocalTraining
from fedmerge.common.vectorfile import to_bytes

CONFIG = TrainingConfig(steps=5, batch_size=8, learning_rate=0.01, gram_energy=1.0)
GRAM, FISHER, MOMENT = Statistic.INPUT_GRAM, Statistic.FISHER, Statistic.SECOND_MOMENT


def inputs(*shape: int, seed: int = 0) -> torch.Tensor:
    """More in some elements than in others, and not centred."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn * torch.linspace(0.5, 2, shape[-1]) + 0.3


def task_of(rows: torch.Tensor, loss=None) -> Task:
    """Rows as examples, labelled 0, 1, 0, 1."""
    data = TensorDataset(rows, torch.arange(len(rows)) % 2)
    return Task("rows", data, data, loss or plain_loss, plain_loss)


def plain_loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]).flatten(1)[:, :2], batch[1])


def measured(model: nn.Module, task: Task, *wanted: str, config: TrainingConfig = CONFIG, **options: object):
    layers = Base.from_model(model).merged_layers
    return measure(model, task, wanted, layers, config, **{"seed": 0, "device": "cpu", **options})


def gram(factor_RN: torch.Tensor) -> torch.Tensor:
    return factor_RN.double().T @ factor_RN.double()


def mean_gram(x_RN: torch.Tensor) -> torch.Tensor:
    """By definition, one row after the other."""
    return sum(torch.outer(x, x) for x in x_RN.double()) / len(x_RN)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found.double(), wanted.double(), rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


class Attention(nn.Module):
    """Query, key and value of one input, an output projection of another, and a scale before them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.query, self.key, self.value = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm(x)
        mixed = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), -1) @ self.value(x)
        return self.out(mixed).mean(1)


class Packed(nn.Module):
    """torch's attention, asked about itself or about something else."""

    def __init__(self, other: bool = False, **options: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self._other = other

    def forward(self, x):
        memory = x.flip(1)[..., : self.attention.kdim] if self._other else x
        return self.attention(query=x, key=memory, value=memory, need_weights=False)[0].mean(1)


# --- input Grams ---


def test_gram_of_a_linear_layer_is_the_mean_over_all_tokens_of_all_examples():
    rows = inputs(12, 5, 3)
    found = measured(nn.Linear(3, 2), task_of(rows), GRAM)
    assert set(found) == {"weight", "bias"}
    assert close(gram(found["weight"][GRAM]), mean_gram(rows.reshape(-1, 3)))
    assert found["bias"] == {}


def test_fewer_rows_than_columns_give_the_same_gram_in_fewer_rows():
    rows = inputs(5, 40)
    factor = measured(nn.Linear(40, 2), task_of(rows), GRAM)["weight"][GRAM]
    assert factor.shape == (5, 40)
    assert factor.is_contiguous()
    assert close(gram(factor), mean_gram(rows))


def test_rows_that_outgrow_the_columns_half_way_give_the_same_gram():
    rows = inputs(7, 4, 20)  # 28 rows, stacked up to the sixteenth of them
    factor = measured(nn.Linear(20, 2), task_of(rows), GRAM)["weight"][GRAM]
    assert factor.shape == (20, 20)
    assert close(gram(factor), mean_gram(rows.reshape(-1, 20)))


@pytest.mark.parametrize("examples", [9, 60])
def test_energy_is_the_share_of_the_trace_that_is_kept_in_the_fewest_rows(examples):
    rows = inputs(examples, 16) * torch.logspace(0, -3, 16)
    whole = mean_gram(rows)
    task, model = task_of(rows), nn.Linear(16, 2)
    config = replace(CONFIG, gram_energy=0.95, statistics_examples=examples)
    factor = measured(model, task, GRAM, config=config)["weight"][GRAM]
    values = torch.linalg.eigvalsh(whole).flip(0)
    kept = len(factor)
    assert values[:kept].sum() >= 0.95 * whole.trace() > values[: kept - 1].sum()
    assert gram(factor).trace() == pytest.approx(float(values[:kept].sum()), rel=1e-5)
    assert kept < 9


def test_gram_of_rank_one_is_sent_as_one_row():
    rows = torch.ones(30, 1) * inputs(1, 6)
    assert measured(nn.Linear(6, 2), task_of(rows), GRAM)["weight"][GRAM].shape == (1, 6)


def test_inputs_that_are_all_zero_still_have_a_factor():
    factor = measured(nn.Linear(6, 2), task_of(torch.zeros(3, 6)), GRAM)["weight"][GRAM]
    assert torch.equal(factor, torch.zeros(1, 6))


def test_layers_with_one_input_share_one_tensor_and_others_do_not():
    rows = inputs(9, 3, 6)
    torch.manual_seed(0)
    found = measured(Attention(), task_of(rows), GRAM)
    shared = found["query.weight"][GRAM]
    assert found["key.weight"][GRAM] is shared
    assert found["value.weight"][GRAM] is shared
    assert found["out.weight"][GRAM].shape == (4, 4)
    normalised = nn.LayerNorm(6)(rows).detach().reshape(-1, 6)
    assert close(gram(shared), mean_gram(normalised))


def test_layers_that_part_ways_in_a_later_example_do_not_share():
    class Parting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.left(x) + self.right(x if x.sum() > 0 else x.clone() + 1)

    rows = torch.cat([inputs(3, 3).abs(), -inputs(3, 3).abs()])
    found = measured(Parting(), task_of(rows), GRAM)
    assert close(gram(found["left.weight"][GRAM]), mean_gram(rows))
    assert close(gram(found["right.weight"][GRAM]), mean_gram(torch.cat([rows[:3], rows[3:] + 1])))


def test_inputs_are_let_go_of_after_every_pass():
    model, alive = nn.Linear(3, 2), []
    grams = InputGrams(model, Base.from_model(model).merged_layers, "test")
    with grams.watching():
        for row in inputs(2, 1, 3):
            given = row.clone()
            alive.append(weakref.ref(given))
            model(given)
            del given
            grams.end_of_pass()
            assert alive[-1]() is None


def test_an_input_that_is_changed_in_place_is_another_input():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.first(x) + self.second(x.mul_(2))

    rows = inputs(5, 3)
    found = measured(InPlace(), task_of(rows), GRAM)
    assert close(gram(found["first.weight"][GRAM]), mean_gram(rows))
    assert close(gram(found["second.weight"][GRAM]), 4 * mean_gram(rows))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": (2, 1)},
        {"padding": 1, "stride": (2, 1), "bias": False},
    ],
    ids=str,
)
def test_gram_of_a_convolution_is_that_of_its_unfolded_patches(options):
    conv = nn.Conv2d(2, 5, (3, 2), **options)
    rows = inputs(4, 2, 7, 6)
    unfolded = unfold(rows, (3, 2), conv.dilation, conv.padding, conv.stride)
    found = measured(conv, task_of(rows), GRAM)["weight"][GRAM]
    assert close(gram(found), mean_gram(unfolded.transpose(1, 2).reshape(-1, 12)))


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
        (nn.Conv2d(4, 4, 3, groups=4, padding="same", dilation=2), (4, 5, 6)),
        (nn.Conv2d(2, 3, 2, padding="same", padding_mode="reflect"), (2, 5, 6)),
        (nn.Conv3d(2, 3, (1, 2, 3), padding=1, padding_mode="circular"), (2, 3, 4, 5)),
        (nn.Conv2d(1, 3, 1), (1, 4, 4)),
    ],
    ids=str,
)
@torch.no_grad()
def test_patches_times_the_weight_are_what_the_convolution_computes(conv, shape):
    x = inputs(2, *shape)
    groups = conv.groups
    rows = patches(conv, x)
    weight = conv.weight.flatten(1).unflatten(0, (groups, -1))  # (groups, out / groups, in / groups * kernel)
    out = conv(x) - conv.bias.reshape(-1, *[1] * (x.dim() - 2))
    wanted = out.unflatten(1, (groups, -1)).movedim(2, -1).flatten(2, -2)  # (batch, groups, positions, out)
    computed = torch.einsum("bgpn,gon->bgpo", rows.reshape(2, groups, -1, rows.shape[1]), weight)
    assert torch.allclose(computed, wanted, atol=1e-5)


def test_groups_of_a_convolution_are_pooled_into_one_gram():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    rows = inputs(3, 4, 5, 5)
    channels = rows.reshape(12, 1, 5, 5)
    unfolded = unfold(channels, 3).transpose(1, 2).reshape(-1, 9)
    assert close(gram(measured(conv, task_of(rows), GRAM)["weight"][GRAM]), mean_gram(unfolded))


def test_self_attention_in_one_projection_has_the_gram_of_its_query():
    rows = inputs(6, 3, 4)
    found = measured(Packed(), task_of(rows), GRAM)
    assert close(gram(found["attention.in_proj_weight"][GRAM]), mean_gram(rows.reshape(-1, 4)))
    assert found["attention.out_proj.weight"] == {}


def test_cross_attention_in_one_projection_has_none_and_in_three_has_three():
    rows = inputs(6, 3, 4)
    assert measured(Packed(other=True), task_of(rows), GRAM)["attention.in_proj_weight"] == {}
    found = measured(Packed(other=True, kdim=3, vdim=3), task_of(rows), GRAM)
    assert close(gram(found["attention.q_proj_weight"][GRAM]), mean_gram(rows.reshape(-1, 4)))
    key, value = (found[f"attention.{name}_proj_weight"][GRAM] for name in "kv")
    assert close(gram(key), mean_gram(rows[..., :3].reshape(-1, 3)))
    assert key is value


def test_a_fused_transformer_layer_is_seen_into():
    class Encoder(nn.Module):
        """The last token of every example is padding, which torch would drop before the first layer."""

        def __init__(self) -> None:
            super().__init__()
            block = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(block, 1)

        def forward(self, x):
            padding = torch.tensor([[False, False, True]]).expand(len(x), 3)
            return self.encoder(x, src_key_padding_mask=padding).mean(1)

    fused = torch.backends.mha.get_fastpath_enabled()
    rows = inputs(20, 3, 4)
    found = measured(Encoder(), task_of(rows), GRAM)
    layer = "encoder.layers.0"
    assert close(gram(found[f"{layer}.self_attn.in_proj_weight"][GRAM]), mean_gram(rows.reshape(-1, 4)))
    assert found[f"{layer}.linear2.weight"][GRAM].shape == (8, 8)
    assert torch.backends.mha.get_fastpath_enabled() is fused


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.LayerNorm(6), (3, 6)),
        (nn.LayerNorm((3, 6)), (3, 6)),
        (nn.RMSNorm(6), (3, 6)),
        (nn.GroupNorm(2, 6), (6, 5)),
        (nn.BatchNorm1d(6), (6, 5)),
        (nn.BatchNorm2d(6), (6, 5, 4)),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_scale_has_the_mean_square_of_what_it_multiplies(norm, shape):
    rows = inputs(10, *shape)
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    multiplied = norm.eval()(rows)  # a fresh norm multiplies by one and adds zero
    if norm.weight.shape[0] == 6 and not isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        multiplied = multiplied.movedim(1, -1)
    wanted = multiplied.reshape(-1, norm.weight.numel()).square().mean(0)
    nn.init.constant_(norm.weight, 3.0)
    found = measured(nn.Sequential(norm, nn.Flatten()), task_of(rows), GRAM)
    assert close(found["0.weight"][GRAM], wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 2), (6,)),
        (nn.Conv1d(6, 2, 1), (6, 3)),
        (nn.LayerNorm(6), (6,)),
        (nn.BatchNorm1d(6), (6,)),
        (nn.GroupNorm(2, 6), (6, 3)),
    ],
    ids=str,
)
def test_a_model_of_another_dtype_has_the_statistics_of_its_float32_self(layer, shape, dtype):
    model = nn.Sequential(deepcopy(layer), nn.Flatten())
    task = task_of(inputs(8, *shape).bfloat16().float())
    wanted = measured(model, task, GRAM, FISHER)

    def loss(model, batch):
        return cross_entropy(model(batch[0].to(dtype)).flatten(1)[:, :2].float(), batch[1])

    found = measured(model.to(dtype), replace(task, loss=loss), GRAM, FISHER)
    for name, statistics in wanted.items():
        for kind, values in statistics.items():
            here = found[name][kind]
            assert here.dtype == torch.float32
            if kind == GRAM and values.dim() == 2:
                here, values = gram(here), gram(values)
            assert torch.allclose(here, values, rtol=0.05, atol=1e-6 + 0.02 * float(values.abs().max()))


def test_a_scale_is_measured_however_its_norm_is_called():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.RMSNorm(6), nn.LayerNorm(6)

        def forward(self, x):
            return self.first(x=x) + self.second(input=x[0])  # an example alone, without a batch

    rows = inputs(5, 6)
    found = measured(Named(), task_of(rows), GRAM)
    assert close(found["first.weight"][GRAM], nn.RMSNorm(6)(rows).detach().square().mean(0))
    assert close(found["second.weight"][GRAM], nn.LayerNorm(6)(rows).detach().square().mean(0))


def test_a_layer_that_is_called_without_rows_has_the_gram_of_the_others():
    class Experts(nn.Module):
        """Each expert takes the tokens above its bound; there are none above the second's."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            used = self.first(x[x[:, 0] > 0.3]).sum(0) + self.second(x[x[:, 0] > 99]).sum(0)
            return used.expand(len(x), 2)

    rows = inputs(20, 3)
    found = measured(Experts(), task_of(rows), GRAM)
    assert close(gram(found["first.weight"][GRAM]), mean_gram(rows[rows[:, 0] > 0.3]))
    assert found["second.weight"] == {}


def test_layers_whose_input_tells_nothing_have_no_gram():
    class Conv1D(nn.Module):
        """As Hugging Face's: a weight of (in, out)."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 2))

        def forward(self, x):
            return x @ self.weight

    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(2 * x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.conv = nn.Embedding(4, 3), Conv1D()
            self.transposed, self.scaled = nn.ConvTranspose1d(2, 2, 1), Scaled(2, 2)

        def forward(self, x):
            rows = self.conv(self.embedding(x))
            return self.scaled(self.transposed(rows.transpose(1, 2)).transpose(1, 2)).mean(1)

    found = measured(Model(), task_of(torch.arange(8).reshape(4, 2) % 4), GRAM)
    assert all(statistics == {} for statistics in found.values())
    assert "conv.weight" in found


def test_a_weight_used_by_two_modules_counts_the_inputs_of_both():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    rows = inputs(5, 3)
    found = measured(model, task_of(rows), GRAM)
    assert set(found) == {"0.weight"}
    both = torch.cat([rows, model[0](rows).detach()])
    assert close(gram(found["0.weight"][GRAM]), mean_gram(both))


def test_a_weight_tied_to_an_embedding_has_no_gram():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(1), nn.Linear(3, 5, bias=False))
    model[2].weight = model[0].weight
    assert measured(model, task_of(torch.arange(5)[:, None]), GRAM) == {"0.weight": {}}


# --- Fisher information ---


def test_fisher_is_the_mean_square_of_each_examples_own_gradient():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    rows = inputs(7, 3)
    found = measured(model, task_of(rows), FISHER)
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter)
        for row, x in enumerate(rows):
            loss = -model(x).log_softmax(0)[row % 2]
            wanted += torch.autograd.grad(loss, parameter)[0] ** 2 / 7
        assert close(found[name][FISHER], wanted)
        assert float(found[name][FISHER].sum()) > 0


def test_fisher_is_zero_for_what_the_loss_does_not_see():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    model.register_parameter("idle", nn.Parameter(torch.ones(4)))
    found = measured(model, task_of(inputs(6, 3)), FISHER)
    assert torch.equal(found["idle"][FISHER], torch.zeros(4))
    assert torch.equal(found["1.running_mean"][FISHER], torch.zeros(2))
    assert float(found["1.weight"][FISHER].sum()) > 0


def test_both_come_from_the_same_pass():
    calls = []

    def loss(model, batch):
        calls.append(len(batch[0]))
        return plain_loss(model, batch)

    model, rows = nn.Linear(3, 2), inputs(6, 3)
    both = measured(model, task_of(rows, loss), GRAM, FISHER)
    assert calls == [1] * 6
    assert torch.equal(both["weight"][GRAM], measured(model, task_of(rows), GRAM)["weight"][GRAM])
    assert torch.equal(both["weight"][FISHER], measured(model, task_of(rows), FISHER)["weight"][FISHER])


# --- second moments ---


def test_second_moments_are_those_of_another_run_of_adamw():
    torch.manual_seed(2)
    model, other = nn.Linear(3, 2), nn.Linear(3, 2)
    other.load_state_dict(model.state_dict())
    task, found = task_of(inputs(4, 3)), {}
    config = TrainingConfig(steps=3, batch_size=4, learning_rate=0.1, max_grad_norm=0.0)
    fine_tune(model, task, config, 0, on_finish=lambda opt: found.update(second_moments(model, opt)))
    optimizer = AdamW(other.parameters(), weight_decay=0.0)
    wanted = {name: torch.zeros_like(p) for name, p in other.named_parameters()}
    for rate in (0.1, 0.2 / 3, 0.1 / 3):  # warm-up of one step, then down
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        plain_loss(other, [task.train.tensors[0], task.train.tensors[1]]).backward()
        for name, parameter in other.named_parameters():
            wanted[name] = 0.999 * wanted[name] + 0.001 * parameter.grad**2
        optimizer.step()
    assert set(found) == {"weight", "bias"}
    assert all(close(found[name], wanted[name]) for name in wanted)


# --- which examples, and what is left behind ---


def test_as_many_examples_as_were_asked_for_are_drawn_by_seed_and_none_twice():
    def seen_with(examples: int, seed: int) -> list[float]:
        seen: list[float] = []

        def loss(model, batch):
            seen.append(float(batch[0][0, 0]))
            return plain_loss(model, batch)

        rows = torch.arange(20.0)[:, None]
        config = replace(CONFIG, statistics_examples=examples)
        measured(nn.Linear(1, 2), task_of(rows, loss), GRAM, config=config, seed=seed)
        return seen

    few = seen_with(6, 0)
    assert len(set(few)) == len(few) == 6
    assert seen_with(6, 0) == few != seen_with(6, 1)
    assert sorted(seen_with(64, 0)) == list(range(20))


def hooked(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("wanted", [(GRAM,), (FISHER,), (GRAM, FISHER)], ids=str)
def test_the_model_is_left_as_it_was(wanted):
    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.9), nn.Linear(4, 2)).train()
    model[2].eval()
    model[2].bias.requires_grad_(False)
    model[0].weight.grad = torch.ones(4, 3)
    before = {name: values.clone() for name, values in model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first, second = (measured(model, task_of(inputs(9, 3)), *wanted) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(first["0.weight"][name], second["0.weight"][name]) for name in wanted)
    assert all(torch.equal(values, before[name]) for name, values in model.state_dict().items())
    assert (model.training, model[1].training, model[2].training) == (True, True, False)
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))
    assert [p.grad is None for p in model.parameters()] == [False, True, True, True]
    assert hooked(model) == 0


def test_the_model_is_left_as_it_was_also_when_the_loss_fails():
    def loss(model, batch):
        model(batch[0])
        raise ZeroDivisionError

    model = nn.Linear(3, 2).train()
    with pytest.raises(ZeroDivisionError):
        measured(model, task_of(inputs(4, 3), loss), GRAM, FISHER)
    assert (hooked(model), model.training, model.weight.grad) == (0, True, None)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"statistics_examples": 0}, "statistics_examples out of range"),
        ({"gram_energy": 0.0}, "gram_energy out of range"),
        ({"gram_energy": 1.01}, "gram_energy out of range"),
    ],
)
def test_settings_out_of_range_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        measured(nn.Linear(3, 2), task_of(inputs(4, 3)), GRAM, config=replace(CONFIG, **config))


def test_what_is_not_finite_is_refused_by_name():
    rows = inputs(4, 3)
    with pytest.raises(NonFinite, match="task 'rows': the loss of an example is not finite"):
        measured(nn.Linear(3, 2), task_of(rows * torch.inf), GRAM)
    unmoved = task_of(rows * torch.inf, lambda model, batch: model(batch[0]).isfinite().float().sum())
    with pytest.raises(NonFinite, match="task 'rows', layer 'weight'"):
        measured(nn.Linear(3, 2), unmoved, GRAM)
    steep = task_of(rows, lambda model, batch: 1e25 * model(batch[0]).sum())
    with pytest.raises(NonFinite, match="task 'rows', layer 'weight'"):
        measured(nn.Linear(3, 2), steep, FISHER)


# --- a site ---


def site_of(model: nn.Module, task: Task, **training: object) -> Site:
    stream = Stream("test", (task.name,), lambda name: task, lambda: model, replace(CONFIG, **training))
    return Site(stream, model, Base.from_model(model, stream.private))


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))


def test_a_site_sends_what_is_needed_of_the_layers_it_stores_and_nothing_else():
    at = site_of(network(), task := task_of(inputs(30, 3)), frozen=("2.*",))
    vector, _ = at.learn(task, seed=0, site="a", device="cpu", needs=[MOMENT, GRAM])
    assert vector.manifest.statistics == ("input_gram", "second_moment")
    found = {name: set(vector.statistics(name)) for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert found == {
        "0.weight": {GRAM, MOMENT},
        "0.bias": {MOMENT},
        "1.weight": {GRAM, MOMENT},
        "1.bias": {MOMENT},
    }
    assert vector.statistics("2.weight") == {}
    assert float(vector.statistics("0.weight")[MOMENT].sum()) > 0


def test_statistics_are_measured_at_the_fine_tuned_weights():
    at = site_of(network(), task := task_of(inputs(30, 3)))
    vector, _ = at.learn(task, seed=4, site="a", device="cpu", needs=[FISHER])
    tuned = dict(vector.apply(at.base))
    other = network()
    other.load_state_dict(tuned)
    again = measured(other, task, FISHER, seed=4)
    assert all(close(vector.statistics(name)[FISHER], again[name][FISHER]) for name in vector.names)


def test_the_vector_is_the_same_with_and_without_statistics():
    at = site_of(network(), task := task_of(inputs(30, 3)))
    bare, _ = at.learn(task, seed=0, site="a", device="cpu")
    vector, _ = at.learn(task, seed=0, site="a", device="cpu", needs=list(Statistic))
    assert bare.manifest.statistics == ()
    assert to_bytes(bare) == to_bytes(replace(vector, manifest=bare.manifest, statistics=bare.statistics))


def test_parameters_that_were_not_trained_are_unchanged_and_nothing_is_told_of_them():
    model = network()
    model[2].bias.requires_grad_(False)
    at = site_of(model, task := task_of(inputs(30, 3)))
    vector, _ = at.learn(task, seed=0, site="a", device="cpu", needs=[MOMENT])
    assert (vector.unchanged, vector.names) == (
        ("2.bias",),
        ("0.weight", "0.bias", "1.weight", "1.bias", "2.weight"),
    )
    assert not vector.statistics("2.bias")
    assert float(vector.statistics("2.weight")[MOMENT].sum()) > 0


def test_a_statistic_that_is_not_known_is_refused_before_training():
    at = site_of(network(), task := task_of(inputs(30, 3)))
    with pytest.raises(
        ConfigError, match="cannot measure: got hessian, wanted input_gram or fisher or second"
    ):
        at.learn(task, seed=0, site="a", needs=["hessian", "fisher"])
    assert torch.equal(at.model[0].weight, at.base.read("0.weight"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_statistics_measured_on_a_gpu_are_those_of_the_cpu():
    model, task = network(), task_of(inputs(30, 3))
    here, there = (measured(model, task, GRAM, FISHER, device=device) for device in ("cpu", "cuda"))
    for name, found in here.items():
        assert torch.allclose(there[name][FISHER], found[FISHER], rtol=1e-3, atol=1e-6)
    assert close(gram(there["0.weight"][GRAM]), gram(here["0.weight"][GRAM]))
    assert there["0.weight"][GRAM].device.type == "cpu"


@pytest.mark.parametrize(("option", "settings"), [("coso", {}), ("lora", {"full": "*.bias"})])
def test_second_moments_of_other_parameters_than_the_models_are_refused(option, settings):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    rows = TensorDataset(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))
    task = Task(
        "t", rows, rows, lambda m, batch: cross_entropy(m(batch[0]), batch[1]), lambda m, batch: batch[1]
    )
    training = LocalTraining.chosen([option], {option: settings})

    def on_finish(optimizer):
        with pytest.raises(ConfigError, match="AdamW over a model's own weights"):
            second_moments(model, optimizer)

    fine_tune(model, task, TrainingConfig(steps=2), 0, on_finish=on_finish, training=training)
