"""Writes settings as YAML that explains itself: every field below its description."""

from __future__ import annotations

import textwrap
from typing import Final

import yaml
from pydantic import BaseModel

_WIDTH: Final = 92


def explained_yaml(settings: BaseModel, header: str) -> str:
    """Return ``settings`` as YAML with every field explained; it loads again as the same."""
    return "\n".join([*_comment(header, ""), "", *_fields(settings, "")]) + "\n"


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
            value = yaml.safe_dump([values.get(name, part)], default_flow_style=True, width=10_000)
            lines.append(f"{indent}{name}: {value.strip()[1:-1]}")
        if not indent:
            lines.append("")
    return lines if indent else lines[:-1]


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=mark, subsequent_indent=mark)
