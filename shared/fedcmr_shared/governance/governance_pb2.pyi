from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Condition(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONDITION_UNSPECIFIED: _ClassVar[Condition]
    CONDITION_READY: _ClassVar[Condition]
    CONDITION_PAUSED: _ClassVar[Condition]
    CONDITION_QUIET: _ClassVar[Condition]
    CONDITION_STOPPING: _ClassVar[Condition]
    CONDITION_ATTENTION: _ClassVar[Condition]
CONDITION_UNSPECIFIED: Condition
CONDITION_READY: Condition
CONDITION_PAUSED: Condition
CONDITION_QUIET: Condition
CONDITION_STOPPING: Condition
CONDITION_ATTENTION: Condition

class RenewRequest(_message.Message):
    __slots__ = ("certificate_request",)
    CERTIFICATE_REQUEST_FIELD_NUMBER: _ClassVar[int]
    certificate_request: str
    def __init__(self, certificate_request: _Optional[str] = ...) -> None: ...

class RenewReply(_message.Message):
    __slots__ = ("certificate",)
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    certificate: str
    def __init__(self, certificate: _Optional[str] = ...) -> None: ...

class GetRosterRequest(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class GetRosterReply(_message.Message):
    __slots__ = ("versions", "more")
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedScalarFieldContainer[str]
    more: bool
    def __init__(self, versions: _Optional[_Iterable[str]] = ..., more: _Optional[bool] = ...) -> None: ...

class ListJobsRequest(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class ListJobsReply(_message.Message):
    __slots__ = ("jobs", "more")
    JOBS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[Job]
    more: bool
    def __init__(self, jobs: _Optional[_Iterable[_Union[Job, _Mapping]]] = ..., more: _Optional[bool] = ...) -> None: ...

class Job(_message.Message):
    __slots__ = ("spec", "authorisation", "state", "roster_sha256")
    SPEC_FIELD_NUMBER: _ClassVar[int]
    AUTHORISATION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ROSTER_SHA256_FIELD_NUMBER: _ClassVar[int]
    spec: str
    authorisation: str
    state: str
    roster_sha256: str
    def __init__(self, spec: _Optional[str] = ..., authorisation: _Optional[str] = ..., state: _Optional[str] = ..., roster_sha256: _Optional[str] = ...) -> None: ...

class PutCheckpointRequest(_message.Message):
    __slots__ = ("checkpoint", "since", "proof")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    SINCE_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    since: int
    proof: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, checkpoint: _Optional[str] = ..., since: _Optional[int] = ..., proof: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PutCheckpointReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListCheckpointsRequest(_message.Message):
    __slots__ = ("site", "after")
    SITE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    site: str
    after: int
    def __init__(self, site: _Optional[str] = ..., after: _Optional[int] = ...) -> None: ...

class ListCheckpointsReply(_message.Message):
    __slots__ = ("checkpoints", "more", "refused")
    CHECKPOINTS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    checkpoints: _containers.RepeatedCompositeFieldContainer[PublishedCheckpoint]
    more: bool
    refused: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, checkpoints: _Optional[_Iterable[_Union[PublishedCheckpoint, _Mapping]]] = ..., more: _Optional[bool] = ..., refused: _Optional[_Iterable[str]] = ...) -> None: ...

class PublishedCheckpoint(_message.Message):
    __slots__ = ("checkpoint", "proof")
    CHECKPOINT_FIELD_NUMBER: _ClassVar[int]
    PROOF_FIELD_NUMBER: _ClassVar[int]
    checkpoint: str
    proof: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, checkpoint: _Optional[str] = ..., proof: _Optional[_Iterable[bytes]] = ...) -> None: ...

class PutCosignatureRequest(_message.Message):
    __slots__ = ("site", "size", "root", "signature")
    SITE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    site: str
    size: int
    root: str
    signature: str
    def __init__(self, site: _Optional[str] = ..., size: _Optional[int] = ..., root: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class PutCosignatureReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutReceiptRequest(_message.Message):
    __slots__ = ("receipt",)
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    receipt: str
    def __init__(self, receipt: _Optional[str] = ...) -> None: ...

class PutReceiptReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListReceiptsRequest(_message.Message):
    __slots__ = ("job", "offset")
    JOB_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job: str
    offset: int
    def __init__(self, job: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class ListReceiptsReply(_message.Message):
    __slots__ = ("receipts", "more")
    RECEIPTS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    receipts: _containers.RepeatedScalarFieldContainer[str]
    more: bool
    def __init__(self, receipts: _Optional[_Iterable[str]] = ..., more: _Optional[bool] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("software", "condition")
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    CONDITION_FIELD_NUMBER: _ClassVar[int]
    software: str
    condition: Condition
    def __init__(self, software: _Optional[str] = ..., condition: _Optional[_Union[Condition, str]] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("at",)
    AT_FIELD_NUMBER: _ClassVar[int]
    at: int
    def __init__(self, at: _Optional[int] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PutEvidenceRequest(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class PutEvidenceReply(_message.Message):
    __slots__ = ("sha256",)
    SHA256_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    def __init__(self, sha256: _Optional[str] = ...) -> None: ...

class ListEvidenceRequest(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class ListEvidenceReply(_message.Message):
    __slots__ = ("bundles", "more")
    BUNDLES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    bundles: _containers.RepeatedCompositeFieldContainer[EvidenceEntry]
    more: bool
    def __init__(self, bundles: _Optional[_Iterable[_Union[EvidenceEntry, _Mapping]]] = ..., more: _Optional[bool] = ...) -> None: ...

class EvidenceEntry(_message.Message):
    __slots__ = ("site", "job", "leaves", "sha256", "bytes", "received_at")
    SITE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    LEAVES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_AT_FIELD_NUMBER: _ClassVar[int]
    site: str
    job: str
    leaves: int
    sha256: str
    bytes: int
    received_at: int
    def __init__(self, site: _Optional[str] = ..., job: _Optional[str] = ..., leaves: _Optional[int] = ..., sha256: _Optional[str] = ..., bytes: _Optional[int] = ..., received_at: _Optional[int] = ...) -> None: ...

class GetEvidenceRequest(_message.Message):
    __slots__ = ("site", "sha256")
    SITE_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    site: str
    sha256: str
    def __init__(self, site: _Optional[str] = ..., sha256: _Optional[str] = ...) -> None: ...

class GetEvidenceReply(_message.Message):
    __slots__ = ("chunk",)
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    chunk: bytes
    def __init__(self, chunk: _Optional[bytes] = ...) -> None: ...

class ListReleasesRequest(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class ListReleasesReply(_message.Message):
    __slots__ = ("releases", "more", "refusals")
    RELEASES_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    REFUSALS_FIELD_NUMBER: _ClassVar[int]
    releases: _containers.RepeatedCompositeFieldContainer[Release]
    more: bool
    refusals: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, releases: _Optional[_Iterable[_Union[Release, _Mapping]]] = ..., more: _Optional[bool] = ..., refusals: _Optional[_Iterable[str]] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("job", "sha256", "bytes", "released_at")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    RELEASED_AT_FIELD_NUMBER: _ClassVar[int]
    job: str
    sha256: str
    bytes: int
    released_at: int
    def __init__(self, job: _Optional[str] = ..., sha256: _Optional[str] = ..., bytes: _Optional[int] = ..., released_at: _Optional[int] = ...) -> None: ...

class GetReleaseRequest(_message.Message):
    __slots__ = ("job", "sha256", "offset")
    JOB_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    job: str
    sha256: str
    offset: int
    def __init__(self, job: _Optional[str] = ..., sha256: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class GetReleaseReply(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: Release
    chunk: bytes
    def __init__(self, header: _Optional[_Union[Release, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...
