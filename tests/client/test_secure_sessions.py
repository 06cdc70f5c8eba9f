"""Secrets of running sums on disk: who can read them, and what is left of them."""

import fcntl
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from secure_federation import ProtocolSite, federation

from fedcmr_client.secure_sessions import SessionRecord, SessionStore
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, SecureSpec, TrainingSpec
from fedcmr_shared.schemas.ledger import Hash, Phase
from fedcmr_shared.secagg.layout import header_for
from fedcmr_shared.secagg.messages import Delivery, Step
from fedcmr_shared.secagg.session import Session
from fedcmr_shared.secagg.site import SiteState, accept_shares, offer_keys, share_secrets

NAMES = ("east", "north", "south", "west")
KEY = b"k" * 32
JOB = JobSpec(
    model=ModelSpec(text_encoder="hashed"),
    training=TrainingSpec(part="prompts"),
    secure=SecureSpec(post_quantum=True),
)


def session(attempt: int = 1, number: int = 1, phase: Phase = "train", job: str = "") -> Session:
    return Session(job=job or JOB.sha256, phase=phase, round=number, attempt=attempt)


def states(sites: Sequence[ProtocolSite], about: Session, job: JobSpec = JOB) -> list[SiteState]:
    """Return the states of ``sites`` after each accepted the others' shares."""
    begun = []
    for site in sites:
        assert site.roster is not None
        header = header_for(job, about, site.roster)
        begun.append(offer_keys(site.name, site.identity, site.roster, header))
    keys = [message for _, message in begun]
    shared = [
        share_secrets(state, site.identity, "a" * 64, keys)
        for site, (state, _) in zip(sites, begun, strict=True)
    ]
    after = []
    for state, _ in shared:
        deliveries = [
            Delivery(
                sender=message.site,
                header=message.header,
                sealed=message.sealed[state.site],
                pair=message.pairs.get(state.site),
            )
            for _, message in shared
            if message.site != state.site
        ]
        after.append(accept_shares(state, deliveries))
    return after


@pytest.fixture(scope="module")
def full_state() -> SiteState:
    """A state that holds every kind of secret."""
    sites = federation(dict.fromkeys(NAMES, 0.1)).sites
    return states(sites, session())[2]


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    kept = SessionStore(tmp_path / "sessions", KEY)
    with kept.locked():
        return kept


@pytest.fixture
def record(full_state: SiteState) -> SessionRecord:
    return SessionRecord(job=JOB, state=full_state)


def about(record: SessionRecord, other: Session) -> SessionRecord:
    """Return ``record`` as that of another session."""
    header = record.state.header.model_copy(update={"session": other})
    state = record.state.model_copy(update={"header": header})
    return record.model_copy(update={"state": state})


def path_of(store: SessionStore, kind: str, of: Session) -> Path:
    return store.folder / f"{of.job}-{of.phase}-{of.round}-{of.attempt}.{kind}"


def files(store: SessionStore) -> set[str]:
    return {path.suffix for path in store.folder.iterdir()} - {".lock"}


