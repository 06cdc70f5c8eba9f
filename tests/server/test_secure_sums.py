"""Secure sums over a link that loses answers, with sites that run the real protocol."""

import gc
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from secure_federation import Change, Place, ProtocolLink, ProtocolSite, federation
from torch import Tensor

from fedcmr_server.answers import mean_update
from fedcmr_server.links import SitesMissing
from fedcmr_server.rounds import initial_state, run_job
from fedcmr_server.run_folder import RunFolder
from fedcmr_shared.errors import ConfigurationError, FederationError, ModelError
from fedcmr_shared.federation.messages import Refusal, Task, Update
from fedcmr_shared.federation.secure_messages import (
    UnmaskAnswer,
    add_vector,
    pack_record,
    read_record,
    read_vector,
)
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.privacy import distributed
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SecureSpec, TrainingSpec
from fedcmr_shared.schemas.privacy import DistributedNoise, EvaluationSpec, PrivacySpec
from fedcmr_shared.schemas.refusals import PASSING, RefusalCode
from fedcmr_shared.secagg.layout import groups, trained_shapes
from fedcmr_shared.secagg.messages import STEPS, Confirmation, Keys, Shares, Unmasking
from fedcmr_shared.secagg.server import Opened

AMOUNTS = {"alder": 0.1, "birch": 0.2, "cedar": 0.4, "dogwood": 0.8}
JOB = JobSpec(
    rounds=2,
    model=ModelSpec(text_encoder="hashed"),
    training=TrainingSpec(part="prompts"),
    site_sizes={"alder": "large"},
)
ONE_ROUND = JOB.model_copy(update={"rounds": 1})
TRAINED = list(trained_shapes(JOB.model, JOB.training.part))


def new_run(tmp_path: Path, link: ProtocolLink, job: JobSpec = ONE_ROUND) -> RunFolder:
    return RunFolder.create(tmp_path / "run", job, roster=link.sites[0].roster)


def events(folder: RunFolder, name: str, **values: Any) -> list[dict[str, Any]]:
    return [
        event
        for event in folder.events()
        if event["event"] == name and values.items() <= event.items()
    ]


def outcomes(folder: RunFolder, phase: str = "train") -> list[tuple[int, int, str]]:
    found = events(folder, "attempt", phase=phase)
    return [(event["round"], event["attempt"], event["outcome"]) for event in found]


def lost(folder: RunFolder, attempt: int = 1) -> dict[str, tuple[str, str]]:
    (event,) = events(folder, "attempt", phase="train", round=1, attempt=attempt)
    return {loss["site"]: (loss["step"], loss["fault"]) for loss in event["losses"]}


def mean(job: JobSpec, sites: Mapping[str, float]) -> float:
    weight = {site: job.weight(site) for site in sites}
    return sum(weight[site] * sites[site] for site in sites) / sum(weight.values())


def require_moved(state: Mapping[str, Tensor], job: JobSpec, by: float) -> None:
    """Hold the model against its start; the rest of it has not moved."""
    start = initial_state(job)
    for name, value in state.items():
        moved = start[name] + by if name in TRAINED else start[name]
        torch.testing.assert_close(value, moved, rtol=0, atol=1e-6)


