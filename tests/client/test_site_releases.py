"""`fedcmr site releases` and `fetch-release`, against the real service without a gateway."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

import pytest
from coordinator_parties import new_home
from release_parts import JOB, make_card, write_model

from fedcmr_client.governance import Governance
from fedcmr_client.site_home import SiteHome
from fedcmr_server.governance import serve
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.members import enrol
from fedcmr_server.store import Jobs, Releases, Store
from fedcmr_server.store.tables import ReleaseRow
from fedcmr_shared.cli import main
from fedcmr_shared.identity.certificates import Member, certificate_pem
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import new_roster
from fedcmr_shared.models.release import ReleaseBundle
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation

OTHER = JOB.model_copy(update={"seed": JOB.seed + 1})
"""Another job of the same name."""

ROSTER = new_roster({"alder": "a" * 64, "birch": "b" * 64, "cedar": "c" * 64})


@dataclass
class Federation:
    """A coordinator's service, and one site that has joined and runs commands."""

    coordinator: CoordinatorHome
    store: Store
    site: SiteHome
    capsys: pytest.CaptureFixture[str]

    def run(self, *arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main(["site", *map(str, arguments), "--policy", str(self.site.path)])
        captured = self.capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    def release(self, job: JobSpec, content: bytes) -> None:
        """List ``content`` as the release of ``job``."""
        Jobs(self.store).submit(job, None, ROSTER)
        name = f"{job.sha256[:8]}.zip"
        (self.coordinator.releases / name).write_bytes(content)
        Releases(self.store).add(
            ReleaseRow(
                job=job.sha256,
                path=name,
                sha256=sha256(content).hexdigest(),
                size=len(content),
                signature="0" * 128,
                card="{}",
                at=datetime.now(UTC),
            )
        )

    def model_of(self, folder: Path, key: SiteKey | None = None, federation: str = "") -> bytes:
        """Return a release of `JOB`, of this coordinator and federation unless others are given."""
        key, folder = key or self.coordinator.identity(), folder / "made"
        federation = federation or self.coordinator.federation_sha256
        folder.mkdir()
        digest = write_model(folder / "model")
        card = make_card(key, digest)
        period = card.authorisation.not_before, card.authorisation.not_after
        signed = JobAuthorisation.sign(JOB, federation, period, key)
        card = make_card(key, digest, federation_sha256=federation, authorisation=signed)
        ReleaseBundle.write(folder / "heart.zip", folder / "model", card, key)
        return (folder / "heart.zip").read_bytes()


@pytest.fixture
def federation(
    make_home: Callable[..., SiteHome],
    make_site: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Federation]:
    site = make_home(make_site("alder", 1))
    membership = site.membership
    asked = membership.create(
        membership.folder, Member("site", "alder"), site.identity(), with_node_key=True
    )
    with TemporaryDirectory(prefix="fedcmr-test-") as short:
        coordinator = new_home(Path(short) / "coordinator")
        with coordinator.store() as store:
            membership.join(enrol(coordinator, store, asked).kit)
            certificate = quote(certificate_pem(membership.certificate), safe="")
            socket = coordinator.run / "governance.sock"
            server = serve(coordinator, store, socket)

            @contextmanager
            def governance_of(_: SiteHome) -> Iterator[Governance]:
                metadata = [("x-fedcmr-certificate", certificate)]
                with Governance(f"unix:{socket}", metadata) as governance:
                    yield governance

            monkeypatch.setattr("fedcmr_client.site_link.governance_of", governance_of)
            try:
                yield Federation(coordinator, store, site, capsys)
            finally:
                server.stop(None).wait()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the model is to be: alone in its folder."""
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / "heart.zip"


def test_a_release_is_listed_fetched_and_verified(
    federation: Federation, tmp_path: Path, out: Path
) -> None:
    assert "no model" in federation.run("releases")[1]
    content = federation.model_of(tmp_path)
    federation.release(JOB, content)
    (listed,) = json.loads(federation.run("releases", "--json")[1])
    digest = sha256(content).hexdigest()
    assert (listed["name"], listed["job"], listed["sha256"]) == ("heart", JOB.sha256, digest)
    text = federation.run("releases")[1]
    assert all(part in text for part in ("heart", JOB.sha256[:12], f"{len(content):,}"))

    code, text, errors = federation.run("fetch-release", "heart", "--out", out)
    assert (code, errors) == (0, "")
    assert "is verified" in " ".join(text.split())
    assert out.read_bytes() == content
    assert list(out.parent.iterdir()) == [out]

    again = out.with_name("again.zip")
    code, text, _ = federation.run("fetch-release", JOB.sha256[:9], "--out", again, "--json")
    found = json.loads(text)
    assert (code, found["verified"], found["sha256"]) == (0, True, digest)
    assert found["checks"]["signature"].startswith("by key")


@pytest.mark.parametrize("text", ["liver", "", "0123456789"])
def test_a_job_that_was_not_released_is_one_clear_error(
    federation: Federation, out: Path, text: str
) -> None:
    federation.release(JOB, b"not looked at")
    code, _, errors = federation.run("fetch-release", text, "--out", out)
    assert (code, errors.count("\n"), out.exists()) == (1, 1, False)
    assert f"no release of job {text!r}: see `fedcmr site releases`" in errors


def test_a_name_of_several_jobs_is_one_clear_error(federation: Federation, out: Path) -> None:
    for job in (JOB, OTHER):
        federation.release(job, job.sha256.encode())
    code, _, errors = federation.run("fetch-release", "heart", "--out", out)
    assert (code, errors.count("\n"), out.exists()) == (1, 1, False)
    assert JOB.sha256[:12] in errors
    assert OTHER.sha256[:12] in errors


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("key", "another coordinator, or forged"),
        ("federation", "of another federation"),
        ("job", "sent the model of job"),
        ("bytes", "members at its end"),
    ],
)
def test_what_does_not_verify_never_has_its_name(
    federation: Federation, tmp_path: Path, out: Path, wrong: str, said: str
) -> None:
    """The service sends what its list says; the list itself is wrong."""
    key = SiteKey.create(tmp_path / "other.pem") if wrong == "key" else None
    content = federation.model_of(tmp_path, key, "ab" * 32 if wrong == "federation" else "")
    federation.release(
        OTHER if wrong == "job" else JOB, content[:-1] if wrong == "bytes" else content
    )
    code, text, errors = federation.run("fetch-release", "heart", "--out", out)
    assert (code, text, errors.count("\n")) == (1, "", 1)
    assert f"{out} was not written" in errors
    assert said in errors
    assert list(out.parent.iterdir()) == []


def test_a_file_that_exists_is_kept(federation: Federation, out: Path) -> None:
    out.write_text("the first one")
    code, _, errors = federation.run("fetch-release", "heart", "--out", out)
    assert code == 1
    assert "choose another name" in errors
    assert out.read_text() == "the first one"


def test_whoever_interrupts_the_check_has_no_model(
    federation: Federation, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedcmr_shared.commands.verify.verify_by_kit", interrupted)
    federation.release(JOB, b"whole, and not checked")
    assert federation.run("fetch-release", "heart", "--out", out)[0] == 130
    assert list(out.parent.iterdir()) == []
