"""Reads a site's `policy.yaml`, and writes a fully explained one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedcmr_shared.errors import ConfigurationError
from fedcmr_shared.privacy import accounting
from fedcmr_shared.schemas.policy import SitePolicy

__all__ = ["SitePolicy", "load_policy", "order_of", "parse_policy", "policy_text", "read_yaml"]

_WIDTH: Final = 92
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


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping in the YAML or JSON file ``path``; ``what`` names it in errors.

    Raises:
        ConfigurationError: the file cannot be read, is no YAML, names a key twice or is no mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except OSError as error:
        message = f"{what} {path} cannot be read ({error.strerror}): check the path and its owner"
        raise ConfigurationError(message) from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = " ".join(str(error).split())
        raise ConfigurationError(f"{what} {path} is not valid YAML: {where}") from error
    if content is None:
        raise ConfigurationError(f"{what} {path} is empty: restore it or write a new one")
    if not isinstance(content, dict):
        raise ConfigurationError(f"{what} {path} is no mapping: write lines such as name: value")
    return content


def parse_policy(path: Path, content: object) -> SitePolicy:
    """Return the policy that ``content`` describes; ``path`` is named in errors.

    Raises:
        ConfigurationError: fields are absent, unknown or wrong; the message names all of them.
    """
    try:
        policy = SitePolicy.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_problem(item) for item in error.errors())
        message = f"policy {path}: {problems}: correct it, `fedcmr schema show policy` explains"
        raise ConfigurationError(message) from error
    if policy.ledger.database_url and _has_password(policy.ledger.database_url):
        message = "ledger.database_url holds a password: remove it, use PGPASSWORD or .pgpass"
        raise ConfigurationError(f"policy {path}: {message}")
    try:
        accounting.rdp_limit(policy.budget.epsilon, policy.budget.delta, order_of(policy))
    except ConfigurationError as error:
        raise ConfigurationError(f"policy {path}: budget: {error}") from error
    return policy


def policy_text(policy: SitePolicy) -> str:
    """Return ``policy`` as YAML with every field explained; it loads again as the same policy."""
    lines = [*_comment(_HEADER, ""), ""]
    lines += _fields(policy, "")
    return "\n".join(lines) + "\n"


class _UniqueKeys(yaml.SafeLoader):
    """YAML without repeated keys: of two budgets, nobody could tell which one holds."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """See :class:`yaml.SafeLoader`."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice: keep one", problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _has_password(url: str) -> bool:
    address = url.partition("://")[2]
    user, at, _ = address.rpartition("@")
    return bool(at) and ":" in user


def _problem(item: ErrorDetails) -> str:
    field = ".".join(map(str, item["loc"]))
    if item["type"] == "missing":
        return f"{field} is missing"
    if item["type"] == "extra_forbidden":
        near = get_close_matches(str(item["loc"][-1]), _names(SitePolicy), 1)
        return f"{field} is unknown" + (f" (did you mean {near[0]}?)" if near else "")
    text = item["msg"].removeprefix("Value error, ")
    return f"{field}: {text}" if field else text


def _names(model: type[BaseModel]) -> Iterable[str]:
    for name, field in model.model_fields.items():
        yield name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation)


def _fields(model: BaseModel, indent: str) -> list[str]:
    lines: list[str] = []
    values = model.model_dump(mode="json")
    for name, field in type(model).model_fields.items():
        lines += _comment(field.description or "", indent)
        part = getattr(model, name)
        if isinstance(part, BaseModel):
            lines += [f"{indent}{name}:", *_fields(part, indent + "  ")]
        else:
            # The list makes YAML write one line, without the mark that ends a document.
            value = yaml.safe_dump([values[name]], default_flow_style=True, width=10_000)
            lines.append(f"{indent}{name}: {value.strip()[1:-1]}")
        if not indent:
            lines.append("")
    return lines if indent else lines[:-1]


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=mark, subsequent_indent=mark)
