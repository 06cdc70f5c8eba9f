"""What a member asks of the coordinator's governance service.

The channel itself is not encrypted: it ends at the tunnel's socket, and mutual TLS begins there.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Final, Literal, Self, TypeVar

import grpc
from pydantic import BaseModel, TypeAdapter, ValidationError

from fedcmr_shared import __version__
from fedcmr_shared.errors import ConnectionProblem, DataError, FedcmrError, FederationError
from fedcmr_shared.governance import governance_pb2 as pb
from fedcmr_shared.governance.governance_pb2_grpc import GovernanceStub
from fedcmr_shared.identity.roster_history import RosterVersion
from fedcmr_shared.models.refusal import ReleaseRefusal
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Checkpoint, Hash
from fedcmr_shared.schemas.policy import SiteName
from fedcmr_shared.schemas.receipt import Receipt
from fedcmr_shared.schemas.signed_job import JobAuthorisation

Condition = Literal["ready", "paused", "quiet", "stopping", "attention"]
"""How a member is: nothing else of it leaves."""

CALL_S: Final = 30.0
STREAM_S: Final = 1800.0
"""Longest duration of a call and of a file; the service refuses calls that would wait longer."""

LARGEST_FILE: Final = 8 * 2**30
"""Bytes of a download."""

TRIES: Final = 5
FIRST_PAUSE_S: Final = 0.5

_CHUNK: Final = 256 * 1024
_MOST_PAGES: Final = 10_000
_TRY_AGAIN: Final = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_HTTP_STATUS: Final = re.compile(r"(?:header with status|HTTP status(?: code)?):? (\d{3})")
_CONDITIONS: Final[Mapping[Condition, pb.Condition]] = {
    "ready": pb.CONDITION_READY,
    "paused": pb.CONDITION_PAUSED,
    "quiet": pb.CONDITION_QUIET,
    "stopping": pb.CONDITION_STOPPING,
    "attention": pb.CONDITION_ATTENTION,
}
_OPTIONS: Final = (
    ("grpc.enable_http_proxy", 0),  # the tunnel knows the only proxy
    ("grpc.max_receive_message_length", 4 * 2**20),
    ("grpc.initial_reconnect_backoff_ms", 250),
    ("grpc.min_reconnect_backoff_ms", 250),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_NAME: Final[TypeAdapter[str]] = TypeAdapter(SiteName)
_HASH: Final[TypeAdapter[str]] = TypeAdapter(Hash)

_Document = TypeVar("_Document", bound=BaseModel)


@dataclass(frozen=True)
class ListedJob:
    """A job of the federation, the coordinator's signature under it, and where it stands."""

    spec: JobSpec
    authorisation: JobAuthorisation | None
    state: str
    roster_sha256: str | None


@dataclass(frozen=True)
class PublishedCheckpoint:
    """A head of a site's ledger with its cosignatures, and the proof from the one before."""

    checkpoint: Checkpoint
    proof: tuple[bytes, ...]


@dataclass(frozen=True)
class SiteCheckpoints:
    """Heads that a site published, the smallest first, and those that contradict them."""

    published: tuple[PublishedCheckpoint, ...]
    refused: tuple[Checkpoint, ...]


@dataclass(frozen=True)
class EvidenceEntry:
    """An evidence bundle at the coordinator; ``job`` None is a whole ledger."""

    site: str
    job: str | None
    leaves: int
    sha256: str
    bytes: int
    received_at: datetime


@dataclass(frozen=True)
class ListedRelease:
    """A released model of ``job``; ``sha256`` is that of its file."""

    job: str
    sha256: str
    bytes: int
    released_at: datetime


