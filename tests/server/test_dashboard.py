"""The dashboard over HTTP: who is let in, what every answer has, and that nobody's text is markup."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from dashboard_federation import (
    NOW,
    Federation,
    TestClient,
    add_job,
    busy_federation,
    client_of,
    empty_federation,
    gateway_headers,
    job_spec,
)
from html_page import Page

from fedcmr_server.dashboard import create_app
from fedcmr_server.dashboard.access import (
    MOST_FAILURES,
    SESSION,
    SESSION_LIFE,
    Failures,
    Sessions,
    Viewer,
)
from fedcmr_server.dashboard.headers import SECURITY_HEADERS
from fedcmr_server.dashboard.reading import MOST_JOBS, EventCache, Reader
from fedcmr_server.store import AccessLog, Certificates, Events, Members, Tokens
from fedcmr_server.store.tables import EventRow, JobRow, TokenRow
from fedcmr_shared.identity.certificates import (
    Member,
    certificate_pem,
    certificate_request,
    issue_member,
    new_key,
)

RUNNING = job_spec("cardiomm-running", rounds=10).sha256
FINISHED = job_spec("cardiomm-winter", rounds=6).sha256
PAGES = ("/", f"/jobs/{RUNNING}", f"/jobs/{FINISHED}", "/sites")


class Clock:
    """A clock that only the test moves."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Only read by the tests, but for its tokens and access log."""
    federation = busy_federation(tmp_path_factory.mktemp("busy"))
    with federation.store:
        yield federation


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Federation]:
    """One site, for tests that change something."""
    federation = empty_federation(tmp_path)
    federation.join("alder")
    with federation.store:
        yield federation


def client(federation: Federation, clock: Clock | None = None, **headers: str) -> TestClient:
    return client_of(create_app(federation.home, federation.store, clock=clock or Clock()), headers)


def member(federation: Federation, name: str = "alder", clock: Clock | None = None) -> TestClient:
    return client(federation, clock, **federation.headers(name))


def token(federation: Federation, lifetime: timedelta = timedelta(hours=1)) -> str:
    return Tokens(federation.store).issue("a visitor", lifetime, NOW)


def refusals(federation: Federation) -> list[str]:
    return [row.detail for row in AccessLog(federation.store).newest(refused_only=True)]


# Pages


@pytest.mark.parametrize("path", PAGES)
def test_pages_are_valid_and_have_landmarks(busy: Federation, path: str) -> None:
    answer = member(busy).get(path)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    page = Page(answer.text)
    assert page.of("html") == [{"lang": "en"}]
    for landmark in ("header", "nav", "main", "footer", "h1"):
        assert len(page.of(landmark)) == 1, landmark
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(set(ids)) == len(ids)
    named = [each["aria-labelledby"] for each in page.of("section")]
    assert set(named) <= set(ids)
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(each.get("scope") in ("col", "row") for each in page.of("th"))
    assert not page.of("script")
    assert not page.of("style")
    assert not any("style" in attributes for _, attributes in page.elements)
    assert not any(name.startswith("on") for _, each in page.elements for name in each)


@pytest.mark.parametrize("path", [*PAGES, "/login", "/login?token=abc"])
def test_pages_need_nothing_from_elsewhere(busy: Federation, path: str) -> None:
    browser = member(busy)
    page = Page(browser.get(path).text)
    links = [
        value
        for _, attributes in page.elements
        for name, value in attributes.items()
        if name in ("href", "src", "action") and value
    ]
    assert links
    for link in links:
        assert link[0] in "/#?"
        assert not link.startswith("//")
        if link.startswith("/"):
            assert browser.get(link).status_code == 200


def test_charts_have_titles_axes_and_words(busy: Federation) -> None:
    text = member(busy).get(f"/jobs/{RUNNING}").text
    page = Page(text)
    drawn = [each for each in page.of("svg") if each.get("role") == "img"]
    assert len(drawn) == 4
    assert "PSNR (dB) over rounds" in text
    assert "PSNR: 30.64 dB in round 4, 29.22 dB in round 1." in text
    assert "round 4: PSNR 30.64 dB" in text


