"""Requests and kits: whatever was altered on the way is refused before anybody believes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.certificates import (
    Member,
    certificate_pem,
    certificate_request,
    issue_member,
    new_authority,
    new_key,
)
from fedcmr_shared.identity.enrolment import EnrolmentRequest, StartupKit, file_text
from fedcmr_shared.identity.keys import SiteKey

AUTHORITY = new_authority("heart")
ALDER = Member("site", "alder")


def node_key(curve: ec.EllipticCurve | None = None) -> str:
    public = ec.generate_private_key(curve or ec.SECP384R1()).public_key()
    return public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@pytest.fixture
def request_(tmp_path: Path) -> EnrolmentRequest:
    identity = SiteKey.create(tmp_path / "identity.pem")
    asked = certificate_request(new_key(), ALDER)
    return EnrolmentRequest.sign(ALDER, identity, asked, node_key())


@pytest.fixture
def kit(request_: EnrolmentRequest) -> StartupKit:
    certificate = issue_member(AUTHORITY, request_.certificate_request, request_.member)
    return StartupKit(
        federation="heart",
        coordinator="centre",
        coordinator_key="ab" * 32,
        host="heart.example",
        port=8443,
        authority=certificate_pem(AUTHORITY.certificate),
        certificate=certificate_pem(certificate),
    )


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_both_files_read_back_as_they_were(
    tmp_path: Path, request_: EnrolmentRequest, kit: StartupKit
) -> None:
    assert EnrolmentRequest.read(written(tmp_path / "request", file_text(request_))) == request_
    assert StartupKit.read(written(tmp_path / "kit", file_text(kit))) == kit
    assert kit.member == ALDER
    assert "PRIVATE" not in file_text(request_) + file_text(kit)


def test_every_altered_field_of_a_request_is_refused(
    tmp_path: Path, request_: EnrolmentRequest
) -> None:
    other = certificate_request(new_key(), ALDER)
    changes: dict[str, Any] = {
        "name": "birch",
        "identity": "cd" * 32,
        "certificate_request": other,
        "node_key": node_key(),
        "signature": "00" * 64,
        "role": "auditor",
        "format": "fedcmr-request-2",
        "more": 1,
    }
    for field, value in changes.items():
        content = {**request_.model_dump(mode="json"), field: value}
        with pytest.raises(ConfigurationError, match="ask for the file again"):
            EnrolmentRequest.read(written(tmp_path / "request", content))


@pytest.mark.parametrize("role", ["site", "auditor"])
def test_sites_alone_have_a_node_key(role: Any, tmp_path: Path) -> None:
    identity = SiteKey.create(tmp_path / "identity.pem")
    member = Member(role, "alder")
    wrong = None if role == "site" else node_key()
    with pytest.raises(ValueError, match="node_key"):
        EnrolmentRequest.sign(member, identity, certificate_request(new_key(), member), wrong)


def test_a_node_key_that_flower_refuses_is_refused_here(tmp_path: Path) -> None:
    identity = SiteKey.create(tmp_path / "identity.pem")
    public = ed25519.Ed25519PrivateKey.generate().public_key()
    wrong = public.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    for key in (wrong, "no key"):
        with pytest.raises(ValueError, match="node_key"):
            EnrolmentRequest.sign(ALDER, identity, certificate_request(new_key(), ALDER), key)


def test_all_members_see_one_fingerprint_of_the_federation(kit: StartupKit) -> None:
    birch = Member("site", "birch")
    certificate = issue_member(AUTHORITY, certificate_request(new_key(), birch), birch)
    other = kit.model_copy(update={"certificate": certificate_pem(certificate)})
    assert other.fingerprint == kit.fingerprint
    for change in ({"host": "evil.example"}, {"coordinator_key": "cd" * 32}, {"port": 1}):
        assert kit.model_copy(update=change).fingerprint != kit.fingerprint


def test_a_kit_of_two_authorities_is_refused(tmp_path: Path, kit: StartupKit) -> None:
    foreign = certificate_pem(new_authority("heart").certificate)
    content = {**kit.model_dump(mode="json"), "authority": foreign}
    with pytest.raises(ConfigurationError, match="did not sign"):
        StartupKit.read(written(tmp_path / "kit", content))


def test_a_kit_needs_a_members_certificate(tmp_path: Path, kit: StartupKit) -> None:
    content = {**kit.model_dump(mode="json"), "certificate": kit.authority}
    with pytest.raises(ConfigurationError, match="names no member"):
        StartupKit.read(written(tmp_path / "kit", content))


def test_what_is_no_file_of_ours_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        StartupKit.read(tmp_path / "absent")
    with pytest.raises(ConfigurationError, match="startup kit"):
        StartupKit.read(written(tmp_path / "kit", "{"))
    with pytest.raises(ConfigurationError, match="larger than"):
        EnrolmentRequest.read(written(tmp_path / "long", " " * 70_000))
