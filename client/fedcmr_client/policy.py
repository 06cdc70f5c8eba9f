"""Reads a site's `policy.yaml`, and writes a fully explained one."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy import accounting
from fedcmr_shared.schemas.explained import explained_yaml
from fedcmr_shared.schemas.policy import SitePolicy
from fedcmr_shared.schemas.yaml_files import parse, read_yaml

__all__ = ["SitePolicy", "load_policy", "order_of", "parse_policy", "policy_text", "read_yaml"]

_HEADER: Final = (
    "What this site lets jobs do. Nothing in a job or message can weaken it: a job that breaks a "
    "rule is refused before any data is opened. Paths are relative to this file. "
    "See which rules a job breaks with: fedcmr site check JOB"
)


def load_policy(path: Path) -> SitePolicy:
    """Read ``path``; paths in it are relative to the file and come back absolute.

    Raises:
        ConfigurationError: the file cannot be read, is no YAML mapping, names a field twice or has
            an absent, unknown or wrong field; the message names all of them.
    """
    content = read_yaml(path, "policy")
    policy = parse_policy(path, content)
    base = path.absolute().parent
    ledger = policy.ledger.model_copy(
        update={
            "folder": (base / policy.ledger.folder).resolve(),
            "second_place": (base / policy.ledger.second_place).resolve(),
        }
    )
    absolute = policy.model_copy(
        update={
            "store": (base / policy.store).resolve(),
            "ledger": ledger,
            "roster": policy.roster and (base / policy.roster).resolve(),
        }
    )
    # Whether two folders lie in one another shows only now.
    return parse_policy(path, absolute.model_dump())


def order_of(policy: SitePolicy) -> int:
    """Return the order of the Rényi filter that counts the policy's budget.

    Raises:
        ConfigurationError: the budget is too small for any order.
    """
    budget = policy.budget
    return budget.order or accounting.best_order(budget.epsilon, budget.delta)


def parse_policy(path: Path, content: object) -> SitePolicy:
    """Return the policy that ``content`` describes; ``path`` is named in errors.

    Raises:
        ConfigurationError: fields are absent, unknown or wrong; the message names all of them.
    """
    hint = "correct it, `fedcmr schema show policy` explains"
    policy = parse(SitePolicy, content, f"policy {path}", hint)
    if policy.ledger.database_url and _has_password(policy.ledger.database_url):
        message = "ledger.database_url holds a password: remove it, use PGPASSWORD or .pgpass"
        raise ConfigurationError(f"policy {path}: {message}")
    try:
        accounting.rdp_limit(policy.budget.epsilon, policy.budget.delta, order_of(policy))
    except ConfigurationError as error:
        raise ConfigurationError(f"policy {path}: budget: {error}") from error
    if policy.energy is not None:
        _check_country(path, policy)
    return policy


def policy_text(policy: SitePolicy) -> str:
    """Return ``policy`` as YAML with every field explained; it loads again as the same policy."""
    return explained_yaml(policy, _HEADER)


def _check_country(path: Path, policy: SitePolicy) -> None:
    from fedcmr_client.energy import EnergySettings

    try:
        EnergySettings.of(policy)
    except ConfigurationError as error:
        raise ConfigurationError(f"policy {path}: {error}") from error


def _has_password(url: str) -> bool:
    address = url.partition("://")[2]
    user, at, _ = address.rpartition("@")
    return bool(at) and ":" in user
