"""Secure sums of real sites: what they open, what the ledgers say, and what each site refuses.

Where one site's answers are looked at, its peers are those of `secure_federation`, which only keep
to the protocol.
"""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from hospitals import SECURE, Federation, Hospital, Peer, text_of, write_roster
from safetensors.torch import load_file
from secure_federation import Place, ProtocolLink
from torch import Tensor

from fedcmr_client import agent as agent_module
from fedcmr_client import secure_site as secure_site_module
from fedcmr_client.agent import SiteAgent
from fedcmr_client.secure_sessions import SessionStore
from fedcmr_client.secure_site import summing_group
from fedcmr_client.site_home import SiteHome
from fedcmr_server.secure_attempt import Attempt, AttemptOver
from fedcmr_shared.errors import JobRefused
from fedcmr_shared.federation.messages import Task
from fedcmr_shared.federation.secure_messages import (
    ConsistencyQuestion,
    KeysQuestion,
    SharesQuestion,
    UnmaskAnswer,
    UnmaskQuestion,
    UpdateQuestion,
    add_record,
    pack_record,
    read_record,
    read_vector,
)
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SamplingSpec, SecureSpec, TrainingSpec
from fedcmr_shared.schemas.ledger import Admitted, Masked, Phase, Refused, Unmasked
from fedcmr_shared.schemas.privacy import EvaluationSpec, PrivacySpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation
from fedcmr_shared.secagg.layout import encoding_for, following, trained_shapes, weights
from fedcmr_shared.secagg.messages import Keys, Step, Vector
from fedcmr_shared.secagg.session import Session

JOB = JobSpec(
    name="summed",
    rounds=2,
    model=ModelSpec(text_encoder="hashed"),
    sampling=SamplingSpec(acs_lines=8),
    training=TrainingSpec(local_steps=1, part="prompts"),
    privacy=PrivacySpec(
        cohort_size=10,
        sampling_rate=0.5,
        noise_multiplier=2.0,
        evaluation=EvaluationSpec(cohort_size=2, rounds="all", histogram_bins=4),
    ),
    secure=SecureSpec(word_bits=24, update_range=0.01),
    site_sizes={"north": "medium", "south": "large"},
)
NAMES = ("east", "north", "south", "west")
PROTOCOL = "refused: protocol"
AGGREGATION = "refused: aggregation"
PHASES: tuple[Phase, ...] = ("train", "evaluate")
LEDGER_FILES = {"ledger.sqlite", "east.head.json"}


@pytest.fixture
def make_federation(
    make_home: Callable[..., SiteHome], make_site: Callable[..., Path], tmp_path: Path
) -> Callable[..., Federation]:
    """Return a function that makes ``real`` sites and their peers, all with one roster."""

    def make(count: int = 3, real: int = 1, job: JobSpec = JOB, **rules: Any) -> Federation:
        path = tmp_path / "roster.yaml"
        rules = {**SECURE, "roster": path, **rules}
        patients = 3 if real == 1 else 5  # enough for each part of a site's split
        size = {"coils": 2, "phase": 16, "readout": 16}
        stores = [make_site(name, patients, **size) for name in NAMES[:real]]
        hospitals = [Hospital(make_home(store, **rules)) for store in stores]
        peers = [Peer(name, 0.003, job=job) for name in NAMES[real:count]]
        keys = {site.name: site.home.identity().public_key for site in hospitals}
        roster = write_roster(path, {**keys, **{p.name: p.identity.public_key for p in peers}})
        for peer in peers:
            peer.roster = roster
        return Federation(job, ProtocolLink([*hospitals, *peers]), roster, initial(job.model))

    return make


@lru_cache(maxsize=1)
def initial(model: ModelSpec) -> Mapping[str, Tensor]:
    torch.manual_seed(0)
    return build_model(model).state_dict()


class Training:
    """Stands in for the training of a round and counts it; ``gate`` holds it up."""

    def __init__(self) -> None:
        self.sites: list[str] = []
        self.entered = threading.Event()
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, task: Task, _model: object, _records: object, home: SiteHome) -> object:
        self.sites.append(home.policy.site)
        self.entered.set()
        assert self.gate.wait(60)
        shapes = trained_shapes(task.job.model, task.job.training.part)
        return {name: 1e-3 * torch.randn(shape) for name, shape in shapes.items()}


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> Training:
    """Replace the training of a round by something quick."""
    quick = Training()
    monkeypatch.setattr(agent_module, "train_round", quick)
    return quick


@pytest.fixture
def federation(make_federation: Callable[..., Federation], training: Training) -> Federation:
    """A site that does not really train, and two peers."""
    return make_federation()


def hospitals(federation: Federation) -> list[Hospital]:
    return [site for site in federation.link.sites if isinstance(site, Hospital)]