def test_sums_are_weighted_and_keys_ride_along(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    folder = new_run(tmp_path, link, JOB)
    last = run_job(link, folder)
    require_moved(last.state, JOB, 2 * mean(JOB, AMOUNTS))
    first, *others = [
        [action.partition(".")[2] for action, *place, _ in link.asked if place == [number, 1]]
        for number in (1, 2)
    ]
    after_keys = list(STEPS[1:])
    assert first == list(STEPS) + after_keys  # training, then evaluation
    assert others == [after_keys + after_keys]
    counts = [event["exchanges"] for event in events(folder, "attempt")]
    assert counts == [4, 3, 3, 3]  # beside `update`, in which the sites train
    assert [event["sites"] for event in events(folder, "round")] == [4, 4]
    assert all(event["bytes_up"] > 4 * 3570 * 4 for event in events(folder, "round"))


def test_evaluation_is_the_mean_over_all_patients(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    link.lost[Place("dogwood", "evaluate.update")] = 1
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    (found,) = events(folder, "evaluation")
    share = (0.1 + 0.2 + 0.4) / 3  # of three sites with four patients each
    assert found["ssim"] == pytest.approx(share, abs=1e-5)
    assert found["psnr"] == pytest.approx(10 + 40 * share, abs=1e-3)
    assert found["sites"] == 3


def test_histograms_are_summed_and_the_last_round_alone_is_evaluated(tmp_path: Path) -> None:
    evaluation = EvaluationSpec(histogram_bins=4, rounds="last")
    job = JOB.model_copy(update={"privacy": PrivacySpec(evaluation=evaluation)})
    link = federation(AMOUNTS)
    folder = new_run(tmp_path, link, job)
    run_job(link, folder)
    (found,) = events(folder, "evaluation")
    assert found["round"] == 2
    assert found["histograms"]["psnr"]["edges"] == [10, 20, 30, 40, 50]
    assert found["histograms"]["psnr"]["counts"] == pytest.approx([4, 4, 4, 4], abs=1e-4)
    assert [event["exchanges"] for event in events(folder, "attempt")] == [4, 3, 3]


def test_distributed_noise_makes_an_update_of_whole_numbers() -> None:
    privacy = PrivacySpec(distributed=DistributedNoise(unseen_sites=1))
    job = JOB.model_copy(update={"privacy": privacy})
    sums = {"a": torch.tensor([3, -6]), "b": torch.tensor([[9]])}
    opened = Opened(sums, ("alder", "birch", "cedar"), weight=3)
    found = mean_update(Task(job, 2, {}), opened)
    expected = distributed.mean_update(job, 2, sums, 3)
    assert all(torch.equal(found.delta[name], expected[name]) for name in sums)
    assert found.weight == 3


def test_a_run_folder_without_roster_asks_nobody(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    with pytest.raises(FederationError, match=r"roster\.yaml is missing"):
        run_job(link, RunFolder.create(tmp_path / "run", ONE_ROUND))
    assert link.asked == []


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("kind", ["deaf", "lost"])
def test_one_site_may_drop_out_of_every_step(tmp_path: Path, step: str, kind: str) -> None:
    link = federation(AMOUNTS)
    place = Place("birch", f"train.{step}")
    if kind == "deaf":
        link.deaf.add(place)
    else:
        link.lost[place] = 2
    folder = new_run(tmp_path, link)
    last = run_job(link, folder)
    in_sum = step in ("consistency", "unmask")
    summed = {site: a for site, a in AMOUNTS.items() if in_sum or site != "birch"}
    require_moved(last.state, ONE_ROUND, mean(ONE_ROUND, summed))
    (event,) = events(folder, "attempt", phase="train")
    assert event["survivors"] == sorted(summed)
    assert (event["outcome"], event["sites"], event["threshold"]) == ("opened", 4, 3)
    assert lost(folder) == {"birch": (step, "silent")}


def flip(content: RecordDict) -> RecordDict:
    vector = bytearray(read_vector(content))
    vector[17] ^= 1
    return add_vector(content, vector)


def cut(content: RecordDict) -> RecordDict:
    return add_vector(content, bytes(read_vector(content)[:-1]))


def without_vector(content: RecordDict) -> RecordDict:
    del content["vector"]
    return content


def signed_by_another(kind: type[Any]) -> Change:
    def change(content: RecordDict) -> RecordDict:
        key = SiteKey(Ed25519PrivateKey.generate())
        return pack_record(read_record(content, kind).signed(key))

    return change


def unmasked(content: RecordDict) -> RecordDict:
    return Update("birch", 1, "0" * 64, {"a": torch.ones(2)}).pack()


def declined(content: RecordDict) -> RecordDict:
    return Refusal("birch", "declined").pack()


@pytest.mark.parametrize(
    ("step", "change", "fault"),
    [
        ("keys", signed_by_another(Keys), "signature"),
        ("keys", declined, "refused"),
        ("keys", lambda _: RecordDict(), "silent"),  # nobody knows whose answer it is
        ("shares", signed_by_another(Shares), "signature"),
        ("shares", declined, "refused"),
        ("shares", lambda _: RecordDict(), "malformed"),
        ("update", flip, "vector"),
        ("update", cut, "vector"),
        ("update", without_vector, "vector"),
        ("update", unmasked, "malformed"),
        ("update", declined, "refused"),
        ("consistency", signed_by_another(Confirmation), "signature"),
    ],
)
def test_a_wrong_answer_loses_its_site_alone(
    tmp_path: Path, step: str, change: Change, fault: str
) -> None:
    link = federation(AMOUNTS)
    link.changed[Place("birch", f"train.{step}")] = change
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "opened")]
    assert lost(folder) == {"birch": (step, fault)}


def refusing(code: RefusalCode) -> Change:
    return lambda content: Refusal(read_record(content, Keys).site, code).pack()


def test_a_job_that_too_many_policies_refuse_ends_at_once_and_names_them(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    for site in ("birch", "cedar"):
        link.changed[Place(site, "train.keys")] = refusing("epsilon-per-job")
    folder = new_run(tmp_path, link)
    refusal = r"^birch \(epsilon-per-job\), cedar \(epsilon-per-job\) refuse .* 3 of 4 sites"
    with pytest.raises(FederationError, match=refusal) as error:
        run_job(link, folder)
    assert not isinstance(error.value, SitesMissing)
    assert outcomes(folder) == [(1, 1, "ended")]


@pytest.mark.parametrize("code", sorted(PASSING))
def test_what_may_pass_is_tried_again(tmp_path: Path, code: RefusalCode) -> None:
    link = federation(AMOUNTS)
    for site in ("birch", "cedar"):
        link.changed[Place(site, "train.keys")] = refusing(code)
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "ended"), (1, 2, "opened")]


