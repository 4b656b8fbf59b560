"""``fedmerge doctor``: everything that must be right on one side, what was found, and what to do about it."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import sqlite3
import ssl
import time
from collections.abc import Callable, Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryFile
from typing import TypeVar

from cryptography import x509
from rich.console import Console
from rich.table import Table

from fedmerge.common.errors import ConfigError, FedmergeError, StoreLocked
from fedmerge.common.tls import (
    TlsFiles,
    check_dates,
    check_host,
    check_supernode_key,
    describe,
    problems,
    read_certificate,
)
from fedmerge.deploy.checks import Check, Checks, Verdict
from fedmerge.deploy.launch import ports
from fedmerge.deploy.launch.config import ClientConfig, HostPort, ServerConfig, local
from fedmerge.deploy.launch.explain import CAUSES, causes_of, explain

logger = logging.getLogger("fedmerge.launch")

Config = TypeVar("Config", ServerConfig, ClientConfig)

SOON = timedelta(days=30)
LOW_BYTES, TOO_LOW_BYTES = 5 << 30, 200 << 20
SLOW_SYNC_SECONDS = 0.5
CLOCK_SECONDS, TOO_FAR_SECONDS = 30.0, 290.0
"""Flower refuses signatures that are older than 300 seconds."""

ANSWER_SECONDS = 10.0
LOG_LINES = 60


def check_server(config: ServerConfig) -> list[Check]:
    """All checks of the server's side; a running server is not disturbed."""
    every: list[Callable[[ServerConfig], Checks]] = [
        lambda _: versions("fedmerge", "flwr", "torch", "ray", "grpcio"),
        lambda config: folder("state folder", config.state.folder),
        ledger,
        rule,
        base,
        server_certificates,
        site_keys,
        server_ports,
        registered,
        ray,
        lambda _: gpu(),
        lambda config: last_words(config.state.folder / "flower", "superlink", "superexec"),
    ]
    return _all(every, config)


def check_client(config: ClientConfig) -> list[Check]:
    """All checks of a site's side; if its tasks can be loaded, a rehearsal of its training is among them."""
    from fedmerge.deploy.rehearsal import rehearsal

    found = before_client(config)
    loaded = any((check.name, check.verdict) == ("tasks", "ok") for check in found)
    return [*found, *(rehearsal(config) if loaded else ()), *last_words(config.site.state, "supernode")]


def before_client(config: ClientConfig) -> list[Check]:
    """What a site checks before it starts."""
    every: list[Callable[[ClientConfig], Checks]] = [
        lambda _: versions("fedmerge", "flwr", "torch", "grpcio"),
        lambda config: folder("state folder", config.site.state),
        tasks,
        client_keys,
        lambda config: handshake("server", config.server.address, config.tls.ca if config.tls else None),
        client_port,
        device,
    ]
    return _all(every, config)


def before_server(config: ServerConfig) -> list[Check]:
    """What a server checks before it starts; the rest shows as it starts."""
    return _all([lambda c: folder("state folder", c.state.folder), server_certificates, site_keys], config)


