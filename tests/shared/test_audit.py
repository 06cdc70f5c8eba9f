"""Verification of evidence: honest logs pass, every tampering fails at the step that names it.

The log is written by hand here, so that it can also break rules that a real ledger keeps.
"""

import json
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.audit.claims import checklist, claims, epsilon_text, headline
from fedcmr_shared.audit.evidence import Disclosed, EarlierCheckpoint, Evidence
from fedcmr_shared.audit.report import write_report
from fedcmr_shared.audit.verify import Findings, verify
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.privacy.accounting import epsilon_from_rdp, rdp
from fedcmr_shared.privacy.merkle import MerkleTree, leaf_hash
from fedcmr_shared.schemas.ledger import (
    Admitted,
    Checkpoint,
    ClockSet,
    Closed,
    Entry,
    Leaf,
    Masked,
    Opened,
    Padding,
    Phase,
    Refused,
    Release,
    Reservation,
    Started,
    Stored,
    Unmasked,
)
from fedcmr_shared.schemas.privacy import NoiseShares

JOB, OTHER = "01" * 32, "02" * 32
TRAINED, SCORED, THIRD = "c1" * 32, "c2" * 32, "c3" * 32
TRAIN = Release(sampling_rate=0.1, noise_multiplier=2.0, steps=5)
SCORE = Release(sampling_rate=1.0, noise_multiplier=8.0, steps=1)
OPEN_SCORE = Release(sampling_rate=1.0, noise_multiplier=None, steps=1)


class Log:
    """Entries of site north under a fresh key; nothing checks them."""

    def __init__(self, **opened: Any) -> None:
        self.key = SiteKey(Ed25519PrivateKey.generate())
        self.now = 1_790_000_000_000
        self.leaves: list[Leaf] = []
        self.sequences: dict[str, int] = {}
        setting = {"epsilon": 8.0, "delta": 1e-5, "order": 6, "site": "north"} | opened
        key = setting.pop("site_key", self.key.public_key)
        self.add(Opened(at=self.now, site_key=key, secret_fingerprint="ab" * 32, **setting))

    @property
    def trusted(self) -> dict[str, str]:
        return {"north": self.key.public_key}

    def add(self, entry: Entry) -> None:
        self.leaves.append(Leaf(entry=entry, salt=secrets.token_hex(32)))

    def edit(self, index: int, **changes: Any) -> None:
        """Replace fields of an entry; the next checkpoint signs the result."""
        old = self.leaves[index]
        entry = type(old.entry).model_validate({**old.entry.model_dump(), **changes})
        self.leaves[index] = Leaf(entry=entry, salt=old.salt)

    def _next(self, job: str) -> dict[str, Any]:
        self.now += 1000
        sequence = self.sequences.get(job, 0)
        self.sequences[job] = sequence + 1
        return {"at": self.now, "job": job, "sequence": sequence}

    def admit(
        self,
        job: str,
        *,
        rounds: int = 3,
        cohorts: Sequence[str] = (TRAINED, SCORED),
        train: Release = TRAIN,
        score: Release = SCORE,
    ) -> None:
        phases: dict[Phase, Reservation] = {
            "train": Reservation(cohort=cohorts[0], release=train, starts=rounds + 1),
            "evaluate": Reservation(cohort=cohorts[1], release=score, starts=2),
        }
        self.add(
            Admitted(
                **self._next(job),
                name=f"job-{job[:2]}",
                coordinator="coordinator",
                model="cardiomm",
                part="decoder",
                rounds=rounds,
                spare_rounds=1,
                clip_norm=1.0,
                clipping="flat",
                delta=1e-5,
                policy="0f" * 32,
                phases=phases,
            )
        )

    def round(self, job: str, number: int, phase: Phase = "train") -> None:
        place = {"phase": phase, "round": number, "attempt": 1}
        self.add(Started(**self._next(job), **place))
        self.add(Stored(**self._next(job), **place, sha256="5a" * 32))

    def open_sum(self, job: str, number: int, phase: Phase = "train", attempts: int = 1) -> None:
        place = {"phase": phase, "round": number}
        for attempt in range(1, attempts + 1):
            self.add(Masked(**self._next(job), **place, attempt=attempt, header="4d" * 32))
        opened = {"survivors": ("east", "north", "south"), "answer": "5b" * 32}
        self.add(Unmasked(**self._next(job), **place, **opened, attempt=attempts))

    def close(self, job: str) -> None:
        self.add(Closed(**self._next(job), outcome="finished"))

    def run(self, job: str, rounds: int = 3, **admission: Any) -> None:
        self.admit(job, rounds=rounds, **admission)
        for number in range(1, rounds + 1):
            self.round(job, number)
        self.round(job, rounds, "evaluate")
        self.close(job)

    @property
    def tree(self) -> MerkleTree:
        return MerkleTree(leaf_hash(leaf.content()) for leaf in self.leaves)

    def checkpoint(self, size: int | None = None, key: SiteKey | None = None) -> Checkpoint:
        size = len(self.leaves) if size is None else size
        root = self.tree.root(size).hex()
        unsigned = Checkpoint(site="north", size=size, root=root, at=self.now, signature="0" * 128)
        signature = (key or self.key).sign(unsigned.signed_bytes())
        return unsigned.model_copy(update={"signature": signature})

    def evidence(self, job: str | None = None, earlier: Sequence[int] = ()) -> Evidence:
        tree = self.tree
        disclosed = []
        for index, leaf in enumerate(self.leaves):
            own = getattr(leaf.entry, "job", None) == job and leaf.entry.kind != "refused"
            if job is None or index == 0 or own or leaf.entry.kind == "clock-set":
                nodes = [] if job is None else tree.inclusion_proof(index, tree.size)
                proof = tuple(node.hex() for node in nodes)
                content = leaf.content().decode()
                disclosed.append(Disclosed(index=index, content=content, proof=proof))
        return Evidence(
            scope="ledger" if job is None else "job",
            job=job,
            site="north",
            public_key=self.key.public_key,
            software="test",
            checkpoint=self.checkpoint(),
            leaves=tuple(disclosed),
            earlier=tuple(
                EarlierCheckpoint(
                    checkpoint=self.checkpoint(size),
                    proof=tuple(n.hex() for n in tree.consistency_proof(size, tree.size)),
                )
                for size in earlier
            ),
        )


