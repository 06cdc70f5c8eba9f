"""What a gate kept back, a coordinator signs: nobody else can, and not one field can be changed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcmr_shared.errors import LedgerError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models.card import GateResult
from fedcmr_shared.models.refusal import ReleaseRefusal

FEDERATION = "f0" * 32
NOW = datetime(2030, 5, 1, 12, tzinfo=UTC)
GATE = GateResult(gate="memorisation", passed=False, text="passed at 2 of 3 sites")
KEY = SiteKey(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
PINNED = (FEDERATION, KEY.public_key)
HASHES = st.binary(min_size=32, max_size=32).map(bytes.hex)
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=200)


def signed(gate: GateResult = GATE, now: datetime = NOW, key: SiteKey = KEY) -> ReleaseRefusal:
    return ReleaseRefusal.sign(("hearts", FEDERATION), ("ab" * 32, "cd" * 32), gate, now, key)


@given(
    job=HASHES,
    model=HASHES,
    text=TEXTS,
    now=st.datetimes(
        min_value=datetime(2000, 1, 1),
        max_value=datetime(2100, 1, 1),
        timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))]),
    ),
)
def test_what_was_signed_is_read_back_and_verified(
    job: str, model: str, text: str, now: datetime
) -> None:
    gate = GATE.model_copy(update={"text": text})
    refusal = ReleaseRefusal.sign(("hearts", FEDERATION), (job, model), gate, now, KEY)
    read = ReleaseRefusal.model_validate_json(refusal.model_dump_json())
    assert read == refusal
    assert (read.job_sha256, read.model_sha256, read.gate, read.refused_at) == (
        job,
        model,
        gate,
        now,
    )
    read.verify(PINNED)


CHANGES: dict[str, Any] = {
    "schema_version": "2",
    "federation": "lungs",
    "federation_sha256": "0f" * 32,
    "job_sha256": "ac" * 32,
    "model_sha256": "ce" * 32,
    "gate": GATE.model_copy(update={"text": "passed at 1 of 3 sites"}),
    "refused_at": NOW + timedelta(seconds=1),
    "signature": "0" * 128,
}


def test_the_changes_below_are_of_every_field() -> None:
    assert set(CHANGES) == set(ReleaseRefusal.model_fields)


@pytest.mark.parametrize(
    "change",
    [
        *({name: value} for name, value in CHANGES.items()),
        {"gate": GATE.model_copy(update={"gate": "quality"})},
        {"gate": GATE.model_copy(update={"passed": True})},
    ],
    ids=lambda change: "-".join(change),
)
def test_not_one_field_can_be_changed(change: dict[str, Any]) -> None:
    signed().verify(PINNED)  # control
    tampered = signed().model_copy(update=change)
    # Who changes the federation pins that one, too, so that only the signature speaks against it.
    pinned = (tampered.federation_sha256, KEY.public_key)
    with pytest.raises(LedgerError, match="not that of key"):
        tampered.verify(pinned)


@given(place=st.integers(0, 63), bit=st.integers(0, 7))
def test_not_one_bit_of_the_signature_can_be_changed(place: int, bit: int) -> None:
    forged = bytearray.fromhex(signed().signature)
    forged[place] ^= 1 << bit
    with pytest.raises(LedgerError, match="not that of key"):
        signed().model_copy(update={"signature": forged.hex()}).verify(PINNED)


def test_another_key_or_federation_says_nothing_here(tmp_path: Path) -> None:
    other = SiteKey.create(tmp_path / "other.pem")
    with pytest.raises(LedgerError, match="not that of key"):
        signed(key=other).verify(PINNED)
    with pytest.raises(LedgerError, match="of another federation"):
        signed().verify(("0f" * 32, KEY.public_key))


def test_a_signature_under_something_else_is_no_refusal() -> None:
    content = signed().signed_bytes()
    assert content.startswith(b"fedcmr release refusal 1\n{")
    bare = KEY.sign(content.partition(b"\n")[2])
    with pytest.raises(LedgerError, match="not that of key"):
        signed().model_copy(update={"signature": bare}).verify(PINNED)


def test_a_gate_that_passed_refuses_nothing() -> None:
    passed = GATE.model_copy(update={"passed": True})
    with pytest.raises(ValidationError, match="memorisation passed, so it refuses nothing"):
        signed(passed)
    told = signed().model_dump(mode="json")
    told["gate"]["passed"] = True
    with pytest.raises(ValidationError, match="refuses nothing"):
        ReleaseRefusal.model_validate(told)


def test_a_refusal_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        signed().job_sha256 = "0" * 64  # type: ignore[misc]  # what is tested


@pytest.mark.parametrize(
    "change",
    [
        {"schema_version": "2"},
        {"federation": "two words"},
        {"job_sha256": "AB" * 32},
        {"refused_at": "2030-05-01T12:00:00"},
        {"signature": "0"},
        {"site": "alder"},
    ],
    ids=lambda change: "-".join(change),
)
def test_what_is_no_refusal_is_not_read(change: dict[str, Any]) -> None:
    (field,) = change
    with pytest.raises(ValidationError, match=field):
        ReleaseRefusal.model_validate({**signed().model_dump(mode="json"), **change})
