"""Which updates are let in, and is every refusal typed, reasoned and free of tensor values?"""

import math
from dataclasses import replace

import pytest
import torch

from fedmerge.client.site import Site
from fedmerge.client.tasks import StreamOptions
from fedmerge.common.base import Base
from fedmerge.common.config import validated
from fedmerge.common.errors import (
    BadStatistic,
    BadWeight,
    BaseMismatch,
    Busy,
    ConfigError,
    FileError,
    MismatchError,
    MissingLayer,
    NonFinite,
    NormExceeded,
    QuotaExceeded,
    ShapeMismatch,
    StatisticsMissing,
    TooLarge,
    UnknownLayer,
    VersionMismatch,
)
from fedmerge.common.layers import LayerKind
from fedmerge.common.names import check_site_name
from fedmerge.common.statistics import Statistic, Statistics
from fedmerge.common.taskvector import LowRank, Manifest, TaskVector
from fedmerge.common.vectorfile import from_bytes, save, to_bytes
from fedmerge.deploy.streams.example import example
from fedmerge.server.admission import (
    FLOAT32_MAX,
    LIMITS,
    MAX_EXAMPLES,
    MOST_MERGES,
    BaseNorms,
    Limits,
    admit,
    admit_update,
    check_held,
    check_queue,
    check_quota,
    check_size,
    needs_approval,
    weight,
)
from fedmerge.server.merge.average import Average
from fedmerge.server.merge.fot import Fot

BASE = Base.from_checkpoint(
    {"w": torch.ones(4, 3), "b": torch.ones(4), "head": torch.ones(2, 4)}, {"head": LayerKind.PRIVATE}
)
NORMS = BaseNorms.of(BASE)
SAYS = Manifest(BASE.fingerprint, 0, "plain", "ward 7", 12)
WIDE = Limits(layer_ratio=1e40, total_ratio=1e40)


def vector(manifest: Manifest = SAYS, unchanged=(), **layers) -> TaskVector:
    held = {"w": torch.ones(4, 3), "b": torch.ones(4)} | layers
    return TaskVector.of({k: v for k, v in held.items() if v is not None}, unchanged, manifest, "update of a")


def spiked(layer: str, place: int, value: float) -> TaskVector:
    values = torch.ones(BASE.layers[layer].shape)
    values.view(-1)[place] = value
    return vector(**{layer: values})


def test_a_fitting_vector_is_let_in():
    admit(vector(), BASE, NORMS, task="plain")
    admit(from_bytes(to_bytes(vector())), BASE, NORMS, task="plain")
    admit(vector(b=None, unchanged=["b"]), BASE, NORMS, task="plain")
    admit(vector(w=LowRank(torch.ones(4, 1), torch.ones(1, 3), (4, 3))), BASE, NORMS, task="plain")
    admit(vector(w=torch.zeros(4, 3), b=torch.zeros(4)), BASE, NORMS, task="plain")


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"base": "0" * 64}, BaseMismatch, "made from another base: got 000000000000, wanted"),
        ({"base": ""}, BaseMismatch, "got none"),
        ({"origin_version": 1}, VersionMismatch, "another origin version: got 1, wanted 0"),
        ({"task": "plane"}, MismatchError, "a vector for another task: got 'plane', wanted 'plain'"),
    ],
    ids=["another base", "no base", "a later origin", "another task"],
)
def test_a_vector_of_something_else_is_refused(changed, error, says):
    with pytest.raises(error, match=says) as caught:
        admit(vector(replace(SAYS, **changed)), BASE, NORMS, task="plain")
    assert str(caught.value).startswith("update of a: ")


@pytest.mark.parametrize(
    ("made", "error", "layer"),
    [
        (vector(b=None), MissingLayer, "b"),
        (vector(extra=torch.ones(2)), UnknownLayer, "extra"),
        (vector(unchanged=["extra"]), UnknownLayer, "extra"),
        (vector(head=torch.ones(2, 4)), UnknownLayer, "head"),
        (vector(w=torch.ones(3, 4)), ShapeMismatch, "w"),
        (vector(b=torch.ones(1)), ShapeMismatch, "b"),
        (vector(b=torch.ones(4, 1)), ShapeMismatch, "b"),
        (vector(w=LowRank(torch.ones(3, 1), torch.ones(1, 4), (3, 4))), ShapeMismatch, "w"),
    ],
    ids=["missing", "extra", "extra unchanged", "private", "transposed", "(1,)", "(4, 1)", "factors"],
)
def test_layers_that_are_not_the_bases_are_refused_by_name(made, error, layer):
    with pytest.raises(error) as caught:
        admit(made, BASE, NORMS, task="plain")
    assert (caught.value.layer, caught.value.where) == (layer, "update of a")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("layer", "place"), [("w", 0), ("w", 11), ("b", 0), ("b", 3)])