def test_a_site_that_confirms_other_survivors_is_lost(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    liar = link.sites[1]

    def lie(content: RecordDict) -> RecordDict:
        message = read_record(content, Confirmation)
        other = message.model_copy(update={"survivors": message.survivors[:3]})
        return pack_record(other.signed(liar.identity))

    link.changed[Place("birch", "train.consistency")] = lie
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "opened")]
    assert lost(folder) == {"birch": ("consistency", "survivors")}


def test_a_wrong_share_closes_the_round(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    site = link.sites[0]

    def lie(content: RecordDict) -> RecordDict:
        answer = read_record(content, UnmaskAnswer)
        seeds = dict.fromkeys(answer.unmasking.seeds, "00" * 66)
        wrong = Unmasking(**{**answer.unmasking.model_dump(), "seeds": seeds})
        return pack_record(UnmaskAnswer(unmasking=wrong.signed(site.identity)))

    link.changed[Place("alder", "train.unmask")] = lie
    folder = new_run(tmp_path, link)
    require_moved(run_job(link, folder).state, ONE_ROUND, 0.0)
    (event,) = events(folder, "attempt", phase="train")
    assert (event["outcome"], event["survivors"]) == ("closed", [])
    assert event["reason"] == "the shares do not belong together"


def test_a_site_that_is_not_on_the_roster_is_left_out(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    stranger = ProtocolSite("yew", 0.5)
    others = {"oak": "ab" * 32, "elm": "cd" * 32}
    stranger.roster = Roster.model_validate(
        {"sites": {**others, "yew": stranger.identity.public_key}}
    )
    link.sites = [*link.sites, stranger]
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "opened")]
    assert lost(folder) == {"yew": ("keys", "roster")}


def test_two_losses_end_the_attempt_and_nobody_trains_again(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    for name in ("birch", "cedar"):
        link.lost[Place(name, "train.update")] = 1
    folder = new_run(tmp_path, link)
    last = run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "ended"), (1, 2, "opened")]
    assert lost(folder) == {"birch": ("update", "silent"), "cedar": ("update", "silent")}
    assert lost(folder, 2) == {}
    ended = events(folder, "attempt")[0]
    assert (ended["step"], ended["survivors"]) == ("update", [])
    assert ended["reason"] == "2 sites answered step update; 3 are needed"
    require_moved(last.state, ONE_ROUND, mean(ONE_ROUND, AMOUNTS))
    assert [site.trained for site in link.sites] == [1, 1, 1, 1]


def test_the_sum_of_gates_waits_for_every_site_that_trained(tmp_path: Path) -> None:
    # Opened without one it could not be opened again, and the model never be released.
    link = federation(AMOUNTS)
    evaluation = EvaluationSpec(noise_multiplier=None, rounds="last", metrics=("memorisation",))
    job = ONE_ROUND.model_copy(
        update={"privacy": PrivacySpec(evaluation=evaluation), "secure": SecureSpec(attempts=1)}
    )
    link.lost[Place("dogwood", "evaluate.update")] = 1
    folder = new_run(tmp_path, link, job)
    with pytest.raises(SitesMissing, match=r"evaluate.* 3 sites are left; 4 are needed"):
        run_job(link, folder)
    assert outcomes(folder, "evaluate") == [(1, 1, "ended")]
    run_job(link, folder)
    assert outcomes(folder, "evaluate") == [(1, 1, "ended"), (1, 2, "opened")]
    (found,) = events(folder, "evaluation")
    assert (found["gates_passed"], found["sites"]) == (4, 4)


