"""Do commands end with whoever started them, come back when they die, and speak through our log?"""

from __future__ import annotations

import logging
import os
import select
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedmerge.common.errors import ConfigError, Unreachable
from fedmerge.deploy.launch.processes import (
    Command,
    KeptRunning,
    NewLines,
    Patience,
    Restarts,
    Running,
    executable,
    parsed,
    record_of,
    settle,
    until_told,
    wait_until,
)

FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"],
    start_new_session=True,
)
print("pids", os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def python(script: str, folder: Path, *, name: str = "child", **environment: str) -> Command:
    return Command(name, (sys.executable, "-c", script), folder, environment)


def line(running: Running, start: str) -> str:
    """The first line of output that starts so, once it is there."""
    never = threading.Event()
    assert wait_until(lambda: any(text.startswith(start) for text in running.tail), running, 60, never)
    return next(text for text in running.tail if text.startswith(start))


def ended(pid: int, seconds: float = 30.0) -> bool:
    """Waits for any process to end; False if it has not in time."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


def test_stopping_takes_what_the_command_started_too(tmp_path: Path) -> None:
    running = Running(python(FAMILY, tmp_path))
    pids = [int(pid) for pid in line(running, "pids").split()[1:]]
    running.ask()
    running.wait()
    assert all(ended(pid, 0) for pid in pids)


def test_an_orphan_of_a_command_that_ends_by_itself_is_swept_up(tmp_path: Path) -> None:
    running = Running(python(FAMILY.rsplit("time.sleep(600)", 1)[0], tmp_path))
    assert running.wait() == 0
    pids = [int(pid) for pid in running.tail[0].split()[1:]]
    assert all(ended(pid, 0) for pid in pids)


def test_without_a_guard_the_same_command_leaves_its_child_behind() -> None:
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True) as bare:
        assert bare.stdout is not None
        child = int(bare.stdout.readline().split()[2])
        bare.terminate()
    try:
        assert not ended(child, 0.5)
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells of a parent's death on Linux only")
def test_killing_the_launcher_takes_everything_with_it(tmp_path: Path) -> None:
    launcher = f"""
import pathlib, sys, time
from fedmerge.deploy.launch.processes import Command, Running
running = Running(Command("child", (sys.executable, "-c", {FAMILY!r}), pathlib.Path({str(tmp_path)!r})))
while not running.tail:
    time.sleep(0.05)
print(running.pid, running.tail[0], flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        guard, _, *family = started.stdout.readline().split()
        started.kill()
    assert all(ended(int(pid)) for pid in (guard, *family))


def test_a_command_that_ignores_the_request_is_killed_after_the_grace(tmp_path: Path) -> None:
    stubborn = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )
    script = (
        "import os, sys; from fedmerge.deploy.launch import guard; guard.GRACE_SECONDS = 1\n"
        "sys.exit(guard.run(os.getppid(), [sys.executable, '-c', sys.argv[1]]))"
    )
    command = [sys.executable, "-c", script, stubborn]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as guarded:
        assert guarded.stdout is not None
        assert guarded.stdout.readline() == "up\n"
        guarded.terminate()
        assert guarded.wait(timeout=60) == 128 + signal.SIGKILL


def test_a_guard_whose_parent_is_already_gone_starts_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedmerge.deploy.launch.guard", "1", "touch", str(tmp_path / "made")]
    assert subprocess.run(command, timeout=60, check=False).returncode != 0
    assert not (tmp_path / "made").exists()


def test_a_command_has_the_quiet_environment_its_own_and_its_folder(tmp_path: Path) -> None:
    script = (
        "import os, shutil; print(os.getcwd(), os.environ['FLWR_TELEMETRY_ENABLED'], os.environ['MINE'],"
        " bool(shutil.which('fedmerge')))"
    )
    running = Running(python(script, tmp_path, MINE="yes"))
    assert running.wait() == 0
    assert list(running.tail) == [f"{tmp_path} 0 yes True"]


def test_the_exit_code_comes_through(tmp_path: Path) -> None:
    assert Running(python("raise SystemExit(7)", tmp_path)).wait() == 7


def test_output_goes_to_the_log_line_by_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fedmerge")
    before = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = True, []
    try:
        with caplog.at_level(logging.INFO, "fedmerge"):
            script = r"print('\x1b[92mINFO \x1b[0m:      hello'); print('\x1b[91mERROR\x1b[0m:   broken')"
            Running(python(script, tmp_path, name="superlink")).wait()
    finally:
        logger.propagate, logger.handlers = before
    assert [(record.name, record.levelname, record.message) for record in caplog.records] == [
        ("fedmerge.superlink", "INFO", "hello"),
        ("fedmerge.superlink", "ERROR", "broken"),
    ]


@pytest.mark.parametrize(
    ("text", "level", "name", "message"),
    [
        ("INFO :      SuperNode ID: 12", "INFO", "fedmerge.node", "SuperNode ID: 12"),
        ("WARNING :   careful", "WARNING", "fedmerge.node", "careful"),
        (
            'INFO:     127.0.0.1:5 - "POST /v1/fleet/pull-messages HTTP/1.1" 200 OK',
            "DEBUG",
            "fedmerge.node",
            None,
        ),
        (
            'INFO:     127.0.0.1:5 - "POST /v1/fleet/x HTTP/1.1" 401 Unauthorized',
            "INFO",
            "fedmerge.node",
            None,
        ),
        ("2026-01-02 03:04:05,678 WARNING fedmerge.client lost", "WARNING", "fedmerge.client", "lost"),
        ("Traceback (most recent call last):", "INFO", "fedmerge.node", "Traceback (most recent call last):"),
    ],
)
def test_lines_keep_their_level_and_polling_is_chatter(
    text: str, level: str, name: str, message: str | None
) -> None:
    found = parsed(text, "node")
    assert (logging.getLevelName(found[0]), found[1]) == (level, name)
    assert message is None or found[2] == message


class Clock:
    """Seconds that pass when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def kept(folder: Path, clock: Clock, explain: Callable[[Sequence[str]], str] = lambda _: "") -> KeptRunning:
    command = python("print('why: no key'); raise SystemExit(3)", folder)
    return KeptRunning(command, Patience("child", Restarts(2, window_seconds=100.0), clock), explain)


def let_it_end(process: KeptRunning) -> None:
    assert process.running is not None
    process.running.wait()
    process.look()


def test_a_command_that_ends_comes_back_after_a_growing_pause(tmp_path: Path) -> None:
    clock = Clock()
    process = kept(tmp_path, clock)
    for pause in (1.0, 2.0):
        let_it_end(process)
        clock.now += pause - 0.01
        process.look()
        assert process.running is None
        clock.now += 0.01
        process.look()
        assert process.running is not None
    process.stop()


def test_a_command_that_ends_too_often_is_given_up_with_the_reason(tmp_path: Path) -> None:
    clock = Clock()
    process = kept(tmp_path, clock, lambda tail: f"Register the key; it said {tail[-1]!r}.")
    for _ in range(2):
        let_it_end(process)
        clock.now += 10.0
        process.look()
    with pytest.raises(
        Unreachable, match=r"child: .*3 ends within 100 s, exit code 3.*Register the key.*no key"
    ):
        let_it_end(process)


def test_a_command_that_hangs_can_be_ended_and_comes_back(tmp_path: Path) -> None:
    clock = Clock()
    command = python("import time; time.sleep(600)", tmp_path)
    process = KeptRunning(command, Patience("child", clock=clock))
    process.restart("it does not answer")
    let_it_end(process)
    clock.now += 1.0
    process.look()
    assert process.running is not None
    process.stop()
    assert process.running is None


def test_old_deaths_are_forgiven(tmp_path: Path) -> None:
    clock = Clock()
    process = kept(tmp_path, clock)
    for _ in range(5):
        let_it_end(process)
        clock.now += 101.0
        process.look()
        assert process.running is not None
    process.stop()


def test_waiting_for_a_command_that_ends_is_an_error_with_its_last_lines(tmp_path: Path) -> None:
    running = Running(python("print('port taken'); raise SystemExit(1)", tmp_path))
    with pytest.raises(Unreachable, match=r"did not start.*exit code 1.*port taken"):
        wait_until(lambda: False, running, 60, threading.Event())


def test_waiting_ends_when_the_launcher_is_told_to_stop(tmp_path: Path) -> None:
    running, stopping = Running(python("import time; time.sleep(600)", tmp_path)), threading.Event()
    stopping.set()
    assert not wait_until(lambda: False, running, 60, stopping)
    running.ask()
    running.wait()


def test_a_command_that_is_not_installed_is_a_typed_error() -> None:
    with pytest.raises(ConfigError, match="flower-nothing: not installed"):
        executable("flower-nothing")


def test_output_since_the_last_start_is_kept_in_a_bounded_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmerge.deploy.launch.processes.RECORD_BYTES", 1000)
    command = python("for i in range(1000): print(i)", tmp_path)
    record_of(command).write_text("of an earlier start")
    Running(command).wait()
    text = record_of(command).read_text()
    assert text.endswith("999\n")
    assert len(text) < 1100
    assert "earlier" not in text


def test_a_command_goes_on_when_its_output_cannot_be_kept(tmp_path: Path) -> None:
    command = python("print('spoken')", tmp_path)
    record_of(command).mkdir()
    running = Running(command)
    assert (running.wait(), list(running.tail)) == (0, ["spoken"])


def test_lines_that_are_added_to_a_file_are_logged_once_and_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, logger = tmp_path / "events", logging.getLogger("other.events")
    path.write_text("old\n")
    lines = NewLines(path, logger)

    def heard(text: str, mode: str = "a") -> list[str]:
        with path.open(mode) as file:
            file.write(text)
        caplog.clear()
        lines.look()
        return [record.message for record in caplog.records]

    with caplog.at_level(logging.INFO, "other.events"):
        assert heard("one\ntwo\nhal") == ["one", "two"]
        assert heard("f\n") == ["half"]
        assert heard("new\n", "w") == ["new"]
        path.unlink()
        lines.look()


def test_a_signal_sets_the_event_and_earlier_handlers_come_back() -> None:
    before, stopping = signal.getsignal(signal.SIGTERM), threading.Event()
    with until_told(stopping):
        assert not stopping.is_set()
        signal.raise_signal(signal.SIGTERM)
        assert stopping.is_set()
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_proxy_of_the_environment_is_not_used_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    monkeypatch.setenv("NO_PROXY", "intern.example.org")
    monkeypatch.delenv("no_proxy", raising=False)
    before = os.umask(0o022)
    try:
        settle()
    finally:
        assert os.umask(before) == 0o077
    assert urllib.request.proxy_bypass("127.0.0.1")
    assert urllib.request.proxy_bypass("localhost")
    assert urllib.request.proxy_bypass("intern.example.org")
    assert not urllib.request.proxy_bypass("fed.example.org")