def test_one_value_that_is_not_finite_anywhere_is_refused(layer, place, value):
    with pytest.raises(NonFinite, match="update of a"):
        admit(spiked(layer, place, value), BASE, NORMS, task="plain")


@pytest.mark.parametrize(
    "made",
    [
        vector(w=torch.full((4, 3), 3e38)),
        spiked("b", 3, 3e38),
        vector(w=LowRank(torch.full((4, 1), 1e30), torch.full((1, 3), 1e30), (4, 3))),
    ],
    ids=["all", "one", "product of factors"],
)
def test_finite_values_whose_norm_overflows_are_refused(made):
    assert all(bool(torch.isfinite(t).all()) for _, u in made.items() for t in u.tensors())
    with pytest.raises(NonFinite, match=r"overflows? float32"):
        admit(made, BASE, NORMS, WIDE, task="plain")


def test_the_bound_of_the_norm_leaves_room_for_a_million_sums():
    bound = FLOAT32_MAX / MOST_MERGES
    spike = torch.tensor([0, 0, 0, bound])
    admit(vector(w=torch.zeros(4, 3), b=spike * 0.999), BASE, NORMS, WIDE, task="plain")
    with pytest.raises(NonFinite):
        admit(vector(w=torch.zeros(4, 3), b=spike * 1.001), BASE, NORMS, WIDE, task="plain")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (1, 1),
        (64, 64),
        (64.0, 64),
        (MAX_EXAMPLES, MAX_EXAMPLES),
        (MAX_EXAMPLES + 1, MAX_EXAMPLES),
        (1e18, MAX_EXAMPLES),
        (10**400, MAX_EXAMPLES),
    ],
)
def test_a_count_weighs_as_much_as_it_says_up_to_the_cap(given, wanted):
    assert weight(given, where="a") == wanted
    assert type(weight(given, where="a")) is int


def test_the_cap_can_be_set():
    assert weight(10**18, where="a", cap=7) == 7


@pytest.mark.parametrize(
    "given", [0, -1, 0.0, -0.5, 0.5, 1.5, math.nan, math.inf, -math.inf, True, False, "64", None, [64], b"64"]
)
def test_anything_else_than_a_whole_number_from_1_is_refused(given):
    with pytest.raises(BadWeight, match=r"^update of a: the example count") as caught:
        weight(given, where="update of a")
    assert caught.value.got == repr(given)


# --- norms against the base ---


def test_a_reference_norm_is_the_layers_own_or_that_of_typical_weights():
    base = Base.from_checkpoint({"w": torch.full((2, 2), 3.0), "b": torch.zeros(4), "g": torch.ones(1)})
    rms = math.sqrt(37 / 9)
    norms = BaseNorms.of(base)
    assert norms.total == pytest.approx(math.sqrt(37))
    assert norms.layers == pytest.approx({"w": 6.0, "b": 2 * rms, "g": rms})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_norms_of_a_base_are_float64_whatever_it_is_stored_as(dtype):
    base = Base.from_checkpoint({"w": torch.full((300, 300), 200.0, dtype=dtype)})
    assert BaseNorms.of(base).total == pytest.approx(60_000.0, rel=1e-12)


def test_private_layers_and_buffers_do_not_count():
    told = {"w": torch.ones(4, 3), "head": torch.full((2, 2), 1e9), "steps": torch.tensor(10**9)}
    norms = BaseNorms.of(Base.from_checkpoint(told, private=["head"]))
    assert norms == BaseNorms({"w": math.sqrt(12)}, math.sqrt(12))


def test_a_base_that_is_not_finite_is_no_measure():
    with pytest.raises(NonFinite, match="layer 'w'"):
        BaseNorms.of(Base.from_checkpoint({"w": torch.tensor([1.0, math.nan])}))


