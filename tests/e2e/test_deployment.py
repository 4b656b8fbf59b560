"""The real thing on one machine: TLS, registered keys, a server and its sites as processes that get killed.

One run tells the whole story, because every step of Flower takes seconds; the tests look at what it left.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fedmerge.client.site import open_site
from fedmerge.client.tasks import StreamOptions
from fedmerge.common.records import Status, VersionKind, VersionRecord
from fedmerge.common.remote import RemoteAggregator
from fedmerge.common.taskvector import TaskVector
from fedmerge.common.vectorfile import load
from fedmerge.deploy.authority import Authority
from fedmerge.deploy.doctor import Check, check_client, check_server
from fedmerge.deploy.launch.config import ClientConfig, ServerConfig, read_config

pytestmark = [pytest.mark.deployment, pytest.mark.ray]

TASK_OF = {"first": "plain", "second": "shuffled", "late": "reversed"}
COMMAND = "from fedmerge.deploy.cli import main; main()"

SERVER = """
[model]
base = "fedmerge.deploy.streams.example:build_model"
[tls]
ca = "certs/ca.crt"
cert = "certs/server/server.crt"
key = "certs/server/server.key"
crl = "certs/crl.pem"
[service]
listen = "127.0.0.1:{grpc}"
[flower]
listen = "127.0.0.1:{fleet}"
superlink_port = {superlink}
sites = "certs/sites"
[serving]
announce_seconds = 60.0
evaluate = false
[metrics]
listen = ""
"""

CLIENT = """
[site]
name = "{name}"
task = "example"
held = ["{task}"]
state = "{name}"
[server]
address = "localhost:{fleet}"
port = {port}
[tls]
ca = "certs/sites/{name}/ca.crt"
key = "certs/sites/{name}/supernode.key"
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [one.getsockname()[1] for one in sockets]


@dataclass
class Stage:
    """A folder with a server's and three sites' settings, and what runs in it."""

    folder: Path
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        """``server`` or a site; its log is in NAME.log."""
        side = "server" if name == "server" else "client"
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                [sys.executable, "-c", COMMAND, side, "--config", str(self.folder / f"{name}.toml")],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env=os.environ | {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2"},
            )

    def until(self, condition: Callable[[], object], what: str, seconds: float = 120.0) -> None:
        """Waits for something that these processes do; fails when one of them ends meanwhile."""
        deadline = time.monotonic() + seconds
        while not condition():
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            assert not ended, f"{what}: {ended} ended"
            assert time.monotonic() < deadline, f"not after {seconds:.0f} s: {what}"
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """As a power cut would: nothing in it can react."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def end(self, *names: str) -> dict[str, int]:
        """Asks them to end, all at once, and returns their exit codes."""
        ending = {name: self.running.pop(name) for name in names}
        for process in ending.values():
            process.send_signal(signal.SIGTERM)
        return {name: process.wait(timeout=90) for name, process in ending.items()}

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def processes(self, name: str) -> set[int]:
        """Everything that runs for one of them, found by its folder in environment or arguments."""
        state = os.fsencode(self.folder / ("state" if name == "server" else name))
        config = os.fsencode(self.folder / f"{name}.toml")
        found = set()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                facts = (entry / "environ").read_bytes() + b"\0" + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if state + b"/" in facts or config in facts:
                found.add(int(entry.name))
        return found

    def superlink(self) -> int:
        """The SuperLink's process id; its guard comes with the same arguments after its own."""
        for pid in self.processes("server"):
            argv = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(argument.endswith(b"/flower-superlink") for argument in argv[:2]):
                return pid
        raise AssertionError("no SuperLink")

    def ray_processes(self) -> set[int]:
        """Ray's processes of the server, by their parent."""
        server = self.running["server"].pid
        parents = {int(e.parent.name): int(e.read_text().rpartition(")")[2].split()[1]) for e in stats()}
        names = {
            pid: Path(f"/proc/{pid}/comm").read_text().strip()
            for pid, parent in parents.items()
            if parent == server
        }
        return {pid for pid, name in names.items() if name in ("raylet", "gcs_server")}

    def ask(self) -> RemoteAggregator:
        """The aggregator, through the socket in its state folder."""
        return RemoteAggregator(f"unix:{self.folder / 'state' / 'aggregator.sock'}")

    def version(self) -> int:
        with self.ask() as aggregator:
            return aggregator.status().version

    def events(self, kind: str) -> list[dict[str, object]]:
        """What the serving run has written down."""
        path = self.folder / "state" / "flower" / "serving" / "history.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]


def stats() -> Iterator[Path]:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        if entry.exists():
            yield entry


def alive(pids: set[int]) -> set[int]:
    """Those that still run; a zombie does not."""
    left = set()
    for pid in pids:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        left |= {pid} if state != "Z" else set()
    return left


