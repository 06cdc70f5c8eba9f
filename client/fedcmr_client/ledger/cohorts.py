"""Cohorts of patients: keyed hashes in the log, members in a table beside it."""

from __future__ import annotations

from collections.abc import Collection

from sqlalchemy import Connection, insert, select

from fedcmr_client.ledger import database
from fedcmr_client.store.pseudonyms import keyed_hash
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.privacy.budget import Budget


def cohort_hash(secret: bytes, patients: Collection[str]) -> str:
    """Return the keyed hash (hexadecimal) that stands for a set of pseudonyms in the log."""
    return keyed_hash(secret, "cohort", _text(patients)).hex()


def patient_hash(secret: bytes, patient: str) -> str:
    """Return the keyed hash (hexadecimal) that stands for a withdrawn patient in the log."""
    return keyed_hash(secret, "withdrawn", patient).hex()


def save(connection: Connection, cohort: str, patients: Collection[str]) -> None:
    """Keep the members of ``cohort`` unless they are there already."""
    table = database.cohorts
    if connection.scalar(select(table.c.cohort).where(table.c.cohort == cohort)) is None:
        connection.execute(insert(table), {"cohort": cohort, "members": _text(patients)})


def load(connection: Connection, secret: bytes, budget: Budget) -> dict[str, frozenset[str]]:
    """Return the members of every cohort of the log, each held against its keyed hash.

    Raises:
        LedgerError: members were changed, or a cohort is missing or unknown to the log.
    """
    rows = connection.execute(select(database.cohorts))
    members = {row.cohort: frozenset(row.members.splitlines()) for row in rows}
    if members.keys() != budget.cohorts():
        raise LedgerError("cohorts of the ledger are missing or foreign: restore the newest backup")
    for cohort, patients in members.items():
        if cohort_hash(secret, patients) != cohort:
            message = "its members were changed: restore the newest backup"
            raise LedgerError(f"cohort {cohort[:12]}… of the ledger: {message}")
    return members


def _text(patients: Collection[str]) -> str:
    return "\n".join(sorted(set(patients)))
