"""Ports of this machine: free, or in use."""

from __future__ import annotations

import os
import socket
import threading
import time

from fedmerge.common.errors import ConfigError
from fedmerge.deploy.launch.config import HostPort


def problem(address: HostPort) -> str:
    """Why nothing can listen there, in the system's words; empty if it can."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        return os.strerror(error.errno) if error.errno else str(error)
    return ""


def wait_free(address: HostPort, key: str, seconds: float, stopping: threading.Event) -> None:
    """Waits until a port can be listened on; processes of a server that was killed take seconds to go.

    Args:
        key: of the config, for the message.

    Raises:
        ConfigError: it is not free in time.
    """
    deadline = time.monotonic() + seconds
    while why := problem(address):
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{key}: cannot listen there",
                where=address,
                got=why,
                do="Stop what uses the port, or choose another.",
            )
        if stopping.wait(0.2):
            return
