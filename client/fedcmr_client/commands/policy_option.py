"""The option that names a site's policy, shared by the commands of `fedcmr site`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

policy_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--policy",
    "policy_path",
    default=Path("policy.yaml"),
    envvar="FEDCMR_POLICY",
    show_envvar=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The site's policy file.",
)