def report(checks: Iterable[Check], console: Console) -> int:
    """Prints a table, and whether this side is ready; returns 1 if anything failed, else 0."""
    checks = list(checks)
    table = Table(show_edge=False, pad_edge=False)
    for heading in ("", "check", "found", "to do"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    for check in checks:
        colour = colours[check.verdict]
        texts = (_plain(text) for text in (check.name, check.found, check.do))
        table.add_row(f"[{colour}]{check.verdict}[/{colour}]", *texts)
    console.print(table)
    failed = sum(check.verdict == "FAIL" for check in checks)
    console.print(
        f"\nnot ready: {failed} of {len(checks)} checks failed" if failed else "\nready", highlight=False
    )
    return int(failed > 0)


def require(checks: Iterable[Check]) -> None:
    """Logs what is not as it should be.

    Raises:
        ConfigError: a check failed; the others that did are in the log.
    """
    failed = []
    for check in checks:
        if check.verdict != "ok":
            logger.log(logging.ERROR if check.verdict == "FAIL" else logging.WARNING, "%s", check)
        failed += [check] if check.verdict == "FAIL" else []
    if failed:
        raise ConfigError(failed[0].found, where=failed[0].name, do=failed[0].do or None)


def print_causes(code: int, console: Console) -> int:
    """Prints what is known behind one of Flower's exit codes; returns 1 if nothing is."""
    found = causes_of(code)
    if not found:
        known = ", ".join(str(number) for number in sorted({cause.code for cause in CAUSES} - {0}))
        console.print(f"nothing is known of exit code {code}; known are {known}", highlight=False)
        return 1
    for cause in found:
        console.print(f"{cause.code}: {cause.why}\n     {cause.do}", markup=False, highlight=False)
    return 0


def versions(*packages: str) -> Checks:
    """Which versions are installed; both sides need the same fedmerge."""
    for package in packages:
        try:
            yield Check(f"{package} version", "ok", version(package))
        except PackageNotFoundError:
            yield Check(f"{package} version", "FAIL", "not installed", f"pip install {package}")


def folder(name: str, path: Path) -> Checks:
    """Whether a folder can be written, how fast it syncs, and how much space it has."""
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        yield Check(name, "FAIL", f"{existing} cannot be written", "Give it to the user who runs this.")
        return
    if existing == path and path.stat().st_mode & 0o077:
        yield Check(name, "warn", f"others can enter {path}", f"chmod 700 {path}")
    try:
        seconds = _sync_seconds(existing)
    except OSError as error:
        yield Check(name, "FAIL", f"{existing}: {error.strerror}", "Make room, or check the disk.")
        return
    free = shutil.disk_usage(existing).free
    verdict: Verdict = "FAIL" if free < TOO_LOW_BYTES else "warn" if free < LOW_BYTES else "ok"
    yield Check(
        name, verdict, f"{existing}: {free / 2**30:.1f} GiB free", "" if verdict == "ok" else "Make room."
    )
    slow = seconds > SLOW_SYNC_SECONDS
    yield Check(
        f"{name}, write and sync",
        "warn" if slow else "ok",
        f"{seconds * 1000:.0f} ms",
        "Every update waits for a few of these; a local disk is faster." if slow else "",
    )


def ledger(config: ServerConfig) -> Checks:
    """Whether a server runs here, and whether the ledger is whole."""
    from fedmerge.server.store.blobs import BLOBS
    from fedmerge.server.store.ledger import LEDGER
    from fedmerge.server.store.lock import hold

    path = config.state.folder / LEDGER
    if not path.exists():
        lost = any((config.state.folder / BLOBS).glob("*/*"))
        found = "gone, and its blobs are there" if lost else "none yet; the first start makes it"
        yield Check("ledger", "FAIL" if lost else "ok", found, "Restore it." if lost else "")
        return
    try:
        with hold(config.state.folder):
            yield Check("state folder, in use", "ok", "no server runs here")
    except StoreLocked as error:
        yield Check("state folder, in use", "ok", f"a server runs here: {error.got}")
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            verdict = str(database.execute("PRAGMA integrity_check").fetchone()[0])
    except sqlite3.Error as error:
        verdict = str(error)
    yield Check(
        "ledger", "ok" if verdict == "ok" else "FAIL", verdict, "" if verdict == "ok" else "Restore it."
    )


def rule(config: ServerConfig) -> Checks:
    """Whether there is such a merge rule, with such options."""
    from fedmerge.server.merge import make_rule

    yield from _attempt("rule", lambda: make_rule(config.rule.name, config.rule.options).name)


def base(config: ServerConfig) -> Checks:
    """Whether the pretrained model can be read."""
    from fedmerge.deploy.launch.server import open_model

    try:
        found = open_model(config.model)
    except FedmergeError as error:
        yield Check.of("base", error)
        return
    yield Check("base", "ok", f"{found.fingerprint[:12]}, {len(found.merged_layers)} layers are merged")


def server_certificates(config: ServerConfig) -> Checks:
    """The server's files, their dates, and the hosts they stand for."""
    tls = config.tls
    if tls is None:
        yield Check(
            "certificates", "warn", "no [tls]: this machine only, and any SuperNode of it may take part"
        )
        return
    files = TlsFiles(ca=tls.ca, cert=tls.cert, key=tls.key)
    found = [Check.of("certificates", error) for error in problems(files, _host(config.flower.listen))]
    yield from found
    if not found:
        yield from _dates("certificate", tls.cert)
        yield from _dates("authority", tls.ca)
    if config.flower.enabled and not found:
        yield from _attempt("certificate, on loopback", lambda: _loopback(tls.cert))
    yield from _revocations(tls.ca, tls.crl)


def site_keys(config: ServerConfig) -> Checks:
    """The public keys of the sites that may take part."""
    from fedmerge.deploy.launch.superlink import key_files, read_public_key

    if not config.flower.enabled or config.tls is None:
        return
    names = []
    for name, path in key_files(config.flower.sites):
        try:
            read_public_key(path)
            names.append(name)
        except FedmergeError as error:
            yield Check.of(f"key of site {name}", error)
    do = f"Put supernode.pub of every site into {config.flower.sites} as NAME.pub."
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    found = f"{len(names)}: {shown}" if names else f"none in {config.flower.sites}"
    yield Check("keys of sites", "ok" if names else "warn", found, "" if names else do)


def server_ports(config: ServerConfig) -> Checks:
    """Whether the ports are free; if the server runs, whether what it answers is right."""
    flower, tls = config.flower, config.tls
    wanted = [("service.listen", config.service.listen), ("metrics.listen", config.metrics.listen)]
    if flower.enabled:
        wanted += [("flower.listen", flower.listen), ("flower.superlink_port", local(flower.superlink_port))]
    busy = set()
    for key, address in wanted:
        if address is not None:
            why = ports.problem(address)
            busy |= {key} if why else set()
            do = "Right if this server runs; else stop what uses it, or choose another port."
            yield Check(key, "warn" if why else "ok", f"{address}: {why or 'free'}", do if why else "")
    if "flower.listen" in busy:
        reached = HostPort(host=_host(flower.listen) or "127.0.0.1", port=flower.listen.port)
        yield from handshake("SuperNodes' address", reached, tls.ca if tls else None)


def registered(config: ServerConfig) -> Checks:
    """What a running SuperLink knows of the sites: a key that is not registered there is turned away."""
    from fedmerge.deploy.launch.superlink import Control, Place, key_files

    flower = config.flower
    place = Place(config.state.folder / "flower", flower.superlink_port, config.tls)
    if not flower.enabled or config.tls is None or not place.healthy():
        return
    control = Control(place)
    try:
        status = {node.name: node.status for node in control.nodes()}
    except FedmergeError as error:
        yield Check.of("sites at the SuperLink", error)
        return
    finally:
        control.close()
    for name, _ in key_files(flower.sites):
        known = status.get(name, "not registered yet")
        fit = known in ("online", "offline", "registered")
        do = "" if fit else "A key that was taken out cannot come back: make the site a new one."
        yield Check(f"site {name}", "ok" if fit else "warn", known, do)


def ray(config: ServerConfig) -> Checks:
    """Whether the Ray cluster, if one is named, can be reached."""
    address = config.engine.ray_address
    if address in ("", "none"):
        yield Check("Ray", "ok", "a private one" if address == "" else "not used; merging in this process")
        return
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS).close()
        yield Check("Ray", "ok", f"{address} listens")
    except (OSError, ValueError, OverflowError) as error:
        yield Check(
            "Ray", "FAIL", f"{address}: {error}", "Start the cluster, or correct [engine] ray_address."
        )


