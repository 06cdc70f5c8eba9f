"""What the governance service does for whom it has admitted, and what it refuses."""

import hashlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
from governance_parties import (
    DEADLINE_S,
    SITES,
    Coordinator,
    History,
    Party,
    coordinator,
    draw_identity,
    long_ago,
)
from sqlalchemy import update

from fedcmr_client import governance
from fedcmr_client.governance import Governance
from fedcmr_server.governance import checkpoints, evidence_files, renewal, service
from fedcmr_server.governance.checkpoints import Contradiction, is_new
from fedcmr_server.governance.limits import AT_ONCE
from fedcmr_server.governance.releases import CHUNK, ReleaseFiles
from fedcmr_server.governance.renewal import require_renewable
from fedcmr_server.store import (
    Certificates,
    Checkpoints,
    Events,
    Jobs,
    Members,
    Releases,
    StoreUnreachable,
)
from fedcmr_server.store.tables import JobRow, ReleaseRow
from fedcmr_shared.audit.cosignature import cosign
from fedcmr_shared.audit.evidence import Disclosed, Evidence
from fedcmr_shared.errors import (
    ConnectionProblem,
    DataError,
    FederationError,
)
from fedcmr_shared.governance import governance_pb2 as pb
from fedcmr_shared.identity.certificates import (
    Member,
    certificate_request,
    member_of,
    new_key,
    read_certificate,
)
from fedcmr_shared.identity.roster_history import verify_history
from fedcmr_shared.models.card import GateResult
from fedcmr_shared.models.refusal import ReleaseRefusal
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Leaf, Opened, Started
from fedcmr_shared.schemas.receipt import Receipt
from fedcmr_shared.schemas.signed_job import JobAuthorisation, require_signed


@pytest.fixture
def running() -> Iterator[Coordinator]:
    with coordinator() as running:
        yield running


@pytest.fixture
def sites(running: Coordinator) -> dict[str, Party]:
    return {name: running.join(name) for name in SITES}


@pytest.fixture
def alder(running: Coordinator, sites: dict[str, Party]) -> Iterator[Governance]:
    with running.as_member(sites["alder"]) as governance:
        yield governance


@pytest.fixture
def birch(running: Coordinator, sites: dict[str, Party]) -> Iterator[Governance]:
    with running.as_member(sites["birch"]) as governance:
        yield governance


@pytest.fixture
def auditor(running: Coordinator) -> Iterator[Governance]:
    with running.as_member(running.join("office", "auditor")) as governance:
        yield governance


@pytest.fixture
def log(sites: dict[str, Party]) -> History:
    return History("alder", sites["alder"].identity)


# Renewal


def request_of(party: Party, name: str | None = None) -> str:
    return certificate_request(party.key, Member("site", name or party.name))


def test_a_certificate_is_renewed_in_its_last_days(running: Coordinator) -> None:
    party = running.join("dogwood", now=long_ago(365 - renewal.RENEWAL_DAYS + 1))
    with running.as_member(party) as governance:
        # Of the request the key alone counts.
        renewed = read_certificate(governance.renew(request_of(party, "somebody-else")))
        assert member_of(renewed) == party.member
        governance.roster_history()  # the old one still passes
        governance.renew(request_of(party))  # and may ask again: the answer may have been lost
    assert renewed.not_valid_after_utc > datetime.now(UTC) + timedelta(days=300)
    states = sorted(row.state for row in Certificates(running.store).of(party.name))
    assert states == ["active", "replaced", "replaced"]


def test_a_renewed_certificate_passes(running: Coordinator) -> None:
    party = running.join("dogwood", now=long_ago(330))
    with running.as_member(party) as governance:
        renewed = governance.renew(request_of(party))
    newest = Party(party.member, party.identity, party.key, renewed)
    with running.as_member(newest) as governance:
        assert governance.roster_history() == []


def test_a_fresh_certificate_is_renewed_for_a_new_key_alone(
    alder: Governance, sites: dict[str, Party]
) -> None:
    with pytest.raises(FederationError, match="more days: it is renewed in its last"):
        alder.renew(request_of(sites["alder"]))
    alder.renew(certificate_request(new_key(), sites["alder"].member))


