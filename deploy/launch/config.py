"""``server.toml`` and ``client.toml``: every section and key, validated once when a command starts.

Paths are relative to the file that names them. ``deploy/server.toml`` and ``deploy/client.toml`` list
every key with its default.
"""

from __future__ import annotations

import os
import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from fedmerge.common.compression import Compression
from fedmerge.common.errors import ConfigError, FileError
from fedmerge.common.layers import LayerKind
from fedmerge.common.logs import Form, Level
from fedmerge.common.names import SITE_NAME
from fedmerge.common.privacy import Privacy
from fedmerge.common.tls import TlsFiles, is_loopback
from fedmerge.common.training import LocalTraining
from fedmerge.server.admission import Limits
from fedmerge.server.merge import DEFAULT_RULE
from fedmerge.server.peers import ServingSettings
from fedmerge.server.retention import Retention
from fedmerge.server.service.settings import ServiceSettings


def _compression(text: str) -> str:
    try:
        return str(Compression.parse(text))
    except ConfigError as error:
        raise ValueError(str(error)) from error


def _resolved(path: Path, info: ValidationInfo) -> Path:
    folder: Path = (info.context or {}).get("folder", Path())
    return Path(os.path.normpath(folder / path.expanduser()))


def _resolved_spec(spec: str, info: ValidationInfo) -> str:
    """A checkpoint's path, or the file of ``file.py:function``, made absolute; a module's name as it is."""
    source, colon, name = spec.rpartition(":")
    if colon and name.isidentifier():
        return f"{_resolved(Path(source), info)}:{name}" if source.endswith(".py") else spec
    return str(_resolved(Path(spec), info))


def _split(text: object) -> object:
    """``host:port`` as two fields; ``[::1]:80`` for IPv6."""
    if not isinstance(text, str):
        return text
    found = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s\[\]]+):(\d{1,5})", text)
    if found is None or int(found[2]) > 65535:
        raise ValueError("not an address of the form host:port")
    return {"host": found[1].strip("[]"), "port": int(found[2])}


def _resolved_stream(spec: str, info: ValidationInfo) -> str:
    """As a base's function; a name without a colon is a built-in stream."""
    return _resolved_spec(spec, info) if ":" in spec else spec


FilePath = Annotated[Path, AfterValidator(_resolved)]
Spec = Annotated[str, Field(min_length=1), AfterValidator(_resolved_spec)]


class Section(BaseModel):
    """A table of the file; a key it does not have is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class HostPort(Section):
    """Where to listen or connect, written ``host:port``."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


Address = Annotated[HostPort, BeforeValidator(_split)]
Listen = Annotated[HostPort | None, BeforeValidator(lambda text: None if text == "" else _split(text))]
"""An address to listen on; an empty string for none."""


def local(port: int) -> HostPort:
    """A default: this machine only."""
    return HostPort(host="127.0.0.1", port=port)


class Log(Section):
    """Attributes:
    level: debug, info, warning or error. ``format``: text for people, json for collectors.
    """

    level: Level = "info"
    format: Form = "text"


class Model(Section):
    """The base.

    Attributes:
        base: a checkpoint, or a function that builds the model, ``package.module:function`` or
            ``path/file.py:function``.
        private: patterns of layers that never leave a site. ``kinds``: patterns by layer kind.
    """

    base: Spec
    private: tuple[str, ...] = ()
    kinds: dict[LayerKind, tuple[str, ...]] = Field(default_factory=dict)


class RuleChoice(Section):
    """The merge rule and its options."""

    name: str = DEFAULT_RULE
    options: dict[str, Any] = Field(default_factory=dict)


class Training(LocalTraining):
    """What sites are asked of their training; a table for every training option in use.

    Attributes:
        start: where sites start from, the ``base`` or the ``merged`` version they hold.
        compress: how they make updates smaller: ``bf16``, ``int8``, ``lowrank:ENERGY``.
    """

    start: Literal["base", "merged"] = "base"
    compress: Annotated[str, AfterValidator(_compression)] = "none"


