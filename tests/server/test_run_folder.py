"""A run folder stays readable whatever happens to its writer."""

from pathlib import Path

import pytest
import torch

from fedcmr_server.rounds import initial_state
from fedcmr_server.run_folder import Checkpoint, RunFolder
from fedcmr_shared.errors import ConfigurationError, FederationError
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.schemas.job import JobSpec, ModelSpec

JOB = JobSpec(model=ModelSpec(text_encoder="hashed"))


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", JOB)


def test_job_and_checkpoint_round_trip(folder: RunFolder) -> None:
    state = initial_state(JOB)
    folder.commit(Checkpoint(0, state, {}))
    folder.commit(Checkpoint(1, state, {"x/momentum_buffer": torch.ones(3)}))
    latest = folder.latest()
    assert folder.job == JOB
    assert latest is not None
    assert latest.round == 1
    assert all(torch.equal(latest.state[name], state[name]) for name in state)
    assert torch.equal(latest.optimiser["x/momentum_buffer"], torch.ones(3))


def test_a_round_without_its_bundle_is_not_committed(folder: RunFolder) -> None:
    state = initial_state(JOB)
    folder.commit(Checkpoint(0, state, {}))
    folder.commit(Checkpoint(1, state, {}))
    folder.bundle_path(1).unlink()
    latest = folder.latest()
    assert latest is not None
    assert latest.round == 0


def test_a_cut_off_event_line_is_ignored(folder: RunFolder) -> None:
    folder.record("round", round=1)
    with (folder.root / "metrics.jsonl").open("a") as stream:
        stream.write('{"event": "rou')
    assert folder.events() == [{"event": "round", "round": 1}]
    folder.record("round", round=2)
    assert folder.events()[1:] == [{"event": "round", "round": 2}]
    assert len((folder.root / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_roster_round_trips_and_its_absence_is_named(folder: RunFolder, tmp_path: Path) -> None:
    roster = Roster.model_validate({"sites": {name: 64 * name for name in "abc"}})
    assert RunFolder.create(tmp_path / "secure", JOB, roster=roster).roster == roster
    with pytest.raises(FederationError, match=r"roster\.yaml is missing"):
        _ = folder.roster
    folder.roster_path.write_text("sites: {}\n")
    with pytest.raises(ConfigurationError, match=r"roster\.yaml"):
        _ = folder.roster


def test_used_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("keep")
    with pytest.raises(ConfigurationError, match="not empty"):
        RunFolder.create(tmp_path, JOB)
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


@pytest.mark.parametrize("content", [None, "{", '{"rounds": 0}'])
def test_unreadable_job_is_named(folder: RunFolder, content: str | None) -> None:
    path = folder.root / "job.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(FederationError, match=r"job\.json"):
        _ = folder.job
