"""Does a model of 1.1 GB travel out and its update back, in ranges, over a real SuperLink and SuperNode?

The model is bfloat16; the update is float32, 1.1 GB for the half of the layers that are trained. Takes
minutes: ``pytest -m slow -s tests/e2e/test_large_model.py``. It prints how long every leg took, the peak
memory of every process, and how often the SuperLink's database was locked.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.deployment]

LAYERS = 33
WIDTH = 4096
MODEL_BYTES = 2 * LAYERS * WIDTH * WIDTH
"""bfloat16: 1.107 GB."""
TRAINED = 16
UPDATE_BYTES = 4 * TRAINED * WIDTH * WIDTH
"""float32 of the layers that are trained: 1.074 GB."""
TIMEOUT = 540.0
LOCKED = "database is locked"
MARK = f"FEDMERGE_LARGE_MODEL_TEST={os.getpid()}"
"""In the environment of every process that this test starts."""

STREAM = f'''
"""A large model and a task that moves half of its layers a little."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from fedmerge.client.tasks import Stream, Task, TrainingConfig


class Large(nn.Module):
    def __init__(self):
        super().__init__()
        for index in range({LAYERS}):
            drawn = torch.randn({WIDTH}, {WIDTH}, generator=torch.Generator().manual_seed(index))
            self.register_parameter(f"layer{{index:02d}}", nn.Parameter(drawn.bfloat16()))


def load(name):
    rows = TensorDataset(torch.ones(2, 1))
    return Task(name, rows, rows, loss, lambda model, batch: torch.ones(len(batch[0])))


def loss(model, batch):
    return sum(weight.float().mean() for weight in model.parameters() if weight.requires_grad)


def stream(options):
    frozen = tuple(f"layer{{index:02d}}" for index in range({TRAINED}, {LAYERS}))
    training = TrainingConfig(steps=1, batch_size=2, learning_rate=1e-2, frozen=frozen)
    return Stream("large", ("large",), load, Large, training)
'''

SERVER = '''
"""A serving ServerApp over a service that has one version to give and takes one update."""

import json
import shutil
import time
from pathlib import Path

from flwr.serverapp import ServerApp

from fedmerge.common.errors import NotFound
from fedmerge.common.records import Receipt, UpdateRecord, UpdateState, VersionKind, VersionRecord, update_id
from fedmerge.common.ranges import RangeManifest
from fedmerge.common.vectorfile import load
from fedmerge.server.journal import Journal
from fedmerge.server.peers import ServingSettings
from fedmerge.server.serving import Serving

app = ServerApp()


class Service:
    def __init__(self, folder, model):
        self.folder, self.model, self.taken = folder, model, []
        self.released = VersionRecord(1, VersionKind.MERGE, 0, 0.0, sha256=RangeManifest.of(model).sha256)

    def submit(self, source, *, site):
        sha256, task = RangeManifest.of(source).sha256, load(source).manifest.task
        shutil.copyfile(source, self.folder / "update.safetensors")
        size, number, state = source.stat().st_size, update_id(site, sha256), UpdateState.MERGED
        self.taken.append(UpdateRecord(1, number, site, task, state, sha256, size, 1, 0, 1.0, 0.0))
        return Receipt(number, UpdateState.MERGED)

    def updates(self, after=0, limit=100):
        return [record for record in self.taken if record.seq > after]

    def version(self, number=None):
        return self.released

    def fetch(self, into, version=None, dtype="f32"):
        into.hardlink_to(self.model)
        return self.released


@app.main()
def main(grid, context):
    folder = Path(context.run_config["folder"])
    service = Service(folder, folder / "model.safetensors")
    journal = Journal(folder / "history.jsonl")
    settings = ServingSettings(dtype="bf16", evaluate=False, timeout_seconds=150)
    serving = Serving(grid, context.run_config["base"], service, settings, journal, folder / "serving")
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        serving.step()
        if service.taken and any(peer.holds[0] == 1 for peer in serving.peers.values()):
            break
        time.sleep(1)
    journal.close()
