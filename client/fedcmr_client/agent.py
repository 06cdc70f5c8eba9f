"""What stands between a coordinator's message and a site's data.

For every task, in this order, and each step only after the one before:

1. the job is held against the coordinator's signature and the site's policy, with nothing opened;
2. a result that is stored already is sent again, at no further cost;
3. the ledger admits the job: it reserves the budget of all its rounds and spare rounds;
4. the ledger marks the round as started, which spends it, on disk and in the second place;
5. the round is trained or scored, with noise;
6. the noisy result is stored, then sent, or masked for a secure sum (`SecureSite`).

A crash after step 4 costs a spare round. Nothing that a job or message says can change the order
or the policy.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, TypeVar

import torch
from flwr.app import RecordDict
from safetensors import safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from fedcmr_client.copy_gate import TRIES, CopyGate
from fedcmr_client.energy import EnergyLog, EnergySettings, rounded_total
from fedcmr_client.energy_meter import metered
from fedcmr_client.gate import examine, require
from fedcmr_client.job_records import job_records
from fedcmr_client.ledger import Ledger
from fedcmr_client.objectives import checking_objective
from fedcmr_client.objectives.choice import load_encoder
from fedcmr_client.private_round import train_round, train_round_on_gpus
from fedcmr_client.private_trainer import gradient_engine
from fedcmr_client.scoring import patient_scores
from fedcmr_client.secure_site import SecureSite
from fedcmr_client.site_home import SiteHome
from fedcmr_client.store.site_store import ScanRecord, SiteStore
from fedcmr_client.task_model import reconstructor, task_model
from fedcmr_client.usage import Usage
from fedcmr_shared.errors import ConfigurationError, JobRefused, LedgerError
from fedcmr_shared.federation.messages import Scores, Task, Update
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.cpgg import CPGG
from fedcmr_shared.privacy.evaluation import energy_totals, gate_totals, noisy_totals
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.schemas.privacy import Metric, PrivacySpec
from fedcmr_shared.schemas.signed_job import JobAuthorisation, require_signed
from fedcmr_shared.secagg.messages import Step

Result = TypeVar("Result", Update, Scores)

_SALT_BYTES: Final = 32

_log = logging.getLogger("fedcmr.site")


@dataclass(frozen=True)
class SiteAgent:
    """Answers tasks for one site; ``threads`` only changes speed.

    ``pinned`` is the federation that the site joined, as `Membership.pinned` gives it; null, as
    in a simulation, takes jobs that nobody signed.
    """

    home: SiteHome
    threads: int | None = None
    pinned: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        """The site's name."""
        return self.home.policy.site

    @property
    def reply_tick_s(self) -> float:
        """Replies leave at multiples of this, so that their time tells nothing."""
        return self.home.policy.reply_tick_s

    def train(self, task: Task) -> Update:
        """Answer a round in the open, for jobs that aggregate so; see `noised_update`."""
        self._require_plain(task.job)
        return self.noised_update(task)

    def evaluate(self, task: Task) -> Scores:
        """Answer with this site's own scores, for jobs that aggregate so; see `noised_scores`."""
        self._require_plain(task.job)
        return self.noised_scores(task)

    def noised_update(self, task: Task) -> Update:
        """Train one round with patient-level privacy and return the noisy update.

        Raises:
            JobRefused: the policy or the budget does not allow the round.
            FedcmrError: the round failed; what was started stays spent.
        """
        return self._answer(task, "train", self._train, _pack_update, _read_update)

    def noised_scores(self, task: Task) -> Scores:
        """Score the task's model on held-out patients with noise; as `noised_update`."""
        return self._answer(task, "evaluate", self._evaluate, _pack_scores, _read_scores)

    def secure_answer(self, step: Step, content: RecordDict) -> RecordDict:
        """Answer a step of a secure sum; see `SecureSite.answer`."""
        return SecureSite(self).answer(step, content)

    def require_allowed(
        self, job: JobSpec, authorisation: JobAuthorisation | None, phase: Phase, number: int
    ) -> None:
        """Hold a job against its signature and the policy alone; a refusal goes into the ledger.

        Raises:
            JobRefused: nobody signed it, the policy does not allow it, or it has no such round.
        """
        try:
            self._require_allowed(job, authorisation, phase, number)
        except JobRefused as refusal:
            with closing(self.home.open_ledger()) as ledger:
                ledger.refuse(job.sha256, refusal.code, refusal.rule)
            raise

    def _require_plain(self, job: JobSpec) -> None:
        # A coordinator may ask for anything; a result that belongs in a sum leaves only in it.
        if job.aggregation != "plain_with_local_dp":
            with closing(self.home.open_ledger()) as ledger:
                ledger.refuse(job.sha256, "aggregation", "aggregation")
            message = f"job {job.name} aggregates by {job.aggregation}: results leave masked only"
            raise JobRefused("aggregation", "aggregation", message)

    def _answer(
        self,
        task: Task,
        phase: Phase,
        work: Callable[[Task, nn.Module, list[ScanRecord]], Result],
        pack: Callable[[Result], bytes],
        read: Callable[[Path], Result],
    ) -> Result:
        job = task.job
        with closing(self.home.open_ledger()) as ledger:
            try:
                self._require_allowed(job, task.authorisation, phase, task.round)
                stored = ledger.stored(job.sha256, phase, task.round)
                if stored is not None:
                    # A crash may have come between storing and closing.
                    self._close_after_last(ledger, job, phase, task.round)
                    return read(stored)
                model = _exact_model(task)
                usage = Usage(self.home.policy, ledger.place.folder)
                usage.require_left(job)
                energy = EnergySettings.of(self.home.policy)
                records = self._admitted_records(ledger, job, phase)
                _require_try(ledger, job, phase)
                self._tidy_latents(ledger, job, phase)
                attempt = ledger.start(job.sha256, phase, task.round)
            except JobRefused as refusal:
                ledger.refuse(job.sha256, refusal.code, refusal.rule)
                raise
            started = time.monotonic()
            try:
                with metered(energy, self._energy_log, job.sha256):
                    result = work(task, model, records)
            finally:
                usage.add(job, time.monotonic() - started)
            result = self._with_energy(task, result)
            ledger.store(job.sha256, phase, task.round, attempt, pack(result))
            self._close_after_last(ledger, job, phase, task.round)
            return result

    def _require_allowed(
        self, job: JobSpec, authorisation: JobAuthorisation | None, phase: Phase, number: int
    ) -> None:
        if self.pinned is not None:
            require_signed(job, authorisation, self.pinned, datetime.now(UTC))
        require(examine(job, self.home.policy, datetime.now().astimezone()))
        _require_round(job, phase, number)
        if phase == "evaluate" and not self._metrics(_privacy(job)):
            message = "none of the scores that the job asks for may leave the site"
            raise JobRefused("evaluation-noise", "evaluation.metrics", message)

    def _admitted_records(self, ledger: Ledger, job: JobSpec, phase: Phase) -> list[ScanRecord]:
        """Admit the job and return the scans of the patients it was first admitted with."""
        with self.home.open_store() as store:
            if ledger.budget.status(job.sha256) != "open":
                self._admit(ledger, store, job)
            return self._members(ledger, store, job, phase)

    def _members(
        self, ledger: Ledger, store: SiteStore, job: JobSpec, phase: Phase
    ) -> list[ScanRecord]:
        members = ledger.cohort(job.sha256, phase)
        allowed = job_records(store, job, self.home.policy, phase)
        return [record for record in allowed if record.patient in members]

    def _admit(self, ledger: Ledger, store: SiteStore, job: JobSpec) -> None:
        policy = self.home.policy
        training = {record.patient for record in job_records(store, job, policy, "train")}
        evaluation = {record.patient for record in job_records(store, job, policy, "evaluate")}
        # The same word for every reason that depends on data.
        if not training or (job.evaluated_rounds() and not evaluation):
            raise JobRefused("declined", "cohort", "no patient of the site meets the job's query")
        ledger.admit(
            job,
            policy_sha256=policy.sha256,
            training=training,
            evaluation=evaluation,
        )

    def _train(self, task: Task, model: nn.Module, records: list[ScanRecord]) -> Update:
        if self.home.policy.processes > 1:
            patients = {record.patient for record in records}
            delta = train_round_on_gpus(task, patients, self.home)
        else:
            delta = train_round(task, model, records, self.home)
        return Update(self.name, task.round, state_sha256(task.state), delta)

    def _evaluate(self, task: Task, model: nn.Module, records: list[ScanRecord]) -> Scores:
        job = task.job
        privacy = _privacy(job)
        if privacy.evaluation.memorisation:
            totals = self._search_copies(job, model, records)
        else:
            totals = self._scores(task, records)
        return Scores(self.name, task.round, state_sha256(task.state), totals)

    def _scores(self, task: Task, records: list[ScanRecord]) -> dict[str, Tensor]:
        job, spec = task.job, _privacy(task.job).evaluation
        device = torch.device(self.home.policy.device)
        scores = patient_scores(reconstructor(task), job, records, load_encoder(job), device)
        return noisy_totals(
            list(scores.values()),
            spec.metrics,
            spec.noise_multiplier,
            spec.histogram_bins,
            self._metrics(_privacy(job)),
        )

    @property
    def _energy_log(self) -> EnergyLog:
        return EnergyLog.beside(self.home.policy.ledger.folder)

    def _with_energy(self, task: Task, result: Result) -> Result:
        """Add to scores what the job asks of its energy; they are metered by now."""
        if isinstance(result, Update) or not _privacy(task.job).evaluation.energy_total:
            return result
        return replace(result, totals={**result.totals, **energy_totals(self._energy_term(task))})

    def _energy_term(self, task: Task) -> float:
        """Return what may leave of the energy so far in kWh; once, or differences would tell more."""
        settings = self.home.policy.energy
        if settings is None or not settings.report_total or task.round != task.job.rounds:
            return 0.0
        try:
            return rounded_total(self._energy_log.read(task.job.sha256).kwh)
        except LedgerError as error:
            # What was searched or scored must not be lost, and spent again, for a damaged figure.
            _log.warning("energy of job %s counts as unknown: %s", task.job.sha256, error)
            return rounded_total(0.0)

    def _tidy_latents(self, ledger: Ledger, job: JobSpec, phase: Phase) -> None:
        """Erase latents of jobs that have ended, and of patients who left this one."""
        if phase == "train":
            jobs = ledger.budget.jobs.items()
            kept = self.home.latents(job)
            kept.erase_others({name for name, state in jobs if state.closed is None})
            kept.keep_only(ledger.cohort(job.sha256, phase))

    def _search_copies(
        self, job: JobSpec, model: nn.Module, validation: list[ScanRecord]
    ) -> dict[str, Tensor]:
        assert isinstance(model, CPGG)  # no other network has this score
        with closing(self.home.open_ledger()) as ledger, self.home.open_store() as store:
            training = self._members(ledger, store, job, "train")
        gate = CopyGate(model, job.model.size, self.home.policy.device)
        return gate_totals(gate.outcome(training, validation))

    def _close_after_last(self, ledger: Ledger, job: JobSpec, phase: Phase, number: int) -> None:
        evaluated = job.evaluated_rounds()
        last: Phase = "evaluate" if evaluated and evaluated[-1] == job.rounds else "train"
        if (phase, number) == (last, job.rounds):
            ledger.finish(job.sha256, "finished")
            try:
                self.home.latents(job).erase()
            except LedgerError as error:
                # The answer is stored and paid for: it must leave all the same.
                _log.error(
                    "job %s is finished, but keeps latents: %s: remove that by hand, no other job "
                    "trains before",
                    job.sha256,
                    error,
                )

    def _metrics(self, privacy: PrivacySpec) -> list[Metric]:
        """Scores that the job asks for and the policy lets out."""
        allowed = self.home.policy.evaluation.metrics
        return [name for name in privacy.evaluation.metrics if name in allowed]


