"""The link over a grid of Flower's that answers when told to, on a clock that nobody waits for."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedcmr_server import links
from fedcmr_server.links import FlowerLink
from fedcmr_shared.errors import FederationError


@dataclass
class Clock:
    """Time passes by sleeping alone."""

    now: float = 0.0
    pauses: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        # A little more, as with a real clock.
        self.now += seconds + 1e-3


@dataclass
class FakeGrid:
    """Each node answers ``delays[node]`` seconds after it was asked, or never."""

    clock: Clock
    delays: dict[int, float]
    failing: frozenset[int] = frozenset()
    unreachable: frozenset[int] = frozenset()
    sent: dict[str, tuple[float, Message]] = field(default_factory=dict)
    pulled: list[list[str]] = field(default_factory=list)
    nodes: list[list[int]] = field(default_factory=list)

    def get_node_ids(self) -> Iterable[int]:
        return self.nodes.pop(0) if len(self.nodes) > 1 else self.nodes[0]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            if node not in self.unreachable:
                ids.append(f"question-{len(self.sent)}")
                self.sent[ids[-1]] = (self.clock.now, message)
            else:
                ids.append("")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        self.pulled.append(list(message_ids))
        found = []
        for question in self.pulled[-1]:
            at, message = self.sent[question]
            node = message.metadata.dst_node_id
            if self.clock.now < at + self.delays.get(node, 1e9):
                continue
            if node in self.failing:
                found.append(Message(Error(code=7), reply_to=message))
            else:
                content = RecordDict({"node": ConfigRecord({"id": node})})
                found.append(Message(content, reply_to=message))
        return found


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(links, "time", fake)
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    return fake


def link(grid: FakeGrid) -> FlowerLink:
    return FlowerLink(grid)  # type: ignore[arg-type]  # it has what the link uses


def questions(*nodes: int) -> dict[int, RecordDict]:
    return {node: RecordDict({"for": ConfigRecord({"id": node})}) for node in nodes}


def test_each_node_gets_its_content_and_answers_come_as_they_arrive(clock: Clock) -> None:
    grid = FakeGrid(clock, {11: 5.0, 12: 0.0, 13: 1.0})
    answers = link(grid).exchange("train.keys", questions(11, 12, 13), 60.0)
    assert [(node, content["node"]["id"]) for node, content in answers] == [
        (12, 12),
        (13, 13),
        (11, 11),
    ]
    for _, message in grid.sent.values():
        assert message.metadata.message_type == "train.keys"
        assert message.content["for"]["id"] == message.metadata.dst_node_id


def test_the_link_looks_often_at_first_and_every_two_seconds_later(clock: Clock) -> None:
    grid = FakeGrid(clock, {11: 30.0})
    list(link(grid).exchange("train", questions(11), 60.0))
    assert clock.pauses[0] == 0.2
    assert clock.pauses == sorted(clock.pauses)
    assert max(clock.pauses) == 2.0
    assert clock.now < 33.0


def test_answers_are_pulled_one_by_one(clock: Clock) -> None:
    grid = FakeGrid(clock, {11: 0.0, 12: 0.0})
    answers = link(grid).exchange("train", questions(11, 12), 60.0)
    next(answers)
    assert grid.pulled == [["question-0"]]
    next(answers)
    assert grid.pulled == [["question-0"], ["question-1"]]
    assert list(answers) == []
    assert clock.pauses == []


def test_late_answers_and_errors_do_not_occur(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    grid = FakeGrid(
        clock,
        {11: 0.0, 12: 61.0, 13: 0.0, 14: 59.9},
        failing=frozenset({13}),
        unreachable=frozenset({15}),
    )
    with caplog.at_level(logging.WARNING, "fedcmr.server"):
        found = dict(link(grid).exchange("train", questions(11, 12, 13, 14, 15), 60.0))
    assert set(found) == {11, 14}
    assert clock.now < 61.0
    assert [record.getMessage() for record in caplog.records] == [
        "node 15: Flower did not take the question `train`",
        "node 13: Flower error 7",
        "node 12: no answer to `train` within 60 s",
    ]


def test_a_question_expires_some_time_after_its_answer_would_be_late(clock: Clock) -> None:
    grid = FakeGrid(clock, {11: 0.0})
    list(link(grid).exchange("train", questions(11), 90.0))
    ((_, message),) = grid.sent.values()
    assert message.metadata.ttl == 150.0


def test_nothing_is_asked_of_nobody(clock: Clock) -> None:
    assert list(link(FakeGrid(clock, {})).exchange("train", {}, 60.0)) == []
    assert clock.now == 0.0


def test_connected_waits_for_enough_nodes(clock: Clock) -> None:
    grid = FakeGrid(clock, {}, nodes=[[3], [3, 1], [3, 1, 2]])
    assert link(grid).connected(3, 60.0) == [1, 2, 3]
    few = FakeGrid(clock, {}, nodes=[[3]])
    with pytest.raises(FederationError, match="1 of at least 2 sites connected within 60 s"):
        link(few).connected(2, 60.0)