def test_who_did_not_train_need_not_answer_for_the_gate(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    evaluation = EvaluationSpec(noise_multiplier=None, rounds="last", metrics=("memorisation",))
    job = ONE_ROUND.model_copy(update={"privacy": PrivacySpec(evaluation=evaluation)})
    link.away.add("dogwood")
    folder = new_run(tmp_path, link, job)
    run_job(link, folder)
    (found,) = events(folder, "evaluation")
    assert (found["gates_passed"], found["sites"]) == (3, 3)


def test_too_few_keys_end_the_attempt(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    for name in ("birch", "cedar"):
        link.deaf.add(Place(name, "train.keys"))
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "ended"), (1, 2, "opened")]
    assert events(folder, "attempt")[0]["step"] == "keys"


def test_the_job_asks_for_more_sites_than_the_threshold(tmp_path: Path) -> None:
    job = ONE_ROUND.model_copy(update={"minimum_sites": 4})
    link = federation(AMOUNTS)
    link.lost[Place("birch", "train.shares")] = 1
    folder = new_run(tmp_path, link, job)
    run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "ended"), (1, 2, "opened")]
    assert events(folder, "attempt")[0]["reason"] == "3 sites are left; 4 are needed"


def test_used_up_attempts_end_the_run_and_numbers_go_on_after_it(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    for attempt in (1, 2, 3):
        for name in ("birch", "cedar"):
            link.lost[Place(name, "train.update", 1, attempt)] = 1
    folder = new_run(tmp_path, link)
    with pytest.raises(FederationError, match="3 attempts to open the sum ended"):
        run_job(link, folder)
    last = run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "ended"), (1, 2, "ended"), (1, 3, "ended"), (1, 4, "opened")]
    require_moved(last.state, ONE_ROUND, mean(ONE_ROUND, AMOUNTS))
    assert [site.trained for site in link.sites] == [1, 1, 1, 1]


def test_a_silent_site_is_asked_for_its_shares_once_more(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    for name in ("birch", "cedar"):
        link.lost[Place(name, "train.unmask")] = 1
    folder = new_run(tmp_path, link)
    last = run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "opened")]
    assert lost(folder) == {}
    require_moved(last.state, ONE_ROUND, mean(ONE_ROUND, AMOUNTS))
    unmask = [asked for asked in link.asked if asked[0] == "train.unmask"]
    assert [count for *_, count in unmask] == [4, 2]


def test_too_few_shares_close_the_round_and_the_job_goes_on(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    for name in ("birch", "cedar"):
        link.lost[Place(name, "train.unmask")] = 2
    folder = new_run(tmp_path, link, JOB)
    last = run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "closed"), (2, 1, "opened")]
    assert [event["closed"] for event in events(folder, "round")] == [True, False]
    first, second = events(folder, "evaluation")
    assert first["sites"] == second["sites"] == 4  # the old model is scored as usual
    require_moved(last.state, JOB, mean(JOB, AMOUNTS))


def test_a_closed_evaluation_has_no_figures(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    for name in ("birch", "cedar"):
        link.lost[Place(name, "evaluate.unmask")] = 2
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    (found,) = events(folder, "evaluation")
    assert found["closed"]
    assert "psnr" not in found


class Stop(BaseException):
    """The coordinator's process dies."""


def stop(content: RecordDict) -> RecordDict:
    raise Stop


@pytest.mark.parametrize("step", ["keys", "shares", "update", "consistency"])
def test_a_coordinator_that_restarts_uses_a_new_number(tmp_path: Path, step: str) -> None:
    link = federation(AMOUNTS)
    link.changed[Place("cedar", f"train.{step}")] = stop
    folder = new_run(tmp_path, link)
    with pytest.raises(Stop):
        run_job(link, folder)
    last = run_job(link, folder)
    assert outcomes(folder) == [(1, 2, "opened")]
    assert lost(folder, 2) == {}
    require_moved(last.state, ONE_ROUND, mean(ONE_ROUND, AMOUNTS))


class StoppingFolder(RunFolder):
    """Its coordinator dies before it records an evaluation."""

    def record(self, event: str, **values: Any) -> None:
        if event == "evaluation":
            raise Stop
        super().record(event, **values)


def test_sites_send_keys_again_that_came_before_a_restart(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    folder = new_run(tmp_path, link, JOB)
    with pytest.raises(Stop):
        run_job(link, StoppingFolder(folder.root))
    offered = {session for site in link.sites for session in site.states if session.round == 2}
    assert [(each.phase, each.attempt) for each in offered] == [("train", 1)]
    run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "opened"), (2, 1, "opened")]