def _exact_model(task: Task) -> nn.Module:
    """Return the task's model if the job's gradient engine is exact for it; opens no data."""
    model = task_model(task)
    gradient_engine(model, task.job, checking_objective(model, task.job))
    return model


def _require_try(ledger: Ledger, job: JobSpec, phase: Phase) -> None:
    """Raise JobRefused when the memorisation gate was started too often; nothing else has tries."""
    if phase != "evaluate" or not _privacy(job).evaluation.memorisation:
        return
    state = ledger.budget.jobs.get(job.sha256)
    if state is not None and state.started(phase) >= TRIES:
        message = f"the memorisation gate was started {TRIES} times for this job"
        raise JobRefused("declined", "memorisation", message)


def _require_round(job: JobSpec, phase: Phase, number: int) -> None:
    rounds = range(1, job.rounds + 1) if phase == "train" else job.evaluated_rounds()
    if number not in rounds:
        raise JobRefused("malformed", "round", f"the job has no round {number} to {phase}")


def _privacy(job: JobSpec) -> PrivacySpec:
    if job.privacy is None:  # the gate lets no such job pass
        raise ConfigurationError(f"job {job.name} declares no privacy")
    return job.privacy


def _pack_update(update: Update) -> bytes:
    return _pack(update, update.delta)


def _pack_scores(scores: Scores) -> bytes:
    return _pack(scores, scores.totals)


def _pack(answer: Update | Scores, tensors: Mapping[str, Tensor]) -> bytes:
    header = {
        "site": answer.site,
        "round": answer.round,
        "model_sha256": answer.model_sha256,
        # The ledger's entry, which evidence shows, holds the hash of this file. Without a salt
        # whoever knows the model could try out which of a gate's two outcomes has that hash.
        "salt": token_hex(_SALT_BYTES),
    }
    return save_tensors(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        {"answer": json.dumps(header)},
    )


def _read_update(path: Path) -> Update:
    header, tensors = _read(path)
    return Update(header["site"], header["round"], header["model_sha256"], tensors)


def _read_scores(path: Path) -> Scores:
    header, tensors = _read(path)
    return Scores(header["site"], header["round"], header["model_sha256"], tensors)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["answer"])
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
