"""Submitting, pausing, resuming and cancelling jobs: what is refused, and what is signed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from job_parties import JOB, SITES, add_roster, carry, model_state, new_home

from fedcmr_server.checkpoint_files import CheckpointFiles
from fedcmr_server.folder_lock import locked
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_control import (
    ENDED,
    OUTLOOK,
    VALID_DAYS,
    authorise,
    cancel,
    demands,
    follow,
    has_old_roster,
    pause,
    resume,
    spec_of,
    submit,
)
from fedcmr_server.job_run import StoredRun
from fedcmr_server.job_states import TRANSITIONS, TransitionRefused
from fedcmr_server.store import Events, Jobs, Releases, Rounds, Store
from fedcmr_server.store.tables import JobRow, ReleaseRow
from fedcmr_shared.errors import ConfigurationError, FederationError, JobRefused, ModelError
from fedcmr_shared.models.bundle import save_bundle, state_sha256
from fedcmr_shared.models.card import PURPOSES
from fedcmr_shared.schemas.job import CohortQuery, JobSpec, ModelSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import DistributedNoise, EvaluationSpec, PrivacySpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation, require_signed

NOW = datetime.now(UTC)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CoordinatorHome:
    return new_home(tmp_path_factory.mktemp("home") / "centre")


@pytest.fixture
def store(home: CoordinatorHome) -> Iterator[Store]:
    for left in home.folder.glob("coordinator.sqlite*"):
        left.unlink()
    with home.store() as store:
        yield store


@pytest.fixture
def federation(home: CoordinatorHome, store: Store) -> Store:
    add_roster(home, store)
    return store


def changed(**changes: Any) -> JobSpec:
    return JobSpec.model_validate({**JOB.model_dump(), **changes})


def private(**changes: Any) -> PrivacySpec:
    assert JOB.privacy is not None
    return PrivacySpec.model_validate({**JOB.privacy.model_dump(), **changes})


def authorisation(row: JobRow) -> JobAuthorisation:
    assert row.authorisation is not None
    return JobAuthorisation.model_validate_json(row.authorisation)


GATE = EvaluationSpec(noise_multiplier=None, metrics=("memorisation",))


class TestSubmit:
    def test_a_job_is_stored_as_sites_will_check_it(
        self, home: CoordinatorHome, federation: Store
    ) -> None:
        now = datetime.now(UTC)
        row = Jobs(federation).get(submit(home, federation, JOB).id)
        assert (row.id, row.state) == (JOB.sha256, "submitted")
        assert spec_of(row) == JOB
        pinned = (home.federation_sha256, home.identity().public_key)
        for moment in (now - timedelta(minutes=4), now + timedelta(days=VALID_DAYS - 1)):
            require_signed(JOB, authorisation(row), pinned, moment)
        with pytest.raises(JobRefused, match="valid from"):
            require_signed(JOB, authorisation(row), pinned, now + timedelta(days=VALID_DAYS + 1))
        assert not has_old_roster(federation, row)
        roster = StoredRun(federation, home.jobs, row.id, None).roster
        assert roster.names == SITES
        assert Jobs(federation).due() == [row]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"coordinator": "other"}, "coordinator is other, and the sites know .* as centre"),
            ({"privacy": None}, "privacy is null, which only simulations allow"),
            ({"minimum_sites": 5}, "minimum_sites is 5, and the roster has 4 sites"),
            ({"site_sizes": {"elm": "large"}}, "site_sizes names elm, which is not on the roster"),
            ({"privacy": private(noise_multiplier=1e-9)}, "no epsilon bounds"),
            ({"privacy": private(delta=1e-13)}, "delta is 1e-13"),
            ({"model": ModelSpec(name="cpgg")}, "psnr is none of cpgg's: use memorisation"),
            (
                {
                    "model": ModelSpec(name="cpgg"),
                    "privacy": private(evaluation=EvaluationSpec(rounds="none")),
                },
                "cpgg can be released only when the sites' gates find no copies",
            ),
            (
                {"privacy": private(evaluation=GATE)},
                "memorisation is none of cardiomm's: use psnr, ssim, nmse",
            ),
        ],
    )
    def test_refusals(
        self, changes: dict[str, Any], message: str, home: CoordinatorHome, federation: Store
    ) -> None:
        with pytest.raises(ConfigurationError, match=message):
            submit(home, federation, changed(**changes))
        assert Jobs(federation).all() == []

    def test_without_a_roster(self, home: CoordinatorHome, store: Store) -> None:
        with pytest.raises(ConfigurationError, match="no roster yet"):
            submit(home, store, JOB)

    @pytest.mark.parametrize("days", [-1, 0, 366])
    def test_days_out_of_range(self, days: int, home: CoordinatorHome, federation: Store) -> None:
        with pytest.raises(ConfigurationError, match=f"valid days are {days}"):
            submit(home, federation, JOB, valid_days=days)
        # The longest period that is signed is one that sites accept.
        longest = authorise(home, JOB, 365)
        pinned = (home.federation_sha256, home.identity().public_key)
        require_signed(JOB, longest, pinned, datetime.now(UTC))

    def test_the_same_job_twice(self, home: CoordinatorHome, federation: Store) -> None:
        submit(home, federation, JOB)
        with pytest.raises(FederationError, match="submitted before: change its name or seed"):
            submit(home, federation, JOB)
        for other in (changed(name="heart-2"), changed(seed=1)):
            submit(home, federation, other)
        assert len(Jobs(federation).all()) == 3

    def test_of_two_at_once_one_is_taken(self, home: CoordinatorHome, federation: Store) -> None:
        outcomes: list[str] = []

        def try_it() -> None:
            with home.store() as own:
                try:
                    outcomes.append(submit(home, own, JOB).state)
                except FederationError as error:
                    outcomes.append(str(error))

        with locked(home.jobs):  # so that both have come as far as they can
            threads = [threading.Thread(target=try_it) for _ in range(2)]
            for thread in threads:
                thread.start()
        for thread in threads:
            thread.join(60)
        first, second = sorted(outcomes)
        assert "submitted before" in first
        assert second == "submitted"

    def test_a_changed_row_is_noticed(self, home: CoordinatorHome, federation: Store) -> None:
        row = submit(home, federation, JOB)
        row.spec = changed(rounds=9).model_dump_json()
        with pytest.raises(FederationError, match="changed in the database"):
            spec_of(row)
        row.spec = "{"
        with pytest.raises(FederationError, match="cannot be read"):
            spec_of(row)


class TestStart:
    def bundle(self, path: Path) -> Path:
        save_bundle(path, model_state(9), JOB.model, {"origin": "simulated"})
        return path

    def test_a_job_begins_with_the_weights_of_a_bundle(
        self, home: CoordinatorHome, federation: Store, tmp_path: Path
    ) -> None:
        job = changed(seed=100)
        row = submit(home, federation, job, start_from=self.bundle(tmp_path / "b"))
        assert [r.model_sha256 for r in Rounds(federation).of(row.id)] == [
            state_sha256(model_state(9))
        ]
        Jobs(federation).change(row.id, "start", run="1")
        start = StoredRun(federation, home.jobs, row.id, "1").latest()
        assert start is not None
        assert all(torch.equal(t, start.state[n]) for n, t in model_state(9).items())
        notes = Events(federation).as_values(row.id)[0]
        assert notes == {"event": "submit", "start": {"origin": "simulated"}}

    def test_low_rank_updates_begin_with_zero(
        self, home: CoordinatorHome, federation: Store, tmp_path: Path
    ) -> None:
        job = changed(
            seed=101,
            model=JOB.model.model_copy(update={"lora_rank": 2}),
            training=TrainingSpec(part="lora"),
        )
        row = submit(home, federation, job, start_from=self.bundle(tmp_path / "b"))
        first = StoredRun(federation, home.jobs, row.id, None).folder / "round-000.safetensors"
        # The other way round: the updates, which are zero, become part of the plain weights.
        plain = submit(home, federation, changed(seed=102), start_from=first)
        found = Rounds(federation).latest(plain.id)
        assert found is not None
        assert found.model_sha256 == state_sha256(model_state(9))

    def test_weights_that_do_not_fit(
        self, home: CoordinatorHome, federation: Store, tmp_path: Path
    ) -> None:
        job = changed(model=JOB.model.model_copy(update={"variant": "SM"}))
        for path, message in ((self.bundle(tmp_path / "b"), "do not fit"), (tmp_path, "not exist")):
            with pytest.raises(ModelError, match=message):
                submit(home, federation, job, start_from=path)
        assert Jobs(federation).all() == []

    def test_what_no_gate_let_pass_is_no_start(
        self,
        home: CoordinatorHome,
        federation: Store,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The gates of the next job search for other patients."""
        gated = replace(PURPOSES["cardiomm"], gates=("memorisation",))
        first = submit(home, federation, changed(seed=110), start_from=self.bundle(tmp_path / "b"))
        carry(home, federation, first.id, closed=(1,))
        made = CheckpointFiles(home.jobs / first.id).path(2)
        copied = tmp_path / "copied"
        copied.write_bytes(made.read_bytes())
        # Reconstructors have no gates; round 1 was closed, its model is still the start.
        submit(home, federation, changed(seed=111), start_from=copied)
        monkeypatch.setitem(PURPOSES, "cardiomm", gated)  # type: ignore[arg-type]  # it is a dict
        submit(home, federation, changed(seed=112), start_from=self.bundle(tmp_path / "b"))
        before = len(Jobs(federation).all())
        with pytest.raises(FederationError, match=r"made in round 2 of job heart .*release that"):
            submit(home, federation, changed(seed=113), start_from=copied)
        assert len(Jobs(federation).all()) == before
        released = {"path": "a.zip", "sha256": "0" * 64, "size": 1, "signature": "", "card": ""}
        Releases(federation).add(ReleaseRow(job=first.id, at=NOW, **released))
        submit(home, federation, changed(seed=113), start_from=copied)

    def test_a_second_submission_leaves_the_first_start_alone(
        self, home: CoordinatorHome, federation: Store, tmp_path: Path
    ) -> None:
        job = changed(seed=103)
        row = submit(home, federation, job, start_from=self.bundle(tmp_path / "b"))
        save_bundle(tmp_path / "other", model_state(10), JOB.model, {})
        with pytest.raises(FederationError, match="submitted before"):
            submit(home, federation, job, start_from=tmp_path / "other")
        Jobs(federation).change(row.id, "start", run="1")
        assert StoredRun(federation, home.jobs, row.id, "1").latest() is not None