'''


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class Peaks:
    """Largest resident memory in MB by kind of process, sampled from everything below this process."""

    KINDS = ("flwr-serverapp", "flwr-clientapp", "flower-superlink", "flower-supernode", "flower-superexec")

    def __init__(self) -> None:
        self.megabytes: dict[str, int] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peaks:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            for process in Path("/proc").glob("[0-9]*"):
                try:
                    words = (process / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    status = (process / "status").read_text()
                    mine = MARK.encode() in (process / "environ").read_bytes()
                except OSError:
                    continue
                kind = next((kind for kind in self.KINDS if any(kind in word for word in words[:3])), None)
                if kind and mine:
                    peak = int(status.partition("VmHWM:")[2].split()[0]) // 1000
                    self.megabytes[kind] = max(self.megabytes.get(kind, 0), peak)


@contextmanager
def process(*command: str, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        started = subprocess.Popen(
            command, env=env, cwd=log.parent, stdout=out, stderr=out, start_new_session=True
        )
        try:
            yield started
        finally:
            os.killpg(started.pid, 15)
            try:
                started.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, 9)


def make_model(path: Path, base: str) -> None:
    """A merged vector of the whole model in bfloat16."""
    import torch

    from fedmerge.common.vectorfile import FORMAT
    from fedmerge.common.writing import write_checkpoint

    layout = {f"layer{index:02d}": ((WIDTH, WIDTH), torch.bfloat16) for index in range(LAYERS)}
    lists = dict.fromkeys(("statistics", "unchanged"), "[]")
    metadata = {
        "format": FORMAT,
        "base": base,
        "origin_version": "0",
        "task": "",
        "site": "",
        "examples": "1",
    }
    generator = torch.Generator().manual_seed(99)

    def read(name: str) -> torch.Tensor:
        return torch.randn(WIDTH, WIDTH, generator=generator).bfloat16()

    write_checkpoint(path, layout, read, {**metadata, **lists, "low_rank": "{}"})


@pytest.fixture(scope="module")
def transfer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, Peaks]]:
    """The folder of one run out and back, and peak memory."""
    if "slow" not in str(request.config.getoption("-m")):
        pytest.skip("takes minutes; ask for it with -m slow")
    from fedmerge.common.base import Base
    from fedmerge.common.lookup import find_function

    folder = tmp_path_factory.mktemp("large")
    (folder / "large.py").write_text(STREAM)
    stream = find_function(f"{folder / 'large.py'}:stream", where="test")(None)
    base = Base.from_model(stream.build_model()).fingerprint
    make_model(folder / "model.safetensors", base)
    port = free_port()
    lay_out(folder, port, base)
    env = os.environ | {
        "FLWR_HOME": str(folder / "flwr"),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        **dict([MARK.split("=")]),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    node = f'stream="{folder}/large.py:stream" site-name="a" state="{folder}/site" device="cpu"'
    link = f"127.0.0.1:{port}"
    with ExitStack() as stack:
        peaks = stack.enter_context(Peaks())
        database = ("--database", str(folder / "state.db"))
        superlink = ("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port), *database)
        stack.enter_context(process(*superlink, env=env, log=folder / "superlink.log"))
        wait_for(port)
        supernode = ("flower-supernode", "--insecure", "--superlink", link, "--port", str(free_port()))
        site_env = env | {"FLWR_HOME": str(folder / "flwr-site")}
        stack.enter_context(
            process(*supernode, "--node-config", node, env=site_env, log=folder / "supernode.log")
        )
        run = subprocess.run(
            ["flwr", "run", str(folder / "app"), "lab", "--stream"],
            env=env,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )
    (folder / "run.log").write_text(run.stdout + run.stderr)
    assert (folder / "update.safetensors").exists(), run.stdout[-3000:] + run.stderr[-3000:]
    print(f"\nseconds: {legs_of(folder)}\npeak MB: {peaks.megabytes}\nlocked: {locked(folder)} times")
    yield folder, peaks
    shutil.rmtree(folder)


def lay_out(folder: Path, port: int, base: str) -> None:
    for name in ("flwr", "flwr-site", "app"):
        (folder / name).mkdir()
    (folder / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "lab"\n[superlink.lab]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    (folder / "app" / "large_server.py").write_text(SERVER)
    (folder / "app" / "pyproject.toml").write_text(
        '[project]\nname = "large"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
        'dependencies = []\n[tool.flwr.app]\npublisher = "test"\n[tool.flwr.app.components]\n'
        'serverapp = "large_server:app"\nclientapp = "fedmerge.client.app:app"\n[tool.flwr.app.config]\n'
        f'folder = "{folder}"\nbase = "{base}"\n'
    )


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise AssertionError("the SuperLink does not listen")


def locked(folder: Path) -> int:
    """How often a process has logged that the database was locked."""
    return sum(path.read_text(errors="replace").count(LOCKED) for path in folder.glob("*.log"))


def legs_of(folder: Path) -> dict[str, float]:
    """Seconds from the first message of each kind to the event that ends it."""
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]

    def at(event: str, **facts: str) -> float:
        return float(next(e["at"] for e in events if e["event"] == event and facts.items() <= e.items()))

    return {
        "out": round(at("published") - at("sent", message="query.publish"), 1),
        "train": round(at("trained") - at("sent", message="train"), 1),
        "back": round(at("received") - at("sent", message="query.get_shard"), 1),
        "whole": round(events[-1]["at"] - events[0]["at"], 1),
    }


def test_the_model_arrives_bit_for_bit(transfer) -> None:
    from fedmerge.client.state import SiteState

    folder, _ = transfer
    held = SiteState(folder / "site").merged
    assert held is not None
    assert held.stat().st_size >= MODEL_BYTES
    assert subprocess.run(["cmp", str(held), str(folder / "model.safetensors")], check=False).returncode == 0


def test_the_update_arrives_whole(transfer) -> None:
    from fedmerge.common.vectorfile import load

    folder, _ = transfer
    path = folder / "update.safetensors"
    vector = load(path)
    assert path.stat().st_size >= UPDATE_BYTES
    assert len(vector.names) == TRAINED
    assert vector.read("layer00").sum_of_squares() > 0


def test_the_server_holds_a_few_ranges_and_not_the_model(transfer) -> None:
    """Flower needs about three times a message; two messages may be on their way."""
    _, peaks = transfer
    assert peaks.megabytes["flwr-serverapp"] < 1500