def test_the_overview_shows_jobs_sites_and_events(busy: Federation) -> None:
    text = Page(member(busy).get("/").text).text
    for shown in ("4 of 10 rounds", "running", "finished", "failed", "submitted", "2 of 4"):
        assert shown in text
    assert "Certificate of birch: 12 days left." in text
    assert "elder was revoked: the key was on a stolen laptop" in " ".join(text.split())


def test_the_job_shows_attempts_losses_and_claim(busy: Federation) -> None:
    page = Page(member(busy).get(f"/jobs/{RUNNING}").text)
    assert ["keys", "paused", "the site is paused", "1"] in page.rows
    assert any(row[:4] == ["3", "training", "1", "ended"] for row in page.rows)
    assert "ε for a patient, at most" in page.text
    assert "≤ 10 kWh" in page.text


def test_members_roster_and_certificates_are_shown(busy: Federation) -> None:
    page = Page(member(busy).get("/sites").text)
    rows = {row[0]: row for row in page.rows}
    assert rows["birch"][2] == "paused"
    assert rows["dogwood"][2] == "offline"
    assert rows["audit-office"][1] == "auditor"
    assert "elder leaves; the threshold changes from 4 to 3" in rows["2"][2]


def test_an_empty_federation_has_pages(small: Federation) -> None:
    browser = member(small)
    assert "No job was submitted yet" in browser.get("/").text
    assert "There is no roster yet" in browser.get("/sites").text


def test_running_jobs_follow_along_until_told_not_to(busy: Federation) -> None:
    def refreshes(path: str) -> bool:
        page = Page(member(busy).get(path).text)
        return any(each.get("http-equiv") == "refresh" for each in page.of("meta"))

    assert refreshes("/")
    assert refreshes(f"/jobs/{RUNNING}")
    assert not refreshes(f"/jobs/{RUNNING}?live=off")
    assert not refreshes(f"/jobs/{FINISHED}")
    assert not refreshes("/sites")


def test_a_page_shows_what_happened_since(small: Federation) -> None:
    job = add_job(small.store, job_spec("live"), "running", done=1)
    browser = member(small)
    assert "PSNR 12.34 dB" not in browser.get("/").text
    values = {"round": 2, "sites": 1, "psnr": 12.34}
    Events(small.store).record(job, "evaluation", values)
    assert "PSNR 12.34 dB" in browser.get("/").text
    assert "12.34" in browser.get(f"/jobs/{job}").text


def test_events_are_read_once(small: Federation) -> None:
    job = add_job(small.store, job_spec("live"), "running", done=1)
    cache = EventCache(small.store, most=1)
    before = cache.of(job)
    Events(small.store).record(job, "evaluation", {"round": 9})
    after = cache.of(job)
    assert all(old is new for old, new in zip(before, after, strict=False))
    assert [row.number for row in after] == list(range(1, len(before) + 2))
    other = add_job(small.store, job_spec("other"), "submitted", done=0)
    assert [row.name for row in cache.of(other)] == ["submit"]
    assert len(cache.of(job)) == len(after)  # forgotten, and read anew


def test_many_jobs_are_listed_by_name(small: Federation) -> None:
    oldest = add_job(small.store, job_spec("oldest"), "finished", done=1)
    for number in range(MOST_JOBS):
        add_job(small.store, job_spec(f"job-{number}"), "submitted", done=0)
    rows = Reader(small.store).overview()
    assert [row.id for row in rows.older] == [oldest]
    assert "1 older job" in member(small).get("/").text


