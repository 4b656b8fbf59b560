"""Are vectors of one task combined as their weights say, and exactly where that is possible?"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.common.errors import ShapeMismatch, StatisticsMissing
from fedmerge.common.statistics import Statistics, statistics_of
from fedmerge.common.taskvector import Dense, LowRank, Manifest, TaskVector
from fedmerge.server.combine import add_vectors, combine

SHAPE = (5, 4)


def dense(seed: int, scale: float = 1.0, unchanged=(), examples: int = 3, **drop) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    layers = {"w": scale * torch.randn(SHAPE, generator=generator), "b": torch.randn(4, generator=generator)}
    kept = {name: values for name, values in layers.items() if name not in unchanged}
    return TaskVector.of(kept, unchanged, Manifest("f" * 64, 0, "t", f"s{seed}", examples), f"update {seed}")


def low_rank(seed: int, rank: int) -> TaskVector:
    """Small whole numbers, so that every product and sum below is exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(-4, 5, size, generator=generator).float() for size in ((5, rank), (rank, 4)))
    return TaskVector.of({"w": LowRank(left, right, SHAPE)}, ["b"], Manifest(site=f"s{seed}"))


def values(vector: TaskVector, name: str = "w") -> torch.Tensor:
    return vector.read(name).to_dense()


@settings(deadline=None, max_examples=40)
@given(weights=st.lists(st.integers(1, 100_000), min_size=2, max_size=6))
def test_dense_layers_are_the_weighted_mean_of_float64_rounded_once(weights):
    vectors = [dense(seed, scale=10.0 ** (seed % 5)) for seed in range(len(weights))]
    whole = combine(vectors, weights)
    for name in ("w", "b"):
        mean = sum(
            values(v, name).double() * (w / sum(weights)) for v, w in zip(vectors, weights, strict=True)
        )
        assert torch.equal(values(whole, name), mean.float())


def test_a_vector_alone_must_bring_what_is_needed_too():
    with pytest.raises(StatisticsMissing, match="update 1: no fisher"):
        combine([dense(1)], [1], ["fisher"])


def test_equal_weights_by_hand():
    one = TaskVector.of({"w": torch.tensor([[1.0, 3.0]])})
    two = TaskVector.of({"w": torch.tensor([[5.0, -3.0]])})
    assert values(combine([one, two], [2, 2])).tolist() == [[3.0, 0.0]]
    assert values(combine([one, two], [3, 1])).tolist() == [[2.0, 1.5]]


def test_low_rank_layers_are_stacked_exactly():
    vectors = [low_rank(1, 1), low_rank(2, 2), low_rank(3, 1)]
    whole = combine(vectors, [1, 2, 1])
    stacked = whole.read("w")
    assert isinstance(stacked, LowRank)
    assert (stacked.rank, stacked.shape) == (4, SHAPE)
    by_hand = 0.25 * values(vectors[0]) + 0.5 * values(vectors[1]) + 0.25 * values(vectors[2])
    assert torch.equal(stacked.to_dense(), by_hand)


def test_one_dense_layer_makes_the_sum_dense():
    whole = combine([low_rank(1, 1), dense(2)], [1, 1])
    assert isinstance(whole.read("w"), Dense)
    by_hand = 0.5 * values(low_rank(1, 1)).double() + 0.5 * values(dense(2)).double()
    assert torch.equal(values(whole), by_hand.float())


def test_a_layer_unchanged_at_one_site_counts_as_zero_there():
    whole = combine([dense(1, unchanged=["b"]), dense(2)], [1, 3])
    assert torch.equal(values(whole, "b"), (values(dense(2), "b").double() * 0.75).float())
    assert whole.unchanged == ()


def test_a_layer_unchanged_everywhere_stays_unchanged():
    whole = combine([dense(1, unchanged=["b"]), dense(2, unchanged=["b"])], [1, 3])
    assert (whole.names, whole.unchanged) == (("w",), ("b",))


def test_a_single_vector_is_returned_as_it_is():
    vector = dense(1)
    assert combine([vector], [17]) is vector


def test_the_whole_says_who_and_how_many():
    whole = combine([dense(1, examples=3), dense(2, examples=5)], [3, 5])
    assert (whole.manifest.site, whole.manifest.examples, whole.manifest.task) == ("s1+s2", 8, "t")
    assert whole.label == "update 1+update 2"