def gpu() -> Checks:
    """Which GPU there is, if any."""
    import torch

    yield Check(
        "GPU", "ok", torch.cuda.get_device_name() if torch.cuda.is_available() else "none; using the CPU"
    )


def tasks(config: ClientConfig) -> Checks:
    """Whether the site's stream and model can be loaded."""
    from fedmerge.deploy.launch.client import probe

    try:
        found = probe(config)
    except FedmergeError as error:
        yield Check.of("tasks", error)
        return
    held = config.site.held or found.tasks
    yield Check("tasks", "ok", f"{', '.join(held)} of stream {found.stream}")
    yield Check(
        "base", "ok", f"{found.base[:12]}, {found.parameters:,} parameters; the server's must be the same"
    )


def client_keys(config: ClientConfig) -> Checks:
    """The site's key, and the authority it trusts."""
    tls = config.tls
    if tls is None:
        yield Check("key", "warn", "no [tls]: only for a server on this machine without authentication")
        return
    yield from _attempt("key", lambda: _key(tls.key))
    try:
        yield from _dates("authority", tls.ca)
    except FedmergeError as error:
        yield Check.of("authority", error)


def client_port(config: ClientConfig) -> Checks:
    """Whether the SuperNode's own port is free."""
    address = local(config.server.port)
    why = ports.problem(address)
    do = "Right if this site runs; else choose another [server] port." if why else ""
    yield Check("server.port", "warn" if why else "ok", f"{address}: {why or 'free'}", do)


def device(config: ClientConfig) -> Checks:
    """Whether the device that is asked for is there."""
    import torch

    if config.site.device.startswith("cuda") and not torch.cuda.is_available():
        yield Check(
            "device", "FAIL", f"{config.site.device}: no GPU that torch can use", 'Set device = "auto".'
        )
        return
    yield from gpu()