def without(federation: Federation, name: str, path: Path) -> Federation:
    """Write the roster without one of the peers and return the federation that is left."""
    sites = [site for site in federation.link.sites if site.name != name]
    keys = {site.name: federation.roster.sites[site.name] for site in sites}
    roster = write_roster(path, keys)
    for site in sites:
        if isinstance(site, Peer):
            site.roster = roster
    return Federation(federation.job, ProtocolLink(sites), roster, federation.model)


def stored(site: Hospital | Peer, job: JobSpec, phase: Phase, number: int) -> Mapping[str, Tensor]:
    if isinstance(site, Peer):
        return site.stored[phase, number]
    with closing(site.home.open_ledger()) as ledger:
        path = ledger.stored(job.sha256, phase, number)
    assert path is not None
    return load_file(path)


def require_sum(federation: Federation, attempt: Attempt) -> None:
    """Hold what an attempt opened against the stored results of its survivors."""
    (opened,) = attempt.opened
    session, job = attempt.session, federation.job
    encoding = encoding_for(job, session.phase, federation.roster)
    weight = weights(job, session.phase, federation.roster)
    assert opened.weight == sum(weight[site] for site in opened.survivors)
    results = {
        site.name: stored(site, job, session.phase, session.round)
        for site in federation.link.sites
        if site.name in opened.survivors
    }
    assert tuple(sorted(results)) == opened.survivors
    for segment in encoding.segments:
        exact = sum(
            weight[site] * values[segment.name].double().clamp(-segment.bound, segment.bound)
            for site, values in results.items()
        )
        error = float((opened.sums[segment.name] - exact).abs().max())
        assert error <= encoding.error_bound(segment, opened.weight)
        # The bound says something: the figures are far larger.
        assert float(exact.abs().max()) > 20 * encoding.error_bound(segment, opened.weight)


def started(site: Hospital) -> int:
    return site.kinds().count("started")


def question(federation: Federation, step: Step, record: Any, number: int = 1) -> RecordDict:
    """Return the content of a question; the task goes with `update`."""
    if step == "update":
        return add_record(federation.task(number).pack(), record)
    return pack_record(record)


class TestWholeRounds:
    def test_sums_are_those_of_the_stored_results_and_next_keys_ride_along(
        self, make_federation: Callable[..., Federation]
    ) -> None:
        federation = make_federation(real=3)
        session: Session | None = federation.session()
        ahead = None
        while session is not None:
            attempt = federation.run(session, ahead=ahead)
            require_sum(federation, attempt)
            assert attempt.losses == []
            ahead, session = attempt.ahead, following(JOB, session)
            if session is not None:
                assert ahead.session == session
                assert len(ahead.by_node) == 3
        # Keys were asked for once in the whole job.
        actions = [action for action, *_ in federation.link.asked]
        assert actions.count("train.keys") == 1
        assert "evaluate.keys" not in actions
        # Each phase of each round: charged, stored, masked, unmasked; closed by the last one.
        work = ["started", "stored", "masked", "unmasked"]
        last = ["started", "stored", "closed", "masked", "unmasked"]
        for site in hospitals(federation):
            assert site.kinds() == ["admitted", *work * 3, *last]

    def test_an_attempt_without_a_site_opens_the_sum_of_the_others(
        self, make_federation: Callable[..., Federation], training: Training
    ) -> None:
        federation = make_federation(4, real=4)
        federation.link.lost[Place("south", "train.update")] = 1
        attempt = federation.run(federation.session())
        require_sum(federation, attempt)
        (opened,) = attempt.opened
        assert opened.survivors == ("east", "north", "west")
        assert opened.weight == 1 + 2 + 1
        # The lost site masked and did not unmask: it goes on with the next round.
        assert hospitals(federation)[2].kinds()[-1] == "masked"
        again = federation.run(federation.session(2), ahead=attempt.ahead)
        require_sum(federation, again)
        assert len(again.opened[0].survivors) == 4

    def test_groups_sum_with_their_own_sites_alone(
        self, federation: Federation, tmp_path: Path
    ) -> None:
        job = JOB.model_copy(update={"aggregation": "secure_groups", "minimum_sites": 6})
        (site, *_) = hospitals(federation)
        keys = {name: f"{number:064x}" for number, name in enumerate("abcde")}
        keys["east"] = site.home.identity().public_key
        write_roster(tmp_path / "roster.yaml", keys)
        group = summing_group(site.home, job)
        assert len(group.sites) == group.threshold == 3
        assert group.sites["east"] == keys["east"]


