"""What the keeper of a SuperNode waits for and tells, without Flower."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedcmr_client.supernode import Patience, SuperNode, SuperNodeSettings
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


def test_a_supernode_whose_main_thread_fails_does_not_linger() -> None:
    failing = """
import threading
from fedcmr_client import supernode_process
def flower_supernode():
    threading.Thread(target=threading.Event().wait).start()  # Flower's web server
    raise OSError("no more files")
supernode_process.flower_supernode = flower_supernode
supernode_process.main()
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", failing], stdin=pipe, stderr=pipe) as process:
        try:
            assert process.wait(60) == 1
            assert process.stderr is not None
            assert b"no more files" in process.stderr.read()
        finally:
            process.kill()


@pytest.mark.parametrize(("which", "ends"), [("message 4750.", True), ("reply message 65.", False)])
def test_a_question_that_its_run_has_left_behind_ends_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str, ends: bool
) -> None:
    key = tmp_path / "key"
    key.touch()
    supernode = SuperNode(SuperNodeSettings("127.0.0.1:1", key, key, tmp_path))
    sent: list[signal.Signals] = []
    monkeypatch.setattr(supernode, "_end", sent.append)
    supernode._notice(f"Run ID 28 is not in `RUNNING` status. Ignoring {which}")
    assert sent == [signal.SIGTERM] * ends
