"""What the keeper of a SuperNode waits for and tells, without a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedcmr_client.supernode import Patience, SuperNodeSettings
from fedcmr_shared.errors import ConfigurationError


def test_a_killed_node_is_tried_often_and_a_wrong_key_seldom() -> None:
    patience = Patience(refused_s=5, first_s=1, most_s=60)
    assert [patience.before_next(305, ends) for ends in (1, 2, 50)] == [5, 5, 5]
    assert patience.before_next(302, 1) == 60
    assert [patience.before_next(None, ends) for ends in (1, 2, 3, 4)] == [1, 2, 4, 8]
    assert patience.before_next(None, 10_000) == 60


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"superlink": "localhost"}, "superlink"),
        ({"root_certificates": Path("absent.pem")}, "root_certificates"),
        ({"private_key": Path("absent.key")}, "private_key"),
        ({"memory_mib": 16}, "memory_mib"),
    ],
)
def test_settings_that_cannot_work_are_named(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    there = tmp_path / "file"
    there.touch()
    right: dict[str, Any] = {
        "superlink": "127.0.0.1:1",
        "root_certificates": there,
        "private_key": there,
        "folder": tmp_path,
    }
    SuperNodeSettings(**right)
    with pytest.raises(ConfigurationError, match=field):
        SuperNodeSettings(**right | change)
