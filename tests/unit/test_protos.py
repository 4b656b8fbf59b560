"""Does the contract on the wire say exactly what records and errors say?"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmerge.common import errors, records
from fedmerge.common.errors import FedmergeError, LimitError, VersionMismatch
from fedmerge.common.messages import (
    ERROR_KEY,
    KINDS,
    LONGEST_ERROR_BYTES,
    MESSAGES,
    pack_error,
    to_dtype,
    to_message,
    to_record,
    unpack_error,
)
from fedmerge.protos import regenerate
from fedmerge.protos.fedmerge.v1 import aggregator_pb2 as pb
from fedmerge.server.service.servicer import ROLES
from fedmerge.server.service.status import STATUS

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
INTEGERS = st.integers(-(2**63), 2**63 - 1)
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: st.text(st.characters(exclude_categories=["Cs"])),
    int: INTEGERS,
    int | None: st.none() | INTEGERS,
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    tuple[str, ...]: st.lists(st.text(), max_size=4).map(tuple),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    if hint in VALUES:
        return VALUES[hint]
    if isinstance(hint, type):
        return st.sampled_from(list(hint))
    whole_numbers = hint.__args__[1] is int
    return st.dictionaries(st.text(), INTEGERS if whole_numbers else JSON, max_size=3)


def any_record(kind: type) -> st.SearchStrategy[Any]:
    return st.builds(kind, **{name: values_of(hint) for name, hint in get_type_hints(kind).items()})


def test_regenerating_gives_the_modules_that_are_checked_in(tmp_path: Path) -> None:
    regenerate.regenerate(tmp_path)
    for name in regenerate.GENERATED:
        assert (tmp_path / name).read_bytes() == (regenerate.PROTOS / name).read_bytes(), name


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_record_and_its_message_have_the_same_fields(kind: type) -> None:
    assert [field.name for field in dataclasses.fields(kind)] == [
        field.name for field in MESSAGES[kind].DESCRIPTOR.fields
    ]


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_record_comes_back_as_it_was(kind: type) -> None:
    @given(any_record(kind))
    @settings(max_examples=100, deadline=None)
    def round_trip(record: Any) -> None:
        wire = to_message(record).SerializeToString()
        assert to_record(MESSAGES[kind].FromString(wire), kind) == record

    round_trip()


def test_every_record_of_the_service_has_a_message() -> None:
    told = {kind for kind in vars(records).values() if dataclasses.is_dataclass(kind)}
    assert told == set(MESSAGES)


@pytest.mark.parametrize("state", [0, 99])
def test_a_state_this_software_does_not_know_is_a_version_mismatch(state: int) -> None:
    with pytest.raises(VersionMismatch, match="same fedmerge version"):
        to_record(pb.Receipt(update="ab", state=state), records.Receipt)  # type: ignore[arg-type]


def test_options_that_are_no_object_are_a_version_mismatch() -> None:
    with pytest.raises(VersionMismatch, match="options"):
        to_record(pb.Status(options="[1]"), records.Status)


def test_a_dtype_this_software_does_not_know_is_a_version_mismatch() -> None:
    assert [to_dtype(number) for number in (0, 1, 2)] == ["f32", "f32", "bf16"]
    with pytest.raises(VersionMismatch, match="dtype"):
        to_dtype(3)


@pytest.mark.parametrize("kind", KINDS.values())
def test_an_error_comes_back_as_it_was(kind: type[FedmergeError]) -> None:
    error = kind("what", where="site-1", layer="a.b", got="é", wanted="3", do="Try again.")
    back = unpack_error(dict(pack_error(error)))
    assert type(back) is kind
    assert str(back) == str(error)
    if isinstance(error, LimitError):
        assert isinstance(back, LimitError)
        assert back.retry_after == error.retry_after


def test_an_error_of_any_length_fits_into_headers() -> None:
    long = "\N{GRINNING FACE}" * 10_000
    error = errors.ShapeMismatch(long, where=long, layer=long, got=long, wanted=long, do=long)
    packed = dict(pack_error(error))
    assert len(packed[ERROR_KEY]) <= LONGEST_ERROR_BYTES
    assert isinstance(unpack_error(packed), errors.ShapeMismatch)


def test_an_error_of_a_newer_server_is_still_an_error() -> None:
    back = unpack_error({ERROR_KEY: b'{"error": "Tomorrow", "what": "something new", "got": 7}'})
    assert type(back) is FedmergeError
    assert str(back) == "something new"


@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
@settings(max_examples=300, deadline=None)
def test_metadata_that_tell_no_error_are_no_error(data: bytes) -> None:
    assert unpack_error({ERROR_KEY: data}) is None


@pytest.mark.parametrize("text", ["nan", "inf", "-1", "soon", b"\xff"])
def test_a_delay_that_is_no_number_of_seconds_is_left_out(text: str | bytes) -> None:
    packed = dict(pack_error(errors.Busy("full")))
    back = unpack_error({**packed, "retry-after": text})
    assert isinstance(back, errors.Busy)
    assert back.retry_after is None


def test_every_error_class_has_a_status() -> None:
    def tree(kind: type[FedmergeError]) -> set[type[FedmergeError]]:
        return {kind}.union(*map(tree, kind.__subclasses__()))

    public = {kind for kind in tree(FedmergeError) if kind.__module__.startswith("fedmerge.")}
    assert set(STATUS) == public


def test_every_method_has_a_row_of_roles() -> None:
    assert set(ROLES) == {method.name for method in pb.DESCRIPTOR.services_by_name["Aggregator"].methods}


def test_infinite_norms_survive_the_wire() -> None:
    record = records.VersionRecord(1, records.VersionKind.MERGE, 0, math.inf)
    assert to_record(to_message(record), records.VersionRecord) == record