class TestLedger:
    def test_entries_come_before_what_they_allow(
        self,
        make_federation: Callable[..., Federation],
        training: Training,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        federation = make_federation(real=3)
        by_name = {site.name: site for site in hospitals(federation)}
        seen: list[tuple[str, Any]] = []
        announce, finish = secure_site_module.announce_vector, SessionStore.finish

        def announced(state: Any, *rest: Any) -> Vector:
            seen.append(("vector", by_name[state.site].entries()[-1]))
            return announce(state, *rest)

        def finished(store: SessionStore, session: Session, answer: str) -> None:
            site = next(s for s in by_name.values() if s.home.sessions().folder == store.folder)
            seen.append((answer, site.entries()[-1]))
            finish(store, session, answer)

        monkeypatch.setattr(secure_site_module, "announce_vector", announced)
        monkeypatch.setattr(SessionStore, "finish", finished)
        federation.run(federation.session())
        vectors, shares = seen[:3], seen[3:]
        headers = {entry.header for _, entry in vectors}
        assert len(headers) == 1
        for _, entry in vectors:
            assert isinstance(entry, Masked)
            assert (entry.phase, entry.round, entry.attempt) == ("train", 1, 1)
        assert len(shares) == 3
        for answer, entry in shares:
            assert isinstance(entry, Unmasked)
            assert entry.survivors == NAMES[:3]
            assert entry.answer == hashlib.sha256(answer.encode()).hexdigest()

    def test_a_new_attempt_costs_nothing(
        self, make_federation: Callable[..., Federation], training: Training
    ) -> None:
        federation = make_federation(4, real=2)
        first, second = federation.session(), federation.session(attempt=2)
        for site in ("east", "north"):
            federation.link.lost[Place(site, "train.consistency")] = 1
        with pytest.raises(AttemptOver):
            federation.run(first)
        before = [stored(site, JOB, "train", 1) for site in hospitals(federation)]
        require_sum(federation, federation.run(second))
        assert training.sites == ["east", "north"]
        for site, result in zip(hospitals(federation), before, strict=True):
            assert started(site) == 1
            assert site.kinds() == ["admitted", "started", "stored", "masked", "masked", "unmasked"]
            now = stored(site, JOB, "train", 1)
            assert all(torch.equal(result[name], now[name]) for name in result)

    def test_nothing_leaves_beside_the_vector_and_its_signature(
        self, federation: Federation
    ) -> None:
        site = hospitals(federation)[0]
        run = federation.run(federation.session(), before="update")
        asked = question(federation, "update", run.sums[0].questions["east"])
        answer = site.answer("update", asked)
        assert set(answer) == {"secure", "vector"}
        assert set(answer.config_records["secure"]) == {"json"}
        assert set(read_record(answer, Vector).model_dump()) == {
            *("site", "header", "blake3", "signature")
        }
        encoding = encoding_for(JOB, "train", federation.roster)
        assert len(read_vector(answer)) == encoding.nbytes

    def test_attempts_have_fresh_keys_and_other_masks(self, federation: Federation) -> None:
        site = hospitals(federation)[0]
        kept: list[tuple[str, bytes]] = []
        for attempt in (1, 2):
            run = federation.run(federation.session(attempt=attempt), before="update")
            keys = run.sums[0].questions["east"]
            assert isinstance(keys, UpdateQuestion)
            answer = site.answer("update", question(federation, "update", keys))
            vector = read_record(answer, Vector)
            kept.append((vector.blake3, bytes(read_vector(answer))))
        (one, first), (two, second) = kept
        assert one != two
        same = sum(a == b for a, b in zip(first, second, strict=True))
        # Under independent masks a byte agrees with probability 1 / 256: below a tenth of them
        # in 10,000 bytes, but for once in 10^200.
        assert len(first) > 10_000
        assert same < len(first) / 10


class TestAfterUnmasking:
    def test_no_further_attempt_of_the_round(self, federation: Federation) -> None:
        federation.run(federation.session())
        site = hospitals(federation)[0]
        before = site.kept()
        for attempt in (1, 2, 3):
            asked = KeysQuestion(session=federation.session(attempt=attempt), job=JOB)
            assert text_of(site.answer("keys", pack_record(asked))) == PROTOCOL
        assert site.kept() == before

    def test_the_same_answer_again_byte_for_byte(self, federation: Federation) -> None:
        session = federation.session()
        run = federation.run(session, before="unmask")
        asked = run.sums[0].questions["east"]
        assert isinstance(asked, UnmaskQuestion)
        site = hospitals(federation)[0]
        first = read_record(site.answer("unmask", pack_record(asked)), UnmaskAnswer)
        before = site.kept()
        other = UnmaskQuestion(session=session, confirmations=asked.confirmations[::-1])
        nothing = UnmaskQuestion(session=session, confirmations=())
        for again in (asked, asked, other, nothing):
            answer = read_record(site.answer("unmask", pack_record(again)), UnmaskAnswer)
            assert answer.unmasking.encode() == first.unmasking.encode()
            assert answer.next_keys is None
        assert site.kept() == before

    def test_the_answer_goes_when_the_next_sum_begins(self, federation: Federation) -> None:
        session = federation.session()
        run = federation.run(session)
        site = hospitals(federation)[0]
        repeated = site.asked[session, "unmask"]
        assert text_of(site.reply("unmask", repeated)) != PROTOCOL
        after = following(JOB, session)
        assert after is not None
        federation.run(after, ahead=run.ahead, before="update")
        assert text_of(site.reply("unmask", repeated)) == PROTOCOL


class TestRepeated:
    def test_no_second_vector_for_an_attempt(
        self, make_federation: Callable[..., Federation], training: Training
    ) -> None:
        federation = make_federation(4)
        session = federation.session()
        run = federation.run(session, before="update")
        asked = run.sums[0].questions["east"]
        assert isinstance(asked, UpdateQuestion)
        site = hospitals(federation)[0]
        read_record(site.answer("update", question(federation, "update", asked)), Vector)
        before = site.kept()
        fewer = UpdateQuestion(session=session, deliveries=asked.deliveries[1:])
        for again in (asked, fewer):
            content = question(federation, "update", again)
            assert text_of(site.answer("update", content)) == PROTOCOL
        assert site.kept() == before
        assert training.sites.count("east") == 1

    def test_no_step_is_answered_twice_or_skipped(self, federation: Federation) -> None:
        """Every question of a whole attempt, asked again after each step, changes nothing."""
        session = federation.session()
        run = federation.begin(session)
        site = hospitals(federation)[0]
        for step in ("keys", "shares", "update", "consistency"):
            federation.advance(run, step)
            before = site.kept()
            for (_, earlier), content in list(site.asked.items()):
                expected = text_of(site.reply(earlier, content))
                if earlier == step == "keys":
                    assert read_record(site.reply(earlier, content), Keys)
                else:
                    assert expected == PROTOCOL
            if step != "consistency":
                unasked = UnmaskQuestion(session=session, confirmations=())
                assert text_of(site.reply("unmask", pack_record(unasked))) == PROTOCOL
            assert site.kept() == before

    def test_no_second_set_of_survivors(
        self, make_federation: Callable[..., Federation], training: Training
    ) -> None:
        federation = make_federation(4)
        session = federation.session()
        federation.run(session, before="unmask")
        site = hospitals(federation)[0]
        before = site.kept()
        other = ConsistencyQuestion(session=session, survivors=NAMES[:3])
        assert text_of(site.answer("consistency", pack_record(other))) == PROTOCOL
        assert site.kept() == before

    def test_an_attempt_below_one_that_began_is_refused(self, federation: Federation) -> None:
        federation.run(federation.session(attempt=3), before="shares")
        site = hospitals(federation)[0]
        before = site.kept()
        for attempt in (1, 2):
            asked = KeysQuestion(session=federation.session(attempt=attempt), job=JOB)
            assert text_of(site.answer("keys", pack_record(asked))) == PROTOCOL
        assert site.kept() == before
        federation.run(federation.session(attempt=4))
        assert site.kinds()[-1] == "unmasked"


class TestRefusedWithoutATrace:
    """What is refused leaves ledger, results and sessions as they were."""

    @pytest.mark.parametrize("phase", ["train", "evaluate"])
    def test_a_session_of_another_job(self, phase: Phase, federation: Federation) -> None:
        site = hospitals(federation)[0]
        before = site.kept()
        session = Session(job="0" * 64, phase=phase, round=1, attempt=1)
        asked = pack_record(KeysQuestion(session=session, job=JOB))
        assert text_of(site.answer("keys", asked)) == PROTOCOL
        assert site.kept() == before

    @pytest.mark.parametrize("step", ["shares", "update", "consistency", "unmask"])
    def test_a_session_without_keys(self, step: Step, federation: Federation) -> None:
        federation.run(federation.session(), before="shares")
        site = hospitals(federation)[0]
        before = site.kept()
        model = state_sha256(federation.model)
        for session in (
            federation.session(attempt=2),
            federation.session(number=2),
            federation.session(phase="evaluate"),
        ):
            records = {
                "shares": SharesQuestion(session=session, model=model, keys=()),
                "update": UpdateQuestion(session=session, deliveries=()),
                "consistency": ConsistencyQuestion(session=session, survivors=NAMES[:3]),
                "unmask": UnmaskQuestion(session=session, confirmations=()),
            }
            content = question(federation, step, records[step], session.round)
            assert text_of(site.answer(step, content)) == PROTOCOL
        assert site.kept() == before

    def test_jobs_that_nobody_heard_of_leave_no_files(self, federation: Federation) -> None:
        federation.run(federation.session(), before="shares")
        site = hospitals(federation)[0]
        folder = site.home.sessions().folder
        before = set(folder.iterdir())
        for number in range(3):
            session = Session(job=f"{number:064x}", phase="train", round=1, attempt=1)
            content = question(federation, "update", UpdateQuestion(session=session, deliveries=()))
            assert text_of(site.reply("update", content)) == PROTOCOL
        assert set(folder.iterdir()) == before

    @pytest.mark.parametrize("step", ["keys", "shares", "update", "consistency", "unmask"])
    def test_a_message_that_cannot_be_read(self, step: Step, federation: Federation) -> None:
        site = hospitals(federation)[0]
        before = site.kept()
        assert text_of(site.reply(step, RecordDict())) == PROTOCOL
        assert text_of(site.reply(step, federation.task().pack())) == PROTOCOL
        assert site.kept() == before

    def change_task(self, federation: Federation, change: str) -> Task:
        task = federation.task()
        if change == "model":
            moved = {k: v + 1 if v.is_floating_point() else v for k, v in task.state.items()}
            return Task(JOB, 1, moved)
        if change == "round":
            return Task(JOB, 2, task.state)
        return Task(JOB.model_copy(update={"name": "other"}), 1, task.state)

    @pytest.mark.parametrize("change", ["model", "round", "job"])
    def test_another_task_than_was_agreed_on(
        self, change: str, federation: Federation, training: Training
    ) -> None:
        run = federation.run(federation.session(), before="update")
        site = hospitals(federation)[0]
        before = site.kept()
        asked = run.sums[0].questions["east"]
        wrong = add_record(self.change_task(federation, change).pack(), asked)
        assert text_of(site.answer("update", wrong)) == PROTOCOL
        assert site.kept() == before
        assert training.sites == []
        # The right one still counts.
        right = site.answer("update", question(federation, "update", asked))
        assert read_record(right, Vector)

    def test_a_task_whose_model_is_cut_off(
        self, federation: Federation, training: Training
    ) -> None:
        run = federation.run(federation.session(), before="update")
        site = hospitals(federation)[0]
        before = site.kept()
        content = federation.task().pack()
        del content["arrays"]
        add_record(content, run.sums[0].questions["east"])
        assert text_of(site.answer("update", content)) == PROTOCOL
        assert site.kept() == before
        assert training.sites == []

    @pytest.mark.parametrize("phase", ["train", "evaluate"])
    def test_a_stored_result_of_another_model(self, phase: Phase, federation: Federation) -> None:
        """A server that trains one model and sums under another one gets no vector."""
        first, second = (federation.session(phase=phase, attempt=number) for number in (1, 2))
        federation.run(first, before="consistency")
        moved = {
            name: value + 0.01 if value.is_floating_point() else value
            for name, value in federation.model.items()
        }
        other = Federation(JOB, federation.link, federation.roster, moved)
        run = other.run(second, before="update")
        site = hospitals(federation)[0]
        before = site.kept()
        with pytest.raises(AttemptOver):
            other.advance(run, "update")
        assert [(loss.site, loss.fault) for loss in run.losses] == [("east", "refused")]
        assert site.kept() == before
        # Under its own model the result still counts.
        require_sum(federation, federation.run(federation.session(phase=phase, attempt=3)))


class TestRoster:
    def ask_keys(self, federation: Federation, home: SiteHome) -> tuple[str, bool]:
        """Return the answer to `keys` of a site with this home, and whether it left a trace."""
        site = Hospital(home)
        before = site.kept()
        asked = pack_record(KeysQuestion(session=federation.session(), job=JOB))
        return text_of(site.answer("keys", asked)), site.kept() != before

    def home_with(self, federation: Federation, **changes: Any) -> SiteHome:
        """Return the first site's home under a changed policy."""
        path = hospitals(federation)[0].home.path
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **changes}))
        return SiteHome.open(path)

    def test_with_a_good_one_the_site_takes_part(self, federation: Federation) -> None:
        """Positive control of the refusals below."""
        answer, trace = self.ask_keys(federation, self.home_with(federation))
        assert Keys.decode(answer).site == "east"
        assert trace

    def test_none_in_the_policy(self, federation: Federation) -> None:
        home = self.home_with(federation, roster=None)
        assert self.ask_keys(federation, home) == (AGGREGATION, False)

    def test_a_file_that_is_not_there(self, federation: Federation, tmp_path: Path) -> None:
        (tmp_path / "roster.yaml").unlink()
        home = hospitals(federation)[0].home
        assert self.ask_keys(federation, home) == (AGGREGATION, False)

    @pytest.mark.parametrize("name", ["east", "elsewhere"])
    def test_another_key_for_the_site_or_none(
        self, name: str, federation: Federation, tmp_path: Path
    ) -> None:
        sites = {name: "0" * 64, **{s: federation.roster.sites[s] for s in NAMES[1:3]}}
        write_roster(tmp_path / "roster.yaml", sites)
        home = hospitals(federation)[0].home
        assert self.ask_keys(federation, home) == (AGGREGATION, False)

    def test_a_threshold_below_the_policys_sites(self, federation: Federation) -> None:
        job = JOB.model_copy(update={"minimum_sites": 4})
        home = self.home_with(federation, minimum_sites=4)
        site = Hospital(home)
        before = site.kept()
        session = Session(job=job.sha256, phase="train", round=1, attempt=1)
        asked = pack_record(KeysQuestion(session=session, job=job))
        assert text_of(site.answer("keys", asked)) == "refused: minimum-sites"
        assert site.kept() == before

    def test_fewer_sites_than_the_job_sums(self, federation: Federation) -> None:
        job = JOB.model_copy(update={"minimum_sites": 4})
        site = hospitals(federation)[0]
        before = site.kept()
        session = Session(job=job.sha256, phase="train", round=1, attempt=1)
        asked = pack_record(KeysQuestion(session=session, job=job))
        assert text_of(site.answer("keys", asked)) == PROTOCOL
        assert site.kept() == before

    @pytest.mark.parametrize("step", ["shares", "update", "consistency", "unmask"])
    def test_one_that_changed_ends_the_attempt_and_the_next_takes_the_new_one(
        self, step: Step, make_federation: Callable[..., Federation], training: Training,
        tmp_path: Path,
    ) -> None:  # fmt: skip  # one line for each would only be longer
        """A site that the operators struck off takes part in nothing that began with it."""
        federation = make_federation(4)
        session = federation.session()
        run = federation.run(session, before=step)
        asked = run.sums[0].questions["east"]
        site = hospitals(federation)[0]
        before = site.kept()
        smaller = without(federation, "west", tmp_path / "roster.yaml")
        assert text_of(site.answer(step, question(federation, step, asked))) == PROTOCOL
        assert site.kept() == before
        require_sum(smaller, smaller.run(smaller.session(attempt=2)))

    def test_keys_that_came_ahead_are_made_anew_for_another_one(
        self, make_federation: Callable[..., Federation], training: Training, tmp_path: Path
    ) -> None:
        federation = make_federation(4)
        run = federation.run(federation.session())
        after = following(JOB, federation.session())
        assert after is not None
        smaller = without(federation, "west", tmp_path / "roster.yaml")
        (site,) = hospitals(federation)
        ahead = next(keys for keys in run.ahead.by_node.values() if keys.site == site.name)
        asked = pack_record(KeysQuestion(session=after, job=JOB))
        fresh = read_record(site.answer("keys", asked), Keys)
        assert (fresh.header, fresh.mask) != (ahead.header, ahead.mask)
        assert smaller.session(2).round == 2
        require_sum(smaller, smaller.run(smaller.session(2)))

    def test_an_answer_that_left_is_sent_again_all_the_same(
        self, federation: Federation, tmp_path: Path
    ) -> None:
        session = federation.session()
        federation.run(session)
        site = hospitals(federation)[0]
        (tmp_path / "roster.yaml").unlink()
        assert read_record(site.reply("unmask", site.asked[session, "unmask"]), UnmaskAnswer)