@pytest.fixture
def log() -> Log:
    """Two closed jobs of ten entries each, between them what belongs to no job: 23 leaves."""
    log = Log()
    log.run(JOB)
    log.add(Refused(at=log.now, job="03" * 32, code="model", rule="models"))
    log.add(Padding(at=log.now))
    log.run(OTHER, cohorts=(TRAINED, THIRD))
    assert len(log.leaves) == 23
    return log


def check(evidence: Evidence, trusted: dict[str, str]) -> Findings:
    findings = verify(evidence, trusted)
    assert [step.number for step in findings.steps] == list(range(1, 12))
    return findings


def refusal(evidence: Evidence, trusted: dict[str, str]) -> str:
    """Name of the failed step; nothing after it ran, no figure is given."""
    findings = check(evidence, trusted)
    failed = findings.failed
    assert failed is not None
    assert findings.account is None
    assert not findings.complete
    assert claims(findings) == ()
    assert "proves nothing" in headline(findings)
    assert all(step.passed is None for step in findings.steps[failed.number :])
    assert all(step.passed for step in findings.steps[: failed.number - 1])
    with pytest.raises(LedgerError, match=f"^step {failed.number}, {failed.name}, failed: "):
        findings.require()
    return failed.name


def changed(evidence: Evidence, **changes: Any) -> Evidence:
    return Evidence.model_validate({**evidence.model_dump(), **changes})


def with_leaf(evidence: Evidence, place: int, edit: Callable[[dict[str, Any]], None]) -> Evidence:
    """Edit the content of one disclosed leaf, written canonically again."""
    leaves = list(evidence.leaves)
    content = json.loads(leaves[place].content)
    edit(content)
    text = Leaf.model_validate(content).content().decode()
    leaves[place] = leaves[place].model_copy(update={"content": text})
    return changed(evidence, leaves=tuple(leaf.model_dump() for leaf in leaves))


def without(evidence: Evidence, *places: int) -> Evidence:
    leaves = [d.model_dump() for i, d in enumerate(evidence.leaves) if i not in places]
    return changed(evidence, leaves=tuple(leaves))


def weaker_noise(content: dict[str, Any]) -> None:
    content["entry"]["phases"]["train"]["release"]["noise_multiplier"] = 4.0


def other_salt(content: dict[str, Any]) -> None:
    content["salt"] = "00" * 32


def later(content: dict[str, Any]) -> None:
    content["entry"]["at"] += 1