def test_what_is_no_request_is_refused(alder: Governance) -> None:
    with pytest.raises(FederationError, match="not a certificate request"):
        alder.renew("hello")


def test_a_few_renewals_a_day_are_enough(alder: Governance, sites: dict[str, Party]) -> None:
    for _ in range(renewal.MOST_A_DAY - 1):
        alder.renew(certificate_request(new_key(), sites["alder"].member))
    with pytest.raises(FederationError, match="within a day"):
        alder.renew(certificate_request(new_key(), sites["alder"].member))


def test_renewal_by_the_rule() -> None:
    require_renewable(60, new_key=False, issued_today=0)
    require_renewable(300, new_key=True, issued_today=4)
    for days, new, issued in ((61, False, 0), (10, False, 5), (300, True, 5)):
        with pytest.raises(FederationError):
            require_renewable(days, new_key=new, issued_today=issued)


def test_an_unusable_authority_is_a_matter_of_the_coordinator(
    running: Coordinator, alder: Governance, sites: dict[str, Party]
) -> None:
    (running.home.keys / "authority.pem").write_text("gone")
    with pytest.raises(FederationError, match="tell its operator") as error:
        alder.renew(certificate_request(new_key(), sites["alder"].member))
    assert "authority.pem" not in str(error.value)


# Roster and jobs


def test_the_roster_s_history_comes_whole(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator, alder: Governance
) -> None:
    monkeypatch.setattr(service, "PAGE", 1)
    running.roster()
    running.join("dogwood")
    running.roster()
    history = alder.roster_history()
    assert [version.number for version in history] == [1, 2]
    verify_history(history, running.home.identity().public_key)


def job(name: str = "heart") -> JobSpec:
    return JobSpec(name=name, rounds=2, aggregation="plain_with_local_dp")


def submit(running: Coordinator, spec: JobSpec) -> str:
    period = (long_ago(1), long_ago(-1))
    home = running.home
    signed = JobAuthorisation.sign(spec, home.federation_sha256, period, home.identity())
    Jobs(running.store).submit(spec, signed, None)
    return spec.sha256


def test_jobs_come_with_their_signatures(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator, alder: Governance
) -> None:
    monkeypatch.setattr(service, "PAGE", 2)
    specs = [job(f"heart-{number}") for number in range(5)]
    for spec in specs:
        submit(running, spec)
    Jobs(running.store).submit(job("unsigned"), None, None)
    listed = alder.jobs()
    assert [each.spec for each in listed[:5]] == specs
    pinned = (running.home.federation_sha256, running.home.identity().public_key)
    for each in listed[:5]:
        require_signed(each.spec, each.authorisation, pinned, datetime.now(UTC))
    assert (listed[5].authorisation, listed[5].state) == (None, "submitted")


# Checkpoints


def test_published_checkpoints_come_with_proofs_and_cosignatures(
    alder: Governance, birch: Governance, sites: dict[str, Party], log: History
) -> None:
    sizes = (8, 16, 32)
    for old, new in zip((0, 8, 16), sizes, strict=True):
        alder.put_checkpoint(log.head(new), old, log.proof(old, new))
    alder.put_checkpoint(log.head(32), 16, log.proof(16, 32))  # again: the answer may be lost
    signature = cosign(sites["birch"].identity, log.head(16))
    birch.put_cosignature(log.head(16), signature)
    listed = birch.checkpoints("alder", after=8)
    assert [each.checkpoint.size for each in listed.published] == [16, 32]
    assert [each.proof for each in listed.published] == [
        tuple(log.proof(8, 16)),
        tuple(log.proof(16, 32)),
    ]
    assert listed.published[0].checkpoint.cosignatures == {
        sites["birch"].identity.public_key: signature
    }
    assert listed.refused == ()


