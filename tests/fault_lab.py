"""A real federation of four hospitals in which things can be broken, and its books checked.

`Lab.account` holds what must be true whatever broke: every round is committed or closed with a
reason, the last model is the one that was committed, and no ledger was charged for more than was
done. All waiting has a deadline.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bad_link import BadLink
from databases import PostgresqlServer
from deployment import SITES, Federation, Service, Site, until
from small_scans import small_store

from fedcmr_client.site_health import FILE, read_health
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.split import SplitFractions
from fedcmr_server.home import CoordinatorHome
from fedcmr_server.job_run import StoredRun
from fedcmr_server.rounds import initial_state
from fedcmr_server.store import Events, Jobs, Rounds, Store
from fedcmr_server.store.tables import JobRow
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.privacy.budget import JobState

Repeated = Collection[tuple[str, str, int]]
"""Rounds (site, phase, number) that a site lost while it trained and may have begun again."""

_WATCH_S: Final = 0.05
_NODE_MISSED_S: Final = 150.0  # Flower misses a killed node for a minute; a loaded machine adds
_DATABASE_PATIENCE_S: Final = 60.0
_JOB: Final = """\
name: heart-{number}
coordinator: coordinator
rounds: {rounds}
minimum_sites: 3
round_timeout_s: {round_timeout_s}
model: {{size: {size}, text_encoder: hashed}}
sampling: {{accelerations: [4.0], acs_lines: 8}}
training: {{part: adapters, local_steps: 2}}
privacy:
  cohort_size: 10
  sampling_rate: 0.5
  noise_multiplier: 40.0
  spare_rounds: 2
  evaluation: {{rounds: {evaluated}, noise_multiplier: 40.0, cohort_size: 2}}
