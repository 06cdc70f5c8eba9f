"""Sites that do known arithmetic and answer in the open, and a link to them in memory."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from flwr.app import RecordDict

from fedcmr_shared.federation.messages import Refusal, Scores, Task, Update
from fedcmr_shared.models.bundle import state_sha256
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.evaluation import totals_layout
from fedcmr_shared.schemas.job import JobSpec, ModelSpec

JOB = JobSpec(
    rounds=2,
    minimum_sites=2,
    aggregation="plain_with_local_dp",
    model=ModelSpec(text_encoder="hashed"),
    site_sizes={"a": "large"},
)
JOB_PARAMETERS = dict(build_model(JOB.model).named_parameters())
TRAINABLE = [name for name, parameter in JOB_PARAMETERS.items() if parameter.requires_grad]

Answer = Update | Scores | Refusal


def totals(job: JobSpec, share: float) -> dict[str, torch.Tensor]:
    """Totals of one patient with this score between 0 and 1 in all metrics."""
    values = {"sum": share, "patients": 1.0}
    return {
        name: torch.full((length,), values[name.partition("/")[2]], dtype=torch.float64)
        for name, (length, _) in totals_layout(job).items()
    }


def adds(amount: float) -> Callable[[str, str, Task], Answer]:
    """Return a site that adds ``amount`` to every parameter; its one patient has it above 10 dB."""

    def answer(name: str, action: str, task: Task) -> Answer:
        base = state_sha256(task.state)
        if action == "evaluate":
            return Scores(name, task.round, base, totals(task.job, amount / 40))
        delta = {key: torch.full_like(task.state[key], amount) for key in TRAINABLE}
        return Update(name, task.round, base, delta, loss=amount)

    return answer


@dataclass
class MemoryLink:
    """A :class:`fedcmr_server.links.SiteLink` to functions."""

    sites: Mapping[str, Callable[[str, str, Task], Answer | None]]
    asked: list[tuple[str, int]] = field(default_factory=list)

    def connected(self, at_least: int, timeout_s: float) -> list[int]:
        return list(range(len(self.sites)))

    def exchange(
        self, action: str, contents: Mapping[int, RecordDict], timeout_s: float
    ) -> Iterator[tuple[int, RecordDict]]:
        names = list(self.sites)
        self.asked.append((action, Task.unpack(contents[0]).round))
        for node, content in contents.items():
            answer = self.sites[names[node]](names[node], action, Task.unpack(content))
            if answer is not None:
                yield node, answer.pack()
