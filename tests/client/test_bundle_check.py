"""A site takes the one app without code, and no other bundle."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcmr_client.bundle_check import MOST_BYTES, check_bundle
from fedcmr_shared import __version__
from fedcmr_shared.errors import JobRefused
from fedcmr_shared.federation.flower_app import (
    APP_PROJECT,
    CONTENT_ENTRY,
    PROJECT_ENTRY,
    app_bundle,
)

GOOD = app_bundle()
ENTRIES: dict[str, bytes] = {
    name: zipfile.ZipFile(BytesIO(GOOD)).read(name) for name in (PROJECT_ENTRY, CONTENT_ENTRY)
}


def refusal(content: bytes) -> JobRefused:
    with pytest.raises(JobRefused) as caught:
        check_bundle(content)
    assert caught.value.code == "bundle"
    return caught.value


def packed(
    entries: list[tuple[str | zipfile.ZipInfo, bytes]], how: int = zipfile.ZIP_STORED
) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w", how) as bundle:
        for name, content in entries:
            bundle.writestr(name, content)
    return buffer.getvalue()


def with_entry(name: str | zipfile.ZipInfo, content: bytes = b"print('hello')") -> bytes:
    return packed([*ENTRIES.items(), (name, content)])


def symlink(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, 0o120777 << 16
    return entry


def with_project(change: Callable[[str], str]) -> bytes:
    changed = change(APP_PROJECT)
    assert changed != APP_PROJECT
    return packed([(PROJECT_ENTRY, changed.encode()), (CONTENT_ENTRY, ENTRIES[CONTENT_ENTRY])])


def test_the_app_of_this_version_is_taken() -> None:
    check_bundle(app_bundle())


@pytest.mark.parametrize(
    "name",
    [
        "fedcmr_client/__init__.py",
        "../../etc/profile",
        "/etc/cron.d/app",
        "..\\..\\app.py",
        symlink("data"),
        "README.md",
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_any_other_entry_is_refused_and_named(name: str | zipfile.ZipInfo) -> None:
    error = refusal(with_entry(name))
    assert error.rule == "entries"
    written = name if isinstance(name, str) else name.filename
    assert ascii(written) in str(error)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_entry_that_is_there_twice_or_missing_is_refused() -> None:
    assert refusal(with_entry(PROJECT_ENTRY)).rule == "entries"
    assert refusal(packed([(PROJECT_ENTRY, ENTRIES[PROJECT_ENTRY])])).rule == "entries"
    assert "nothing" in str(refusal(packed([])))


def test_a_symlink_in_place_of_the_project_file_is_refused() -> None:
    content = packed(
        [(symlink(PROJECT_ENTRY), b"/etc/passwd"), (CONTENT_ENTRY, ENTRIES[CONTENT_ENTRY])]
    )
    assert refusal(content).rule == "project"


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("fedcmr_client.app:app", "evil:app"),
        lambda text: text.replace('"flwr==1.41.0",', '"flwr==1.41.0",\n    "evil",'),
        lambda text: text.replace(f'version = "{__version__}"', 'version = "99.0.0"'),
        lambda text: text.replace("fedcmr-app", "fedcmr-apq"),
        lambda text: text + '\n[tool.flwr.app.config.more]\nkey = ""\n',
        lambda text: text + "\n[tool.uv]\nindex = 'https://example.org'\n",
        lambda text: text + "\n",
    ],
)
def test_any_other_project_is_refused(change: Callable[[str], str]) -> None:
    assert refusal(with_project(change)).rule == "project"


def test_the_same_project_in_other_bytes_is_refused() -> None:
    assert refusal(packed([*ENTRIES.items()], zipfile.ZIP_DEFLATED)).rule == "encoding"
    assert refusal(b"#!/bin/sh\n" + GOOD).rule == "encoding"


def test_what_is_no_zip_file_is_refused() -> None:
    assert refusal(b"").rule == "archive"
    assert refusal(b"PK\x03\x04").rule == "archive"
    assert refusal(GOOD[:-1]).rule == "archive"


def test_a_large_bundle_is_not_looked_into() -> None:
    assert refusal(GOOD + bytes(MOST_BYTES)).rule == "size"


def test_an_entry_that_unpacks_to_more_than_fits_is_not_unpacked_whole() -> None:
    bomb = packed([(PROJECT_ENTRY, bytes(40 << 20)), (CONTENT_ENTRY, b"")], zipfile.ZIP_DEFLATED)
    assert len(bomb) < MOST_BYTES
    assert refusal(bomb).rule == "project"


def test_names_from_outside_stay_short_and_printable() -> None:
    name = "\x1b[2J" + "é" * 5000
    assert len(message := str(refusal(with_entry(name)))) < 1000
    assert message.isprintable()
    assert message.isascii()


@given(st.integers(0, len(GOOD) - 1), st.integers(1, 255))
def test_no_byte_can_be_changed(place: int, change: int) -> None:
    content = bytearray(GOOD)
    content[place] ^= change
    refusal(bytes(content))


@given(st.integers(0, len(GOOD)), st.binary(min_size=1, max_size=64))
def test_nothing_can_be_put_in(place: int, more: bytes) -> None:
    refusal(GOOD[:place] + more + GOOD[place:])


@given(st.integers(0, len(GOOD)), st.integers(1, 64))
def test_nothing_can_be_left_out(place: int, length: int) -> None:
    left = GOOD[:place] + GOOD[place + length :]
    if left != GOOD:
        refusal(left)


@given(st.binary(max_size=256))
def test_noise_is_refused(content: bytes) -> None:
    refusal(content)
