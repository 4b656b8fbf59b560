"""The commands that start and check a server or a site."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

console = Console()

ServerFile = Annotated[Path, typer.Option("--config", help="The server's settings, as deploy/server.toml.")]
ClientFile = Annotated[Path, typer.Option("--config", help="The site's settings, as deploy/client.toml.")]


def server(config: ServerFile = Path("server.toml")) -> None:
    """Run the aggregation server, with Flower's SuperLink under it, until it is told to stop."""
    from fedmerge.common.logs import log_to_stderr
    from fedmerge.deploy.doctor import before_server, require
    from fedmerge.deploy.launch.config import ServerConfig, read_config
    from fedmerge.deploy.launch.server import run_server

    settings = read_config(ServerConfig, config)
    log_to_stderr(settings.log.level, settings.log.format)
    require(before_server(settings))
    run_server(settings)


def client(
    config: ClientFile = Path("client.toml"),
    check: Annotated[bool, typer.Option("--check", help="Only check, and say what was found.")] = False,
) -> None:
    """Take part as a site: learn its tasks on request and receive merged versions, until told to stop."""
    from fedmerge.common.logs import log_to_stderr
    from fedmerge.deploy.doctor import before_client, check_client, report, require
    from fedmerge.deploy.launch.client import run_client
    from fedmerge.deploy.launch.config import ClientConfig, read_config

    settings = read_config(ClientConfig, config)
    if check:
        raise typer.Exit(report(check_client(settings), console))
    log_to_stderr(settings.log.level, settings.log.format)
    require(before_client(settings))
    run_client(settings)


def doctor(
    side: Annotated[
        Literal["server", "client"], typer.Argument(help="Which side this machine is.")
    ] = "server",
    config: Annotated[
        Path | None, typer.Option("--config", help="Its settings; SIDE.toml by default.")
    ] = None,
    code: Annotated[
        int | None, typer.Option("--explain", help="Only tell what is behind an exit code of Flower.")
    ] = None,
) -> None:
    """Check everything a server or a site needs, and say what to do."""
    from fedmerge.deploy.doctor import check_client, check_server, print_causes, report
    from fedmerge.deploy.launch.config import ClientConfig, ServerConfig, read_config

    if code is not None:
        raise typer.Exit(print_causes(code, console))
    path = config or Path(f"{side}.toml")
    if side == "server":
        raise typer.Exit(report(check_server(read_config(ServerConfig, path)), console))
    raise typer.Exit(report(check_client(read_config(ClientConfig, path)), console))
