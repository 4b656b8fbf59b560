"""Does the audit log keep what happened, one line each, and notice when somebody touches it?"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedmerge.common.errors import StoreDamaged, StoreFull
from fedmerge.deploy.cli import audit_command
from fedmerge.server import audit as audit_module
from fedmerge.server.audit import START, Audit, verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "audit.jsonl"


def entries(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def three_lines(path: Path) -> list[str]:
    with Audit(path) as audit:
        for number in range(3):
            audit.record("merged", "hospital-1", version=number)
    return path.read_text().splitlines(keepends=True)


def test_a_line_says_when_what_and_who_in_a_file_for_the_owner_alone(path: Path) -> None:
    with Audit(path) as audit:
        audit.record("merged", "hospital-1", version=1, norm=0.5, again=False, task=None)
    (entry,) = entries(path)
    assert str(entry.pop("at")).endswith("Z")
    facts = {"version": 1, "norm": 0.5, "again": False, "task": None}
    assert entry == {"event": "merged", "who": "hospital-1", **facts, "prev": START}
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "trick", ["\n", "\r\n", "\u2028", "\x85", "\x1b[2K", "\0", "\ud800", '"}\n{"event":"x"}']
)
def test_names_cannot_forge_lines(path: Path, trick: str) -> None:
    with Audit(path) as audit:
        audit.record("refused", f"site{trick}", reason=trick)
        audit.record("merged", "hospital-1")
    assert [entry["event"] for entry in entries(path)] == ["refused", "merged"]
    assert path.read_bytes().isascii()
    assert entries(path)[0]["who"] == f"site{trick}"
    assert verify(path).lines == 2


def test_neither_private_keys_nor_objects_get_into_the_log(path: Path) -> None:
    with Audit(path) as audit:
        audit.record("refused", "a", reason="-----BEGIN EC PRIVATE KEY-----\nMHc", norm=float("nan"))
        with pytest.raises(AssertionError):
            audit.record("refused", "a", tensor=[1.0, 2.0])  # type: ignore[arg-type]
        audit.record("refused", "a" * 5000)
    first, last = entries(path)
    assert (first["reason"], first["norm"]) == ("(left out)", "nan")
    assert last["who"] == "a" * 1000


def test_the_log_goes_on_where_it_ended(path: Path) -> None:
    three_lines(path)
    with Audit(path) as audit:
        audit.record("opened", "server")
    found = verify(path)
    assert (found.lines, found.head) == (4, audit.head)


@pytest.mark.parametrize("number", [0, 1])
def test_a_changed_line_is_noticed(path: Path, number: int) -> None:
    lines = three_lines(path)
    lines[number] = lines[number].replace("hospital-1", "hospital-2")
    path.write_text("".join(lines))
    with pytest.raises(StoreDamaged, match=rf"audit.jsonl, line {number + 2}: the line before was changed"):
        verify(path)


@pytest.mark.parametrize("number", [0, 1])
def test_a_removed_line_is_noticed(path: Path, number: int) -> None:
    lines = three_lines(path)
    del lines[number]
    path.write_text("".join(lines))
    with pytest.raises(StoreDamaged, match=f"line {number + 1}: the line before was changed or removed"):
        verify(path)


def test_an_inserted_line_and_one_that_is_no_json_are_noticed(path: Path) -> None:
    lines = three_lines(path)
    for extra in (lines[1], "{nonsense\n", "[]\n", "\n"):
        path.write_text("".join([*lines[:2], extra, lines[2]]))
        with pytest.raises(StoreDamaged, match="line 3"):
            verify(path)


def test_what_only_a_copy_of_the_head_shows(path: Path) -> None:
    lines = three_lines(path)
    head = verify(path).head
    path.write_text("".join(lines[:2]))
    assert verify(path).head != head


@pytest.mark.parametrize("cut", [1, 20, -1])
def test_a_torn_last_line_is_cut_off_and_told(path: Path, cut: int) -> None:
    lines = three_lines(path)
    path.write_text("".join(lines[:2]) + lines[2][:cut])
    with pytest.raises(StoreDamaged, match="line 3: not a whole line"):
        verify(path)
    Audit(path).close()
    assert entries(path)[-1]["event"] == "torn"
    assert entries(path)[-1]["bytes"] == len(lines[2][:cut])
    assert verify(path).lines == 3


def test_kill_9_in_the_middle_of_writing_loses_no_line_that_was_recorded(path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from fedmerge.server.audit import Audit\n"
        "audit = Audit(Path(sys.argv[1]), max_bytes=2000, keep=1000)\n"
        "for number in range(10**9):\n"
        "    audit.record('merged', 'a', number=number); print(number, flush=True)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    try:
        told = [int(child.stdout.readline()) for _ in range(100)]
    finally:
        child.kill()
        told += [int(line) for line in child.stdout.read().split()]
        child.wait()
    with Audit(path) as audit:
        audit.record("opened", "server")
    assert verify(path).lines >= len(told) + 1


def test_rotation_keeps_the_chain_and_so_many_files(path: Path) -> None:
    with Audit(path, max_bytes=300, keep=2) as audit:
        for number in range(20):
            audit.record("merged", "a", number=number)
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    found = verify(path)
    assert found.head == audit.head
    assert found.lines == sum(len(entries(path.with_name(name))) for name in names)
    assert all(path.with_name(name).stat().st_mode & 0o777 == 0o600 for name in names)
    (path.with_name("audit.jsonl.1")).unlink()
    with pytest.raises(StoreDamaged):
        verify(path)


def test_a_start_right_after_a_rotation_goes_on_with_the_chain(path: Path) -> None:
    three_lines(path)
    path.rename(path.with_name("audit.jsonl.1"))
    with Audit(path) as audit:
        audit.record("opened", "server")
    assert verify(path).lines == 4


def test_threads_do_not_break_the_chain(path: Path) -> None:
    with Audit(path, sync=False) as audit:

        def work(who: str) -> None:
            for number in range(50):
                audit.record("merged", who, number=number)

        threads = [threading.Thread(target=work, args=(f"site-{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verify(path).lines == 400


@pytest.mark.parametrize("step", ["write", "short write", "fsync"])
def test_a_full_disk_is_told_and_leaves_the_log_as_it_was(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Audit(path) as audit:
        audit.record("merged", "a")
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            if step == "short write":
                write = os.write
                patch.setattr(audit_module.os, "write", lambda file, data: write(file, data[:10]))
            else:
                patch.setattr(audit_module.os, step, full)
            with pytest.raises(StoreFull, match=r"audit.jsonl"):
                audit.record("merged", "b")
        assert path.read_bytes() == before
        audit.record("merged", "c")
    assert verify(path).lines == 2


def test_a_link_in_the_log_s_place_is_not_followed(path: Path) -> None:
    path.symlink_to(path.with_name("elsewhere"))
    with pytest.raises(StoreFull, match="cannot be opened"):
        Audit(path)


def test_a_closed_log_takes_no_lines(path: Path) -> None:
    audit = Audit(path)
    audit.close()
    with pytest.raises(StoreFull):
        audit.record("merged", "a")


def test_the_command_says_whether_the_log_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "audit.jsonl"
    log = Audit(path)
    log.record("merged", "ward-1", version=1)
    log.record("merged", "ward-2", version=2)
    log.close()
    audit_command(path, head=log.head)
    assert f"2 lines, none changed; head {log.head}" in capsys.readouterr().out
    with pytest.raises(StoreDamaged, match="another one"):
        audit_command(path, head="0" * 64)
    path.write_text(path.read_text().replace("ward-1", "ward-3"))
    with pytest.raises(StoreDamaged):
        audit_command(path)
