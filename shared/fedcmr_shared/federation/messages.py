"""Typed contents of the Flower messages `train` and `evaluate`.

A task carries the job, the round and the global model; its answer is an update, a set of scores
or a refusal. The SHA-256 of the model is bound into the task and comes back with the answer, so
that neither side can work on another model than the one that it was told about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fedcmr_shared.errors import FederationError
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.schemas.job import JobSpec
from fedcmr_shared.schemas.refusals import REFUSAL_CODES, RefusalCode
from fedcmr_shared.schemas.signed_job import JobAuthorisation

_ARRAYS = "arrays"
_SAFETENSORS = "safetensors"
_ANSWER = "answer"
_AUTHORISATION = "authorisation"
_HEADER = "header"
_METRICS = "metrics"


@dataclass(frozen=True)
class Task:
    """What the server asks of a site in one round: ``state`` is the global model.

    Deployed sites need the coordinator's ``authorisation``; simulated ones do not.
    """

    job: JobSpec
    round: int
    state: Mapping[str, Tensor]
    authorisation: JobAuthorisation | None = None

    def pack(self) -> RecordDict:
        """Return the content of a Flower message."""
        header = ConfigRecord(
            {
                "job": self.job.model_dump_json(),
                "round": self.round,
                "model-sha256": state_sha256(self.state),
            }
        )
        if self.authorisation is not None:
            header[_AUTHORISATION] = self.authorisation.model_dump_json()
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
            authorisation = _authorisation(header)
        except (KeyError, ValidationError) as error:
            raise FederationError(f"the task's job cannot be read: {error}") from error
        state = _state(content)
        if header.get("model-sha256") != state_sha256(state):
            raise FederationError("the task's model does not have the SHA-256 that its header says")
        return cls(job, _round(header), state, authorisation)


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
                _HEADER: _answer_header("update", self.site, self.round, self.model_sha256),
                _ARRAYS: _arrays(self.delta),
                _METRICS: MetricRecord({} if self.loss is None else {"loss": self.loss}),
            }
        )


@dataclass(frozen=True)
class Scores:
    """A site's answer to `evaluate`: totals over its held-out patients.

    See :func:`fedcmr_shared.privacy.evaluation.noisy_totals`; float64, one-dimensional.
    """

    site: str
    round: int
    model_sha256: str
    totals: Mapping[str, Tensor]

    def pack(self) -> RecordDict:
        """Return the content of a Flower message."""
        return RecordDict(
            {
                _HEADER: _answer_header("scores", self.site, self.round, self.model_sha256),
                _ARRAYS: _arrays(self.totals),
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
    kind = header.get(_ANSWER)
    if "model-sha256" not in header or kind not in ("update", "scores"):
        raise FederationError(f"the answer of site {site} is incomplete")
    model_sha256, tensors = str(header["model-sha256"]), _state(content)
    if kind == "scores":
        return Scores(site, _round(header), model_sha256, tensors)
    return Update(site, _round(header), model_sha256, tensors, _loss(content))


def content_bytes(content: RecordDict) -> int:
    """Size of a message's arrays in bytes; the header adds a few hundred more."""
    return sum(record.count_bytes() for record in content.array_records.values())


def _answer_header(
    kind: Literal["update", "scores"], site: str, round_number: int, model_sha256: str
) -> ConfigRecord:
    return ConfigRecord(
        {_ANSWER: kind, "site": site, "round": round_number, "model-sha256": model_sha256}
    )


def _authorisation(header: ConfigRecord) -> JobAuthorisation | None:
    text = header.get(_AUTHORISATION)
    return None if text is None else JobAuthorisation.model_validate_json(str(text))


def _loss(content: RecordDict) -> float | None:
    metrics = content.metric_records.get(_METRICS)
    value = None if metrics is None else metrics.get("loss")
    return float(value) if isinstance(value, int | float) else None


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
    if not isinstance(value, str) or value not in REFUSAL_CODES:
        raise FederationError(f"refusal code {value!r} is not on the public list")
    return value


def _arrays(state: Mapping[str, Tensor]) -> ArrayRecord:
    # One array for all tensors: Flower asks the network anew for each.
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    data = save(tensors)
    array = Array(dtype="uint8", shape=(len(data),), stype=_SAFETENSORS, data=data)
    return ArrayRecord({_ARRAYS: array})


def _state(content: RecordDict) -> dict[str, Tensor]:
    arrays = content.array_records.get(_ARRAYS)
    if arrays is None or _ARRAYS not in arrays or arrays[_ARRAYS].stype != _SAFETENSORS:
        raise FederationError("the message carries no arrays")
    try:
        return load(arrays[_ARRAYS].data)
    except SafetensorError as error:
        raise FederationError(f"the message's arrays cannot be read: {error}") from error
