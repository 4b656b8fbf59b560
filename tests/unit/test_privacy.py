"""Does what a site sends keep to its bounds, is the noise what it is said to be, and is epsilon right?"""

import math
import random
import re
from pathlib import Path

import pytest
import torch
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.client.privacy import gaussian, privatise
from fedmerge.common import vectorfile
from fedmerge.common.config import validated
from fedmerge.common.errors import ConfigError, NonFinite
from fedmerge.common.privacy import Privacy, epsilon, releases
from fedmerge.common.statistics import Statistics, check_shape, check_values, statistics_of
from fedmerge.common.taskvector import LowRank, Manifest, TaskVector

DELTA = 1e-5


def seeded(seed: int = 0):
    return random.Random(seed).randbytes


def normal(shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def whole(seed: int = 0) -> dict[str, torch.Tensor]:
    return {"w": normal((6, 8), seed), "b": normal((6,), seed + 1)}


def factors(seed: int = 0) -> LowRank:
    return LowRank(normal((5, 2), seed + 2), normal((2, 7), seed + 3), (5, 7))


def vector(seed: int = 0) -> TaskVector:
    layers = {**whole(seed), "lora": factors(seed)}
    return TaskVector.of(layers, unchanged=["embed"], manifest=Manifest(task="cats", examples=9))


def numbers(given: TaskVector) -> torch.Tensor:
    """All that is sent of the layers, in one row."""
    return torch.cat([tensor.flatten() for _, update in given.items() for tensor in update.tensors()])


def sent_norm(given: TaskVector) -> float:
    return float(torch.linalg.vector_norm(numbers(given), dtype=torch.float64))


# --- clipping ---


@given(st.floats(1e-6, 1e6), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_no_more_than_the_bound_is_sent(clip, seed):
    sent = privatise(vector(seed), Privacy(clip=clip, noise=0))
    assert sent_norm(sent) <= clip


@pytest.mark.parametrize("room", [1.0, 1.0 + 1e-9, 50.0])
def test_a_vector_at_or_below_the_bound_passes_unaltered(room):
    given = TaskVector.of(whole())
    sent = privatise(given, Privacy(clip=sent_norm(given) * room, noise=0))
    assert torch.equal(numbers(sent), numbers(given))


def test_a_norm_that_is_the_bound_is_not_above_it():
    given = TaskVector.of({"w": torch.tensor([3.0]), "b": torch.tensor([-4.0])})
    assert numbers(privatise(given, Privacy(clip=5.0, noise=0))).tolist() == [3.0, -4.0]


def test_a_vector_above_the_bound_is_scaled_as_a_whole():
    given = TaskVector.of(whole())
    sent = privatise(given, Privacy(clip=sent_norm(given) / 4, noise=0))
    torch.testing.assert_close(numbers(sent), numbers(given) / 4, rtol=1e-6, atol=0)
    assert sent_norm(sent) == pytest.approx(sent_norm(given) / 4, rel=1e-6)


@pytest.mark.parametrize("uneven", [1.0, 100.0])
def test_factors_are_as_small_as_their_product_lets_them_be(uneven):
    """Their sum of squares is then twice the sum of the product's singular values."""
    product, given = factors().to_dense(), factors()
    given = TaskVector.of({"w": LowRank(given.left_MR * uneven, given.right_RN / uneven, given.shape)})
    sent = privatise(given, Privacy(clip=1e3, noise=0))
    assert sent.read("w").rank == 2
    torch.testing.assert_close(sent.read("w").to_dense(), product, rtol=1e-5, atol=1e-5)
    least = 2 * float(torch.linalg.svdvals(product.double()).sum())
    assert sent_norm(sent) ** 2 == pytest.approx(least, rel=1e-5)
    clipped = privatise(given, Privacy(clip=math.sqrt(least) / 2, noise=0)).read("w")
    torch.testing.assert_close(clipped.to_dense(), product / 4, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [5, 9])
def test_factors_of_a_rank_that_the_layer_cannot_have_become_fewer(rank):
    given = LowRank(normal((5, rank)), normal((rank, 7), 1), (5, 7))
    sent = privatise(TaskVector.of({"w": given}), Privacy(clip=1e3, noise=0)).read("w")
    assert sent.rank == 5
    torch.testing.assert_close(sent.to_dense(), given.to_dense(), rtol=1e-5, atol=1e-5)


def test_both_factors_count_not_their_product():
    """||left|| = ||right|| = 3: jointly sqrt(18); clipped to half of it the product is a quarter."""
    left, right = torch.tensor([[1.0], [2.0], [2.0]]), torch.tensor([[3.0, 0.0]])
    given = TaskVector.of({"w": LowRank(left, right, (3, 2))})
    sent = privatise(given, Privacy(clip=math.sqrt(18) / 2, noise=0)).read("w")
    torch.testing.assert_close(sent.to_dense(), (left @ right) / 4, rtol=1e-6, atol=0)


def test_names_manifest_and_unchanged_layers_stay():
    sent = privatise(vector(), Privacy(clip=1.0, noise=1.0))
    assert (sent.names, sent.unchanged, sent.manifest) == (
        vector().names,
        vector().unchanged,
        vector().manifest,
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(value):
    with pytest.raises(NonFinite, match="task vector"):
        privatise(TaskVector.of({"w": torch.tensor([1.0, value])}), Privacy(clip=1.0, noise=1.0))


# --- noise ---


def test_every_number_gets_noise_of_the_deviation_that_was_asked_for():
    """The sum of n squared standard normal numbers is n, give or take sqrt(2 n); here within 5 of these."""
    count = 40_000
    given = TaskVector.of({"w": torch.zeros(150, 200), "b": torch.zeros(10_000)})
    noise = numbers(privatise(given, Privacy(clip=0.5, noise=3.0), seeded())) / 1.5
    assert abs(float(noise.double().square().sum()) - count) < 5 * math.sqrt(2 * count)
    assert abs(float(noise.double().sum())) < 5 * math.sqrt(count)
    assert bool((noise != 0).all())


def test_noise_is_normal():
    """Shares within 1, 2 and 3 deviations, each within 5 standard errors; and both of a pair apart."""
    drawn = gaussian((100, 999), seeded(1)).flatten()
    for deviations in (1, 2, 3):
        share = math.erf(deviations / math.sqrt(2))
        found = float((drawn.abs() < deviations).double().mean())
        assert abs(found - share) < 5 * math.sqrt(share * (1 - share) / len(drawn))
    halves = drawn[:49_950] * drawn[49_950:]
    assert abs(float(halves.mean())) < 5 / math.sqrt(49_950)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0), (7,), (2**20 + 1,)])
