"""Does a file come together from its ranges however they arrive, and never wrongly?"""

import hashlib
import json
import os
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from fedmerge.common.errors import FileError, MismatchError, NotFound, StoreDamaged, StoreFull
from fedmerge.common.ranges import MAX_MESSAGE_BYTES, RangeFile, RangeManifest

DATA = random.Random(0).randbytes(2500)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def manifest(source: Path) -> RangeManifest:
    return RangeManifest.of(source, 1000)


def transfer(source: Path, file: RangeFile, indexes) -> None:
    for index in indexes:
        file.write(index, file.manifest.read(source, index))


# --- manifests ---


def test_a_manifest_tells_size_and_hashes(manifest):
    hashes = [hashlib.sha256(DATA[i : i + 1000]).hexdigest() for i in (0, 1000, 2000)]
    assert (manifest.size, manifest.range_bytes, list(manifest.hashes)) == (2500, 1000, hashes)
    assert manifest.sha256 == hashlib.sha256(DATA).hexdigest()
    assert [manifest.span(index) for index in range(3)] == [(0, 1000), (1000, 2000), (2000, 2500)]


@pytest.mark.parametrize("range_bytes", [1, 499, 500, 2499, 2500, 2501, 1 << 21])
def test_ranges_of_any_size_make_up_the_file(source, range_bytes):
    manifest = RangeManifest.of(source, range_bytes)
    assert b"".join(manifest.read(source, index) for index in range(len(manifest.hashes))) == DATA


def test_ranges_larger_than_a_block_are_hashed_right(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(DATA * 1300)
    manifest = RangeManifest.of(path, (3 << 20) + 1)
    assert manifest.hashes[0] == hashlib.sha256(path.read_bytes()[: (3 << 20) + 1]).hexdigest()
    assert manifest.sha256 == hashlib.sha256(DATA * 1300).hexdigest()


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": -5},
        {"size": 3001},
        {"size": 2**63},
        {"range_bytes": 0},
        {"range_bytes": 800},
        {"range_bytes": MAX_MESSAGE_BYTES + 1},
        {"hashes": ()},
        {"sha256": "x" * 64},
        {"sha256": ""},
        {"hashes": ("0" * 64, "0" * 64, "0" * 63)},
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(manifest, change):
    with pytest.raises(MismatchError, match="manifest"):
        replace(manifest, **change)


@pytest.mark.parametrize("index", [-1, 3, 2**40])
def test_a_range_that_is_not_there_is_refused(source, manifest, index):
    with pytest.raises(MismatchError, match="no such range"):
        manifest.read(source, index)


def test_a_file_that_has_gone_or_shrunk_is_an_error(source, manifest):
    source.write_bytes(DATA[:2400])
    with pytest.raises(FileError, match="shorter"):
        manifest.read(source, 2)
    source.unlink()
    with pytest.raises(FileError, match="cannot be read"):
        manifest.read(source, 2)
    with pytest.raises(FileError, match="cannot be read"):
        RangeManifest.of(source)


def test_an_empty_file_has_no_manifest(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(MismatchError, match="impossible sizes"):
        RangeManifest.of(tmp_path / "empty")


# --- putting together ---


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 1, 2, 0, 2)])
def test_ranges_may_come_in_any_order_and_twice(source, manifest, tmp_path, order):
    file = RangeFile(tmp_path / "got", manifest)
    assert file.missing == (0, 1, 2)
    transfer(source, file, order)
    assert not file.path.exists()
    assert file.finish().read_bytes() == DATA
    assert sorted(path.name for path in tmp_path.iterdir()) == ["got", "source"]


def test_it_goes_on_after_a_crash_with_what_was_written(source, manifest, tmp_path):
    transfer(source, RangeFile(tmp_path / "got", manifest), [1])
    again = RangeFile(tmp_path / "got", manifest)
    assert again.missing == (0, 2)
    transfer(source, again, [0])
    last = RangeFile.resume(tmp_path / "got", manifest.sha256)
    assert last.missing == (2,)
    transfer(source, last, [2])
    assert last.finish().read_bytes() == DATA


def test_another_file_begins_anew(source, manifest, tmp_path):
    transfer(source, RangeFile(tmp_path / "got", manifest), [0, 1])
    other = RangeManifest.of(source, 1250)
    assert RangeFile(tmp_path / "got", other).missing == (0, 1)
    with pytest.raises(MismatchError):
        RangeFile(tmp_path / "got", other).finish()


def test_only_the_transfer_under_way_can_be_resumed(source, manifest, tmp_path):
    with pytest.raises(NotFound):
        RangeFile.resume(tmp_path / "got", manifest.sha256)
    RangeFile(tmp_path / "got", manifest)
    with pytest.raises(NotFound):
        RangeFile.resume(tmp_path / "got", "0" * 64)


