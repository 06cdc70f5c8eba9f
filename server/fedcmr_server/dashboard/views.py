"""From rows to what the overview and the page of sites show: no database, no HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any, Final

from fedcmr_server.dashboard.history import History
from fedcmr_server.dashboard.job_view import Figure, JobCard, job_card
from fedcmr_server.job_events import event_text
from fedcmr_server.store.tables import CertificateRow, EventRow, JobRow, MemberRow, RoundRow
from fedcmr_server.words import NOTHING, ago, plural
from fedcmr_shared.identity.certificates import WARNING_DAYS, spoken
from fedcmr_shared.identity.roster_history import RosterVersion, changes

OFFLINE_AFTER: Final = timedelta(minutes=15)  # three reports of an agent with default settings
"""A site that was not heard of for so long counts as offline."""

MOST_EVENTS: Final = 15

_CONDITIONS: Final[Mapping[str, tuple[str, str]]] = {
    "ready": ("ready", "good"),
    "paused": ("paused", "wait"),
    "quiet": ("in quiet hours", "wait"),
    "stopping": ("stopping", "wait"),
    "attention": ("needs its operator", "warn"),
}
"""What a site says of itself; see `Condition` in ``governance.proto``."""

_AWAY: Final = ("bad", "wait", "warn")
_QUIET_EVENTS: Final = ("start", "authorise")
_EVENT_TONES: Final[Mapping[str, str]] = {
    "run_lost": "warn",
    "paused": "wait",
    "resume": "live",
    "finish": "good",
    "fail": "bad",
    "round": "good",
    "release": "good",
    "release_refused": "bad",
}


@dataclass(frozen=True)
class Health:
    """How a member is: a word, how it is drawn, and when it was last heard of."""

    word: str
    tone: str
    seen: str
    seen_at: datetime | None


@dataclass(frozen=True)
class Validity:
    """How long a member's certificate still lasts."""

    text: str
    tone: str
    days: float


@dataclass(frozen=True)
class CertificateLine:
    """A certificate in a table."""

    serial: str
    state: str
    tone: str
    not_before: datetime
    not_after: datetime
    left: str


@dataclass(frozen=True)
class MemberLine:
    """A member in a table; keys are in groups of four digits, to be read out."""

    name: str
    role: str
    state: str
    since: datetime
    reason: str
    software: str
    health: Health
    certificate: Validity
    identity: str
    certificates: tuple[CertificateLine, ...]


@dataclass(frozen=True)
class EventLine:
    """Something that happened; ``job`` is empty when it was not in a job."""

    at: datetime
    ago: str
    job: str
    name: str
    text: str
    tone: str


@dataclass(frozen=True)
class Overview:
    """Everything on the first page."""

    figures: tuple[Figure, ...]
    warnings: tuple[str, ...]
    jobs: tuple[JobCard, ...]
    older: tuple[JobRow, ...]
    sites: tuple[MemberLine, ...]
    events: tuple[EventLine, ...]

    @property
    def live(self) -> bool:
        """Whether a job may change by itself."""
        return any(job.live for job in self.jobs)


@dataclass(frozen=True)
class RosterLine:
    """A version of the roster."""

    number: int
    at: datetime
    reason: str
    changes: tuple[str, ...]
    sites: int
    threshold: int
    fingerprint: str
    sha256: str


@dataclass(frozen=True)
class SitesPage:
    """Everything on the page of members."""

    members: tuple[MemberLine, ...]
    former: tuple[MemberLine, ...]
    roster: tuple[RosterLine, ...]
    federation: str


@dataclass(frozen=True)
class OverviewRows:
    """What the store has for the overview: events of the shown jobs alone, in their order.

    ``contradicting`` are the names of sites that signed two histories.
    """

    jobs: Sequence[JobRow]
    older: Sequence[JobRow]
    rounds: Mapping[str, Sequence[RoundRow]]
    events: Mapping[str, Sequence[EventRow]]
    members: Sequence[MemberRow]
    certificates: Sequence[CertificateRow]
    contradicting: Sequence[str]


