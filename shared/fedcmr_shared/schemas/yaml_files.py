"""Reads settings that people write: YAML or JSON, checked against a schema."""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from fedcmr_shared.errors import ConfigurationError

_Model = TypeVar("_Model", bound=BaseModel)


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


def parse(schema: type[_Model], content: object, place: str, hint: str) -> _Model:
    """Return the ``schema`` that ``content`` describes; errors begin with ``place``.

    Raises:
        ConfigurationError: fields are absent, unknown or wrong; the message names all of them, and
            ends with ``hint``.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        problems = "; ".join(_problem(schema, item) for item in error.errors())
        raise ConfigurationError(f"{place}: {problems}: {hint}") from error


def parts(annotation: Any) -> list[type[BaseModel]]:
    """Return the schemas in a field's type: itself, or one of its alternatives."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for argument in get_args(annotation) for part in parts(argument)]


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


def _problem(schema: type[BaseModel], item: ErrorDetails) -> str:
    field = ".".join(map(str, item["loc"]))
    if item["type"] == "missing":
        return f"{field} is missing"
    if item["type"] == "extra_forbidden":
        near = get_close_matches(str(item["loc"][-1]), _names(schema), 1)
        return f"{field} is unknown" + (f" (did you mean {near[0]}?)" if near else "")
    text = item["msg"].removeprefix("Value error, ")
    return f"{field}: {text}" if field else text


def _names(schema: type[BaseModel]) -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield name
        for part in parts(field.annotation):
            yield from _names(part)