scopes = pytest.mark.parametrize("job", [None, OTHER], ids=["ledger", "job"])


@scopes
def test_an_honest_bundle_passes_every_step(log: Log, job: str | None) -> None:
    findings = check(log.evidence(job, earlier=[1, 7, 22, 23]), log.trusted)
    assert [step.passed for step in findings.steps] == [True] * 11
    assert findings.complete
    account = findings.require()
    assert [item.job for item in account.jobs] == ([JOB, OTHER] if job is None else [OTHER])
    assert [item.outcome for item in account.jobs] == ["finished"] * len(account.jobs)


def test_figures_are_those_of_the_started_rounds(log: Log) -> None:
    account = check(log.evidence(), log.trusted).require()
    trained, scored = rdp(TRAIN, 6), rdp(SCORE, 6)
    by_cohort = {cohort.cohort: cohort.figures.rdp for cohort in account.cohorts}
    expected = {TRAINED: 6 * trained, SCORED: scored, THIRD: scored}
    assert by_cohort == pytest.approx(expected)
    assert account.worst.filter_epsilon == pytest.approx(epsilon_from_rdp(6 * trained, 6, 1e-5))
    assert account.everything.rdp == pytest.approx(6 * trained + 2 * scored)
    assert account.jobs[0].figures.rdp == pytest.approx(3 * trained + scored)
    for job in account.jobs:
        figures = job.figures
        assert 0 < figures.pld_epsilon < figures.filter_epsilon
        assert figures.prv_epsilon == pytest.approx(figures.pld_epsilon, abs=0.02)


def test_an_open_job_is_charged_all_that_it_reserved() -> None:
    log = Log()
    log.admit(JOB, rounds=5)
    log.round(JOB, 1)
    findings = check(log.evidence(JOB), log.trusted)
    account = findings.require()
    assert not findings.complete
    completeness = findings.steps[3]
    assert "complete only up to entry 2 of the job, still open" in completeness.text
    assert account.cohorts[0].figures.rdp == pytest.approx(6 * rdp(TRAIN, 6))
    assert any("is open: it is charged all that it reserved" in text for text in claims(findings))


@settings(max_examples=10)
@given(hidden=st.integers(1, 9))
def test_entries_hidden_at_the_end_of_a_job_never_lower_a_figure(hidden: int) -> None:
    log = Log()
    log.run(JOB)
    whole = check(log.evidence(JOB), log.trusted).require()
    places = range(len(log.leaves) - hidden, len(log.leaves))
    findings = check(without(log.evidence(JOB), *places), log.trusted)
    assert not findings.complete
    assert findings.require().worst.rdp > whole.worst.rdp
    assert findings.require().everything.rdp > whole.everything.rdp


def test_opened_sums_are_shown_and_cost_nothing() -> None:
    plain, summed = Log(), Log()
    plain.run(JOB)
    summed.admit(JOB)
    for number in (1, 2, 3):
        summed.round(JOB, number)
        summed.open_sum(JOB, number, attempts=number)
    summed.round(JOB, 3, "evaluate")
    summed.close(JOB)
    summed.open_sum(JOB, 3, "evaluate")
    for scope in (None, JOB):
        findings = check(summed.evidence(scope), summed.trusted)
        assert findings.complete
        (job,) = findings.require().jobs
        assert [(entry.phase, entry.round, entry.attempt) for entry in job.opened] == [
            ("train", 1, 1),
            ("train", 2, 2),
            ("train", 3, 3),
            ("evaluate", 3, 1),
        ]
        text = "helped to open 4 secure sums, each over at least 3 sites"
        assert text in " ".join(claims(findings))
        without_sums = check(plain.evidence(scope), plain.trusted).require()
        assert job.figures == without_sums.jobs[0].figures
    assert "secure sum" not in " ".join(claims(check(plain.evidence(), plain.trusted)))


def test_sums_hidden_after_the_end_of_a_job_leave_its_figures_complete() -> None:
    log = Log()
    log.run(JOB)
    log.open_sum(JOB, 3)
    whole = check(log.evidence(JOB), log.trusted)
    part = check(without(log.evidence(JOB), len(log.leaves) - 1), log.trusted)
    assert whole.complete
    assert part.complete
    assert "entry 9 closes it" in whole.steps[3].text
    assert part.require().worst == whole.require().worst


