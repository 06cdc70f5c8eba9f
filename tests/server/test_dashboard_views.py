"""What the dashboard's pages are made of: from rows to words, without a database."""

import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from dashboard_federation import NOW, job_spec, loss, refusal
from hypothesis import given
from hypothesis import strategies as st

from fedcmr_server import words
from fedcmr_server.dashboard import charts
from fedcmr_server.dashboard.charts import chart
from fedcmr_server.dashboard.history import History
from fedcmr_server.dashboard.job_view import MOST_ROWS, TONES, JobRows, job_card, job_page
from fedcmr_server.dashboard.views import (
    MOST_EVENTS,
    OFFLINE_AFTER,
    OverviewRows,
    health,
    member_lines,
    overview,
    tone,
    validity,
)
from fedcmr_server.job_states import TRANSITIONS, JobState
from fedcmr_server.losses import Loss
from fedcmr_server.store.tables import CertificateRow, EventRow, JobRow, MemberRow, RoundRow
from fedcmr_shared.privacy.job_claim import claim_of
from fedcmr_shared.schemas.job import JobSpec, ResourceSpec
from fedcmr_shared.schemas.privacy import EvaluationSpec

SPEC = job_spec("cardiomm", rounds=3)


def event(name: str, number: int = 1, **content: Any) -> EventRow:
    at = NOW - timedelta(hours=1) + timedelta(seconds=number)
    return EventRow(job=SPEC.sha256, number=number, at=at, name=name, content=content)


def job_row(job: JobSpec = SPEC, state: JobState = "running", **changes: Any) -> JobRow:
    values: dict[str, Any] = {
        "id": job.sha256,
        "name": job.name,
        "spec": job.model_dump_json(),
        "authorisation": None,
        "roster": None,
        "roster_sha256": None,
        "submitted_at": NOW - timedelta(hours=2),
        "changed_at": NOW - timedelta(hours=1),
        "state": state,
        "run": "8412" if state == "running" else None,
    }
    return JobRow(**{**values, **changes})


def round_row(number: int, state: Any = "committed") -> RoundRow:
    at = NOW - timedelta(minutes=3)
    return RoundRow(
        job=SPEC.sha256, number=number, state=state, started_at=at, model_sha256="ab" * 32
    )


def member_row(**changes: Any) -> MemberRow:
    values = {
        "name": "alder",
        "role": "site",
        "identity": "ab" * 32,
        "node_key": "ssh-x",
        "state": "active",
        "since": NOW - timedelta(days=9),
        "seen_at": NOW,
        "condition": "ready",
    }
    row = MemberRow(**{**values, **changes})
    row.id = 1
    return row


def certificate_row(days: float, state: Any = "active") -> CertificateRow:
    return CertificateRow(
        serial=f"{days:g}",
        member_id=1,
        fingerprint=f"{days:g}",
        not_before=NOW - timedelta(days=1),
        not_after=NOW + timedelta(days=days),
        state=state,
    )


def attempt(
    phase: str, number: int, count: int, outcome: str = "opened", **content: Any
) -> list[EventRow]:
    place = {"phase": phase, "round": number, "attempt": count}
    values = {"outcome": outcome, "losses": [], "bytes_up": 5, "bytes_down": 7, **content}
    return [event("attempt_started", **place), event("attempt", **place, **values)]


# Words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.24, "0.2 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (75, "1 min 15 s"),
        (3600, "1 h"),
        (7290, "2 h 1 min"),
        (90_000, "1 d 1 h"),
        (math.nan, "–"),
    ],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert words.seconds_text(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (4_180_000, "4.18 MB"), (999_600, "1 MB")],
)
def test_sizes_have_decimal_units(count: int, text: str) -> None:
    assert words.bytes_text(count) == text
    assert words.bytes_text(count * 10**9).split()[1] in ("B", "GB", "TB")


def test_times_say_how_long_ago() -> None:
    assert words.ago(NOW - timedelta(seconds=2), NOW) == "just now"
    assert words.ago(NOW - timedelta(seconds=60), NOW) == "1 minute ago"
    assert words.ago(NOW + timedelta(days=3), NOW) == "in 3 days"


# Charts


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30))
def test_every_value_lies_inside_the_frame(values: list[float]) -> None:
    drawn = chart("k", "PSNR", "dB", {"PSNR": list(enumerate(values, start=1))})
    assert drawn is not None
    (curve,) = drawn.curves
    assert len(curve.marks) == len(values)
    for mark in curve.marks:
        assert charts.LEFT <= mark.x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP - 0.1 <= mark.y <= charts.HEIGHT - charts.BOTTOM + 0.1
    labels = [tick.label for tick in drawn.y_ticks]
    assert len(set(labels)) == len(labels)