def overview(rows: OverviewRows, now: datetime) -> Overview:
    """Return everything that the first page shows."""
    cards = tuple(
        job_card(job, rows.rounds.get(job.id, ()), History.of(rows.events.get(job.id, ())), now)
        for job in rows.jobs
    )
    sites = tuple(
        line for line in member_lines(rows.members, rows.certificates, now) if line.role == "site"
    )
    active = tuple(line for line in sites if line.state == "active")
    return Overview(
        figures=_figures(cards, active),
        warnings=(*_forks(rows.contradicting), *_warnings(cards, active)),
        jobs=cards,
        older=tuple(rows.older),
        sites=active,
        events=tuple(_event_lines(rows, now)),
    )


def sites_page(
    members: Sequence[MemberRow],
    certificates: Sequence[CertificateRow],
    history: Sequence[RosterVersion],
    federation_sha256: str,
    now: datetime,
) -> SitesPage:
    """Return everything that the page of members shows."""
    lines = member_lines(members, certificates, now)
    return SitesPage(
        members=tuple(line for line in lines if line.state == "active"),
        former=tuple(line for line in lines if line.state != "active"),
        roster=tuple(_roster_lines(history)),
        federation=spoken(federation_sha256),
    )


def member_lines(
    members: Iterable[MemberRow], certificates: Iterable[CertificateRow], now: datetime
) -> tuple[MemberLine, ...]:
    """Return a line for each member, in their order."""
    by_member: dict[int, list[CertificateRow]] = {}
    for certificate in certificates:
        by_member.setdefault(certificate.member_id, []).append(certificate)
    return tuple(_member_line(row, by_member.get(row.id, []), now) for row in members)


def health(member: MemberRow, now: datetime) -> Health:
    """Return how a member is: what it said last counts until `OFFLINE_AFTER`."""
    seen = "never" if member.seen_at is None else ago(member.seen_at, now)
    if member.state != "active":
        return Health(member.state, "quiet", seen, member.seen_at)
    if member.role != "site":  # nobody expects to hear of the others
        return Health("active", "good", seen, member.seen_at)
    if member.seen_at is None:
        return Health("not seen yet", "quiet", seen, None)
    if now - member.seen_at > OFFLINE_AFTER:
        return Health("offline", "bad", seen, member.seen_at)
    word, tone = _CONDITIONS.get(member.condition or "ready", ("unknown", "warn"))
    return Health(word, tone, seen, member.seen_at)


def validity(certificates: Iterable[CertificateRow], now: datetime) -> Validity:
    """Return how long the longest of a member's active certificates lasts."""
    ends = [row.not_after for row in certificates if row.state == "active"]
    if not ends:
        return Validity("none", "bad", -math.inf)
    days = (max(ends) - now) / timedelta(days=1)
    if days < 0:
        return Validity(f"expired {ago(max(ends), now)}", "bad", days)
    text = f"{plural(math.floor(days), 'day')} left"
    return Validity(text, "warn" if days < WARNING_DAYS else "good", days)


def tone(name: str, content: Mapping[str, Any]) -> str:
    """Return how an event is drawn."""
    if name == "attempt":
        return {"opened": "quiet", "ended": "warn"}.get(str(content.get("outcome")), "bad")
    if name == "round" and content.get("closed"):
        return "warn"
    return _EVENT_TONES.get(name, "quiet")


def _figures(cards: Sequence[JobCard], sites: Sequence[MemberLine]) -> tuple[Figure, ...]:
    running = sum(card.state in ("running", "pausing") for card in cards)
    waiting = sum(card.state == "submitted" for card in cards)
    ready = sum(line.health.word == "ready" for line in sites)
    first = min(sites, key=lambda line: line.certificate.days, default=None)
    return (
        Figure("jobs running", f"{running}", f"{waiting} waiting" if waiting else "none waiting"),
        Figure("sites ready", f"{ready} of {len(sites)}", _absent(sites)),
        Figure(
            "next certificate to end",
            NOTHING if first is None else _days(first.certificate.days),
            "no site has joined" if first is None else f"that of {first.name}",
        ),
    )


