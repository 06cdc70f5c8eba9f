"""Typed contents of the Flower messages `train` and `evaluate`.

A task carries the job, the round and the global model; its answer is an update, a set of scores
or a refusal. The SHA-256 of the model is bound into the task and comes back with the answer, so
that neither side can work on another model than the one that it was told about.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ValidationError
from torch import Tensor

from fedcmr_shared.errors import FederationError
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.refusals import REFUSAL_CODES, RefusalCode

_ARRAYS = "arrays"
_HEADER = "header"
_METRICS = "metrics"


@dataclass(frozen=True)
class Task:
    """What the server asks of a site in one round: ``state`` is the global model."""

    job: JobSpec
    round: int
    state: Mapping[str, Tensor]

    def pack(self) -> RecordDict:
        """Return the content of a Flower message."""
        header = ConfigRecord(
            {
                "job": self.job.model_dump_json(),
                "round": self.round,
                "model-sha256": state_sha256(self.state),
            }
        )
        return RecordDict({_HEADER: header, _ARRAYS: _arrays(self.state)})

    @classmethod
    def unpack(cls, content: RecordDict) -> Task:
        """Read a Flower message.

        Raises:
            FederationError: a part is missing or malformed, or the model is not the one that the
                header names.
        """
        header = _header(content)
        try:
            job = JobSpec.model_validate_json(str(header["job"]))
        except (KeyError, ValidationError) as error:
            raise FederationError(f"the task's job cannot be read: {error}") from error
        state = _state(content)
        if header.get("model-sha256") != state_sha256(state):
            raise FederationError("the task's model does not have the SHA-256 that its header says")
        return cls(job=job, round=_round(header), state=state)


@dataclass(frozen=True)
class Update:
    """A site's answer to `train`: trained minus received value of each trained parameter.

    ``loss`` exists without privacy only: a training loss is a function of the data that no
    accounting covers.
    """

    site: str
    round: int
    model_sha256: str
    delta: Mapping[str, Tensor]
    loss: float | None = None

    def pack(self) -> RecordDict:
        """Return the content of a Flower message."""
        return RecordDict(
            {
                _HEADER: _answer_header(self.site, self.round, self.model_sha256),
                _ARRAYS: _arrays(self.delta),
                _METRICS: MetricRecord({} if self.loss is None else {"loss": self.loss}),
            }
        )


@dataclass(frozen=True)
class Scores:
    """A site's answer to `evaluate`: means over its held-out patients."""

    site: str
    round: int
    model_sha256: str
    values: Mapping[str, float]

    def pack(self) -> RecordDict:
        """Return the content of a Flower message."""
        return RecordDict(
            {
                _HEADER: _answer_header(self.site, self.round, self.model_sha256),
                _METRICS: MetricRecord(dict(self.values)),
            }
        )


@dataclass(frozen=True)
class Refusal:
    """A site's answer when it does not take part; only a public code leaves the site."""

    site: str
    code: RefusalCode

    def pack(self) -> RecordDict:
        """Return the content of a Flower message."""
        return RecordDict({_HEADER: ConfigRecord({"site": self.site, "refusal": self.code})})


def unpack_answer(content: RecordDict) -> Update | Scores | Refusal:
    """Read a site's answer.

    Raises:
        FederationError: a part is missing or malformed.
    """
    header = _header(content)
    site = str(header.get("site", ""))
    if not site:
        raise FederationError("the answer does not name its site")
    if "refusal" in header:
        return Refusal(site, _refusal_code(header["refusal"]))
    metrics = content.metric_records.get(_METRICS)
    if metrics is None or "model-sha256" not in header:
        raise FederationError(f"the answer of site {site} is incomplete")
    values = {name: float(value) for name, value in metrics.items() if not isinstance(value, list)}
    model_sha256 = str(header["model-sha256"])
    if _ARRAYS not in content.array_records:
        return Scores(site, _round(header), model_sha256, values)
    return Update(site, _round(header), model_sha256, _state(content), values.get("loss"))


def content_bytes(content: RecordDict) -> int:
    """Size of a message's arrays in bytes; the header adds a few hundred more."""
    return sum(record.count_bytes() for record in content.array_records.values())


def _answer_header(site: str, round_number: int, model_sha256: str) -> ConfigRecord:
    return ConfigRecord({"site": site, "round": round_number, "model-sha256": model_sha256})


def _header(content: RecordDict) -> ConfigRecord:
    header = content.config_records.get(_HEADER)
    if header is None:
        raise FederationError("the message has no header")
    return header


def _round(header: ConfigRecord) -> int:
    number = header.get("round")
    if not isinstance(number, int) or number < 1:
        raise FederationError(f"the message's round is {number!r}; it must be a positive integer")
    return number


def _refusal_code(value: object) -> RefusalCode:
    if value not in REFUSAL_CODES:
        raise FederationError(f"refusal code {value!r} is not on the public list")
    return value


def _arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord(OrderedDict((name, tensor.detach().cpu()) for name, tensor in state.items()))


def _state(content: RecordDict) -> dict[str, Tensor]:
    arrays = content.array_records.get(_ARRAYS)
    if arrays is None:
        raise FederationError("the message carries no arrays")
    # Arrays arrive read-only; a copy may be trained on.
    return {name: torch.tensor(array.numpy()) for name, array in arrays.items()}
