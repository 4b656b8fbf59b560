"""Commands for a running server: handing in, fetching, looking, and deciding."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from getpass import getuser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from fedmerge.common.errors import ConfigError, EngineError
from fedmerge.common.names import SITE_NAME
from fedmerge.common.records import (
    AggregationService,
    Receipt,
    Status,
    UpdateState,
    VersionRecord,
)

if TYPE_CHECKING:
    from fedmerge.common.remote import RemoteAggregator

app = typer.Typer()
console = Console()
errors = Console(stderr=True)

WAITING = (UpdateState.STAGED, UpdateState.HELD)
POLL_SECONDS = 0.5


class What(StrEnum):
    """Records that a server keeps."""

    VERSIONS = "versions"
    UPDATES = "updates"
    REFUSALS = "refusals"


class Precision(StrEnum):
    """``records.Dtype`` as a choice on the command line."""

    F32 = "f32"
    BF16 = "bf16"


Server = Annotated[
    str,
    typer.Option(
        "--server",
        envvar="FEDMERGE_SERVER",
        help="HOST:PORT, or unix:/path/to/aggregator.sock on its machine.",
    ),
]
Ca = Annotated[Path | None, typer.Option("--ca", help="The authority's certificate, for TLS.")]
Cert = Annotated[Path | None, typer.Option("--cert", help="Your certificate, for TLS.")]
Key = Annotated[Path | None, typer.Option("--key", help="Your certificate's private key, for TLS.")]


def _me() -> str:
    """The user's name; not every user of a container has one."""
    try:
        name = getuser()
    except (KeyError, OSError):
        return "nobody"
    return name if SITE_NAME.fullmatch(name) else "nobody"