def _absent(sites: Sequence[MemberLine]) -> str:
    if not sites:
        return "none has joined"
    words = [line.health.word for line in sites if line.health.word != "ready"]
    counts = {word: words.count(word) for word in sorted(set(words))}
    return ", ".join(f"{count} {word}" for word, count in counts.items()) or "all of them"


def _days(days: float) -> str:
    if math.isinf(days):
        return "none"
    return plural(math.floor(days), "day") if days >= 0 else "expired"


def _forks(sites: Sequence[str]) -> Iterator[str]:
    for site in sites:
        yield (
            f"Ledger of {site}: the site signed two histories of it, and its accounts are not to "
            "be believed before it has explained them. Both heads are kept as proof."
        )


def _warnings(cards: Sequence[JobCard], sites: Sequence[MemberLine]) -> Iterable[str]:
    for card in cards:
        if card.state == "failed":
            yield f"Job {card.name} failed: {card.reason or 'see its events'}."
        elif card.live and card.reason:
            yield f"Job {card.name} lost its last run: {card.reason}."
    if any(card.live for card in cards):
        away = [f"{line.name} ({line.health.word})" for line in sites if line.health.tone in _AWAY]
        if away:
            yield f"Not at work while a job is under way: {', '.join(away)}."
    for line in sites:
        if line.certificate.tone != "good":
            text = line.certificate.text
            yield f"Certificate of {line.name}: {text}. The site renews it, or asks for a new one."


def _member_line(
    row: MemberRow, certificates: Sequence[CertificateRow], now: datetime
) -> MemberLine:
    newest = sorted(certificates, key=lambda each: each.not_after, reverse=True)
    return MemberLine(
        name=row.name,
        role=row.role,
        state=row.state,
        since=row.since,
        reason=row.reason or "",
        software=row.software or NOTHING,
        health=health(row, now),
        certificate=validity(certificates, now),
        identity=spoken(row.identity),
        certificates=tuple(_certificate_line(each, now) for each in newest),
    )


def _certificate_line(row: CertificateRow, now: datetime) -> CertificateLine:
    left = validity([row], now)
    if row.state != "active":
        ended = f", ended {ago(row.ended_at, now)}" if row.ended_at else ""
        left = Validity(f"{row.state}{ended}", "quiet", left.days)
    state = "expired" if row.state == "active" and left.days < 0 else row.state
    return CertificateLine(row.serial, state, left.tone, row.not_before, row.not_after, left.text)


def _event_lines(rows: OverviewRows, now: datetime) -> list[EventLine]:
    lines = [
        line
        for job in rows.jobs
        # Of each job no more can be among the newest of all.
        for line in islice(_job_lines(job, rows.events.get(job.id, ()), now), MOST_EVENTS)
    ]
    for member in rows.members:
        text, drawn = _membership(member)
        lines.append(EventLine(member.since, ago(member.since, now), "", member.name, text, drawn))
    return sorted(lines, key=lambda line: line.at, reverse=True)[:MOST_EVENTS]


def _job_lines(job: JobRow, events: Sequence[EventRow], now: datetime) -> Iterator[EventLine]:
    """What a job's events say, the newest first."""
    for event in reversed(events):
        text = None if event.name in _QUIET_EVENTS else event_text(event.name, event.content)
        if text is not None:
            drawn = tone(event.name, event.content)
            yield EventLine(event.at, ago(event.at, now), job.id, job.name, text, drawn)


def _membership(member: MemberRow) -> tuple[str, str]:
    why = f": {member.reason}" if member.reason else ""
    if member.state == "revoked":
        return f"was revoked{why}", "bad"
    if member.state == "left":
        return f"left{why}", "quiet"
    return f"joined as {member.role}", "quiet"


def _roster_lines(history: Sequence[RosterVersion]) -> list[RosterLine]:
    before = [None, *(version.roster for version in history)]
    lines = [
        RosterLine(
            number=version.number,
            at=version.at,
            reason=version.reason,
            changes=tuple(changes(old, version.roster)),
            sites=len(version.roster.sites),
            threshold=version.roster.threshold,
            fingerprint=version.roster.fingerprint,
            sha256=version.sha256,
        )
        for old, version in zip(before, history, strict=False)
    ]
    return lines[::-1]
