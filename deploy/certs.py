"""``fedmerge certs``: certificates and keys of one federation, from its own authority."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from fedmerge.deploy.authority import Authority, Issued

app = typer.Typer(no_args_is_help=True, help="Make and revoke the certificates of servers, sites and admins.")
console = Console()

SOON_DAYS = 30
"""From so many days before its end on, a certificate is shown as expiring."""

Folder = Annotated[Path, typer.Option("--dir", help="The authority's folder.")]
Name = Annotated[str, typer.Argument(help="Letters, digits, '.', '_' and '-', at most 64.")]
Days = Annotated[int, typer.Option(min=1, max=3650, help="Days until it expires.")]

DEFAULT_FOLDER = Path("certs")
DEFAULT_DAYS = 397


@app.command("init")
def init_command(
    folder: Folder = DEFAULT_FOLDER,
    name: Annotated[str, typer.Option(help="The federation's name, as certificates show it.")] = "fedmerge",
    days: Days = 3650,
) -> None:
    """Make a certificate authority in a new folder."""
    from fedmerge.deploy.authority import Authority

    Authority.create(folder, name, days)
    _say(f"{folder}: ca.crt goes to everybody, ca.key to nobody")


@app.command("server")
def server_command(
    host: Annotated[list[str], typer.Option(help="A name or address that sites use; may be repeated.")],
    folder: Folder = DEFAULT_FOLDER,
    days: Days = DEFAULT_DAYS,
) -> None:
    """Make the server's certificate, and the gateway's with it."""
    _say(f"{_open(folder).server(host, days)}: server.crt, server.key, ca.crt")


@app.command("site")
def site_command(name: Name, folder: Folder = DEFAULT_FOLDER, days: Days = DEFAULT_DAYS) -> None:
    """Make a site's folder: certificate, SuperNode key pair, README."""
    made = _open(folder).site(name, days)
    _say(f"{made}: hand it to the site, and register {made / 'supernode.pub'}")


@app.command("admin")
def admin_command(name: Name, folder: Folder = DEFAULT_FOLDER, days: Days = DEFAULT_DAYS) -> None:
    """Make an admin's folder."""
    _say(f"{_open(folder).admin(name, days)}: hand it to the admin")


@app.command("list")
def list_command(folder: Folder = DEFAULT_FOLDER) -> None:
    """Show every certificate, when it ends, and what became of it."""
    table = Table("name", "kind", "serial", "until", "state", box=None)
    for entry in _open(folder).issued():
        table.add_row(entry.name, entry.kind, entry.serial[:16], f"{entry.not_after:%Y-%m-%d}", _state(entry))
    console.print(table)


@app.command("revoke")
def revoke_command(name: Name, folder: Folder = DEFAULT_FOLDER) -> None:
    """Revoke all certificates of a name; a running server that reads crl.pem refuses them at once."""
    revoked = _open(folder).revoke(name)
    _say(f"{name}: {len(revoked)} revoked, {folder / 'crl.pem'} written")
    kinds = {entry.kind for entry in revoked}
    if "site" in kinds:
        _say("its SuperNode key is separate: take its .pub out of the server's sites")
    if "server" in kinds:
        _say("clients do not read crl.pem: if the server's key has leaked, start a new authority")


@app.command("renew")
def renew_command(name: Name, folder: Folder = DEFAULT_FOLDER, days: Days = DEFAULT_DAYS) -> None:
    """Make a new certificate for the same key; the old one stays valid until it expires."""
    _say(f"{_open(folder).renew(name, days)}: put it in place of the old one")


def _open(folder: Path) -> Authority:
    from fedmerge.deploy.authority import Authority

    return Authority(folder)


def _state(entry: Issued) -> str:
    from datetime import UTC, datetime

    if entry.revoked:
        return f"revoked {entry.revoked:%Y-%m-%d}"
    left = (entry.not_after - datetime.now(UTC)).days
    if left < 0:
        return "[red]expired[/red]"
    return f"[yellow]expires in {left} days[/yellow]" if left < SOON_DAYS else "valid"


def _say(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