def test_noise_comes_in_every_shape(shape):
    drawn = gaussian(shape, seeded())
    assert drawn.shape == torch.Size(shape)
    assert bool(drawn.isfinite().all())
    assert len(drawn.flatten().unique()) == drawn.numel()


def test_noise_is_never_the_same_by_itself():
    privacy = Privacy(clip=1.0, noise=1.0)
    torch.manual_seed(0)
    first = numbers(privatise(vector(), privacy))
    torch.manual_seed(0)
    assert not torch.equal(first, numbers(privatise(vector(), privacy)))


def test_a_vector_of_zeros_is_noise_alone():
    given = TaskVector.of({"w": torch.zeros(3, 4)})
    assert not numbers(privatise(given, Privacy(clip=1.0, noise=0))).any()
    assert bool((numbers(privatise(given, Privacy(clip=1.0, noise=1.0))) != 0).all())


# --- statistics ---


def carrying(held: dict[str, dict[str, torch.Tensor]], *kinds: str) -> TaskVector:
    layers = {"w": torch.zeros(6, 8), "v": torch.zeros(5, 8), "norm": torch.zeros(8)}
    given = TaskVector.of(layers, manifest=Manifest(statistics=kinds))
    return TaskVector(
        given.names, given.read, manifest=given.manifest, shapes=given.shapes, statistics=Statistics.of(held)
    )


def all_kinds() -> TaskVector:
    gram = normal((3, 8), 7)
    held = {
        "w": {"input_gram": gram, "fisher": normal((6, 8)).square(), "sketch": normal((8, 4), 8)},
        "v": {"input_gram": gram, "fisher": normal((5, 8)).square(), "residual": torch.tensor([0.4])},
        "norm": {"input_gram": normal((8,)).square(), "fisher": normal((8,)).square()},
    }
    for layer, shape in {"w": (6, 8), "v": (5, 8), "norm": (8,)}.items():
        held[layer]["second_moment"] = normal(shape, 9).square()
    return carrying(held, "input_gram", "fisher", "second_moment", "sketch", "residual")


