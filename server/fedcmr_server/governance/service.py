"""The handlers: what comes in is parsed, what the rules say goes out.

The gatekeeper has admitted the caller and passes it in place of gRPC's context.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from fedcmr_server.governance.admission import Caller
from fedcmr_server.governance.checkpoints import CheckpointBoard
from fedcmr_server.governance.evidence_files import EvidenceFiles
from fedcmr_server.governance.releases import ReleaseFiles
from fedcmr_server.governance.renewal import renew
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.members import end_membership
from fedcmr_server.store import Jobs, Members, Receipts, Rosters, Store
from fedcmr_server.store.tables import ReleaseRow
from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.governance import governance_pb2 as pb
from fedcmr_shared.schemas.ledger import Checkpoint
from fedcmr_shared.schemas.problems import problems
from fedcmr_shared.schemas.receipt import Receipt

PAGE: Final = 100
"""Entries of a list in one answer."""

CONDITIONS: Final[Mapping[pb.Condition, str]] = {
    pb.CONDITION_READY: "ready",
    pb.CONDITION_PAUSED: "paused",
    pb.CONDITION_QUIET: "quiet",
    pb.CONDITION_STOPPING: "stopping",
    pb.CONDITION_ATTENTION: "attention",
}

_VERSION: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,39}")

_Entry = TypeVar("_Entry")
_Document = TypeVar("_Document", bound=BaseModel)


class Service:
    """Implements ``governance.proto``; methods have the names that gRPC looks for.

    They raise `FedcmrError` for what the caller did wrong.
    """

    def __init__(self, home: CoordinatorHome, store: Store) -> None:
        self._home = home
        self._store = store
        self._board = CheckpointBoard(store)
        self._evidence = EvidenceFiles(home.folder / "evidence")
        self._releases = ReleaseFiles(store, home.releases)

    def Renew(self, request: pb.RenewRequest, caller: Caller) -> pb.RenewReply:
        """Issue a certificate in place of the caller's."""
        renewed = renew(self._home, self._store, caller, request.certificate_request)
        return pb.RenewReply(certificate=renewed)

    def GetRoster(self, request: pb.GetRosterRequest, caller: Caller) -> pb.GetRosterReply:
        """Return the versions of the roster."""
        versions, more = _page(Rosters(self._store).history(), request.offset)
        return pb.GetRosterReply(versions=[v.model_dump_json() for v in versions], more=more)

    def ListJobs(self, request: pb.ListJobsRequest, caller: Caller) -> pb.ListJobsReply:
        """Return the jobs."""
        rows, more = _page(Jobs(self._store).all(), request.offset)
        jobs = [
            pb.Job(
                spec=row.spec,
                authorisation=row.authorisation or "",
                state=row.state,
                roster_sha256=row.roster_sha256 or "",
            )
            for row in rows
        ]
        return pb.ListJobsReply(jobs=jobs, more=more)

    def PutCheckpoint(
        self, request: pb.PutCheckpointRequest, caller: Caller
    ) -> pb.PutCheckpointReply:
        """Keep a head of the caller's ledger."""
        checkpoint = _document(Checkpoint, request.checkpoint, "checkpoint")
        self._board.publish(caller, checkpoint, request.since, request.proof)
        return pb.PutCheckpointReply()

    def ListCheckpoints(
        self, request: pb.ListCheckpointsRequest, caller: Caller
    ) -> pb.ListCheckpointsReply:
        """Return heads of a site's ledger with their proofs and cosignatures."""
        found, more = _page(self._board.published(request.site, request.after), 0)
        published = [
            pb.PublishedCheckpoint(checkpoint=each.checkpoint.model_dump_json(), proof=each.proof)
            for each in found
        ]
        refused = [each.model_dump_json() for each in self._board.refused(request.site)]
        return pb.ListCheckpointsReply(checkpoints=published, more=more, refused=refused)

    def PutCosignature(
        self, request: pb.PutCosignatureRequest, caller: Caller
    ) -> pb.PutCosignatureReply:
        """Keep the caller's signature under another site's head."""
        head = request.size, request.root
        self._board.cosign(caller, request.site, head, request.signature)
        return pb.PutCosignatureReply()

    def PutReceipt(self, request: pb.PutReceiptRequest, caller: Caller) -> pb.PutReceiptReply:
        """Keep a receipt of the caller."""
        receipt = _document(Receipt, request.receipt, "receipt")
        if receipt.site != caller.name:
            raise LedgerError(f"{caller.name} hands in its own receipts alone")
        receipt.verify(caller.identity)
        place = (receipt.job, receipt.site, receipt.phase, receipt.round, receipt.attempt)
        Receipts(self._store).keep(place, receipt.model_dump_json(), receipt.signature)
        return pb.PutReceiptReply()

    def ListReceipts(self, request: pb.ListReceiptsRequest, caller: Caller) -> pb.ListReceiptsReply:
        """Return the receipts of a job; to a site its own."""
        rows = Receipts(self._store).of(request.job)
        if caller.role == "site":
            rows = [row for row in rows if row.site == caller.name]
        rows, more = _page(rows, request.offset)
        return pb.ListReceiptsReply(receipts=[row.document for row in rows], more=more)

    def Report(self, request: pb.ReportRequest, caller: Caller) -> pb.ReportReply:
        """Note the caller's software and how it is; tell it the time."""
        if not _VERSION.fullmatch(request.software):
            raise ConfigurationError("software: give a version, such as 1.2.0")
        condition = CONDITIONS.get(request.condition)
        if condition is None:
            raise ConfigurationError("condition: give one of those that the interface names")
        Members(self._store).seen(caller.name, request.software, condition=condition)
        return pb.ReportReply(at=_milliseconds(datetime.now(UTC)))

    def Leave(self, request: pb.LeaveRequest, caller: Caller) -> pb.LeaveReply:
        """End the caller's membership."""
        end_membership(self._home, self._store, caller.name, "left", "left by itself")
        return pb.LeaveReply()

    def PutEvidence(
        self, request: Iterator[pb.PutEvidenceRequest], caller: Caller
    ) -> pb.PutEvidenceReply:
        """Keep an evidence bundle of the caller."""
        sha256 = self._evidence.put(caller, (part.chunk for part in request))
        return pb.PutEvidenceReply(sha256=sha256)

    def ListEvidence(self, request: pb.ListEvidenceRequest, caller: Caller) -> pb.ListEvidenceReply:
        """Return what evidence is here."""
        found, more = _page(self._evidence.all(), request.offset)
        bundles = [
            pb.EvidenceEntry(
                site=about.site,
                job=about.job or "",
                leaves=about.leaves,
                sha256=about.sha256,
                bytes=about.bytes,
                received_at=about.received_at,
            )
            for about in found
        ]
        return pb.ListEvidenceReply(bundles=bundles, more=more)

    def GetEvidence(
        self, request: pb.GetEvidenceRequest, caller: Caller
    ) -> Iterator[pb.GetEvidenceReply]:
        """Return a bundle in chunks."""
        for chunk in self._evidence.read(request.site, request.sha256):
            yield pb.GetEvidenceReply(chunk=chunk)

    def ListReleases(self, request: pb.ListReleasesRequest, caller: Caller) -> pb.ListReleasesReply:
        """Return the released models, and the refusals of others."""
        rows, more = _page(self._releases.all(), request.offset)
        refusals, more_refusals = _page(self._releases.refusals(), request.offset)
        return pb.ListReleasesReply(
            releases=[_release(row) for row in rows],
            more=more or more_refusals,
            refusals=refusals,
        )

    def GetRelease(
        self, request: pb.GetReleaseRequest, caller: Caller
    ) -> Iterator[pb.GetReleaseReply]:
        """Return a released model: its header, then chunks."""
        row = self._releases.find(request.job, request.sha256)
        chunks = self._releases.read(row, request.offset)
        yield pb.GetReleaseReply(header=_release(row))
        for chunk in chunks:
            yield pb.GetReleaseReply(chunk=chunk)


def _page(entries: Sequence[_Entry], offset: int) -> tuple[list[_Entry], bool]:
    """Return the entries from ``offset`` on that fit one answer, and whether there are more."""
    end = offset + PAGE
    return list(entries[offset:end]), len(entries) > end


def _document(kind: type[_Document], text: str, what: str) -> _Document:
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ConfigurationError(f"{what}: {problems(error)}") from error


def _release(row: ReleaseRow) -> pb.Release:
    return pb.Release(
        job=row.job, sha256=row.sha256, bytes=row.size, released_at=_milliseconds(row.at)
    )


def _milliseconds(at: datetime) -> int:
    return round(at.timestamp() * 1000)
