"""The SuperLink of a server: its processes, the sites that may connect, and the run that serves them.

The SuperLink listens on loopback alone, because its Control API asks nobody who they are. It and the
SuperExec, which starts the ServerApp, are processes of their own, so that a SuperLink that dies is
started again under a run that goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import ssl
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode, FlowerError

from fedmerge import __version__
from fedmerge.common.errors import ConfigError, Duplicate, FileError, Unreachable
from fedmerge.common.names import SITE_NAME
from fedmerge.common.tls import TlsFiles
from fedmerge.deploy.launch.processes import Command, Patience, executable

logger = logging.getLogger("fedmerge.launch")

Value = str | int | float | bool

ONLINE, UNREGISTERED = "online", "unregistered"
FINISHED = "finished"

LOOK_SECONDS = 3.0
"""Between two questions about the run."""

ANSWER_SECONDS = 10.0
"""A SuperLink on this machine that needs longer for an answer hangs, and must not hold up a stop."""

PYPROJECT = """\
[project]
name = "fedmerge"
version = "{version}"

[tool.flwr.app]
publisher = "fedmerge"
fab-include = ["/README.md"]

[tool.flwr.app.components]
serverapp = "fedmerge.server.app:app"
clientapp = "fedmerge.client.app:app"

[tool.flwr.app.config]
{config}
"""
"""The bundle holds no code: the installed fedmerge runs on both sides."""

README = "The installed fedmerge {version} is what runs; this bundle only names it.\n"


@dataclass(frozen=True)
class Place:
    """Where a SuperLink lives.

    Attributes:
        folder: for its database and Flower's files. ``port``: on loopback.
        tls: the server's; None switches TLS and the authentication of SuperNodes off.
    """

    folder: Path
    port: int
    tls: TlsFiles | None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"{'http' if self.tls is None else 'https'}://{self.address}"

    @property
    def secret(self) -> Path:
        return self.folder / "superexec.secret"

    def prepare(self) -> None:
        """Makes the folder and a fresh secret, both readable by the owner alone."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        self.secret.unlink(missing_ok=True)
        handle = os.open(self.secret, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))

    def superlink(self) -> Command:
        """``flower-superlink``."""
        argv = [executable("flower-superlink"), "--host", "127.0.0.1", "--port", str(self.port)]
        argv += ["--database", str(self.folder / "superlink.db"), "--isolation", "process"]
        argv += ["--superexec-auth-secret-file", str(self.secret)]
        argv += ["--disable-runtime-dependency-installation"]
        if self.tls is None:
            argv += ["--insecure"]
        else:
            argv += ["--ssl-ca-certfile", str(self.tls.ca), "--ssl-certfile", str(self.tls.cert)]
            argv += ["--ssl-keyfile", str(self.tls.key), "--enable-supernode-auth"]
        return self._command("superlink", argv)

    def superexec(self, environment: Mapping[str, str]) -> Command:
        """``flower-superexec``; the ServerApp that it starts has its environment."""
        argv = [executable("flower-superexec"), "--runtime-api-address", self.address]
        argv += ["--superexec-auth-secret-file", str(self.secret)]
        argv += ["--insecure"] if self.tls is None else ["--root-certificates", str(self.tls.ca)]
        return self._command("superexec", argv, environment)

    def trust(self) -> ssl.SSLContext:
        """Whose certificate it must show. Raises OSError."""
        return ssl.create_default_context(cafile=None if self.tls is None else self.tls.ca)

    def healthy(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            answer = httpx.get(f"{self.url}/health", verify=self.trust(), trust_env=False)
            return answer.is_success
        except (httpx.HTTPError, OSError):
            return False

    def _command(self, name: str, argv: list[str], environment: Mapping[str, str] | None = None) -> Command:
        home = {"FLWR_HOME": str(self.folder / name)}
        return Command(name, tuple(argv), self.folder, {**home, **(environment or {})})


@dataclass(frozen=True)
class Node:
    """A SuperNode that the SuperLink knows. ``key``: its public key, PEM."""

    id: int
    name: str
    key: bytes
    status: str


class Control:
    """The SuperLink's Control API, as far as a server needs it. Every call raises Unreachable."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._client = ControlHttpClient(place.url, verify=place.trust(), timeout=ANSWER_SECONDS)

    def nodes(self) -> list[Node]:
        """Every SuperNode ever registered, also those taken out since."""
        with _translated(self._place.address):
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return [Node(node.node_id, node.name, node.public_key, node.status) for node in found]

    def register(self, name: str, key: bytes) -> None:
        """Lets the SuperNode with a key connect. Raises Duplicate: the key was registered before."""
        with _translated(name):
            self._client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))

    def unregister(self, node: int) -> None:
        """Disconnects a SuperNode for good: its key cannot be registered again."""
        with _translated(self._place.address):
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start(self, fab: bytes, digest: str) -> int:
        """Starts a run of a bundle and returns its id."""
        with _translated(self._place.address):
            answer = self._client.StartRun(StartRunRequest(fab=Fab(hash_str=digest, content=fab)))
        return answer.run_id

    def state(self, run: int) -> tuple[str, str]:
        """A run's status, as ``running`` or ``finished:failed``, and what Flower says about it."""
        with _translated(self._place.address):
            found = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict[run].status
        return f"{found.status}:{found.sub_status}".rstrip(":"), found.details

    def unfinished(self) -> list[int]:
        """Ids of runs that have not ended."""
        with _translated(self._place.address):
            runs = self._client.ListRuns(ListRunsRequest()).run_dict
        return [run for run, facts in runs.items() if facts.status.status != FINISHED]

    def stop(self, run: int) -> None:
        """Ends a run; one that has ended by itself is left as it is."""
        with _translated(self._place.address), _already(ApiErrorCode.RUN_ALREADY_FINISHED):
            self._client.StopRun(StopRunRequest(run_id=run))

    def close(self) -> None:
        self._client.close()


class Sites:
    """Keeps the SuperLink's list of SuperNodes equal to a folder of public keys.

    A key is ``NAME.pub`` or, as ``fedmerge certs site`` lays it out, ``NAME/supernode.pub``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: object = None

    def changed(self) -> bool:
        """Whether files were added, replaced or removed since the last :meth:`apply`."""
        return self._stamp() != self._seen

    def apply(self, control: Control) -> None:
        """Registers the keys that are new and takes out the SuperNodes whose key is gone.

        Taking out is for good. So it needs a key that is gone: a file that cannot be used is logged and
        changes nothing for its site, nor for others, and neither does a folder that is missing, or that
        is empty all at once, as when a disk is not mounted.
        """
        stamp = self._stamp()
        known = {node.key: node for node in control.nodes()}
        if not self._folder.is_dir():
            logger.error("%s is missing: no site is let in or taken out", self._folder)
            self._seen = stamp
            return
        wanted, unclear = self._readable()
        for key, name in wanted.items():
            self._admit(control, key, name, known.get(key))
        present = {key: node for key, node in known.items() if node.status != UNREGISTERED}
        if not wanted and not unclear and len(present) > 1:
            logger.error("%s is empty: none of %d sites is taken out", self._folder, len(present))
            present = {}
        for key, node in present.items():
            if key not in wanted and node.name not in unclear:
                control.unregister(node.id)
                logger.warning("site %s is taken out: its key is no longer in %s", node.name, self._folder)
        self._seen = stamp

    def _admit(self, control: Control, key: bytes, name: str, node: Node | None) -> None:
        if node is None:
            control.register(name, key)
            logger.info("site %s is registered", name)
        elif node.status == UNREGISTERED:
            logger.error("site %s cannot come back with a key that was taken out; make it a new one", name)
        elif node.name != name:
            logger.error("the key of site %s was registered as %s and keeps that name", name, node.name)

    def _readable(self) -> tuple[dict[bytes, str], set[str]]:
        """Sites by their keys, and the sites whose file cannot be used."""
        found: dict[bytes, str] = {}
        unclear: set[str] = set()
        for name, path in key_files(self._folder):
            try:
                key = read_public_key(path)
                if key in found:
                    raise Duplicate("the same key as another site's", where=path, got=found[key])
                found[key] = name
            except (FileError, ConfigError, Duplicate) as error:
                logger.error("%s", error)
                unclear.add(name)
        return found, unclear

    def _stamp(self) -> object:
        stamps: dict[Path, int] = {}
        for _, path in key_files(self._folder):
            with suppress(OSError):
                stamps[path] = path.stat().st_ctime_ns
        return stamps


class ServingRun:
    """The run whose ServerApp serves the sites: started, and started again when it ends.

    Args:
        config: its run config; every site can read it.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        control: Control,
        config: Mapping[str, Value],
        patience: Patience | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control, self._bundle = control, bundle(config)
        self._patience, self._clock = patience or Patience("the serving run"), clock
        self._look_at = 0.0
        self._run: int | None = None

    def start(self) -> None:
        """Starts the run, and ends those that an earlier server left. Raises Unreachable."""
        for run in self._control.unfinished():
            self._control.stop(run)
        self._run = self._control.start(*self._bundle)

    def look(self) -> None:
        """Notices the run's end, within seconds, and starts it again when its pause is over.

        While the SuperLink does not answer, nothing is known of the run, and nothing is done.

        Raises:
            Unreachable: it has ended too often.
        """
        if self._clock() < self._look_at:
            return
        self._look_at = self._clock() + LOOK_SECONDS
        try:
            if self._run is None:
                if self._patience.over():
                    self.start()
                return
            status, details = self._control.state(self._run)
        except Unreachable:
            return
        if status.startswith(FINISHED):
            self._run = None
            self._patience.ended(status, details)

    def stop(self) -> None:
        """Ends the run, if there is still somebody to tell."""
        if self._run is not None:
            with suppress(Unreachable):
                self._control.stop(self._run)
            self._run = None


def key_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Site names and files of the public keys in a folder, in order of name."""
    for path in sorted((*folder.glob("*.pub"), *folder.glob("*/supernode.pub"))):
        name = path.parent.name if path.name == "supernode.pub" else path.stem
        if SITE_NAME.fullmatch(name):
            yield name, path


def read_public_key(path: Path) -> bytes:
    """A SuperNode's public key in PEM, from a file as ssh-keygen writes it.

    Raises:
        FileError: unreadable or another format. ConfigError: not ECDSA.
    """
    try:
        key = load_ssh_public_key(path.read_bytes())
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FileError("not a public key in OpenSSH format", where=path) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            "SuperNodes cannot use this kind of key",
            where=path,
            got=type(key).__name__.removesuffix("PublicKey"),
            wanted="ECDSA",
            do="Make one with: fedmerge certs site NAME, or ssh-keygen -t ecdsa -b 384",
        )
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def bundle(config: Mapping[str, Value]) -> tuple[bytes, str]:
    """The Flower app bundle of the installed fedmerge, and its SHA-256.

    Args:
        config: run config of the ServerApp. Every site can read it.
    """
    lines = "\n".join(f"{_quoted(key)} = {_quoted(value)}" for key, value in config.items())
    project = PYPROJECT.format(version=__version__, config=lines)
    assert tomllib.loads(project)["tool"]["flwr"]["app"]["config"] == dict(config)
    files = {"pyproject.toml": project.encode(), "README.md": README.format(version=__version__).encode()}
    fab, _ = build_fab_from_files(files)
    return fab, hashlib.sha256(fab).hexdigest()


def _quoted(value: Value) -> str:
    """A TOML key or value; JSON's strings, numbers and booleans are TOML's too."""
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def _already(code: ApiErrorCode) -> Iterator[None]:
    """What is asked for is so already, as one of Flower's codes says."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        found = FlowerError.from_json(error.response.text)
        if found is None or found.code != code:
            raise


@contextmanager
def _translated(where: object) -> Iterator[None]:
    """Flower's and HTTP's errors as ours."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        found = FlowerError.from_json(error.response.text)
        if found is not None and found.code == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
            raise Duplicate("the key was registered before", where=where) from error
        said = f"[code {found.code}] {found.message}" if found else f"HTTP {error.response.status_code}"
        raise Unreachable("the SuperLink refused", where=where, got=said) from error
    except httpx.HTTPError as error:
        raise Unreachable("the SuperLink does not answer", where=where, got=str(error)) from error
