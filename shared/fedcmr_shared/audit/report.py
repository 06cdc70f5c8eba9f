"""The auditor's page: one HTML file that needs nothing else, not even a network.

It shows what a verified bundle proves, what it costs a patient, and what nobody checked. A bundle
that fails has a page too, which shows the failed step and no figure.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedcmr_shared import __version__
from fedcmr_shared.audit.charts import bar_chart, time_chart, utc
from fedcmr_shared.audit.claims import (
    ASSUMPTIONS,
    NO_EMPIRICAL,
    checklist,
    claims,
    delta_text,
    epsilon_text,
    headline,
)
from fedcmr_shared.audit.evidence import Disclosed
from fedcmr_shared.audit.timeline import timeline
from fedcmr_shared.audit.verify import Findings
from fedcmr_shared.errors import LedgerError
from fedcmr_shared.privacy.accounting import accountant_versions
from fedcmr_shared.schemas.ledger import (
    Admitted,
    Closed,
    Entry,
    Masked,
    Opened,
    Padding,
    Refused,
    Release,
    Started,
    Stored,
    Unmasked,
    Withdrawn,
)

_MOST_ROWS: Final = 2000
_OPEN_ROWS: Final = 60  # a longer table is folded


def write_report(findings: Findings, path: Path) -> Path:
    """Write the page about ``findings`` to ``path`` and return it.

    Raises:
        LedgerError: the file cannot be written.
    """
    account, evidence = findings.account, findings.evidence
    moments = timeline([leaf.leaf.entry for leaf in evidence.leaves]) if account else ()
    shown = [
        leaf for leaf in evidence.leaves if account and not isinstance(leaf.leaf.entry, Padding)
    ]
    page = _template().render(
        findings=findings,
        evidence=evidence,
        account=account,
        headline=headline(findings),
        claims=claims(findings),
        checklist=checklist(findings),
        assumptions=ASSUMPTIONS,
        no_empirical=NO_EMPIRICAL,
        over_time=time_chart(moments, account.opened.epsilon) if account else None,
        bars=bar_chart(account) if account and account.jobs else None,
        rows=[_row(leaf) for leaf in shown[:_MOST_ROWS]],
        rows_left_out=max(0, len(shown) - _MOST_ROWS),
        padding=len(evidence.leaves) - len(shown) if account else 0,
        open_rows=_OPEN_ROWS,
        versions={"fedcmr (this page)": __version__, **accountant_versions()},
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise LedgerError(f"{path}: cannot write the page ({error.strerror})") from error
    return path


def _row(disclosed: Disclosed) -> dict[str, Any]:
    entry = disclosed.leaf.entry
    return {
        "index": disclosed.index,
        "at": utc(entry.at),
        "kind": entry.kind,
        "job": getattr(entry, "job", "")[:12],
        "detail": _detail(entry),
        "hash": disclosed.hash.hex()[:16],
    }


def _detail(entry: Entry) -> str:
    match entry:
        case Opened():
            return f"budget ε = {entry.epsilon:g} at δ = {delta_text(entry.delta)}, order {entry.order}"
        case Admitted():
            parts = (
                f"{phase}: {part.starts} starts of {part.release.steps} steps, "
                f"q = {part.release.sampling_rate:g}, {_noise(part.release)}"
                for phase, part in sorted(entry.phases.items(), reverse=True)
            )
            return f"{entry.name}, {entry.model}; " + "; ".join(parts)
        case Started() | Stored():
            return f"{entry.phase}, round {entry.round}, attempt {entry.attempt}"
        case Masked():
            return f"{entry.phase}, round {entry.round}, attempt {entry.attempt} of the secure sum"
        case Unmasked():
            return (
                f"{entry.phase}, round {entry.round}, attempt {entry.attempt} of the secure sum: "
                f"opened over {len(entry.survivors)} sites: {', '.join(entry.survivors)}"
            )
        case Closed():
            return entry.outcome
        case Refused():
            return f"code {entry.code}, rule {entry.rule}"
        case Withdrawn():
            return "a patient's scans were erased; the charges stay"
        case _:
            return ""


def _noise(release: Release) -> str:
    """Return the noise of a release, such as ``σ = 1.5``, and by how many sites it is made."""
    if release.noise_multiplier is None:
        return "no noise"
    text, shares = f"σ = {release.noise_multiplier:g}", release.distributed
    return f"{text}, shared by {shares.sites} sites less {shares.unseen_sites}" if shares else text


def _percent(share: float) -> str:
    return f"{math.floor(100 * share)} %"


def _template() -> Any:
    environment = Environment(
        loader=PackageLoader("fedcmr_shared.audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        epsilon=epsilon_text, delta=delta_text, noise=_noise, percent=_percent, utc=utc
    )
    return environment.get_template("evidence.html.j2")
