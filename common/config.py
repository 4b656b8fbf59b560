"""Settings from users, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, ValidationError

from fedmerge.common.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)

Partition = Annotated[str, Field(pattern=r"^(iid|dirichlet:(\d+(\.\d*)?|\.\d+))$")]
"""How sites share a task's rows: ``iid`` or ``dirichlet:ALPHA``."""

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
