"""Settings from users, validated once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from fedmerge.common.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)

Partition = Annotated[str, Field(pattern=r"^(iid|dirichlet:(\d+(\.\d*)?|\.\d+)|shards:[1-9]\d*)$")]
"""How sites share a task's rows: ``iid``, ``dirichlet:ALPHA`` or ``shards:K``."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""As torch, numpy and messages take it."""


def listed(text: object) -> tuple[str, ...]:
    """The items of a comma-separated setting, without blanks and empty ones."""
    return tuple(item.strip() for item in str(text).split(",") if item.strip())


def validated(kind: type[Config], settings: Mapping[str, Any]) -> Config:
    """A config from settings.

    Raises:
        ConfigError: naming the first key that is wrong, what it got and why.
    """
    try:
        return kind.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ConfigError(
            f"setting {'.'.join(map(str, first['loc']))!r}: {first['msg']}", got=repr(first.get("input"))
        ) from error


def from_json(kind: type[Config], text: str, *, where: str) -> Config:
    """A config from JSON, as it travels in a message; the defaults if there is no text.

    Raises:
        ConfigError: not JSON, or naming the first key that is wrong.
    """
    try:
        found = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"{kind.__name__} is not JSON", where=where, got=ascii(text[:40])) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{kind.__name__} is not a JSON object", where=where, got=type(found).__name__)
    return validated(kind, found)
