"""Commands that run beside this process: started, listened to, started again, and gone when it is.

Every command runs under ``guard``, in a session of its own, so a signal at the terminal reaches only the
process that launches, and nothing outlives it. Start commands from the main thread: on Linux a child is
told that its parent died when the *thread* that started it ends.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

from fedmerge.common.errors import ConfigError, Unreachable
from fedmerge.deploy.launch.guard import GRACE_SECONDS, SWEEP_SECONDS

logger = logging.getLogger("fedmerge.launch")

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONUNBUFFERED": "1",
}
"""For Flower's processes and Ray's: nothing phones home or installs packages, output comes at once."""

LOOPBACK = ("127.0.0.1", "localhost")

TAIL_LINES = 200
"""How many last lines of a command are kept to tell why it ended."""

RECORD_BYTES = 4 << 20
"""A command's own file of output starts anew when it is larger."""

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
FLOWER_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*(.*)")
UVICORN_LINE = re.compile(r"[\d-]{10}T[\d:.]+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) (.*)")
OUR_LINE = re.compile(r"[\d-]{10} [\d:]{8},\d{3} (DEBUG|INFO|WARNING|ERROR|CRITICAL) (fedmerge\S*) (.*)")
REQUEST_LINE = re.compile(r'.*"(GET|HEAD|POST) /\S* HTTP/[\d.]+" [23]\d\d\b.*')
CHATTER = re.compile(
    r"ControlServicer\.|\[Fleet\.(PushMessages|GetRun|GetFab)|HTTP Request: |\[uvicorn\.\w+\] |\[RUN \d+\]$|$"
)


@dataclass(frozen=True)
class Command:
    """What to run.

    Attributes:
        name: its name in the log. ``environment``: added to this process's own and to ``QUIET``.
        folder: where it runs.
    """

    name: str
    argv: tuple[str, ...]
    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Restarts:
    """How often a command may end before it is given up.

    Attributes:
        most: deaths within ``window_seconds`` that are forgiven.
        longest_pause_seconds: bound on the pause before the next start, which doubles from a second.
    """

    most: int = 8
    window_seconds: float = 600.0
    longest_pause_seconds: float = 30.0