def test_a_coordinator_that_stops_after_asking_for_shares_closes_the_round(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    link.changed[Place("cedar", "train.unmask")] = stop
    folder = new_run(tmp_path, link, JOB)
    with pytest.raises(Stop):
        run_job(link, folder)
    last = run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "closed"), (2, 1, "opened")]
    require_moved(last.state, JOB, mean(JOB, AMOUNTS))


def test_a_model_that_was_not_kept_closes_its_round(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    folder.bundle_path(1).unlink()
    require_moved(run_job(link, folder).state, ONE_ROUND, 0.0)
    assert outcomes(folder) == [(1, 1, "opened")]
    assert [event["closed"] for event in events(folder, "round")] == [False, True]


def test_a_full_disk_is_noticed_before_shares_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = federation(AMOUNTS)
    folder = new_run(tmp_path, link)
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4096))
        with pytest.raises(ModelError, match="4 KiB are free: make room, then resume"):
            run_job(link, folder)
    assert events(folder, "unmask_asked") == []
    last = run_job(link, folder)
    assert outcomes(folder) == [(1, 2, "opened")]
    require_moved(last.state, ONE_ROUND, mean(ONE_ROUND, AMOUNTS))


def test_next_keys_of_a_site_that_left_are_not_used(tmp_path: Path) -> None:
    link = federation(AMOUNTS)

    def leave(content: RecordDict) -> RecordDict:
        link.away.add("birch")
        return content

    link.changed[Place("dogwood", "train.unmask")] = leave
    folder = new_run(tmp_path, link)
    run_job(link, folder)
    evaluation = [asked for asked in link.asked if asked[0].startswith("evaluate")]
    assert [count for *_, count in evaluation] == [3, 3, 3, 3]


NINE = {f"site-{n}": 0.01 * n for n in range(1, 10)}
GROUPS = JOB.model_copy(
    update={"aggregation": "secure_groups", "minimum_sites": 6, "rounds": 1, "site_sizes": {}}
)
MEDIAN = GROUPS.model_copy(update={"robust": "median", "minimum_sites": 9})


def group_means(job: JobSpec, roster: Roster, amounts: Mapping[str, float]) -> list[float]:
    return [sum(amounts[s] for s in g.sites) / len(g.sites) for g in groups(job, roster)]


@pytest.mark.parametrize("step", ["keys", "update", "consistency", "unmask"])
def test_a_group_that_falls_short_is_left_out(tmp_path: Path, step: str) -> None:
    link = federation(NINE)
    roster = link.sites[0].roster
    assert roster is not None
    short, *others = groups(GROUPS, roster)
    link.lost[Place(min(short.sites), f"train.{step}")] = 2
    folder = new_run(tmp_path, link, GROUPS)
    last = run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "opened")]
    (event,) = events(folder, "attempt", phase="train")
    survivors = sorted(site for group in others for site in group.sites)
    assert event["survivors"] == survivors
    require_moved(last.state, GROUPS, sum(NINE[site] for site in survivors) / 6)
    if step != "unmask":
        # It is asked nothing any more.
        assert [count for action, *_, count in link.asked if action == "train.unmask"] == [6]


def test_too_few_groups_end_the_attempt(tmp_path: Path) -> None:
    link = federation(NINE)
    roster = link.sites[0].roster
    assert roster is not None
    for group in groups(GROUPS, roster)[:2]:
        link.lost[Place(min(group.sites), "train.update")] = 1
    folder = new_run(tmp_path, link, GROUPS)
    run_job(link, folder)
    assert outcomes(folder) == [(1, 1, "ended"), (1, 2, "opened")]


@pytest.mark.parametrize("job", [GROUPS, MEDIAN], ids=["mean", "median"])
def test_a_poisoned_group_drags_the_mean_and_not_the_median(tmp_path: Path, job: JobSpec) -> None:
    link = federation({**NINE, "site-5": 1.0})
    folder = new_run(tmp_path, link, job)
    roster = link.sites[0].roster
    assert roster is not None
    honest = group_means(job, roster, NINE)
    poisoned = group_means(job, roster, {**NINE, "site-5": 1.0})
    last = run_job(link, folder)
    if job.robust == "mean":
        require_moved(last.state, job, sum(poisoned) / 3)
        assert sum(poisoned) / 3 > max(honest)
    else:
        require_moved(last.state, job, sorted(poisoned)[1])
        assert min(honest) <= sorted(poisoned)[1] <= max(honest)