class TestAtRest:
    def test_what_was_saved_comes_back(self, store: SessionStore, record: SessionRecord) -> None:
        assert store.load(session()) is None
        store.save(record)
        assert store.load(session()) == record
        later = record.model_copy(update={"state": record.state.after("consistency")})
        store.save(later)
        assert store.load(session()) == later
        assert store.load(session(2)) is None

    def secrets(self, state: SiteState) -> list[str]:
        assert state.secrets is not None
        found = list(state.secrets.model_dump().values())
        for shares in state.received.values():
            found += [value for value in shares.model_dump().values() if value is not None]
        return found

    def shown(self, secrets: list[str], content: bytes) -> list[str]:
        """Return those of ``secrets`` whose hexadecimal or raw bytes occur in ``content``."""
        return [
            secret
            for secret in secrets
            if secret.encode() in content.lower() or bytes.fromhex(secret) in content
        ]

    def test_no_secret_lies_in_clear(self, store: SessionStore, record: SessionRecord) -> None:
        store.save(record)
        (store.folder / "plain").write_text(record.model_dump_json())
        secrets = self.secrets(record.state)
        # Four of its own, two shares from each of four sites, and a part from each one below it.
        assert len(secrets) == 4 + 2 * 4 + 2
        for path in store.folder.iterdir():
            found = self.shown(secrets, path.read_bytes())
            # Positive control: the search finds all of them in what is encrypted.
            assert found == (secrets if path.name == "plain" else [])

    def test_nothing_about_a_secret_is_printed(self, record: SessionRecord) -> None:
        text = f"{record!r} {record.state!r} {record}"
        assert self.shown(self.secrets(record.state), text.encode()) == []

    def test_nobody_else_on_the_machine_may_read(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        store.save(record)
        store.finish(session(), "answer")
        store.save(about(record, session(2)))
        assert store.folder.stat().st_mode & 0o077 == 0
        for path in store.folder.iterdir():
            assert path.stat().st_mode & 0o077 == 0

    def test_a_copy_without_its_key_file_or_under_another_key_cannot_be_read(
        self, store: SessionStore, record: SessionRecord, tmp_path: Path
    ) -> None:
        store.save(record)
        copied = shutil.copytree(store.folder, tmp_path / "copy")
        assert SessionStore(copied, KEY).load(session()) == record  # positive control
        with pytest.raises(LedgerError, match="another site's"):
            SessionStore(copied, b"x" * 32).load(session())
        path_of(SessionStore(copied, KEY), "key", session()).unlink()
        assert SessionStore(copied, KEY).load(session()) is None
        # Nor with the key file of another session of the site, under either name.
        store.save(about(record, session(2)))
        shutil.copy(
            path_of(store, "key", session(2)), path_of(SessionStore(copied, KEY), "key", session())
        )
        with pytest.raises(LedgerError):
            SessionStore(copied, KEY).load(session())

    @pytest.mark.parametrize("kind", ["key", "session"])
    def test_a_file_counts_under_its_own_name_only(
        self, kind: str, store: SessionStore, record: SessionRecord
    ) -> None:
        store.save(record)
        for one in ("key", "session"):
            shutil.copy(path_of(store, one, session()), path_of(store, one, session(2)))
        with pytest.raises(LedgerError, match="was changed"):
            store.load(session(2))
        shutil.copy(path_of(store, "key", session()), path_of(store, "answer", session()))
        with pytest.raises(LedgerError, match="was changed"):
            store.answer(session())

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
    @given(data=st.data())
    def test_a_changed_or_cut_file_is_not_trusted(
        self, data: st.DataObject, store: SessionStore, record: SessionRecord
    ) -> None:
        store.save(record)
        path = path_of(store, data.draw(st.sampled_from(["key", "session"])), session())
        content = bytearray(path.read_bytes())
        at = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[at] ^= data.draw(st.integers(1, 255))
        else:
            del content[at:]
        path.write_bytes(content)
        with pytest.raises(LedgerError, match="was changed"):
            store.load(session())
        path.unlink()
        store.erase(session())

    def test_a_record_of_another_version_is_named(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        class Newer(SessionRecord):
            detail: str = "new"

        store.save(Newer(job=record.job, state=record.state))
        with pytest.raises(LedgerError, match="another version") as error:
            store.load(session())
        assert str(path_of(store, "session", session())) in str(error.value)
        assert self.shown(self.secrets(record.state), str(error.value).encode()) == []

    def test_an_error_shows_no_secret_in_a_log(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        """An agent logs the errors of a failed step with all their causes."""
        kept = record.state.secrets
        assert kept is not None
        longer = kept.model_copy(update={"seed": kept.seed + "00"})
        state = record.state.model_copy(update={"secrets": longer})
        store.save(record.model_copy(update={"state": state}))
        with pytest.raises(LedgerError) as error:
            store.load(session())
        logged = "".join(traceback.format_exception(error.value))
        assert "ValidationError" in logged
        assert self.shown(self.secrets(record.state), logged.encode()) == []

        class Talkative(BaseModel):
            seed: Hash

        # Positive control: by default, the cause shows what it could not read.
        with pytest.raises(ValidationError) as shown:
            Talkative(seed=longer.seed)
        assert kept.seed[:20] in str(shown.value)

    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        broken = SessionStore(tmp_path / "file" / "sessions", KEY)
        with pytest.raises(LedgerError, match="cannot be used"), broken.locked():
            raise AssertionError("not reached")

    def test_what_cannot_be_read_or_written_is_named(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        path_of(store, "session", session()).mkdir()
        with pytest.raises(LedgerError, match="cannot be written"):
            store.save(record)
        with pytest.raises(LedgerError, match="cannot be read"):
            store.load(session())
        with pytest.raises(LedgerError, match="cannot be erased"):
            store.erase(session())


@contextmanager
def held(path: Path) -> Iterator[Callable[[], bytes]]:
    """Give what an open descriptor still reads of a file, also when it has no name any more."""
    with path.open("rb") as file:
        yield lambda: os.pread(file.fileno(), 1 << 20, 0)


class TestErasure:
    def test_the_end_leaves_the_answer_alone(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        store.save(record)
        assert files(store) == {".key", ".session"}
        store.finish(session(), "the answer")
        assert files(store) == {".answer"}
        assert store.answer(session()) == "the answer"
        assert store.load(session()) is None
        assert b"the answer" not in path_of(store, "answer", session()).read_bytes()

    @pytest.mark.parametrize("end", ["finish", "erase", "erase_others"])
    def test_the_key_is_overwritten_before_its_name_goes(
        self,
        end: str,
        store: SessionStore,
        record: SessionRecord,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A snapshot of the session file is worth nothing once the key's bytes are gone."""
        store.save(record)
        key = path_of(store, "key", session())
        snapshot = shutil.copytree(store.folder, tmp_path / "snapshot")
        order = []
        unlink, fsync = Path.unlink, os.fsync

        def watched_unlink(path: Path, *rest: bool) -> None:
            if path == key:
                order.append("unlink")
            unlink(path, *rest)

        def watched_fsync(descriptor: int) -> None:
            if key.exists() and os.fstat(descriptor).st_ino == key.stat().st_ino:
                order.append("on disk" if not any(key.read_bytes()) else "not yet")
            fsync(descriptor)

        monkeypatch.setattr(Path, "unlink", watched_unlink)
        monkeypatch.setattr(os, "fsync", watched_fsync)
        with held(key) as content:
            before = content()
            if end == "finish":
                store.finish(session(), "answer")
            elif end == "erase":
                store.erase(session())
            else:
                store.erase_others(session(2))
            after = content()
        assert not key.exists()
        assert order == ["on disk", "unlink"]
        assert after == bytes(len(before))
        # What the block of the key held opens the snapshot; what it holds now does not.
        copied = SessionStore(snapshot, KEY)
        path_of(copied, "key", session()).write_bytes(before)
        assert copied.load(session()) == record
        path_of(copied, "key", session()).write_bytes(after)
        with pytest.raises(LedgerError):
            copied.load(session())

    def test_a_mere_unlink_would_leave_the_key(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        """Positive control."""
        store.save(record)
        key = path_of(store, "key", session())
        with held(key) as content:
            before = content()
            key.unlink()
            assert content() == before
        assert any(before)

    def test_a_key_is_written_once_for_all_versions_of_a_session(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        store.save(record)
        key, versions = path_of(store, "key", session()), []
        with held(key) as content:
            for step in ("consistency", "unmask"):
                versions.append(path_of(store, "session", session()).read_bytes())
                answered: Step = step  # type: ignore[assignment]  # literals in a tuple
                changed = record.model_copy(update={"state": record.state.after(answered)})
                store.save(changed)
            assert key.read_bytes() == content()
        assert len(set(versions)) == 2

    def test_only_the_same_job_is_erased_and_never_the_session_itself(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        other_job = session(job="b" * 64)
        mine = [session(1), session(2), session(1, 2), session(1, 1, "evaluate")]
        for each in (*mine, other_job):
            store.save(about(record, each))
        store.erase_others(session(2))
        assert [store.load(each) is not None for each in mine] == [False, True, False, False]
        assert store.load(other_job) is not None
        for each in (*mine, other_job):
            store.finish(each, str(each))
        store.erase_other_answers(session(1, 2))
        assert [store.answer(each) is not None for each in mine] == [False, False, True, False]
        assert store.answer(other_job) is not None

    def test_what_a_crash_left_is_erased_with_the_rest(
        self, store: SessionStore, record: SessionRecord
    ) -> None:
        """A key of zeros, a session without a key, and files that were not yet renamed."""
        store.save(record)
        path_of(store, "key", session()).write_bytes(bytes(60))
        with pytest.raises(LedgerError):
            store.load(session())
        store.save(about(record, session(2)))
        path_of(store, "key", session(2)).unlink()
        for kind in ("key", "session", "answer"):
            partial = store.folder / f".{path_of(store, kind, session(1)).name}.partial"
            partial.write_bytes(b"partial")
        store.erase_others(session(3))
        store.erase_other_answers(session(3))
        assert files(store) == set()
        store.erase(session(3))  # nothing is there, and that is fine

    @given(st.sets(st.integers(1, 10_000), max_size=6))
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
    def test_the_newest_attempt_is_that_of_the_same_sum(
        self, store: SessionStore, attempts: set[int]
    ) -> None:
        for attempt in attempts:
            path_of(store, "key", session(attempt)).touch()
        for other in (session(9, 11), session(9, 1, "evaluate"), session(9, job="b" * 64)):
            path_of(store, "key", other).touch()
        assert store.newest_attempt(session(7)) == max(attempts, default=0)
        for path in store.folder.glob("*.key"):
            path.unlink()


class TestLocks:
    """That a site decides behind them is shown in `test_secure_site_crash.py`."""

    def test_locks_of_other_names_do_not_wait(self, store: SessionStore) -> None:
        def free(name: str) -> bool:
            descriptor = os.open(store.folder / f"{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            finally:
                os.close(descriptor)
            return True

        with store.locked("work"):
            assert not free("work")
            assert free("sessions")
            with store.locked():
                assert not free("sessions")
        assert free("work")
        assert free("sessions")