def test_a_value_that_is_not_finite_is_a_gap() -> None:
    drawn = chart("k", "PSNR", "dB", {"PSNR": [(1, 1.0), (2, 2.0), (3, math.nan), (4, 1.0)]})
    assert drawn is not None
    assert drawn.curves[0].path.count("M") == 2
    assert len(drawn.curves[0].marks) == 3
    assert drawn.summary == "PSNR: 1 dB in round 4, 1 dB in round 1."
    assert chart("k", "PSNR", "dB", {"PSNR": [(1, math.nan)]}) is None


def test_many_rounds_are_marked_at_the_end_alone() -> None:
    drawn = chart("k", "t", "", {"a": [(n, n / 10) for n in range(1, 400)], "b": []})
    assert drawn is not None
    assert [len(curve.marks) for curve in drawn.curves] == [1, 0]
    assert len(drawn.x_ticks) <= 6


# History


def test_attempts_have_their_outcome_survivors_and_losses() -> None:
    losses = [refusal("birch", "keys", "paused"), loss("cedar", "update", "silent")]
    ended = attempt("train", 1, 1, "ended", losses=losses)
    opened = attempt("train", 1, 2, survivors=["alder", "dogwood"], sites=4, losses=losses[1:])
    place = {"phase": "train", "round": 2, "attempt": 1}
    rest = [event("attempt_started", **place), event("unmask_asked", **place)]
    history = History.of([*ended, *opened, *rest])
    assert [a.outcome for a in history.attempts] == ["ended", "opened", "under way"]
    assert history.attempts[0].losses == (
        Loss("birch", "keys", "paused"),
        Loss("cedar", "update", "silent"),
    )
    assert history.attempts[1].survivors == 2
    assert history.attempts[2].unmask_asked
    # cedar is lost to round 1 once, although two attempts went on without it.
    assert history.drop_outs == 2
    counts = [(step, each.code, count) for step, each, count in history.loss_counts()]
    assert counts == [("update", "silent", 2), ("keys", "paused", 1)]
    assert history.bytes == (10, 14)


@pytest.mark.parametrize(
    ("later", "outcomes"),
    [
        ([], ["under way"]),
        ([event("unmask_asked", phase="train", round=1, attempt=1)], ["under way"]),
        ([event("pause"), event("authorise")], ["under way"]),
        (attempt("train", 1, 2), ["cut off", "opened"]),
        (attempt("train", 1, 2)[:1], ["cut off", "under way"]),
        ([event("round", round=1)], ["cut off"]),
        ([event("run_lost")], ["cut off"]),
        ([event("cancel")], ["cut off"]),
        # Shares were asked for: the next run closes the round.
        ([event("run_lost"), *attempt("train", 1, 1, "closed")[1:]], ["closed"]),
    ],
)
def test_an_attempt_that_nobody_works_on_is_cut_off(
    later: list[EventRow], outcomes: list[str]
) -> None:
    history = History.of([*attempt("train", 1, 1)[:1], *later])
    assert [a.outcome for a in history.attempts] == outcomes


def test_a_cut_off_attempt_shows_as_such() -> None:
    events = [*attempt("train", 1, 1)[:1], event("run_lost"), *attempt("train", 1, 2)[:1]]
    page = job_page(JobRows(job_row(), [round_row(1, "started")], events), NOW)
    lines = [(line.number, line.outcome, line.tone, line.bytes_up) for line in page.attempts]
    assert lines == [(2, "under way", "live", "–"), (1, "cut off", "warn", "–")]
    assert {figure.name: figure.value for figure in page.outcomes} == {
        "opened": "0",
        "ended": "0",
        "closed": "0",
        "cut off": "1",
        "under way": "1",
    }
    assert page.card.doing == "Round 1, training: attempt 2 began 59 minutes ago"


def test_only_public_codes_of_a_loss_are_kept() -> None:
    secret = loss("birch", "keys", "refused", "patient 17 has no consent: so no")
    (found,) = History.of(attempt("train", 1, 1, losses=[secret])).attempts[0].losses
    assert found.code == "refused"
    assert "patient" not in repr(History.of(attempt("train", 1, 1, losses=[secret])))


def test_odd_events_count_as_nothing() -> None:
    odd = [event(name) for name in ("round", "evaluation", "attempt", "what-is-this")]
    odd.append(event("attempt", losses="none", survivors=None, bytes_up=math.inf, seconds="x"))
    history = History.of(odd)
    assert history.bytes == (0, 0)
    job_page(JobRows(job_row(), [], odd), NOW)