By = Annotated[
    str, typer.Option("--by", default_factory=_me, help="Who decides; with TLS, the certificate says so.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command("push")
def push_command(
    file: Annotated[Path, typer.Argument(help="A task vector, as fedmerge diff writes them.")],
    server: Server,
    site: Annotated[str, typer.Option(help="Whose update it is; what the file says by default.")] = "",
    dtype: Annotated[
        Precision | None, typer.Option(help="Round to bf16 before sending, half the bytes; or send as f32.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Until it is merged, rejected or has failed.")] = False,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Hand in a task vector; a receipt means that it survives a crash of the server."""
    from fedmerge.common import vectorfile

    name = site or vectorfile.load(file).manifest.site
    if not name:
        raise ConfigError("the file does not say whose update it is", where=file, do="Give --site NAME.")
    with (
        _connected(server, ca, cert, key, name) as remote,
        _in_dtype(file, dtype) as sent,
        _bar("sending") as progress,
    ):
        receipt = remote.submit(sent, site=name, sent=progress)
        if wait:
            receipt = _settled(remote, receipt)
    _print(receipt, as_json, _said(receipt))


@app.command("pull")
def pull_command(
    out: Annotated[Path, typer.Argument(help="The merged vector, a .safetensors file.")],
    server: Server,
    version: Annotated[int | None, typer.Option(min=0, help="The current one by default.")] = None,
    dtype: Annotated[Precision, typer.Option(help="bf16 is rounded, half the bytes.")] = Precision.F32,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Fetch a version's merged vector, verified; an interrupted fetch goes on where it was."""
    with _connected(server, ca, cert, key) as remote, _bar("fetching") as progress:
        record = remote.fetch(out, version, dtype.value, progress)
    _print(record, as_json, f"version {record.number}: {out}, {out.stat().st_size:,} bytes")


@app.command("status")
def status_command(
    server: Server, ca: Ca = None, cert: Cert = None, key: Key = None, as_json: AsJson = False
) -> None:
    """Show the current version, the queue and what was refused."""
    with _connected(server, ca, cert, key) as remote:
        status = remote.status()
    _print(status, as_json, _status_table(status, server))


@app.command("history")
def history_command(
    server: Server,
    what: Annotated[What, typer.Argument(help="Which records to list.")] = What.VERSIONS,
    after: Annotated[int, typer.Option(min=-1, help="Only versions or updates above this number.")] = -1,
    limit: Annotated[int, typer.Option(min=1, help="How many at most.")] = 100,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """List versions, acknowledged updates, or refusals (newest first)."""
    with _connected(server, ca, cert, key) as remote:
        records = _listed(remote, what, after, limit)
    _print(records, as_json, _records_table(records, what))


@app.command("rollback")
def rollback_command(
    version: Annotated[int, typer.Argument(min=0, help="The version to serve again; 0 is the base.")],
    server: Server,
    by: By,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Serve an earlier version again, as a new version."""
    with _connected(server, ca, cert, key) as remote:
        record = remote.roll_back(version, by=by)
    _print(record, as_json, f"version {record.number} serves version {record.parent} again")


@app.command("remove")
def remove_command(
    task: Annotated[str, typer.Argument(help="The task's name.")],
    server: Server,
    by: By,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Take a task out of the current model, as a new version."""
    with _connected(server, ca, cert, key) as remote:
        record = remote.remove(task, by=by)
    _print(record, as_json, f"version {record.number} is version {record.parent} without {task}")


@app.command("approve")
def approve_command(
    update: Annotated[str, typer.Argument(help="The held update's id; fedmerge history updates lists them.")],
    server: Server,
    by: By,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Let a held update in."""
    with _connected(server, ca, cert, key) as remote:
        receipt = remote.approve(update, by=by)
    _print(receipt, as_json, _said(receipt))


@app.command("reject")
def reject_command(
    update: Annotated[str, typer.Argument(help="The held update's id; fedmerge history updates lists them.")],
    server: Server,
    by: By,
    reason: Annotated[str, typer.Option(help="For the record.")] = "",
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
) -> None:
    """Turn a held update away."""
    with _connected(server, ca, cert, key) as remote:
        remote.reject(update, by=by, reason=reason)
    console.print(f"update {update} is rejected", highlight=False)


@app.command("watch")
def watch_command(
    server: Server,
    after: Annotated[
        int | None, typer.Option(min=-1, help="Only versions above this number; newer ones by default.")
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="End after so many.")] = None,
    ca: Ca = None,
    cert: Cert = None,
    key: Key = None,
    as_json: AsJson = False,
) -> None:
    """Print versions as they come, until interrupted."""
    with _connected(server, ca, cert, key) as remote:
        known = remote.version().number if after is None else after
        for seen, record in enumerate(remote.watch(known), start=1):
            _print(record, as_json, _line(record), indent=None)
            if seen == count:
                break


@contextmanager
def _connected(
    server: str,
    ca: Path | None,
    cert: Path | None,
    key: Path | None,
    site: str | None = None,
) -> Iterator[RemoteAggregator]:
    from fedmerge.common.remote import RemoteAggregator
    from fedmerge.common.tls import TlsFiles, channel_credentials

    credentials = None
    if ca and cert and key:
        credentials = channel_credentials(TlsFiles(ca=ca, cert=cert, key=key))
    elif ca or cert or key:
        raise ConfigError("TLS needs three files", wanted="--ca, --cert and --key")
    with RemoteAggregator(server, credentials, site=site) as remote:
        yield remote


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error while inside; what it yields moves it to so many bytes of so many."""
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, size: progress.update(bar, completed=done, total=size)


@contextmanager
def _in_dtype(file: Path, dtype: Precision | None) -> Iterator[Path]:
    """The file itself, or a rounded copy for as long as it is needed."""
    if dtype is None:
        yield file
        return
    import torch

    from fedmerge.common import vectorfile

    with TemporaryDirectory(prefix="fedmerge-") as folder:
        copy = Path(folder) / file.name
        vectorfile.save(
            vectorfile.load(file), copy, torch.bfloat16 if dtype is Precision.BF16 else torch.float32
        )
        yield copy


def _settled(service: AggregationService, receipt: Receipt) -> Receipt:
    """The receipt once the update waits no more. Raises EngineError if it could not be merged."""
    while (record := service.update(receipt.update)).state in WAITING:
        time.sleep(POLL_SECONDS)
    if record.state is UpdateState.FAILED:
        raise EngineError("the update could not be merged", where=f"update {record.id}", got=record.reason)
    return Receipt(record.id, record.state, record.version, receipt.again)


def _listed(service: AggregationService, what: What, after: int, limit: int) -> Sequence[object]:
    if what is What.VERSIONS:
        return service.versions(after, limit)
    return service.updates(max(after, 0), limit) if what is What.UPDATES else service.refusals(limit)


def _print(found: object, as_json: bool, otherwise: object, indent: int | None = 2) -> None:
    if as_json:
        told = [asdict(each) for each in found] if isinstance(found, Sequence) else asdict(found)  # type: ignore[call-overload]
        typer.echo(json.dumps(told, indent=indent))
    elif isinstance(otherwise, str):
        console.print(otherwise, markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(otherwise)


def _said(receipt: Receipt) -> str:
    version = f" as version {receipt.version}" if receipt.version is not None else ""
    known = ", known before" if receipt.again else ""
    return f"update {receipt.update}: {receipt.state}{version}{known}"


def _line(record: VersionRecord) -> str:
    facts = (f"version {record.number}", str(record.kind), record.task, record.site, _time(record.at))
    return "  ".join(fact for fact in facts if fact)


def _status_table(status: Status, server: str) -> Table:
    table = Table(title=escape(server), show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    options = ", ".join(f"{name} {value}" for name, value in status.options.items())
    refused = ", ".join(f"{count} {error}" for error, count in status.refused.items())
    for name, value in (
        ("fedmerge", status.fedmerge),
        ("up since", _time(status.started)),
        ("base", status.base[:12]),
        ("rule", f"{status.rule} ({options})" if options else status.rule),
        ("version", str(status.version)),
        ("tasks", ", ".join(status.tasks) or "none"),
        ("vectors in it", str(status.merged)),
        ("waiting", f"{status.staged} staged, {status.held} held for approval"),
        ("refused", refused or "none"),
        ("state folder", f"{status.disk / 2**20:,.1f} MiB"),
        *([("merging stands still", status.failing)] if status.failing else []),
    ):
        table.add_row(name, escape(value))
    return table


COLUMNS = {
    What.VERSIONS: ("number", "kind", "parent", "at", "task", "site", "merged_norm", "size", "kept", "by"),
    What.UPDATES: ("seq", "id", "site", "task", "state", "version", "at", "examples", "norm", "size"),
    What.REFUSALS: ("at", "site", "task", "size", "error", "reason"),
}


def _records_table(records: Iterable[Any], what: What) -> Table:
    table = Table(title=what)
    for column in COLUMNS[what]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for record in records:
        table.add_row(*(_cell(column, getattr(record, column)) for column in COLUMNS[what]))
    return table


def _cell(column: str, value: object) -> str:
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case float():
            return _time(value) if column == "at" else f"{value:.4g}"
        case int():
            return f"{value:,}" if column == "size" else str(value)
    return escape(str(value))


def _time(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().strftime("%Y-%m-%d %H:%M:%S")
