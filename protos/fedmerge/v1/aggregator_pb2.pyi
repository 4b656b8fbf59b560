from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_STATE_UNSPECIFIED: _ClassVar[UpdateState]
    UPDATE_STATE_STAGED: _ClassVar[UpdateState]
    UPDATE_STATE_HELD: _ClassVar[UpdateState]
    UPDATE_STATE_MERGED: _ClassVar[UpdateState]
    UPDATE_STATE_REJECTED: _ClassVar[UpdateState]
    UPDATE_STATE_FAILED: _ClassVar[UpdateState]
    UPDATE_STATE_REMOVED: _ClassVar[UpdateState]

class VersionKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERSION_KIND_UNSPECIFIED: _ClassVar[VersionKind]
    VERSION_KIND_BASE: _ClassVar[VersionKind]
    VERSION_KIND_MERGE: _ClassVar[VersionKind]
    VERSION_KIND_ROLLBACK: _ClassVar[VersionKind]
    VERSION_KIND_REMOVAL: _ClassVar[VersionKind]

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_F32: _ClassVar[Dtype]
    DTYPE_BF16: _ClassVar[Dtype]
UPDATE_STATE_UNSPECIFIED: UpdateState
UPDATE_STATE_STAGED: UpdateState
UPDATE_STATE_HELD: UpdateState
UPDATE_STATE_MERGED: UpdateState
UPDATE_STATE_REJECTED: UpdateState
UPDATE_STATE_FAILED: UpdateState
UPDATE_STATE_REMOVED: UpdateState
VERSION_KIND_UNSPECIFIED: VersionKind
VERSION_KIND_BASE: VersionKind
VERSION_KIND_MERGE: VersionKind
VERSION_KIND_ROLLBACK: VersionKind
VERSION_KIND_REMOVAL: VersionKind
DTYPE_UNSPECIFIED: Dtype
DTYPE_F32: Dtype
DTYPE_BF16: Dtype

class SubmitRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("site", "size", "sha256")
    SITE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    site: str
    size: int
    sha256: str
    def __init__(self, site: _Optional[str] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("update", "state", "version", "again")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    update: str
    state: UpdateState
    version: int
    again: bool
    def __init__(self, update: _Optional[str] = ..., state: _Optional[_Union[UpdateState, str]] = ..., version: _Optional[int] = ..., again: bool = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("version", "dtype", "offset", "sha256")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    version: int
    dtype: Dtype
    offset: int
    sha256: str
    def __init__(self, version: _Optional[int] = ..., dtype: _Optional[_Union[Dtype, str]] = ..., offset: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: PullHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[PullHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class PullHeader(_message.Message):
    __slots__ = ("record", "size", "sha256", "offset")
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    record: VersionRecord
    size: int
    sha256: str
    offset: int
    def __init__(self, record: _Optional[_Union[VersionRecord, _Mapping]] = ..., size: _Optional[int] = ..., sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("after",)
    AFTER_FIELD_NUMBER: _ClassVar[int]
    after: int
    def __init__(self, after: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetUpdateRequest(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: str
    def __init__(self, update: _Optional[str] = ...) -> None: ...

class ListUpdatesRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListUpdatesResponse(_message.Message):
    __slots__ = ("updates",)
    UPDATES_FIELD_NUMBER: _ClassVar[int]
    updates: _containers.RepeatedCompositeFieldContainer[UpdateRecord]
    def __init__(self, updates: _Optional[_Iterable[_Union[UpdateRecord, _Mapping]]] = ...) -> None: ...

class ListRefusalsRequest(_message.Message):
    __slots__ = ("limit",)
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    limit: int
    def __init__(self, limit: _Optional[int] = ...) -> None: ...

class ListRefusalsResponse(_message.Message):
    __slots__ = ("refusals",)
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    refusals: _containers.RepeatedCompositeFieldContainer[Refusal]
    def __init__(self, refusals: _Optional[_Iterable[_Union[Refusal, _Mapping]]] = ...) -> None: ...

class GetVersionRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class ListVersionsRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: int
    limit: int
    def __init__(self, after: _Optional[int] = ..., limit: _Optional[int] = ...) -> None: ...

class ListVersionsResponse(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionRecord]
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionRecord, _Mapping]]] = ...) -> None: ...

class RollBackRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: int
    def __init__(self, version: _Optional[int] = ...) -> None: ...

class RemoveRequest(_message.Message):
    __slots__ = ("task",)
    TASK_FIELD_NUMBER: _ClassVar[int]
    task: str
    def __init__(self, task: _Optional[str] = ...) -> None: ...

class ApproveRequest(_message.Message):
    __slots__ = ("update",)
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    update: str
    def __init__(self, update: _Optional[str] = ...) -> None: ...

class RejectRequest(_message.Message):
    __slots__ = ("update", "reason")
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    update: str
    reason: str
    def __init__(self, update: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RejectResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class UpdateRecord(_message.Message):
    __slots__ = ("seq", "id", "site", "task", "state", "sha256", "size", "examples", "origin_version", "norm", "at", "version", "reason", "kept")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_VERSION_FIELD_NUMBER: _ClassVar[int]
    NORM_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    seq: int
    id: str
    site: str
    task: str
    state: UpdateState
    sha256: str
    size: int
    examples: int
    origin_version: int
    norm: float
    at: float
    version: int
    reason: str
    kept: bool
    def __init__(self, seq: _Optional[int] = ..., id: _Optional[str] = ..., site: _Optional[str] = ..., task: _Optional[str] = ..., state: _Optional[_Union[UpdateState, str]] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ..., examples: _Optional[int] = ..., origin_version: _Optional[int] = ..., norm: _Optional[float] = ..., at: _Optional[float] = ..., version: _Optional[int] = ..., reason: _Optional[str] = ..., kept: bool = ...) -> None: ...

class VersionRecord(_message.Message):
    __slots__ = ("number", "kind", "parent", "at", "update", "task", "site", "examples", "merges", "norm_sum", "update_norm", "state_norm", "scale", "lambda_t", "merged_norm", "sha256", "size", "kept", "snapshot", "seconds", "by")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    UPDATE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    MERGES_FIELD_NUMBER: _ClassVar[int]
    NORM_SUM_FIELD_NUMBER: _ClassVar[int]
    UPDATE_NORM_FIELD_NUMBER: _ClassVar[int]
    STATE_NORM_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_T_FIELD_NUMBER: _ClassVar[int]
    MERGED_NORM_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    number: int
    kind: VersionKind
    parent: int
    at: float
    update: str
    task: str
    site: str
    examples: int
    merges: int
    norm_sum: float
    update_norm: float
    state_norm: float
    scale: float
    lambda_t: float
    merged_norm: float
    sha256: str
    size: int
    kept: bool
    snapshot: str
    seconds: float
    by: str
    def __init__(self, number: _Optional[int] = ..., kind: _Optional[_Union[VersionKind, str]] = ..., parent: _Optional[int] = ..., at: _Optional[float] = ..., update: _Optional[str] = ..., task: _Optional[str] = ..., site: _Optional[str] = ..., examples: _Optional[int] = ..., merges: _Optional[int] = ..., norm_sum: _Optional[float] = ..., update_norm: _Optional[float] = ..., state_norm: _Optional[float] = ..., scale: _Optional[float] = ..., lambda_t: _Optional[float] = ..., merged_norm: _Optional[float] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ..., kept: bool = ..., snapshot: _Optional[str] = ..., seconds: _Optional[float] = ..., by: _Optional[str] = ...) -> None: ...

class Refusal(_message.Message):
    __slots__ = ("at", "site", "task", "sha256", "size", "error", "reason")
    AT_FIELD_NUMBER: _ClassVar[int]
    SITE_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    at: float
    site: str
    task: str
    sha256: str
    size: int
    error: str
    reason: str
    def __init__(self, at: _Optional[float] = ..., site: _Optional[str] = ..., task: _Optional[str] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ..., error: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("fedmerge", "base", "rule", "options", "version", "tasks", "staged", "held", "merged", "refused", "failing", "disk", "started")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    FEDMERGE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    FAILING_FIELD_NUMBER: _ClassVar[int]
    DISK_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    fedmerge: str
    base: str
    rule: str
    options: str
    version: int
    tasks: _containers.RepeatedScalarFieldContainer[str]
    staged: int
    held: int
    merged: int
    refused: _containers.ScalarMap[str, int]
    failing: str
    disk: int
    started: float
    def __init__(self, fedmerge: _Optional[str] = ..., base: _Optional[str] = ..., rule: _Optional[str] = ..., options: _Optional[str] = ..., version: _Optional[int] = ..., tasks: _Optional[_Iterable[str]] = ..., staged: _Optional[int] = ..., held: _Optional[int] = ..., merged: _Optional[int] = ..., refused: _Optional[_Mapping[str, int]] = ..., failing: _Optional[str] = ..., disk: _Optional[int] = ..., started: _Optional[float] = ...) -> None: ...
