"""Two sites agree on a secret; a box opens for its receiver, its sender and its purpose alone."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcmr_shared.secagg import agreement
from fedcmr_shared.secagg.agreement import KeyPair, PublicKey, check_usable, derive
from fedcmr_shared.secagg.faults import ProtocolError

BOTH = pytest.mark.parametrize("post_quantum", [False, True], ids=["classical", "post-quantum"])
ROUTE = ("a" * 64, "alder", "birch")
SMALL_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]
SECOND_SPELLINGS = ["ed" + "ff" * 30 + "7f", "ee" + "ff" * 30 + "7f", "09" + "00" * 30 + "80"]


@BOTH
def test_both_sides_agree(post_quantum: bool) -> None:
    alder, birch = KeyPair.draw(post_quantum), KeyPair.draw(post_quantum)
    assert alder.agree(birch.public) == birch.agree(alder.public)


def test_the_agreement_is_x25519() -> None:
    pair, other = KeyPair.draw(False), X25519PrivateKey.generate()
    expected = other.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(pair.public.x25519)))
    assert pair.agree(PublicKey(x25519=other.public_key().public_bytes_raw().hex())) == expected


@BOTH
@settings(max_examples=20)
@given(st.binary(max_size=200))
def test_a_box_opens(post_quantum: bool, content: bytes) -> None:
    alder, birch = KeyPair.draw(post_quantum), KeyPair.draw(post_quantum)
    box = alder.seal(birch.public, content, "shares", *ROUTE)
    assert birch.open(alder.public, box, "shares", *ROUTE) == content


@BOTH
def test_the_root_is_the_pair(post_quantum: bool) -> None:
    pair = KeyPair.draw(post_quantum)
    again = KeyPair(pair.root, post_quantum)
    assert again.public == pair.public
    box = KeyPair.draw(post_quantum)
    sealed = box.seal(pair.public, b"share", "shares", *ROUTE)
    assert again.open(box.public, sealed, "shares", *ROUTE) == b"share"


@BOTH
def test_two_boxes_of_one_content_differ(post_quantum: bool) -> None:
    alder, birch = KeyPair.draw(post_quantum), KeyPair.draw(post_quantum)
    assert alder.seal(birch.public, b"x", "a") != alder.seal(birch.public, b"x", "a")


@BOTH
@pytest.mark.parametrize(
    "purpose",
    [
        ("pair", *ROUTE),
        ("shares", "b" * 64, "alder", "birch"),
        ("shares", "a" * 64, "birch", "alder"),
        ("shares", "a" * 64, "alder"),
        ("shares", "a" * 64, "alder,birch"),
        ("shares", *ROUTE, 1),
        (),
    ],
)
def test_a_box_for_another_purpose_stays_closed(
    post_quantum: bool, purpose: tuple[str | int, ...]
) -> None:
    alder, birch = KeyPair.draw(post_quantum), KeyPair.draw(post_quantum)
    box = alder.seal(birch.public, b"share", "shares", *ROUTE)
    with pytest.raises(ProtocolError, match="changed or is not ours") as caught:
        birch.open(alder.public, box, *purpose)
    assert caught.value.fault == "share"


@BOTH
def test_a_box_opens_for_nobody_else_and_from_nobody_else(post_quantum: bool) -> None:
    alder, birch, cedar = (KeyPair.draw(post_quantum) for _ in range(3))
    box = alder.seal(birch.public, b"share", "shares", *ROUTE)
    for reader, sender in ((cedar, alder), (birch, cedar), (alder, birch), (alder, alder)):
        with pytest.raises(ProtocolError):
            reader.open(sender.public, box, "shares", *ROUTE)


@BOTH
def test_every_changed_bit_closes_a_box(post_quantum: bool) -> None:
    alder, birch = KeyPair.draw(post_quantum), KeyPair.draw(post_quantum)
    box = alder.seal(birch.public, b"share", "shares", *ROUTE)
    for at in range(len(box)):
        changed = bytearray(box)
        changed[at] ^= 1 << at % 8
        with pytest.raises(ProtocolError):
            birch.open(alder.public, bytes(changed), "shares", *ROUTE)


@BOTH
def test_every_shortened_box_stays_closed(post_quantum: bool) -> None:
    alder, birch = KeyPair.draw(post_quantum), KeyPair.draw(post_quantum)
    box = alder.seal(birch.public, b"", "shares", *ROUTE)
    for length in range(len(box)):
        with pytest.raises(ProtocolError, match="cut short"):
            birch.open(alder.public, box[:length], "shares", *ROUTE)


def test_either_half_alone_opens_nothing() -> None:
    """Whoever broke X25519, or ML-KEM-768, but not both, still lacks the key."""
    alder, birch = KeyPair.draw(True), KeyPair.draw(True)
    box = alder.seal(birch.public, b"share", "shares", *ROUTE)
    classical = KeyPair(alder.root, post_quantum=False)
    with pytest.raises(ProtocolError):  # knows the X25519 secret
        KeyPair(birch.root, post_quantum=False).open(classical.public, box[1088:], "shares", *ROUTE)
    thief = KeyPair.draw(True)
    thief.__dict__["_mlkem"] = birch._mlkem  # knows the ML-KEM key
    with pytest.raises(ProtocolError):
        thief.open(alder.public, box, "shares", *ROUTE)
    thief.__dict__["_x25519"] = birch._x25519  # positive control: knows both
    del thief.__dict__["public"]
    assert thief.open(alder.public, box, "shares", *ROUTE) == b"share"


@pytest.mark.parametrize("key", SMALL_ORDER)
def test_a_key_of_small_order_is_refused(key: str) -> None:
    with pytest.raises(ProtocolError, match="cannot be used") as caught:
        check_usable(PublicKey(x25519=key))
    assert caught.value.fault == "keys"
    with pytest.raises(ProtocolError, match="cannot be used"):
        KeyPair.draw(False).agree(PublicKey(x25519=key))


@pytest.mark.parametrize("key", SECOND_SPELLINGS)
def test_a_key_has_one_spelling(key: str) -> None:
    with pytest.raises(ProtocolError, match="canonical"):
        check_usable(PublicKey(x25519=key))


def test_a_second_spelling_is_the_same_key() -> None:
    """Positive control: X25519 ignores the top bit, so that two texts would be one key."""
    pair, reader = KeyPair.draw(False), KeyPair.draw(False)
    raw = bytearray.fromhex(pair.public.x25519)
    raw[31] ^= 0x80
    twin = PublicKey(x25519=raw.hex())
    assert twin != pair.public
    assert reader.agree(twin) == reader.agree(pair.public)


@BOTH
def test_fresh_keys_are_usable(post_quantum: bool) -> None:
    check_usable(KeyPair.draw(post_quantum).public)


def test_an_impossible_ml_kem_key_is_refused() -> None:
    """FIPS 203, section 7.2: coefficients are below the modulus."""
    key = KeyPair.draw(True).public.model_copy(update={"mlkem768": "ff" * 1184})
    with pytest.raises(ProtocolError, match="ML-KEM-768"):
        check_usable(key)
    with pytest.raises(ProtocolError, match="ML-KEM-768"):
        KeyPair.draw(True).seal(key, b"share")


def test_a_missing_half_is_refused() -> None:
    with pytest.raises(ProtocolError, match="lacks its post-quantum half") as caught:
        KeyPair.draw(True).seal(KeyPair.draw(False).public, b"share")
    assert caught.value.fault == "keys"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b"), ("ab",)),
        (("a", "b"), ("a,b",)),
        (("a", 1), ("a", "1")),
        (("a",), ("a", "")),
        (("a", "b"), ("b", "a")),
    ],
)
def test_purposes_do_not_run_together(
    one: tuple[str | int, ...], other: tuple[str | int, ...]
) -> None:
    assert derive(bytes(32), *one) != derive(bytes(32), *other)


def test_joined_purposes_would_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: if the parts of a purpose were only joined, two of them are one."""
    monkeypatch.setattr(
        agreement, "canonical_json", lambda parts: "".join(map(str, parts)).encode()
    )
    assert derive(bytes(32), "a", "b") == derive(bytes(32), "ab")


def test_roots_do_not_show() -> None:
    pair = KeyPair.draw(False)
    assert pair.root.hex() not in repr(pair)
    assert repr(pair.root) not in repr(pair)