def test_energy_is_the_most_that_the_job_declares_for_a_site() -> None:
    job = SPEC.model_copy(update={"resources": ResourceSpec(energy_kwh=2.5)})
    page = job_page(JobRows(job_row(job), [], []), NOW)
    assert next(each.value for each in page.totals if each.name == "energy") == "≤ 2.5 kWh"


def test_energy_of_all_sites_and_passed_gates_are_shown_where_a_job_has_them() -> None:
    events = [
        event("evaluation", round=1, sites=3, psnr=30.0, energy_kwh=0.3),
        event("evaluation", round=2, sites=3, gates_passed=2, energy_kwh=1.25),
    ]
    figures = {each.name: each for each in job_page(JobRows(job_row(), [], events), NOW).totals}
    assert figures["energy"].value == "1.2 kWh"
    assert figures["energy"].note == "all sites together, rounded up"
    assert figures["memorisation gates"].value == "2 of 3"
    scored = job_page(JobRows(job_row(), [], events[:1]), NOW)
    assert "memorisation gates" not in {each.name for each in scored.totals}


# Jobs


def test_every_state_has_a_tone() -> None:
    assert set(TONES) == {state for state, _ in TRANSITIONS} | set(TRANSITIONS.values())


def test_a_card_counts_rounds_that_are_over() -> None:
    rounds = [round_row(0), round_row(1), round_row(2, "closed"), round_row(3, "started")]
    card = job_card(job_row(), rounds, History.of([]), NOW)
    assert (card.done, card.rounds, card.score, card.drop_outs) == (2, 3, "–", "0")
    assert card.doing == "Round 3 began 3 minutes ago"


@pytest.mark.parametrize(
    ("changes", "events", "doing"),
    [
        ({"state": "submitted"}, [], "Waits for its first run"),
        ({"run": None}, [], "Waits for its next run"),
        ({"run": None, "losses": 2}, [], "Waits for its next run after 2 lost runs"),
        ({}, [], "A run is at work"),
        (
            {},
            attempt("train", 1, 1)[:1],
            "Round 1, training: attempt 1 began 59 minutes ago",
        ),
        (
            {},
            [
                *attempt("evaluate", 2, 3)[:1],
                event("unmask_asked", phase="evaluate", round=2, attempt=3),
            ],
            "Round 2, scoring: attempt 3 began 59 minutes ago, opening the sum",
        ),
        # A later attempt is over: the one that a crash cut off is not under way any more.
        ({}, [*attempt("train", 1, 1)[:1], *attempt("train", 1, 2)], "A run is at work"),
        ({"state": "finished"}, attempt("train", 1, 1)[:1], ""),
    ],
)
def test_a_card_says_what_happens_now(
    changes: dict[str, Any], events: list[EventRow], doing: str
) -> None:
    assert job_card(job_row(**changes), [], History.of(events), NOW).doing == doing


def test_the_newest_finite_score_is_shown() -> None:
    events = [
        event("evaluation", round=1, psnr=30.0),
        event("evaluation", round=2, psnr=math.nan, ssim=0.9),
        event("evaluation", round=3, closed=True),
    ]
    assert job_card(job_row(), [], History.of(events), NOW).score == "SSIM 0.9000 after round 2"


def test_drop_outs_of_a_job_in_the_open_are_not_known() -> None:
    spec = job_spec("open", aggregation="plain_with_local_dp")
    assert job_card(job_row(spec), [], History.of([]), NOW).drop_outs == "–"
    assert not job_page(JobRows(job_row(spec), [], []), NOW).secure


def test_the_claim_is_that_of_the_published_numbers() -> None:
    view = job_page(JobRows(job_row(), [], []), NOW).claim
    claim = claim_of(SPEC)
    assert not view.problem
    assert float(view.figures[0].value) == pytest.approx(claim.epsilon, abs=0.01)
    assert float(view.figures[0].value) >= claim.epsilon
    assert view.figures[1].value == "1e-5"
    assert "the coordinator does not see" in " ".join(view.sentences)


def test_the_claim_names_what_no_figure_covers() -> None:
    spec = job_spec("bare")
    bare = spec.privacy.evaluation.model_copy(update={"noise_multiplier": None})
    privacy = spec.privacy.model_copy(update={"evaluation": bare})
    view = job_page(JobRows(job_row(spec.model_copy(update={"privacy": privacy})), [], []), NOW)
    assert [each.value for each in view.claim.figures][-1] == "none"
    assert "Results of scoring leave without noise" in view.claim.sentences[-1]
    assert "without noise" in view.score_note
    none = job_page(JobRows(job_row(spec.model_copy(update={"privacy": None})), [], []), NOW)
    assert "no privacy" in none.claim.problem


