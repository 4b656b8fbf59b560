"""A site's own code in a process that ends again, as the SuperNode's processes will run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import timedelta
from typing import Any

from fedmerge.common.errors import ConfigError
from fedmerge.deploy.launch.processes import QUIET


def answer(function: str, *arguments: str, within: timedelta, what: str, where: str) -> Any:
    """What a function, ``module:name``, tells with :func:`tell`; all else that it prints is dropped.

    Args:
        what, where: begin the message of an error.

    Raises:
        ConfigError: it takes too long, or ends with an error; its last line says which.
    """
    module, _, name = function.partition(":")
    script = f"import sys; from {module} import {name} as ask; ask(*sys.argv[1:])"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, *arguments],
            capture_output=True,
            text=True,
            timeout=within.total_seconds(),
            env={**os.environ, **QUIET},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        got = f"more than {within.total_seconds():.0f} s"
        raise ConfigError(what, where=where, got=got) from error
    if done.returncode < 0:
        got = f"signal {-done.returncode}"
        raise ConfigError(what, where=where, got=got, do="Is there enough memory?")
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ConfigError(what, where=where, got=said[-1])
    return json.loads(done.stdout.splitlines()[-1])


def tell(found: object) -> None:
    """Prints what a process found, on a line of its own."""
    print(f"\n{json.dumps(found)}")