def handshake(name: str, address: HostPort, ca: Path | None) -> Checks:
    """Connects as a SuperNode does: reachable, trusted, healthy, and how far apart the clocks are."""
    started = time.time()
    try:
        answer, date = _ask_health(address, ca)
    except ssl.SSLCertVerificationError as error:
        why = explain(["Exit Code: 305", f"CERTIFICATE_VERIFY_FAILED: {error.verify_message}"])
        yield Check(f"{name}, TLS", "FAIL", error.verify_message, why)
        return
    except ssl.SSLError as error:
        do = "It does not speak TLS, or another version: compare [tls] on both sides, and the address."
        yield Check(f"{name}, TLS", "FAIL", error.reason or str(error), do)
        return
    except (OSError, HTTPException, OverflowError) as error:
        do = "Check the address, that the server runs, and what is between."
        if isinstance(error, HTTPException | ConnectionResetError) and ca is None:
            do = "If the server uses TLS, this side must too: name [tls]."
        yield Check(f"{name}, reachable", "FAIL", f"{address}: {error}", do)
        return
    yield Check(f"{name}, TLS" if ca else f"{name}, reachable", "ok", f"{address} answers")
    healthy = answer == 200
    yield Check(
        f"{name}, health", "ok" if healthy else "FAIL", f"HTTP {answer}", "" if healthy else "See its log."
    )
    if date is not None:
        yield _clock(date, (started + time.time()) / 2)


def last_words(path: Path, *names: str) -> Checks:
    """The cause that a process's last lines show, if they show one."""
    for name in names:
        try:
            lines = (path / f"{name}.log").read_text(errors="replace").splitlines()[-LOG_LINES:]
        except OSError:
            continue
        why = explain(lines)
        yield Check(f"{name}, last lines", "warn" if why else "ok", why or "no known error")


def _all(every: Iterable[Callable[[Config], Checks]], config: Config) -> list[Check]:
    return [check for look in every for check in look(config)]


def _attempt(name: str, look: Callable[[], str]) -> Checks:
    try:
        yield Check(name, "ok", look())
    except FedmergeError as error:
        yield Check.of(name, error)


def _key(path: Path) -> str:
    check_supernode_key(path)
    return f"{path}: ECDSA"


def _loopback(path: Path) -> str:
    check_host(read_certificate(path), "127.0.0.1", path)
    return "stands for 127.0.0.1, as the SuperLink needs"


def _dates(name: str, path: Path) -> Checks:
    cert = read_certificate(path)
    check_dates(cert, path)
    said = describe(cert)
    soon = said.left < SOON
    hosts = f", for {', '.join(said.hosts)}" if said.hosts else ""
    yield Check(
        name,
        "warn" if soon else "ok",
        f"{said.subject}: {said.key}, {said.left.days} days left{hosts}",
        "Renew it: fedmerge certs renew" if soon else "",
    )


def _revocations(ca: Path, path: Path) -> Checks:
    from fedmerge.server.service.access import CertificateAccess

    try:
        CertificateAccess(ca, path)
        listed = x509.load_pem_x509_crl(path.read_bytes())
    except (FedmergeError, OSError, ValueError) as error:
        do = "Copy the authority's crl.pem there; without it no client is let in."
        yield Check("revocations", "FAIL", str(error), do)
        return
    yield Check("revocations", "ok", f"{len(listed)} certificates are revoked")


def _host(address: HostPort) -> str | None:
    """The host that sites use, as far as an address to listen on says it."""
    return None if address.host in ("0.0.0.0", "::") else address.host


def _ask_health(address: HostPort, ca: Path | None) -> tuple[int, datetime | None]:
    connection = (
        HTTPConnection(address.host, address.port, timeout=ANSWER_SECONDS)
        if ca is None
        else HTTPSConnection(
            address.host,
            address.port,
            timeout=ANSWER_SECONDS,
            context=ssl.create_default_context(cafile=ca),
        )
    )
    with closing(connection):
        connection.request("GET", "/health")
        answer = connection.getresponse()
        date = answer.getheader("Date")
    return answer.status, parsedate_to_datetime(date) if date else None


def _clock(theirs: datetime, ours: float) -> Check:
    apart = abs((theirs - datetime.fromtimestamp(ours, UTC)).total_seconds())
    verdict: Verdict = "FAIL" if apart > TOO_FAR_SECONDS else "warn" if apart > CLOCK_SECONDS else "ok"
    return Check("clocks", verdict, f"{apart:.0f} s apart", "" if verdict == "ok" else "Set them with NTP.")


def _sync_seconds(path: Path) -> float:
    started = time.perf_counter()
    with TemporaryFile(dir=path) as file:
        file.write(b"\0" * 2**20)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - started


def _plain(text: str) -> str:
    """Text that rich does not take for markup."""
    return text.replace("[", r"\[")