class TestPolicy:
    def test_a_mode_that_is_not_listed_is_refused_at_keys(
        self, make_federation: Callable[..., Federation], training: Training
    ) -> None:
        federation = make_federation(aggregation=["secure_groups", "plain_with_local_dp"])
        site = hospitals(federation)[0]
        asked = pack_record(KeysQuestion(session=federation.session(), job=JOB))
        assert text_of(site.answer("keys", asked)) == AGGREGATION
        (entry,) = site.entries()
        assert isinstance(entry, Refused)
        assert (entry.job, entry.code, entry.rule) == (JOB.sha256, "aggregation", "aggregation")
        assert not list(site.home.sessions().folder.glob("*.key"))

    def test_a_job_in_the_open_has_no_secure_sum(
        self, make_federation: Callable[..., Federation], training: Training
    ) -> None:
        job = JOB.model_copy(update={"aggregation": "plain_with_local_dp"})
        federation = make_federation(job=job, aggregation=["plain_with_local_dp", "secure_sum"])
        site = hospitals(federation)[0]
        asked = pack_record(KeysQuestion(session=federation.session(), job=job))
        assert text_of(site.answer("keys", asked)) == AGGREGATION
        assert not list(site.home.sessions().folder.glob("*.key"))

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("phase", ["train", "evaluate"])
    def test_a_result_of_a_secure_job_never_leaves_in_the_open(
        self, phase: Phase, when: str, federation: Federation, training: Training
    ) -> None:
        """Also not when it is stored: a coordinator may ask in the plain way at any time."""
        if when == "after":
            federation.run(federation.session(phase=phase))
        site = hospitals(federation)[0]
        before, trained = site.kinds(), len(training.sites)
        agent = SiteAgent(site.home)
        ask = agent.train if phase == "train" else agent.evaluate
        with pytest.raises(JobRefused) as refusal:
            ask(federation.task())
        assert refusal.value.code == "aggregation"
        assert site.kinds() == [*before, "refused"]
        entry = site.entries()[-1]
        assert (entry.job, entry.code) == (JOB.sha256, "aggregation")
        assert len(training.sites) == trained

    def test_a_policy_that_changed_meanwhile_counts_before_the_training(
        self, federation: Federation, training: Training
    ) -> None:
        run = federation.run(federation.session(), before="update")
        site = hospitals(federation)[0]
        path = site.home.path
        path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "jobs": []}))
        strict = Hospital(SiteHome.open(path))
        content = question(federation, "update", run.sums[0].questions["east"])
        assert text_of(strict.answer("update", content)) == "refused: job-name"
        assert strict.kinds() == ["refused"]
        assert training.sites == []

    def test_a_round_that_the_job_does_not_have(self, federation: Federation) -> None:
        site = hospitals(federation)[0]
        asked = pack_record(KeysQuestion(session=federation.session(3), job=JOB))
        assert text_of(site.answer("keys", asked)) == "refused: malformed"
        assert site.kinds() == ["refused"]

    def test_admission_waits_for_the_update(self, federation: Federation) -> None:
        """Keys and shares cost nothing and open no data."""
        federation.run(federation.session(), before="update")
        for site in hospitals(federation):
            assert site.entries() == []
        federation.run(federation.session(attempt=2), before="consistency")
        assert isinstance(hospitals(federation)[0].entries()[0], Admitted)