class EngineChoice(Section):
    """Where merging happens.

    Attributes:
        actors: Ray actors; ``threads``: torch threads of each. ``num_gpus``: per actor, by default what
            the cluster has.
        ray_address: of a cluster; empty starts a private Ray on loopback, "none" merges in this process.
    """

    actors: int = Field(default=1, ge=1)
    threads: int = Field(default=1, ge=1)
    num_gpus: float | None = Field(default=None, ge=0)
    ray_address: str = ""


class ServerTls(TlsFiles):
    """The server's certificate, for gRPC and for SuperNodes. ``crl``: revoked clients."""

    ca: FilePath
    cert: FilePath
    key: FilePath
    crl: FilePath


class Flower(Section):
    """The way in for SuperNodes.

    Attributes:
        enabled: whether Flower is served at all.
        listen: where SuperNodes connect; only the parts of the SuperLink that they need are reachable.
        superlink_port: of the SuperLink itself, on loopback.
        sites: a folder with ``NAME.pub`` of every site that may take part; watched while the server runs.
            Without TLS any SuperNode of this machine may.
    """

    enabled: bool = True
    listen: Address = local(9092)
    superlink_port: int = Field(default=9093, ge=1, le=65535)
    sites: FilePath = Field(default=Path("sites"), validate_default=True)


class Serving(ServingSettings):
    """How sites are asked to train and given versions. What follows from other sections is refused here."""

    @model_validator(mode="after")
    def _derived(self) -> Self:
        for key, source in DERIVED.items():
            if key in self.model_fields_set:
                raise ValueError(f"{key} follows from {source}")
        return self


DERIVED = {"registered_sites": "[tls]", "max_update_bytes": "[limits] max_update_bytes"}


class Metrics(Section):
    """Attributes:
    listen: where Prometheus asks; on loopback over plain HTTP, elsewhere over TLS. Empty for nowhere.
    """

    listen: Listen = local(9095)


class State(Retention):
    """The state folder, and how much of the past it keeps. ``vectors = "all"`` keeps every one."""

    folder: FilePath = Field(default=Path("state"), validate_default=True)
    vectors: Annotated[int | None, BeforeValidator(lambda count: None if count == "all" else count)] = Field(
        default=100, ge=0
    )


class Service(ServiceSettings):
    """The gRPC service.

    Attributes:
        listen: for sites and admins; empty for the unix socket in the state folder alone. The rest are
            its bounds.
    """

    listen: Listen = local(9091)


class ServerConfig(Section):
    """``server.toml``."""

    model: Model
    rule: RuleChoice = RuleChoice()
    training: Training = Training()
    state: State = Field(default_factory=dict, validate_default=True)
    limits: Limits = Limits()
    engine: EngineChoice = EngineChoice()
    service: Service = Service()
    tls: ServerTls | None = None
    flower: Flower = Field(default_factory=dict, validate_default=True)
    serving: Serving = Serving()
    metrics: Metrics = Metrics()
    log: Log = Log()

    @model_validator(mode="after")
    def _let_in(self) -> Self:
        if self.training.start == "merged" and self.limits.max_staleness is None:
            raise ValueError(
                "updates that start from a merged version are let in with limits.max_staleness alone"
            )
        return self

    @model_validator(mode="after")
    def _closed(self) -> Self:
        if self.service.listen is not None:
            _require_tls(self.service.listen, self.tls, "service.listen")
        if self.metrics.listen is not None:
            _require_tls(self.metrics.listen, self.tls, "metrics.listen")
        if self.flower.enabled:
            _require_tls(self.flower.listen, self.tls, "flower.listen")
        return self