# Every answer


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200),
        ("GET", "/nowhere", 404),
        ("GET", "/jobs/" + "0" * 64, 404),
        ("GET", "/jobs/..%2f..%2fetc", 404),
        ("GET", "/sites/", 404),
        ("GET", "/style.css", 200),
        ("GET", "/icon.svg", 200),
        ("GET", "/healthz", 200),
        ("GET", "/login", 200),
        ("HEAD", "/", 200),
        ("POST", "/", 405),
        ("POST", f"/jobs/{RUNNING}", 405),
        ("POST", "/nowhere", 405),
        ("PUT", "/login", 405),
        ("DELETE", "/sites", 405),
        ("OPTIONS", "/", 405),
        ("TRACE", "/", 405),
        ("POST", "/login", 400),
    ],
)
def test_every_answer_has_the_security_headers(
    busy: Federation, method: str, path: str, status: int
) -> None:
    answer = member(busy).request(method, path)
    assert answer.status_code == status
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers.get_list(name) == [value], name
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    assert "script-src" not in policy
    if status == 405:
        assert answer.headers["allow"].startswith("GET, HEAD")


def test_a_mistake_in_a_page_tells_nothing(
    busy: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("a secret path")

    monkeypatch.setattr(Reader, "overview", fails)
    answer = member(busy).get("/")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    for name, value in SECURITY_HEADERS.items():
        assert answer.headers.get_list(name) == [value], name


def test_without_a_database_pages_say_so(small: Federation) -> None:
    browser = member(small)
    small.store.close()
    url = small.store.engine.url.database
    assert url is not None
    Path(url).rename(url + ".gone")
    Path(url).mkdir()  # nothing can be opened there
    for path in ("/", "/sites", f"/jobs/{RUNNING}"):
        answer = browser.get(path)
        assert answer.status_code == 503
        assert url not in answer.text
        assert answer.headers["cache-control"] == "no-store"
    assert browser.get("/healthz").status_code == 503


# Texts of others


EVIL = '<script>alert(1)</script><img src=x onerror=alert(1)>" onload="x'


def test_what_others_wrote_is_text(small: Federation) -> None:
    small.join("birch")
    Members(small.store).seen("birch", EVIL, NOW, EVIL)
    Members(small.store).end("alder", "revoked", EVIL, NOW)
    job = add_job(small.store, job_spec("evil"), "running", done=1, reason=EVIL)
    lost = [{"site": EVIL, "step": EVIL, "fault": EVIL, "reason": EVIL}]
    place = {"phase": EVIL, "round": 1, "attempt": 7}
    with small.store.writing() as session:
        row = session.get(JobRow, job)
        assert row is not None
        row.name = row.run = row.roster_sha256 = EVIL
        for number, name in ((90, "attempt"), (91, EVIL), (92, "fail")):
            content: dict[str, Any] = {"outcome": EVIL, "reason": EVIL, "losses": lost, **place}
            session.add(EventRow(job=job, number=number, at=NOW, name=name, content=content))
    browser = member(small, "birch")
    for path in ("/", f"/jobs/{job}", "/sites"):
        text = browser.get(path).text
        assert "&lt;script&gt;alert(1)" in text
        page = Page(text)
        assert not page.of("script")
        assert not any("onerror" in each or "onload" in each for _, each in page.elements)
        assert all(each.get("src") == "/icon.svg" for each in page.of("img"))


@pytest.mark.parametrize("path", ["/login?token=" + quote(EVIL), "/" + quote(EVIL)])
def test_what_the_browser_sent_is_text(busy: Federation, path: str) -> None:
    page = Page(member(busy).get(path).text)
    assert not page.of("script")
    assert not any("onload" in each for _, each in page.elements)


# Who is let in


@pytest.mark.parametrize("path", [*PAGES, "/nowhere"])
def test_strangers_are_told_how_to_log_in(busy: Federation, path: str) -> None:
    answer = client(busy).get(path)
    assert answer.status_code == 401
    assert "With your certificate." in answer.text
    assert "cardiomm" not in answer.text
    assert "alder" not in answer.text


@pytest.mark.parametrize("name", ["alder", "audit-office"])
def test_active_members_read_with_their_certificate(busy: Federation, name: str) -> None:
    answer = member(busy, name).get("/")
    assert answer.status_code == 200
    assert f'{name} <span class="note">by certificate' in answer.text


def test_a_coordinator_may_read(small: Federation) -> None:
    small.join("hub", "coordinator")
    assert member(small, "hub").get("/").status_code == 200


@pytest.mark.parametrize("verified", ["NONE", "FAILED:expired", "success", "", None])
def test_a_certificate_counts_when_the_gateway_verified_it(
    busy: Federation, verified: str | None
) -> None:
    headers = busy.headers("alder")
    assert client(busy, **headers).get("/").status_code == 200
    del headers["x-fedcmr-verified"]
    headers |= {} if verified is None else {"x-fedcmr-verified": verified}
    assert client(busy, **headers).get("/").status_code == 401


def test_a_certificate_that_nobody_issued_is_refused_and_noted(small: Federation) -> None:
    """The same authority signed it, but the database does not know it."""
    who = Member("site", "alder")
    stray = issue_member(small.authority, certificate_request(new_key(), who), who, NOW)
    answer = client(small, **gateway_headers(certificate_pem(stray))).get("/")
    assert answer.status_code == 401
    (note,) = refusals(small)
    assert "is not active, from 192.0.2.7" in note


@pytest.mark.parametrize(
    "pem", ["", "nonsense", "%00", "-----BEGIN CERTIFICATE-----", "A" * 99_999]
)
def test_what_is_no_certificate_is_refused(busy: Federation, pem: str) -> None:
    headers = {"x-fedcmr-verified": "SUCCESS", "x-fedcmr-certificate": pem}
    assert client(busy, **headers).get("/").status_code == 401


def test_revocation_and_expiry_take_effect_at_once(small: Federation) -> None:
    small.join("birch")
    small.join("cedar")
    clock = Clock()
    alder, birch, cedar = (member(small, name, clock) for name in ("alder", "birch", "cedar"))
    assert {each.get("/").status_code for each in (alder, birch, cedar)} == {200}
    Members(small.store).end("alder", "revoked", "stolen", NOW)
    (row,) = Certificates(small.store).of("birch")
    Certificates(small.store).revoke(row.serial, "lost", NOW)
    assert [each.get("/").status_code for each in (alder, birch, cedar)] == [401, 401, 200]
    clock.now += timedelta(days=300)
    assert cedar.get("/").status_code == 401


def test_turned_away_certificates_do_not_flood_the_log(small: Federation) -> None:
    browser = member(small)
    Members(small.store).end("alder", "revoked", "stolen", NOW)
    for _ in range(MOST_FAILURES + 5):
        assert browser.get("/").status_code == 401
    assert len(refusals(small)) == MOST_FAILURES


# Tokens and sessions


def test_a_token_opens_one_session(small: Federation) -> None:
    browser, secret = client(small), token(small)
    for _ in range(2):  # link scanners follow links, and use nothing up
        form = browser.get(f"/login?token={secret}")
        assert form.status_code == 200
        assert {"type": "hidden", "name": "token", "value": secret} in Page(form.text).of("input")
    answer = browser.post("/login", data={"token": secret})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith(f"{SESSION}=")
    assert set(cookie.split("; ")[1:]) == {"HttpOnly", "Path=/", "SameSite=strict", "Secure"}
    assert "a visitor <span" in browser.get("/").text
    again = client(small).post("/login", data={"token": secret})
    assert again.status_code == 401
    assert "set-cookie" not in again.headers
    assert refusals(small) == ["token is unknown, used or too old, from unknown"]
    newest = AccessLog(small.store).newest()[-1]
    assert (newest.member, newest.allowed) == ("a visitor", True)


def test_only_the_hash_of_a_token_is_kept(small: Federation) -> None:
    secret = token(small)
    client(small).post("/login", data={"token": secret})
    with small.store.reading() as session:
        rows = session.query(TokenRow).all()
    assert secret not in repr(rows)
    assert secret not in repr(AccessLog(small.store).newest())


def test_an_expired_token_is_refused(small: Federation) -> None:
    secret, clock = token(small, timedelta(minutes=5)), Clock()
    clock.now += timedelta(minutes=5)
    answer = client(small, clock).post("/login", data={"token": secret})
    assert answer.status_code == 401
    clock.now -= timedelta(minutes=5)  # it was not used up
    assert client(small, clock).post("/login", data={"token": secret}).status_code == 303


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"token", 400),
        (b"token=", 400),
        (b"other=x", 400),
        (b"token=a&token=b", 400),
        (b"token=a&b=1&c=1&d=1&e=1", 400),
        (b"\xff\xfe", 400),
        (b"token=" + b"a" * 5000, 400),
        (b"token=unknown", 401),
        (b"token=%ff%00%ed%a0%80", 401),
    ],
)
def test_wrong_forms_open_nothing(busy: Federation, body: bytes, status: int) -> None:
    answer = client(busy).post("/login", content=body)
    assert answer.status_code == status
    assert "set-cookie" not in answer.headers


