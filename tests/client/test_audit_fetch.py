"""`fedcmr audit init`, `join` and `fetch`, through a real tunnel with mutual TLS."""

import json
from collections import namedtuple
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from governance_parties import SITES, Coordinator, History, Party, coordinator, draw_identity, shown
from sqlalchemy import delete

from fedcmr_client.membership import Membership
from fedcmr_server.governance.gatekeeper import Gatekeeper
from fedcmr_server.governance.limits import CallLimits
from fedcmr_server.governance.service import Service
from fedcmr_server.store import (
    Certificates,
    Events,
    Jobs,
    Members,
    Receipts,
    Releases,
    Rosters,
)
from fedcmr_server.store.tables import EventRow, ReleaseRow
from fedcmr_shared.audit.cosignature import cosign
from fedcmr_shared.audit.evidence import Disclosed, Evidence
from fedcmr_shared.cli import main
from fedcmr_shared.governance.governance_pb2_grpc import add_GovernanceServicer_to_server
from fedcmr_shared.identity.certificates import (
    Member,
    certificate_pem,
    issue_member,
    read_certificate,
)
from fedcmr_shared.identity.enrolment import EnrolmentRequest, StartupKit, file_text
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import new_roster
from fedcmr_shared.identity.roster_history import next_version
from fedcmr_shared.models.card import GateResult
from fedcmr_shared.models.refusal import ReleaseRefusal
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Checkpoint, Leaf, Opened, Started
from fedcmr_shared.schemas.receipt import Receipt

Run = Callable[..., tuple[int, str, str]]
Details = namedtuple("Details", ("method", "invocation_metadata"))  # as gRPC's


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs `fedcmr audit` and gives exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["audit", *map(str, arguments)])
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def running() -> Iterator[Coordinator]:
    with coordinator() as running:
        yield running


class Gateway(grpc.ServerInterceptor):
    """Writes the certificate into the metadata, as nginx does after it has checked it."""

    def __init__(self, certificate: str) -> None:
        self.certificate = certificate

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        own = [
            entry
            for entry in handler_call_details.invocation_metadata
            if entry[0] != "x-fedcmr-certificate"
        ]
        metadata = (*own, *shown(self.certificate))
        return continuation(Details(handler_call_details.method, metadata))


@contextmanager
def gateway(running: Coordinator, certificate: str) -> Iterator[int]:
    """The service behind mutual TLS on a free port, for one member."""
    server = grpc.server(
        ThreadPoolExecutor(4),
        interceptors=[Gateway(certificate), Gatekeeper(running.store, CallLimits())],
    )
    service = Service(running.home, running.store)
    add_GovernanceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    keys = running.home.keys
    pair = (keys / "server.pem").read_bytes(), (keys / "server.crt").read_bytes()
    root = (keys / "authority.crt").read_bytes()
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([pair], root, require_client_auth=True)
    )
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@dataclass
class Office:
    """An auditor's folder, and the kit that answered its request."""

    folder: Path
    kit: Path
    fingerprint: str


@pytest.fixture
def office(
    running: Coordinator, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Office]:
    """An auditor that has asked, with its kit and a way to the coordinator."""
    # The stand-in for nginx speaks gRPC alone, and the probe HTTP/1.1.
    monkeypatch.setattr("fedcmr_client.site_link.probe", lambda *_: None)
    folder, kit = tmp_path / "office", tmp_path / "office.kit.json"
    code, out, _ = run("init", folder, "--name", "office", "--json")
    assert code == 0
    asked = EnrolmentRequest.read(Path(json.loads(out)["request"]))
    assert json.loads(out)["fingerprint"] == asked.fingerprint
    assert asked.member == Member("auditor", "office")
    certificate = issue_member(running.home.authority(), asked.certificate_request, asked.member)
    Members(running.store).add(asked.member, asked.identity, None)
    Certificates(running.store).add("office", certificate)
    with gateway(running, certificate_pem(certificate)) as port:
        content = running.home.kit(certificate_pem(certificate)).model_copy(update={"port": port})
        kit.write_text(file_text(content))
        yield Office(folder, kit, content.fingerprint)


@pytest.fixture
def joined(office: Office, run: Run) -> Office:
    assert run("join", office.folder, office.kit, "--fingerprint", office.fingerprint)[0] == 0
    return office


def bundle(party: Party) -> Evidence:
    opened = Opened(
        at=1,
        site=party.name,
        site_key=party.identity.public_key,
        secret_fingerprint="ab" * 32,
        epsilon=8.0,
        delta=1e-5,
        order=6,
    )
    leaf = Leaf(entry=opened, salt="cd" * 32).content().decode()
    return Evidence(
        scope="ledger",
        site=party.name,
        public_key=party.identity.public_key,
        software="fedcmr 0",
        checkpoint=History(party.name, party.identity).head(1),
        leaves=(Disclosed(index=0, content=leaf),),
    )


def receipt_of(party: Party, job: str, number: int = 1) -> Receipt:
    entry = Started(at=0, job=job, sequence=1, phase="train", round=number, attempt=1)
    return Receipt.sign(party.name, entry, party.identity)


