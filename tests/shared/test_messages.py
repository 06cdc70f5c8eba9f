"""Messages survive the trip; a changed message does not."""

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fedcmr_shared.errors import FederationError
from fedcmr_shared.federation.messages import (
    Refusal,
    Scores,
    Task,
    Update,
    content_bytes,
    unpack_answer,
)
from fedcmr_shared.schemas.job import JobSpec

STATE = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor(True), "c": torch.tensor(2.5)}
TASK = Task(JobSpec(seed=7), 3, STATE)


def test_task_round_trip() -> None:
    read = Task.unpack(TASK.pack())
    assert read.job == TASK.job
    assert read.round == 3
    assert all(torch.equal(read.state[name], STATE[name]) for name in STATE)
    read.state["b"].add_(1)  # what arrives may be trained on


def test_a_swapped_model_is_noticed() -> None:
    content = TASK.pack()
    content["arrays"] = Task(TASK.job, 3, {**STATE, "c": torch.tensor(2.6)}).pack()["arrays"]
    with pytest.raises(FederationError, match="SHA-256"):
        Task.unpack(content)


def test_a_model_travels_as_one_array() -> None:
    """Flower fetches each array by a request of its own."""
    assert len(TASK.pack().array_records["arrays"]) == 1


@pytest.mark.parametrize("form", ["truncated", "tensors", "foreign"])
def test_arrays_of_another_form_are_refused(form: str) -> None:
    content = TASK.pack()
    array = content.array_records["arrays"]["arrays"]
    wrong = {
        "truncated": Array(array.dtype, array.shape, array.stype, array.data[:-1]),
        "tensors": Array(STATE["b"].numpy()),
        "foreign": Array(array.dtype, array.shape, "pickle", array.data),
    }
    content["arrays"] = ArrayRecord({"arrays": wrong[form]})
    with pytest.raises(FederationError, match="arrays"):
        Task.unpack(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("job", "{}}", "job"),
        ("job", '{"rounds": 0}', "rounds"),
        ("round", 0, "round"),
        ("round", "3", "round"),
    ],
)
def test_a_malformed_task_is_refused(key: str, value: str | int, message: str) -> None:
    content = TASK.pack()
    header = content.config_records["header"]
    header[key] = value
    with pytest.raises(FederationError, match=message):
        Task.unpack(content)


@pytest.mark.parametrize("missing", ["header", "arrays"])
def test_a_task_without_a_part_is_refused(missing: str) -> None:
    content = TASK.pack()
    del content[missing]
    with pytest.raises(FederationError):
        Task.unpack(content)


def test_answers_round_trip() -> None:
    update = Update("north", 2, "ab", {"b": torch.ones(2)}, 0.5)
    read = unpack_answer(update.pack())
    assert isinstance(read, Update)
    assert (read.site, read.round, read.model_sha256, read.loss) == ("north", 2, "ab", 0.5)
    private = unpack_answer(Update("north", 2, "ab", {"b": torch.ones(2)}).pack())
    assert isinstance(private, Update)
    assert private.loss is None
    assert torch.equal(read.delta["b"], torch.ones(2))
    totals = {"psnr/sum": torch.tensor([1.5], dtype=torch.float64), "psnr/histogram": torch.ones(3)}
    scores = unpack_answer(Scores("north", 2, "ab", totals).pack())
    assert isinstance(scores, Scores)
    assert (scores.site, scores.round, scores.model_sha256) == ("north", 2, "ab")
    assert scores.totals.keys() == totals.keys()
    for name, total in totals.items():
        torch.testing.assert_close(scores.totals[name], total, rtol=0, atol=0)
    assert unpack_answer(Refusal("north", "declined").pack()) == Refusal("north", "declined")


def test_update_and_scores_with_the_same_arrays_stay_apart() -> None:
    arrays = {"psnr/sum": torch.ones(1)}
    assert isinstance(unpack_answer(Scores("north", 2, "ab", arrays).pack()), Scores)
    assert isinstance(unpack_answer(Update("north", 2, "ab", arrays).pack()), Update)


@pytest.mark.parametrize("kind", [None, "refusal", 1])
def test_an_answer_of_no_known_kind_is_refused(kind: str | int | None) -> None:
    content = Scores("north", 2, "ab", {"psnr/sum": torch.ones(1)}).pack()
    header = content.config_records["header"]
    if kind is None:
        del header["answer"]
    else:
        header["answer"] = kind
    with pytest.raises(FederationError, match="incomplete"):
        unpack_answer(content)


def test_an_answer_without_arrays_is_refused() -> None:
    content = Scores("north", 2, "ab", {"psnr/sum": torch.ones(1)}).pack()
    del content["arrays"]
    with pytest.raises(FederationError, match="no arrays"):
        unpack_answer(content)


def test_a_refusal_carries_nothing_but_site_and_code() -> None:
    content = Refusal("north", "declined").pack()
    assert dict(content["header"]) == {"site": "north", "refusal": "declined"}
    assert list(content) == ["header"]


@pytest.mark.parametrize(
    "header",
    [
        {"round": 1, "model-sha256": "ab"},
        {"site": "north"},
        {"site": "north", "refusal": "patient Smith is ill"},
    ],
)
def test_a_malformed_answer_is_refused(header: dict[str, str | int]) -> None:
    with pytest.raises(FederationError):
        unpack_answer(RecordDict({"header": ConfigRecord(header)}))  # type: ignore[arg-type]
        # ConfigRecord takes a wider value type than the test's dictionary


def test_size_counts_arrays() -> None:
    delta = {"b": torch.ones(1000), "c": torch.ones(24)}
    size = content_bytes(Update("north", 1, "ab", delta, 0.0).pack())
    assert 4096 <= size < 4096 + 1024