FEDERATION = "f0" * 32
NOW = datetime.now(UTC)
DAY = timedelta(days=1)


class Coordinator:
    """Whose signature the sites ask for."""

    def __init__(self) -> None:
        self.key = SiteKey(Ed25519PrivateKey.generate())

    def sign(
        self,
        job: JobSpec = JOB,
        federation: str = FEDERATION,
        period: tuple[datetime, datetime] = (NOW - DAY, NOW + DAY),
    ) -> JobAuthorisation:
        return JobAuthorisation.sign(job, federation, period, self.key)


class TestSignedJobs:
    @pytest.fixture
    def coordinator(self) -> Coordinator:
        return Coordinator()

    @pytest.fixture
    def joined(self, federation: Federation, coordinator: Coordinator) -> Federation:
        """The federation, its site pinning the coordinator, which signed the job."""
        for site in hospitals(federation):
            site.pinned = (FEDERATION, coordinator.key.public_key)
        federation.authorisation = coordinator.sign()
        return federation

    def test_a_signed_job_is_summed(self, joined: Federation) -> None:
        require_sum(joined, joined.run(joined.session()))

    @pytest.mark.parametrize(
        "forge",
        [
            lambda _: None,
            lambda coordinator: coordinator.sign(JOB.model_copy(update={"rounds": 1})),
            lambda coordinator: coordinator.sign(federation="e1" * 32),
            lambda coordinator: coordinator.sign(period=(NOW - 2 * DAY, NOW - DAY)),
            lambda coordinator: coordinator.sign(period=(NOW + DAY, NOW + 2 * DAY)),
            lambda coordinator: coordinator.sign(period=(NOW - DAY, NOW + 999 * DAY)),
            lambda coordinator: coordinator.sign().model_copy(update={"not_after": NOW + 9 * DAY}),
            lambda _: Coordinator().sign(),
        ],
        ids=[
            "unsigned",
            "altered",
            "other-federation",
            "expired",
            "early",
            "too-long",
            "prolonged",
            "other-key",
        ],
    )
    def test_no_keys_for_a_job_that_the_coordinator_did_not_sign_so(
        self,
        forge: Callable[[Coordinator], JobAuthorisation | None],
        joined: Federation,
        coordinator: Coordinator,
        training: Training,
    ) -> None:
        site = hospitals(joined)[0]
        site.kinds()  # the ledger is there
        before = site.kept()
        asked = KeysQuestion(session=joined.session(), job=JOB, authorisation=forge(coordinator))
        assert text_of(site.answer("keys", pack_record(asked))) == "refused: signature"
        (entry,) = site.entries()
        assert isinstance(entry, Refused)
        assert (entry.job, entry.code, entry.rule) == (JOB.sha256, "signature", "signature")
        assert not list(site.home.sessions().folder.glob("*.key"))
        assert training.sites == []
        after = site.kept()
        assert before.keys() == after.keys()
        changed = {Path(name).name for name in after if after[name] != before[name]}
        assert changed <= LEDGER_FILES

    def test_the_same_question_with_the_signature_gets_keys(self, joined: Federation) -> None:
        asked = KeysQuestion(session=joined.session(), job=JOB, authorisation=joined.authorisation)
        site = hospitals(joined)[0]
        assert not text_of(site.answer("keys", pack_record(asked))).startswith("refused")
        assert site.entries() == []

    def test_a_signature_that_is_taken_away_after_the_keys_ends_it_before_the_training(
        self, joined: Federation, training: Training
    ) -> None:
        run = joined.run(joined.session(), before="update")
        joined.authorisation = None
        site = hospitals(joined)[0]
        content = question(joined, "update", run.sums[0].questions["east"])
        assert text_of(site.answer("update", content)) == "refused: signature"
        assert site.kinds() == ["refused"]
        assert training.sites == []

    def test_a_finished_job_that_is_played_again_costs_nothing(
        self, joined: Federation, training: Training
    ) -> None:
        places = [(number, phase) for number in (1, 2) for phase in PHASES]
        for number, phase in places:
            joined.run(joined.session(number, phase=phase))
        site = hospitals(joined)[0]
        assert "closed" in site.kinds()
        before, trained = site.kept(), len(training.sites)
        for number, phase in places:
            for attempt in (1, 2):
                session = joined.session(number, attempt, phase)
                asked = KeysQuestion(session=session, job=JOB, authorisation=joined.authorisation)
                assert text_of(site.answer("keys", pack_record(asked))) == PROTOCOL
        assert site.kept() == before
        assert len(training.sites) == trained

    def test_the_rounds_that_a_closed_job_had_left_are_refused_by_the_ledger(
        self, joined: Federation, training: Training
    ) -> None:
        joined.run(joined.session())
        site = hospitals(joined)[0]
        with closing(site.home.open_ledger()) as ledger:
            ledger.finish(JOB.sha256, "cancelled")
            spent = ledger.spending()
        before, trained = site.kinds(), len(training.sites)
        with pytest.raises(AttemptOver):
            joined.run(joined.session(2))
        assert site.kinds() == [*before, "refused"]
        assert (site.entries()[-1].code, site.entries()[-1].rule) == ("declined", "closed")
        assert len(training.sites) == trained
        with closing(site.home.open_ledger()) as ledger:
            assert ledger.spending() == spent


