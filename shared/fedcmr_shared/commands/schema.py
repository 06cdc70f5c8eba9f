"""`fedcmr schema`: the JSON Schemas of what the parties exchange."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from fedcmr_shared.cli import json_option, print_json, print_table
from fedcmr_shared.errors import ConfigurationError

if TYPE_CHECKING:
    from pydantic import BaseModel

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@click.group()
def schema() -> None:
    """Export the JSON Schemas of jobs, policies, scan metadata and releases."""


@schema.command("list")
@json_option
def list_schemas(as_json: bool) -> None:
    """List all schemas."""
    schemas = sorted(exported_schemas().items())
    rows = [{"name": name, "describes": _summary(model)} for name, model in schemas]
    if as_json:
        print_json(rows)
    else:
        print_table("Schemas", rows, ("name", "describes"))


@schema.command()
@click.argument("name")
@json_option
def show(name: str, as_json: bool) -> None:
    """Print the JSON Schema called NAME; it is JSON with and without --json."""
    schemas = exported_schemas()
    if name not in schemas:
        raise ConfigurationError(f"schema {name!r} is unknown: use {', '.join(sorted(schemas))}")
    print_json(json_schema(schemas[name]))


def exported_schemas() -> dict[str, type[BaseModel]]:
    """Return all public schemas by name."""
    from fedcmr_shared.models.card import ModelCard
    from fedcmr_shared.schemas import SCHEMAS

    # A card computes its own claim, so that it is above the package of schemas.
    return {**SCHEMAS, "release": ModelCard}


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON Schema of the documents that ``model`` reads and writes.

    Computed fields are written, and on reading allowed but not required.
    """
    exported = model.model_json_schema(mode="serialization")
    required = [
        name for name in exported.get("required", ()) if name not in model.model_computed_fields
    ]
    return {"$schema": _DIALECT, **exported, "required": required}


def _summary(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").partition("\n")[0]