def test_a_layer_passes_up_to_its_ratio_and_is_named_beyond_it():
    limits = Limits(layer_ratio=2.0, total_ratio=100)
    admit(vector(b=torch.full((4,), 2.0)), BASE, NORMS, limits, task="plain")
    with pytest.raises(NormExceeded) as caught:
        admit(vector(b=torch.full((4,), 2.002)), BASE, NORMS, limits, task="plain")
    error = caught.value
    assert (error.layer, error.got, error.wanted) == ("b", "2 times its norm", "at most 2 times")


def test_layers_that_pass_may_be_too_large_together():
    limits = Limits(layer_ratio=2.0, total_ratio=1.0)
    admit(vector(), BASE, NORMS, limits, task="plain")
    with pytest.raises(NormExceeded, match=r"got 1.5 times its norm, wanted at most 1 times") as caught:
        admit(vector(w=torch.full((4, 3), 1.5), b=torch.full((4,), 1.5)), BASE, NORMS, limits, task="plain")
    assert caught.value.layer is None


def test_low_rank_layers_are_measured_by_their_product():
    limits = Limits(layer_ratio=2.0, total_ratio=2.0)
    small = LowRank(torch.full((4, 2), 1e6), torch.full((2, 3), 0.9e-6), (4, 3))
    admit(vector(w=small), BASE, NORMS, limits, task="plain")
    with pytest.raises(NormExceeded, match="layer 'w'"):
        admit(vector(w=small.times(1.2)), BASE, NORMS, limits, task="plain")


def test_of_a_base_of_zeros_only_the_zero_vector_is_let_in():
    base = Base.from_checkpoint({"w": torch.zeros(3)})
    norms = BaseNorms.of(base)
    says = replace(SAYS, base=base.fingerprint)
    admit(TaskVector.of({"w": torch.zeros(3)}, (), says), base, norms, task="plain")
    with pytest.raises(NormExceeded, match="wanted none, for the base is zero"):
        admit(TaskVector.of({"w": torch.full((3,), 1e-30)}, (), says), base, norms, task="plain")


def test_training_from_scratch_is_let_in_with_room_to_spare():
    stream = example(StreamOptions())
    model = stream.build_model()
    site = Site(stream, model, Base.from_model(model))
    trained, _ = site.learn(site.task("plain", 0, 1, "iid", 0), seed=0, site="a")
    norms = BaseNorms.of(site.base)
    admit(trained, site.base, norms, task="plain")
    twice = TaskVector.of({name: u.times(2.0) for name, u in trained.items()}, (), trained.manifest)
    admit(twice, site.base, norms, task="plain")


# --- statistics ---


class Grams(Average):
    name = "grams"
    needs = frozenset({"input_gram"})


class Squares(Average):
    name = "squares"
    needs = frozenset({"fisher", "second_moment"})


GRAM = {"input_gram": torch.ones(2, 3)}
FISHER = {"fisher": torch.ones(4, 3), "second_moment": torch.ones(4, 3)}
HALF = {"w": FISHER, "b": {"fisher": torch.ones(4)}}
BIAS_FISHER = {"fisher": torch.ones(4), "second_moment": torch.ones(4)}
EVERYTHING = {"w": {**GRAM, **FISHER}, "b": BIAS_FISHER}


def with_statistics(held, listed=tuple(Statistic), **layers) -> TaskVector:
    brought = vector(replace(SAYS, statistics=listed), **layers)
    return replace(brought, statistics=Statistics.of(held))


def ask(update: TaskVector, *rules) -> None:
    """As a vector in memory and as a file's."""
    for each in (update, from_bytes(to_bytes(update), "update of a")):
        admit(each, BASE, NORMS, task="plain", rules=rules)


def test_what_the_rules_need_is_enough_and_more_is_ignored():
    ask(with_statistics({"w": GRAM}, ("input_gram",)), Grams())
    ask(with_statistics({"w": FISHER, "b": BIAS_FISHER}, ("fisher", "second_moment")), Squares())
    ask(with_statistics(EVERYTHING), Grams(), Squares())
    ask(with_statistics(EVERYTHING))
    ask(with_statistics(EVERYTHING), Average())