def test_long_lists_of_checkpoints_come_whole(
    monkeypatch: pytest.MonkeyPatch, alder: Governance, log: History
) -> None:
    monkeypatch.setattr(service, "PAGE", 2)
    for size in range(1, 6):
        alder.put_checkpoint(log.head(size), size - 1, log.proof(size - 1, size))
    found = alder.checkpoints("alder").published
    assert [each.checkpoint.size for each in found] == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_the_site_did_not_sign_is_not_kept(
    running: Coordinator, alder: Governance, log: History
) -> None:
    forged = History("alder", draw_identity()).head(8)
    changed = log.head(8).model_copy(update={"at": 5})
    for checkpoint in (forged, changed):
        with pytest.raises(FederationError, match="not that of key"):
            alder.put_checkpoint(checkpoint, 0, [])
    assert Checkpoints(running.store).of("alder") == []


def test_a_site_publishes_for_itself_alone(birch: Governance, log: History) -> None:
    with pytest.raises(FederationError, match="birch publishes its own"):
        birch.put_checkpoint(log.head(8), 0, [])


def test_what_is_no_checkpoint_is_refused(running: Coordinator, sites: dict[str, Party]) -> None:
    with running.stub() as stub, pytest.raises(grpc.RpcError) as error:
        stub.PutCheckpoint(
            pb.PutCheckpointRequest(checkpoint='{"site": 1}'),
            timeout=DEADLINE_S,
            metadata=sites["alder"].metadata,
        )
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "checkpoint: site:" in error.value.details()


def test_two_histories_are_refused_and_kept_as_evidence(
    running: Coordinator, alder: Governance, birch: Governance, log: History
) -> None:
    alder.put_checkpoint(log.head(8), 0, [])
    alder.put_checkpoint(log.head(16), 8, log.proof(8, 16))
    other = History("alder", log.identity, "otherwise")
    for head, since, proof in (
        (other.head(16), 8, other.proof(8, 16)),  # two of one size
        (other.head(32), 16, other.proof(16, 32)),  # does not begin with the published one
        (log.head(12), 8, log.proof(8, 12)),  # less than was published
    ):
        with pytest.raises(FederationError):
            alder.put_checkpoint(head, since, proof)
    listed = birch.checkpoints("alder")
    assert [each.checkpoint.size for each in listed.published] == [8, 16]
    assert {head.size for head in listed.refused} == {12, 16, 32}
    ((first, second),) = Checkpoints(running.store).contradictions("alder")
    assert (first.size, second.size) == (16, 16)
    # The published history goes on.
    alder.put_checkpoint(log.head(32), 16, log.proof(16, 32))


def test_refused_heads_do_not_fill_the_database(
    running: Coordinator, alder: Governance, log: History
) -> None:
    alder.put_checkpoint(log.head(8), 0, [])
    for number in range(checkpoints.MOST_REFUSED + 3):
        with pytest.raises(FederationError, match="two histories"):
            alder.put_checkpoint(History("alder", log.identity, str(number)).head(8), 0, [])
    assert len(alder.checkpoints("alder").refused) == checkpoints.MOST_REFUSED


def test_a_head_that_came_with_a_wrong_proof_may_come_again(
    alder: Governance, log: History
) -> None:
    alder.put_checkpoint(log.head(8), 0, [])
    with pytest.raises(FederationError, match="does not begin with"):
        alder.put_checkpoint(log.head(16), 8, [])
    alder.put_checkpoint(log.head(16), 8, log.proof(8, 16))
    listed = alder.checkpoints("alder")
    assert [each.checkpoint.size for each in listed.published] == [8, 16]
    assert listed.refused == ()


def test_a_proof_from_another_head_is_no_fork(alder: Governance, log: History) -> None:
    alder.put_checkpoint(log.head(8), 0, [])
    alder.put_checkpoint(log.head(16), 8, log.proof(8, 16))
    with pytest.raises(FederationError, match="covers 16 entries, the proof begins at 8"):
        alder.put_checkpoint(log.head(32), 8, log.proof(8, 32))
    assert alder.checkpoints("alder").refused == ()


