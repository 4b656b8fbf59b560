"""Runs one command and leaves nothing of it behind, however either side ends.

``python -m fedmerge.deploy.launch.guard PARENT COMMAND...``, where PARENT is the process that starts it.
The guard ends with the command's exit code. On SIGTERM, and when PARENT dies (Linux), it asks the command
to end, kills it after ``GRACE_SECONDS``, and then ends whatever the command had started: orphaned
descendants become the guard's own children. When the guard itself is killed, the command dies with it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 8
SWEEP_SECONDS = 3

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def run(parent: int, command: list[str]) -> int:
    """Runs a command to its end and sweeps up after it; returns an exit code as a shell gives it."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the kernel was told to tell
        return 128 + signal.SIGTERM
    child = subprocess.Popen(command, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL))

    def end(*_: int | FrameType | None) -> None:
        child.terminate()
        signal.alarm(GRACE_SECONDS)

    def kill(*_: int | FrameType | None) -> None:
        child.kill()

    signal.signal(signal.SIGALRM, kill)
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    code = child.wait()
    sweep()
    return code if code >= 0 else 128 - code


def sweep() -> None:
    """Ends this process's children, and those who become so when their parents die, until none is left.

    They are asked once, and killed ``SWEEP_SECONDS`` later.
    """
    deadline = time.monotonic() + SWEEP_SECONDS
    asked: set[int] = set()
    while children := set(_children(os.getpid())):
        late = time.monotonic() > deadline
        for child in children if late else children - asked:
            os.kill(child, signal.SIGKILL if late else signal.SIGTERM)
        asked |= children
        for child in children:
            os.waitpid(child, 0 if late else os.WNOHANG)
        time.sleep(0.02)


def _children(parent: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(fields[1]) == parent:
            yield int(entry.parent.name)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(run(int(sys.argv[1]), sys.argv[2:]))
