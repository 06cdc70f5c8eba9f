"""What a job's sums look like: groups of sites, vectors and headers.

The server and every site compute all of this from the job and their own roster, and whoever
computes something else gets another header.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.identity.roster import Roster
from fedcmr_shared.models.registry import build_model
from fedcmr_shared.privacy.distributed import noise_share
from fedcmr_shared.privacy.evaluation import totals_layout
from fedcmr_shared.privacy.parts import trainable_names
from fedcmr_shared.schemas.job import JobSpec, ModelSpec, Part
from fedcmr_shared.schemas.ledger import Phase
from fedcmr_shared.secagg.encoding import Encoding, Segment
from fedcmr_shared.secagg.session import Header, Session

_TOTALS_WORD_BITS: Final = 32  # totals are few numbers: nothing is gained by short words


def groups(job: JobSpec, roster: Roster) -> tuple[Roster, ...]:
    """Return the sites that are summed together: all, or fixed groups of at least three.

    Groups follow from the roster and the group size alone, and differ by one site at most. Were
    the rest of the job in it, its author could try jobs until one puts a site among accomplices.

    Raises:
        ConfigurationError: the roster has too few sites for the job.
    """
    if job.aggregation == "secure_sum":
        return (roster,)
    count = len(roster.sites) // job.secure.group_size
    if count < 2:
        raise ConfigurationError(
            f"{len(roster.sites)} sites make no two groups of {job.secure.group_size}: lower "
            "secure.group_size or use aggregation secure_sum"
        )

    def place(site: str) -> bytes:
        return hashlib.sha256(f"{roster.sha256} {site}".encode()).digest()

    shuffled = sorted(roster.names, key=place)
    return tuple(roster.subset(shuffled[number::count]) for number in range(count))


def group_of(job: JobSpec, roster: Roster, site: str) -> Roster:
    """Return the group that ``site`` belongs to."""
    for group in groups(job, roster):
        if site in group.sites:
            return group
    raise ConfigurationError(f"the roster does not list site {site}")


def header_for(job: JobSpec, session: Session, group: Roster) -> Header:
    """Return the header of a session, without the model."""
    least = group.threshold
    if job.aggregation == "secure_sum":
        least = max(least, job.minimum_sites)
    return Header(
        session=session,
        roster=group.sha256,
        threshold=group.threshold,
        least_survivors=least,
        encoding=encoding_for(job, session.phase, group).sha256,
        post_quantum=job.secure.post_quantum,
    )


def encoding_for(job: JobSpec, phase: Phase, group: Roster) -> Encoding:
    """Return how the vectors of ``phase`` are written as words."""
    if phase == "evaluate":
        segments = tuple(
            Segment(name, (length,), bound) for name, (length, bound) in totals_layout(job).items()
        )
        return Encoding(segments, _TOTALS_WORD_BITS, len(group.sites))
    shapes = trained_shapes(job.model, job.training.part)
    shared = job.privacy is not None and job.privacy.distributed is not None
    bound = noise_share(job).bound if shared else job.secure.update_range
    segments = tuple(
        Segment(name, shape, bound, integer=shared) for name, shape in sorted(shapes.items())
    )
    return Encoding(segments, job.secure.word_bits, sum(weights(job, "train", group).values()))


def weights(job: JobSpec, phase: Phase, group: Roster) -> dict[str, int]:
    """Return the public whole-number weight of each site's vector; totals add up as they are."""
    if phase == "evaluate":
        return dict.fromkeys(group.names, 1)
    return {site: int(job.weight(site)) for site in group.names}


def following(job: JobSpec, session: Session) -> Session | None:
    """Return the first attempt of what comes after ``session``; None at the job's end."""
    phase: Phase = "train"
    number = session.round + 1
    if session.phase == "train" and session.round in job.evaluated_rounds():
        phase, number = "evaluate", session.round
    if number > job.rounds:
        return None
    return Session(job=session.job, phase=phase, round=number, attempt=1)


@lru_cache(maxsize=8)
def trained_shapes(model: ModelSpec, part: Part) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a job trains, by name."""
    network = build_model(model)
    parameters = dict(network.named_parameters())
    return {name: tuple(parameters[name].shape) for name in trainable_names(model, network, part)}
