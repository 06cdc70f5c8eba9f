"""Tests that a model must pass before it leaves the coordinator.

A gate looks at what the job left behind: its model and its events. It never sees a site's data; the
memorisation gate counts what the sites' own gates said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

from fedcmr_server.job_states import summed_sites
from fedcmr_server.words import plural
from fedcmr_shared.models.bundle import Bundle
from fedcmr_shared.models.card import GateResult
from fedcmr_shared.schemas.job import JobSpec

Events = Sequence[Mapping[str, Any]]
"""What happened to a job, the oldest first; see :mod:`fedcmr_server.store.events`."""


class ReleaseGate(Protocol):
    """A test that a model must pass before it leaves, such as that it repeats no patient."""

    def check(self, job: JobSpec, bundle: Bundle, events: Events) -> GateResult:
        """Return what the gate found; FedcmrError when it could not be run."""


class MemorisationGate:
    """Passes when the gate of every site passed on the job's last model.

    A site that could not decide, with fewer than 60 validation patients, counts as one that found
    copies, and nobody outside can tell which it was. A sum refuses as well that could not be opened,
    is about other weights than those to be released, is over too few sites, or lacks a site that is
    in the sum of any round: nobody has looked for copies of that one's patients.
    """

    def check(self, job: JobSpec, bundle: Bundle, events: Events) -> GateResult:
        """See :class:`ReleaseGate`."""
        found = [
            event
            for event in events
            if event["event"] == "evaluation"
            and event.get("round") == job.rounds
            and not event.get("closed")
            and isinstance(event.get("gates_passed"), int)
        ]
        if not found:
            return _result(False, "the sites' gates were not opened after the last round")
        if found[-1].get("model_sha256") != bundle.sha256:
            return _result(False, "the sites' gates were asked about other weights than these")
        silent = summed_sites(events, "train") - summed_sites(events, "evaluate", job.rounds)
        if silent:
            who = f"{plural(len(silent), 'site')} that trained the model, such as {min(silent)},"
            return _result(False, f"{who} did not say whether it copies patients")
        passed, sites = found[-1]["gates_passed"], found[-1]["sites"]
        if sites < job.minimum_sites:
            text = f"{plural(sites, 'site')} answered; the job asks for {job.minimum_sites}"
            return _result(False, text)
        text = f"passed at {passed} of {plural(sites, 'site')}; epsilon does not cover this"
        return _result(passed == sites, text)


GATES: Final[Mapping[str, Sequence[ReleaseGate]]] = {
    "cardiomm": (),
    "cpgg": (MemorisationGate(),),
    "phenotype-gaussian": (),
    "phenotype-vae": (),
}
"""Gates by the model's name. A model that is not here cannot be released."""


def _result(passed: bool, text: str) -> GateResult:
    return GateResult(gate="memorisation", passed=passed, text=text)