class TestLife:
    def test_pause_and_resume(self, home: CoordinatorHome, federation: Store) -> None:
        job = submit(home, federation, JOB).id
        assert pause(federation, job).state == "paused"
        assert resume(home, federation, job) == (Jobs(federation).get(job), False)
        Jobs(federation).change(job, "start", run="1")
        assert pause(federation, job).state == "pausing"
        assert cancel(federation, job, "a mistake").reason == "a mistake"
        for change in (pause, cancel):
            with pytest.raises(TransitionRefused, match="is cancelled takes no"):
                change(federation, job)

    def test_a_refused_resume_signs_nothing(self, home: CoordinatorHome, federation: Store) -> None:
        row = submit(home, federation, JOB)
        with pytest.raises(TransitionRefused, match="is submitted takes no `resume`"):
            resume(home, federation, row.id, now=NOW + timedelta(days=100))
        assert Jobs(federation).get(row.id).authorisation == row.authorisation

    @pytest.mark.parametrize(("days", "anew"), [(80, False), (84, True), (200, True)])
    def test_resume_signs_anew_what_ends_soon(
        self, days: int, anew: bool, home: CoordinatorHome, federation: Store
    ) -> None:
        job = submit(home, federation, JOB, now=NOW).id
        pause(federation, job)
        later = NOW + timedelta(days=days)
        row, signed = resume(home, federation, job, now=later)
        assert (row.state, signed) == ("running", anew)
        pinned = (home.federation_sha256, home.identity().public_key)
        require_signed(JOB, authorisation(row), pinned, later)
        names = [event.name for event in Events(federation).of(job)]
        assert names == ["submit", "pause", *(["authorise"] if anew else []), "resume"]

    def test_an_old_roster_is_noticed(self, home: CoordinatorHome, federation: Store) -> None:
        row = submit(home, federation, JOB)
        assert not has_old_roster(federation, row)
        add_roster(home, federation, SITES[:3])
        assert has_old_roster(federation, row)

    def test_every_state_has_an_outlook(self) -> None:
        states = {state for state, _ in TRANSITIONS} | set(TRANSITIONS.values())
        assert set(OUTLOOK) == states
        assert set(ENDED) == {"finished", "failed", "cancelled"}