class Governance:
    """The service at ``target``, such as a tunnel's `governance_target`; a context manager.

    ``metadata`` goes with each call; without a gateway on the way it carries the certificate.
    What the coordinator does not answer at once is asked again, a few times.

    Every method raises:
        ConnectionProblem: the coordinator cannot be reached, or refuses this member.
        FederationError: it refuses the call, or answers what this version does not understand.
    """

    def __init__(
        self,
        target: str,
        metadata: Sequence[tuple[str, str]] = (),
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._target = target
        self._metadata = tuple(metadata)
        self._wait = wait
        self._channel = grpc.insecure_channel(target, options=_OPTIONS)
        self._stub: Any = GovernanceStub(self._channel)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def renew(self, certificate_request: str) -> str:
        """Return a new certificate (PEM) for the key of ``certificate_request`` (PEM)."""
        request = pb.RenewRequest(certificate_request=certificate_request)
        return str(self._call(self._stub.Renew, request).certificate)

    def roster_history(self) -> list[RosterVersion]:
        """Return all versions of the roster; verify them with `verify_history`."""
        pages = self._pages(self._stub.GetRoster, pb.GetRosterRequest, "versions")
        return [_document(RosterVersion, text) for text in pages]

    def jobs(self) -> list[ListedJob]:
        """Return all jobs in the order of their submission."""
        return [
            ListedJob(
                spec=_document(JobSpec, job.spec),
                authorisation=_document(JobAuthorisation, job.authorisation)
                if job.authorisation
                else None,
                state=job.state,
                roster_sha256=job.roster_sha256 or None,
            )
            for job in self._pages(self._stub.ListJobs, pb.ListJobsRequest, "jobs")
        ]

    def put_checkpoint(self, checkpoint: Checkpoint, since: int, proof: Sequence[bytes]) -> None:
        """Publish a head of this site's ledger, with the proof from that of size ``since``."""
        text = checkpoint.model_dump_json()
        request = pb.PutCheckpointRequest(checkpoint=text, since=since, proof=proof)
        self._call(self._stub.PutCheckpoint, request)

    def checkpoints(self, site: str, after: int = 0) -> SiteCheckpoints:
        """Return what ``site`` published over more than ``after`` entries; verify all of it."""
        published: list[PublishedCheckpoint] = []
        for _ in range(_MOST_PAGES):
            request = pb.ListCheckpointsRequest(site=site, after=after)
            reply = self._call(self._stub.ListCheckpoints, request)
            published += [
                PublishedCheckpoint(_document(Checkpoint, each.checkpoint), tuple(each.proof))
                for each in reply.checkpoints
            ]
            if not reply.more or not reply.checkpoints:
                refused = tuple(_document(Checkpoint, text) for text in reply.refused)
                return SiteCheckpoints(tuple(published), refused)
            after = published[-1].checkpoint.size
        raise _endless()

    def put_cosignature(self, checkpoint: Checkpoint, signature: str) -> None:
        """Hand in this site's signature under another site's head."""
        request = pb.PutCosignatureRequest(
            site=checkpoint.site, size=checkpoint.size, root=checkpoint.root, signature=signature
        )
        self._call(self._stub.PutCosignature, request)

    def put_receipt(self, receipt: Receipt) -> None:
        """Hand in a receipt of this site."""
        self._call(self._stub.PutReceipt, pb.PutReceiptRequest(receipt=receipt.model_dump_json()))

    def receipts(self, job: str) -> list[Receipt]:
        """Return the receipts of ``job`` (SHA-256); a site gets its own. Verify them."""
        pages = self._pages(self._stub.ListReceipts, pb.ListReceiptsRequest, "receipts", job=job)
        return [_document(Receipt, text) for text in pages]

    def report(self, condition: Condition, software: str = __version__) -> float:
        """Tell how this member is; return how far its clock is off, at least.

        In seconds: positive if this machine's clock is ahead of the coordinator's.
        """
        request = pb.ReportRequest(software=software, condition=_CONDITIONS[condition])
        asked = time.time()
        theirs: float = self._call(self._stub.Report, request).at / 1000
        # They looked at their clock some time between these two.
        return max(asked - theirs, 0.0) or min(time.time() - theirs, 0.0)

    def leave(self) -> None:
        """End this member's membership: from then on every call is refused."""
        self._call(self._stub.Leave, pb.LeaveRequest())

    def put_evidence(self, path: Path) -> str:
        """Hand in the evidence bundle in ``path`` for auditors; return its SHA-256.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        reply = self._try(lambda: self._stub.PutEvidence(_parts(content), **self._stream))
        return str(reply.sha256)

    def evidence(self) -> list[EvidenceEntry]:
        """Return what evidence the coordinator has; for auditors."""
        return [
            EvidenceEntry(
                site=_plain(_NAME, each.site),
                job=_plain(_HASH, each.job) if each.job else None,
                leaves=each.leaves,
                sha256=_plain(_HASH, each.sha256),
                bytes=each.bytes,
                received_at=_time(each.received_at),
            )
            for each in self._pages(self._stub.ListEvidence, pb.ListEvidenceRequest, "bundles")
        ]

    def fetch_evidence(self, entry: EvidenceEntry, path: Path) -> None:
        """Write a bundle to ``path``; verify it there.

        Raises:
            DataError: the file cannot be written.
        """
        request = pb.GetEvidenceRequest(site=entry.site, sha256=entry.sha256)

        def chunks(offset: int) -> Iterator[bytes]:
            skip = offset  # evidence comes from its beginning, always
            for reply in self._stub.GetEvidence(request, **self._stream):
                yield reply.chunk[skip:]
                skip -= min(skip, len(reply.chunk))

        self._download(path, entry.sha256, entry.bytes, chunks)

    def releases(self) -> list[ListedRelease]:
        """Return the released models, the first first."""
        pages = self._pages(self._stub.ListReleases, pb.ListReleasesRequest, "releases")
        return [_release(each) for each in pages]

    def refusals(self) -> list[ReleaseRefusal]:
        """Return what the gates kept back, the first first; verify them.

        Empty where the coordinator runs a version that does not sign them.
        """
        pages = self._pages(self._stub.ListReleases, pb.ListReleasesRequest, "refusals")
        return [_document(ReleaseRefusal, text) for text in pages]

    def fetch_release(self, job: str, path: Path, sha256: str | None = None) -> ListedRelease:
        """Write the newest release of ``job``, or the one with ``sha256``, to ``path``.

        A download that broke off, in this process or an earlier one, goes on where it ended. The
        file appears when its SHA-256 is right; who signed it, `fedcmr models verify` tells.

        Raises:
            DataError: the file cannot be written.
        """
        found = [r for r in self.releases() if r.job == job and sha256 in (None, r.sha256)]
        if not found:
            raise FederationError(f"the coordinator lists no such release of job {job[:12]}")
        release = found[-1]

        def chunks(offset: int) -> Iterator[bytes]:
            request = pb.GetReleaseRequest(job=job, sha256=release.sha256, offset=offset)
            for reply in self._stub.GetRelease(request, **self._stream):
                yield reply.chunk  # empty in the header, which says what the list said

        self._download(path, release.sha256, release.bytes, chunks)
        return release

    @property
    def _stream(self) -> dict[str, Any]:
        return {"timeout": STREAM_S, "metadata": self._metadata}

    def _pages(
        self, method: Any, request: Callable[..., Any], field: str, **values: str
    ) -> list[Any]:
        """Return the entries in ``field`` of all pages of a list."""
        entries: list[Any] = []
        for _ in range(_MOST_PAGES):
            reply = self._call(method, request(offset=len(entries), **values))
            page = getattr(reply, field)
            entries += page
            if not reply.more or not page:
                return entries
        raise _endless()

    def _call(self, method: Any, request: Any) -> Any:
        return self._try(lambda: method(request, timeout=CALL_S, metadata=self._metadata))

    def _try(self, call: Callable[[], Any]) -> Any:
        for pause in _pauses():
            try:
                return call()
            except grpc.RpcError as error:
                self._pause_or_raise(error, pause)
        raise AssertionError("the last try returns or raises")

    def _pause_or_raise(self, error: grpc.RpcError, pause: float | None) -> None:
        if pause is None or _code(error) not in _TRY_AGAIN:
            raise problem_of(error) from error
        self._wait(pause)

    def _download(
        self, path: Path, sha256: str, size: int, chunks: Callable[[int], Iterator[bytes]]
    ) -> None:
        """Write ``chunks`` (from an offset) to ``path`` once all ``size`` bytes have ``sha256``."""
        if size > LARGEST_FILE:
            raise FederationError(
                f"{path.name}: the coordinator says that it has {size} bytes; at most "
                f"{LARGEST_FILE} are taken"
            )
        # Named after the content: what another release left behind is not continued.
        partial = path.with_name(f".{path.name}.{sha256[:16]}.partial")
        try:
            with partial.open("ab") as file:
                self._append(file, path.name, size, chunks)
            if _sha256(partial) != sha256:
                partial.unlink()
                raise FederationError(
                    f"{path.name}: what the coordinator sent has another SHA-256 than it says: "
                    "nothing was kept; try again, and tell the coordinator if it lasts"
                )
            os.replace(partial, path)
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error

    def _append(
        self, file: IO[bytes], name: str, size: int, chunks: Callable[[int], Iterator[bytes]]
    ) -> None:
        """Append to ``file`` until it has ``size`` bytes, over breaks of the connection."""
        pauses = _pauses()
        while (offset := file.tell()) < size:
            try:
                for chunk in chunks(offset):
                    if file.tell() + len(chunk) > size:
                        file.truncate(0)
                        raise FederationError(f"{name}: the coordinator sent more than it said")
                    file.write(chunk)
            except grpc.RpcError as error:
                if file.tell() > offset:
                    pauses = _pauses()  # it goes forward
                self._pause_or_raise(error, next(pauses))
                continue
            if file.tell() < size:
                raise FederationError(f"{name}: the coordinator sent less than it said")
        file.flush()
        os.fsync(file.fileno())


def problem_of(error: grpc.RpcError) -> FedcmrError:
    """Return what a failed call means for this member.

    A gateway that refuses a certificate, or finds no service behind it, answers in plain HTTP.
    """
    code, details = _code(error), _details(error)
    status = _HTTP_STATUS.search(details)
    if status is not None and status[1] in {"400", "401", "403", "495", "496"}:
        return ConnectionProblem(
            "rejected",
            "the coordinator refuses this member's certificate: it was revoked, has expired, or is "
            "of another federation: ask the coordinator",
        )
    if status is not None and status[1] in {"502", "503", "504"}:
        return ConnectionProblem(
            "unreachable",
            "the coordinator is there, but its governance service is not: it may be starting; if "
            "it lasts, tell the coordinator",
        )
    match code:
        case grpc.StatusCode.UNAUTHENTICATED:
            return ConnectionProblem("rejected", f"the coordinator refuses this member: {details}")
        case grpc.StatusCode.UNAVAILABLE:
            return ConnectionProblem(
                "unreachable", f"the coordinator's governance service cannot be reached: {details}"
            )
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return ConnectionProblem(
                "timed-out", "the coordinator's governance service does not answer in time"
            )
        case grpc.StatusCode.UNIMPLEMENTED:
            return FederationError(
                "the coordinator does not know this call: it runs an older FedCMR"
            )
    return FederationError(f"the coordinator refuses: {details or code.name.lower()}")


def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code = error.code() if isinstance(error, grpc.Call) else None
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _details(error: grpc.RpcError) -> str:
    details = error.details() if isinstance(error, grpc.Call) else ""
    return "".join(c if c.isprintable() else "?" for c in (details or "")[:1000])


def _pauses() -> Iterator[float | None]:
    """Yield the seconds to wait after each failed try; None after the last."""
    yield from (FIRST_PAUSE_S * 2**number for number in range(TRIES - 1))
    yield None


def _parts(content: bytes) -> Iterator[pb.PutEvidenceRequest]:
    for at in range(0, len(content), _CHUNK):
        yield pb.PutEvidenceRequest(chunk=content[at : at + _CHUNK])


def _document(kind: type[_Document], text: str) -> _Document:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise FederationError(
            f"the coordinator sent a {kind.__name__} that this version does not understand: "
            "update FedCMR"
        ) from error


def _release(each: pb.Release) -> ListedRelease:
    job, sha256 = _plain(_HASH, each.job), _plain(_HASH, each.sha256)
    return ListedRelease(job, sha256, each.bytes, _time(each.released_at))


def _plain(kind: TypeAdapter[str], text: str) -> str:
    """Return a name or hash that may become part of a path."""
    try:
        return kind.validate_python(text)
    except ValidationError as error:
        raise FederationError(f"the coordinator sent {text[:80]!r}, no name or hash") from error


def _time(milliseconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise FederationError(f"the coordinator sent {milliseconds} as a time") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _endless() -> FederationError:
    return FederationError("the coordinator's list does not end: tell the coordinator")