def test_the_weights_scale_does_not_matter():
    vectors = [dense(1), dense(2)]
    assert torch.equal(values(combine(vectors, [1, 3])), values(combine(vectors, [1000, 3000])))


@pytest.mark.parametrize("name", ["w", "b"])
def test_added_vectors_are_the_sum_rounded_once(name):
    first, second = dense(1, scale=1000.0), dense(2, scale=0.001)
    total = add_vectors(first, second)
    wanted = (values(first, name).double() + values(second, name).double()).float()
    assert torch.equal(values(total, name), wanted)
    assert (total.manifest, total.label) == (second.manifest, second.label)


def test_adding_keeps_layers_that_only_one_brings():
    total = add_vectors(dense(1, unchanged=["b"]), dense(2))
    assert torch.equal(values(total, "b"), values(dense(2), "b"))
    total = add_vectors(dense(1), dense(2, unchanged=["b"]))
    assert torch.equal(values(total, "b"), values(dense(1), "b"))


def test_added_low_rank_vectors_stay_low_rank_and_exact():
    total = add_vectors(low_rank(1, 1), low_rank(2, 2)).read("w")
    assert isinstance(total, LowRank)
    assert total.rank == 3
    assert torch.equal(total.to_dense(), values(low_rank(1, 1)) + values(low_rank(2, 2)))


# --- statistics ---

NEEDS = ("fisher", "input_gram")


def measured(seed: int, rank: int = 2, unchanged=(), **drop) -> TaskVector:
    """With Fisher information of both layers and a Gram of the matrix; ``drop`` names one by its layer."""
    generator = torch.Generator().manual_seed(100 + seed)
    held = {
        "w": {"fisher": torch.rand(SHAPE, generator=generator)},
        "b": {"fisher": torch.rand(4, generator=generator)},
    }
    held["w"]["input_gram"] = torch.randn(rank, 4, generator=generator)
    for layer, name in drop.items():
        del held[layer][name]
    vector = dense(seed, unchanged=unchanged)
    brought = {layer: found for layer, found in held.items() if layer not in unchanged}
    manifest = replace(vector.manifest, statistics=NEEDS)
    return replace(vector, manifest=manifest, statistics=Statistics.of(brought))


def gram(vector: TaskVector) -> torch.Tensor:
    factor = vector.statistics("w")["input_gram"].double()
    return factor.T @ factor


@pytest.mark.parametrize(("ranks", "rows"), [((1, 2), 3), ((2, 2), 4), ((4, 3), 4), ((4, 4, 4), 4)])
def test_the_gram_of_all_sites_is_the_weighted_mean_in_at_most_as_many_rows_as_columns(ranks, rows):
    vectors = [measured(seed, rank) for seed, rank in enumerate(ranks)]
    weights = [1.0, 3.0, 0.5][: len(vectors)]
    whole = combine(vectors, weights, NEEDS)
    wanted = sum(gram(v) * (w / sum(weights)) for v, w in zip(vectors, weights, strict=True))
    assert torch.allclose(gram(whole), wanted, rtol=0, atol=1e-5)
    assert whole.statistics("w")["input_gram"].shape == (rows, 4)
    assert statistics_of(whole).shapes["w"]["input_gram"] == (rows, 4)


def test_elementwise_statistics_are_the_weighted_mean_rounded_once():
    vectors = [measured(1), measured(2)]
    whole = combine(vectors, [1, 3], NEEDS)
    for layer in ("w", "b"):
        one, two = (v.statistics(layer)["fisher"].double() for v in vectors)
        assert torch.equal(whole.statistics(layer)["fisher"], (0.25 * one + 0.75 * two).float())
    assert whole.manifest.statistics == NEEDS
    assert set(whole.statistics("b")) == {"fisher"}


def test_two_halves_of_the_samples_give_the_gram_of_all_of_them():
    samples = torch.randn(40, 4, generator=torch.Generator().manual_seed(5))
    halves = [(measured(1), samples[:10]), (measured(2), samples[10:])]
    vectors = []
    for vector, rows in halves:
        factor = torch.linalg.qr(rows / len(rows) ** 0.5, mode="r").R
        vectors.append(replace(vector, statistics=Statistics.of({"w": {"input_gram": factor}})))
    whole = combine(vectors, [10, 30], ["input_gram"])
    assert torch.allclose(gram(whole), (samples.T @ samples / 40).double(), atol=1e-6)


