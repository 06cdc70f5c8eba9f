"""The coordinator's folder appears complete or not at all, and nobody else may read it."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from coordinator_parties import Party, new_home

from fedcmr_server import home as module
from fedcmr_server.home import CoordinatorHome, write_private
from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.certificates import (
    certificate_pem,
    days_left,
    is_issued_by,
    issue_server,
    key_pem,
    new_authority,
    new_key,
    read_certificate,
)


@pytest.fixture
def home(tmp_path: Path) -> CoordinatorHome:
    return new_home(tmp_path / "c")


def test_what_was_made_opens_as_the_same(home: CoordinatorHome) -> None:
    opened = CoordinatorHome.open(home.folder)
    assert opened == home
    assert opened.fingerprint == home.fingerprint
    assert opened.identity().public_key == home.identity().public_key
    assert len(opened.federation_sha256) == 64
    assert opened.database_url == f"sqlite:///{home.folder}/coordinator.sqlite"


def test_nobody_else_may_read_any_of_it(home: CoordinatorHome) -> None:
    for path in [home.folder, *home.folder.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def test_every_setting_is_explained_in_the_file(home: CoordinatorHome) -> None:
    lines = (home.folder / "coordinator.yaml").read_text().splitlines()
    for name in type(home.settings).model_fields:
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{name}: "))
        assert lines[at - 1].startswith("# "), name


def test_a_kit_has_the_fingerprint_that_the_coordinator_reads_out(
    home: CoordinatorHome, tmp_path: Path
) -> None:
    with home.store() as store:
        alder = Party.make(tmp_path / "alder", "alder").join(home, store).kit
        birch = Party.make(tmp_path / "birch", "birch").join(home, store).kit
    assert alder.fingerprint == birch.fingerprint == home.fingerprint
    assert alder.coordinator_key == home.identity().public_key


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_private", fail)
    with pytest.raises(ConfigurationError, match="No space left"):
        new_home(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_private(path, b"old")

    def fail(source: object, target: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        write_private(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_existing_folder_is_left_alone(home: CoordinatorHome) -> None:
    before = home.identity().public_key
    with pytest.raises(ConfigurationError, match="exists"):
        new_home(home.folder)
    assert home.identity().public_key == before


def test_a_folder_that_is_none_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="fedcmr coordinator init"):
        CoordinatorHome.open(tmp_path)


def test_a_folder_that_others_may_enter_is_refused(home: CoordinatorHome) -> None:
    home.folder.chmod(0o750)
    with pytest.raises(ConfigurationError, match="chmod 700"):
        CoordinatorHome.open(home.folder)


def test_a_path_too_long_for_sockets_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="choose a shorter one"):
        new_home(tmp_path / ("c" * 100))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("port: 70000", "port"),
        ("listen: somewhere", "listen"),
        ("jobs_at_once: 0", "jobs_at_once"),
        ("colour: red", "colour is unknown"),
        ("database_url: postgresql+psycopg://me:secret@db/x", "holds a password"),
        ("database_url: sqlite:///here.sqlite", "four slashes"),
        ("database_url: mysql://db/x", "names mysql"),
    ],
)
def test_a_wrong_setting_is_named(home: CoordinatorHome, line: str, problem: str) -> None:
    path = home.folder / "coordinator.yaml"
    name = line.partition(":")[0]
    kept = [each for each in path.read_text().splitlines() if not each.startswith(f"{name}:")]
    path.write_text("\n".join([*kept, line]))
    with pytest.raises(ConfigurationError, match=problem) as caught:
        CoordinatorHome.open(home.folder)
    assert "secret" not in str(caught.value)


def test_keys_that_do_not_belong_together_are_refused(home: CoordinatorHome) -> None:
    write_private(home.keys / "authority.pem", key_pem(new_key()))
    with pytest.raises(ConfigurationError, match="do not belong together"):
        home.authority()


def test_a_missing_key_says_which(home: CoordinatorHome) -> None:
    (home.keys / "authority.crt").unlink()
    with pytest.raises(ConfigurationError, match=r"authority\.crt cannot be read"):
        home.authority()


def test_the_server_certificate_is_renewed_30_days_ahead_and_not_before(
    home: CoordinatorHome,
) -> None:
    now = datetime.now(UTC)
    path = home.keys / "server.crt"
    before = path.read_bytes()
    assert not home.renew_server_certificate(now + timedelta(days=334))
    assert path.read_bytes() == before
    assert home.renew_server_certificate(now + timedelta(days=336))
    renewed = read_certificate(path.read_bytes())
    assert is_issued_by(renewed, home.authority().certificate)
    assert days_left(renewed, now + timedelta(days=336)) > 360


def test_an_unusable_server_certificate_is_replaced(home: CoordinatorHome) -> None:
    certificate, key = home.keys / "server.crt", home.keys / "server.pem"
    other = new_key()
    elsewhere = issue_server(home.authority(), other, ["elsewhere.example"])
    foreign = issue_server(new_authority("heart"), other, ["127.0.0.1"])
    for spoil in (
        key.unlink,
        lambda: certificate.write_text("torn"),
        lambda: write_private(key, key_pem(new_key())),  # killed between the two files
        lambda: _put(home, key_pem(other), certificate_pem(elsewhere)),
        lambda: _put(home, key_pem(other), certificate_pem(foreign)),
    ):
        spoil()
        assert home.renew_server_certificate()
        assert not home.renew_server_certificate()


def _put(home: CoordinatorHome, key: bytes, certificate: str) -> None:
    write_private(home.keys / "server.pem", key)
    write_private(home.keys / "server.crt", certificate.encode())
