"""Average and task arithmetic against their definitions, and how rules are made by name."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from rule_contract import LAYERS, Fold, RuleContract, gaussian, relative_difference

from fedmerge.common.errors import ConfigError
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.merge.average import Average
from fedmerge.server.merge.opcm import Opcm
from fedmerge.server.merge.task_arithmetic import TaskArithmetic

SEED = 3
ARRIVALS = [gaussian(SEED + task) for task in range(4)]


def summed(factor: float) -> dict[str, torch.Tensor]:
    return {x.name: factor * sum(a[x.name].values.double() for a in ARRIVALS) for x in LAYERS}


class TestAverage(RuleContract):
    rules = (Average(),)

    def layer_reference(self, rule, layer, vectors, contexts):
        return sum(vectors) / len(vectors)


class TestTaskArithmetic(RuleContract):
    rules = (TaskArithmetic(), TaskArithmetic(factor=1.0))

    def layer_reference(self, rule, layer, vectors, contexts):
        return rule.factor * sum(vectors)


@pytest.mark.parametrize("factor", [0.0, 0.1, 0.3, 2.0])
def test_task_arithmetic_is_a_multiple_of_the_sum(factor: float) -> None:
    fold = Fold(TaskArithmetic(factor=factor), LAYERS).merge(*ARRIVALS)
    assert relative_difference(fold.read(), summed(factor)) < 1e-6


def test_task_arithmetic_at_one_over_t_is_the_average() -> None:
    fold = Fold(TaskArithmetic(factor=0.25), LAYERS).merge(*ARRIVALS)
    assert relative_difference(fold.read(), Fold(Average(), LAYERS).merge(*ARRIVALS).read()) == 0


@pytest.mark.parametrize("rule", [Average(), TaskArithmetic()], ids=lambda rule: rule.name)
def test_any_order_of_arrival_gives_the_same_model(rule) -> None:
    wanted = Fold(rule, LAYERS).merge(*ARRIVALS).read()
    for order in permutations(ARRIVALS):
        assert relative_difference(Fold(rule, LAYERS).merge(*order).read(), wanted) < 1e-6


def test_average_of_one_vector_is_that_vector() -> None:
    merged = Fold(Average(), LAYERS).merge(ARRIVALS[0]).read()
    assert all(torch.equal(merged[name], update.values) for name, update in ARRIVALS[0].items())


def test_every_rule_is_made_by_its_name() -> None:
    assert {name: type(make_rule(name)) for name in RULES} == RULES
    assert all(rule.name == name for name, rule in RULES.items())


def test_options_reach_the_rule() -> None:
    assert make_rule("opcm", {"alpha": 0.25, "diagonal": "left"}) == Opcm(alpha=0.25, diagonal="left")


def test_unknown_rule_is_refused_naming_all_rules() -> None:
    with pytest.raises(ConfigError) as raised:
        make_rule("ocpm")
    assert all(part in str(raised.value) for part in ("no such merge rule", "'ocpm'", *RULES))


def test_unknown_option_is_refused_naming_rule_option_and_all_options() -> None:
    with pytest.raises(ConfigError) as raised:
        make_rule("opcm", {"alhpa": 0.5})
    parts = ("'opcm'", "'alhpa'", "got 0.5", "alpha=0.5", "diagonal='cleared'")
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_option_for_a_rule_without_options_says_so() -> None:
    with pytest.raises(ConfigError, match="This rule has no options"):
        make_rule("average", {"factor": 0.5})


@pytest.mark.parametrize(
    ("rule", "option", "value", "bound"),
    [
        ("opcm", "alpha", 1.5, "less than or equal to 1"),
        ("opcm", "alpha", -0.1, "greater than or equal to 0"),
        ("opcm", "diagonal", "clear", "'cleared' or 'left'"),
        ("task_arithmetic", "factor", 2.5, "less than or equal to 2"),
    ],
)
def test_value_out_of_range_is_refused_naming_rule_option_value_and_range(rule, option, value, bound) -> None:
    with pytest.raises(ConfigError) as raised:
        make_rule(rule, {option: value})
    parts = (repr(rule), repr(option), f"got {value!r}", bound)
    assert all(part in str(raised.value) for part in parts), str(raised.value)