def test_a_layer_unchanged_at_one_site_has_the_statistics_of_the_others():
    sites = [measured(1), measured(2, unchanged=["b"]), measured(3)]
    found = combine(sites, [1, 5, 3], NEEDS).statistics("b")["fisher"]
    one, _, three = (v.statistics("b").get("fisher", torch.zeros(4)).double() for v in sites)
    assert torch.allclose(found, (0.25 * one + 0.75 * three).float())


def test_a_statistic_that_one_site_does_not_list_is_missed_by_name():
    with pytest.raises(StatisticsMissing, match="update 2: no fisher among its statistics"):
        combine([measured(1), dense(2)], [1, 1], NEEDS)


@pytest.mark.parametrize(("layer", "name"), [("w", "input_gram"), ("b", "fisher")])
def test_a_statistic_of_a_layer_that_one_site_leaves_out_is_missed_by_name(layer, name):
    with pytest.raises(StatisticsMissing, match=f"update 2, layer '{layer}': no {name}"):
        combine([measured(1), measured(2, **{layer: name})], [1, 1], NEEDS)


def test_what_is_not_needed_is_left_behind_even_of_one_site():
    for vectors in ([measured(1), dense(2)], [measured(1)]):
        whole = combine(vectors, [1.0] * len(vectors))
        assert whole.manifest.statistics == ()
        assert whole.statistics("w") == {}
    assert torch.equal(values(whole), values(measured(1)))


def test_a_later_round_brings_its_own_statistics():
    total = add_vectors(measured(1), measured(2))
    assert torch.equal(total.statistics("w")["fisher"], measured(2).statistics("w")["fisher"])
    assert torch.equal(total.in_memory().statistics("w")["fisher"], measured(2).statistics("w")["fisher"])
    assert total.manifest.statistics == NEEDS


def sketched(seed: int, width: int = 3, residual: float = 0.5, examples: int = 3) -> TaskVector:
    generator = torch.Generator().manual_seed(200 + seed)
    held = {"sketch": torch.randn(4, width, generator=generator), "residual": torch.tensor([residual])}
    vector = dense(seed, examples=examples)
    manifest = replace(vector.manifest, statistics=("residual", "sketch"))
    return replace(vector, manifest=manifest, statistics=Statistics.of({"w": held}))


SKETCHES = ("residual", "sketch")


def test_sketches_are_added_whatever_the_weights_and_residuals_are_averaged():
    vectors = [sketched(1, residual=0.25), sketched(2, residual=0.75), sketched(3, residual=0.5)]
    whole = combine(vectors, [1, 2, 5], SKETCHES)
    wanted = sum(v.statistics("w")["sketch"].double() for v in vectors).float()
    assert torch.equal(whole.statistics("w")["sketch"], wanted)
    assert whole.statistics("w")["residual"].item() == pytest.approx((0.25 + 1.5 + 2.5) / 8)
    assert statistics_of(whole).shapes["w"] == {"residual": (1,), "sketch": (4, 3)}
    assert whole.statistics("b") == {}


def test_statistics_may_be_weighted_otherwise_than_the_vectors():
    vectors = [sketched(1, residual=0.2), sketched(2, residual=1.0)]
    whole = combine(vectors, [1, 1], SKETCHES, examples=[3, 1])
    assert whole.statistics("w")["residual"].item() == pytest.approx(0.4)
    assert torch.equal(values(whole), values(combine(vectors, [1, 1])))


def test_order_of_sites_changes_no_sketch_but_for_rounding():
    vectors = [sketched(seed) for seed in range(5)]
    there, back = (combine(order, [1] * 5, SKETCHES) for order in (vectors, vectors[::-1]))
    assert torch.allclose(there.statistics("w")["sketch"], back.statistics("w")["sketch"], atol=1e-6)


def test_sketches_of_different_widths_do_not_add():
    with pytest.raises(ShapeMismatch, match="layer 'w': sketches of different widths"):
        combine([sketched(1, width=3), sketched(2, width=4)], [1, 1], SKETCHES)
