"""What sites and the coordinator signed: checkpoints, receipts and releases."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, TypeVar

from sqlalchemy import Select, func, select, update
from sqlalchemy.exc import IntegrityError

from fedcmr_server.store.database import Store
from fedcmr_server.store.tables import (
    CheckpointRow,
    CosignatureRow,
    ReceiptRow,
    ReleaseRow,
)
from fedcmr_shared.errors import FederationError
from fedcmr_shared.schemas.ledger import Checkpoint, Phase


class Checkpoints:
    """Signed heads of the sites' ledgers. Whoever calls has verified the signatures."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def keep(
        self, checkpoint: Checkpoint, proof: Sequence[str] = (), problem: str | None = None
    ) -> bool:
        """Keep a checkpoint, also one that contradicts another; False when it was there already.

        ``proof`` (hexadecimal hashes) shows that the log only grew since the one before;
        ``problem`` says why nobody should cosign this one. One that had a problem loses it when it
        comes again without.
        """
        row = CheckpointRow(
            site=checkpoint.site,
            size=checkpoint.size,
            at=checkpoint.at,
            root=checkpoint.root,
            signature=checkpoint.signature,
            document=checkpoint.model_dump_json(exclude={"cosignatures"}),
            received_at=datetime.now(UTC),
            proof=" ".join(proof),
            problem=problem,
        )
        try:
            with self._store.writing() as session:
                session.add(row)
        except IntegrityError:
            if problem is None:
                self._accept(checkpoint, proof)
            return False
        return True

    def _accept(self, checkpoint: Checkpoint, proof: Sequence[str]) -> None:
        with self._store.writing() as session:
            session.execute(
                update(CheckpointRow)
                .where(
                    CheckpointRow.site == checkpoint.site,
                    CheckpointRow.size == checkpoint.size,
                    CheckpointRow.at == checkpoint.at,
                    CheckpointRow.root == checkpoint.root,
                    CheckpointRow.problem.is_not(None),
                )
                .values(problem=None, proof=" ".join(proof))
            )

    def proofs(self, site: str) -> dict[tuple[int, str], tuple[str, ...]]:
        """Proofs of the checkpoints of ``site`` without a problem, by size and root."""
        query = select(CheckpointRow).where(
            CheckpointRow.site == site, CheckpointRow.problem.is_(None)
        )
        with self._store.reading() as session:
            rows = session.scalars(query)
            return {(row.size, row.root): tuple(row.proof.split()) for row in rows}

    def newest(self, site: str) -> Checkpoint | None:
        """The largest checkpoint of ``site``, with its cosignatures."""
        found = self.of(site)
        return found[-1] if found else None

    def of(self, site: str, after_size: int = 0) -> list[Checkpoint]:
        """Checkpoints of ``site`` over more than ``after_size`` leaves, by size and time."""
        order = (CheckpointRow.size, CheckpointRow.at, CheckpointRow.id)
        query = select(CheckpointRow).where(
            CheckpointRow.site == site, CheckpointRow.size > after_size
        )
        with self._store.reading() as session:
            rows = session.scalars(query.order_by(*order)).all()
            cosigned = session.scalars(
                select(CosignatureRow)
                .where(CosignatureRow.checkpoint_id.in_([row.id for row in rows]))
                .order_by(CosignatureRow.site)
            ).all()
        return [
            Checkpoint.model_validate_json(row.document).model_copy(
                update={
                    "cosignatures": {
                        each.key: each.signature
                        for each in cosigned
                        if each.checkpoint_id == row.id
                    }
                }
            )
            for row in rows
        ]

    def contradictions(self, site: str) -> list[tuple[Checkpoint, Checkpoint]]:
        """Pairs of one size with different roots: proofs that ``site`` shows two histories."""
        found = self.of(site)
        return [
            (first, second)
            for first, second in pairwise(found)
            if first.size == second.size and first.root != second.root
        ]

    def contradicting(self) -> list[str]:
        """Names of the sites that have `contradictions`, sorted."""
        query = (
            select(CheckpointRow.site)
            .group_by(CheckpointRow.site, CheckpointRow.size)
            .having(func.count(CheckpointRow.root.distinct()) > 1)
        )
        with self._store.reading() as session:
            return sorted(set(session.scalars(query)))

    def cosign(self, checkpoint: Checkpoint, site: str, key: str, signature: str) -> bool:
        """Keep ``site``'s signature under a kept checkpoint; False when it had signed already.

        ``key`` is the site's Ed25519 public key (hexadecimal).

        Raises:
            FederationError: the checkpoint is not kept.
        """
        query = select(CheckpointRow.id).where(
            CheckpointRow.site == checkpoint.site,
            CheckpointRow.size == checkpoint.size,
            CheckpointRow.at == checkpoint.at,
            CheckpointRow.root == checkpoint.root,
        )
        try:
            with self._store.writing() as session:
                number = session.scalar(query)
                if number is None:
                    raise FederationError(
                        f"no such checkpoint of {checkpoint.site} over {checkpoint.size} leaves"
                    )
                session.add(
                    CosignatureRow(
                        checkpoint_id=number,
                        site=site,
                        key=key,
                        signature=signature,
                        at=datetime.now(UTC),
                    )
                )
        except IntegrityError:
            return False
        return True


class Receipts:
    """The sites' signed receipts of rounds. Whoever calls has verified the signatures."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def keep(self, place: tuple[str, str, Phase, int, int], document: str, signature: str) -> bool:
        """Keep the receipt for ``place``; False when it is kept already.

        A place is job, site, phase, round and attempt.

        Raises:
            FederationError: another one is kept for it, or the job is unknown.
        """
        job, site, phase, number, attempt = place
        row = ReceiptRow(
            job=job,
            site=site,
            phase=phase,
            round=number,
            attempt=attempt,
            document=document,
            signature=signature,
            received_at=datetime.now(UTC),
        )
        try:
            with self._store.writing() as session:
                session.add(row)
        except IntegrityError as error:
            with self._store.reading() as session:
                kept = session.get(ReceiptRow, place)
            if kept is None:
                raise FederationError(f"no job {job} is known") from error
            if (kept.document, kept.signature) != (document, signature):
                raise FederationError(
                    f"site {site} sent another receipt for {phase} round {number} before"
                ) from error
            return False
        return True

    def of(self, job: str) -> list[ReceiptRow]:
        """Receipts of a job, by phase, round, site and attempt."""
        order = (ReceiptRow.phase, ReceiptRow.round, ReceiptRow.site, ReceiptRow.attempt)
        return _all(self._store, select(ReceiptRow).where(ReceiptRow.job == job).order_by(*order))


class Releases:
    """Released models."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def add(self, release: ReleaseRow) -> None:
        """Keep a release.

        Raises:
            FederationError: its path or model was released before, or the job is unknown.
        """
        try:
            with self._store.writing() as session:
                session.add(release)
        except IntegrityError as error:
            raise FederationError(
                f"{release.path} cannot be released: this file or model was released before, or "
                f"no job {release.job} is known"
            ) from error

    def all(self) -> list[ReleaseRow]:
        """All releases, the first first."""
        return _all(self._store, select(ReleaseRow).order_by(ReleaseRow.id))

    def find(self, sha256: str) -> ReleaseRow | None:
        """The newest release of the model file with this SHA-256."""
        found = [row for row in self.all() if row.sha256 == sha256]
        return found[-1] if found else None


_Row = TypeVar("_Row", bound=Any)


def _all(store: Store, query: Select[_Row]) -> list[_Row]:
    with store.reading() as session:
        return list(session.scalars(query))
