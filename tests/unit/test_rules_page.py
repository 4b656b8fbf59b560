"""Does docs/rules.md say of every rule what its code says?"""

from __future__ import annotations

import re
import sys
from math import prod
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from rule_contract import RuleContract

from fedmerge.common.layers import LayerKind, LayerSpec
from fedmerge.common.statistics import Statistic
from fedmerge.common.taskvector import Dense
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.merge.rule import Context, State, Totals, tensors_of
from fedmerge.server.merge.sums import SumRule

PAGE = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")
ROWS = {cells[0]: cells for cells in re.findall(r"^\| `(\w+)` \|" + 6 * r" (.*?) \|" + "$", PAGE, re.M)}
STATISTICS = {
    "-": frozenset(),
    "diagonal Fisher": {Statistic.FISHER},
    "input Grams": {Statistic.INPUT_GRAM},
    "AdamW's second moments": {Statistic.SECOND_MOMENT},
    "sketches": {Statistic.SKETCH, Statistic.RESIDUAL},
}


def state_after_one(name: str, shape: tuple[int, ...], kind: LayerKind, **options: object) -> State:
    rule, layer = make_rule(name, options), LayerSpec("w", shape, torch.float32, kind)
    generator = torch.Generator().manual_seed(0)
    update = Dense(torch.randn(shape, generator=generator))
    held = {Statistic.FISHER: torch.ones(shape), Statistic.SECOND_MOMENT: torch.ones(shape)}
    context = Context(statistics={need: held[need] for need in rule.needs if need in held})
    state = rule.init(layer)
    if rule.measures:
        context = Context(statistics=context.statistics, measured=rule.measure(state, update, context))
    return rule.absorb(state, rule.prepare(state), update, context)


def size(state: State) -> int:
    return sum(values.numel() * values.element_size() for values in tensors_of(state).values())


def worth(formula: str, rows: int, columns: int) -> int:
    """A number of bytes as the table writes it, ``8 MN + 4 N(N + 1)``."""
    terms = formula.partition(",")[0].replace("MN", "M * N")
    terms = re.sub(r"(?<=[0-9rMNL]) ?(?=\()|(?<=[0-9]) (?=[rMNL])", " * ", terms)
    values = {"M": rows, "N": columns, "r": min(rows, columns), "L": max(rows, columns)}
    return int(eval(terms, {}, values))


def test_every_rule_has_its_row() -> None:
    assert set(ROWS) == set(RULES)


@pytest.mark.parametrize("name", RULES)
def test_a_row_tells_what_the_rule_asks_for_and_promises(name: str) -> None:
    _, paper, needs, _, order, removes, _ = ROWS[name]
    rule = RULES[name]
    assert STATISTICS[needs] == rule.needs
    assert (order, removes) == ("yes" if rule.order_free else "no", "yes" if rule.additive else "no")
    for number in re.findall(r"\d{4}\.\d{5}", paper):
        assert number in (sys.modules[rule.__module__].__doc__ or "")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_a_row_tells_the_bytes_of_a_matrix_layers_state(name: str, shape: tuple[int, int]) -> None:
    assert size(state_after_one(name, shape, LayerKind.MATRIX)) == worth(ROWS[name][3], *shape)


def test_the_mean_of_ties_costs_what_its_row_says() -> None:
    state = state_after_one("ties", (6, 10), LayerKind.MATRIX, merge="mean")
    assert size(state) == 16 * prod((6, 10))
    assert "`mean` 16 MN" in ROWS["ties"][3]


def test_vector_layers_cost_four_bytes_an_entry_but_where_the_page_says_so() -> None:
    (sentence,) = re.findall(r"Vector layers\s.*?\.\n", PAGE, re.S)
    elementwise = {"ties", "fisher", "perturb_and_merge", "holistic"}
    dear = {name for name in RULES if size(state_after_one(name, (12,), LayerKind.VECTOR)) != 4 * 12}
    assert dear - elementwise == set(re.findall(r"`(\w+)`", sentence))


EXAMPLE, EXAMPLE_TEST = re.findall(r"```python\n(.*?)```", PAGE, re.S)
written: dict[str, object] = {"SumRule": SumRule, "ClassVar": ClassVar, "Totals": Totals}
exec(EXAMPLE, written)
written |= {"RuleContract": RuleContract}
exec(EXAMPLE_TEST, written)
TestHalf = written["TestHalf"]