EACH = {"input_gram": 1.0, "fisher": 2.0, "second_moment": 0.5, "sketch": 3.0, "residual": 0.1}


@pytest.mark.parametrize(("noise", "seed"), [(0.0, 0), (0.3, 0), (30.0, 1), (30.0, 2), (30.0, 3), (30.0, 4)])
def test_noisy_statistics_are_still_ones_that_data_can_give(noise, seed):
    sent = privatise(all_kinds(), Privacy(clip=1.0, noise=noise, **EACH), seeded(seed))
    for layer in sent.names:
        for kind, values in sent.statistics(layer).items():
            shape, of_layer = tuple(values.shape), sent.shapes[layer]
            check_shape(kind, shape, of_layer, where="site", layer=layer, matrix=len(of_layer) > 1)
            check_values(kind, shape, [values], where="site", layer=layer)
    back = vectorfile.from_bytes(vectorfile.to_bytes(sent))
    assert statistics_of(back).shapes == statistics_of(all_kinds()).shapes | {
        layer: dict(found) for layer, found in statistics_of(sent).shapes.items()
    }


def test_each_kind_of_statistic_is_clipped_over_all_layers_by_its_own_bound():
    given, sent = all_kinds(), privatise(all_kinds(), Privacy(clip=1.0, noise=0, **EACH))
    for kind, bound in EACH.items():
        told = {
            layer: tuple(statistics_of(v)(layer)[kind] for v in (given, sent))
            for layer, name in statistics_of(given).stored(given.names)
            if name == kind
        }
        if kind == "input_gram":
            told["w"] = tuple(factor.T @ factor for factor in told["w"])
        before = math.sqrt(sum(float(one.square().sum()) for one, _ in told.values()))
        assert before > bound
        for one, other in told.values():
            torch.testing.assert_close(other, one * (bound / before), rtol=1e-4, atol=1e-5)


def test_a_gram_below_its_bound_comes_back_as_it_was():
    factor = normal((3, 8), 7)
    given = carrying({"w": {"input_gram": factor}}, "input_gram")
    sent = privatise(given, Privacy(clip=1.0, noise=0, input_gram=1e3)).statistics("w")["input_gram"]
    torch.testing.assert_close(sent.T @ sent, factor.T @ factor, rtol=1e-5, atol=1e-5)


