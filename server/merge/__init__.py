"""Merge rules, by name."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from fedmerge.common.errors import ConfigError
from fedmerge.server.merge.average import Average
from fedmerge.server.merge.opcm import Opcm
from fedmerge.server.merge.rule import Rule
from fedmerge.server.merge.task_arithmetic import TaskArithmetic

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (Opcm, Average, TaskArithmetic)}


def make_rule(name: str, options: Mapping[str, object] | None = None) -> Rule:
    """A rule by name with validated options.

    Raises:
        ConfigError: an unknown rule or option, or a value out of range, with what would be right.
    """
    if name not in RULES:
        raise ConfigError("no such merge rule", got=repr(name), wanted=" or ".join(sorted(RULES)))
    kind = RULES[name]
    try:
        return kind.model_validate(dict(options or {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        option = ".".join(map(str, first["loc"])) or "options"
        what = "no such option" if first["type"] == "extra_forbidden" else first["msg"]
        raise ConfigError(
            f"rule {name!r}, option {option!r}: {what}", got=repr(first.get("input")), do=_known(kind)
        ) from error


def _known(kind: type[Rule]) -> str:
    defaults = ", ".join(f"{name}={field.default!r}" for name, field in kind.model_fields.items())
    return f"Options and defaults: {defaults}." if defaults else "This rule has no options."
