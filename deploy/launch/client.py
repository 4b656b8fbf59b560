"""``fedmerge client``: a site's SuperNode, checked before it starts and kept running."""

from __future__ import annotations

import json
import logging
import threading
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import timedelta

from fedmerge.common.errors import ConfigError, FedmergeError
from fedmerge.common.writing import replacing
from fedmerge.deploy.launch.apart import answer, tell
from fedmerge.deploy.launch.config import ClientConfig, local
from fedmerge.deploy.launch.explain import explain
from fedmerge.deploy.launch.ports import wait_free
from fedmerge.deploy.launch.processes import Command, KeptRunning, executable, settle, until_told

logger = logging.getLogger("fedmerge.launch")

LOOK_SECONDS = 1.0
PORT_SECONDS = 20.0
PROBE = timedelta(minutes=10)
"""A large model may have to come from a slow disk."""


@dataclass(frozen=True)
class Found:
    """What a site's stream turned out to be. ``base``: the fingerprint of its pretrained model."""

    stream: str
    tasks: tuple[str, ...]
    base: str
    parameters: int


def run_client(config: ClientConfig) -> None:
    """Takes part until SIGINT or SIGTERM; says in the log what it does.

    After a restart of the server, or while it cannot be reached, the SuperNode connects again by itself.

    Raises:
        FedmergeError: it cannot take part, or the SuperNode does not stay up.
    """
    settle()
    stopping = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(until_told(stopping))
        command = supernode(config)
        wait_free(local(config.server.port), "server.port", PORT_SECONDS, stopping)
        logger.info("connecting to %s as %s", config.server.address, config.site.name)
        node = KeptRunning(command, explain=explain)
        stack.callback(node.stop)
        while not stopping.wait(LOOK_SECONDS):
            node.look()
        logger.info("stopping")
    logger.info("stopped")


def supernode(config: ClientConfig) -> Command:
    """``flower-supernode`` for a site; writes what it tells our ClientApp into the state folder."""
    site, server, tls = config.site, config.server, config.tls
    folder = site.state
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    node_config = folder / "node.toml"
    with replacing(node_config) as file:
        file.write(_node_config(config).encode())
    argv = [executable("flower-supernode"), "--superlink", str(server.address)]
    argv += ["--host", "127.0.0.1", "--port", str(server.port), "--node-config", str(node_config)]
    if tls is None:
        argv += ["--insecure"]
    else:
        argv += ["--root-certificates", str(tls.ca), "--auth-supernode-private-key", str(tls.key)]
    return Command("supernode", tuple(argv), folder, {"FLWR_HOME": str(folder / "flower")})


def probe(config: ClientConfig) -> Found:
    """Loads the site's stream and model as the SuperNode's processes will, in a process that ends again.

    Raises:
        ConfigError: it cannot be loaded, or a held task is not in it; says why.
    """
    site = config.site
    options = json.dumps({"seed": site.seed, "rows": site.rows})
    what = "the site's tasks cannot be loaded"
    found = answer(
        "fedmerge.deploy.launch.client:_probe", site.task, options, within=PROBE, what=what, where=site.task
    )
    found["tasks"] = tuple(found["tasks"])
    missing = [task for task in site.held if task not in found["tasks"]]
    if missing:
        raise ConfigError(
            "held tasks that the stream does not have",
            where="[site] held",
            got=", ".join(map(repr, missing)),
            wanted=" or ".join(map(repr, found["tasks"])),
        )
    return Found(**found)


def _probe(task: str, options: str) -> None:
    """Tells what a stream is; ends with a line on why it cannot be loaded."""
    from fedmerge.client.site import open_site
    from fedmerge.client.tasks import StreamOptions

    try:
        site = open_site(task, StreamOptions(**json.loads(options)))
    except FedmergeError as error:
        raise SystemExit(str(error)) from error
    parameters = sum(tensor.numel() for tensor in site.model.state_dict().values())
    tell(asdict(Found(site.stream.name, site.stream.tasks, site.base.fingerprint, parameters)))


def _node_config(config: ClientConfig) -> str:
    site = config.site
    settings = {
        "stream": site.task,
        "site-name": site.name,
        "held-tasks": ",".join(site.held),
        "seed": site.seed,
        "rows": site.rows,
        "device": site.device,
        "threads": site.threads,
        "state": str(site.state / "site"),
    }
    if config.privacy is not None:
        settings |= {f"privacy.{key}": value for key, value in config.privacy.model_dump().items()}
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if value is not None]
    return "\n".join(lines) + "\n"
