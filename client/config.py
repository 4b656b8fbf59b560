"""What a site knows about itself, and how it is opened with that.

Read from the SuperNode's ``--node-config`` (or the run's config, or given directly in a simulation):

- ``stream``: where the site's tasks are, ``package.module:function`` or ``path/file.py:function``
- ``site-name``: its label; ``held-tasks``: comma-separated names of the tasks it holds, all by default
- ``seed``, ``rows``, ``device``, ``threads``
- ``privacy.clip``, ``privacy.noise`` and the other fields of :class:`fedmerge.common.privacy.Privacy`
- ``state``: a folder of this site alone, for what it keeps between messages; a server in serving mode
  needs it. Only the node config can set it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from flwr.app import Context

from fedmerge.client.loading import load_stream
from fedmerge.client.site import Site, open_site
from fedmerge.client.state import SiteState
from fedmerge.client.tasks import StreamOptions
from fedmerge.common.base import Base
from fedmerge.common.config import listed, validated
from fedmerge.common.errors import BaseMismatch, ConfigError
from fedmerge.common.logs import log_to_stderr
from fedmerge.common.privacy import Privacy
from fedmerge.common.sources import check_vector
from fedmerge.common.taskvector import TaskVector


@dataclass(frozen=True)
class SiteConfig:
    """What a site needs to know about itself.

    Attributes:
        stream: the stream's spec. ``held``: names of the tasks this site holds; empty means all.
        label: the site's name in reports; by default its partition number or node id.
        rows: bound on training examples per task. ``threads``: torch threads of one message.
        state: folder of what the site keeps; needed in serving mode.
        privacy: what is done to an update before it is sent; None sends it as it is.
        sketch_seed: of the random numbers in sketches, for experiments that are to be repeated; None draws
            what nobody can repeat.
    """

    stream: str
    label: str = ""
    held: tuple[str, ...] = ()
    seed: int = 0
    rows: int | None = None
    device: str = "auto"
    threads: int = 1
    state: Path | None = None
    privacy: Privacy | None = None
    sketch_seed: int | None = None


def site_config(context: Context) -> SiteConfig:
    """Reads a site's configuration from Flower's; the node's own settings win over the run's.

    Raises:
        ConfigError: no stream is named, or a number is none.
    """
    given: Mapping[str, object] = {**context.run_config, **context.node_config}
    if "stream" not in given:
        raise ConfigError(
            "this site does not say where its tasks are",
            where="node config",
            wanted="stream",
            do="Start the SuperNode with --node-config 'stream=\"my_site.tasks:stream\"'.",
        )
    state = str(context.node_config.get("state", ""))  # the run's key of that name is the server's
    return SiteConfig(
        stream=str(given["stream"]),
        label=str(given.get("site-name", "")),
        held=listed(given.get("held-tasks", "")),
        seed=_whole(given, "seed") or 0,
        rows=_whole(given, "rows"),
        device=str(given.get("device", "auto")),
        threads=_whole(given, "threads") or 1,
        state=Path(state).expanduser() if state else None,
        privacy=_privacy(context.node_config) or _privacy(context.run_config),  # never some of each
    )


def _privacy(given: Mapping[str, object]) -> Privacy | None:
    """What ``privacy.clip`` and its like say; None if they say nothing."""
    prefix = "privacy."
    said = {
        key.removeprefix(prefix).replace("-", "_"): v for key, v in given.items() if key.startswith(prefix)
    }
    said = {key: value for key, value in said.items() if value != ""}
    return validated(Privacy, said) if said else None


def _whole(given: Mapping[str, object], key: str) -> int | None:
    value = given.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError("not a whole number", where="node config", got=f"{key}={value!r}")
    return value


def open_configured(config: SiteConfig) -> Site:
    """The site; its model is built once per process, its tasks are listed anew."""
    log_to_stderr()
    torch.set_num_threads(config.threads)
    options = options_of(config)
    return replace(open_site(config.stream, options), stream=load_stream(config.stream, options))


def options_of(config: SiteConfig) -> StreamOptions:
    """What the site's stream is loaded with."""
    return StreamOptions(config.seed, config.rows)


def state_of(config: SiteConfig) -> SiteState:
    """The site's folder.

    Raises:
        ConfigError: it has none.
    """
    if config.state is None:
        raise ConfigError(
            "this site has no folder to keep versions and results in",
            where="node config",
            wanted="state",
            do="Start the SuperNode with --node-config 'state=\"/var/lib/fedmerge/site\" ...'.",
        )
    return SiteState(config.state)


def checked(vector: TaskVector, base: Base) -> TaskVector:
    """The vector, if it is of this base and whole; errors as of ``common.sources.check_vector``."""
    check_base(vector.manifest.base, base)
    check_vector(vector, base)
    return vector


def check_base(theirs: str, base: Base) -> None:
    """Raises BaseMismatch where a request means another pretrained model."""
    if theirs != base.fingerprint:
        raise BaseMismatch(
            "the server merges over another pretrained model",
            got=theirs[:12] or "none",
            wanted=base.fingerprint[:12],
            do="Install the weights that the server registered.",
        )
