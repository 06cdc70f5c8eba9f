"""A roster pins names, keys and threshold; whatever is no roster is refused with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.roster import (
    MOST_SITES,
    Roster,
    least_threshold,
    new_roster,
    read_roster,
    roster_text,
)

KEYS = {f"site-{n:03d}": f"{n:064x}" for n in range(1, MOST_SITES + 2)}


def sites(count: int) -> dict[str, str]:
    return dict(list(KEYS.items())[:count])


@pytest.mark.parametrize(
    ("count", "threshold"), [(3, 3), (4, 3), (5, 4), (6, 5), (9, 7), (10, 7), (50, 34), (100, 67)]
)
def test_the_default_threshold_is_just_above_two_thirds(count: int, threshold: int) -> None:
    assert new_roster(sites(count)).threshold == threshold


@pytest.mark.parametrize("count", range(3, MOST_SITES + 1))
def test_more_than_a_third_must_lie_for_two_sets(count: int) -> None:
    threshold = least_threshold(count)
    assert 3 * threshold > 2 * count >= 3 * (threshold - 1)
    assert 3 * (2 * threshold - count) > count


@pytest.mark.parametrize("count", [3, 4, 10, 100])
def test_a_threshold_may_be_any_from_the_least_to_all(count: int) -> None:
    least = least_threshold(count)
    for threshold in (least, count):
        assert Roster(sites=sites(count), threshold=threshold).threshold == threshold
    for threshold in (0, -1, least - 1, count + 1):
        with pytest.raises(ValidationError, match="threshold"):
            Roster(sites=sites(count), threshold=threshold)


@pytest.mark.parametrize("count", [0, 1, 2, MOST_SITES + 1])
def test_too_few_or_too_many_sites_are_no_roster(count: int) -> None:
    with pytest.raises(ConfigurationError, match="sites"):
        new_roster(sites(count))


@given(st.permutations(list(sites(6))))
def test_the_order_of_the_sites_does_not_matter(order: list[str]) -> None:
    one, other = new_roster(sites(6)), new_roster({name: KEYS[name] for name in order})
    assert (one.sha256, one.names, one.fingerprint) == (
        other.sha256,
        other.names,
        other.fingerprint,
    )
    assert [other.index(name) for name in other.names] == [1, 2, 3, 4, 5, 6]


def test_the_fingerprint_is_the_whole_digest() -> None:
    """Of half of it, an author of rosters finds two alike in 2^64 trials."""
    roster = new_roster(sites(4))
    assert roster.fingerprint.replace(" ", "") == roster.sha256
    assert {len(part) for part in roster.fingerprint.split(" ")} == {4}


def test_every_field_is_in_the_digest() -> None:
    first = new_roster(sites(4))
    others = [
        Roster(sites=first.sites, threshold=4),
        new_roster({**first.sites, "site-004": "f" * 64}),
        new_roster(dict(zip(["a", *first.names[1:]], first.sites.values(), strict=True))),
        new_roster(sites(5)),
    ]
    assert len({roster.sha256 for roster in (first, *others)}) == 5


def test_two_sites_do_not_share_a_key() -> None:
    with pytest.raises(ConfigurationError, match="same key"):
        new_roster({**sites(3), "twin": KEYS["site-001"]})


@pytest.mark.parametrize(
    "name", ["", "-a", ".a", "a b", "a/b", "a\n", "ä", "a\ud800", "x" * 64, "a\0"]
)
def test_a_name_is_short_plain_text(name: str) -> None:
    with pytest.raises(ConfigurationError):
        new_roster({**sites(3), name: "e" * 64})


@pytest.mark.parametrize("key", ["", "e" * 63, "e" * 65, "E" * 64, "g" * 64, "e" * 64 + "\n"])
def test_a_key_is_64_hexadecimal_digits(key: str) -> None:
    with pytest.raises(ConfigurationError, match="site-009"):
        new_roster({**sites(3), "site-009": key})


@pytest.mark.parametrize(("threshold", "expected"), [(7, 4), (8, 4), (9, 4)])
def test_a_subset_needs_at_least_the_same_share(threshold: int, expected: int) -> None:
    roster = Roster(sites=sites(9), threshold=threshold)
    part = roster.subset(["site-007", "site-002", "site-004", "site-001"])
    assert part.names == ("site-001", "site-002", "site-004", "site-007")
    assert part.threshold == expected


def test_a_subset_needs_more_than_two_thirds() -> None:
    assert (
        new_roster(sites(50)).subset([f"site-{number:03d}" for number in range(1, 6)]).threshold
        == 4
    )


@pytest.mark.parametrize(
    "names", [[], ["site-001", "site-002"], ["site-001", "site-002", "site-003", "stranger"]]
)
def test_a_subset_is_of_three_known_sites(names: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="at least 3 sites of the roster"):
        new_roster(sites(5)).subset(names)


def test_a_file_keeps_the_roster(tmp_path: Path) -> None:
    keys = [Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex() for _ in range(4)]
    roster = new_roster(dict(zip(["alder", "birch", "cedar", "1-elm"], keys, strict=True)))
    path = tmp_path / "roster.yaml"
    path.write_text(roster_text(roster))
    assert read_roster(path) == roster


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "roster.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def test_a_file_without_threshold_has_the_default(tmp_path: Path) -> None:
    lines = "".join(f"  {name}: '{key}'\n" for name, key in sites(4).items())
    for threshold in ("", "threshold:\n", "threshold: 3\n"):
        assert read_roster(written(tmp_path, f"sites:\n{lines}{threshold}")) == new_roster(sites(4))


def test_a_site_that_is_named_twice_is_noticed(tmp_path: Path) -> None:
    lines = [f"  {name}: '{key}'\n" for name, key in sites(4).items()]
    text = "".join(["sites:\n", *lines, f"  site-002: '{'f' * 64}'\n"])
    with pytest.raises(ConfigurationError, match="site-002 is there twice"):
        read_roster(written(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "valid dictionary"),
        ("sites: [", "not valid YAML"),
        ("sites: {}", "sites"),
        ("sites: 3", "sites"),
        ("- alder", "valid dictionary"),
        (f"sites: {sites(3)}\nthreshold: 2", "threshold is 2"),
        (f"sites: {sites(3)}\nthreshold: two", "threshold"),
        (f"sites: {sites(3)}\nthreshold: .inf", "threshold"),
        (f"sites: {sites(3)}\ncoordinator: me", "coordinator"),
        (f"sites:\n  4: {'e' * 64}\n  5: {'f' * 64}\n  6: {'0' * 63}a", "sites"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("\udcff", "not valid YAML"),
    ],
)
def test_what_is_no_roster_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        read_roster(written(tmp_path, text))
    assert "roster.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none\.yaml cannot be read"):
        read_roster(tmp_path / "none.yaml")


def test_a_roster_does_not_change() -> None:
    roster = new_roster(sites(3))
    with pytest.raises(ValidationError, match="frozen"):
        roster.threshold = 1  # type: ignore[misc]  # that is the point
