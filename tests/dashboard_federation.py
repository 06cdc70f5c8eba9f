"""A made-up federation in a coordinator's database, for tests of the dashboard.

None of its figures was measured.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.types import ASGIApp

from fedcmr_server.store import Certificates, Members, Rosters, Store, open_store
from fedcmr_server.store.tables import EventRow, JobRow, MemberRow, ReleaseRow, RoundRow
from fedcmr_shared.identity.certificates import (
    Authority,
    Member,
    Role,
    certificate_pem,
    certificate_request,
    fingerprint,
    issue_member,
    new_authority,
    new_key,
)
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import new_roster
from fedcmr_shared.identity.roster_history import next_version
from fedcmr_shared.schemas.job import JobSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec

with warnings.catch_warnings():
    # It uses a name that anyio deprecates.
    warnings.simplefilter("ignore", DeprecationWarning)
    from starlette.testclient import TestClient

NOW = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
SITES = ("alder", "birch", "cedar", "dogwood")


@dataclass(frozen=True)
class Settings:
    federation: str = "heart-network"


@dataclass(frozen=True)
class Home:
    """What the dashboard takes from a coordinator's folder."""

    federation_sha256: str
    settings: Settings = Settings()


@dataclass(frozen=True)
class Federation:
    """A store with its authority, and certificates (PEM) by member."""

    store: Store
    authority: Authority
    certificates: dict[str, str]

    @property
    def home(self) -> Home:
        return Home(fingerprint(self.authority.certificate))

    def join(self, name: str, role: Role = "site", days_ago: float = 100) -> str:
        """Add a member and return its certificate, which lasts a year."""
        member, at = Member(role, name), NOW - timedelta(days=days_ago)
        certificate = issue_member(
            self.authority, certificate_request(new_key(), member), member, at
        )
        identity = SiteKey(Ed25519PrivateKey.generate()).public_key
        Members(self.store).add(member, identity, f"ssh-{name}" if role == "site" else None, at)
        Certificates(self.store).add(name, certificate)
        self.certificates[name] = certificate_pem(certificate)
        return self.certificates[name]

    def headers(self, name: str) -> dict[str, str]:
        """What the gateway says of a request with the certificate of ``name``."""
        return gateway_headers(self.certificates[name])


def client_of(app: ASGIApp, headers: Mapping[str, str] | None = None) -> TestClient:
    """A browser behind the gateway; over TLS, since the session's cookie asks for it."""
    return TestClient(
        app,
        base_url="https://fed.example",
        headers=dict(headers or {}),
        follow_redirects=False,
        raise_server_exceptions=False,
    )


def gateway_headers(pem: str) -> dict[str, str]:
    return {
        "x-fedcmr-verified": "SUCCESS",
        "x-fedcmr-certificate": quote(pem),
        "x-fedcmr-address": "192.0.2.7",
    }


def empty_federation(folder: Path) -> Federation:
    store = open_store(f"sqlite:///{folder / 'coordinator.sqlite'}")
    return Federation(store, new_authority("heart-network", NOW - timedelta(days=400)), {})


def busy_federation(folder: Path) -> Federation:
    """Four sites of which one is away and one paused, an auditor, and a job in each state."""
    federation = empty_federation(folder)
    for name, days in zip(SITES, (20, 353, 130, 60), strict=True):
        federation.join(name, days_ago=days)
    federation.join("elder", days_ago=380)
    federation.join("audit-office", "auditor")
    members = Members(federation.store)
    seen = ((40, "ready"), (75, "paused"), (12, "ready"), (11_000, "ready"))
    for name, (seconds, condition) in zip(SITES, seen, strict=True):
        at = NOW - timedelta(seconds=seconds)
        members.seen(name, "fedcmr 0.1.0", at, condition)
    members.end("elder", "revoked", "the key was on a stolen laptop", NOW - timedelta(hours=30))
    _pin(federation)
    add_job(federation.store, job_spec("cardiomm-running", rounds=10), "running", done=4)
    finished = add_job(federation.store, job_spec("cardiomm-winter", rounds=6), "finished", done=6)
    failed = "10 runs in a row were lost without a new round; the last one: 2 of 3 sites connected"
    add_job(federation.store, job_spec("lge-scar", rounds=8), "failed", done=2, reason=failed)
    add_job(federation.store, job_spec("perfusion-pilot", rounds=5), "submitted", done=0)
    with federation.store.writing() as session:
        session.add(
            ReleaseRow(
                job=finished,
                path="cardiomm-winter.safetensors",
                sha256="5e" * 32,
                size=4_180_000,
                signature="0" * 128,
                card="{}",
                at=NOW - timedelta(days=9),
            )
        )
    return federation


def job_spec(name: str, rounds: int = 10, **changes: Any) -> JobSpec:
    privacy = PrivacySpec(
        cohort_size=300,
        sampling_rate=0.1,
        noise_multiplier=1.4,
        clip_norm=0.01,
        evaluation=EvaluationSpec(rounds="all", metrics=("psnr", "ssim"), noise_multiplier=8.0),
    )
    training = TrainingSpec(part="adapters", local_steps=8)
    return JobSpec.model_validate(
        {"name": name, "rounds": rounds, "privacy": privacy, "training": training, **changes}
    )


