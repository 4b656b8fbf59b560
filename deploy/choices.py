"""Rules and methods as users write them on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

from fedmerge.common.compression import Compression
from fedmerge.common.config import listed
from fedmerge.common.errors import ConfigError
from fedmerge.common.training import LocalTraining
from fedmerge.server.merge import RULES, make_rule
from fedmerge.server.merge.rule import Rule
from fedmerge.server.methods import Method, check_owners, make_method

DEFAULT_RULES = "least_interference,opcm,average"
"""What is compared unless something is asked for."""


def parse_rules(names: str, settings: Sequence[str], one: bool = False) -> list[Rule]:
    """Rules from ``--rule a,b``, where ``all`` stands for every one, and ``--set [RULE.]OPTION=VALUE``.

    Raises:
        ConfigError: an unknown rule or option, a value out of range, or a setting of no chosen rule.
    """
    chosen = _named(names)
    if not chosen or (one and len(chosen) > 1):
        raise ConfigError("name one rule" if one else "name at least one rule", got=repr(names))
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        owner, option, value = _split(setting, chosen)
        if owner not in chosen:
            raise ConfigError(
                "not a setting of a chosen rule",
                got=repr(setting),
                wanted=" or ".join(f"{name}.OPTION=VALUE" for name in chosen),
            )
        options.setdefault(owner, {})[option] = value
    return [make_rule(name, options.get(name)) for name in chosen]


def parse_methods(
    rules: str | None, methods: str, train: str, compress: str, settings: Sequence[str]
) -> tuple[list[Method], dict[str, Any] | None]:
    """Methods from ``--rule``, ``--method``, ``--train``, ``--compress``, and what ``--set privacy.`` says.

    With several ways to compress, each method is run in all of them, under the name ``METHOD+WAY``.

    Raises:
        ConfigError: an unknown name or option, a value out of range, or a setting of nothing that is in use.
    """
    names = [*_named(rules if rules is not None or methods else DEFAULT_RULES), *listed(methods)]
    if not names:
        raise ConfigError("name at least one rule or method", got=repr(rules))
    options: dict[str, dict[str, Any]] = {}
    for setting in settings:
        owner, option, value = _split(setting, names)
        if not owner:
            raise ConfigError("not a setting", got=repr(setting), wanted="OWNER.OPTION=VALUE")
        options.setdefault(owner, {})[option] = value
    privacy = options.pop("privacy", None)
    ways = tuple(dict.fromkeys(listed(compress))) or ("none",)
    for way in ways:
        Compression.parse(way)
    found = [make_method(name, options, listed(train), way) for name in dict.fromkeys(names) for way in ways]
    check_owners(options, found)
    if len(ways) > 1:
        found = [replace(method, name=f"{method.name}+{method.compress}") for method in found]
    return found, privacy


def parse_trained(names: str, train: str, settings: Sequence[str]) -> tuple[list[Rule], LocalTraining]:
    """Rules, and the training of the vectors that all of them merge.

    Raises:
        ConfigError: as :func:`parse_rules` and :func:`parse_methods` do.
    """
    parse_rules(names, [])
    methods, privacy = parse_methods(names, "", train, "none", settings)
    if privacy is not None:
        raise ConfigError("rules are compared without noise", got="privacy settings")
    return [method.rule for method in methods], methods[0].training


def _split(setting: str, names: Sequence[str]) -> tuple[str, str, object]:
    """Owner, option and value of ``OWNER.OPTION=VALUE``; the owner may be left out where there is one name.

    The owner is empty where the setting is not of this form.
    """
    key, equals, value = setting.partition("=")
    owner, _, option = key.rpartition(".")
    if not owner and len(names) == 1:
        owner = names[0]
    return owner if equals and option else "", option, _value(value)


def _named(names: str | None) -> list[str]:
    """Rules by name, ``all`` standing for every one."""
    return list(
        dict.fromkeys(chain.from_iterable(RULES if n == "all" else (n,) for n in listed(names or "")))
    )


def _value(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
