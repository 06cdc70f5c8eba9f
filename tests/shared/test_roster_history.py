"""The chain of rosters: nothing can be left out, altered or signed by somebody else."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.identity.roster import Roster, new_roster
from fedcmr_shared.identity.roster_history import (
    RosterVersion,
    changes,
    next_version,
    verify_history,
)

THREE = new_roster({"alder": "a1" * 32, "birch": "b1" * 32, "cedar": "c1" * 32})
FOUR = new_roster({**THREE.sites, "dogwood": "d1" * 32})
ROTATED = new_roster({**FOUR.sites, "birch": "b2" * 32})


@pytest.fixture
def key(tmp_path: Path) -> SiteKey:
    return SiteKey.create(tmp_path / "coordinator.pem")


@pytest.fixture
def history(key: SiteKey) -> list[RosterVersion]:
    versions: list[RosterVersion] = []
    for roster, reason in ((THREE, "founded"), (FOUR, "dogwood joins"), (ROTATED, "new key")):
        versions.append(next_version(versions, roster, reason, key))
    return versions


def test_a_chain_verifies_also_after_its_json(history: list[RosterVersion], key: SiteKey) -> None:
    read = [RosterVersion.model_validate_json(each.model_dump_json()) for each in history]
    verify_history(read, key.public_key)
    verify_history([], key.public_key)


@pytest.mark.parametrize("gone", [0, 1])
def test_a_missing_version_is_noticed(
    gone: int, history: list[RosterVersion], key: SiteKey
) -> None:
    with pytest.raises(ConfigurationError, match="does not follow"):
        verify_history(history[:gone] + history[gone + 1 :], key.public_key)


def test_versions_of_two_histories_do_not_mix(history: list[RosterVersion], key: SiteKey) -> None:
    other = next_version(history[:1], ROTATED, "another story", key)
    with pytest.raises(ConfigurationError, match="version 3 does not follow"):
        verify_history([history[0], other, history[2]], key.public_key)


@pytest.mark.parametrize(
    "change", [{"roster": THREE}, {"reason": "other"}, {"signature": "0" * 128}]
)
def test_an_altered_version_is_noticed(
    change: dict[str, Roster | str], history: list[RosterVersion], key: SiteKey
) -> None:
    history[2] = history[2].model_copy(update=change)
    with pytest.raises(ConfigurationError, match="roster version 3"):
        verify_history(history, key.public_key)


def test_another_coordinator_cannot_sign(history: list[RosterVersion], tmp_path: Path) -> None:
    other = SiteKey.create(tmp_path / "other.pem")
    with pytest.raises(ConfigurationError, match="roster version 1"):
        verify_history(history, other.public_key)


def test_changes_are_told_site_by_site() -> None:
    assert changes(None, THREE) == ["alder joins", "birch joins", "cedar joins"]
    assert changes(FOUR, ROTATED) == ["birch has another key"]
    assert changes(FOUR, THREE) == ["dogwood leaves"]
    stricter = FOUR.model_copy(update={"threshold": 4})
    assert changes(FOUR, stricter) == ["the threshold changes from 3 to 4"]
    assert changes(FOUR, FOUR) == []
