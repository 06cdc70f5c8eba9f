"""The codes with which a site refuses; nothing else about a refusal or failure leaves a site.

A code of a public rule tells what in the job to change. Everything that depends on the site's
data or on its other jobs reads ``declined``.
"""

from __future__ import annotations

from typing import Final, Literal, get_args

RefusalCode = Literal[
    "malformed",
    "privacy-missing",
    "coordinator",
    "job-name",
    "model",
    "epsilon-per-job",
    "delta",
    "noise-multiplier",
    "minimum-sites",
    "aggregation",
    "cohort-query",
    "evaluation-noise",
    "distributed-noise",
    "quiet-hours",
    "device-hours",
    "energy",
    "engine",
    "protocol",
    "signature",
    "bundle",
    "paused",
    "declined",
    "failed",
]

REFUSAL_CODES: Final[dict[RefusalCode, str]] = {
    "malformed": "the message or job cannot be read",
    "privacy-missing": "the job declares no privacy",
    "coordinator": "the site does not work for this coordinator",
    "job-name": "the site's policy does not list the job's name",
    "model": "the site's policy does not list the model, the weights do not fit it, or it would "
    "carry data between patients",
    "epsilon-per-job": "the job costs more than the site allows one job",
    "delta": "the job's delta is larger than the site's",
    "noise-multiplier": "the noise multiplier is below the site's least",
    "minimum-sites": "the job runs with fewer sites than the site asks for",
    "aggregation": "the site does not take part in this way of aggregation",
    "cohort-query": "the query uses attributes, modalities or dates that the site does not offer",
    "evaluation-noise": "the site lets these scores leave with noise only",
    "distributed-noise": "the site adds the whole noise itself, or the job's shares do not fit",
    "quiet-hours": "the site does not train at this hour",
    "device-hours": "the job may use more device hours than the site gives",
    "energy": "the job may use more energy than the site gives",
    "engine": "the gradient engine is not exact for this model",
    "protocol": "the messages of the secure aggregation are not in order",
    "signature": "the job is not signed by the federation's coordinator for this time",
    "bundle": "the app that came with the message is not the code-free app of this software",
    "paused": "the site is paused",
    "declined": "the site does not take part; its reason may depend on data",
    "failed": "the site failed; its log says why",
}
"""What each code means, for the coordinator's documentation and messages."""

PASSING: Final[frozenset[RefusalCode]] = frozenset(
    {"malformed", "quiet-hours", "protocol", "paused", "declined", "failed"}
)
"""Codes that another attempt may not meet; the others stay until the job or a policy changes."""

if set(REFUSAL_CODES) != set(get_args(RefusalCode)):
    raise AssertionError("every refusal code needs a meaning")