@pytest.mark.parametrize("where", ["cross-site", "same-site"])
def test_another_page_cannot_send_the_form(small: Federation, where: str) -> None:
    secret = token(small)
    sent = {"sec-fetch-site": where}
    assert client(small).post("/login", data={"token": secret}, headers=sent).status_code == 403
    own = {"sec-fetch-site": "same-origin"}
    assert client(small).post("/login", data={"token": secret}, headers=own).status_code == 303


@pytest.mark.parametrize("value", ["", "x", "0" * 43, "../..", EVIL.replace(";", "")])
def test_a_made_up_session_is_refused(busy: Federation, value: str) -> None:
    answer = client(busy, cookie=f"{SESSION}={quote(value)}").get("/")
    assert answer.status_code == 401


def test_a_session_lasts_eight_hours(small: Federation) -> None:
    clock = Clock()
    browser = client(small, clock)
    browser.post("/login", data={"token": token(small)})
    clock.now += SESSION_LIFE - timedelta(seconds=1)
    assert browser.get("/").status_code == 200
    clock.now += timedelta(seconds=1)
    assert browser.get("/").status_code == 401


def test_a_restart_ends_sessions(small: Federation) -> None:
    browser = client(small)
    browser.post("/login", data={"token": token(small)})
    assert browser.get("/").status_code == 200
    restarted = client(small)
    restarted.cookies = browser.cookies
    assert restarted.get("/").status_code == 401