@scopes
def test_a_second_sum_of_a_round_under_the_trusted_key_fails_the_replay(job: str | None) -> None:
    job = job and JOB
    log = Log()
    log.run(JOB)
    log.open_sum(JOB, 2)
    assert check(log.evidence(job), log.trusted).failed is None
    log.open_sum(JOB, 2)
    assert refusal(log.evidence(job), log.trusted) == "replay"


def test_claims_name_unit_relation_filter_and_hospitals(log: Log) -> None:
    findings = check(log.evidence(), log.trusted)
    text = " ".join(claims(findings))
    for words in (
        "unit is the patient",
        "relation is zero-out",
        "filter: valid although later jobs depend on earlier results",
        "PLD: had all jobs been fixed in advance",
        "Rényi order 6",
        "δ = 1e-5",
        "for a patient known to several, their figures add up",
        "in all 3 of them",
    ):
        assert words in text
    everybody = findings.require().everything.filter_epsilon
    assert f"no patient more than ε = {epsilon_text(everybody)}" in headline(findings)
    assert "ask for the whole ledger" not in text
    assert "ask for the whole ledger" in " ".join(claims(check(log.evidence(JOB), log.trusted)))


def test_figures_without_noise_are_named_in_words() -> None:
    log = Log()
    log.run(JOB, score=OPEN_SCORE)
    findings = check(log.evidence(), log.trusted)
    (job,) = findings.require().jobs
    assert [phase.phase for phase in job.without_noise] == ["evaluate"]
    assert job.figures.rdp == pytest.approx(3 * rdp(TRAIN, 6))
    text = " ".join(claims(findings))
    assert "released sums of scores (evaluate) without noise, once: no ε covers them" in text
    assert "without noise are not covered" in headline(findings)


def test_what_distributed_noise_presumes_is_said_in_words(tmp_path: Path) -> None:
    shares = NoiseShares(levels=2**18, sites=3, unseen_sites=1)
    train = Release(sampling_rate=0.1, noise_multiplier=1.0, steps=1, distributed=shares)
    log = Log()
    log.admit(JOB, train=train)
    log.admit(OTHER, train=train.model_copy(update={"distributed": None}))
    log.round(JOB, 1)
    log.open_sum(JOB, 1)
    findings = check(log.evidence(), log.trusted)
    account = findings.require()
    assert "only if secure aggregation does and enough of the sites are" in headline(findings)
    (said,) = (sentence for sentence in claims(findings) if "share of the noise" in sentence)
    assert said == (
        "Job job-01 (010101010101): each site added only its share of the noise. The ε holds only "
        "if secure aggregation holds and at most 1 of the at least 3 sites in a sum work with the "
        "coordinator. Whoever sees this site's update alone is not covered, and figures by PLD and "
        "PRV do not exist."
    )
    items = {item.name: item.text for item in checklist(findings)}
    assert "the claim says whom it trusts instead" in items["Threat model"]
    assert "discrete Gaussian" in items["Mechanism"]
    assert "not computed by PLD" in items["Epsilon"]
    assert any("Beside it no other figure" in sentence for sentence in claims(findings))
    # Its own figures by PLD are missing, and with them those of whoever was in both jobs.
    shared, own = account.jobs
    assert (shared.figures.pld_epsilon, shared.figures.prv_epsilon) == (None, None)
    assert own.figures.pld_epsilon is not None
    assert account.everything.pld_epsilon is account.worst.pld_epsilon is None
    # The certified figure is that of the same noise added by a site itself.
    assert shared.figures.filter_epsilon == own.figures.filter_epsilon
    page = write_report(findings, tmp_path / "page.html").read_text()
    assert page.count("σ = 1, shared by 3 sites less 1") == 2
    assert 'class="curve pld"' not in page
    assert page.count('class="bar-pld" x="300"') == 1


def test_whole_noise_presumes_no_other_site(log: Log, tmp_path: Path) -> None:
    findings = check(log.evidence(), log.trusted)
    text = " ".join([headline(findings), *claims(findings)])
    text += " ".join(item.text for item in checklist(findings))
    assert "share of the noise" not in text
    assert "Sites shared" not in text
    assert "share the noise" not in text
    page = write_report(findings, tmp_path / "page.html").read_text()
    assert 'class="curve pld"' in page


