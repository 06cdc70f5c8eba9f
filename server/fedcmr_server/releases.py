"""Releases: a finished job's model leaves as a signed file, or not at all.

::

    releases/NAME-ID.zip    the row's `path` is the name; see :mod:`fedcmr_shared.models.release`

The file appears complete, then its row is written. A file without a row is what a crash left; the
next release of the job replaces it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from fedcmr_server.checkpoint_files import CheckpointFiles
from fedcmr_server.folder_lock import locked
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_control import spec_of
from fedcmr_server.job_states import JobState
from fedcmr_server.release_card import card_of
from fedcmr_server.release_gates import GATES, ReleaseGate
from fedcmr_server.store import Events, Jobs, Releases, Rounds, Store
from fedcmr_server.store.tables import JobRow, ReleaseRow
from fedcmr_shared.errors import FederationError
from fedcmr_shared.models.bundle import Bundle, load_bundle
from fedcmr_shared.models.card import (
    GateResult,
    Lineage,
    LineageRound,
    ModelCard,
    Start,
)
from fedcmr_shared.models.refusal import ReleaseRefusal
from fedcmr_shared.models.release import ReleaseBundle
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.problems import problems
from fedcmr_shared.schemas.signed_job import JobAuthorisation


def release(
    home: CoordinatorHome,
    store: Store,
    job: str,
    *,
    gates: Mapping[str, Sequence[ReleaseGate]] = GATES,
    now: datetime | None = None,
) -> ReleaseRow:
    """Release the last model of a finished job and return the row about it.

    But for the moment in its card, the file depends on what the job left behind alone.

    Raises:
        FederationError: the job has not finished, was released before, a gate refuses, or what it
            left behind does not fit together.
        ModelError: the model cannot be read, or the release not be written.
    """
    with locked(home.releases):
        row = Jobs(store).get(job)
        _require_finished(row)
        _require_first(store, row)
        model = _model_path(home, row)
        bundle = load_bundle(model)
        moment = now or datetime.now(UTC).replace(microsecond=0)
        found = _pass_gates(home, store, row, bundle, gates, moment)
        card = _card(home, store, row, found, moment)
        path = home.releases / f"{row.name}-{row.id[:12]}.zip"
        _remove_leftovers(path)
        ReleaseBundle.write(path, model, card, home.identity())
        return _add_row(store, row, path, home.identity().public_key)


def of_job(store: Store, job: str) -> ReleaseRow | None:
    """Return the release of a job, if there is one."""
    return next((row for row in Releases(store).all() if row.job == job), None)


def copy_release(home: CoordinatorHome, row: ReleaseRow, out: Path) -> None:
    """Copy a released file to the new file ``out``, complete or not at all.

    Raises:
        FederationError: the file is missing or damaged, or ``out`` exists or cannot be written.
    """
    if out.exists():
        raise FederationError(f"{out} exists: choose another name with --out")
    source, partial = home.releases / row.path, out.with_name(f".{out.name}.partial")
    try:
        shutil.copyfile(source, partial)
        with partial.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != row.sha256:
                raise FederationError(f"{source} is damaged: restore it from backup")
            os.fsync(file.fileno())
        os.replace(partial, out)  # a link would be safer, but not every stick has them
    except OSError as error:
        raise FederationError(f"{source} cannot be copied to {out}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)


def _require_finished(row: JobRow) -> None:
    if row.state != "finished":
        raise FederationError(
            f"job {row.name} ({row.id[:12]}) is {row.state}: {_NOT_FINISHED[row.state]}"
        )


_WAIT: Final = "wait until it has finished"
_NOT_FINISHED: Final[dict[JobState, str]] = {
    "submitted": _WAIT,
    "running": _WAIT,
    "pausing": "let it resume and finish first",
    "paused": "let it resume and finish first",
    "failed": "no model of a failed job is released; mend the reason and resume it",
    "cancelled": "no model of a cancelled job is released",
}


def _require_first(store: Store, row: JobRow) -> None:
    earlier = of_job(store, row.id)
    if earlier is not None:
        raise FederationError(
            f"job {row.name} ({row.id[:12]}) was released before, as {earlier.path}: "
            "`fedcmr models release` with --out copies that file"
        )


def _remove_leftovers(path: Path) -> None:
    """Remove what a crash left of a release, which has no row."""
    for left in (path, *path.parent.glob(f".{path.name}.*.partial")):
        left.unlink(missing_ok=True)


def _model_path(home: CoordinatorHome, row: JobRow) -> Path:
    return CheckpointFiles(home.jobs / row.id).path(spec_of(row).rounds)


def _pass_gates(
    home: CoordinatorHome,
    store: Store,
    row: JobRow,
    bundle: Bundle,
    gates: Mapping[str, Sequence[ReleaseGate]],
    now: datetime,
) -> tuple[GateResult, ...]:
    job = spec_of(row)
    if job.model.name not in gates:
        raise FederationError(
            f"job {row.name}: no release gates are known for {job.model.name}, so it stays here"
        )
    events = Events(store).as_values(row.id)
    found = tuple(gate.check(job, bundle, events) for gate in gates[job.model.name])
    for result in found:
        if not result.passed:
            _refuse(home, store, row, bundle, result, now)
            raise FederationError(
                f"job {row.name}: the release gate {result.gate} refuses: {result.text}"
            )
    return found


def _refuse(
    home: CoordinatorHome,
    store: Store,
    row: JobRow,
    bundle: Bundle,
    gate: GateResult,
    now: datetime,
) -> None:
    """Keep the signed refusal with the job's events, unless it is there already."""
    for event in Events(store).as_values(row.id):
        if event["event"] == "release_refused" and "refusal" in event:
            kept = event["refusal"]
            if (kept["model_sha256"], kept["gate"]) == (bundle.sha256, gate.model_dump()):
                return
    federation = (home.settings.federation, home.federation_sha256)
    refused = (row.id, bundle.sha256)
    refusal = ReleaseRefusal.sign(federation, refused, gate, now, home.identity())
    content = {**gate.model_dump(), "refusal": refusal.model_dump(mode="json")}
    Events(store).record(row.id, "release_refused", content)


