import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from fedcmr_shared.errors import LedgerError
from fedcmr_shared.identity.keys import SiteKey, verify_signature

# RFC 8032, section 7.1, test 2.
RFC_PUBLIC = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
RFC_SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)


def test_a_key_comes_back_and_signs(tmp_path: Path) -> None:
    made = SiteKey.create(tmp_path / "site.key")
    again = SiteKey.load(tmp_path / "site.key")
    assert again.public_key == made.public_key
    assert len(bytes.fromhex(made.public_key)) == 32
    signature = again.sign(b"head")
    assert len(bytes.fromhex(signature)) == 64
    verify_signature(made.public_key, signature, b"head")


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    SiteKey.create(tmp_path / "site.key")
    mode = stat.S_IMODE((tmp_path / "site.key").stat().st_mode)
    assert mode == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["site.key"]
    assert (tmp_path / "site.key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")


def test_two_keys_differ(tmp_path: Path) -> None:
    keys = {SiteKey.create(tmp_path / f"{number}.key").public_key for number in range(3)}
    assert len(keys) == 3


def test_a_known_signature_holds() -> None:
    verify_signature(RFC_PUBLIC, RFC_SIGNATURE, b"\x72")


@pytest.mark.parametrize(
    ("public_key", "signature", "data", "problem"),
    [
        (RFC_PUBLIC, RFC_SIGNATURE, b"\x73", "not that of key 3d4017c3e843895a"),
        (RFC_PUBLIC, "00" + RFC_SIGNATURE[2:], b"\x72", "not that of key"),
        (RFC_PUBLIC, RFC_SIGNATURE[:-2], b"\x72", "not that of key"),
        (RFC_PUBLIC, "", b"\x72", "not that of key"),
        ("00" * 32, RFC_SIGNATURE, b"\x72", "not that of key|not an Ed25519 public key"),
        (RFC_PUBLIC[:-2], RFC_SIGNATURE, b"\x72", "is not an Ed25519 public key"),
        ("north", RFC_SIGNATURE, b"\x72", "'north' is not an Ed25519 public key"),
    ],
)
def test_wrong_signatures_are_refused(
    public_key: str, signature: str, data: bytes, problem: str
) -> None:
    with pytest.raises(LedgerError, match=problem):
        verify_signature(public_key, signature, data)


def test_another_sites_signature_is_refused(tmp_path: Path) -> None:
    north, south = (SiteKey.create(tmp_path / f"{name}.key") for name in ("north", "south"))
    with pytest.raises(LedgerError, match="somebody else signed"):
        verify_signature(north.public_key, south.sign(b"head"), b"head")


def test_an_existing_key_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    first = SiteKey.create(path)
    with pytest.raises(LedgerError, match=r"site\.key exists: a site keeps its key"):
        SiteKey.create(path)
    assert SiteKey.load(path).public_key == first.public_key
    assert [entry.name for entry in tmp_path.iterdir()] == ["site.key"]


def test_a_key_cut_off_while_written_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LedgerError, match=r"site\.key: cannot write the key: No space left"):
        SiteKey.create(tmp_path / "site.key")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"absent/site\.key: cannot write the key: No such file"):
        SiteKey.create(tmp_path / "absent" / "site.key")


def test_files_that_hold_no_key_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    with pytest.raises(LedgerError, match=r"cannot read the site's key .*restore it from backup"):
        SiteKey.load(path)
    path.write_bytes(b"-----BEGIN PRIVATE KEY-----\nnothing\n-----END PRIVATE KEY-----\n")
    with pytest.raises(LedgerError, match="not a private key: restore"):
        SiteKey.load(path)
    curve = generate_private_key(SECP256R1())
    path.write_bytes(curve.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(LedgerError, match="not an Ed25519 key: restore"):
        SiteKey.load(path)


def test_an_encrypted_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.key"
    SiteKey.create(path)
    private = load_pem_private_key(path.read_bytes(), password=None)
    path.write_bytes(
        private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word"))
    )
    with pytest.raises(LedgerError, match="not a private key"):
        SiteKey.load(path)