def test_a_bound_over_all_cohorts_above_the_budget_is_said_to_be_unproven() -> None:
    log = Log(epsilon=3.0)
    log.run(JOB, rounds=10, cohorts=(TRAINED, TRAINED))
    log.run(OTHER, rounds=10, cohorts=(SCORED, SCORED))
    log.run("03" * 32, rounds=10, cohorts=(THIRD, THIRD))
    findings = check(log.evidence(), log.trusted)
    account = findings.require()
    assert account.worst.filter_epsilon < 3 < account.everything.filter_epsilon
    assert "which this bundle cannot show" in " ".join(claims(findings))
    assert "a patient of one cohort at most" in headline(findings)


@scopes
@pytest.mark.parametrize("edit", [weaker_noise, other_salt, later])
def test_a_changed_leaf_is_not_in_the_log(
    log: Log, job: str | None, edit: Callable[[dict[str, Any]], None]
) -> None:
    evidence = log.evidence(job)
    place = next(
        i for i, leaf in enumerate(evidence.leaves) if isinstance(leaf.leaf.entry, Admitted)
    )
    assert refusal(with_leaf(evidence, place, edit), log.trusted) == "inclusion"


@scopes
def test_a_leaf_dropped_in_the_middle_is_missed(log: Log, job: str | None) -> None:
    evidence = log.evidence(job)
    assert refusal(without(evidence, 4), log.trusted) == "completeness"


def test_the_end_of_a_ledger_cannot_be_dropped(log: Log) -> None:
    evidence = log.evidence()
    assert refusal(without(evidence, len(evidence.leaves) - 1), log.trusted) == "completeness"


def test_a_foreign_leaf_is_no_entry_of_the_job(log: Log) -> None:
    evidence = log.evidence(JOB)
    foreign = log.evidence(OTHER).leaves[-1]
    leaves = (*(leaf.model_dump() for leaf in evidence.leaves), foreign.model_dump())
    assert refusal(changed(evidence, leaves=leaves), log.trusted) == "completeness"
    assert refusal(changed(evidence, leaves=leaves[:1]), log.trusted) == "completeness"


@scopes
def test_a_checkpoint_with_another_root_size_or_signature_is_not_signed(
    log: Log, job: str | None
) -> None:
    evidence = log.evidence(job)
    checkpoint = evidence.checkpoint.model_dump()
    for change in ({"root": "00" * 32}, {"size": 24}, {"at": 5}, {"signature": "00" * 64}):
        forged = changed(evidence, checkpoint={**checkpoint, **change})
        assert refusal(forged, log.trusted) == "signatures"
    stranger = SiteKey(Ed25519PrivateKey.generate())
    forged = changed(evidence, checkpoint=log.checkpoint(key=stranger).model_dump())
    assert refusal(forged, log.trusted) == "signatures"


def test_a_checkpoint_of_another_site_does_not_count(log: Log) -> None:
    evidence = log.evidence()
    checkpoint = evidence.checkpoint.model_copy(update={"site": "south"})
    signature = log.key.sign(checkpoint.signed_bytes())
    moved = {**checkpoint.model_dump(), "signature": signature}
    assert refusal(changed(evidence, checkpoint=moved), log.trusted) == "signatures"


@scopes
def test_a_fork_is_inconsistent_with_an_earlier_checkpoint(log: Log, job: str | None) -> None:
    before = log.checkpoint(12)
    log.edit(11, code="declined")  # an entry of no job, after which the log is signed again
    forked = log.evidence(job, earlier=[12])
    proof = forked.earlier[0].proof
    earlier = ({"checkpoint": before.model_dump(), "proof": proof},)
    assert refusal(changed(forked, earlier=earlier), log.trusted) == "consistency"
    assert check(forked, log.trusted).failed is None


def test_a_pair_of_checkpoints_needs_its_own_proof(log: Log) -> None:
    evidence = log.evidence(earlier=[7, 12])
    first, second = (item.model_dump() for item in evidence.earlier)
    swapped = {**first, "proof": second["proof"]}
    assert refusal(changed(evidence, earlier=(swapped,)), log.trusted) == "consistency"


def test_the_newest_checkpoint_cannot_be_replaced_by_an_older_one(log: Log) -> None:
    evidence = log.evidence(JOB)
    newest = {"checkpoint": evidence.checkpoint.model_dump(), "proof": ()}
    older = log.checkpoint(12).model_dump()
    assert refusal(changed(evidence, checkpoint=older), log.trusted) == "inclusion"
    shorter = Log()
    shorter.key, shorter.leaves = log.key, log.leaves[:12]
    replayed = changed(shorter.evidence(JOB), earlier=(newest,))
    assert refusal(replayed, log.trusted) == "consistency"
    assert refusal(changed(log.evidence(), checkpoint=older), log.trusted) == "format"


