"""Addresses of servers: ``host:port`` or ``unix:/path/to/socket``."""

from __future__ import annotations

from fedmerge.common.errors import ConfigError

UNIX = "unix:"


def host_of(address: str) -> str:
    """The host of an address; of a unix socket, the address itself.

    Raises:
        ConfigError: neither form.
    """
    host, _, port = address.rpartition(":")
    if address.startswith(UNIX):
        if address.removeprefix(UNIX):
            return address
    elif host and port.isascii() and port.isdecimal() and int(port) < 2**16:
        return host
    raise ConfigError("not an address", got=repr(address), wanted="host:port or unix:/path/to/socket")