@pytest.mark.parametrize("data", [b"", DATA[:999], DATA[:1001], DATA[1:1001], DATA[:999] + b"\0"])
def test_other_bytes_than_the_manifest_says_are_refused(manifest, tmp_path, data):
    file = RangeFile(tmp_path / "got", manifest)
    with pytest.raises(MismatchError, match="range 0 of got"):
        file.write(0, data)
    assert RangeFile(tmp_path / "got", manifest).missing == (0, 1, 2)


def test_a_file_with_ranges_missing_is_not_finished(source, manifest, tmp_path):
    file = RangeFile(tmp_path / "got", manifest)
    transfer(source, file, [0, 2])
    with pytest.raises(MismatchError, match="1 missing"):
        file.finish()
    assert not (tmp_path / "got").exists()


def test_a_bit_that_flips_on_disk_is_found_and_only_its_range_asked_for_again(source, manifest, tmp_path):
    file = RangeFile(tmp_path / "got", manifest)
    transfer(source, file, [0, 1, 2])
    part = tmp_path / "got.part"
    damaged = bytearray(part.read_bytes())
    damaged[1500] ^= 1
    part.write_bytes(damaged)
    with pytest.raises(StoreDamaged):
        file.finish()
    again = RangeFile(tmp_path / "got", manifest)
    assert again.missing == (1,)
    transfer(source, again, [1])
    assert again.finish().read_bytes() == DATA


def test_a_manifest_whose_whole_is_not_its_parts_never_finishes(source, manifest, tmp_path):
    file = RangeFile(tmp_path / "got", replace(manifest, sha256="0" * 64))
    transfer(source, file, [0, 1, 2])
    with pytest.raises(StoreDamaged):
        file.finish()
    assert file.missing == (0, 1, 2)
    assert not (tmp_path / "got").exists()


@pytest.mark.parametrize("cut", range(1, 68))
def test_a_record_that_a_crash_cut_short_counts_only_whole_lines(source, manifest, tmp_path, cut):
    transfer(source, RangeFile(tmp_path / "got", manifest), [0, 1])
    record = tmp_path / "got.ranges"
    record.write_bytes(record.read_bytes()[:-cut])
    again = RangeFile(tmp_path / "got", manifest)
    assert again.missing == ((2,) if cut == 1 else (1, 2))  # the line is whole, only its end is gone
    transfer(source, again, again.missing)
    assert RangeFile(tmp_path / "got", manifest).missing == ()
    assert again.finish().read_bytes() == DATA


@pytest.mark.parametrize("text", ["", "{}", "garbage\n0 x", '{"size": 1}', "\ud800", "9 " * 1000])
def test_a_record_that_is_none_begins_anew(source, manifest, tmp_path, text):
    transfer(source, RangeFile(tmp_path / "got", manifest), [0])
    (tmp_path / "got.ranges").write_bytes(text.encode(errors="surrogatepass"))
    assert RangeFile(tmp_path / "got", manifest).missing == (0, 1, 2)


def test_a_record_without_its_bytes_counts_for_nothing(source, manifest, tmp_path):
    transfer(source, RangeFile(tmp_path / "got", manifest), [0, 1])
    (tmp_path / "got.part").unlink()
    assert RangeFile(tmp_path / "got", manifest).missing == (0, 1, 2)


def test_a_record_that_claims_ranges_which_are_not_there_is_found_out(source, manifest, tmp_path):
    transfer(source, RangeFile(tmp_path / "got", manifest), [0])
    lines = [
        json.dumps(asdict(manifest)),
        *(f"{index} {found}" for index, found in enumerate(manifest.hashes)),
    ]
    (tmp_path / "got.ranges").write_text("\n".join(lines) + "\n")
    file = RangeFile(tmp_path / "got", manifest)
    assert file.missing == ()
    with pytest.raises(StoreDamaged):
        file.finish()
    assert file.missing == (1, 2)


def test_a_disk_that_takes_nothing_is_a_typed_error_and_loses_nothing(
    source, manifest, tmp_path, monkeypatch
):
    file = RangeFile(tmp_path / "got", manifest)
    transfer(source, file, [0])

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("os.pwrite", full)
        with pytest.raises(StoreFull, match="No space left"):
            transfer(source, file, [1])
    assert RangeFile(tmp_path / "got", manifest).missing == (1, 2)
    transfer(source, file, [1, 2])
    assert file.finish().read_bytes() == DATA


def test_a_record_of_an_empty_file_is_found_out(source, manifest, tmp_path):
    transfer(source, RangeFile(tmp_path / "got", manifest), [0, 1, 2])
    (tmp_path / "got.part").write_bytes(b"")
    file = RangeFile(tmp_path / "got", manifest)
    with pytest.raises(StoreDamaged):
        file.finish()
    assert file.missing == (0, 1, 2)


def test_a_short_write_is_carried_on(source, manifest, tmp_path, monkeypatch):
    whole = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda handle, data, offset: whole(handle, data[:300], offset))
    file = RangeFile(tmp_path / "got", manifest)
    transfer(source, file, [2, 1, 0])
    assert file.finish().read_bytes() == DATA