def test_an_update_of_no_layers_need_only_list_what_the_rules_need():
    nothing = with_statistics({}, w=None, b=None, unchanged=["w", "b"])
    ask(nothing, Grams(), Squares())
    ask(with_statistics({}, w=None, unchanged=["w"]), Grams())
    with pytest.raises(StatisticsMissing, match="got no statistics"):
        ask(with_statistics({}, (), w=None, b=None, unchanged=["w", "b"]), Grams())


@pytest.mark.parametrize(
    ("held", "listed", "rule", "layer", "asks"),
    [
        ({}, (), Grams(), None, "grams asks for input_gram: got no statistics"),
        ({"b": BIAS_FISHER}, ("fisher", "second_moment"), Grams(), None, "input_gram: got fisher, second_m"),
        ({}, ("input_gram",), Grams(), "w", "grams asks for input_gram"),
        ({"b": {"input_gram": torch.ones(4)}}, ("input_gram",), Grams(), "w", "input_gram"),
        ({"w": FISHER}, ("fisher", "second_moment"), Squares(), "b", "squares asks for fisher"),
        (HALF, ("fisher", "second_moment"), Squares(), "b", "squares asks for second_moment"),
    ],
    ids=["none", "another", "listed alone", "of no matrix", "of one layer", "half"],
)
def test_a_statistic_that_a_rule_needs_is_missed_by_name(held, listed, rule, layer, asks):
    with pytest.raises(StatisticsMissing, match=asks) as caught:
        ask(with_statistics(held, listed), Average(), rule)
    assert (caught.value.layer, caught.value.where) == (layer, "update of a")
    assert "Let the client measure it" in str(caught.value)


SKETCHES = ("sketch", "residual")


def sketched(columns: int) -> dict[str, torch.Tensor]:
    return {"sketch": torch.ones(3, columns), "residual": torch.ones(1)}


@pytest.mark.parametrize(("width", "columns"), [(0.1, 1), (0.5, 2), (1.0, 3), (5.0, 15)])
def test_sketches_of_a_matrix_layer_as_wide_as_was_asked_are_enough(width, columns):
    ask(with_statistics({"w": sketched(columns)}, SKETCHES), Fot(width=width))
    with pytest.raises(ShapeMismatch, match=f"layer 'w': a sketch of another width: got 4, wanted {columns}"):
        ask(with_statistics({"w": sketched(4)}, SKETCHES), Average(), Fot(width=width))
    ask(with_statistics({"w": sketched(4)}, SKETCHES), Average())


@pytest.mark.parametrize("left_out", SKETCHES)
def test_a_sketch_and_its_residual_must_come_together(left_out):
    other = {name: values for name, values in sketched(3).items() if name != left_out}
    with pytest.raises(StatisticsMissing, match=f"fot asks for {left_out}") as caught:
        ask(with_statistics({"w": other}, SKETCHES), Fot())
    assert caught.value.layer == "w"


def test_of_every_layer_a_sketch_and_its_residual_must_come_together():
    base = Base.from_checkpoint({"one": torch.ones(2, 3), "two": torch.ones(2, 3)})
    held = {"one": sketched(3), "two": {"sketch": torch.ones(3, 3)}}
    says = Manifest(base.fingerprint, 0, "plain", "a", 1, SKETCHES)
    update = replace(
        TaskVector.of({"one": torch.ones(2, 3), "two": torch.ones(2, 3)}, (), says),
        statistics=Statistics.of(held),
    )
    with pytest.raises(StatisticsMissing, match="layer 'two': sketch or residual without the other"):
        admit(update, base, BaseNorms.of(base), task="plain", rules=[Fot()])


@pytest.mark.parametrize(
    ("held", "error"),
    [
        ({"w": {"fisher": torch.full((4, 3), math.nan)}}, NonFinite),
        ({"b": {"fisher": -torch.ones(4)}}, BadStatistic),
        ({"w": {"input_gram": torch.full((1, 3), 1e30)}}, BadStatistic),
        ({"w": {"residual": torch.full((1,), 1.5)}}, BadStatistic),
        ({"w": {"sketch": torch.ones(4, 3)}}, ShapeMismatch),
        ({"b": {"sketch": torch.ones(4, 4)}}, ShapeMismatch),
        ({"w": {"fisher": torch.ones(3, 4)}}, ShapeMismatch),
        ({"w": {"input_gram": torch.ones(12)}}, ShapeMismatch),
    ],
)
def test_statistics_that_no_data_give_are_refused_needed_or_not(held, error):
    with pytest.raises(error):
        admit(with_statistics(held), BASE, NORMS, task="plain")