class TestDemands:
    def demanded(self, job: JobSpec) -> dict[str, str]:
        return {demand.policy: demand.value for demand in demands(job)}

    def test_what_every_policy_must_allow(self) -> None:
        assert self.demanded(JOB) == {
            "coordinators": "centre",
            "jobs": "heart",
            "models": "cardiomm/tiny",
            "aggregation": "secure_sum",
            "minimum_sites": "at most 3",
            "max_epsilon_per_job": "at least 3.49 at delta 1e-5, more at another order",
            "max_delta": "at least 1e-05",
            "max_device_hours": "at least 24",
            "max_energy_kwh": "at least 10",
            "noise_multiplier": "at most 2",
        }

    def test_what_only_some_jobs_ask_for(self) -> None:
        evaluation = EvaluationSpec(noise_multiplier=None)
        shared = private(distributed=DistributedNoise(unseen_sites=0), evaluation=evaluation)
        job = changed(
            privacy=shared,
            training=TrainingSpec(local_steps=1, optimiser="sgd"),
            cohort=CohortQuery(modalities=("cine",), vendors=("Siemens",)),
        )
        found = self.demanded(job)
        assert found["evaluation.allow_unnoised"] == "true"
        assert found["allow_distributed_noise"] == "true"
        assert found["cohort.attributes"] == "modalities, vendors"

    def test_a_generator_needs_its_gate_and_no_other_sums_without_noise(self) -> None:
        found = self.demanded(changed(privacy=private(evaluation=GATE)))
        assert found["evaluation.metrics"] == "with memorisation"
        assert "evaluation.allow_unnoised" not in found
        assert found["noise_multiplier"] == "at most 2"

    @pytest.mark.parametrize("evaluation", [EvaluationSpec(noise_multiplier=None), GATE])
    def test_they_are_fields_of_a_policy(self, evaluation: EvaluationSpec) -> None:
        from fedcmr_shared.schemas.policy import SitePolicy

        job = changed(privacy=private(evaluation=evaluation), cohort=CohortQuery(views=("x",)))
        for name in self.demanded(job):
            model: Any = SitePolicy
            for part in name.split("."):
                field = model.model_fields[part]
                model = field.annotation


