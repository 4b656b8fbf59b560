"""Are vectors of one task combined as their weights say, and exactly where that is possible?"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