def _card(
    home: CoordinatorHome,
    store: Store,
    row: JobRow,
    gates: tuple[GateResult, ...],
    now: datetime,
) -> ModelCard:
    job, events = spec_of(row), Events(store).as_values(row.id)
    if row.authorisation is None:
        raise FederationError(f"job {row.name} was never signed: submit it to the federation")
    try:
        authorisation = JobAuthorisation.model_validate_json(row.authorisation)
        lineage = _lineage(store, row, job, events)
        federation = (home.settings.federation, home.federation_sha256)
        return card_of(federation, job, authorisation, lineage, gates, events, now)
    except ValidationError as error:
        raise FederationError(
            f"job {row.name} left behind what does not fit together: {problems(error)}: restore "
            "the database from backup"
        ) from error


def _lineage(
    store: Store, row: JobRow, job: JobSpec, events: Sequence[Mapping[str, Any]]
) -> Lineage:
    figures = {event["round"]: event for event in events if event["event"] == "round"}
    all_rounds = Rounds(store).of(row.id)
    if not all_rounds:
        raise FederationError(f"job {row.name} has no rounds: restore the database from backup")
    start, *rounds = all_rounds
    notes = next((e.get("start") for e in events if e["event"] == "submit"), None)
    secure = job.aggregation != "plain_with_local_dp"
    return Lineage(
        start=Start(
            origin="seed" if notes is None else "bundle",
            model_sha256=str(start.model_sha256),
            notes=notes or {},
        ),
        rounds=tuple(
            LineageRound(
                number=one.number,
                sites=figures.get(one.number, {}).get("sites", 0),
                closed=one.state == "closed",
                model_sha256=str(one.model_sha256),
            )
            for one in rounds
        ),
        roster_sha256=row.roster_sha256 if secure else None,
    )


def _add_row(store: Store, row: JobRow, path: Path, key: str) -> ReleaseRow:
    released = ReleaseBundle.verify(path, key)
    release_row = ReleaseRow(
        job=row.id,
        path=path.name,
        sha256=released.sha256,
        size=released.size,
        signature=released.signature.signature,
        card=released.card.model_dump_json(),
        at=released.card.created_at,
    )
    Releases(store).add(release_row)
    Events(store).record(row.id, "release", {"path": path.name, "sha256": released.sha256})
    return release_row
