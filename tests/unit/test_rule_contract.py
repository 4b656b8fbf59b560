"""Every rule keeps the contract."""

from __future__ import annotations

import pytest
from rule_contract import RuleContract

from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.merge.rule import Rule

WITH_OPTIONS = [
    *((name, {}) for name in sorted(RULES)),
    ("opcm", {"diagonal": "left"}),
    ("opcm", {"alpha": 0.0}),
    ("opcm", {"alpha": 1.0}),
    ("task_arithmetic", {"factor": 1.0}),
]


@pytest.fixture(params=WITH_OPTIONS, ids=lambda p: "-".join([p[0], *(f"{k}={v}" for k, v in p[1].items())]))
def rule(request: pytest.FixtureRequest) -> Rule:
    return make_rule(*request.param)


class TestEveryRule(RuleContract):
    """Runs the contract."""