def add_job(store: Store, spec: JobSpec, state: Any, done: int, reason: str | None = None) -> str:
    """Add a job with its rounds and events; return its id."""
    hours = {"running": 4, "submitted": 2}.get(state, 220)
    begin = NOW - timedelta(hours=hours)
    log = _Log(spec, begin)
    log.add("submit")
    if state != "submitted":
        log.add("start", run="8412", state="running")
        for number in range(1, done + 1):
            log.round(number)
        if state == "running":
            log.under_way(done + 1)
        else:
            log.add({"finished": "finish", "failed": "fail"}[state], reason=reason)
    with store.writing() as session:
        session.add(
            JobRow(
                id=spec.sha256,
                name=spec.name,
                spec=spec.model_dump_json(),
                authorisation=None,
                roster=None,
                roster_sha256="ab" * 32,
                submitted_at=begin,
                changed_at=log.at,
                state=state,
                run="8412" if state == "running" else None,
                reason=reason,
            )
        )
        session.flush()
        session.add_all([*log.events, *log.rounds])
    return spec.sha256


class _Log:
    """Events and rounds of a job, with a clock that goes on."""

    def __init__(self, spec: JobSpec, at: datetime) -> None:
        self.spec, self.at = spec, at
        self.events: list[EventRow] = []
        self.rounds = [self._row(0, "committed")]

    def add(self, name: str, after_s: float = 20, **content: Any) -> None:
        self.at += timedelta(seconds=after_s)
        number = len(self.events) + 1
        self.events.append(
            EventRow(job=self.spec.sha256, number=number, at=self.at, name=name, content=content)
        )

    def round(self, number: int) -> None:
        lost = {3: [loss("dogwood", "update", "silent")], 4: [refusal("birch", "keys", "paused")]}
        if number == 3:
            self.attempt("train", number, 1, "ended", [*lost[3], loss("birch", "shares", "silent")])
        attempt = 2 if number == 3 else 1
        self.attempt("train", number, attempt, "opened", lost.get(number, []))
        content = {
            "sites": 3 if number in lost else 4,
            "closed": False,
            "left_out": 0,
            "seconds": 700 + 90 * math.sin(number),
            "train_loss": None,
            "update_norm": 0.4,
            "bytes_up": 21_000_000,
            "bytes_down": 24_500_000 + 900_000 * (number == 3),
            "model_sha256": f"{number:02x}" * 32,
        }
        self.rounds.append(self._row(number, "committed"))
        self.add("round", round=number, **content)
        self.attempt("evaluate", number, 1, "opened", [])
        self.add(
            "evaluation",
            round=number,
            sites=4,
            closed=False,
            seconds=95.0,
            bytes_up=90_000,
            bytes_down=8_200_000,
            psnr=31.4 - 3.1 * math.exp(-number / 3) + 0.15 * math.cos(5 * number),
            ssim=0.91 - 0.05 * math.exp(-number / 3) + 0.003 * math.cos(4 * number),
        )

    def under_way(self, number: int) -> None:
        self.at = NOW - timedelta(minutes=6)
        self.rounds.append(self._row(number, "started"))
        self.add("attempt_started", phase="train", round=number, attempt=1)

    def attempt(
        self, phase: str, number: int, attempt: int, outcome: str, losses: list[Any]
    ) -> None:
        place = {"phase": phase, "round": number, "attempt": attempt}
        self.add("attempt_started", **place)
        if outcome != "ended":
            self.add("unmask_asked", 400, **place)
        names = {each["site"] for each in losses}
        self.add(
            "attempt",
            **place,
            outcome=outcome,
            step="unmask" if outcome == "opened" else "update",
            reason=None if outcome == "opened" else "2 sites answered step update; 3 are needed",
            survivors=sorted(set(SITES) - names) if outcome == "opened" else [],
            losses=losses,
            seconds=212.0,
            bytes_up=21_000_000,
            bytes_down=24_500_000,
            exchanges=5,
            sites=4,
            threshold=3,
            groups=[list(SITES)],
        )

    def _row(self, number: int, state: Any) -> RoundRow:
        return RoundRow(
            job=self.spec.sha256,
            number=number,
            state=state,
            started_at=self.at,
            committed_at=None if state == "started" else self.at,
            model_sha256=None if state == "started" else f"{number:02x}" * 32,
        )


def loss(site: str, step: str, fault: str, reason: str = "no answer") -> dict[str, str]:
    return {"site": site, "step": step, "fault": fault, "reason": reason}


def refusal(site: str, step: str, code: str) -> dict[str, str]:
    return loss(site, step, "refused", f"{code}: in words")


def _pin(federation: Federation) -> None:
    key = SiteKey(Ed25519PrivateKey.generate())
    members: list[MemberRow] = Members(federation.store).all()
    keys = {row.name: row.identity for row in members if row.role == "site"}
    rosters = Rosters(federation.store)
    first = next_version(
        (), new_roster(keys), "the federation begins", key, NOW - timedelta(days=90)
    )
    rosters.add(first)
    del keys["elder"]
    reason = "elder's key was on a stolen laptop"
    rosters.add(next_version([first], new_roster(keys), reason, key, NOW - timedelta(hours=29)))