class Site(Section):
    """Who this site is and what it learns.

    Attributes:
        name: shown in the log; the server knows the site by its key.
        task: the site's tasks: a function that returns a Stream, ``package.module:function`` or
            ``path/file.py:function``. A module must be installed; a file need not be.
        held: names of the tasks it takes part in; empty for all.
        seed, rows: of the stream. ``device``: cpu, cuda, or auto. ``threads``: of torch.
        state: folder for Flower's files.
    """

    name: str = Field(pattern=f"^{SITE_NAME.pattern}$")
    task: Annotated[str, Field(min_length=1), AfterValidator(_resolved_stream)]
    held: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0)
    rows: int | None = Field(default=None, ge=1)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    threads: int = Field(default=1, ge=1)
    state: FilePath = Field(default=Path("state"), validate_default=True)


class ServerAddress(Section):
    """Attributes:
    address: of the server, as its ``[flower] listen`` is reached from here.
    port: a free port of this machine, on loopback, for the SuperNode's own processes.
    """

    address: Address
    port: int = Field(default=9094, ge=1, le=65535)


class ClientTls(Section):
    """``ca``: who signed the server's certificate. ``key``: the site's ECDSA key, as ssh-keygen writes it."""

    ca: FilePath
    key: FilePath


class ClientConfig(Section):
    """``client.toml``. ``privacy``: what is done to an update before it is sent; without it, nothing."""

    site: Site
    server: ServerAddress
    privacy: Privacy | None = None
    tls: ClientTls | None = None
    log: Log = Log()

    @model_validator(mode="after")
    def _closed(self) -> Self:
        _require_tls(self.server.address, self.tls, "server.address")
        return self


def _require_tls(address: HostPort, tls: object, key: str) -> None:
    if tls is None and not is_loopback(address.host):
        raise ValueError(f"{key}: {address} is not this machine, and that needs [tls]")


Config = TypeVar("Config", bound=Section)


def read_config(kind: type[Config], path: Path) -> Config:
    """A command's settings from its file.

    Raises:
        FileError: missing or not TOML.
        ConfigError: the first key that is unknown, missing or out of range, and what was probably meant.
    """
    path = path.absolute()
    try:
        given = tomllib.loads(path.read_text())
    except OSError as error:
        raise FileError("cannot be read", where=path, got=error.strerror) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError("not TOML", where=path, got=str(error)) from error
    try:
        return kind.model_validate(given, context={"folder": path.parent})
    except ValidationError as error:
        raise _refusal(kind, path, error) from error


def _refusal(kind: type[Section], path: Path, error: ValidationError) -> ConfigError:
    found = error.errors(include_url=False)
    first = next(
        (one for one in found if one["type"] == "extra_forbidden"), found[0]
    )  # a typo explains a gap
    keys = [str(part) for part in first["loc"]]
    place = f"{path}, [{keys[0]}]" if len(keys) > 1 else str(path)
    if first["type"] == "extra_forbidden":
        known = list(_section(kind, keys[:-1]).model_fields)
        close = get_close_matches(keys[-1], known, n=1)
        what = "no such key" if len(keys) > 1 else "no such section"
        hint = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(known)}."
        return ConfigError(what, where=place, got=repr(keys[-1]), do=hint)
    if first["type"] == "missing":
        return ConfigError("a key is missing", where=place, wanted=".".join(keys))
    message = first["msg"].removeprefix("Value error, ")
    if not keys:
        return ConfigError(message, where=place)
    return ConfigError(f"{'.'.join(keys)}: {message}", where=place, got=repr(first.get("input")))


def _section(kind: type[BaseModel], keys: list[str]) -> type[BaseModel]:
    """The model of a table within a table."""
    for key in keys:
        annotation = kind.model_fields[key].annotation if key in kind.model_fields else None
        models = [
            option
            for option in (annotation, *get_args(annotation))
            if isinstance(option, type) and issubclass(option, BaseModel)
        ]
        if not models:
            break
        kind = models[0]
    return kind
