"""Is every record one line, in both forms, and nobody else's output touched?"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

import pytest

from fedmerge.common.logs import log_to_stderr

HOSTILE = "site a\n2026-01-01 00:00:00,000 ERROR forged\r\x1b[31mred\u2028end"


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """The lines on standard error; fedmerge's logger is as at the start of a process."""
    logger = logging.getLogger("fedmerge")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers.clear()
    logger.propagate = True  # or the test runner puts a handler of its own on it
    last = logging.lastResort
    assert last is not None
    yield lambda: capsys.readouterr().err.splitlines()
    last.setFormatter(None)
    logger.handlers[:], logger.level, logger.propagate = before


def test_a_text_record_is_one_line_whatever_it_holds(logged: Callable[[], list[str]]) -> None:
    log_to_stderr()
    logging.getLogger("fedmerge.server").warning("refused %s", HOSTILE)
    (line,) = logged()
    assert "WARNING fedmerge.server refused site a\\n2026" in line
    assert "\x1b" not in line


def test_a_json_record_is_one_line_that_parses_back(logged: Callable[[], list[str]]) -> None:
    log_to_stderr(form="json")
    logging.getLogger("fedmerge.server").error("refused %s", HOSTILE)
    (line,) = logged()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"]) == (
        "error",
        "fedmerge.server",
        f"refused {HOSTILE}",
    )
    assert entry["time"].endswith("+00:00")


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_stays_on_the_record_s_line(logged: Callable[[], list[str]], form: str) -> None:
    log_to_stderr(form=form)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("fedmerge.server").exception("merge failed")
    (line,) = logged()
    assert "merge failed" in line
    assert "ValueError: broken" in line


def test_records_below_the_level_are_left_out(logged: Callable[[], list[str]]) -> None:
    log_to_stderr("warning")
    logging.getLogger("fedmerge.server").info("quiet")
    logging.getLogger("fedmerge.server").warning("heard")
    assert [line.split()[-1] for line in logged()] == ["heard"]


def test_a_second_call_changes_nothing(logged: Callable[[], list[str]]) -> None:
    log_to_stderr(form="json")
    log_to_stderr(form="text")
    logging.getLogger("fedmerge").info("once")
    (line,) = logged()
    assert json.loads(line)["message"] == "once"


def test_other_libraries_are_not_logged(logged: Callable[[], list[str]]) -> None:
    log_to_stderr()
    logging.getLogger("somebody.else").info("not ours")
    assert logged() == []


def test_what_nobody_handles_is_a_line_of_the_same_form(logged: Callable[[], list[str]]) -> None:
    """Python prints such records itself; a web server's complaint must not break a collector's lines."""
    log_to_stderr(form="json")
    others, root = logging.getLogger("somebody.else"), logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        others.warning("refused %s", HOSTILE)
    finally:
        root.handlers = handlers
    (line,) = logged()
    assert json.loads(line)["message"] == f"refused {HOSTILE}"