def test_a_site_with_a_new_key_begins_a_new_chain(
    running: Coordinator, alder: Governance, log: History
) -> None:
    alder.put_checkpoint(log.head(64), 0, [])
    Members(running.store).end("alder", "revoked", "disk lost")
    again = running.join("alder", node_key="another")
    with running.as_member(again) as governance:
        new = History("alder", again.identity, "new")
        governance.put_checkpoint(new.head(8), 0, [])
        assert [c.checkpoint.size for c in governance.checkpoints("alder").published] == [8]


def test_the_rule_of_one_history() -> None:
    log = History("alder", draw_identity())
    published = [log.head(8), log.head(16)]
    assert is_new([], log.head(8), 0, [])
    assert is_new(published, log.head(32), 16, log.proof(16, 32))
    assert not is_new(published, log.head(8), 0, [])
    with pytest.raises(Contradiction):
        is_new(published, log.head(32), 16, log.proof(8, 32))
    with pytest.raises(FederationError):
        is_new([], log.head(8), 4, [])


def test_cosignatures_that_say_nothing_are_refused(
    running: Coordinator,
    alder: Governance,
    birch: Governance,
    sites: dict[str, Party],
    log: History,
) -> None:
    head = log.head(8)
    alder.put_checkpoint(head, 0, [])
    with pytest.raises(FederationError, match="does not cosign its own"):
        alder.put_cosignature(head, cosign(sites["alder"].identity, head))
    with pytest.raises(FederationError, match="not that of key"):
        birch.put_cosignature(head, cosign(sites["cedar"].identity, head))
    with pytest.raises(FederationError, match="no such checkpoint of 16"):
        birch.put_cosignature(log.head(16), cosign(sites["birch"].identity, log.head(16)))
    other = History("alder", log.identity, "otherwise").head(8)
    with pytest.raises(FederationError, match="no such checkpoint of 8"):
        birch.put_cosignature(other, cosign(sites["birch"].identity, other))
    with pytest.raises(FederationError, match="no site is called nowhere"):
        birch.checkpoints("nowhere")
    assert birch.checkpoints("alder").published[0].checkpoint.cosignatures == {}


# Receipts


def started(spec: str, number: int = 1, attempt: int = 1) -> Started:
    return Started(at=0, job=spec, sequence=1, phase="train", round=number, attempt=attempt)


def test_receipts_are_kept_by_job(
    monkeypatch: pytest.MonkeyPatch,
    running: Coordinator,
    alder: Governance,
    birch: Governance,
    auditor: Governance,
    sites: dict[str, Party],
) -> None:
    monkeypatch.setattr(service, "PAGE", 1)
    spec = submit(running, job())
    own = [
        Receipt.sign("alder", started(spec, 1, attempt), sites["alder"].identity)
        for attempt in (1, 2)
    ]
    others = Receipt.sign("birch", started(spec), sites["birch"].identity)
    for receipt in (*own, own[0]):
        alder.put_receipt(receipt)
    birch.put_receipt(others)
    assert alder.receipts(spec) == own
    assert birch.receipts(spec) == [others]
    assert set(auditor.receipts(spec)) == {*own, others}


def test_a_receipt_says_nothing_of_how() -> None:
    receipt = Receipt.sign("alder", started("0" * 64), draw_identity())
    assert set(receipt.model_dump()) == {
        "format",
        "site",
        "job",
        "phase",
        "round",
        "attempt",
        "signature",
    }


def test_receipts_that_prove_nothing_are_refused(
    running: Coordinator, alder: Governance, sites: dict[str, Party]
) -> None:
    spec = submit(running, job())
    foreign = Receipt.sign("birch", started(spec), sites["birch"].identity)
    forged = Receipt.sign("alder", started(spec), sites["birch"].identity)
    unknown = Receipt.sign("alder", started("ab" * 32), sites["alder"].identity)
    for receipt, words in (
        (foreign, "its own receipts alone"),
        (forged, "not that of key"),
        (unknown, "no job"),
    ):
        with pytest.raises(FederationError, match=words):
            alder.put_receipt(receipt)
    assert alder.receipts(spec) == []


# Members