class TestFollow:
    def test_tells_everything_once_and_ends(self, home: CoordinatorHome, federation: Store) -> None:
        job = submit(home, federation, JOB).id
        pauses: list[float] = []

        def sleep(seconds: float) -> None:
            # What happens while the follower looks away.
            pauses.append(seconds)
            if len(pauses) == 2:
                carry(home, federation, job, closed=(1,))

        seen = list(follow(federation, job, poll_s=0.5, sleep=sleep))
        assert pauses == [0.5, 0.5]
        assert [row.state for row, _ in seen] == ["submitted", "finished"]
        numbers = [event.number for _, events in seen for event in events]
        assert numbers == list(range(1, len(Events(federation).of(job)) + 1))

    @pytest.mark.parametrize("event", ["fail", "cancel"])
    def test_ends_with_every_end(
        self, event: Any, home: CoordinatorHome, federation: Store
    ) -> None:
        job = submit(home, federation, JOB).id
        Jobs(federation).change(job, event)
        assert len(list(follow(federation, job, sleep=pytest.fail))) == 1

    def test_unknown_job(self, federation: Store) -> None:
        with pytest.raises(FederationError, match="no job"):
            next(follow(federation, "0" * 64))


def test_a_missing_folder_cannot_be_locked(tmp_path: Path) -> None:
    with pytest.raises(FederationError, match="cannot be opened"), locked(tmp_path / "none"):
        pass