@scopes
def test_only_the_auditors_own_key_counts(log: Log, job: str | None) -> None:
    evidence = log.evidence(job)
    assert refusal(evidence, {}) == "trust"
    assert refusal(evidence, {"south": log.key.public_key}) == "trust"
    assert refusal(evidence, {"north": "00" * 32}) == "trust"
    # The same edit signed again: whoever has no trusted key cannot help it.
    log.key = SiteKey(Ed25519PrivateKey.generate())
    trusted = {"north": evidence.public_key}
    assert refusal(log.evidence(job), trusted) == "trust"
    pretended = changed(log.evidence(job), public_key=evidence.public_key)
    assert refusal(pretended, trusted) == "signatures"


@pytest.mark.parametrize(
    "opened", [{"site": "south"}, {"site_key": "00" * 32}, {"order": 5000}], ids=lambda o: min(o)
)
def test_the_ledger_was_opened_by_this_key_with_a_usable_order(opened: dict[str, Any]) -> None:
    log = Log(**opened)
    assert refusal(log.evidence(), log.trusted) == "opened"


def test_the_opening_entry_must_be_there(log: Log) -> None:
    assert refusal(without(log.evidence(JOB), 0), log.trusted) == "completeness"
    log.leaves[0] = log.leaves[12]
    assert refusal(log.evidence(), log.trusted) == "opened"


def test_rules_broken_under_the_trusted_key_fail_the_replay(log: Log) -> None:
    breaches: list[tuple[int, dict[str, Any]]] = [
        (2, {"attempt": 2}),
        (4, {"round": 9}),
        (5, {"attempt": 7}),
        (6, {"round": 1}),
        (12, {"at": 1}),
        (20, {"job": "07" * 32}),
    ]
    for index, change in breaches:
        broken = Log()
        broken.key, broken.leaves = log.key, list(log.leaves)
        broken.edit(index, **change)
        assert refusal(broken.evidence(), log.trusted) == "replay", (index, change)


def test_a_gap_in_the_sequence_under_the_trusted_key_is_found(log: Log) -> None:
    del log.leaves[5]
    assert refusal(log.evidence(), log.trusted) == "replay"
    assert refusal(log.evidence(JOB), log.trusted) == "completeness"


@scopes
def test_a_budget_exceeded_under_the_trusted_key_is_found(log: Log, job: str | None) -> None:
    log.edit(0, epsilon=3.0)
    assert check(log.evidence(job), log.trusted).failed is None
    admitted = log.leaves[13].entry.model_dump()
    admitted["phases"]["train"]["starts"] = 90
    log.edit(13, phases=admitted["phases"])
    assert refusal(log.evidence(job), log.trusted) == "budget"


def test_two_jobs_that_fit_alone_but_not_together_are_found() -> None:
    log = Log(epsilon=4.0)
    for job in (JOB, OTHER):
        log.admit(job, rounds=39)
        assert check(log.evidence(job), log.trusted).failed is None
    assert refusal(log.evidence(), log.trusted) == "budget"


def test_a_clock_set_back_is_part_of_a_jobs_evidence(log: Log) -> None:
    job = "03" * 32
    log.leaves.pop(11)
    log.admit(job)
    log.now -= 500_000
    log.add(ClockSet(at=log.now))
    log.round(job, 1)
    evidence = log.evidence(job)
    assert check(evidence, log.trusted).failed is None
    kinds = [leaf.leaf.entry.kind for leaf in evidence.leaves]
    assert kinds == ["opened", "admitted", "clock-set", "started", "stored"]
    assert refusal(without(evidence, 2), log.trusted) == "replay"


@pytest.mark.parametrize("noise", [1e-200, 1e200])
def test_numbers_beyond_arithmetic_are_refused_not_crashed_on(noise: float) -> None:
    log = Log()
    log.admit(JOB, train=Release(sampling_rate=0.1, noise_multiplier=noise, steps=10**400))
    assert refusal(log.evidence(), log.trusted) in ("budget", "figures")


def test_a_budget_that_no_filter_can_certify_is_refused() -> None:
    log = Log(epsilon=0.01, order=2)
    assert refusal(log.evidence(), log.trusted) == "budget"
