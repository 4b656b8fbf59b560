"""The benchmark of all rules on a tiny model: what it reports, never how fast it was."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedmerge.common.errors import ConfigError
from fedmerge.deploy.bench.rules import RulesBench, bench_rules, print_rules
from fedmerge.server.merge import RULES, make_rule


@pytest.fixture(scope="module", params=[None, 2], ids=["dense", "lora"])
def result(request: pytest.FixtureRequest) -> RulesBench:
    return bench_rules([make_rule(name) for name in RULES], "tiny", request.param, tasks=2, seed=5)


def test_every_rule_is_measured_in_every_part(result: RulesBench) -> None:
    assert [cost.rule for cost in result.costs] == list(RULES)
    for cost in result.costs:
        assert cost.prepare.samples == cost.absorb.samples == cost.read.samples == 1
        assert cost.state_bytes > 0


def test_opcm_is_its_own_yardstick(result: RulesBench) -> None:
    opcm = next(cost for cost in result.costs if cost.rule == "opcm")
    assert (opcm.arrival_ratio, opcm.whole_ratio) == (1.0, 1.0)
    other = next(cost for cost in result.costs if cost.rule == "average")
    assert other.arrival_ratio == pytest.approx(other.arrival / opcm.arrival)


def test_opcm_is_measured_too_where_it_was_not_asked_for() -> None:
    found = bench_rules([make_rule("average")], "tiny", tasks=2)
    assert [cost.rule for cost in found.costs] == ["opcm", "average"]


def test_state_is_counted_in_task_vectors(result: RulesBench) -> None:
    average = next(cost for cost in result.costs if cost.rule == "average")
    assert average.state_ratio == pytest.approx(1.0, abs=0.05) or result.vectors != "Gaussian, full rank"


def printed(result: RulesBench, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    print_rules(result, console)
    return console.export_text()


def test_table_names_every_rule_in_a_narrow_terminal_too(result: RulesBench) -> None:
    assert all(name in printed(result, 80) for name in RULES)


def test_table_tells_its_units(result: RulesBench) -> None:
    text = printed(result, 160)
    assert all(word in text for word in ("absorb s", "read s", "arrival / OPCM", "state MB", "seed 5"))


def test_json_round_trips(result: RulesBench) -> None:
    assert RulesBench.model_validate_json(result.model_dump_json()) == result


def test_one_arrival_is_refused() -> None:
    with pytest.raises(ConfigError, match="too few tasks"):
        bench_rules([make_rule("average")], "tiny", tasks=1)