def test_a_job_without_scores_says_so() -> None:
    spec = job_spec("bare")
    for evaluation, note in (
        (EvaluationSpec(noise_multiplier=None, metrics=("memorisation",)), "No patient is scored"),
        (EvaluationSpec(rounds="none"), "asks for no scores"),
        (EvaluationSpec(), "with noise"),
    ):
        privacy = spec.privacy.model_copy(update={"evaluation": evaluation})
        job = spec.model_copy(update={"privacy": privacy})
        found = job_page(JobRows(job_row(job), [], []), NOW).score_note
        assert note in found
        assert ("Means over" in found) is (note == "with noise")


def test_a_job_that_cannot_be_read_has_a_page() -> None:
    page = job_page(JobRows(job_row(spec='{"from": "the future"}'), [round_row(1)], []), NOW)
    assert "cannot be read" in page.claim.problem
    assert page.card.rounds == 0


def test_rounds_put_together_what_events_say() -> None:
    events = [
        *attempt("train", 1, 1, "ended", losses=[loss("birch", "shares", "silent")]),
        *attempt("train", 1, 2, losses=[loss("birch", "keys", "silent")]),
        event("round", round=1, sites=3, seconds=75.0, bytes_up=2_000_000, bytes_down=3000),
        event("evaluation", round=1, sites=4, psnr=31.25),
    ]
    page = job_page(JobRows(job_row(), [round_row(0), round_row(1)], events), NOW)
    (line,) = page.rounds
    assert (line.sites, line.attempts, line.lost) == ("3", "2", "1")
    assert (line.seconds, line.bytes_up, line.bytes_down) == ("1 min 15 s", "2 MB", "3 kB")
    assert (page.scores, line.scores) == (("PSNR (dB)",), ("31.25",))
    assert [each.value for each in page.outcomes] == ["1", "1", "0"]


def test_long_tables_show_the_newest() -> None:
    count = MOST_ROWS + 5
    events = [each for n in range(count) for each in attempt("train", n + 1, 1)]
    rounds = [round_row(n + 1) for n in range(count)]
    page = job_page(JobRows(job_row(), rounds, events), NOW)
    assert (page.rounds[0].number, page.attempts[0].round) == (count, count)
    assert (len(page.rounds), page.rounds_left_out, page.attempts_left_out) == (MOST_ROWS, 5, 5)


def test_no_figure_of_a_single_site_is_shown() -> None:
    """Even if an event held one: pages are made of what they name."""
    leak = {"losses_by_site": {"alder": 0.123456}, "patients": {"alder": 777_777}}
    events = [
        *attempt("train", 1, 1, **leak),
        event("round", round=1, train_loss=0.123456, **leak),
        event("evaluation", round=1, psnr=30.0, **leak),
    ]
    shown = repr(job_page(JobRows(job_row(), [round_row(1)], events), NOW))
    assert "0.123456" not in shown
    assert "777" not in shown


# Members


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, "ready"),
        ({"condition": None}, "ready"),
        ({"condition": "paused"}, "paused"),
        ({"condition": "attention"}, "needs its operator"),
        ({"condition": "<b>"}, "unknown"),
        ({"seen_at": NOW - OFFLINE_AFTER}, "ready"),
        ({"seen_at": NOW - OFFLINE_AFTER - timedelta(seconds=1)}, "offline"),
        ({"seen_at": None}, "not seen yet"),
        ({"state": "revoked"}, "revoked"),
        ({"role": "auditor", "seen_at": None}, "active"),
    ],
)
def test_health_is_what_was_said_last_and_when(changes: dict[str, Any], word: str) -> None:
    assert health(member_row(**changes), NOW).word == word


@pytest.mark.parametrize(
    ("rows", "text", "tone"),
    [
        ([], "none", "bad"),
        ([certificate_row(200, "revoked")], "none", "bad"),
        ([certificate_row(30)], "30 days left", "good"),
        ([certificate_row(29.9)], "29 days left", "warn"),
        ([certificate_row(0.5)], "0 days left", "warn"),
        ([certificate_row(-2)], "expired 2 days ago", "bad"),
        ([certificate_row(5), certificate_row(300)], "300 days left", "good"),
    ],
)
def test_certificates_are_warned_of_below_30_days(
    rows: list[CertificateRow], text: str, tone: str
) -> None:
    found = validity(rows, NOW)
    assert (found.text, found.tone) == (text, tone)


