"""Names of sites and admins."""

from __future__ import annotations

import re

from fedmerge.common.errors import ConfigError

SITE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)

SITE_KEY = "fedmerge-site"
"""Metadata in which callers name themselves, to servers that take their word for it."""


def check_site_name(name: str) -> None:
    """Raises ConfigError for a name that could not stand in a file name, a log line or a certificate."""
    if not SITE_NAME.fullmatch(name):
        raise ConfigError(
            "a malformed site name",
            got=ascii(name[:80]),
            wanted="1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit",
        )