@contextmanager
def ungated(training: Training) -> Iterator[None]:
    training.gate.clear()
    try:
        yield
    finally:
        training.gate.set()


class TestLateSites:
    """A site still trains for an attempt that went on without it when the next one asks."""

    def ask_twice(self, federation: Federation, training: Training) -> Mapping[int, str]:
        site = hospitals(federation)[0]
        answers: dict[int, str] = {}
        threads: list[threading.Thread] = []
        with ungated(training):
            for attempt in (1, 2):
                session = federation.session(attempt=attempt)
                run = federation.run(session, before="update")
                asked = question(federation, "update", run.sums[0].questions["east"])

                def ask(number: int = attempt, content: RecordDict = asked) -> None:
                    answers[number] = text_of(site.answer("update", content))

                threads.append(threading.Thread(target=ask))
                threads[-1].start()
                # The second one may enter no training: it gets the time to do so.
                entered = training.entered.wait(60 if attempt == 1 else 0.5)
                assert entered or attempt == 2
                training.entered.clear()
        for thread in threads:
            thread.join(60)
        return answers

    def test_the_next_attempt_waits_and_takes_the_stored_result(
        self, federation: Federation, training: Training
    ) -> None:
        answers = self.ask_twice(federation, training)
        assert answers[1] == PROTOCOL
        assert Vector.decode(answers[2]).site == "east"
        assert training.sites == ["east"]
        assert started(hospitals(federation)[0]) == 1

    def test_without_the_lock_it_would_train_and_pay_twice(
        self, federation: Federation, training: Training, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Positive control."""
        locked = SessionStore.locked

        def lax(store: SessionStore, name: str = "sessions") -> Any:
            return nullcontext() if name.endswith(".work") else locked(store, name)

        monkeypatch.setattr(SessionStore, "locked", lax)
        self.ask_twice(federation, training)
        assert training.sites == ["east", "east"]
        assert started(hospitals(federation)[0]) == 2