def test_a_member_has_its_certificates_the_newest_first() -> None:
    rows = [certificate_row(-3), certificate_row(80), certificate_row(90, "replaced")]
    (line,) = member_lines([member_row()], rows, NOW)
    assert [each.state for each in line.certificates] == ["replaced", "active", "expired"]
    assert line.identity.startswith("abab abab")


def rows(**changes: Any) -> OverviewRows:
    values: dict[str, Any] = {
        "jobs": [job_row()],
        "older": [],
        "rounds": {},
        "events": {},
        "members": [member_row()],
        "certificates": [certificate_row(90)],
        "contradicting": [],
    }
    return OverviewRows(**{**values, **changes})


def test_nothing_needs_attention_when_all_is_well() -> None:
    page = overview(rows(), NOW)
    assert page.warnings == ()
    assert page.live
    assert [each.value for each in page.figures] == ["1", "1 of 1", "90 days"]


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"jobs": [job_row(state="failed", reason="no site")]}, "failed: no site"),
        ({"jobs": [job_row(reason="SuperLink restarted")]}, "lost its last run"),
        ({"certificates": [certificate_row(12)]}, "Certificate of alder: 12 days left"),
        ({"certificates": []}, "Certificate of alder: none"),
        ({"members": [member_row(condition="paused")]}, "alder (paused)"),
        ({"contradicting": ["alder"]}, "Ledger of alder: the site signed two histories"),
        ({"members": [member_row(seen_at=NOW - timedelta(hours=3))]}, "alder (offline)"),
    ],
)
def test_what_needs_attention_is_said(changes: dict[str, Any], warning: str) -> None:
    (found,) = overview(rows(**changes), NOW).warnings
    assert warning in found


def test_a_paused_site_matters_while_a_job_is_under_way_only() -> None:
    changes = {"members": [member_row(condition="paused")], "jobs": [job_row(state="finished")]}
    page = overview(rows(**changes), NOW)
    assert page.warnings == ()
    assert not page.live


def test_an_empty_federation_has_an_overview() -> None:
    page = overview(rows(jobs=[], members=[], certificates=[]), NOW)
    assert [each.value for each in page.figures] == ["0", "0 of 0", "–"]
    assert page.events == ()


def test_the_newest_events_come_first_and_steps_are_left_out() -> None:
    events = [event("round", number, round=number, sites=3) for number in range(1, 40)]
    events.insert(3, event("unmask_asked", 4, phase="train", round=4, attempt=1))
    events.append(event("attempt", 40, phase="train", round=40, attempt=1, outcome="opened"))
    page = overview(rows(events={SPEC.sha256: events}), NOW)
    assert len(page.events) == MOST_EVENTS
    assert page.events[0].text == "round 39 committed with 3 sites"
    assert page.events[0].at > page.events[1].at
    assert not any("unmask" in each.text or "opened" in each.text for each in page.events)


@pytest.mark.parametrize(
    ("name", "content", "drawn"),
    [
        ("fail", {}, "bad"),
        ("round", {"sites": 3}, "good"),
        ("round", {"closed": True}, "warn"),
        ("attempt", {"outcome": "ended"}, "warn"),
        ("attempt", {"outcome": "closed"}, "bad"),
        ("something_new", {}, "quiet"),
    ],
)
def test_events_are_drawn_by_how_well_they_went(
    name: str, content: dict[str, Any], drawn: str
) -> None:
    assert tone(name, content) == drawn


# Colours


def luminance(colour: str) -> float:
    digits = colour.lstrip("#")
    digits = "".join(d * 2 for d in digits) if len(digits) == 3 else digits
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_colours_have_the_contrast_that_wcag_asks_for(theme: int) -> None:
    import re

    import fedcmr_server.dashboard as package

    sheet = (Path(package.__file__).parent / "static" / "style.css").read_text()
    colours = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]+);", sheet.split(":root {")[theme + 1]))
    texts = [("ink", "page"), ("ink", "card"), ("soft", "page"), ("soft", "card"), ("ink", "tint")]
    texts += [("strong", "card"), ("strong", "tint"), ("strong", "page"), ("card", "strong")]
    texts += [(tone, f"{tone}-tint") for tone in ("good", "live", "wait", "bad", "quiet")]
    texts += [("ink", "bad-tint")]
    for text, ground in texts:
        assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for mark in ("curve-1", "curve-2", "edge"):
        assert contrast(colours[mark], colours["card"]) >= 3, mark