secure: {{step_timeout_s: 60}}
"""


@dataclass
class Lab:
    """Four hospitals, each behind a line that can be spoilt, and a coordinator with PostgreSQL."""

    federation: Federation
    home: CoordinatorHome
    store: Store
    links: dict[str, BadLink]
    database: PostgresqlServer
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _marks: dict[str, int] = field(default_factory=dict)

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> Iterator[Lab]:
        """Make it and wait until all hospitals are connected."""
        with ExitStack() as stack:
            database = stack.enter_context(PostgresqlServer.open())
            links = {name: stack.enter_context(BadLink.open()) for name in SITES}
            url = database.url(database.create_database())
            federation = stack.enter_context(
                Federation.open(folder, isolated=False, database_url=url)
            )
            federation.start()
            for name, link in links.items():
                scans = small_store(folder / "stores" / name, 24, SplitFractions(0.5, 0.25, 0.25))
                site = federation.add_site(name, scans, proxy=link.url)
                edit_policy(site, "models: [cardiomm/tiny]", "models: [cardiomm]")
                site.join()
            for site in federation.sites.values():
                site.pin_roster()
                site.start()
            federation.wait_connected()
            home = CoordinatorHome.open(federation.home)
            store = stack.enter_context(home.store(_DATABASE_PATIENCE_S))
            yield cls(federation, home, store, links, database)

    def submit(
        self,
        rounds: int = 1,
        *,
        size: str = "tiny",
        evaluated: str = "none",
        round_timeout_s: float = 180,
    ) -> str:
        """Submit a job; return its id."""
        self._mark()
        text = _JOB.format(
            number=next(self._numbers),
            rounds=rounds,
            size=size,
            evaluated=evaluated,
            round_timeout_s=round_timeout_s,
        )
        path = self.federation.job_file
        path.write_text(text)
        return str(self.federation.fedcmr("coordinator", "submit", str(path))["id"])

    def site(self, name: str) -> Site:
        """A hospital."""
        return self.federation.sites[name]

    def service(self, name: str) -> Service:
        """The agent of a hospital."""
        service = self.site(name).service
        assert service is not None
        return service

    @property
    def coordinator(self) -> Service:
        """The coordinator's process."""
        assert self.federation.coordinator is not None
        return self.federation.coordinator

    def events(self, job: str) -> list[dict[str, Any]]:
        """What happened in a job."""
        return Events(self.store).as_values(job)

    def job(self, job: str) -> JobRow:
        """Where a job stands."""
        return Jobs(self.store).get(job)

    def wait_round(self, job: str, number: int) -> None:
        """Wait until a round begins; `reach` looks from there on."""
        begun = {"event": "attempt_started", "phase": "train", "round": number}

        def happened() -> bool:
            row = self.job(job)
            assert row.state != "failed", row.reason
            return any(begun.items() <= event.items() for event in self.events(job))

        until(happened, f"round {number} to begin", 240, _WATCH_S)
        self._mark()

    def reach(self, name: str, step: str) -> None:
        """Wait until a hospital works on ``step`` of the job or round that began last."""
        log, begin = self.service(name).log, self._marks[name]
        signs = [f"Receiving: train.{step} message"]
        if step == "update":  # its ledger is charged and nothing is stored yet
            signs.append("patients drawn")

        def seen() -> bool:
            text = log.read_bytes()[begin:].decode(errors="replace")
            for sign in signs:
                _, found, text = text.partition(sign)
                if not found:
                    return False
            return True

        until(seen, f"{name} to work on {step}", 240, _WATCH_S)

    def finish(self, job: str, timeout_s: float = 300.0) -> list[dict[str, Any]]:
        """Wait until a job is finished; return its attempts."""

        def over() -> bool:
            row = self.job(job)
            assert row.state != "failed", row.reason
            return row.state == "finished"

        until(over, f"job {self.job(job).name} to finish", timeout_s)
        return [event for event in self.events(job) if event["event"] == "attempt"]

    def restart(self, name: str) -> None:
        """Start a hospital's agent again, and do not take its earlier report for its own."""
        self._report(name).unlink(missing_ok=True)
        self.site(name).start()

    def wait_whole(self) -> None:
        """Wait until all hospitals are connected again."""
        for name, site in self.federation.sites.items():
            until(site.is_connected, f"{name} to be back", _NODE_MISSED_S)

    def wait_problem(self, name: str, words: str = "") -> str:
        """Wait until a hospital's agent says what is wrong, with ``words`` in it; return that."""

        def said() -> str:
            problem = (read_health(self._report(name)) or {}).get("problem")
            text = f"{problem['code']}: {problem['message']}" if problem else ""
            return text if words in text else ""

        return until(said, f"{name} to say what is wrong: {words}", 180)

    def account(self, job: str, repeated: Repeated = ()) -> dict[str, int]:
        """Require that nothing was lost or charged twice; return the starts of each hospital."""
        self._require_rounds(job)
        self._require_model(job)
        opened = [
            (event["phase"], event["round"], event["survivors"])
            for event in self.events(job)
            if event["event"] == "attempt" and event["outcome"] == "opened"
        ]
        starts = {}
        for name in SITES:
            state = self._ledger(name, job)
            took_part = {(phase, number) for phase, number, of in opened if name in of}
            if state is None:
                assert not took_part, f"{name} is in sums and its ledger knows nothing of it"
                continue
            assert took_part <= state.stored.keys(), f"{name} is in sums that it did not store"
            for (phase, number), times in state.attempts.items():
                allowed = 1 + ((name, phase, number) in repeated)
                assert times <= allowed, f"{name} was charged {times} times for {phase} {number}"
            for phase, reserved in state.admitted.phases.items():
                assert state.started(phase) <= reserved.starts
            starts[name] = state.started("train")
        return starts

    def _require_rounds(self, job: str) -> None:
        events = {e["round"]: e for e in self.events(job) if e["event"] == "round"}
        rounds = [row for row in Rounds(self.store).of(job) if row.number > 0]
        assert [row.number for row in rounds] == sorted(events)
        for row in rounds:
            assert row.state == ("closed" if events[row.number]["closed"] else "committed")
            attempts = [
                event
                for event in self.events(job)
                if event["event"] == "attempt"
                and (event["phase"], event["round"]) == ("train", row.number)
            ]
            last = attempts[-1]
            expected = "closed" if row.state == "closed" else "opened"
            assert last["outcome"] == expected
            assert last["reason"] or expected == "opened"

    def _require_model(self, job: str) -> None:
        run = StoredRun(self.store, self.home.jobs, job, run="")
        latest = run.latest()  # raises when it is not what was committed
        assert latest is not None
        committed = [row.state == "committed" for row in Rounds(self.store).of(job)[1:]]
        learnt = state_sha256(latest.state) != state_sha256(initial_state(run.job))
        assert learnt == any(committed)

    def _ledger(self, name: str, job: str) -> JobState | None:
        with closing(SiteHome.open(self.site(name).policy).open_ledger()) as ledger:
            return ledger.budget.jobs.get(job)

    def _report(self, name: str) -> Path:
        return self.site(name).folder / "federation" / "run" / FILE

    def _mark(self) -> None:
        self._marks = {name: self.service(name).log.stat().st_size for name in SITES}


def edit_policy(site: Site, old: str, new: str) -> None:
    """Replace what is there by something else."""
    text = site.policy.read_text()
    assert old in text, old
    site.policy.write_text(text.replace(old, new))
