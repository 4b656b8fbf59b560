"""Does a run say how far it is, on a screen and in a file?"""

import io

import pytest
from rich.console import Console

from fedmerge.deploy.progress import RunProgress

EVENTS = (
    {"at": 0.5, "event": "learning", "methods": ["fot", "fedavg"]},
    {"at": 2.25, "event": "trained", "site": "ward-1", "task": "cats"},
    {"at": 3.0, "event": "published", "task": "cats", "version": 1},
    {"at": 4.0, "event": "failed", "site": "ward-2", "task": "dogs", "phase": "train", "reason": "no rows"},
)


def shown(terminal: bool) -> str:
    written = io.StringIO()
    progress = RunProgress(Console(file=written, force_terminal=terminal, width=100, color_system=None))
    with progress.run(1, 1, 1):
        for event in EVENTS:
            progress.follow(event)
    return written.getvalue()


def test_in_a_file_every_version_is_a_line_with_its_time():
    lines = [line.strip() for line in shown(terminal=False).splitlines()]
    assert "0.5 s  learning for fot, fedavg" in lines
    assert "3.0 s  version 1: cats" in lines


def test_on_a_screen_bars_tell_it():
    written = shown(terminal=True)
    assert "merging" in written
    assert "learning for fot" not in written


@pytest.mark.parametrize("terminal", [True, False])
def test_failures_are_lines_of_their_own(terminal):
    assert "failed train dogs ward-2: no rows" in shown(terminal)
