"""Does ``fedmerge server`` start, answer, recover and stop, with nothing of Flower or Ray under it?"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fedmerge.common.errors import ConfigError, UnknownLayer
from fedmerge.common.remote import RemoteAggregator
from fedmerge.deploy.launch.config import Model
from fedmerge.deploy.launch.server import open_model

RUN = """
import sys
from pathlib import Path
from fedmerge.common.errors import FedmergeError
from fedmerge.common.logs import log_to_stderr
from fedmerge.deploy.launch.config import ServerConfig, read_config
from fedmerge.deploy.launch.server import run_server
log_to_stderr()
try:
    run_server(read_config(ServerConfig, Path(sys.argv[1])))
except FedmergeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""

SETTINGS = """
[model]
base = "fedmerge.deploy.streams.example:build_model"
[engine]
ray_address = "none"
[service]
listen = ""
[metrics]
listen = ""
[flower]
enabled = false
"""


@contextmanager
def started(config: Path) -> Iterator[subprocess.Popen[str]]:
    """A server, from when it serves or has ended."""
    command = [sys.executable, "-c", RUN, str(config)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            process.said = []  # type: ignore[attr-defined]
            for line in process.stderr or ():
                process.said.append(line)  # type: ignore[attr-defined]
                if line.endswith(" serving\n"):
                    break
            yield process
        finally:
            process.kill()


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "server.toml"
    path.write_text(SETTINGS)
    return path


def test_a_server_answers_on_its_socket_stops_on_sigterm_and_comes_back(config: Path) -> None:
    socket = config.parent / "state" / "aggregator.sock"
    for _ in range(2):
        with started(config) as process, RemoteAggregator(f"unix:{socket}") as aggregator:
            assert aggregator.status().version == 0
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0


def test_a_second_server_on_one_folder_is_refused(config: Path) -> None:
    with started(config), started(config) as second:
        assert second.wait(timeout=60) == 1
        assert second.said[-1].startswith("StoreLocked: ")  # type: ignore[attr-defined]


def test_a_base_s_kinds_go_with_a_checkpoint_only() -> None:
    build = "fedmerge.deploy.streams.example:build_model"
    assert len(open_model(Model(base=build)).layers) == 4
    with pytest.raises(ConfigError, match="kinds go with a checkpoint"):
        open_model(Model(base=build, kinds={"vector": ("0.*",)}))


def test_a_checkpoint_s_layers_have_the_kinds_that_are_given(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a.w": torch.ones(2, 2), "b.w": torch.ones(2, 2)}, tmp_path / "base.safetensors")
    base = str(tmp_path / "base.safetensors")
    kinds = open_model(Model(base=base, kinds={"vector": ("b.*",)})).layers
    assert {name: str(layer.kind) for name, layer in kinds.items()} == {"a.w": "matrix", "b.w": "vector"}
    with pytest.raises(UnknownLayer, match=r"c\.\*"):
        open_model(Model(base=base, kinds={"vector": ("c.*",)}))


def test_whatever_the_umask_only_its_owner_reaches_the_socket_and_reads_the_state(config: Path) -> None:
    """The folder may have been made by somebody else, open to all."""
    state = config.parent / "state"
    state.mkdir()
    state.chmod(0o777)
    before = os.umask(0)
    try:
        with started(config):
            modes = {path.name: path.stat().st_mode & 0o077 for path in state.iterdir()}
    finally:
        os.umask(before)
    assert set(modes) >= {"aggregator.sock", "ledger.sqlite"}
    assert not any(modes.values()), modes
