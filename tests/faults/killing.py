"""Runs a small server in child processes and kills it before every step that writes; run as a script.

One parent imports everything once and forks a child per step, so that hundreds of kills take seconds.
The parent starts no thread and opens no folder itself. It prints one JSON object.

    python killing.py merges|acts|replies FOLDER [--bug NAME]
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fedmerge.common.base import Base
from fedmerge.common.records import UpdateState, VersionKind, VersionRecord
from fedmerge.common.taskvector import Manifest, TaskVector
from fedmerge.common.vectorfile import save
from fedmerge.server.aggregator import Aggregator, AggregatorSettings
from fedmerge.server.engine.local import LocalEngine
from fedmerge.server.intake import Intake
from fedmerge.server.merge import make_rule
from fedmerge.server.merging import Merging
from fedmerge.server.retention import Retention
from fedmerge.server.store.disk import Disk
from fedmerge.server.store.ledger import Ledger

SETTINGS = AggregatorSettings(retention=Retention(versions=2, vectors=1, snapshot_every=2))
GENEROUS = AggregatorSettings(retention=Retention(snapshot_every=2))
SITE = "ward-1"
VECTORS = 4
WAIT_SECONDS = 10


def base() -> Base:
    generator = torch.Generator().manual_seed(0)
    return Base.from_checkpoint(
        {"a.weight": torch.randn(6, 5, generator=generator), "a.bias": torch.zeros(6)}
    )


def vector(seed: int) -> TaskVector:
    generator = torch.Generator().manual_seed(seed)
    held = {
        name: 0.05 * torch.randn(layer.shape, generator=generator) for name, layer in base().layers.items()
    }
    return TaskVector.of(held, manifest=Manifest(base().fingerprint, 0, f"task-{seed}", SITE))


class Killing(Disk):
    """Kills this process before its ``at``-th step."""

    def __init__(self, at: int | None) -> None:
        self.at, self.steps = at, 0

    def step(self, name: str) -> None:
        self.steps += 1
        if self.steps == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def opened(folder: Path, disk: Disk, settings: AggregatorSettings) -> Aggregator:
    rule = make_rule("opcm")
    return Aggregator(
        folder,
        base(),
        rule,
        lambda: LocalEngine(rule, base().layers.values(), workers=1),
        settings,
        disk=disk,
        clock=lambda: 0.0,
    )


def merges(folder: Path, files: Path, disk: Disk, acknowledge: Callable[[str], None]) -> dict[str, Any]:
    """Four vectors, one after another; the same again after a kill."""
    with opened(folder, disk, SETTINGS) as aggregator:
        for seed in range(VECTORS):
            acknowledge(aggregator.submit(files / f"{seed}.safetensors", site=SITE).update)
            assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
        return outcome(aggregator)


def acts(folder: Path, files: Path, disk: Disk, acknowledge: Callable[[str], None]) -> dict[str, Any]:
    """Three vectors, a rollback, a removal, one more vector; what is done is not done again."""
    with opened(folder, disk, GENEROUS) as aggregator:
        done = [version.kind for version in aggregator.versions()]
        for seed in range(3):
            acknowledge(aggregator.submit(files / f"{seed}.safetensors", site=SITE).update)
            assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
        if VersionKind.ROLLBACK not in done:
            aggregator.roll_back(2, by="root")
        if VersionKind.REMOVAL not in done:
            aggregator.remove("task-0", by="root")
        acknowledge(aggregator.submit(files / "3.safetensors", site=SITE).update)
        assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
        return outcome(aggregator)


def outcome(aggregator: Aggregator) -> dict[str, Any]:
    return {
        "versions": [(v.number, v.kind, v.update, v.sha256, v.kept) for v in aggregator.versions()],
        "updates": [(u.id, u.state, u.version, u.kept) for u in aggregator.updates()],
        "failing": aggregator.status().failing,
    }


def look(folder: Path, settings: AggregatorSettings, acknowledged: list[str]) -> list[str]:
    """What is wrong with a folder after a kill, before anything new is sent."""
    with opened(folder, Disk(), settings) as aggregator:
        wrong = [aggregator.status().failing] if aggregator.status().failing else []
        aggregator._ledger.integrity_check()
        assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
        known = {update.id: update for update in aggregator.updates()}
        wrong += [f"acknowledged and gone: {each}" for each in acknowledged if each not in known]
        merged_by = [v.update for v in aggregator.versions() if v.kind is VersionKind.MERGE]
        wrong += [f"merged twice: {each}" for each in {u for u in merged_by if merged_by.count(u) > 1}]
        wrong += [
            f"acknowledged and not merged: {each.id}"
            for each in known.values()
            if each.state not in (UpdateState.MERGED, UpdateState.REMOVED)
        ]
        named: set[str] = set()
        for version in aggregator.versions():
            named |= {version.snapshot} | ({version.sha256} if version.kept else set())
            if version.kept:
                with aggregator.open_version(version.number):
                    pass
        named |= {update.sha256 for update in aggregator.updates() if update.kept}
        on_disk = {path.stem for path in (folder / "blobs").rglob("*.safetensors")}
        wrong += [f"stray file {each}" for each in on_disk - named]
        wrong += [f"missing file {each}" for each in named - on_disk - {""}]
        wrong += [str(path) for path in (folder / "incoming").iterdir()]
    return wrong


def forked(run: Callable[[], Any]) -> tuple[bool, Any]:
    """Runs in a child; whether it lived, and what it returned."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        try:
            answer = json.dumps({"result": run()})
        except BaseException as error:
            answer = json.dumps({"error": f"{type(error).__name__}: {error}"})
        os.write(write, answer.encode())
        os._exit(0)
    os.close(write)
    data = b""
    while piece := os.read(read, 65536):
        data += piece
    os.close(read)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False, None
    answer = json.loads(data)
    return True, answer.get("result", answer)