# --- updates as files ---


@pytest.fixture
def path(tmp_path):
    return tmp_path / "incoming.part"


def test_an_update_is_admitted_under_the_site_that_sent_it_and_a_capped_count(path):
    save(vector(replace(SAYS, examples=10**12)), path)
    admitted = admit_update(path, BASE, NORMS, current_version=0, site="ward-7")
    assert admitted.manifest == replace(SAYS, site="ward-7", examples=MAX_EXAMPLES)
    assert admitted.examples == MAX_EXAMPLES
    assert admitted.norm == 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_and_the_vector_in_it_are_admitted_alike(path, dtype):
    torch.manual_seed(0)
    made = vector(w=LowRank(torch.randn(4, 2), torch.randn(2, 3), (4, 3)), b=torch.randn(4))
    save(made, path, dtype)
    of_file = admit_update(path, BASE, NORMS, current_version=0, site="a")
    of_vector = admit_update(from_bytes(path.read_bytes()), BASE, NORMS, current_version=0, site="a")
    assert of_file.manifest == of_vector.manifest
    assert of_file.norm == pytest.approx(of_vector.norm, rel=1e-12)


def test_a_refusal_names_the_update_and_never_the_servers_file(path):
    save(vector(b=torch.full((4,), 9.0)), path)
    with pytest.raises(NormExceeded) as caught:
        admit_update(path, BASE, NORMS, current_version=0, site="ward-7")
    assert str(caught.value).startswith("update of ward-7, layer 'b': ")
    assert str(path) not in str(caught.value)


def test_a_missing_file_is_refused_like_any_other(path):
    with pytest.raises(FileError, match="update of a: no such file"):
        admit_update(path, BASE, NORMS, current_version=0, site="a")


def test_an_update_may_be_as_large_as_the_limit_and_no_byte_larger(path):
    size = save(vector(), path)
    admit_update(path, BASE, NORMS, Limits(max_update_bytes=size), current_version=0, site="a")
    with pytest.raises(TooLarge, match=f"got {size} bytes, wanted at most {size - 1}"):
        admit_update(path, BASE, NORMS, Limits(max_update_bytes=size - 1), current_version=0, site="a")


def test_statistics_of_a_file_are_asked_for_and_checked_like_a_vectors(path):
    save(with_statistics(EVERYTHING), path)
    admitted = admit_update(path, BASE, NORMS, current_version=0, site="ward-7", rules=[Grams(), Squares()])
    assert admitted.manifest.statistics == tuple(Statistic)
    assert admitted.norm == 4.0
    save(vector(), path)
    with pytest.raises(StatisticsMissing, match=r"^update of ward-7: rule grams asks for"):
        admit_update(path, BASE, NORMS, current_version=0, site="ward-7", rules=[Grams()])


def test_statistics_count_as_bytes_of_the_update(path):
    bare = save(vector(), path)
    limits = Limits(max_update_bytes=bare)
    assert save(with_statistics(EVERYTHING), path) > bare + 4 * (6 + 12 + 12 + 4 + 4)
    with pytest.raises(TooLarge):
        admit_update(path, BASE, NORMS, limits, current_version=0, site="a")


def test_a_header_of_long_names_and_all_statistics_is_let_in(path):
    names = [f"{i}" + "\U0001f40d" * 1000 for i in range(40)]
    base = Base.from_checkpoint({name: torch.ones(2, 2) for name in names})
    gram = torch.ones(1, 2)
    held = {
        name: {"input_gram": gram, "fisher": torch.ones(2, 2), "second_moment": torch.ones(2, 2)}
        for name in names
    }
    says = replace(SAYS, base=base.fingerprint, statistics=("input_gram", "fisher", "second_moment"))
    made = TaskVector(
        tuple(names), lambda name: LowRank(torch.ones(2, 1), torch.ones(1, 2), (2, 2)), (), says
    )
    save(replace(made, statistics=Statistics.of(held)), path)
    admit_update(path, base, BaseNorms.of(base), current_version=0, site="a", rules=[Grams(), Squares()])


