"""Is a data package there completely, with the pinned bytes, or not at all?"""

import gzip
import hashlib
import io
import json
import shutil
import sys
import tarfile
import threading
import zipfile
import zlib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fedmerge.common.errors import FileError, UnsafeFile
from fedmerge.deploy.streams.fetch import Package, cache_root, fetch, fetch_all

NAME = "fedmerge-no-such-data"


def wheel(folder: Path, members: dict[str, str], name: str = NAME, tags: str = "py3-none-any") -> Package:
    """A data wheel in ``folder`` that real pip accepts."""
    folder.mkdir(exist_ok=True)
    stem = f"{name.replace('-', '_')}-1.0"
    path = folder / f"{stem}-{tags}.whl"
    info = {
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{stem}.dist-info/WHEEL": f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tags}\n",
        f"{stem}.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as archive:
        for member, words in {**members, **info}.items():
            archive.writestr(member, words)
    return Package(name, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.name)


def tarball(folder: Path, members: dict[str, str]) -> Package:
    """An archive as npm packs it."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{NAME}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for name, words in {"package.json": "{}", **members}.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(words)
            archive.addfile(member, io.BytesIO(words.encode()))
    return Package(NAME, "1.0.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.name, registry="npm")


def sdist(folder: Path, member: tarfile.TarInfo) -> Package:
    folder.mkdir(exist_ok=True)
    path = folder / f"{NAME}-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        member.size = 5 if member.isreg() else 0
        archive.addfile(member, io.BytesIO(b"hello"))
    return Package(NAME, "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.name, sdist=True)


@pytest.fixture
def index(tmp_path):
    return tmp_path / "index"


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def copier(script: Path, index: Path, flag: str) -> tuple[str, ...]:
    """A stand-in for a client: copies every file of the index to where ``flag`` says."""
    script.write_text(
        "import pathlib, shutil, sys\n"
        f"target = sys.argv[sys.argv.index({flag!r}) + 1]\n"
        f"for path in pathlib.Path({str(index)!r}).iterdir(): shutil.copy(path, target)\n"
    )
    return (sys.executable, str(script))


@pytest.fixture
def pip(tmp_path, index):
    return copier(tmp_path / "pip.py", index, "-d")


@pytest.fixture
def npm(tmp_path, index):
    return copier(tmp_path / "npm.py", index, "--pack-destination")


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Starts a registry of npm's kind on this machine; returns what puts an archive into it."""
    served: dict[str, bytes] = {}

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in served else 404)
            self.end_headers()
            self.wfile.write(served.get(self.path, b"{}"))

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Registry) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("npm_config_registry", address)
        monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield lambda package, path: served.update(announced(package, path.read_bytes(), address))
        server.shutdown()


def announced(package: Package, archive: bytes, address: str) -> dict[str, bytes]:
    """What a registry serves of one version: the archive, and where it is with a checksum npm compares."""
    where = f"/{package.name}/-/{package.filename}"
    dist = {"tarball": address + where, "shasum": hashlib.sha1(archive).hexdigest()}
    version = {"name": package.name, "version": package.version, "dist": dist}
    about = {"name": package.name, "versions": {package.version: version}}
    return {f"/{package.name}": json.dumps(about).encode(), where: archive}


