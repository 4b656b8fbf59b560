"""Laws of OPCM that hold for any vectors."""

from __future__ import annotations

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.taskvector import Dense, LowRank
from fedmerge.server.merge.opcm import MatrixSum, Opcm, OpcmState
from fedmerge.server.merge.rule import LayerSums, Totals

laws = settings(deadline=None, max_examples=60, derandomize=True)

sizes = st.integers(1, 12)
seeds = st.integers(0, 2**32 - 1)
alphas = st.floats(0.0, 1.0)
rules = st.builds(Opcm, alpha=alphas, diagonal=st.sampled_from(["cleared", "left"]))


def gaussians(seed: int, count: int, rows: int, columns: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, columns, generator=generator) for _ in range(count)]


def absorbed(rule: Opcm, total: Tensor, update: Tensor) -> Tensor:
    state = MatrixSum(total)
    return rule.absorb(state, rule.prepare(state), Dense(update)).sum_MN


def merged(rule: Opcm, vectors: list[Tensor]) -> Tensor:
    """The whole rule on a model of one layer."""
    rows, columns = vectors[0].shape
    state: OpcmState = rule.init(LayerSpec("weight", (rows, columns), torch.float32, LayerKind.MATRIX))
    totals = Totals()
    for vector in vectors:
        update = Dense(vector)
        state = rule.absorb(state, rule.prepare(state), update)
        totals = totals.after([LayerSums(update.sum_of_squares(), state.sum_of_squares())])
    return rule.read(state, totals)


def close(got: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> bool:
    size = float(torch.linalg.vector_norm(wanted.double()))
    return float(torch.linalg.vector_norm(got.double() - wanted.double())) <= tolerance * size


@laws
@given(rules, seeds, sizes, sizes, st.integers(1, 3))
def test_what_is_removed_lies_in_the_span_of_both_sides(rule, seed, rows, columns, rank) -> None:
    left, right = gaussians(seed, 1, rows, rank)[0], gaussians(seed + 1, 1, rank, columns)[0]
    total, update = (left.double() @ right.double()).float(), gaussians(seed + 2, 1, rows, columns)[0]
    removed = (total + update - absorbed(rule, total, update)).double()
    u, s, vh = torch.linalg.svd(total.double(), full_matrices=False)
    assume(s[min(rank, rows, columns) - 1] > 1e-2 * s[0])
    u, vh = u[:, : min(rank, len(s))], vh[: min(rank, len(s))]
    inside = u @ (u.T @ removed @ vh.T) @ vh
    assert float((removed - inside).abs().max()) <= 1e-5 * float(update.abs().max() + total.abs().max())


@laws
@given(alphas, seeds, sizes, sizes)
def test_what_is_added_is_orthogonal_to_the_running_sum(alpha, seed, rows, columns) -> None:
    total, update = gaussians(seed, 2, rows, columns)
    added = absorbed(Opcm(alpha=alpha), total, update) - total
    bound = 1e-5 * float(torch.linalg.vector_norm(total) * torch.linalg.vector_norm(update))
    assert abs(float((added.double() * total.double()).sum())) <= bound


@laws
@given(rules, seeds, sizes, sizes)
def test_first_vector_is_merged_as_it_is(rule, seed, rows, columns) -> None:
    (vector,) = gaussians(seed, 1, rows, columns)
    assert torch.equal(merged(rule, [vector]), vector)


@laws
@given(rules, seeds, sizes, sizes)
def test_transposed_vectors_give_the_transposed_result(rule, seed, rows, columns) -> None:
    vectors = gaussians(seed, 2, rows, columns)
    assert close(merged(rule, [v.T.contiguous() for v in vectors]), merged(rule, vectors).T)


@laws
@given(rules, seeds, sizes, sizes, st.integers(-10, 10))
def test_scaling_every_vector_scales_the_result(rule, seed, rows, columns, power) -> None:
    vectors = gaussians(seed, 3, rows, columns)
    assert close(merged(rule, [v * 2.0**power for v in vectors]), merged(rule, vectors) * 2.0**power)


@laws
@given(rules, seeds, sizes, sizes)
def test_flipping_every_sign_flips_the_result(rule, seed, rows, columns) -> None:
    vectors = gaussians(seed, 3, rows, columns)
    assert close(merged(rule, [-v for v in vectors]), -merged(rule, vectors))


@laws
@given(rules, seeds, sizes, sizes)
def test_merged_vector_is_as_long_as_the_task_vectors_on_average(rule, seed, rows, columns) -> None:
    vectors = gaussians(seed, 3, rows, columns)
    norms = [float(torch.linalg.vector_norm(v, dtype=torch.float64)) for v in vectors]
    length = float(torch.linalg.vector_norm(merged(rule, vectors), dtype=torch.float64))
    assert abs(length - sum(norms) / 3) <= 1e-6 * length


@laws
@given(rules, seeds, st.integers(8, 16), st.integers(8, 16))
def test_factors_give_what_their_product_gives(rule, seed, rows, columns) -> None:
    layer = LayerSpec("weight", (rows, columns), torch.float32, LayerKind.MATRIX)
    lefts, rights = gaussians(seed, 2, rows, 1), gaussians(seed + 1, 2, 1, columns)
    low, dense = rule.init(layer), rule.init(layer)
    for left, right in zip(lefts, rights, strict=True):
        low = rule.absorb(low, rule.prepare(low), LowRank(left, right, layer.shape))
        dense = rule.absorb(dense, rule.prepare(dense), Dense((left.double() @ right.double()).float()))
    assert close(low.read(1.0), dense.read(1.0))
