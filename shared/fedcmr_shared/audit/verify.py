"""Check a bundle step by step: signatures, log proofs, completeness, rules and figures.

Nothing that the bundle says about itself is believed: the site's key comes from the auditor, the
budget is replayed from the entries and every figure is computed again.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from fedcmr_shared.audit.account import Account, account
from fedcmr_shared.audit.cosignature import verify_cosignature
from fedcmr_shared.audit.evidence import Evidence
from fedcmr_shared.errors import ConfigurationError, LedgerError
from fedcmr_shared.identity.keys import verify_signature
from fedcmr_shared.privacy.accounting import LARGEST_ORDER, rdp_limit
from fedcmr_shared.privacy.budget import Budget
from fedcmr_shared.privacy.merkle import MerkleTree, verify_consistency, verify_inclusion
from fedcmr_shared.schemas.ledger import (
    Admitted,
    Checkpoint,
    ClockSet,
    Closed,
    Entry,
    Hash,
    JobEntry,
    Opened,
)

# Sums of divergences round differently in another order.
_ROUNDING: Final = 1e-9


@dataclass(frozen=True)
class Step:
    """One step of the verification; ``passed`` None: not reached, an earlier one failed."""

    number: int
    name: str
    passed: bool | None
    text: str


@dataclass(frozen=True)
class Cosigner:
    """Another trusted site that cosigned the log; None: it cosigned nothing in the bundle.

    ``size`` is that of the largest checkpoint with its cosignature.
    """

    site: str
    size: int | None


@dataclass(frozen=True)
class Findings:
    """Result of `verify`. ``account`` is None unless every step passed.

    ``complete`` says whether the bundle shows all entries of its scope up to a definite end;
    ``cosigners`` are all other trusted sites, by name.
    """

    evidence: Evidence
    steps: tuple[Step, ...]
    complete: bool
    account: Account | None
    cosigners: tuple[Cosigner, ...] = ()

    @property
    def failed(self) -> Step | None:
        """The step that failed, if one did."""
        return next((step for step in self.steps if step.passed is False), None)

    def require(self) -> Account:
        """Return the account.

        Raises:
            LedgerError: a step failed; the message names it.
        """
        failed = self.failed
        if failed is not None or self.account is None:
            step = failed or self.steps[-1]
            raise LedgerError(f"step {step.number}, {step.name}, failed: {step.text}")
        return self.account


def read_trusted(path: Path) -> dict[str, str]:
    """Read the public keys that an auditor trusts: TOML, one line ``site = "hexadecimal key"``.

    Raises:
        ConfigurationError: the file cannot be read or is not of this form.
    """
    advice = 'write one line per site, such as north = "0f5e…", 64 hexadecimal digits'
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        return _KEYS.validate_python(content)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot read the keys ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not text: {advice}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{path} is not TOML ({error}): {advice}") from error
    except ValidationError as error:
        place = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise ConfigurationError(f"{path}: {place} is no public key: {advice}") from error


_KEYS: Final = TypeAdapter(dict[str, Hash])


def verify(evidence: Evidence, trusted: Mapping[str, str]) -> Findings:
    """Run all steps on ``evidence``; ``trusted`` maps sites to Ed25519 public keys (hexadecimal).

    Never raises for a bad bundle: see `Findings.failed` and `Findings.require`.
    """
    subject = _Subject(evidence, trusted)
    steps: list[Step] = []
    for number, (name, check) in enumerate(_CHECKS, start=1):
        if steps and not steps[-1].passed:
            steps.append(Step(number, name, None, "not reached"))
            continue
        try:
            steps.append(Step(number, name, True, check(subject)))
        except (LedgerError, ConfigurationError) as error:
            steps.append(Step(number, name, False, str(error)))
        except ArithmeticError:
            text = "an entry holds a number that nobody can compute with"
            steps.append(Step(number, name, False, text))
    passed = all(step.passed for step in steps)
    return Findings(
        evidence,
        tuple(steps),
        passed and subject.complete,
        subject.account if passed else None,
        subject.cosigners if passed else (),
    )


def verify_origin(evidence: Evidence, trusted: Mapping[str, str]) -> None:
    """Run the first steps of `verify` alone, which are cheap: format, trust and signatures.

    Raises:
        LedgerError: one failed; the message names it.
    """
    subject = _Subject(evidence, trusted)
    for number, (name, check) in enumerate(_CHECKS[:3], start=1):
        try:
            check(subject)
        except LedgerError as error:
            raise LedgerError(f"step {number}, {name}, failed: {error}") from error


@dataclass
class _Subject:
    """What the steps share; a later step uses only what an earlier one checked."""

    evidence: Evidence
    trusted: Mapping[str, str]
    complete: bool = False
    account: Account | None = None
    cosigners: tuple[Cosigner, ...] = ()
    budget: Budget = field(default_factory=Budget)
    admissions: list[tuple[Admitted, Budget]] = field(default_factory=list)

    @cached_property
    def entries(self) -> list[Entry]:
        return [disclosed.leaf.entry for disclosed in self.evidence.leaves]

    @property
    def key(self) -> str:
        return self.trusted[self.evidence.site]

    @property
    def checkpoints(self) -> list[Checkpoint]:
        return [self.evidence.checkpoint, *(old.checkpoint for old in self.evidence.earlier)]


def _format(subject: _Subject) -> str:
    evidence = subject.evidence
    last = evidence.leaves[-1].index
    if last >= evidence.checkpoint.size:
        raise LedgerError(
            f"leaf {last} lies beyond the checkpoint, which has {evidence.checkpoint.size} leaves"
        )
    scope = "the whole ledger" if evidence.job is None else f"job {evidence.job[:12]}"
    return f"{evidence.format}, scope {scope}, {len(evidence.leaves)} leaves disclosed"


def _trust(subject: _Subject) -> str:
    evidence = subject.evidence
    if evidence.site not in subject.trusted:
        raise LedgerError(
            f"site {evidence.site!r} is not among the trusted keys: get its public key from the "
            "site itself, not from the bundle or the coordinator"
        )
    if evidence.public_key != subject.key:
        raise LedgerError(
            f"the bundle is of key {evidence.public_key[:16]}…, "
            f"but {evidence.site} is trusted with key {subject.key[:16]}…"
        )
    return f"{evidence.site} is trusted with key {subject.key[:16]}…"


def _signatures(subject: _Subject) -> str:
    evidence, checkpoints = subject.evidence, subject.checkpoints
    for checkpoint in checkpoints:
        if checkpoint.site != evidence.site:
            raise LedgerError(
                f"the checkpoint of size {checkpoint.size} is of site {checkpoint.site!r}"
            )
        try:
            verify_signature(subject.key, checkpoint.signature, checkpoint.signed_bytes())
        except LedgerError as error:
            raise LedgerError(f"checkpoint of size {checkpoint.size}: {error}") from error
    return f"{_count(len(checkpoints), 'checkpoint')} signed by this key"


def _completeness(subject: _Subject) -> str:
    evidence, entries = subject.evidence, subject.entries
    if evidence.job is None:
        missing = evidence.checkpoint.size - len(entries)
        if missing:
            raise LedgerError(
                f"{missing} of the {evidence.checkpoint.size} leaves below the checkpoint are "
                "missing, but the bundle says that it holds the whole ledger"
            )
        subject.complete = True
        return f"all {len(entries)} leaves below the checkpoint are here"
    return _job_completeness(subject, evidence.job, entries[1:])


def _job_completeness(subject: _Subject, job: str, entries: list[Entry]) -> str:
    own = [entry for entry in entries if not isinstance(entry, ClockSet)]
    for expected, entry in enumerate(own):
        if not isinstance(entry, JobEntry) or entry.job != job:
            raise LedgerError(f"an entry of kind {entry.kind} is not one of job {job[:12]}")
        if entry.sequence != expected:
            raise LedgerError(
                f"the job's entry {expected} is missing: its entry {entry.sequence} is here instead"
            )
    if not own:
        raise LedgerError(f"no entry of job {job[:12]} is here")
    closing = next((i for i, entry in enumerate(own) if isinstance(entry, Closed)), None)
    subject.complete = closing is not None
    if subject.complete:
        # Only a secure sum of the last round may follow, which costs nothing.
        return f"entries 0 to {len(own) - 1} of the job are here; entry {closing} closes it"
    return (
        f"complete only up to entry {len(own) - 1} of the job, still open: it is charged all that "
        "it reserved"
    )


def _inclusion(subject: _Subject) -> str:
    evidence = subject.evidence
    root = bytes.fromhex(evidence.checkpoint.root)
    if evidence.job is None:
        if MerkleTree(disclosed.hash for disclosed in evidence.leaves).root() != root:
            raise LedgerError("the leaves do not have the Merkle root that the checkpoint signs")
        return "the Merkle root of all leaves is the one that the checkpoint signs"
    for disclosed in evidence.leaves:
        proof = [bytes.fromhex(node) for node in disclosed.proof]
        try:
            verify_inclusion(disclosed.hash, disclosed.index, evidence.checkpoint.size, proof, root)
        except LedgerError as error:
            raise LedgerError(f"leaf {disclosed.index}: {error}") from error
    return f"{_count(len(evidence.leaves), 'leaf', 'leaves')} proven to be below the checkpoint"


def _consistency(subject: _Subject) -> str:
    newest = subject.evidence.checkpoint
    for earlier in subject.evidence.earlier:
        old = earlier.checkpoint
        proof = [bytes.fromhex(node) for node in earlier.proof]
        try:
            if old.size > newest.size:
                raise LedgerError("it is larger than the bundle's checkpoint")
            verify_consistency(
                old.size, bytes.fromhex(old.root), newest.size, bytes.fromhex(newest.root), proof
            )
        except LedgerError as error:
            raise LedgerError(f"earlier checkpoint of size {old.size}: {error}") from error
    if not subject.evidence.earlier:
        return "no earlier checkpoint to compare with"
    return f"the log only grew since {_count(len(subject.evidence.earlier), 'earlier checkpoint')}"


def _cosignatures(subject: _Subject) -> str:
    sizes: dict[str, int] = {}
    for checkpoint in subject.checkpoints:
        for key, signature in checkpoint.cosignatures.items():
            try:
                verify_cosignature(key, checkpoint, signature)
            except LedgerError as error:
                raise LedgerError(
                    f"cosignature under the checkpoint of size {checkpoint.size}: {error}"
                ) from error
            sizes[key] = max(checkpoint.size, sizes.get(key, 0))
    # Keys that the auditor does not trust count for nothing: anybody can draw one.
    others = sorted(subject.trusted.items() - {(subject.evidence.site, subject.key)})
    subject.cosigners = tuple(Cosigner(site, sizes.get(key)) for site, key in others)
    return _cosigned_text(subject.cosigners)


def _cosigned_text(cosigners: Sequence[Cosigner]) -> str:
    if not cosigners:
        return "no other site is trusted, so nobody else can say that this log is the only one"
    who = [f"{each.site} up to leaf {each.size}" for each in cosigners if each.size]
    count = f"cosigned by {len(who)} of {_count(len(cosigners), 'other site')}"
    if not who:
        return f"{count}: nobody else says that this log is the only one"
    return f"{count}: {', '.join(who)}"


def _opened(subject: _Subject) -> str:
    first = subject.entries[0]
    if subject.evidence.leaves[0].index != 0 or not isinstance(first, Opened):
        raise LedgerError("the first leaf of the log, which opens the ledger, is not here")
    if (first.site, first.site_key) != (subject.evidence.site, subject.key):
        raise LedgerError(
            f"the ledger was opened for site {first.site!r} with key {first.site_key[:16]}…"
        )
    if first.order > LARGEST_ORDER:
        raise LedgerError(f"Rényi order {first.order} is above {LARGEST_ORDER}")
    return (
        f"opened by this key with epsilon {first.epsilon:g} and delta {first.delta:g} per patient, "
        f"filter at Rényi order {first.order}"
    )


def _replay(subject: _Subject) -> str:
    for disclosed, entry in zip(subject.evidence.leaves, subject.entries, strict=True):
        try:
            subject.budget = subject.budget.apply(entry)
        except LedgerError as error:
            raise LedgerError(f"leaf {disclosed.index}: {error}") from error
        if isinstance(entry, Admitted):
            subject.admissions.append((entry, subject.budget))
    return f"{_count(len(subject.entries), 'entry', 'entries')} replayed, each allowed by the rules"


def _budget(subject: _Subject) -> str:
    opened = subject.budget.opened
    limit = rdp_limit(opened.epsilon, opened.delta, opened.order)
    for entry, budget in subject.admissions:
        for cohort in {reservation.cohort for reservation in entry.phases.values()}:
            committed = budget.committed_rdp(cohort)
            if committed > limit * (1 + _ROUNDING):
                raise LedgerError(
                    f"job {entry.name} ({entry.job[:12]}) was admitted although cohort "
                    f"{cohort[:12]} then had {committed:.6g} of a divergence of {limit:.6g} "
                    f"that epsilon {opened.epsilon:g} allows"
                )
    partial = "" if subject.evidence.job is None else ", as far as one job shows"
    return (
        f"no cohort exceeded epsilon {opened.epsilon:g} at "
        f"{_count(len(subject.admissions), 'admission')}{partial}"
    )


def _figures(subject: _Subject) -> str:
    subject.account = account(subject.budget)
    return (
        f"computed for {_count(len(subject.account.jobs), 'job')} and "
        f"{_count(len(subject.account.cohorts), 'cohort')}"
    )


_CHECKS: Final[tuple[tuple[str, Callable[[_Subject], str]], ...]] = (
    ("format", _format),
    ("trust", _trust),
    ("signatures", _signatures),
    ("completeness", _completeness),
    ("inclusion", _inclusion),
    ("consistency", _consistency),
    ("cosigned", _cosignatures),
    ("opened", _opened),
    ("replay", _replay),
    ("budget", _budget),
    ("figures", _figures),
)


def _count(number: int, singular: str, plural: str = "") -> str:
    return f"{number} {singular if number == 1 else plural or singular + 's'}"