def failing_pip(stderr: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import sys; sys.exit({stderr!r})")


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_real_pip_fetches_a_pinned_wheel(index, cache, monkeypatch):
    package = wheel(index, {"data/a.txt": "hello"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert (fetch(package, cache) / "data" / "a.txt").read_text() == "hello"
    assert left_in(cache) == [package.folder]


def test_real_pip_refuses_other_bytes(index, cache, monkeypatch):
    package = wheel(index, {"data/a.txt": "hello"})
    other = Package(package.name, package.version, "0" * 64, package.filename)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(FileError, match=f"SHA-256 differs .* got {package.sha256}, wanted 0000"):
        fetch(other, cache)
    assert left_in(cache) == []


def test_real_pip_that_finds_nothing_says_so_in_its_last_line(index, cache, monkeypatch):
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    with pytest.raises(FileError, match=rf"package {NAME}==1.0: pip could not .* No matching distribution"):
        fetch(Package(NAME, "1.0", "0" * 64, "x-1.0-py3-none-any.whl"), cache)
    assert left_in(cache) == []


def test_second_call_does_not_run_pip(index, cache, pip):
    package = wheel(index, {"a.txt": "hello"})
    first = fetch(package, cache, pip)
    assert fetch(package, cache, failing_pip("must not run")) == first


def test_archive_laid_into_the_cache_is_used_instead_of_pip(cache):
    package = wheel(cache, {"a.txt": "hello"})
    assert (fetch(package, cache, failing_pip("must not run")) / "a.txt").read_text() == "hello"


def test_source_archive_is_unpacked(index, cache, pip):
    package = sdist(index, tarfile.TarInfo("data-1.0/a.txt"))
    assert (fetch(package, cache, pip) / "data-1.0" / "a.txt").read_text() == "hello"
    assert left_in(cache) == [package.folder]


def test_wrong_hash_is_refused_and_leaves_nothing(index, cache, pip):
    package = wheel(index, {"a.txt": "hello"})
    other = Package(package.name, package.version, "f" * 64, package.filename)
    with pytest.raises(FileError, match=f"SHA-256 differs .* got {package.sha256}, wanted ffff"):
        fetch(other, cache, pip)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    "member", ["../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt", "C:evil.txt"]
)
def test_wheel_member_outside_its_folder_is_refused(index, cache, pip, tmp_path, member):
    package = wheel(index, {member: "evil"})
    with pytest.raises(UnsafeFile, match="a member lies outside"):
        fetch(package, cache, pip)
    assert left_in(cache) == []
    assert not list(tmp_path.rglob("*evil*"))


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize(
    "member", [tarfile.TarInfo("../evil.txt"), link("evil", "../../.."), link("evil", "/etc")]
)
def test_source_member_outside_its_folder_is_refused(index, cache, pip, tmp_path, member):
    package = sdist(index, member)
    with pytest.raises(UnsafeFile, match="cannot be unpacked safely"):
        fetch(package, cache, pip)
    assert left_in(cache) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_damaged_archive_is_refused(index, cache, pip):
    index.mkdir()
    (index / "x-1.0-py3-none-any.whl").write_bytes(b"not a wheel")
    package = Package(NAME, "1.0", hashlib.sha256(b"not a wheel").hexdigest(), "x-1.0-py3-none-any.whl")
    with pytest.raises(UnsafeFile, match=r"any.whl: cannot be unpacked safely"):
        fetch(package, cache, pip)
    assert left_in(cache) == []


def test_npm_archive_that_cannot_be_decompressed_is_refused(index, cache, npm):
    package = tarball(index, {"a.txt": "hello" * 10_000})
    path = index / package.filename
    whole = gzip.decompress(path.read_bytes())
    press = zlib.compressobj(wbits=31)
    data = press.compress(whole[: len(whole) // 2]) + press.flush(zlib.Z_FULL_FLUSH)
    data += bytes([7] * 8)  # a kind of block that there is not
    path.write_bytes(data)
    with pytest.raises(UnsafeFile, match="cannot be unpacked safely"):
        fetch(replace(package, sha256=hashlib.sha256(data).hexdigest()), cache, npm)
    assert left_in(cache) == []


def test_a_cache_that_is_no_folder_is_told_with_a_way_out(index, cache, pip):
    cache.write_text("a file")
    with pytest.raises(FileError, match=r"cache folder cannot be used: got .*FEDMERGE_CACHE"):
        fetch(wheel(index, {"a.txt": "hello"}), cache, pip)


def test_failing_pip_is_told_with_its_last_line_and_a_way_out(cache):
    package = Package(NAME, "1.0", "0" * 64, "x-1.0-py3-none-any.whl")
    with pytest.raises(FileError) as caught:
        fetch(package, cache, failing_pip("first line\nERROR: no network\n"))
    assert "got ERROR: no network. Check the network" in str(caught.value)
    assert f"put x-1.0-py3-none-any.whl into {cache}" in str(caught.value)
    assert left_in(cache) == []


def test_pip_that_brings_another_file_is_refused(cache):
    with pytest.raises(FileError, match=r"exit status 0, no x-1.0-py3-none-any.whl"):
        fetch(Package(NAME, "1.0", "0" * 64, "x-1.0-py3-none-any.whl"), cache, (sys.executable, "-c", ""))


def test_real_pip_fetches_a_wheel_built_for_another_platform(index, cache, monkeypatch):
    package = wheel(index, {"a.txt": "hello"}, tags="cp37-cp37m-win32.win_arm64")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    assert (fetch(package, cache) / "a.txt").read_text() == "hello"


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_real_npm_fetches_a_pinned_package_and_runs_none_of_its_scripts(index, cache, publish):
    scripts = json.dumps({"name": NAME, "version": "1.0.0", "scripts": {"prepack": "touch ran"}})
    package = tarball(index, {"package.json": scripts, "data/a.txt": "hello"})
    publish(package, index / package.filename)
    folder = fetch(package, cache) / "package"
    assert (folder / "data" / "a.txt").read_text() == "hello"
    assert left_in(cache) == [package.folder]
    assert not list(cache.rglob("ran"))


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_real_npm_that_finds_nothing_says_so(cache, publish):
    with pytest.raises(
        FileError, match=rf"package {NAME}==1.0.0: npm could not .* Not Found .*npm's index, or put"
    ):
        fetch(Package(NAME, "1.0.0", "0" * 64, f"{NAME}-1.0.0.tgz", registry="npm"), cache)
    assert left_in(cache) == []


def test_cache_may_be_named_from_the_working_folder(index, tmp_path, pip, npm, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for package, client in (
        (wheel(index, {"a.txt": "hello"}), pip),
        (tarball(index, {"a.txt": "hello"}), npm),
    ):
        assert fetch(package, Path("cache"), client) == Path("cache") / package.folder


def test_npm_package_of_other_bytes_is_refused_and_leaves_nothing(index, cache, npm):
    package = replace(tarball(index, {"a.txt": "hello"}), sha256="f" * 64)
    with pytest.raises(FileError, match=r"SHA-256 differs .* wanted ffff"):
        fetch(package, cache, npm)
    assert left_in(cache) == []


def test_npm_member_outside_its_folder_is_refused(index, cache, npm, tmp_path):
    package = tarball(index, {"../../evil.txt": "evil"})
    with pytest.raises(UnsafeFile, match="cannot be unpacked safely"):
        fetch(package, cache, npm)
    assert left_in(cache) == []
    assert not list(tmp_path.rglob("*evil*"))


def test_without_npm_the_archive_may_be_laid_into_the_cache(index, cache):
    package = tarball(index, {"a.txt": "hello"})
    with pytest.raises(
        FileError, match=rf"npm could not .* or put {package.filename} into {cache}"
    ) as caught:
        fetch(package, cache, ("no-such-command",))
    assert "no-such-command" in str(caught.value)
    shutil.copy(index / package.filename, cache)
    assert (fetch(package, cache, ("no-such-command",)) / "package" / "a.txt").read_text() == "hello"


def test_all_are_fetched_in_order(cache):
    packages = [wheel(cache, {"a.txt": name}, name) for name in ("one", "two")]
    folders = fetch_all(packages, cache)
    assert [(folder / "a.txt").read_text() for folder in folders] == ["one", "two"]
    assert fetch_all(packages, cache) == folders


def test_cache_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDMERGE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("FEDMERGE_CACHE")
    assert cache_root() == Path.home() / ".cache" / "fedmerge"
