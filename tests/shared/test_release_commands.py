"""`fedcmr models verify` and `fedcmr models show` with a release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from release_parts import JOB, make_card, write_model

from fedcmr_shared.cli import main
from fedcmr_shared.identity.certificates import (
    Authority,
    Member,
    certificate_pem,
    certificate_request,
    fingerprint,
    issue_member,
    new_authority,
    new_key,
)
from fedcmr_shared.identity.enrolment import StartupKit, file_text
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.release import ReleaseBundle
from fedcmr_shared.schemas.signed_job import JobAuthorisation

KEY = SiteKey(Ed25519PrivateKey.generate())
AUTHORITY = new_authority("hearts")


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release")
    digest = write_model(folder / "model")
    federation = fingerprint(AUTHORITY.certificate)
    plain = make_card(KEY, digest)
    period = plain.authorisation.not_before, plain.authorisation.not_after
    signed = JobAuthorisation.sign(JOB, federation, period, KEY)
    card = make_card(KEY, digest, federation_sha256=federation, authorisation=signed)
    ReleaseBundle.write(folder / "heart.zip", folder / "model", card, KEY)
    return folder / "heart.zip"


def kit(path: Path, key: SiteKey = KEY, authority: Authority = AUTHORITY) -> Path:
    member = Member("site", "alder")
    certificate = issue_member(authority, certificate_request(new_key(), member), member)
    content = StartupKit(
        federation="hearts",
        coordinator="centre",
        coordinator_key=key.public_key,
        host="heart.example",
        port=8443,
        authority=certificate_pem(authority.certificate),
        certificate=certificate_pem(certificate),
    )
    path.write_text(file_text(content))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["models", *map(str, arguments)])
    output = capsys.readouterr()
    return stopped.value.code, output.out, output.err


def test_by_key_and_by_kit(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "verify", release, "--trust", KEY.public_key)
    assert code == 0
    assert "heart.zip is verified" in out
    assert "ε = 3.49" in out
    code, out, _ = run(capsys, "verify", release, "--kit", kit(tmp_path / "kit.json"), "--json")
    found = json.loads(out)
    assert (code, found["verified"]) == (0, True)
    assert found["card"]["job"]["name"] == "heart"
    assert set(found["checks"]) == {
        "signature",
        "file",
        "job",
        "privacy",
        "lineage",
        "weights",
        "gates",
    }


def test_what_is_not_trusted_is_refused_in_one_line(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    altered = tmp_path / "altered.zip"
    altered.write_bytes(release.read_bytes()[:-1])
    other_key = kit(tmp_path / "key.json", key=SiteKey(Ed25519PrivateKey.generate()))
    other_federation = kit(tmp_path / "fed.json", authority=new_authority("lungs"))
    for arguments, message in (
        ((release, "--trust", "ab" * 32), "another coordinator, or forged"),
        ((release, "--kit", other_key), "another coordinator, or forged"),
        ((release, "--kit", other_federation), "of another federation (hearts) than the kit"),
        ((release, "--kit", tmp_path / "none.json"), "none.json cannot be read"),
        ((altered, "--trust", KEY.public_key), "list of members at its end"),
        ((tmp_path / "none.zip", "--trust", KEY.public_key), "there is no such file"),
    ):
        code, out, err = run(capsys, "verify", *arguments)
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert message in err


@pytest.mark.parametrize(
    "trust",
    [(), ("--trust", "ab" * 32, "--kit", "kit.json"), ("--trust", "AB" * 32), ("--trust", "key")],
)
def test_it_is_said_whom_to_trust(
    trust: tuple[str, ...], release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(capsys, "verify", release, *trust)[0] == 2


def test_show_prints_the_card(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "show", release)
    assert code == 0
    assert out.startswith("# heart\n")
    assert "which nobody checked here" in out
    code, out, _ = run(capsys, "show", release, "--json")
    assert json.loads(out)["signed_by"] == KEY.public_key
    bad = tmp_path / "bad.zip"
    bad.write_bytes(release.read_bytes()[:1000])
    code, _, err = run(capsys, "show", bad)
    assert (code, err.count("\n")) == (1, 1)
