"""The coordinator's logs: one JSON object a line, in files that stay small."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import Final

FILES: Final = {
    "coordinator.log": "fedcmr",
    "gateway.log": "fedcmr.gateway",
    "superlink.log": "fedcmr.superlink",
}
"""Which logger's lines lie in which file; a line lies in one alone."""

_FILE_BYTES: Final = 10_000_000


class JsonLines(logging.Formatter):
    """A record as one line of JSON; what it has as ``fields`` stands beside its text."""

    def format(self, record: logging.LogRecord) -> str:
        """See :class:`logging.Formatter`."""
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "part": record.name.removeprefix("fedcmr."),
            "text": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_to_files(folder: Path, kept: int) -> None:
    """Write what this process logs into ``folder``, with ``kept`` old files of each kind."""
    for name, logger_name in FILES.items():
        handler = RotatingFileHandler(
            folder / name, maxBytes=_FILE_BYTES, backupCount=kept, encoding="utf-8"
        )
        handler.setFormatter(JsonLines())
        logger = logging.getLogger(logger_name)
        logger.setLevel(logging.INFO)
        logger.propagate = False
        logger.addHandler(handler)
    # Libraries' warnings: what uvicorn or gRPC say of themselves.
    logging.getLogger().addHandler(logging.getLogger("fedcmr").handlers[-1])


def log_beside_superlink(folder: Path) -> None:
    """Have a server app write what it logs into `superlink.log`, which the supervisor rotates.

    Flower throws away what its server apps print.
    """
    handler = WatchedFileHandler(folder / "superlink.log", encoding="utf-8")
    handler.setFormatter(JsonLines())
    logging.getLogger("fedcmr").setLevel(logging.INFO)
    for name in ("fedcmr", "flwr"):  # Flower says why an app broke down
        logging.getLogger(name).addHandler(handler)
