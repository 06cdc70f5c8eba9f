"""A release verifies as it was written and in no other way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from release_parts import FEDERATION, JOB, NOW, make_card, model_state, write_model

from fedcmr_shared.errors import ModelError
from fedcmr_shared.identity.keys import SiteKey
from fedcmr_shared.models import archive
from fedcmr_shared.models.archive import read_archive, write_archive
from fedcmr_shared.models.bundle import save_bundle
from fedcmr_shared.models.card import GateResult, LineageRound, ModelCard
from fedcmr_shared.models.card_text import card_text
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.models.release import (
    CARD,
    LARGEST,
    MODEL,
    SIGNATURE,
    TEXT,
    ReleaseBundle,
    ReleaseSignature,
    load_model,
)
from fedcmr_shared.schemas.canonical import canonical_json
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation

MEMBERS = (MODEL, CARD, TEXT, SIGNATURE)


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SiteKey:
    return SiteKey.create(tmp_path_factory.mktemp("key") / "identity.pem")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("model") / "round-002.safetensors"
    return path, write_model(path)


@pytest.fixture(scope="module")
def release(
    tmp_path_factory: pytest.TempPathFactory, key: SiteKey, model: tuple[Path, str]
) -> bytes:
    path = tmp_path_factory.mktemp("release") / "heart.zip"
    ReleaseBundle.write(path, model[0], make_card(key, model[1]), key)
    return path.read_bytes()


@pytest.fixture(scope="module")
def parts(release: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(BytesIO(release)) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("place") / "altered.zip"


def refused(place: Path, content: bytes, key: SiteKey) -> str:
    place.write_bytes(content)
    with pytest.raises(ModelError) as error:
        ReleaseBundle.verify(place, key.public_key)
    assert str(error.value).startswith(f"release {place}: ")
    return str(error.value).removeprefix(f"release {place}: ")


def signed(parts: dict[str, bytes], key: SiteKey, **changed: bytes) -> bytes:
    """Return a release of other parts, signed like a real one: what a lying coordinator can do."""
    contents = {**parts, **changed}
    digests = {n: hashlib.sha256(contents[n]).hexdigest() for n in (MODEL, CARD, TEXT)}
    contents[SIGNATURE] = as_json(ReleaseSignature.sign(digests, key).model_dump(mode="json"))
    return packed(contents)


def packed(contents: dict[str, bytes]) -> bytes:
    file = BytesIO()
    write_archive(file, contents)
    return file.getvalue()


def as_json(value: Any) -> bytes:
    return canonical_json(value) + b"\n"


def altered_card(parts: dict[str, bytes], change: Callable[[dict[str, Any]], None]) -> bytes:
    card = json.loads(parts[CARD])
    change(card)
    return as_json(card)


class TestRoundTrip:
    def test_a_release_verifies(self, place: Path, release: bytes, key: SiteKey) -> None:
        place.write_bytes(release)
        found = ReleaseBundle.verify(place, key.public_key)
        assert found.card.job == JOB
        assert found.card.created_at == NOW
        assert found.signature.key == key.public_key
        assert found.size == len(release)
        for name, tensor in found.bundle.model.state_dict().items():
            assert torch.equal(tensor, model_state(2)[name])
        assert ReleaseBundle.read(place).sha256 == found.sha256

    def test_the_same_parts_give_the_same_bytes(
        self, tmp_path: Path, release: bytes, key: SiteKey, model: tuple[Path, str]
    ) -> None:
        again = tmp_path / "again.zip"
        ReleaseBundle.write(again, model[0], make_card(key, model[1]), key)
        assert again.read_bytes() == release

    def test_other_programs_read_it(self, place: Path, release: bytes) -> None:
        with zipfile.ZipFile(BytesIO(release)) as file:
            assert file.testzip() is None
            assert tuple(file.namelist()) == MEMBERS
            assert {info.date_time for info in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        place.write_bytes(release)
        subprocess.run([sys.executable, "-m", "zipfile", "-t", place], check=True)

    def test_a_bundle_and_a_release_load_alike(
        self, place: Path, release: bytes, key: SiteKey, model: tuple[Path, str]
    ) -> None:
        place.write_bytes(release)
        assert load_model(place).sha256 == load_model(model[0]).sha256
        assert load_model(place, key.public_key).sha256 == model[1]
        with pytest.raises(ModelError, match="only releases are signed"):
            load_model(model[0], key.public_key)

    def test_the_text_of_format_1_never_changes(self, parts: dict[str, bytes]) -> None:
        text = parts[TEXT].decode()
        assert text == card_text(ModelCard.model_validate_json(parts[CARD]))
        for expected in (
            "# heart\n\ncardiomm tiny MM, trained by the federation hearts, released 2030-05-01T12",
            "This job costs a patient of any one site at most ε = 3.49 at δ = 1e-5.\n",
            "| --- | --- | --- | --- | --- |\n| train | 0.1 | 2 | 180 | 3.49 |\n",
            "| 2 | 3 | psnr 27.25 |\n",
            "- origin: simulated\n",
        ):
            assert expected in text
        # Whoever changes a word makes every older release invalid: take another format instead.
        words = re.sub("[0-9a-f]{64}", "", text)
        assert hashlib.sha256(words.encode()).hexdigest().startswith("9d95b78443e2591c")

    def test_the_words_of_a_card_are_no_markup(self, key: SiteKey) -> None:
        start = make_card(key, "22" * 32).lineage.start
        start = start.model_copy(update={"notes": {"a": "<script>\n# *x* [y](z) `"}})
        lineage = make_card(key, "22" * 32).lineage.model_copy(update={"start": start})
        text = card_text(make_card(key, "22" * 32, lineage=lineage))
        assert r"- a: \<script\> \# \*x\* \[y\](z) \`" in text


class TestTampering:
    @settings(max_examples=300)
    @given(data=st.data())
    def test_no_flipped_bit_verifies(
        self, data: st.DataObject, place: Path, release: bytes, key: SiteKey
    ) -> None:
        # The weights are most of the file: half of the flips go to what follows them.
        model_end = release.index(b"PK\x03\x04", 4)
        low = data.draw(st.sampled_from([0, model_end]))
        at = data.draw(st.integers(low, len(release) - 1))
        content = bytearray(release)
        content[at] ^= 1 << data.draw(st.integers(0, 7))
        refused(place, bytes(content), key)

    def test_no_byte_outside_of_the_contents_is_free(
        self, place: Path, parts: dict[str, bytes], key: SiteKey
    ) -> None:
        # A few weights are enough here: what is tested are headers, names and the list at the end.
        small = packed({**parts, MODEL: b"few"})
        inside = set()
        for content in (b"few", *(parts[name] for name in MEMBERS[1:])):
            start = small.index(content)
            inside |= set(range(start, start + len(content)))
        copies = {name: BytesIO() for name in MEMBERS}
        assert read_archive(BytesIO(small), LARGEST, copies)  # the control
        outside = [at for at in range(len(small)) if at not in inside]
        assert len(outside) > 300
        for at in outside:
            for bit in range(8):
                content = bytearray(small)
                content[at] ^= 1 << bit
                with pytest.raises(ModelError):
                    read_archive(BytesIO(content), LARGEST, copies)

    @settings(max_examples=40)
    @given(data=st.data())
    def test_no_truncated_file_verifies(
        self, data: st.DataObject, place: Path, release: bytes, key: SiteKey
    ) -> None:
        ends = st.one_of(st.integers(0, len(release) - 1), st.integers(1, 600).map(lambda n: -n))
        refused(place, release[: data.draw(ends)], key)

    @pytest.mark.parametrize("extra", [b"\0", b"PK\x05\x06" + bytes(18)])
    def test_nothing_may_stand_before_or_after(
        self, extra: bytes, place: Path, release: bytes, key: SiteKey
    ) -> None:
        assert "the list of members at its end" in refused(place, release + extra, key)
        assert "not where it belongs" in refused(place, extra + release, key)

    def test_another_key_is_not_trusted(
        self, place: Path, release: bytes, parts: dict[str, bytes], tmp_path: Path
    ) -> None:
        other = SiteKey.create(tmp_path / "other.pem")
        assert "another coordinator, or forged" in refused(place, release, other)
        # Signed by the other one, with the name of the trusted one.
        signature = json.loads(parts[SIGNATURE])
        forged = {**signature, "signature": other.sign(b"anything")}
        key_named = packed({**parts, SIGNATURE: as_json(forged)})
        place.write_bytes(key_named)
        with pytest.raises(ModelError, match="not that of key"):
            ReleaseBundle.verify(place, signature["key"])
        with pytest.raises(ModelError, match="not that of key"):
            ReleaseBundle.read(place)

    def test_the_other_key_cannot_use_the_authorisation(
        self, place: Path, parts: dict[str, bytes], tmp_path: Path
    ) -> None:
        other = SiteKey.create(tmp_path / "other.pem")
        assert "card.json: authorisation: " in refused(place, signed(parts, other), other)

    @pytest.mark.parametrize("name", [MODEL, CARD, TEXT])
    def test_every_part_is_signed(
        self, name: str, place: Path, parts: dict[str, bytes], key: SiteKey
    ) -> None:
        content = parts[name][:-1] + bytes([parts[name][-1] ^ 1])
        assert f"{name} is not what was signed" in refused(
            place, packed({**parts, name: content}), key
        )

    def test_the_signature_is_under_this_format(
        self, place: Path, parts: dict[str, bytes], key: SiteKey
    ) -> None:
        for change in ({"format": "fedcmr-release-2"}, {"colour": "red"}, {"members": {}}):
            content = as_json({**json.loads(parts[SIGNATURE]), **change})
            refused(place, packed({**parts, SIGNATURE: content}), key)
        spaced = json.dumps(json.loads(parts[SIGNATURE]), indent=1).encode()
        message = refused(place, packed({**parts, SIGNATURE: spaced}), key)
        assert message == "signature.json is not written as releases are"


class TestArchive:
    """Archives that other programs write, or that are made to be read in two ways."""

    def zipped(self, members: list[tuple[str, bytes]], **how: Any) -> bytes:
        file = BytesIO()
        with zipfile.ZipFile(file, "w", **how) as archive_:
            for name, content in members:
                info = zipfile.ZipInfo(name)
                info.create_system, info.external_attr = 3, 0o100644 << 16
                archive_.writestr(info, content, how.get("compression"))
        return file.getvalue()

    def test_another_program_can_write_the_same_bytes(
        self, parts: dict[str, bytes], release: bytes
    ) -> None:
        # The control of the tests below: they fail for what they add, not for who writes.
        assert self.zipped([(name, parts[name]) for name in MEMBERS]) == release

    @pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
    @pytest.mark.parametrize(
        ("names", "message"),
        [
            ((MODEL, CARD, TEXT), "it ends before signature.json|not where it belongs"),
            ((CARD, MODEL, TEXT, SIGNATURE), "model.safetensors is not where it belongs"),
            ((*MEMBERS, "run.py"), "not where it belongs|list of members"),
            ((*MEMBERS, MODEL), "not where it belongs|list of members"),
            ((MODEL, CARD, CARD, TEXT, SIGNATURE), "not where it belongs"),
            (("../" + MODEL, CARD, TEXT, SIGNATURE), "not where it belongs"),
            (("/" + MODEL, CARD, TEXT, SIGNATURE), "not where it belongs"),
            (("x/" + MODEL, CARD, TEXT, SIGNATURE), "not where it belongs"),
            ((MODEL.upper(), CARD, TEXT, SIGNATURE), "not where it belongs"),
        ],
    )
    def test_other_members(
        self,
        names: tuple[str, ...],
        message: str,
        place: Path,
        parts: dict[str, bytes],
        key: SiteKey,
    ) -> None:
        def content(name: str) -> bytes:
            return parts.get(name.rpartition("/")[2].lower(), b"print()")

        contents = [(name, content(name)) for name in names]
        place.write_bytes(self.zipped(contents))
        with pytest.raises(ModelError, match=message):
            ReleaseBundle.verify(place, key.public_key)
        if len(set(names)) == len(names):
            place.write_bytes(packed(dict(contents)))  # our own writer, so only the names differ
            with pytest.raises(ModelError, match=message):
                ReleaseBundle.verify(place, key.public_key)

    def test_compressed(self, place: Path, parts: dict[str, bytes], key: SiteKey) -> None:
        contents = [(name, parts[name]) for name in MEMBERS]
        squeezed = self.zipped(contents, compression=zipfile.ZIP_DEFLATED)
        assert "not where it belongs" in refused(place, squeezed, key)

    def test_a_member_that_says_it_is_huge(
        self, place: Path, parts: dict[str, bytes], key: SiteKey
    ) -> None:
        for name in MEMBERS[1:]:
            content = packed({**parts, MODEL: b"few", name: bytes(LARGEST[name] + 1)})
            assert f"{name} has {LARGEST[name] + 1} bytes" in refused(place, content, key)

    def test_what_is_too_large_is_not_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(archive, "LARGEST", 1000)
        with pytest.raises(ModelError, match="larger than 1000 bytes"):
            write_archive(BytesIO(), {"a": bytes(2000)})

    def test_no_file_and_no_zip(self, tmp_path: Path, key: SiteKey) -> None:
        with pytest.raises(ModelError, match="no such file"):
            ReleaseBundle.verify(tmp_path / "none.zip", key.public_key)
        with pytest.raises(ModelError, match="no such file"):
            ReleaseBundle.verify(tmp_path, key.public_key)
        assert "it ends before model.safetensors" in refused(tmp_path / "a", b"", key)


class TestLyingCoordinator:
    """What is signed with the right key and is wrong all the same."""

    def test_positive_control(self, place: Path, parts: dict[str, bytes], key: SiteKey) -> None:
        place.write_bytes(signed(parts, key))
        assert ReleaseBundle.verify(place, key.public_key)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda card: card["privacy"].update(epsilon=0.5), "privacy: the claim (ε = 0.5)"),
            (lambda card: card["privacy"].update(delta=1e-6), "privacy: the claim"),
            (lambda card: card["privacy"].update(order=64), "privacy: the claim"),
            (lambda card: card["privacy"]["phases"].pop("evaluate"), "privacy: the claim"),
            (lambda card: card["privacy"]["phases"]["train"].update(starts=2), "the claim"),
            (
                lambda card: card["privacy"]["phases"]["evaluate"].update(epsilon=None),
                "privacy: the claim",
            ),
            (lambda card: card["job"].update(rounds=1), "job_sha256 and authorisation"),
            (lambda card: card["job"]["privacy"].update(noise_multiplier=9.0), "job_sha256"),
            (lambda card: card.update(job_sha256="0" * 64), "job_sha256"),
            (lambda card: card.update(federation_sha256="0" * 64), "of another federation"),
            (lambda card: card["lineage"]["rounds"].pop(), "lineage: 1 rounds, the job has 2"),
            (lambda card: card["lineage"]["rounds"].reverse(), "rounds: they must be numbered"),
            (lambda card: card["lineage"]["rounds"][0].update(sites=2), "over 2 sites"),
            (lambda card: card["lineage"]["rounds"][0].update(closed=True), "yet the model"),
            (lambda card: card["lineage"].update(roster_sha256=None), "has a roster"),
            (lambda card: card["evaluation"][0].update(round=3), "other rounds"),
            (lambda card: card["evaluation"].reverse(), "other rounds"),
            (lambda card: card["evaluation"][0].update(means={"ssim": 1.0}), "asks not"),
            (
                lambda card: card["gates"].append(
                    {"gate": "memorisation", "passed": False, "text": "3 patients are copied"}
                ),
                "gates: memorisation did not pass",
            ),
            (lambda card: card.update(colour="red"), "colour"),
            (lambda card: card.update(schema_version="2"), "schema_version"),
        ],
    )
    def test_an_altered_card(
        self,
        change: Callable[[dict[str, Any]], None],
        message: str,
        place: Path,
        parts: dict[str, bytes],
        key: SiteKey,
    ) -> None:
        content = signed(parts, key, **{CARD: altered_card(parts, change)})
        reason = refused(place, content, key)
        assert reason.startswith("card.json: ")
        assert message in reason

    def test_an_altered_last_model(
        self, place: Path, parts: dict[str, bytes], key: SiteKey, tmp_path: Path
    ) -> None:
        card = make_card(key, "33" * 32)
        texts = {CARD: as_json(card.model_dump(mode="json")), TEXT: card_text(card).encode()}
        reason = refused(place, signed(parts, key, **texts), key)
        assert "the lineage ends with 3333333333333333…" in reason
        write_model(tmp_path / "other", seed=3)
        other = {MODEL: (tmp_path / "other").read_bytes()}
        assert "and the lineage ends with" in refused(place, signed(parts, key, **other), key)

    def test_a_model_of_another_kind(
        self, place: Path, parts: dict[str, bytes], key: SiteKey, tmp_path: Path
    ) -> None:
        spec = JOB.model.model_copy(update={"variant": "SM"})
        save_bundle(tmp_path / "m", build_model(spec).state_dict(), spec, {})
        content = signed(parts, key, **{MODEL: (tmp_path / "m").read_bytes()})
        assert "not the model of the card's job" in refused(place, content, key)

    def test_a_text_that_says_something_else(
        self, place: Path, parts: dict[str, bytes], key: SiteKey
    ) -> None:
        text = parts[TEXT].replace(b"3.49", b"0.10")
        assert text != parts[TEXT]
        reason = refused(place, signed(parts, key, **{TEXT: text}), key)
        assert reason == "card.md is not the text that belongs to card.json"

    def test_a_card_with_two_readings(
        self, place: Path, parts: dict[str, bytes], key: SiteKey
    ) -> None:
        twice = parts[CARD].replace(b'{"auth', b'{"federation":"other","auth', 1)
        assert twice != parts[CARD]
        reason = refused(place, signed(parts, key, **{CARD: twice}), key)
        assert reason == "card.json is not written as releases are"

    def test_weights_that_are_none(
        self, place: Path, parts: dict[str, bytes], key: SiteKey
    ) -> None:
        content = signed(parts, key, **{MODEL: b"\x80\x04cos\nsystem\n(S'true'\ntR."})
        assert refused(place, content, key).startswith("model.safetensors is not a complete")

    def test_somebody_else_authorised_the_job(
        self, place: Path, parts: dict[str, bytes], key: SiteKey, tmp_path: Path
    ) -> None:
        period = (NOW - timedelta(days=1), NOW + timedelta(days=1))
        stranger = SiteKey.create(tmp_path / "stranger.pem")
        signature = JobAuthorisation.sign(JOB, FEDERATION, period, stranger)
        card = altered_card(
            parts, lambda card: card.update(authorisation=signature.model_dump(mode="json"))
        )
        assert "authorisation: " in refused(place, signed(parts, key, **{CARD: card}), key)


class TestCard:
    def test_a_job_without_privacy_has_no_card(self, key: SiteKey) -> None:
        job = JobSpec(rounds=2, model=JOB.model)
        claim = make_card(key, "22" * 32).privacy.model_dump()
        card = make_card(key, "22" * 32).model_dump(mode="json")
        period = (NOW, NOW + timedelta(days=1))
        signed_job = JobAuthorisation.sign(job, FEDERATION, period, key).model_dump(mode="json")
        changes = {"job": job.model_dump(mode="json"), "authorisation": signed_job}
        with pytest.raises(ValidationError, match="declares no privacy"):
            ModelCard.model_validate(
                {**card, **changes, "job_sha256": job.sha256, "privacy": claim, "evaluation": ()}
            )

    def test_passed_gates_are_shown(self, key: SiteKey) -> None:
        gate = GateResult(gate="memorisation", passed=True, text="no patient is copied")
        text = card_text(make_card(key, "22" * 32, gates=(gate,)))
        assert "- memorisation: no patient is copied\n" in text

    def test_a_closed_round_keeps_the_model(self, key: SiteKey) -> None:
        card = make_card(key, "22" * 32)
        rounds = [
            LineageRound(number=1, sites=0, closed=True, model_sha256="00" * 32),
            card.lineage.rounds[1],
        ]
        lineage = {**card.lineage.model_dump(), "rounds": rounds}
        assert "| 1 | closed | `0000" in card_text(make_card(key, "22" * 32, lineage=lineage))


class TestWriting:
    def test_a_release_is_never_replaced(
        self, tmp_path: Path, key: SiteKey, model: tuple[Path, str]
    ) -> None:
        path = tmp_path / "heart.zip"
        path.write_text("the first one")
        with pytest.raises(ModelError, match="never replaced"):
            ReleaseBundle.write(path, model[0], make_card(key, model[1]), key)
        assert path.read_text() == "the first one"

    def test_what_would_not_verify_is_not_written(
        self, tmp_path: Path, key: SiteKey, model: tuple[Path, str]
    ) -> None:
        with pytest.raises(ModelError, match="lineage ends with"):
            ReleaseBundle.write(tmp_path / "a.zip", model[0], make_card(key, "22" * 32), key)
        assert os.listdir(tmp_path) == []

    def test_a_full_disk_leaves_nothing(
        self,
        tmp_path: Path,
        key: SiteKey,
        model: tuple[Path, str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def full(_descriptor: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(ModelError, match="No space left"):
            ReleaseBundle.write(tmp_path / "a.zip", model[0], make_card(key, model[1]), key)
        assert os.listdir(tmp_path) == []