def run(
    scenario: Callable[..., dict[str, Any]], settings: AggregatorSettings, work: Path, bug: str = ""
) -> dict[str, Any]:
    """Kills before every step; with a planted bug only until that is found."""
    files = work / "files"
    files.mkdir(parents=True)
    forked(lambda: [save(vector(seed), files / f"{seed}.safetensors") for seed in range(VECTORS)])
    _, wanted = forked(lambda: scenario(work / "unbroken", files, Disk(), lambda _: None))
    if bug:
        global WAIT_SECONDS
        WAIT_SECONDS = 2
        plant(bug)
    torn: list[str] = []
    at, folder = 0, work / "state"
    while True:
        at += 1
        shutil.rmtree(folder, ignore_errors=True)
        log = work / "acknowledged"
        log.unlink(missing_ok=True)

        def attempt(at: int = at, log: Path = log) -> dict[str, Any]:
            with log.open("a") as acks:

                def acknowledge(update: str) -> None:
                    acks.write(update + "\n")
                    acks.flush()

                return scenario(folder, files, Killing(at), acknowledge)

        lived, found = forked(attempt)
        acknowledged = log.read_text().split() if log.exists() else []
        if not lived:
            _, wrong = forked(lambda acknowledged=acknowledged: look(folder, settings, acknowledged))
            torn += [f"step {at}: {each}" for each in (wrong if isinstance(wrong, list) else [wrong])]
            _, found = forked(lambda: scenario(folder, files, Disk(), lambda _: None))
        if found != wanted:
            torn.append(f"step {at}: ends as {found}, unbroken as {wanted}")
        if lived or (bug and torn):
            return {"kills": at - lived, "torn": torn}


def run_replies(work: Path, count: int = 100) -> dict[str, Any]:
    """Kills right after an update's row is committed, or right after its version is, ``count`` times.

    Nobody gets a reply; every site sends again.
    """
    files = work / "files"
    files.mkdir(parents=True)
    forked(lambda: [save(vector(seed), files / f"{seed}.safetensors") for seed in range(count)])

    def lost(seed: int) -> None:
        """Sends again what got no reply, and then something new that gets none either."""
        with opened(work / "state", Disk(), GENEROUS) as aggregator:
            if seed:
                assert aggregator.submit(files / f"{seed - 1}.safetensors", site=SITE).again
                assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
            if seed == count:
                return
            kind, name = (Ledger, "add_update") if seed % 2 else (Merging, "_make_current")
            setattr(kind, name, _killed_after(getattr(kind, name)) if seed % 2 else _killed_before)
            aggregator.submit(files / f"{seed}.safetensors", site=SITE)
            aggregator.wait_until_merged(timeout=WAIT_SECONDS)

    killed = sum(not forked(lambda seed=seed: lost(seed))[0] for seed in range(count))
    _, last = forked(lambda: lost(count))

    def straight() -> dict[str, Any]:
        with opened(work / "unbroken", Disk(), GENEROUS) as aggregator:
            for seed in range(count):
                aggregator.submit(files / f"{seed}.safetensors", site=SITE)
                assert aggregator.wait_until_merged(timeout=WAIT_SECONDS)
            return outcome(aggregator)

    def broken() -> dict[str, Any]:
        with opened(work / "state", Disk(), GENEROUS) as aggregator:
            return outcome(aggregator)

    _, wanted = forked(straight)
    _, found = forked(broken)
    torn = [] if found == wanted and last is None else [f"ends as {found}, unbroken as {wanted}, {last}"]
    merged = len({update for _, kind, update, *_ in found["versions"] if kind == VersionKind.MERGE})
    return {"kills": killed, "torn": torn, "merged": merged, "versions": len(found["versions"])}


def _killed_after(method: Callable[..., Any]) -> Callable[..., Any]:
    def killed(*arguments: Any) -> None:
        method(*arguments)
        os.kill(os.getpid(), signal.SIGKILL)

    return killed


def _killed_before(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def plant(bug: str) -> None:
    """Breaks the server on purpose."""
    if bug == "two-transactions":

        def in_two(self: Ledger, version: VersionRecord) -> None:
            with self._transaction():
                self._insert_version(version)
            self._disk.step("between")
            with self._transaction():
                self._move(
                    version.update,
                    UpdateState.STAGED,
                    "state = ?, version = ?",
                    UpdateState.MERGED,
                    version.number,
                )

        Ledger.commit_merge = in_two  # type: ignore[method-assign]
    elif bug == "acknowledged-too-early":
        Intake._stage = _staged_later(Intake._stage)  # type: ignore[method-assign]
    else:
        raise SystemExit(f"no such bug: {bug}")


def _staged_later(stage: Any) -> Any:
    def early(self: Intake, site: str, incoming: Any, blob: Any, admitted: Any) -> Any:
        found = stage(self, site, incoming, blob, admitted)
        path = self._library._blobs.path(blob.sha256)
        data = path.read_bytes()
        path.write_bytes(b"")
        self._library._blobs._disk.step("late write")
        path.write_bytes(data)
        return found

    return early


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, target = sys.argv[1:3]
    bug = sys.argv[sys.argv.index("--bug") + 1] if "--bug" in sys.argv else ""
    if name == "replies":
        print(json.dumps(run_replies(Path(target))))
        raise SystemExit
    chosen = {"merges": (merges, SETTINGS), "acts": (acts, GENEROUS)}[name]
    print(json.dumps(run(*chosen, Path(target), bug)))