def test_a_report_is_a_version_and_one_word(running: Coordinator, alder: Governance) -> None:
    alder.report("quiet", "1.2.3")
    row = Members(running.store).find("alder")
    assert row is not None
    assert (row.software, row.condition) == ("1.2.3", "quiet")
    assert row.seen_at is not None
    with pytest.raises(FederationError, match="software"):
        alder.report("ready", "1.2.3 and patient 17")


@pytest.mark.parametrize("skew_s", [0.0, 90.0, -90.0])
def test_a_report_tells_how_far_the_members_clock_is_off(
    alder: Governance, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    now = service._milliseconds
    monkeypatch.setattr(service, "_milliseconds", lambda at: now(at) - int(1000 * skew_s))
    assert alder.report("ready") == pytest.approx(skew_s, abs=5)


def test_a_report_without_a_condition_is_refused(
    running: Coordinator, sites: dict[str, Party]
) -> None:
    with running.stub() as stub:
        for condition in (0, 77):
            with pytest.raises(grpc.RpcError, match="condition"):
                stub.Report(
                    pb.ReportRequest(software="1", condition=condition),
                    timeout=DEADLINE_S,
                    metadata=sites["alder"].metadata,
                )


def test_who_leaves_is_gone_and_off_the_roster(running: Coordinator, alder: Governance) -> None:
    running.join("dogwood")
    running.roster()
    alder.leave()
    with pytest.raises(ConnectionProblem, match="you left"):
        alder.roster_history()
    with running.as_member(running.join("elm")) as elm:
        assert "alder" not in elm.roster_history()[-1].roster.sites


# Evidence


def bundle(party: Party, words: str = "fedcmr 0") -> Evidence:
    first = Opened(
        at=1, site=party.name, site_key=party.identity.public_key, secret_fingerprint="ab" * 32,
        epsilon=8.0, delta=1e-5, order=6,
    )  # fmt: skip
    leaf = Leaf(entry=first, salt="cd" * 32).content().decode()
    return Evidence(
        scope="ledger",
        site=party.name,
        public_key=party.identity.public_key,
        software=words,
        checkpoint=History(party.name, party.identity).head(1),
        leaves=(Disclosed(index=0, content=leaf),),
    )


def test_evidence_reaches_the_auditor_byte_by_byte(
    running: Coordinator,
    alder: Governance,
    auditor: Governance,
    sites: dict[str, Party],
    tmp_path: Path,
) -> None:
    path, copy = tmp_path / "bundle.json", tmp_path / "copy.json"
    # Larger than a chunk.
    bundle(sites["alder"], "x" * (2 * evidence_files.CHUNK)).write(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert alder.put_evidence(path) == digest
    assert alder.put_evidence(path) == digest  # again: it is kept once
    (entry,) = auditor.evidence()
    assert (entry.site, entry.job, entry.leaves, entry.sha256) == ("alder", None, 1, digest)
    auditor.fetch_evidence(entry, copy)
    assert copy.read_bytes() == path.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []


def test_evidence_that_is_not_the_site_s_own_is_refused(
    running: Coordinator, alder: Governance, sites: dict[str, Party], tmp_path: Path
) -> None:
    own, path = bundle(sites["alder"]), tmp_path / "bundle.json"
    foreign = bundle(sites["birch"])
    forged = own.model_copy(update={"checkpoint": History("alder", draw_identity()).head(1)})
    swapped = own.model_copy(update={"public_key": sites["birch"].identity.public_key})
    for evidence, words in (
        (foreign, "step 2, trust"),
        (swapped, "step 2, trust"),
        (forged, "step 3, signatures"),
    ):
        evidence.write(path)
        with pytest.raises(FederationError, match=words):
            alder.put_evidence(path)
    path.write_text("{}")
    with pytest.raises(FederationError, match="step 1, format"):
        alder.put_evidence(path)
    assert list((running.home.folder / "evidence").rglob("*.json")) == []


def test_evidence_has_a_largest_size_and_number(
    monkeypatch: pytest.MonkeyPatch, alder: Governance, sites: dict[str, Party], tmp_path: Path
) -> None:
    path = tmp_path / "bundle.json"
    monkeypatch.setattr(evidence_files, "MOST_BUNDLES", 1)
    bundle(sites["alder"], "first").write(path)
    alder.put_evidence(path)
    bundle(sites["alder"], "second").write(path)
    with pytest.raises(FederationError, match="1 bundles of alder"):
        alder.put_evidence(path)
    monkeypatch.setattr(evidence_files, "LARGEST", path.stat().st_size - 1)
    with pytest.raises(FederationError, match="larger than"):
        alder.put_evidence(path)


def test_evidence_is_found_by_name_never_by_path(
    running: Coordinator, alder: Governance, sites: dict[str, Party], tmp_path: Path
) -> None:
    path = tmp_path / "bundle.json"
    bundle(sites["alder"]).write(path)
    digest = alder.put_evidence(path)
    office = running.join("office", "auditor")
    with running.stub() as stub:
        for site, sha256 in (
            ("alder", "0" * 64),
            ("../evidence/alder", digest),
            ("alder", f"../alder/{digest}"),
        ):
            answer = stub.GetEvidence(
                pb.GetEvidenceRequest(site=site, sha256=sha256),
                timeout=DEADLINE_S,
                metadata=office.metadata,
            )
            with pytest.raises(grpc.RpcError) as error:
                list(answer)
            assert error.value.code() == grpc.StatusCode.NOT_FOUND


# Releases


def release(running: Coordinator, content: bytes, path: str = "heart.zip") -> str:
    spec = submit(running, job(f"for-{path.rpartition('/')[2].replace('.', '-')}"))
    (running.home.releases / path).write_bytes(content)
    row = ReleaseRow(
        job=spec,
        path=path,
        sha256=hashlib.sha256(content).hexdigest(),
        size=len(content),
        signature="0" * 128,
        card="{}",
        at=datetime.now(UTC),
    )
    Releases(running.store).add(row)
    return spec


CONTENT = bytes(range(256)) * (5 * CHUNK // 256) + b"end"


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_a_release_is_listed_and_downloaded(
    running: Coordinator, alder: Governance, tmp_path: Path
) -> None:
    spec = release(running, CONTENT)
    (listed,) = alder.releases()
    assert (listed.job, listed.bytes) == (spec, len(CONTENT))
    assert alder.fetch_release(spec, tmp_path / "heart.zip") == listed
    assert (tmp_path / "heart.zip").read_bytes() == CONTENT
    assert leftovers(tmp_path) == ["heart.zip"]


# Refusals


def refuse(running: Coordinator, name: str) -> ReleaseRefusal:
    """Have a gate keep back the model of a new job ``name``."""
    spec, home = submit(running, job(name)), running.home
    gate = GateResult(gate="memorisation", passed=False, text="passed at 2 of 3 sites")
    federation = (home.settings.federation, home.federation_sha256)
    moment = datetime.now(UTC)
    refused = (spec, "cd" * 32)
    refusal = ReleaseRefusal.sign(federation, refused, gate, moment, home.identity())
    content = {**gate.model_dump(), "refusal": refusal.model_dump(mode="json")}
    Events(running.store).record(spec, "release_refused", content)
    return refusal


def test_refusals_are_listed_to_sites_and_auditors(
    running: Coordinator, alder: Governance, auditor: Governance
) -> None:
    assert alder.refusals() == auditor.refusals() == []
    unsigned = submit(running, job("before"))
    old = {"gate": "memorisation", "passed": False, "text": "an older version did not sign"}
    Events(running.store).record(unsigned, "release_refused", old)
    made = [refuse(running, name) for name in ("first", "second")]
    assert alder.refusals() == auditor.refusals() == made
    assert alder.releases() == []
    for refusal in auditor.refusals():
        refusal.verify((running.home.federation_sha256, running.home.identity().public_key))


@pytest.mark.parametrize(("released", "refused"), [(1, 3), (3, 1), (2, 2), (0, 3)])
def test_releases_and_refusals_come_in_pages_of_their_own(
    released: int,
    refused: int,
    monkeypatch: pytest.MonkeyPatch,
    running: Coordinator,
    alder: Governance,
) -> None:
    monkeypatch.setattr(service, "PAGE", 1)
    files = [release(running, b"model", f"{number}.zip") for number in range(released)]
    made = [refuse(running, f"refused-{number}") for number in range(refused)]
    # The first is also how an older client reads them, which knows one list alone.
    assert [each.job for each in alder.releases()] == files
    assert alder.refusals() == made


def test_an_older_coordinator_lists_no_refusals(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator, alder: Governance
) -> None:
    spec = release(running, CONTENT)
    refuse(running, "kept-back")
    assert alder.refusals()  # control
    # An empty list and a field that is not known are the same bytes.
    monkeypatch.setattr(ReleaseFiles, "refusals", lambda _: [])
    assert alder.refusals() == []
    assert [each.job for each in alder.releases()] == [spec]


def test_what_is_no_refusal_is_not_believed(running: Coordinator, alder: Governance) -> None:
    spec = submit(running, job("passed"))
    refusal = refuse(running, "kept-back").model_dump(mode="json")
    passed = {**refusal, "gate": {**refusal["gate"], "passed": True}}
    Events(running.store).record(spec, "release_refused", {"refusal": passed})
    with pytest.raises(FederationError, match="a ReleaseRefusal that this version does not"):
        alder.refusals()


class Breaking:
    """Lets each download break after two chunks, so many times; notes where each began."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
        self.times = times
        self.offsets: list[int] = []
        whole = ReleaseFiles.read

        def read(files: ReleaseFiles, row: ReleaseRow, offset: int) -> Iterator[bytes]:
            self.offsets.append(offset)
            for number, chunk in enumerate(whole(files, row, offset)):
                if number == 2 and self.times:
                    self.times -= 1
                    raise StoreUnreachable("broken off")
                yield chunk

        monkeypatch.setattr(ReleaseFiles, "read", read)


def test_a_broken_download_goes_on_where_it_ended(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator, alder: Governance, tmp_path: Path
) -> None:
    spec, breaking = release(running, CONTENT), Breaking(monkeypatch, 2)
    alder.fetch_release(spec, tmp_path / "heart.zip")
    assert breaking.offsets == [0, 2 * CHUNK, 4 * CHUNK]
    assert (tmp_path / "heart.zip").read_bytes() == CONTENT


def test_a_later_process_goes_on_with_a_broken_download(
    monkeypatch: pytest.MonkeyPatch,
    running: Coordinator,
    sites: dict[str, Party],
    tmp_path: Path,
) -> None:
    class Killed(BaseException):
        pass

    def die(_: float) -> None:
        raise Killed

    spec, breaking = release(running, CONTENT), Breaking(monkeypatch, 1)
    with (
        Governance(running.target, sites["alder"].metadata, wait=die) as first,
        pytest.raises(Killed),
    ):
        first.fetch_release(spec, tmp_path / "heart.zip")
    assert not (tmp_path / "heart.zip").exists()
    with running.as_member(sites["alder"]) as second:
        second.fetch_release(spec, tmp_path / "heart.zip")
    assert breaking.offsets == [0, 2 * CHUNK]
    assert (tmp_path / "heart.zip").read_bytes() == CONTENT


def test_a_download_without_progress_ends(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator, alder: Governance, tmp_path: Path
) -> None:
    def read(*_: object) -> Iterator[bytes]:
        raise StoreUnreachable("never")
        yield b""

    monkeypatch.setattr(ReleaseFiles, "read", read)
    spec = release(running, CONTENT)
    with pytest.raises(ConnectionProblem, match="does not answer"):
        alder.fetch_release(spec, tmp_path / "heart.zip")


@pytest.mark.parametrize("change", ["other", "shorter", "longer"])
def test_what_is_not_the_release_is_not_kept(
    monkeypatch: pytest.MonkeyPatch,
    running: Coordinator,
    alder: Governance,
    tmp_path: Path,
    change: str,
) -> None:
    sent = {
        "other": b"x" + CONTENT[1:],
        "shorter": CONTENT[:-1],
        "longer": CONTENT + b"x",
    }[change]

    def read(_: ReleaseFiles, row: ReleaseRow, offset: int) -> Iterator[bytes]:
        for at in range(offset, len(sent), CHUNK):
            yield sent[at : at + CHUNK]

    spec = release(running, CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(ReleaseFiles, "read", read)
        with pytest.raises(FederationError, match=r"SHA-256|more than|less than"):
            alder.fetch_release(spec, tmp_path / "heart.zip")
    assert not (tmp_path / "heart.zip").exists()
    if change == "other":
        assert leftovers(tmp_path) == []
    # Positive control: the right bytes are taken, whatever was left behind.
    alder.fetch_release(spec, tmp_path / "heart.zip")
    assert (tmp_path / "heart.zip").read_bytes() == CONTENT


def test_a_release_that_is_not_in_its_place_is_not_sent(
    running: Coordinator, alder: Governance, tmp_path: Path
) -> None:
    secret = running.home.keys / "identity.pem"
    outside = release(running, secret.read_bytes(), "../keys/identity.pem")
    changed = release(running, CONTENT, "changed.zip")
    (running.home.releases / "changed.zip").write_bytes(CONTENT + b"x")
    for spec in (outside, changed):
        with pytest.raises(FederationError, match="missing"):
            alder.fetch_release(spec, tmp_path / "heart.zip")
    with pytest.raises(FederationError, match="no such release"):
        alder.fetch_release("ab" * 32, tmp_path / "heart.zip")


def test_downloads_that_members_give_up_hold_nothing(
    running: Coordinator, alder: Governance, sites: dict[str, Party]
) -> None:
    spec = release(running, CONTENT * 20)
    with running.stub() as stub:
        for _ in range(3 * AT_ONCE):
            answer = stub.GetRelease(
                pb.GetReleaseRequest(job=spec), timeout=DEADLINE_S, metadata=sites["alder"].metadata
            )
            assert next(answer).header.job == spec
            answer.cancel()
            until_free(alder)


def until_free(alder: Governance) -> None:
    """The service notices the end of a call a moment later."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        try:
            alder.releases()
        except FederationError:
            time.sleep(0.01)
        else:
            return
    raise AssertionError("calls that were given up still count")


def test_a_file_that_is_too_large_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, running: Coordinator, alder: Governance, tmp_path: Path
) -> None:
    spec = release(running, b"short")
    monkeypatch.setattr(governance, "LARGEST_FILE", 4)
    with pytest.raises(FederationError, match="it has 5 bytes; at most 4"):
        alder.fetch_release(spec, tmp_path / "heart.zip")
    assert leftovers(tmp_path) == []


def test_an_offset_beyond_the_file_is_refused(
    running: Coordinator, sites: dict[str, Party]
) -> None:
    spec = release(running, b"short")
    with running.stub() as stub:
        answer = stub.GetRelease(
            pb.GetReleaseRequest(job=spec, offset=6),
            timeout=DEADLINE_S,
            metadata=sites["alder"].metadata,
        )
        with pytest.raises(grpc.RpcError) as error:
            list(answer)
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_a_folder_that_cannot_be_written_is_named(
    running: Coordinator, alder: Governance, tmp_path: Path
) -> None:
    spec = release(running, b"short")
    with pytest.raises(DataError, match="cannot be written"):
        alder.fetch_release(spec, tmp_path / "nowhere" / "heart.zip")
    with pytest.raises(DataError, match="cannot be read"):
        alder.put_evidence(tmp_path / "nowhere.json")


def test_answers_that_cannot_be_understood_are_refused(
    running: Coordinator, alder: Governance
) -> None:
    Jobs(running.store).submit(job(), None, None)
    with running.store.writing() as session:
        session.execute(update(JobRow).values(spec='{"name": 1}'))
    with pytest.raises(FederationError, match="JobSpec that this version does not understand"):
        alder.jobs()
