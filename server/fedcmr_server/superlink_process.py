"""Flower's SuperLink with more patience for its own database: `python -m` this.

SuperLink keeps messages in SQLite and gives a request up when others have been writing for 5 s.
When all sites of a large model send their vectors at once, a slow disk takes longer; a site's
answer would be lost, and with it the site for the round.
"""

from __future__ import annotations

from typing import Final

from flwr.supercore import sql_mixin
from flwr.superlink.cli import flower_superlink

PATIENCE_S: Final = 50
"""Less than the gateway waits for SuperLink."""


def be_patient() -> None:
    """Have connections to the database that are made from now on wait longer."""
    flower = vars(sql_mixin)
    settings = {**dict(flower["SQLITE_PRAGMAS"]), "busy_timeout": str(1000 * PATIENCE_S)}
    flower["SQLITE_PRAGMAS"] = tuple(settings.items())


if __name__ == "__main__":
    be_patient()
    flower_superlink()