def test_after_failed_logins_an_address_waits(small: Federation) -> None:
    clock, secret = Clock(), token(small)
    browser = client(small, clock, **{"x-fedcmr-address": "192.0.2.7"})
    for _ in range(MOST_FAILURES):
        assert browser.post("/login", data={"token": "guess"}).status_code == 401
    answer = browser.post("/login", data={"token": secret})
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "60")
    assert len(refusals(small)) == MOST_FAILURES
    clock.now += timedelta(seconds=61)
    assert browser.post("/login", data={"token": secret}).status_code == 303


def test_failures_of_one_address_do_not_keep_others_out(small: Federation) -> None:
    app = create_app(small.home, small.store, clock=Clock())
    browser = client_of(app)
    for _ in range(MOST_FAILURES + 1):
        browser.post("/login", data={"token": "x"}, headers={"x-fedcmr-address": "192.0.2.7"})
    other = {"x-fedcmr-address": "192.0.2.8"}
    answer = browser.post("/login", data={"token": token(small)}, headers=other)
    assert answer.status_code == 303


def test_sessions_and_addresses_are_bounded() -> None:
    sessions = Sessions(most=2)
    ids = [sessions.open(Viewer(name, "token"), NOW) for name in "abc"]
    assert len(set(ids)) == 3
    found = [sessions.find(each, NOW) for each in ids]
    assert [each and each.name for each in found] == [None, "b", "c"]
    failures = Failures(most=1)
    for number in range(2000):
        failures.add(f"{number}", NOW)
    assert not failures.full("0", NOW)
    assert failures.full("1999", NOW)


# The authoriser


def test_the_authoriser_is_asked_without_a_login(small: Federation) -> None:
    """It looks at the certificate itself; the gateway lets nobody ask it from outside."""
    assert client(small).get("/_authorise").status_code == 403
    assert client(small).get("/_authorise/").status_code == 401
