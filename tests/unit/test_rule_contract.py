"""Every rule is held to the contract by some test file."""

from __future__ import annotations

import re
from pathlib import Path

from fedmerge.server.merge import RULES


def test_every_rule_has_a_test_class() -> None:
    tested = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for bases, name in re.findall(
            r"^class \w+\(([^)]*)\):.*?^    rules = \((\w+)\(", path.read_text(), re.M | re.S
        )
        if "RuleContract" in bases
    }
    assert tested == {rule.__name__ for rule in RULES.values()}