class Running:
    """A command under way.

    Its output is logged line by line; the last lines are kept in ``tail``, and in ``NAME.log`` in its folder.
    """

    def __init__(self, command: Command) -> None:
        self.command = command
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        guard = (sys.executable, "-P", "-m", "fedmerge.deploy.launch.guard", str(os.getpid()))
        try:
            self._process = subprocess.Popen(
                (*guard, *command.argv),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=command.folder,
                env={**os.environ, **QUIET, "PATH": _path(), **command.environment},
            )
        except OSError as error:
            raise ConfigError("cannot be started", where=command.name, got=str(error)) from error
        output = self._process.stdout
        assert output is not None, "its output is a pipe"
        self._reader = threading.Thread(target=self._forward, args=(output,), daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def code(self) -> int | None:
        """The exit code; None while it runs. After the end, ``tail`` is complete."""
        code = self._process.poll()
        if code is not None:
            self._reader.join(timeout=GRACE_SECONDS)
        return code

    def ask(self) -> None:
        """Asks the command to end; ``wait`` tells when it has."""
        if self._process.poll() is None:
            self._process.terminate()

    def wait(self) -> int:
        """Waits for the end; the guard sees to it that this takes little more than its grace."""
        try:
            code = self._process.wait(timeout=2 * (GRACE_SECONDS + SWEEP_SECONDS))
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._reader.join(timeout=GRACE_SECONDS)
        return code

    def _forward(self, output: IO[bytes]) -> None:
        record = Record(record_of(self.command))
        with output:
            for line in output:
                text = COLOUR.sub("", line.decode(errors="replace")).rstrip()
                if text:
                    self.tail.append(text)
                    record.add(text)
                    level, name, message = parsed(text, self.command.name)
                    logging.getLogger(name).log(level, "%s", message)


class Record:
    """A file of a command's output since its last start; where it cannot be written, the command goes on."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, 0

    def add(self, line: str) -> None:
        """Appends a line; the first one, and one beyond ``RECORD_BYTES``, starts the file anew."""
        data = f"{line}\n".encode()
        mode = "ab" if 0 < self._size < RECORD_BYTES else "wb"
        with suppress(OSError), self._path.open(mode) as file:
            self._size = (self._size if mode == "ab" else 0) + file.write(data)


class Patience:
    """Growing pauses between the ends of one thing, and an end to them.

    Args:
        name: of what ends. ``clock``: seconds, monotonic.
    """

    def __init__(
        self, name: str, restarts: Restarts | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._name, self._restarts, self._clock = name, restarts or Restarts(), clock
        self._deaths: deque[float] = deque()
        self._again_at = 0.0

    def ended(self, how: str, why: str) -> None:
        """Notes an end: in which way, and the cause or an empty string.

        Raises:
            Unreachable: it was one too many.
        """
        now, limits = self._clock(), self._restarts
        self._deaths.append(now)
        while now - self._deaths[0] > limits.window_seconds:
            self._deaths.popleft()
        if len(self._deaths) > limits.most:
            raise Unreachable(
                "does not stay up; given up",
                where=self._name,
                got=f"{len(self._deaths)} ends within {limits.window_seconds:.0f} s, {how}",
                do=why or None,
            )
        pause = min(limits.longest_pause_seconds, 2.0 ** (len(self._deaths) - 1))
        self._again_at = now + pause
        logger.warning("%s ended, %s; it starts again in %.0f s. %s", self._name, how, pause, why)

    def over(self) -> bool:
        """Whether it may start again now."""
        return self._clock() >= self._again_at


class KeptRunning:
    """A command that is started again when it ends.

    Args:
        patience: how often. ``explain``: from the last lines of a command to why it ended and what to do;
            empty if unknown.
    """

    def __init__(
        self,
        command: Command,
        patience: Patience | None = None,
        explain: Callable[[Sequence[str]], str] = lambda _: "",
    ) -> None:
        self.command, self._explain = command, explain
        self._patience = patience or Patience(command.name)
        self.running: Running | None = Running(command)

    def look(self) -> None:
        """Notices the command's end and starts it again when its pause is over; call it about every second.

        Raises:
            Unreachable: it has ended too often; the message says why it did the last time.
        """
        if self.running is None:
            if self._patience.over():
                self.running = Running(self.command)
        elif (code := self.running.code()) is not None:
            tail, self.running = list(self.running.tail), None
            last = f"Its last line: {tail[-1]}" if tail else ""
            self._patience.ended(f"exit code {code}", self._explain(tail) or last)

    def restart(self, why: str) -> None:
        """Ends the command, so that it starts again as after any other end."""
        if self.running is not None:
            logger.warning("%s is ended: %s", self.command.name, why)
            self.running.ask()

    def stop(self) -> None:
        """Ends the command and everything it started."""
        if self.running is not None:
            self.running.ask()
            self.running.wait()
            self.running = None


class NewLines:
    """Logs the lines that another process adds to a file, from now on: Flower shows no ServerApp's output."""

    def __init__(self, path: Path, to: logging.Logger) -> None:
        self._path, self._to = path, to
        self._at = self._size()

    def look(self) -> None:
        """Logs what has come; a file that became shorter is a new one."""
        if self._size() < self._at:
            self._at = 0
        with suppress(FileNotFoundError), self._path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._at += len(line)
                self._to.info("%s", line.decode(errors="replace").rstrip())

    def _size(self) -> int:
        return self._path.stat().st_size if self._path.exists() else 0


def wait_until(
    ready: Callable[[], bool], running: Running, seconds: float, stopping: threading.Event
) -> bool:
    """Waits for a command to be of use; False if ``stopping`` was set meanwhile.

    Raises:
        Unreachable: it ended, or was not ready in time.
    """
    deadline = time.monotonic() + seconds
    while not ready():
        if stopping.wait(0.1):
            return False
        code = running.code()
        if code is not None or time.monotonic() > deadline:
            raise Unreachable(
                "did not start" if code is not None else "is not ready",
                where=running.command.name,
                got=f"exit code {code}" if code is not None else f"nothing after {seconds:.0f} s",
                do=f"Its last lines: {' | '.join(list(running.tail)[-5:])}" if running.tail else None,
            )
    return True


def settle() -> None:
    """Once, for this process and all it starts: files are their owner's alone, and this machine is reached
    without the proxy that the environment may name for others."""
    os.umask(0o077)
    named = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    direct = ",".join(filter(None, (named, *LOOPBACK)))
    os.environ.update(no_proxy=direct, NO_PROXY=direct)


@contextmanager
def until_told(stopping: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set the event; the handlers that were there come back."""

    def stop(_: int, __: FrameType | None) -> None:
        stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parsed(line: str, name: str) -> tuple[int, str, str]:
    """The level, logger and message of a line of output, whether ours, Flower's or anybody's."""
    if ours := OUR_LINE.fullmatch(line):
        level, logger_name, message = ours.groups()
        return logging.getLevelNamesMapping()[level], logger_name, message
    flower = FLOWER_LINE.fullmatch(line) or UVICORN_LINE.fullmatch(line)
    level, message = flower.groups() if flower else ("INFO", line)
    if level == "INFO" and (REQUEST_LINE.fullmatch(message) or CHATTER.match(message)):
        level = "DEBUG"
    return logging.getLevelNamesMapping()[level], f"fedmerge.{name}", message


def record_of(command: Command) -> Path:
    """Where a command's output is kept, from its last start."""
    return command.folder / f"{command.name}.log"


def executable(name: str) -> str:
    """A command of this Python environment, by its full path.

    Raises:
        ConfigError: it is not installed.
    """
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise ConfigError("not installed", where=name, do="pip install 'fedmerge[client]' or '[server]'.")
    return str(path)


def _path() -> str:
    """This environment's commands first: Flower starts its own by name."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
