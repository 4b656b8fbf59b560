"""The ledger: what was acknowledged, what became of it, and what it refuses to note."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from fedmerge.common.errors import (
    ConfigError,
    Duplicate,
    NotFound,
    StateError,
    StoreDamaged,
    StoreLocked,
    VersionMismatch,
)
from fedmerge.common.records import Refusal, UpdateRecord, UpdateState, VersionKind, VersionRecord, update_id
from fedmerge.server.store import ledger as module
from fedmerge.server.store.disk import Disk
from fedmerge.server.store.ledger import Act, Identity, Ledger

IDENTITY = Identity("b" * 64, "opcm", {"alpha": 0.5, "diagonal": "cleared"})
STAGED, HELD, MERGED = UpdateState.STAGED, UpdateState.HELD, UpdateState.MERGED


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path, IDENTITY, Disk())) as opened:
        yield opened


def reopened(folder: Path, identity: Identity = IDENTITY) -> closing[Ledger]:
    return closing(Ledger(folder, identity, Disk()))


def sha(number: int) -> str:
    return f"{number:064x}"


def add(
    ledger: Ledger, number: int, state: UpdateState = STAGED, site: str = "north", at: float = 1.0
) -> UpdateRecord:
    return ledger.add_update(site, f"task-{number}", state, sha(number), 100 + number, 10, 0, 0.5, at)


def merge(ledger: Ledger, update: UpdateRecord) -> VersionRecord:
    current = ledger.current()
    version = VersionRecord(
        current.number + 1,
        VersionKind.MERGE,
        current.number,
        at=2.0,
        update=update.id,
        task=update.task,
        site=update.site,
        examples=update.examples,
        merges=current.merges + 1,
        norm_sum=current.norm_sum + update.norm,
        update_norm=update.norm,
        state_norm=0.75,
        scale=0.25,
        lambda_t=4.0,
        merged_norm=0.1,
        sha256=sha(1000 + current.number),
        size=77,
        seconds=0.125,
    )
    ledger.commit_merge(version)
    return version


def merged(ledger: Ledger, number: int) -> VersionRecord:
    return merge(ledger, add(ledger, number))


def act(ledger: Ledger, kind: VersionKind, parent: int, task: str = "") -> VersionRecord:
    number = ledger.current().number + 1
    return VersionRecord(number, kind, parent, at=3.0, task=task, by="ada")


# Updates


def test_an_update_is_read_back_as_it_was_entered_also_after_a_restart(
    ledger: Ledger, tmp_path: Path
) -> None:
    entered = add(ledger, 1)
    assert entered == UpdateRecord(
        1, update_id("north", sha(1)), "north", "task-1", STAGED, sha(1), 101, 10, 0, 0.5, 1.0
    )
    assert ledger.update(entered.id) == entered
    ledger.close()
    with reopened(tmp_path) as again:
        found = again.update(entered.id)
        assert found == entered
        assert isinstance(found.state, UpdateState)
        assert found.kept is True


def test_the_same_bytes_from_one_site_are_one_update_and_from_two_sites_two(ledger: Ledger) -> None:
    first = add(ledger, 1)
    with pytest.raises(Duplicate, match=first.id):
        add(ledger, 1)
    second = add(ledger, 1, site="south")
    assert [update.seq for update in ledger.updates(0, 10)] == [1, 2]
    assert ledger.update_with_content(sha(1)) == first
    assert ledger.update("f" * 32) is None
    ledger.set_state(first.id, UpdateState.FAILED, "no room", expect=STAGED)
    assert ledger.update_with_content(sha(1)) == second


def test_turns_are_taken_in_the_order_of_acknowledgement(ledger: Ledger) -> None:
    assert ledger.next_staged() is None
    held, first, second = add(ledger, 1, HELD), add(ledger, 2), add(ledger, 3)
    assert ledger.next_staged() == first
    ledger.set_state(held.id, STAGED, expect=HELD)
    assert ledger.next_staged() == replace(held, state=STAGED)
    merge(ledger, held)
    merge(ledger, first)
    assert ledger.next_staged() == second


def test_updates_are_listed_page_by_page_and_by_state(ledger: Ledger) -> None:
    for number in range(6):
        add(ledger, number, HELD if number % 2 else STAGED)
    assert [update.seq for update in ledger.updates(2, 3)] == [3, 4, 5]
    assert [update.seq for update in ledger.updates(2, 10, HELD)] == [4, 6]
    assert (ledger.count(HELD), ledger.count(STAGED), ledger.count(MERGED)) == (3, 3, 0)


def test_usage_counts_a_site_s_own_updates_from_a_time_on(ledger: Ledger) -> None:
    for number, at in ((1, 10.0), (2, 20.0), (3, 30.0)):
        add(ledger, number, at=at)
    add(ledger, 4, site="south", at=30.0)
    assert ledger.site_usage("north", 20.0) == (2, 102 + 103)
    assert ledger.site_usage("nowhere", 0.0) == (0, 0)


def test_a_state_changes_only_from_the_expected_one(ledger: Ledger) -> None:
    update = add(ledger, 1, HELD)
    with pytest.raises(StateError, match="got held, wanted staged"):
        ledger.set_state(update.id, UpdateState.FAILED, expect=STAGED)
    assert ledger.update(update.id) == update
    ledger.set_state(update.id, UpdateState.REJECTED, "too large", expect=HELD)
    assert ledger.update(update.id) == replace(update, state=UpdateState.REJECTED, reason="too large")
    with pytest.raises(NotFound):
        ledger.set_state("f" * 32, STAGED, expect=HELD)


def test_a_failed_update_can_be_staged_again_unless_its_bytes_are_gone(ledger: Ledger) -> None:
    for number in (1, 2):
        ledger.set_state(add(ledger, number).id, UpdateState.FAILED, "out of memory", expect=STAGED)
    first, second = ledger.updates(0, 2)
    ledger.set_state(first.id, STAGED, expect=UpdateState.FAILED)
    assert ledger.next_staged() == replace(first, state=STAGED, reason="")
    ledger.forget_vector(second.id)
    with pytest.raises(StateError, match="a_waiting_update_is_kept"):
        ledger.set_state(second.id, STAGED, expect=UpdateState.FAILED)


@pytest.mark.parametrize("state", [STAGED, HELD])
def test_the_bytes_of_a_waiting_update_are_not_forgotten(ledger: Ledger, state: UpdateState) -> None:
    update = add(ledger, 1, state)
    with pytest.raises(StateError, match="a_waiting_update_is_kept"):
        ledger.forget_vector(update.id)
    assert ledger.names(update.sha256)


@pytest.mark.parametrize("state", [MERGED, UpdateState.REMOVED])
def test_no_update_is_merged_or_removed_without_a_version(ledger: Ledger, state: UpdateState) -> None:
    update = add(ledger, 1)
    with pytest.raises(StateError, match="a_merged_update_has_its_version"):
        ledger.set_state(update.id, state, expect=STAGED)
    with pytest.raises(StateError, match="a_merged_update_has_its_version"):
        add(ledger, 2, state)
    assert ledger.updates(0, 10) == [update]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sha256": "short"},
        {"size": -1},
        {"examples": 0},
        {"origin_version": -1},
        {"norm": -1.0},
        {"norm": float("nan")},
    ],
    ids=str,
)
def test_a_row_that_makes_no_sense_is_not_entered(ledger: Ledger, wrong: dict[str, object]) -> None:
    row = {
        "sha256": sha(1),
        "size": 1,
        "examples": 1,
        "origin_version": 0,
        "norm": 1.0,
        "at": 1.0,
        "site": "north",
        "task": "task",
        "state": STAGED,
    }
    with pytest.raises(StateError, match="constraint failed"):
        ledger.add_update(**row | wrong)  # type: ignore[arg-type]
    assert ledger.updates(0, 10) == []


# Versions


def test_a_new_ledger_is_at_the_base(ledger: Ledger) -> None:
    base = ledger.current()
    assert (base.number, base.kind, base.parent, base.merges) == (0, VersionKind.BASE, 0, 0)
    assert ledger.version(0) == base
    assert ledger.version(1) is None
    assert ledger.versions(0, 10) == []
    assert list(ledger.lineage(0)) == []
    assert ledger.kept_versions() == []


def test_a_merge_enters_the_version_and_marks_the_update(ledger: Ledger, tmp_path: Path) -> None:
    update = add(ledger, 1)
    version = merge(ledger, update)
    assert ledger.update(update.id) == replace(update, state=MERGED, version=1)
    assert ledger.current() == ledger.version(1) == version
    ledger.close()
    with reopened(tmp_path) as again:
        assert again.current() == version
        assert isinstance(again.current().kind, VersionKind)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_only_the_next_number_is_committed(ledger: Ledger, number: int) -> None:
    first, second = merged(ledger, 1), add(ledger, 2)
    with pytest.raises(StateError, match=f"got {number}, wanted 2"):
        ledger.commit_merge(replace(first, number=number, update=second.id))
    with pytest.raises(StateError, match=f"got {number}, wanted 2"):
        ledger.commit_act(replace(act(ledger, VersionKind.ROLLBACK, 0), number=number))
    assert (ledger.current(), ledger.next_staged()) == (first, second)


def test_an_update_is_merged_once_and_only_if_staged(ledger: Ledger) -> None:
    first = merged(ledger, 1)
    for update, error in (
        (first.update, StateError),
        (add(ledger, 2, HELD).id, StateError),
        ("f" * 32, NotFound),
    ):
        with pytest.raises(error):
            ledger.commit_merge(replace(first, number=2, parent=1, update=update))
    assert ledger.current() == first


def test_the_tables_themselves_refuse_a_second_merge_of_an_update(ledger: Ledger, tmp_path: Path) -> None:
    merged(ledger, 1)
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as other:
        columns = ", ".join(f'"{row[1]}"' for row in other.execute("PRAGMA table_info(versions)"))
        assert columns.startswith('"number"')
        second = columns.replace('"number"', "2", 1)
        with pytest.raises(sqlite3.IntegrityError, match="UNIQUE"):
            other.execute(f"INSERT INTO versions ({columns}) SELECT {second} FROM versions WHERE number = 1")


def test_a_rollback_is_a_version_and_an_act(ledger: Ledger) -> None:
    first = merged(ledger, 1)
    merged(ledger, 2)
    back = replace(act(ledger, VersionKind.ROLLBACK, 1), sha256=first.sha256, size=first.size)
    ledger.commit_act(back)
    assert ledger.current() == back
    assert ledger.acts(10) == [Act(3.0, "ada", "rollback", "version 3 from version 1")]
    assert ledger.count(MERGED) == 2


def test_a_removal_marks_what_was_taken_out(ledger: Ledger) -> None:
    for number in (1, 2):
        merged(ledger, number)
    first, second = ledger.updates(0, 2)
    ledger.commit_act(act(ledger, VersionKind.REMOVAL, 2, "task-1"), [first.id])
    assert ledger.updates(0, 2) == [replace(first, state=UpdateState.REMOVED), second]
    assert ledger.acts(1)[0].detail == "version 3 from version 2 without task 'task-1'"


def test_an_act_on_an_update_that_is_not_merged_changes_nothing(ledger: Ledger) -> None:
    merged(ledger, 1)
    first, staged = ledger.updates(0, 1)[0], add(ledger, 2)
    with pytest.raises(StateError, match="got staged, wanted merged"):
        ledger.commit_act(act(ledger, VersionKind.REMOVAL, 1), [first.id, staged.id])
    assert ledger.updates(0, 2) == [first, staged]
    assert ledger.current().number == 1
    assert ledger.acts(10) == []


def test_the_lineage_of_a_version_skips_what_was_rolled_back(ledger: Ledger) -> None:
    merged(ledger, 1)
    merged(ledger, 2)
    ledger.commit_act(act(ledger, VersionKind.ROLLBACK, 1))
    merged(ledger, 4)
    ledger.commit_act(act(ledger, VersionKind.REMOVAL, 4))
    assert [version.number for version in ledger.lineage(5)] == [5, 4, 3, 1]
    assert [version.number for version in ledger.lineage(2)] == [2, 1]
    with pytest.raises(NotFound):
        next(ledger.lineage(6))


def test_the_ledger_can_be_used_from_other_threads_while_a_lineage_is_read(ledger: Ledger) -> None:
    for number in range(3):
        merged(ledger, number)
    reading = ledger.lineage(3)
    next(reading)
    with ThreadPoolExecutor(1) as other:
        other.submit(merged, ledger, 7).result(timeout=30)
    assert [version.number for version in reading] == [2, 1]


def test_versions_are_listed_page_by_page(ledger: Ledger) -> None:
    for number in range(5):
        merged(ledger, number)
    assert [version.number for version in ledger.versions(1, 2)] == [2, 3]


def test_snapshots_and_vectors_come_and_go(ledger: Ledger) -> None:
    first, second = merged(ledger, 1), merged(ledger, 2)
    ledger.set_snapshot(1, sha(50), 500)
    assert ledger.snapshots() == [replace(first, snapshot=sha(50))]
    ledger.drop_snapshot(1)
    assert ledger.snapshots() == []
    ledger.drop_blob(1)
    assert ledger.version(1) == replace(first, kept=False)
    assert ledger.kept_versions() == [second]
    changes: list[Callable[[], None]] = [
        lambda: ledger.set_snapshot(9, sha(50), 500),
        lambda: ledger.drop_snapshot(9),
        lambda: ledger.drop_blob(9),
        lambda: ledger.forget_vector("f" * 32),
    ]
    for change in changes:
        with pytest.raises(NotFound):
            change()


def test_a_blob_is_named_as_long_as_anything_kept_is_in_it(ledger: Ledger) -> None:
    version = merged(ledger, 1)
    update = ledger.updates(0, 1)[0]
    ledger.set_snapshot(1, version.sha256, 1)
    for sha256, release in (
        (update.sha256, [lambda: ledger.forget_vector(update.id)]),
        (version.sha256, [lambda: ledger.drop_blob(1), lambda: ledger.drop_snapshot(1)]),
    ):
        for step in release:
            assert ledger.names(sha256)
            step()
        assert not ledger.names(sha256)


# Refusals and acts


def test_refusals_are_counted_for_good_and_kept_up_to_a_number(ledger: Ledger, tmp_path: Path) -> None:
    refusals = [
        Refusal(float(n), "north", "task", sha(n), n, "NonFinite" if n % 3 else "Busy", f"reason {n}")
        for n in range(10)
    ]
    for refusal in refusals:
        ledger.add_refusal(refusal, keep=4)
    assert ledger.refusals(100) == refusals[:-5:-1]
    assert ledger.refusals(2) == [refusals[9], refusals[8]]
    ledger.close()
    with reopened(tmp_path) as again:
        assert again.refusal_counts() == {"Busy": 4, "NonFinite": 6}


def test_acts_are_read_newest_first(ledger: Ledger) -> None:
    ledger.add_act(1.0, "ada", "approve", "update 1")
    ledger.add_act(2.0, "bob", "reject", "update 2")
    assert ledger.acts(10) == [Act(2.0, "bob", "reject", "update 2"), Act(1.0, "ada", "approve", "update 1")]
    assert len(ledger.acts(1)) == 1


# Opening


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base": "c" * 64}, "another base.*wanted b{64}"),
        ({"rule": "average"}, "another rule: got average, wanted opcm"),
        ({"options": {"alpha": 0.4, "diagonal": "cleared"}}, r"another options: got .*0\.4.*, wanted .*0\.5"),
    ],
)
def test_a_folder_made_with_another_identity_is_refused(
    ledger: Ledger, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        reopened(tmp_path, replace(IDENTITY, **change))  # type: ignore[arg-type]
    assert "another state folder" in str(caught.value)


def test_the_order_of_options_does_not_matter(ledger: Ledger, tmp_path: Path) -> None:
    with reopened(tmp_path, replace(IDENTITY, options={"diagonal": "cleared", "alpha": 0.5})):
        pass


def test_a_ledger_of_newer_software_is_refused_untouched(ledger: Ledger, tmp_path: Path) -> None:
    ledger.close()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as other:
        other.execute(f"PRAGMA user_version = {module.SCHEMA_VERSION + 1}")
    before = (tmp_path / "ledger.sqlite").read_bytes()
    with pytest.raises(VersionMismatch, match="format 2, wanted format 1"):
        reopened(tmp_path)
    assert (tmp_path / "ledger.sqlite").read_bytes() == before


def test_another_database_is_not_a_ledger(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite")) as other:
        other.execute("CREATE TABLE t (x)")
    with pytest.raises(StoreDamaged, match="not a ledger"):
        reopened(tmp_path)


def test_what_an_unfinished_start_left_is_made_anew(tmp_path: Path) -> None:
    for name in ("ledger.sqlite.new", "ledger.sqlite.new-journal"):
        (tmp_path / name).write_bytes(b"half a database")
    with reopened(tmp_path) as ledger:
        assert ledger.current().number == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ledger.sqlite"]


def test_the_integrity_check_finds_a_broken_reference(ledger: Ledger, tmp_path: Path) -> None:
    merged(ledger, 1)
    ledger.integrity_check()
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as other:
        other.execute("DELETE FROM versions WHERE number = 1")
    with pytest.raises(StoreDamaged):
        ledger.integrity_check()


def test_every_commit_is_synced(ledger: Ledger) -> None:
    pragmas = {
        name: ledger._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2}


# From many sides


def test_threads_get_numbers_without_gaps_and_one_wins_a_duplicate(ledger: Ledger) -> None:
    def enter(number: int) -> int:
        try:
            return add(ledger, number // 2).seq
        except Duplicate:
            return 0

    with ThreadPoolExecutor(8) as threads:
        numbers = sorted(threads.map(enter, range(100)))
    assert numbers == [0] * 50 + list(range(1, 51))


def test_another_program_that_holds_the_ledger_is_named_as_the_reason(ledger: Ledger, tmp_path: Path) -> None:
    ledger._db.execute("PRAGMA busy_timeout = 0")
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(StoreLocked, match="another program"):
            add(ledger, 1)
    assert add(ledger, 1).seq == 1


def test_numbers_beyond_the_database_are_not_found(ledger: Ledger) -> None:
    with pytest.raises(NotFound):
        ledger.version(2**63)


def test_a_closed_ledger_says_so(ledger: Ledger) -> None:
    ledger.close()
    ledger.close()
    with pytest.raises(StateError, match="closed"):
        ledger.current()
    with pytest.raises(StateError, match="closed"):
        add(ledger, 1)
