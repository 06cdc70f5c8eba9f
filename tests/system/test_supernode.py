"""A real SuperNode is kept running beside its agent, and never without it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import worker_apps
from flower_parties import (
    SuperLink,
    alive,
    free_port,
    grid_of_run,
    new_node_key,
    superlink,
    wait_for,
)
from flwr.app import RecordDict

from fedcmr_client.runner import Runner
from fedcmr_client.supernode import Patience, SuperNode, SuperNodeSettings
from fedcmr_shared.federation.flower_app import APP_PROJECT, app_bundle

HASTY = Patience(refused_s=0.1, first_s=0.1, most_s=0.5)


@pytest.fixture(scope="module")
def link(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SuperLink]:
    with superlink(tmp_path_factory.mktemp("superlink")) as running:
        yield running


@pytest.fixture
def settings(link: SuperLink, tmp_path: Path) -> SuperNodeSettings:
    """Settings of a node that may join."""
    link.register(new_node_key(tmp_path / "key"))
    return SuperNodeSettings(link.address, link.authority, tmp_path / "key", tmp_path / "node")


def connected(supernode: SuperNode) -> int:
    return wait_for("the connection", lambda: supernode.node_id)


def process_of(supernode: SuperNode) -> int:
    return wait_for("the process", lambda: supernode.process_id)


def test_a_stopped_node_signs_off_and_may_come_back_at_once(
    link: SuperLink, settings: SuperNodeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = set()
    for _ in range(2):
        with ExitStack() as running:
            # The hospital's proxy is for others; this process asks the SuperLink without it.
            with monkeypatch.context() as hospital:
                hospital.setenv("https_proxy", "http://127.0.0.1:9")
                supernode = running.enter_context(SuperNode(settings))
                numbers.add(node := connected(supernode))
            process = process_of(supernode)
            assert supernode.problem is None
            assert supernode.runtime is not None
            assert link.online(node)
        assert not alive(process)
        assert not link.online(node)
        assert (supernode.runtime, supernode.node_id) == (None, None)
    assert len(numbers) == 1


def test_its_secret_is_private_and_new_for_every_start(settings: SuperNodeSettings) -> None:
    secrets = set()
    with SuperNode(settings, HASTY) as supernode:
        for _ in range(2):
            connected(supernode)
            runtime = supernode.runtime
            assert runtime is not None
            secrets.add(runtime.secret)
            file = settings.folder / "runtime.secret"
            assert file.read_bytes() == runtime.secret
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            assert stat.S_IMODE(settings.folder.stat().st_mode) == 0o700
            first = process_of(supernode)
            supernode.restart()
            wait_for("another", lambda first=first: process_of(supernode) != first)  # type: ignore[misc]
    assert len(secrets) == 2


def test_a_killed_node_is_started_until_it_is_let_in(settings: SuperNodeSettings) -> None:
    with SuperNode(settings, HASTY) as supernode:
        connected(supernode)
        os.kill(process_of(supernode), signal.SIGKILL)
        # Flower holds it online for a minute; the tries go on.
        wait_for("the refusal", lambda: "Flower 305" in (supernode.problem or ""))
        refused = process_of(supernode)
        wait_for("one more try", lambda: process_of(supernode) != refused)
        assert supernode.runtime is None


def test_a_key_that_flower_cannot_read_is_named(settings: SuperNodeSettings) -> None:
    settings.private_key.write_text("no key")
    with SuperNode(settings, HASTY) as supernode:
        wait_for("the problem", lambda: "Flower 302" in (supernode.problem or ""))


def test_a_key_that_the_coordinator_does_not_know_is_named(settings: SuperNodeSettings) -> None:
    new_node_key(settings.private_key)
    with SuperNode(settings, HASTY) as supernode:
        wait_for("the problem", lambda: "key is registered" in (supernode.problem or ""))


def test_a_coordinator_that_is_away_is_waited_for(
    settings: SuperNodeSettings,
) -> None:
    away = replace(settings, superlink=f"127.0.0.1:{free_port()}")
    with SuperNode(away) as supernode:
        wait_for("the problem", lambda: "be reached" in (supernode.problem or ""))
        process = process_of(supernode)
        assert supernode.runtime is None
    assert not alive(process)


def test_a_killed_agent_takes_its_supernode_along(
    link: SuperLink, settings: SuperNodeSettings
) -> None:
    agent = f"""
from pathlib import Path
from threading import Event
from fedcmr_client.supernode import SuperNode, SuperNodeSettings
supernode = SuperNode(SuperNodeSettings(
    {settings.superlink!r}, Path({str(settings.root_certificates)!r}),
    Path({str(settings.private_key)!r}), Path({str(settings.folder)!r})))
supernode.start()
while supernode.node_id is None:
    Event().wait(0.05)
print(supernode.node_id, supernode.process_id, flush=True)
Event().wait()
"""
    process = subprocess.Popen([sys.executable, "-c", agent], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        node, supernode = map(int, process.stdout.readline().split())
        assert alive(supernode)
        process.kill()
        wait_for("its end", lambda: not alive(supernode))
        assert not link.online(node), "it signed off and may come back at once"
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_a_bundle_that_unpacks_to_too_much_ends_the_node_for_a_moment_only(
    link: SuperLink, settings: SuperNodeSettings, tmp_path: Path
) -> None:
    # Flower's SuperNode itself reads the project file of every bundle.
    small = replace(settings, memory_mib=512)
    with SuperNode(small, HASTY) as supernode:
        node, first = connected(supernode), process_of(supernode)
        with grid_of_run(link, _bomb()) as run:
            run.push(node, "train", RecordDict())
            wait_for("another", lambda: process_of(supernode) != first)
        assert not alive(first)
        assert connected(supernode) == node
        with (
            Runner(supernode, "alder", tmp_path, record_refusal=print, app=worker_apps.answer),
            grid_of_run(link, app_bundle()) as run,
        ):
            assert "own" in run.ask(node, "train", worker_apps.question(tmp_path)).content


def _bomb() -> bytes:
    """A bundle of less than a megabyte with a project file of 512 MiB."""
    buffer = BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as bundle:
        with bundle.open("pyproject.toml", "w") as project:
            project.write(APP_PROJECT.encode())
            for _ in range(512):
                project.write(b"\n" * (1 << 20))
        bundle.writestr(".info/CONTENT", b"")
    return buffer.getvalue()