def test_cheap_checks_come_before_the_values_are_read(path, monkeypatch):
    monkeypatch.setattr("os.preadv", lambda *_: pytest.fail("was read"))
    save(vector(replace(SAYS, origin_version=9)), path)
    with pytest.raises(VersionMismatch):
        admit_update(path, BASE, NORMS, current_version=0, site="a")
    save(vector(b=None), path)
    with pytest.raises(MissingLayer):
        admit_update(path, BASE, NORMS, current_version=0, site="a")


@pytest.mark.parametrize(
    ("staleness", "origin", "let_in"),
    [
        (None, 0, True),
        (None, 5, False),
        (0, 5, True),
        (0, 4, False),
        (2, 3, True),
        (2, 2, False),
        (2, 0, True),
        (9, 1, True),
        (9, 6, False),
        (10**9, 10**18, False),
    ],
)
def test_an_origin_is_the_base_or_recent_enough_and_never_in_the_future(staleness, origin, let_in):
    made = vector(replace(SAYS, origin_version=origin))
    limits = Limits(max_staleness=staleness)
    if let_in:
        admit_update(made, BASE, NORMS, limits, current_version=5, site="a")
        return
    with pytest.raises(VersionMismatch, match=f"got {origin}, wanted 0"):
        admit_update(made, BASE, NORMS, limits, current_version=5, site="a")


# --- what does not depend on the content ---


def test_a_sites_share_of_a_day_is_used_up_by_count_or_by_bytes():
    limits = Limits(updates_per_day=3, bytes_per_day=100)
    check_quota(2, 90, 10, limits, "a")
    with pytest.raises(QuotaExceeded, match="got 3 updates, wanted at most 3"):
        check_quota(3, 0, 1, limits, "a")
    with pytest.raises(QuotaExceeded, match="got 90 bytes and 11 more, wanted at most 100"):
        check_quota(0, 90, 11, limits, "a")


def test_what_no_day_has_room_for_is_not_asked_to_come_back():
    with pytest.raises(TooLarge) as caught:
        check_size(101, Limits(bytes_per_day=100), "a")
    assert caught.value.retry_after is None


@pytest.mark.parametrize("check", [check_queue, check_held])
def test_a_full_queue_is_busy_and_says_when_to_come_back(check):
    limits = Limits(max_queue=2, max_held=2)
    check(1, limits)
    with pytest.raises(Busy, match="got 2 updates, wanted fewer than 2") as caught:
        check(2, limits)
    assert caught.value.retry_after


@pytest.mark.parametrize(
    ("quarantine", "new", "known"), [("none", False, False), ("new-sites", True, False), ("all", True, True)]
)
def test_whose_updates_wait_for_approval(quarantine, new, known):
    limits = Limits(quarantine=quarantine)
    assert needs_approval(limits, new_site=True) is new
    assert needs_approval(limits, new_site=False) is known


@pytest.mark.parametrize("name", ["a", "Hospital-2", "0.ward_7", "x" * 64])
def test_a_site_name_of_plain_characters_is_taken(name):
    check_site_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "-rf",
        "a/b",
        "../a",
        "a\\b",
        "a b",
        "a\n",
        "a\0",
        "é",
        "٣",
        "x" * 65,
        "a\u202e",
    ],
)
def test_a_site_name_that_could_be_a_path_or_hide_something_is_refused(name):
    with pytest.raises(ConfigError, match="a malformed site name") as caught:
        check_site_name(name)
    assert str(caught.value).isprintable()


def test_the_defaults_are_limits_and_every_limit_can_be_set():
    given = {
        "max_update_bytes": 1,
        "max_examples": 1,
        "layer_ratio": 0.5,
        "total_ratio": 0.5,
        "max_staleness": 0,
        "updates_per_day": 1,
        "bytes_per_day": 1,
        "max_queue": 1,
        "max_held": 1,
        "quarantine": "new-sites",
    }
    assert validated(Limits, {}) == LIMITS
    assert validated(Limits, given).model_dump() == given
    assert set(given) == set(Limits.model_fields)