@pytest.fixture
def sites(running: Coordinator, tmp_path: Path) -> dict[str, Party]:
    """Three sites with a roster, a job, a checkpoint, a receipt and evidence."""
    sites = {name: running.join(name) for name in SITES}
    running.roster()
    spec = JobSpec(name="heart", rounds=2, aggregation="plain_with_local_dp")
    Jobs(running.store).submit(spec, None, None)
    alder, birch = sites["alder"], sites["birch"]
    head = History("alder", alder.identity).head(8)
    path = tmp_path / "handed-in.json"
    bundle(alder).write(path)
    with running.as_member(alder) as governance:
        governance.put_checkpoint(head, 0, [])
        governance.put_receipt(receipt_of(alder, spec.sha256))
        governance.put_evidence(path)
    with running.as_member(birch) as governance:
        governance.put_cosignature(head, cosign(birch.identity, head))
    return sites


def test_everything_is_fetched(
    sites: dict[str, Party], joined: Office, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "fetched"
    code, text, _ = run("fetch", joined.folder, "--out", out, "--json")
    assert code == 0, text
    assert json.loads(text) == {
        "folder": str(out),
        "roster versions": 1,
        "jobs": 1,
        "releases": 0,
        "refusals": 0,
        "checkpoints": 1,
        "receipts": 1,
        "evidence": 1,
    }
    (path,) = (out / "evidence").iterdir()
    assert Evidence.read(path) == bundle(sites["alder"])
    (job,) = json.loads((out / "jobs.json").read_text())
    (receipt,) = json.loads((out / "receipts" / f"{job['job']}.json").read_text())
    Receipt.model_validate(receipt).verify(sites["alder"].identity.public_key)
    shown_heads = json.loads((out / "checkpoints" / "alder.json").read_text())
    (head,) = map(Checkpoint.model_validate, shown_heads["published"])
    assert set(head.cosignatures) == {sites["birch"].identity.public_key}
    before = path.stat().st_mtime_ns
    assert run("fetch", joined.folder, "--out", out)[0] == 0
    assert path.stat().st_mtime_ns == before


def test_a_receipt_that_no_site_signed_is_an_error(
    running: Coordinator, sites: dict[str, Party], joined: Office, run: Run, tmp_path: Path
) -> None:
    (spec,) = [row.id for row in Jobs(running.store).all()]
    stranger = Party(Member("site", "alder"), draw_identity(), sites["alder"].key, "")
    false = receipt_of(stranger, spec, 2)
    # As a coordinator could that invents receipts.
    place = (spec, "alder", "train", 2, 1)
    Receipts(running.store).keep(place, false.model_dump_json(), false.signature)  # type: ignore[arg-type]
    code, _, error = run("fetch", joined.folder, "--out", tmp_path / "fetched")
    assert code == 1
    assert "no key that the site had on the roster signed it" in error


def refuse(running: Coordinator, job: str, identity: SiteKey | None = None) -> ReleaseRefusal:
    """Have a gate keep back the model of ``job``; the coordinator signs unless another key does."""
    home, gate = running.home, GateResult(gate="memorisation", passed=False, text="2 of 3 sites")
    federation, key = ("hearts", home.federation_sha256), identity or home.identity()
    refusal = ReleaseRefusal.sign(federation, (job, "cd" * 32), gate, datetime.now(UTC), key)
    content = {**gate.model_dump(), "refusal": refusal.model_dump(mode="json")}
    Events(running.store).record(job, "release_refused", content)
    return refusal


def release(running: Coordinator, job: str) -> None:
    """List a release of ``job``."""
    values = {"path": "heart.zip", "sha256": "ab" * 32, "size": 1, "card": "{}"}
    row = ReleaseRow(job=job, signature="0" * 128, at=datetime.now(UTC), **values)
    Releases(running.store).add(row)


def held(out: Path) -> list[ReleaseRefusal]:
    found = json.loads((out / "refusals.json").read_text())
    return [ReleaseRefusal.model_validate(each) for each in found]


@pytest.fixture
def job(running: Coordinator, sites: dict[str, Party]) -> str:
    (row,) = Jobs(running.store).all()
    return row.id


def test_a_refusal_is_held_by_the_auditor(
    running: Coordinator, job: str, joined: Office, run: Run, tmp_path: Path
) -> None:
    refusal, out = refuse(running, job), tmp_path / "fetched"
    for _ in range(2):
        code, text, _ = run("fetch", joined.folder, "--out", out, "--json")
        assert code == 0
        assert json.loads(text)["refusals"] == 1
        assert held(out) == [refusal]
    refusal.verify(Membership(joined.folder).pinned)


def test_a_refusal_that_the_coordinator_did_not_sign_is_an_error(
    running: Coordinator, job: str, joined: Office, run: Run, tmp_path: Path
) -> None:
    refuse(running, job, draw_identity())
    code, _, error = run("fetch", joined.folder, "--out", tmp_path / "fetched")
    assert code == 1
    assert f"refusal of job {job[:12]} by memorisation: the signature is not that of key" in error
    assert not (tmp_path / "fetched" / "refusals.json").exists()


def test_a_model_that_was_refused_and_released_is_an_error(
    running: Coordinator, job: str, joined: Office, run: Run, tmp_path: Path
) -> None:
    refusal, out = refuse(running, job), tmp_path / "fetched"
    release(running, job)
    code, _, error = run("fetch", joined.folder, "--out", out)
    assert code == 1
    assert f"job {job[:12]}: the gate memorisation refused its release on" in error
    assert "and it was released on" in error
    # The auditor holds both, and all the rest.
    assert held(out) == [refusal]
    assert [each["job"] for each in json.loads((out / "releases.json").read_text())] == [job]
    assert list((out / "evidence").iterdir())


def test_a_release_of_another_job_contradicts_no_refusal(
    running: Coordinator, job: str, joined: Office, run: Run, tmp_path: Path
) -> None:
    other = JobSpec(name="other", rounds=2, aggregation="plain_with_local_dp")
    Jobs(running.store).submit(other, None, None)
    refuse(running, job)
    release(running, other.sha256)
    assert run("fetch", joined.folder, "--out", tmp_path / "fetched")[0] == 0


def test_a_refusal_that_the_coordinator_takes_back_stays_with_the_auditor(
    running: Coordinator, job: str, joined: Office, run: Run, tmp_path: Path
) -> None:
    refusal, out = refuse(running, job), tmp_path / "fetched"
    assert run("fetch", joined.folder, "--out", out)[0] == 0
    with running.store.writing() as session:
        session.execute(delete(EventRow).where(EventRow.name == "release_refused"))
    for _ in range(2):
        code, _, error = run("fetch", joined.folder, "--out", out)
        assert code == 1
        assert f"job {job[:12]}: the coordinator no longer lists a refusal" in error
        assert held(out) == [refusal]
    # What it released instead does not hide behind that.
    release(running, job)
    code, _, error = run("fetch", joined.folder, "--out", out)
    assert code == 1
    assert "refused its release" in error


def test_held_refusals_that_cannot_be_read_are_not_overwritten(
    job: str, joined: Office, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "fetched" / "refusals.json"
    path.parent.mkdir()
    path.write_text("[{}]")
    code, _, error = run("fetch", joined.folder, "--out", path.parent)
    assert code == 1
    assert f"{path} holds no refusals that can be read" in error
    assert path.read_text() == "[{}]"


def test_a_roster_that_the_coordinator_did_not_sign_is_an_error(
    running: Coordinator, sites: dict[str, Party], joined: Office, run: Run, tmp_path: Path
) -> None:
    history = Rosters(running.store).history()
    roster = new_roster({name: draw_identity().public_key for name in SITES})
    Rosters(running.store).add(next_version(history, roster, "forged", draw_identity()))
    code, _, error = run("fetch", joined.folder, "--out", tmp_path / "fetched")
    assert code == 1
    assert "roster version 2" in error
    assert not (tmp_path / "fetched" / "roster.json").exists()


def test_a_revoked_auditor_gets_nothing(
    running: Coordinator, joined: Office, run: Run, tmp_path: Path
) -> None:
    Members(running.store).end("office", "revoked", "test")
    code, _, error = run("fetch", joined.folder, "--out", tmp_path / "fetched")
    assert code == 1
    assert "revoked" in error


def test_a_kit_is_believed_by_its_fingerprint_alone(office: Office, run: Run) -> None:
    code, _, error = run("join", office.folder, office.kit, "--fingerprint", "0123 4567")
    assert code == 1
    assert "not the one given" in error
    assert Membership(office.folder).state == "asked"
    code, _, error = run("fetch", office.folder, "--out", office.folder / "out")
    assert code == 1
    assert "not joined" in error
    code, out, _ = run(
        "join", office.folder, office.kit, "--fingerprint", office.fingerprint.upper(), "--json"
    )
    assert code == 0
    until = datetime.fromisoformat(json.loads(out)["certificate_until"]).replace(tzinfo=UTC)
    assert until.date() == _end(office.kit)
    assert Membership(office.folder).state == "joined"


def _end(kit: Path) -> Any:
    return read_certificate(StartupKit.read(kit).certificate).not_valid_after_utc.date()


def test_keys_are_made_once(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "office"
    assert run("init", folder, "--name", "office")[0] == 0
    key = (folder / "identity.pem").read_bytes()
    code, _, error = run("init", folder, "--name", "office")
    assert code == 1
    assert "request already" in error
    assert (folder / "identity.pem").read_bytes() == key
    assert (folder / "identity.pem").stat().st_mode & 0o077 == 0


def test_names_and_folders_that_cannot_be_used(run: Run, tmp_path: Path) -> None:
    code, _, error = run("init", tmp_path / "office", "--name", "two words")
    assert code == 1
    assert "--name" in error
    assert not (tmp_path / "office").exists()
    code, _, error = run("fetch", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert code == 1
    assert "fedcmr audit init" in error
    site = tmp_path / "site"
    Membership.create(site, Member("site", "alder"), draw_identity(), with_node_key=True)
    code, _, error = run("fetch", site, "--out", tmp_path / "out")
    assert code == 1
    assert "that of a site" in error