def test_a_noisy_gram_is_the_nearest_positive_semidefinite_matrix():
    """Noise on all entries of zero: half the variance off the diagonal, and only positive directions left."""
    width = 60
    given = TaskVector.of({"w": torch.zeros(4, width)}, manifest=Manifest(statistics=("input_gram",)))
    held = Statistics.of({"w": {"input_gram": torch.zeros(1, width)}})
    given = TaskVector(given.names, given.read, manifest=given.manifest, statistics=held)
    sent = privatise(given, Privacy(clip=1.0, noise=2.0, input_gram=0.5), seeded(3)).statistics("w")
    factor = sent["input_gram"]
    assert width / 3 < len(factor) < 2 * width / 3
    draw = seeded(3)
    gaussian((4, width), draw)  # that of the layer
    noise = gaussian((width, width), draw)
    values, vectors = torch.linalg.eigh((noise + noise.T) / 2)
    wanted = (vectors * values.clamp(min=0)) @ vectors.T
    torch.testing.assert_close((factor.T @ factor).double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_gram_that_noise_made_negative_is_sent_as_zero():
    given = TaskVector.of({"w": torch.zeros(4, 1)}, manifest=Manifest(statistics=("input_gram",)))
    held = Statistics.of({"w": {"input_gram": torch.zeros(1, 1)}})
    given = TaskVector(given.names, given.read, manifest=given.manifest, statistics=held)
    privacy = Privacy(clip=1.0, noise=1.0, input_gram=1.0)
    found = [privatise(given, privacy, seeded(seed)).statistics("w")["input_gram"] for seed in range(12)]
    assert {tuple(factor.shape) for factor in found} == {(1, 1)}
    assert {bool(factor.any()) for factor in found} == {True, False}


def test_layers_that_share_a_gram_share_the_noisy_one():
    sent = statistics_of(privatise(all_kinds(), Privacy(clip=1.0, noise=1.0, **EACH)))
    assert sent.shared_among(("w", "v", "norm")) == {"v": "w"}
    assert torch.equal(sent("w")["input_gram"], sent("v")["input_gram"])


def test_a_statistic_without_a_bound_is_refused():
    with pytest.raises(ConfigError, match=r"no clip bound: got fisher, wanted privacy\.fisher"):
        privatise(
            carrying({"w": {"fisher": torch.ones(6, 8)}}, "fisher"),
            Privacy(clip=1.0, noise=1.0, input_gram=1.0),
        )


# --- accounting ---


def renyi_optimum(noise: float, delta: float) -> float:
    """Least over all orders of ``order / (2 noise^2) + log(1 / delta) / (order - 1)``: an upper bound."""
    return 1 / (2 * noise**2) + math.sqrt(2 * math.log(1 / delta)) / noise


def delta_of(noise: float, epsilon: float) -> float:
    """The delta of a Gaussian mechanism of sensitivity 1, exactly (arXiv 1805.06530)."""
    above, below = (math.erfc((epsilon * noise + sign / (2 * noise)) / math.sqrt(2)) / 2 for sign in (-1, 1))
    return above - math.exp(epsilon) * below


@pytest.mark.parametrize("noise", [0.7, 1.0, 3.0, 10.0, 40.0])
@pytest.mark.parametrize("count", [1, 10, 100])
def test_epsilon_is_exact_and_below_the_renyi_bound(noise, count):
    found = epsilon(noise, count, DELTA)
    assert delta_of(noise / math.sqrt(count), found) == pytest.approx(DELTA, rel=1e-6)
    assert found < renyi_optimum(noise / math.sqrt(count), DELTA)


def test_epsilon_of_one_release_as_it_is_known():
    """From dp-accounting 0.6.0 and, to four digits, from any implementation of the analytic mechanism."""
    assert epsilon(1.0, 1, DELTA) == pytest.approx(4.377178, abs=1e-5)
    assert epsilon(10.0, 100, DELTA) == pytest.approx(4.377178, abs=1e-5)


@pytest.mark.parametrize("noise", [1.0, 4.0])
@pytest.mark.parametrize("count", [1, 25])
def test_the_accountant_of_flower_finds_no_smaller_epsilon(noise, count):
    config = PrivacyConfig(DELTA, 1, NeighboringRelation.ADD_OR_REMOVE_ONE, SamplingMethod.NO_AMPLIFICATION)
    accountant = RdpAccountant(config)
    accountant.compose(GaussianPrivacyEvent(noise, 1, 1), count)
    assert epsilon(noise, count, DELTA) <= accountant.get_epsilon(DELTA) <= 1.1 * epsilon(noise, count, DELTA)


def test_epsilon_without_noise_is_infinite_and_without_releases_zero():
    assert epsilon(0.0, 1, DELTA) == math.inf
    assert epsilon(0.0, 0, DELTA) == epsilon(1.0, 0, DELTA) == 0.0


def test_epsilon_grows_with_releases_and_falls_with_noise():
    assert epsilon(2.0, 1, DELTA) < epsilon(2.0, 2, DELTA) < epsilon(1.0, 2, DELTA)


def test_a_message_is_one_release_for_the_vector_and_one_for_each_kind():
    assert releases(3) == 3
    assert releases(3, ("input_gram", "fisher")) == 9


@pytest.mark.parametrize(
    "settings",
    [
        {"clip": 0, "noise": 1},
        {"clip": -1, "noise": 1},
        {"clip": math.inf, "noise": 1},
        {"clip": 1, "noise": -1},
        {"clip": 1, "noise": math.nan},
        {"clip": 1, "noise": 1, "delta": 0},
        {"clip": 1, "noise": 1, "delta": 1},
        {"clip": 1, "noise": 1, "fisher": 0},
        {"clip": 1, "noise": 1, "gram": 1},
        {"noise": 1},
    ],
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ConfigError):
        validated(Privacy, settings)


def test_the_table_of_the_page_is_what_the_code_computes():
    page = (Path(__file__).parents[2] / "docs" / "privacy.md").read_text()
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.MULTILINE)
    assert len(rows) >= 5
    for noise, *found in rows:
        assert found == [f"{epsilon(float(noise), count, DELTA):.2f}" for count in (1, 10, 100)]
