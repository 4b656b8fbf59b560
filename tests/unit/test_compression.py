"""Is a compressed vector what it says, and does nothing get lost over the rounds of a task?"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.client.compress import Compressed, compress, forget
from fedmerge.common import vectorfile
from fedmerge.common.base import Base
from fedmerge.common.compression import Compression
from fedmerge.common.errors import ConfigError, NonFinite, ShapeMismatch
from fedmerge.common.header import parse_header
from fedmerge.common.lowrank import truncated
from fedmerge.common.statistics import Statistics
from fedmerge.common.taskvector import Dense, LowRank, Manifest, TaskVector
from fedmerge.server.admission import BaseNorms, admit
from fedmerge.server.combine import combine

SPECS = ("none", "bf16", "int8", "lowrank:0.9", "lowrank:0.9+bf16", "lowrank:0.9+int8")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def decaying(rows: int, columns: int, seed: int) -> torch.Tensor:
    """A matrix whose singular values halve from one to the next."""
    draw = generator(seed)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=draw, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, columns, generator=draw, dtype=torch.float64)).Q
    rank = min(rows, columns)
    values = 2.0 ** -torch.arange(rank, dtype=torch.float64)
    return (left[:, :rank] * values @ right[:rank]).float()


def layers(seed: int) -> dict[str, torch.Tensor | LowRank]:
    draw = generator(seed)
    return {
        "w": decaying(12, 20, seed),
        "conv": decaying(8, 18, seed + 1).reshape(8, 2, 3, 3),
        "bias": torch.randn(12, generator=draw),
        "lora": LowRank(torch.randn(10, 2, generator=draw), torch.randn(2, 14, generator=draw), (10, 14)),
    }


def vector(seed: int = 0) -> TaskVector:
    manifest = Manifest(task="cats", site="hospital", examples=7)
    return TaskVector.of(layers(seed), unchanged=["embed"], manifest=manifest)


def compressed(spec: str, seed: int = 0) -> Compressed:
    return compress(vector(seed), Compression.parse(spec))


def dense(given: TaskVector) -> dict[str, torch.Tensor]:
    return {name: update.to_dense() for name, update in given.items()}


# --- its name ---


@pytest.mark.parametrize("spec", SPECS)
def test_a_name_comes_back_as_it_was_read(spec):
    assert str(Compression.parse(spec)) == spec


@pytest.mark.parametrize(
    "spec",
    [
        *("", "fp8", "int8+bf16", "bf16+lowrank:0.9", "lowrank", "lowrank:", "lowrank:x", "lowrank:nan"),
        *("lowrank:0", "lowrank:1", "lowrank:-0.5", "lowrank:0.9+", "lowrank:0.9+none", "none+int8"),
    ],
)
def test_another_name_is_refused(spec):
    with pytest.raises(ConfigError, match="unknown compression"):
        Compression.parse(spec)


# --- the strongest directions ---


def test_truncation_keeps_the_fewest_directions_that_hold_the_energy():
    """Singular values 4, 2, 1: shares 16/21, 20/21, 1 of the squared norm."""
    matrix = torch.zeros(6, 8)
    matrix[0, 3], matrix[2, 0], matrix[5, 7] = 4.0, -2.0, 1.0
    for energy, rank, lost in ((16 / 21, 1, 5), (16 / 21 + 1e-9, 2, 1), (20 / 21, 2, 1), (0.99, 3, 0)):
        found, left_out = truncated(Dense(matrix), energy=energy)
        assert isinstance(found, LowRank)
        assert found.rank == rank
        assert left_out == pytest.approx(lost, abs=1e-12)
        assert float((found.to_dense() - matrix).square().sum()) == pytest.approx(lost, abs=1e-10)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (6, 3, 2, 2)])
def test_truncation_agrees_with_the_singular_value_decomposition(shape):
    matrix = torch.randn(shape, generator=generator(3))
    left, values, right = torch.linalg.svd(matrix.double().reshape(shape[0], -1), full_matrices=False)
    found, lost = truncated(Dense(matrix), rank=3)
    wanted = (left[:, :3] * values[:3]) @ right[:3]
    torch.testing.assert_close(found.to_dense().double(), wanted.reshape(shape), atol=1e-6, rtol=0)
    assert lost == pytest.approx(float(values[3:].square().sum()), rel=1e-9)


@pytest.mark.parametrize("rank", [4, 11])
def test_factors_are_truncated_as_their_product_is(rank):
    draw = generator(4)
    update = LowRank(torch.randn(9, rank, generator=draw), torch.randn(rank, 10, generator=draw), (9, 10))
    found, lost = truncated(update, rank=2)
    product, wanted = truncated(Dense(update.to_dense()), rank=2)
    assert lost == pytest.approx(wanted, rel=1e-4)
    torch.testing.assert_close(found.to_dense(), product.to_dense(), atol=1e-5, rtol=0)


def test_a_layer_that_factors_do_not_make_smaller_stays_as_it_is():
    matrix = torch.randn(6, 6, generator=generator(5))
    assert truncated(Dense(matrix), rank=3)[0].to_dense() is matrix
    assert isinstance(truncated(Dense(matrix), rank=2)[0], LowRank)
    update = LowRank(matrix[:, :2], matrix[:2], (6, 6))
    assert truncated(update, energy=0.9999999) == (update, 0.0)


@pytest.mark.parametrize("shape", [(5, 7), (0, 3), (3, 0), (1, 1)])
def test_nothing_is_left_out_of_a_layer_of_zeros(shape):
    found, lost = truncated(Dense(torch.zeros(shape)), energy=0.9)
    assert (found.shape, lost) == (shape, 0.0)
    assert not found.to_dense().any()


# --- what is sent ---


@pytest.mark.parametrize("spec", SPECS)
def test_a_reader_gets_the_values_that_were_reported(spec):
    sent = compressed(spec)
    back = vectorfile.from_bytes(vectorfile.to_bytes(sent.vector, sent.dtype))
    assert (back.names, back.unchanged, back.manifest) == (
        sent.vector.names,
        sent.vector.unchanged,
        vector().manifest,
    )
    for name, update in sent.vector.items():
        for mine, theirs in zip(update.tensors(), back.read(name).tensors(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("spec", SPECS)
def test_the_report_counts_the_bytes_of_the_file_and_what_was_left_out(spec):
    sent = compressed(spec)
    header = parse_header(vectorfile.to_bytes(sent.vector, sent.dtype), "bytes")
    assert sent.report.bytes_after == sum(end - begin for begin, end in header.ranges.values())
    assert sent.report.bytes_before == 4 * (12 * 20 + 8 * 18 + 12 + 2 * 24)
    given, left = dense(vector()), dense(sent.vector)
    residual = math.sqrt(sum(float((given[name] - left[name]).double().square().sum()) for name in given))
    assert sent.report.residual == pytest.approx(residual / vector().norm(), rel=1e-5)
    assert sent.report.cut <= sent.report.residual * (1 + 1e-6) or "lowrank" not in spec


def test_nothing_is_left_out_of_what_is_not_compressed():
    sent = compressed("none")
    assert sent.report.residual == sent.report.cut == 0.0
    assert all(torch.equal(given, dense(sent.vector)[name]) for name, given in dense(vector()).items())


def test_each_compression_is_as_small_and_as_close_as_it_should_be():
    reports = {spec: compressed(spec).report for spec in SPECS}
    before = reports["none"].bytes_after
    assert reports["bf16"].bytes_after == before / 2
    assert before / 4 < reports["int8"].bytes_after < before / 3
    assert reports["lowrank:0.9"].bytes_after < before / 2
    assert reports["lowrank:0.9+int8"].bytes_after < before / 7
    assert 0 < reports["bf16"].residual < 2**-8
    assert 0 < reports["int8"].residual < 0.01
    assert reports["lowrank:0.9"].cut == pytest.approx(reports["lowrank:0.9"].residual, rel=1e-5)
    for spec in ("lowrank:0.9", "lowrank:0.9+int8"):
        assert reports[spec].residual < math.sqrt(0.1) + 0.01


def test_statistics_travel_as_they_are():
    held = Statistics.of({"w": {"fisher": torch.rand(12, 20, generator=generator(1))}})
    given = TaskVector(("w",), vector().read, manifest=Manifest(statistics=("fisher",)), statistics=held)
    sent = compress(given, Compression.parse("lowrank:0.9+int8"))
    back = vectorfile.from_bytes(vectorfile.to_bytes(sent.vector, sent.dtype))
    assert torch.equal(back.statistics("w")["fisher"], held("w")["fisher"])


@pytest.mark.parametrize("spec", SPECS)
def test_a_vector_of_zeros_is_sent_as_zeros(spec):
    sent = compress(TaskVector.of({"w": torch.zeros(4, 6), "b": torch.zeros(3)}), Compression.parse(spec))
    assert not any(values.any() for values in dense(sent.vector).values())
    assert sent.report.residual == 0.0


@pytest.mark.parametrize("spec", SPECS)
def test_a_server_admits_and_combines_compressed_vectors(spec):
    weights = {name: update + 1 for name, update in dense(vector()).items()} | {"embed": torch.ones(3)}
    base = Base.from_checkpoint(weights)
    manifest = Manifest(base.fingerprint, task="cats", examples=7)
    opened = []
    for seed in (0, 1):
        given = TaskVector.of(layers(seed), unchanged=["embed"], manifest=manifest)
        sent = compress(given, Compression.parse(spec))
        opened.append(vectorfile.from_bytes(vectorfile.to_bytes(sent.vector, sent.dtype)))
        admit(opened[-1], base, BaseNorms.of(base), task="cats")
    mean = dense(combine(opened, [1.0, 3.0]))
    for name, values in dense(vector(0)).items():
        wanted = values / 4 + dense(vector(1))[name] * 3 / 4
        assert float((mean[name] - wanted).norm()) <= 0.35 * float(wanted.norm())


# --- error feedback ---


@pytest.mark.parametrize("spec", SPECS)
def test_what_was_sent_and_the_memory_sum_up_to_the_true_vectors(spec):
    memory: dict[str, torch.Tensor] = {"coso/w": torch.ones(1)}
    rounds = 8
    true = {name: torch.zeros(values.shape, dtype=torch.float64) for name, values in dense(vector()).items()}
    sent = {name: values.clone() for name, values in true.items()}
    for number in range(rounds):
        for name, values in dense(vector(number)).items():
            true[name] += values
        for name, values in dense(compress(vector(number), Compression.parse(spec), memory).vector).items():
            sent[name] += values
    for name, values in true.items():
        left = memory.get(f"compress/{name}", torch.zeros(()))
        rounding = 2 * rounds * 2.0**-24 * max(float(values.abs().max()), 1.0) * 8
        torch.testing.assert_close(sent[name] + left, values, atol=rounding, rtol=0)
    assert torch.equal(memory["coso/w"], torch.ones(1))


def test_over_many_rounds_the_memory_of_one_vector_stays_bounded():
    """The same vector every round: without feedback the error of the sum grows with the rounds."""
    memory: dict[str, torch.Tensor] = {}
    compression, once, rounds = Compression.parse("lowrank:0.9+int8"), vector(), 30
    total = torch.zeros(12, 20)
    for _ in range(rounds):
        total += compress(once, compression, memory).vector.read("w").to_dense()
    wanted = rounds * once.read("w").to_dense()
    without = rounds * compress(once, compression).vector.read("w").to_dense()
    assert float((total - wanted).norm()) < 0.2 * float((without - wanted).norm())


def test_a_low_rank_update_is_never_sent_at_more_than_its_own_rank():
    memory: dict[str, torch.Tensor] = {}
    for number in range(4):
        sent = compress(vector(number), Compression.parse("int8"), memory).vector.read("lora")
        assert isinstance(sent, LowRank)
        assert sent.rank == 2


def test_a_task_ends_when_its_memory_is_forgotten():
    memory: dict[str, torch.Tensor] = {"coso/w": torch.ones(1)}
    first = compress(vector(), Compression.parse("int8"), memory)
    assert set(memory) > {"coso/w"}
    forget(memory)
    assert set(memory) == {"coso/w"}
    again = compress(vector(), Compression.parse("int8"), memory)
    assert all(torch.equal(dense(first.vector)[name], v) for name, v in dense(again.vector).items())


def test_a_memory_that_was_sent_in_full_is_gone():
    memory: dict[str, torch.Tensor] = {}
    given = TaskVector.of({"w": decaying(6, 8, 0)})
    compress(given, Compression.parse("int8"), memory)
    assert set(memory) == {"compress/w"}
    compress(given, Compression.parse("none"), memory)
    assert not memory


def test_what_cannot_be_sent_leaves_the_memory_as_it_was():
    memory: dict[str, torch.Tensor] = {}
    compress(vector(), Compression.parse("int8"), memory)
    before = {key: values.clone() for key, values in memory.items()}
    spoiled = TaskVector.of({**layers(1), "z": torch.tensor([math.nan])})
    with pytest.raises(NonFinite, match="layer 'z'"):
        compress(spoiled, Compression.parse("int8"), memory)
    assert memory.keys() == before.keys()
    assert all(torch.equal(memory[key], values) for key, values in before.items())


@pytest.mark.parametrize("spec", ["bf16", "int8"])
def test_a_value_that_rounds_to_infinity_is_not_sent(spec):
    with pytest.raises(NonFinite, match="layer 'w'"):
        compress(
            TaskVector.of({"w": torch.tensor([torch.finfo(torch.float32).max])}), Compression.parse(spec)
        )


def test_a_memory_of_another_model_is_refused():
    with pytest.raises(ShapeMismatch, match="layer 'bias'"):
        compress(vector(), Compression.parse("int8"), {"compress/bias": torch.ones(3)})


@given(st.integers(0, 2**32), st.sampled_from(SPECS))
@settings(deadline=None, max_examples=30)
def test_one_round_loses_nothing_whatever_the_numbers(seed, spec):
    draw = generator(seed)
    scale = 10.0 ** float(torch.randint(-20, 20, (), generator=draw))
    given = torch.randn(5, 7, generator=draw) * scale
    memory: dict[str, torch.Tensor] = {}
    sent = compress(TaskVector.of({"w": given}), Compression.parse(spec), memory).vector.read("w").to_dense()
    left = memory.get("compress/w", torch.zeros(5, 7))
    torch.testing.assert_close(sent.double() + left.double(), given.double(), atol=1e-6 * scale, rtol=0)