def test_a_group_mean_of_large_norm_is_left_out(tmp_path: Path) -> None:
    poisoned = {**NINE, "site-5": 1.0}
    size = sum(
        torch.Size(shape).numel() for shape in trained_shapes(GROUPS.model, "prompts").values()
    )
    job = GROUPS.model_copy(update={"max_update_norm": 0.1 * size**0.5})
    link = federation(poisoned)
    folder = new_run(tmp_path, link, job)
    last = run_job(link, folder)
    roster = link.sites[0].roster
    assert roster is not None
    kept = sorted(group_means(job, roster, poisoned))[:2]
    require_moved(last.state, job, sum(kept) / 2)
    assert [event["left_out"] for event in events(folder, "round")] == [1]


def test_when_all_are_too_large_the_model_stays(tmp_path: Path) -> None:
    job = GROUPS.model_copy(update={"max_update_norm": 1e-6})
    link = federation(NINE)
    folder = new_run(tmp_path, link, job)
    require_moved(run_job(link, folder).state, job, 0.0)
    (event,) = events(folder, "round")
    assert (event["left_out"], event["closed"], event["update_norm"]) == (3, False, 0.0)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (ONE_ROUND.model_copy(update={"minimum_sites": 5}), "minimum_sites is 5, and the roster"),
        (GROUPS, "4 sites make no two groups"),
        (MEDIAN, "minimum_sites is 9, and the roster lists 8 sites"),
    ],
)
def test_a_roster_too_small_for_the_job_is_refused(
    tmp_path: Path, job: JobSpec, message: str
) -> None:
    link = federation(dict.fromkeys(sorted(NINE)[: 8 if job is MEDIAN else 4], 0.0))
    folder = new_run(tmp_path, link, job)
    with pytest.raises(ConfigurationError, match=message):
        run_job(link, folder)
    assert link.asked == []


def test_vectors_are_let_go_one_after_the_other(tmp_path: Path) -> None:
    link = federation(AMOUNTS)
    plain_exchange = link.exchange
    alive: list[weakref.ref[Any]] = []
    most = 0

    def watched(
        action: str, contents: Mapping[int, RecordDict], timeout_s: float
    ) -> Iterator[tuple[int, RecordDict]]:
        nonlocal most
        for node, content in plain_exchange(action, contents, timeout_s):
            if action == "train.update":
                most = max(most, sum(ref() is not None for ref in alive))
                alive.append(weakref.ref(content.array_records["vector"]["vector"]))
            yield node, content
            del content

    link.exchange = watched  # type: ignore[method-assign]  # to watch this very method
    gc.disable()
    try:
        run_job(link, new_run(tmp_path, link))
    finally:
        gc.enable()
    assert len(alive) == 4
    assert most == 0


places = st.builds(
    Place,
    site=st.sampled_from(sorted(AMOUNTS)),
    action=st.sampled_from([f"train.{step}" for step in STEPS]),
    attempt=st.integers(1, 2),
)


@settings(max_examples=25)
@given(lost=st.dictionaries(places, st.integers(1, 2), max_size=6))
def test_whatever_is_lost_the_model_moves_by_the_mean_of_the_survivors(
    tmp_path_factory: pytest.TempPathFactory, lost: dict[Place, int]
) -> None:
    link = federation(AMOUNTS)
    link.lost.update(lost)
    job = ONE_ROUND.model_copy(update={"secure": SecureSpec(attempts=3)})
    folder = new_run(tmp_path_factory.mktemp("run"), link, job)
    last = run_job(link, folder)  # the third attempt loses nobody
    *ended, final = events(folder, "attempt", phase="train")
    assert all(event["outcome"] == "ended" for event in ended)
    if final["outcome"] == "opened":
        survivors = {site: AMOUNTS[site] for site in final["survivors"]}
        assert len(survivors) >= 3
        require_moved(last.state, job, mean(job, survivors))
    else:
        assert final["outcome"] == "closed"
        require_moved(last.state, job, 0.0)
    assert max(site.trained for site in link.sites) <= 1