@dataclass
class Story:
    """What was seen on the way and at the end."""

    stage: Stage
    merged_before: int = 0
    left_after_client_kill: set[int] = field(default_factory=set)
    left_after_server_kill: set[int] = field(default_factory=set)
    left_at_the_end: set[int] = field(default_factory=set)
    version_after_restart: int = 0
    runs_after_superlink_kill: int = 0
    late_got: list[int] = field(default_factory=list)
    checks: dict[str, list[Check]] = field(default_factory=dict)
    status: Status | None = None
    versions: list[VersionRecord] = field(default_factory=list)
    merged: TaskVector | None = None
    codes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Two sites bring a task each, one is killed, the server is killed and comes back, a third is late and
    the SuperLink is killed while it learns."""
    folder = tmp_path_factory.mktemp("deployment")
    grpc, fleet, superlink, *ports = free_ports(3 + len(TASK_OF))
    authority = Authority.create(folder / "certs")
    authority.server(["localhost"])
    (folder / "server.toml").write_text(SERVER.format(grpc=grpc, fleet=fleet, superlink=superlink))
    for (name, task), port in zip(TASK_OF.items(), ports, strict=True):
        authority.site(name)
        (folder / f"{name}.toml").write_text(CLIENT.format(name=name, task=task, fleet=fleet, port=port))
    stage = Stage(folder)
    told = Story(stage)
    started = time.monotonic()
    try:
        play(told, stage)
        told.seconds = time.monotonic() - started
        yield told
    except AssertionError as error:
        logs = "".join(
            f"\n--- {path.name}\n{path.read_text()[-6000:]}" for path in sorted(folder.glob("*.log"))
        )
        raise AssertionError(f"{error}{logs}") from error
    finally:
        for process in stage.running.values():
            process.kill()
            process.wait()


def play(told: Story, stage: Stage) -> None:
    stage.start("server")
    stage.until(lambda: " serving\n" in stage.log("server"), "the server serves")
    stage.start("first")
    stage.start("second")
    stage.until(lambda: stage.version() == 2, "two tasks are merged")
    told.merged_before = stage.version()

    of_first = stage.processes("first")
    stage.kill("first")
    stage.until(lambda: not alive(of_first), "everything of the killed site is gone", 30)
    told.left_after_client_kill = stage.processes("first")

    of_server = stage.processes("server") | stage.ray_processes()
    stage.kill("server")
    stage.until(lambda: not alive(of_server), "everything of the killed server is gone", 30)
    told.left_after_server_kill = alive(of_server) | stage.processes("server")

    serving = stage.log("server").count(" serving\n")
    stage.start("server")
    stage.until(lambda: stage.log("server").count(" serving\n") > serving, "the server serves again")
    told.version_after_restart = stage.version()
    told.checks["server"] = check_server(read_config(ServerConfig, stage.folder / "server.toml"))
    stage.start("late")
    stage.until(lambda: late_versions(stage), "the late site has the current version")
    told.late_got = late_versions(stage)
    runs = stage.log("server").count("Created run ")
    os.kill(stage.superlink(), signal.SIGKILL)
    stage.until(lambda: stage.version() == 3, "the late site's task is merged")
    told.runs_after_superlink_kill = stage.log("server").count("Created run ") - runs
    told.checks["client"] = check_client(read_config(ClientConfig, stage.folder / "second.toml"))

    with stage.ask() as aggregator:
        told.status, told.versions = aggregator.status(), aggregator.versions()
        aggregator.fetch(stage.folder / "merged.safetensors")
        told.merged = load(stage.folder / "merged.safetensors")
    everything = (
        set().union(*(stage.processes(name) for name in ("server", *TASK_OF))) | stage.ray_processes()
    )
    told.codes = stage.end("second", "late", "server")
    told.left_at_the_end = alive(everything)


def late_versions(stage: Stage) -> list[int]:
    return [int(str(event["version"])) for event in stage.events("published") if event["site"] == "late"]


def test_two_sites_tasks_are_merged_over_tls_with_registered_keys(story: Story) -> None:
    assert story.merged_before == 2
    assert [(record.site, record.task) for record in story.versions if record.kind is VersionKind.MERGE] == [
        *sorted(TASK_OF.items(), key=lambda pair: merge_order(story, pair[0]))
    ]


def merge_order(story: Story, site: str) -> int:
    return [record.site for record in story.versions].index(site)


def test_killing_a_site_leaves_none_of_its_processes(story: Story) -> None:
    assert story.left_after_client_kill == set()


def test_killing_the_server_leaves_none_of_its_processes(story: Story) -> None:
    assert story.left_after_server_kill == set()


def test_a_killed_server_comes_back_with_every_version(story: Story) -> None:
    assert story.version_after_restart == 2
    assert [record.number for record in story.versions if record.kind is VersionKind.MERGE] == [1, 2, 3]


def test_a_late_site_gets_the_current_version_before_it_learns(story: Story) -> None:
    assert story.late_got == [2]


def test_a_killed_superlink_is_started_again_under_a_run_that_goes_on(story: Story) -> None:
    assert "superlink ended, exit code 137" in story.stage.log("server")
    assert story.runs_after_superlink_kill == 0
    assert story.versions[-1].site == "late"


def test_nothing_was_merged_twice(story: Story) -> None:
    assert story.status is not None
    assert (story.status.version, story.status.merged) == (3, 3)
    assert sorted(story.status.tasks) == sorted(TASK_OF.values())


def test_the_merged_model_is_good_at_every_task(story: Story) -> None:
    site = open_site("example", StreamOptions())
    tasks = [site.stream.load(name) for name in site.stream.tasks]
    before = {name: score.accuracy for name, score in site.score(tasks).items()}
    after = {name: score.accuracy for name, score in site.score(tasks, story.merged).items()}
    for task in TASK_OF.values():
        assert after[task] > before[task] + 0.2, (before, after)


def test_the_doctor_finds_nothing_wrong_on_either_side(story: Story) -> None:
    for side, checks in story.checks.items():
        assert [str(check) for check in checks if check.verdict == "FAIL"] == [], side
        assert {"clocks", "certificate"} & {check.name for check in checks}


def test_everything_ends_cleanly_and_nothing_is_left(story: Story) -> None:
    assert story.codes == {"second": 0, "late": 0, "server": 0}
    assert story.left_at_the_end == set()


def test_no_secret_is_in_a_log_or_argument(story: Story) -> None:
    folder = story.stage.folder
    secret = (folder / "state" / "flower" / "superexec.secret").read_bytes().hex()
    logs = "".join(path.read_text() for path in folder.rglob("*.log"))
    assert secret not in logs
    assert "PRIVATE KEY" not in logs
