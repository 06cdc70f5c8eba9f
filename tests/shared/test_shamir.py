"""Any t shares give the secret; fewer give nothing; damaged ones are noticed."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcmr_shared.secagg import shamir
from fedcmr_shared.secagg.faults import ProtocolError
from fedcmr_shared.secagg.shamir import PRIME, SHARE_BYTES, combine, split

SECRET = bytes(range(32))
any_secret = st.binary(min_size=32, max_size=32)


@st.composite
def indices_and_threshold(draw: st.DrawFn) -> tuple[list[int], int]:
    indices = draw(st.lists(st.integers(1, 100), min_size=1, max_size=12, unique=True))
    return indices, draw(st.integers(1, len(indices)))


@given(any_secret, indices_and_threshold(), st.data())
def test_any_t_shares_in_any_order_give_the_secret(
    secret: bytes, shape: tuple[list[int], int], data: st.DataObject
) -> None:
    indices, threshold = shape
    shares = split(secret, threshold, indices)
    assert sorted(shares) == sorted(indices)
    chosen = data.draw(st.permutations(indices))[:threshold]
    assert combine({index: shares[index] for index in chosen}) == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32], ids=["zero", "largest"])
def test_every_secret_of_32_bytes_fits_the_field(secret: bytes) -> None:
    assert combine(split(secret, 3, [1, 2, 3])) == secret


def test_all_subsets_of_a_federation_agree() -> None:
    shares = split(SECRET, 4, range(1, 7))
    for chosen in combinations(shares, 4):
        assert combine({index: shares[index] for index in chosen}) == SECRET


def test_fewer_shares_fit_every_secret() -> None:
    """Given t - 1 shares, each secret has exactly one polynomial: so none is more likely."""
    shares = split(SECRET, 3, [1, 2, 3])
    for other in (bytes(32), b"\xff" * 32, secrets.token_bytes(32)):
        # The third share that would make the first two say ``other``.
        lift = {0: int.from_bytes(other)} | {i: int.from_bytes(shares[i]) for i in (1, 2)}
        third = 0
        for own, value in lift.items():
            above = below = 1
            for at in lift.keys() - {own}:
                above, below = above * (3 - at) % PRIME, below * (own - at) % PRIME
            third += value * above * pow(below, -1, PRIME)
        forged = (third % PRIME).to_bytes(SHARE_BYTES)
        assert combine({1: shares[1], 2: shares[2], 3: forged}) == other


def test_a_share_is_uniform_over_a_small_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every possible polynomial over a field of 7, each value is as frequent at each index."""
    monkeypatch.setattr(shamir, "PRIME", 7)
    for secret in range(7):
        values = Counter(
            tuple(shamir._value([a, b, secret], at) for at in (1, 2))
            for a in range(7)
            for b in range(7)
        )
        assert len(values) == 49
        assert set(values.values()) == {1}


def test_with_a_constant_polynomial_one_share_is_the_secret(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Positive control: without random coefficients a single share tells everything."""
    share = split(SECRET, 3, [1, 2, 3])[2]
    assert int.from_bytes(share) != int.from_bytes(SECRET)
    monkeypatch.setattr(secrets, "randbelow", lambda bound: 0)
    share = split(SECRET, 3, [1, 2, 3])[2]
    assert int.from_bytes(share) == int.from_bytes(SECRET)


def test_two_splits_of_one_secret_differ() -> None:
    assert split(SECRET, 2, [1, 2]) != split(SECRET, 2, [1, 2])


@pytest.mark.parametrize(
    "change",
    [
        lambda share: share[:-1],
        lambda share: share + b"\0",
        lambda share: b"",
        lambda share: PRIME.to_bytes(SHARE_BYTES),
        lambda share: b"\xff" * SHARE_BYTES,
    ],
    ids=["cut", "long", "empty", "the prime", "too large"],
)
def test_what_is_no_element_of_the_field_is_refused(change: Callable[[bytes], bytes]) -> None:
    shares = split(SECRET, 3, [1, 2, 3])
    with pytest.raises(ProtocolError, match="wrong length or is too large") as caught:
        combine({**shares, 2: change(shares[2])})
    assert caught.value.fault == "share"


def test_shares_of_two_secrets_do_not_combine() -> None:
    """But for a chance of 2^-265."""
    shares = {**split(SECRET, 3, [1, 2, 3]), 3: split(SECRET, 3, [1, 2, 3])[3]}
    with pytest.raises(ProtocolError, match="do not belong together"):
        combine(shares)


def test_a_changed_bit_never_gives_the_secret() -> None:
    """Shares are not authenticated: a small change may give another secret, and the protocol
    compares each with a commitment or a public key."""
    shares = split(SECRET, 3, [1, 2, 3])
    others = 0
    for bit in range(8 * SHARE_BYTES):
        changed = (int.from_bytes(shares[1]) ^ 1 << bit).to_bytes(SHARE_BYTES)
        try:
            assert combine({**shares, 1: changed}) != SECRET
            others += 1
        except ProtocolError:
            continue
    assert 0 < others < 8 * SHARE_BYTES


@pytest.mark.parametrize(
    ("secret", "threshold", "indices"),
    [
        (SECRET[:31], 2, [1, 2]),
        (SECRET + b"\0", 2, [1, 2]),
        (SECRET, 0, [1, 2]),
        (SECRET, 3, [1, 2]),
        (SECRET, 2, [1, 1]),
        (SECRET, 2, [0, 1]),
        (SECRET, 2, [-1, 1]),
    ],
)
def test_what_cannot_be_shared_is_refused(
    secret: bytes, threshold: int, indices: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"bytes|does not fit"):
        split(secret, threshold, indices)
